"""The project's network: where it comes from, how it learns from annotations and coarse labels."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.comparison import knows, model_info
from backend.context import Context
from backend.enqueue import progress
from backend.errors import JobError, StartAnew
from backend.faults import concerns_all
from backend.label_config import ProjectConfig
from backend.prepare import clusters_name, target_of
from backend.project import Index, Project, TaskRecord, labelled, pool
from model.classes import Classes
from model.data import ImageError
from model.metrics import confusion, mean_iou
from model.network import Network, build_available, checkpoint_classes, device, load, reorder_classes, save
from model.pseudo import fine_target
from model.training import Recipe, train

log = logging.getLogger(__name__)

#: Weakly labelled images that one training draws from; more do not fit into the steps of one round.
WEAK_IMAGES = 200
#: Checkpoints kept: the one in force, and some to go back to.
KEEP_MODELS = 3


@dataclass(frozen=True)
class StoredSample:
    """One image and its target, read from cache and store when a batch needs it."""

    ctx: Context
    project: Project
    record: TaskRecord
    target: NDArray[np.uint8]

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H, W, 3) and target (H, W), rows of `Classes.sets`.

        Raises:
            ImageError: the image cannot be had; training goes on without it, and scoring notes it at its task.
        """
        try:
            image, _ = self.ctx.images(self.project.id).get(self.project.id, self.record.id, self.record.image)
        except Exception as error:
            if concerns_all(error, self.ctx.studio):
                raise
            raise ImageError(str(error)) from error
        return image, self.target


def untrained_labels(project: Project, index: Index, classes: Classes) -> list[TaskRecord]:
    """Full annotations that the model in force has not learnt from, as they now are; all for other classes."""
    info = model_info(project)
    trained = info.get("trained", {}) if knows(info, classes) else {}
    return [record for record in labelled(index) if trained.get(str(record.id)) != record.version]


def network_key(ctx: Context, project: Project, classes: Classes) -> str:
    """Names the network that scores now: the trained version, the given checkpoint, or the bare backbone."""
    info = model_info(project)
    if knows(info, classes):
        return str(info["version"])
    source = f"{ctx.settings.network}:{ctx.settings.checkpoint}:{classes.fine}"
    return f"source-{hashlib.sha1(source.encode()).hexdigest()[:8]}"


def is_trained(ctx: Context, key: str) -> bool:
    """Whether the network of that name has learnt these classes (so that its mask is worth showing)."""
    return not key.startswith("source-") or bool(ctx.settings.checkpoint)


def load_network(ctx: Context, project: Project, classes: Classes) -> tuple[Network, str]:
    """The network that scores now, and a plain sentence when it is not the one that was asked for.

    Raises:
        StartAnew: its checkpoint is lost, so that the model must be trained again.
    """
    key = network_key(ctx, project, classes)
    if (stored := stored_network(project, key, classes)) is not None:
        return stored, str(model_info(project).get("note", ""))
    if not key.startswith("source-"):
        project.store.write_json(project.key("network.json"), {"lost": key})
        raise StartAnew(f"the checkpoint {key} is gone from the store, or damaged: the model is trained again")
    if ctx.settings.checkpoint:
        return source_network(ctx.settings.checkpoint, classes), ""
    network, note = build_available(ctx.settings.network, len(classes.fine))
    network_to(project, key, network, classes, ctx)
    if note:
        log.warning("project %d: %s", project.id, note)
        project.store.write_json(project.key("network.json"), {**model_info(project), "note": note})
    return network, note or ""


def stored_network(project: Project, key: str, classes: Classes) -> Network | None:
    """The network of that name in the store; None when there is none, a damaged one is deleted."""
    name = project.key("models", f"{key}.safetensors")
    data = project.store.read(name)
    if data is None:
        return None
    try:
        return network_from(data, classes)
    except Exception as error:  # whatever a reader of safetensors finds wrong with it
        log.warning("project %d: the checkpoint %s cannot be read: %s", project.id, key, error)
        project.store.discard(name, data)
        return None


def is_lost(project: Project) -> bool:
    """Whether there was a trained model that is gone: its record or its checkpoint."""
    info = model_info(project)
    if "version" in info:
        return False
    return "lost" in info or any("/model-" in key for key in project.store.list(project.key("models")))


def source_network(checkpoint: str, classes: Classes) -> Network:
    """The checkpoint that the team starts from.

    Raises:
        JobError: it is missing, or was trained for another number of classes.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise JobError(f"FIRSTROW_CHECKPOINT names {checkpoint}, which is not a file here: give a path all workers see")
    names = checkpoint_classes(path)
    if not names:
        raise JobError(
            f"the checkpoint {checkpoint} does not name its classes, and by their order alone they might be swapped: "
            "save it by model.network.save with the names in meta['classes'], one a line, or give none"
        )
    if sorted(names) != sorted(classes.fine):
        raise JobError(
            f"the checkpoint {checkpoint} was trained for {', '.join(names)}, the project has "
            f"{', '.join(classes.fine)}: give one trained for these classes, or none"
        )
    return reorder_classes(load(path), names, classes.fine)


def network_from(data: bytes, classes: Classes) -> Network:
    """A network from the bytes of its safetensors file, its outputs in the order of these classes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        return reorder_classes(load(path), checkpoint_classes(path), classes.fine)


def network_to(project: Project, version: str, network: Network, classes: Classes, ctx: Context) -> None:
    """Keep a network in the store."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save(network, path, {"classes": "\n".join(classes.fine), "image_size": str(ctx.settings.image_size)})
        project.store.write(project.key("models", f"{version}.safetensors"), path.read_bytes())


def train_round(ctx: Context, project: Project, index: Index, config: ProjectConfig, version: str) -> None:
    """Learn from every full annotation and the pool's coarse labels; the outcome becomes the model in force."""
    new = untrained_labels(project, index, config.classes)
    test_then_train(ctx, project, new, config, version)
    network, note = base_network(ctx, project, config.classes)
    full, weak = full_samples(ctx, project, index, config), weak_samples(ctx, project, index, config)
    recipe = Recipe(steps=ctx.settings.train_steps, seed=len(full))
    try:
        network = train(
            network, full, weak, config.classes, recipe, device(), lambda done, total, loss: progress(done, total)
        )
    except (FloatingPointError, ImageError) as error:
        keep_model(ctx, project, version, error)
        return
    ctx.board.go_on(project.id)
    network_to(project, version, network, config.classes, ctx)
    trained = {str(sample.record.id): sample.record.version for sample in full}  # not those whose mask was lost
    info = {"version": version, "trained": trained, "classes": list(config.classes.fine), "note": note}
    project.store.write_json(project.key("network.json"), info)
    prune_models(project, version)
    log.info("project %d: %s trained on %d full and %d coarse images", project.id, version, len(full), len(weak))


def keep_model(ctx: Context, project: Project, version: str, error: Exception) -> None:
    """Say that a training came to nothing; the model in force stays, and the round goes on with it."""
    reason = f"{version} is not used, the model in force stays: {error}"
    log.error("project %d: %s", project.id, reason)
    ctx.board.fail(project.id, "train", reason)


def base_network(ctx: Context, project: Project, classes: Classes) -> tuple[Network, str]:
    """Where a training starts: the given checkpoint each time, else the model in force."""
    if ctx.settings.checkpoint:
        return source_network(ctx.settings.checkpoint, classes), ""
    return load_network(ctx, project, classes)


def full_samples(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> list[StoredSample]:
    """Images with a full annotation."""
    found = []
    for record in labelled(index):
        mask = project.labels(record.id, config)
        if mask is not None:
            found.append(StoredSample(ctx, project, record, fine_target(mask, config.classes)))
    return found


def weak_samples(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> list[StoredSample]:
    """A bounded draw of pool images that their coarse labels say something about."""
    clusters, decided = clusters_name(ctx, project), project.decided(config)
    rng = np.random.default_rng([project.id, len(index)])
    found: list[StoredSample] = []
    for record in rng.permutation(np.array(pool(index), dtype=object)):
        target = None if record.error else target_of(project, record, clusters, decided, config)
        if target is not None and (target != config.classes.any_row).any():
            found.append(StoredSample(ctx, project, record, target))
        if len(found) == WEAK_IMAGES:
            break
    return found


def test_then_train(
    ctx: Context, project: Project, new: Sequence[TaskRecord], config: ProjectConfig, version: str
) -> None:
    """Score new annotations by the model that has not seen them: a learning curve without a held-out set."""
    key = network_key(ctx, project, config.classes)
    if not is_trained(ctx, key):
        return
    curve = project.store.read_json(project.key("curve.json")) or []
    trained = model_info(project).get("trained", {})
    for record in new:
        if str(record.id) in trained:
            continue  # read anew, or changed: it has seen the picture
        seen = project.prediction(key, record.id, config.classes.fine)
        mask = project.labels(record.id, config)
        if seen is None or mask is None:
            continue
        curve.append(curve_row(record.id, key, len(trained), seen[0], mask, config.classes))
    project.store.write_json(project.key("curve.json"), curve)


def curve_row(
    task: int, model: str, trained_on: int, seen: NDArray[np.uint8], mask: NDArray[np.uint8], classes: Classes
) -> dict[str, Any]:
    """A row of the learning curve: how right a model was on a label that it has not seen.

    Args:
        task: whose label it is.
        model: its name.
        trained_on: how many labels it has learnt.
        seen: (H, W) what it took the picture for.
        mask: (H, W) the label.
        classes: fine and coarse classes.
    """
    table = confusion(seen, mask, len(classes.fine))
    return {
        "task": task,
        "model": model,
        "trained_on": trained_on,
        "miou": float(mean_iou(table)),
        "confusion": table.tolist(),
        "classes": list(classes.fine),
    }


def prune_models(project: Project, keep: str) -> None:
    """Delete old checkpoints and what only they explain."""
    names = sorted(project.store.list(project.key("models")), key=lambda key: (len(key), key))
    old = [name for name in names if not name.endswith(f"/{keep}.safetensors")][: -(KEEP_MODELS - 1)]
    for name in old:
        version = name.rsplit("/", 1)[-1].removesuffix(".safetensors")
        project.store.delete(name)
        project.store.delete_prefix(project.key("predictions", version))
