"""The project's head: learnt anew from sums of labelled pixels whenever a label comes, changes or goes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.context import Context
from backend.features import Fit, Held, extractor, finite
from backend.label_config import ProjectConfig
from backend.learn import curve_row, keep_model
from backend.named_maps import renumbered
from backend.project import Index, Project, TaskRecord, labelled, pool, remember
from model.classes import IGNORE, Classes
from model.features import Maps
from model.heads import (
    BACKGROUND,
    FOREGROUND,
    Head,
    LabelledPixels,
    Sums,
    choose_pixels,
    coarse_sums,
    names_foreground,
    need_finite,
    no_sums,
    solve,
)
from model.instant import LABELLED, WEAK, WEAK_UNTIL, head_from_coarse, head_of, left_out_of
from model.masks import predict
from model.pixel_pool import at_pool_pixels

#: Images of the pool that weak labels are made of.
WEAK_IMAGES = 400
#: Coarse answers, the newest, that tell foreground from background.
COARSE_ANSWERS = 100


class Model(NamedTuple):
    """What predicts now.

    Attributes:
        version: its name; empty while nobody has named a class of anything.
        head: of the fine classes; from coarse answers alone until there is a full annotation.
        coarse: of background and foreground; None where no coarse answers name both.
        trained: by task, the version of the label that it has learnt.
        fit: version of the features that its heads are of.
    """

    version: str
    head: Head | None
    coarse: Head | None
    trained: Mapping[str, str]
    fit: str

    @property
    def learnt(self) -> Head | None:
        """The head, if it comes from full annotations."""
        return self.head if self.trained else None


@dataclass(frozen=True)
class Summed:
    """Sums of all labelled pixels of a project, as this process has them.

    Attributes:
        fit: version of the features.
        versions: by task, the version of the label that is in them.
        total: of all.
    """

    fit: str
    versions: Mapping[int, str]
    total: Sums


#: Projects whose sums a process keeps: megabytes each, and made again from the store.
PROJECTS = 20
#: By store and project.
SUMMED: dict[tuple[str, int], Summed] = {}
#: The same of coarse answers: what names them, and their head.
COARSE: dict[tuple[str, int], tuple[str, Head | None]] = {}


def pixels_key(project: Project, fit: Fit, record: TaskRecord) -> str:
    """Where the pixels lie that the label of a task teaches with."""
    return project.key("pixels", fit.version, f"{record.id}-{record.version}.npz")


def keep_pixels(
    project: Project, config: ProjectConfig, fit: Fit, record: TaskRecord, maps: Maps, mask: NDArray[np.uint8]
) -> None:
    """Keep the pixels that the label of a task teaches with.

    Args:
        project: whose task it is.
        config: for the names of its classes.
        fit: of the features.
        record: of the task.
        maps: of its image.
        mask: (H, W) its annotation.

    Raises:
        FeatureError: what the network computes of them is not finite.
    """
    places, labels, weights = choose_pixels(mask, LABELLED, np.random.default_rng(record.id))
    if len(labels):
        with torch.inference_mode():
            raw = maps.at(torch.from_numpy(places)[None].to(maps.images.device))[0].cpu()
            features = finite(fit.scaling(raw).half())
    else:
        features = torch.zeros(0, fit.scaling.dimensions, dtype=torch.float16)
    arrays = {
        "features": features.numpy(),
        "labels": labels,
        "weights": weights,
        "names": np.array(config.classes.fine),
    }
    project.store.write_arrays(pixels_key(project, fit, record), arrays)


def read_pixels(project: Project, key: str, classes: Sequence[str]) -> LabelledPixels | None:
    """Kept pixels, those of these classes alone; None where they are gone, or no numbers: then they are made anew."""
    arrays = project.store.read_arrays(key)
    if arrays is None:
        return None
    if not all(np.isfinite(arrays[name]).all() for name in ("features", "weights")):
        project.store.discard(key, project.store.read(key))
        return None
    labels = renumbered(arrays["labels"], arrays["names"].tolist(), classes)
    known = labels != IGNORE
    features = torch.from_numpy(arrays["features"][known])
    return LabelledPixels(features, labels[known], arrays["weights"][known])


def lacks_pixels(project: Project, fit: Fit, index: Index) -> set[int]:
    """Tasks whose label teaches nothing yet: its pixels are not kept."""
    keys = set(project.store.list(project.key("pixels", fit.version)))
    return {record.id for record in labelled(index) if pixels_key(project, fit, record) not in keys}


def useless_pixels(project: Project, fit: Fit) -> set[str]:
    """Files with the pixels of labels that have changed or are gone."""
    there = set(project.store.list(project.key("pixels", fit.version)))
    index = project.index()  # read after the listing: a round that begins now may be adding to both
    return there - {pixels_key(project, fit, record) for record in index.values()} if index else set()


def learn(ctx: Context, project: Project, index: Index, config: ProjectConfig, features: Held, number: int) -> Model:
    """Have the model in force know all labels there are.

    Args:
        ctx: the doors.
        project: which project.
        index: its tasks.
        config: its label config.
        features: of its pool.
        number: of the round, for the name of a new model.

    Returns:
        The model in force. Where no head can be made of the labels, the former one stays, the reason is left where
        `status` looks, and it is tried again.
    """
    before = load_model(project)
    try:
        return learn_labels(ctx, project, index, config, features, number, before)
    except FloatingPointError as error:
        for kept in (SUMMED, COARSE):
            kept.pop((project.store.url, project.id), None)  # a number that is not finite would stay in them
        keep_model(ctx, project, f"model-{number}", error)
        ctx.board.retry_later(project.id)
    fits = before and before.head and before.fit == features.fit.version and before.head.classes == config.classes.fine
    return before if before and fits else Model("", None, None, {}, features.fit.version)


def learn_labels(
    ctx: Context,
    project: Project,
    index: Index,
    config: ProjectConfig,
    features: Held,
    number: int,
    before: Model | None,
) -> Model:
    """As `learn`; `before` is the model in force.

    Raises:
        FloatingPointError: no head can be made of the labels; nothing is saved.
    """
    coarse, said = coarse_head(project, index, config, features)
    names = partial(digest, features.fit, config.classes, said)
    made_of = (project.store.read_json(project.key("model.json")) or {}).get("made_of") if before else None
    if before and made_of == names({str(record.id): record.version for record in labelled(index)}):
        return before
    summed, head = sum_labels(project, features.fit, config.classes, labelled(index)), None
    need_finite("sums of labelled pixels", summed.total.weight)
    known = {str(task): v for task, v in summed.versions.items()} if summed.total.labelled.any() else {}
    if before and made_of == names(known):  # without labels whose pixels are lost
        return before
    if known:
        head = fit_head(project, index, config.classes, features, summed, coarse)
    elif coarse is not None:
        head = head_from_coarse(coarse, config.classes)
    version = f"model-{number}" if known else f"coarse-{number}" if head else ""
    model = Model(version, head, coarse, known, features.fit.version)
    need_finite("a head", *(part for made in (head, coarse) if made for part in (made.weights, made.bias)))
    ctx.board.go_on(project.id)
    answers = sum(record.coarse and not record.error for record in index.values())
    save_model(ctx, project, model, config.classes, names(known), answers)
    return model


def digest(fit: Fit, classes: Classes, said: str, trained: Mapping[str, str]) -> str:
    """Names all that a model is made of."""
    return hashlib.sha1(repr([fit.version, classes, sorted(trained.items()), said]).encode()).hexdigest()


def sum_labels(project: Project, fit: Fit, classes: Classes, records: Sequence[TaskRecord]) -> Summed:
    """The sums of all labels whose pixels are kept; only what changed since the last time is added and subtracted."""
    place, wanted = (project.store.url, project.id), {record.id: record.version for record in records}
    before = SUMMED.get(place)
    total, versions = without_gone(project, fit, classes, before, wanted) or (
        no_sums(classes.fine, fit.scaling.dimensions),
        dict[int, str](),
    )
    for task, version in wanted.items():
        if task not in versions and (new := pixels_of(project, fit, task, version, classes)) is not None:
            total, versions[task] = total + new.sums(classes.fine), version
    summed = Summed(fit.version, versions, total)
    remember(SUMMED, place, summed, PROJECTS)
    return summed


def without_gone(
    project: Project, fit: Fit, classes: Classes, before: Summed | None, wanted: Mapping[int, str]
) -> tuple[Sums, dict[int, str]] | None:
    """Earlier sums without the labels that have changed or are gone; None where they must be made from the start."""
    if before is None or (before.fit, before.total.classes) != (fit.version, classes.fine):
        return None
    total, versions = before.total, dict(before.versions)
    for task, version in before.versions.items():
        if wanted.get(task) != version:
            gone = pixels_of(project, fit, task, version, classes)
            if gone is None:
                return None
            total = total - gone.sums(classes.fine)
            versions.pop(task)
    return total, versions


def pixels_of(project: Project, fit: Fit, task: int, version: str, classes: Classes) -> LabelledPixels | None:
    """The pixels that a label taught with."""
    key = pixels_key(project, fit, TaskRecord(task, version=version))
    return read_pixels(project, key, classes.fine)


def fit_head(
    project: Project, index: Index, classes: Classes, features: Held, summed: Summed, coarse: Head | None
) -> Head:
    """The head of all labels."""
    few = left_out_of(sorted(summed.versions))
    kept = [pixels_of(project, features.fit, task, summed.versions[task], classes) for task in few]
    weak = weak_pixels(project, index, features) if coarse and summed.total.images <= WEAK_UNTIL else torch.zeros(0)
    return head_of(summed.total, [pixels for pixels in kept if pixels], None, coarse, weak, classes)


def weak_pixels(project: Project, index: Index, features: Held) -> Tensor:
    """(P, D) pixels from all over the pool."""
    tasks = [record.id for record in pool(index) if record.id in features.places]
    chosen = tasks[:: max(1, len(tasks) // WEAK_IMAGES)][:WEAK_IMAGES]
    found = [part[:, :WEAK].flatten(0, 1).float() for _, part, _ in features.parts(project.store, chosen)]
    return torch.cat(found) if found else torch.zeros(0, features.fit.scaling.dimensions)


def coarse_head(project: Project, index: Index, config: ProjectConfig, features: Held) -> tuple[Head | None, str]:
    """The head that coarse answers teach, and what names all that it was made of.

    None where no answer names a foreground, or none a background: they then teach nothing about either.
    """
    answered = [record for record in index.values() if record.coarse and not record.error]
    answered = [record for record in answered if record.id in features.places][-COARSE_ANSWERS:]
    said = [(record.id, record.version) for record in answered]
    name = hashlib.sha1(repr([features.fit.version, config.classes, said]).encode()).hexdigest()
    place = (project.store.url, project.id)
    if place not in COARSE or COARSE[place][0] != name:
        remember(COARSE, place, (name, solve_coarse(project, answered, config, features)), PROJECTS)
    return COARSE[place][1], name


def solve_coarse(
    project: Project, answered: Sequence[TaskRecord], config: ProjectConfig, features: Held
) -> Head | None:
    """The head of these coarse answers."""
    total = no_sums((BACKGROUND, FOREGROUND), features.fit.scaling.dimensions)
    for record in answered:
        mask, seen = project.own_coarse(record, config), features.of_image(project.store, record.id)
        if mask is not None and seen is not None:
            total = total + coarse_sums(seen.float(), at_pool_pixels(mask), len(config.classes.coarse))
    return solve(total) if names_foreground(total) else None


def said_of_coarse(model: Model, answers: int) -> str:
    """What there is to say of coarse answers that teach nothing; empty where they do, or there are none."""
    if model.coarse is not None or not answers:
        return ""
    return (
        f"{answers} pictures have coarse labels, but these do not name both background and foreground: nothing is "
        "learnt from them, nor from the rest of the pool, until they do."
    )


def save_model(ctx: Context, project: Project, model: Model, classes: Classes, made_of: str, answers: int) -> None:
    """Keep what predicts from now on; `answers` is how many pictures have coarse labels."""
    heads = {"head": model.head, "coarse": model.coarse}
    arrays: dict[str, NDArray[Any]] = {"classes": np.array(classes.fine)}
    for name, head in heads.items():
        if head is not None:
            arrays |= {f"{name}:weights": head.weights.numpy(), f"{name}:bias": head.bias.numpy()}
    project.store.write_arrays(project.key("head.npz"), arrays)
    info = {"version": model.version, "trained": model.trained, "classes": classes.fine, "made_of": made_of}
    info["fit"] = model.fit
    info["note"] = " ".join(filter(None, (extractor(ctx.settings.network)[2], said_of_coarse(model, answers))))
    project.store.write_json(project.key("model.json"), info)


def load_model(project: Project) -> Model | None:
    """What predicts now; None before there is anything, or where it is damaged: it is made again."""
    info = project.store.read_json(project.key("model.json"))
    arrays = project.store.read_arrays(project.key("head.npz"))
    if not info or "made_of" not in info or arrays is None:
        return None
    classes = tuple(str(name) for name in arrays["classes"])

    def head(name: str, classes: tuple[str, ...]) -> Head | None:
        if f"{name}:weights" not in arrays:
            return None
        weights, bias = (torch.from_numpy(arrays[f"{name}:{part}"]) for part in ("weights", "bias"))
        return Head(classes, weights, bias)

    fine, coarse = head("head", classes), head("coarse", (BACKGROUND, FOREGROUND))
    if not all(made.finite for made in (fine, coarse) if made):
        return None
    return Model(info["version"], fine, coarse, info["trained"], info.get("fit", ""))


def test_before_learning(
    model: Model, record: TaskRecord, maps: Maps, fit: Fit, mask: NDArray[np.uint8], classes: Classes
) -> dict[str, Any] | None:
    """A row of the learning curve: how right the model was on a label that it has not seen; None where it has.

    None, too, where the model is of other classes or other features.
    """
    if model.head is None or str(record.id) in model.trained or model.head.classes != classes.fine:
        return None
    if model.fit != fit.version:
        return None
    seen, _ = predict(maps, fit.scaling, model.head)
    return curve_row(record.id, model.version, len(model.trained), seen, mask, classes)
