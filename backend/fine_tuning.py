"""Fine-tuning: all weights of the network are trained in the background, and its masks shown once they are better.

The head learns each label at once, and ranks. The network takes minutes, so it is trained now and then, by a job on
the queue `gpu` that rests whenever another job waits. Both are tested on each new label before they learn it; people
see the masks of the one that was better of late.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backend.comparison import knows, model_info, tuned_in_force
from backend.context import Context
from backend.enqueue import progress
from backend.faults import concerns_all
from backend.label_config import ProjectConfig
from backend.learn import full_samples, keep_model, network_to, prune_models, source_network, stored_network
from backend.project import Index, Project, TaskRecord, labelled, pool
from model.classes import Classes
from model.data import ImageError
from model.network import Network, build_available, device
from model.training import Recipe, Training, predict_surely

log = logging.getLogger(__name__)

#: Labels from which on the network is trained by itself: where there is a GPU, and where there is none. With fewer it
#: was ahead of the head on no data set that was measured.
WITH_GPU, WITHOUT_GPU = 20, 50
#: It is trained again when there are so many times the labels that it has learnt.
MORE = 1.2
#: Steps for each label, in hundredths of `FIRSTROW_TRAIN_STEPS`, and the fewest and most.
STEPS_PER_LABEL, FEWEST, MOST = 8, 400, 1600
#: Trainings that rest in a process: each takes four times the memory of its network.
MOST_RESTING = 2


@dataclass
class Resting:
    """A training that gave way to other jobs.

    Attributes:
        training: goes on where it was.
        done: its steps so far.
        info: what is kept of the network when it ends.
    """

    training: Training
    done: int
    info: dict[str, Any]


#: By store and project, at most `MOST_RESTING`.
RESTING: dict[tuple[str, int], Resting] = {}


def fine_tune(ctx: Context, project: Project) -> None:
    """Train the network if that is due, and have it see the pool; rests when another job waits, to go on later."""
    config, index = project.config(), project.index()
    ended = not is_due(ctx, project, index, config.classes) or trained(ctx, project, index, config)
    if not (ended and see_pool(ctx, project, index, config)):
        ctx.board.want_fine_tuning(project.id)
        return
    shown = tuned_in_force(project, config.classes)
    if shown and project.state().get("masks") != shown:
        ctx.board.request_round(project.id, "the network has learnt")


def is_wanted(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> bool:
    """Whether there is something for fine-tuning to do, as far as can be told without knowing its machine."""
    if ctx.settings.fine_tune == "off":
        return False
    least = 1 if ctx.settings.fine_tune == "on" else WITH_GPU
    return grown(project, index, config.classes, least) or bool(unseen(project, index, config.classes))


def unseen(project: Project, index: Index, classes: Classes) -> list[TaskRecord]:
    """Tasks of the pool of which the store holds no mask by the network; none where there is no network."""
    info = model_info(project)
    if not knows(info, classes):
        return []
    there = set(project.store.list(project.key("predictions", str(info["version"]))))
    return [r for r in pool(index) if not r.error and project.prediction_key(str(info["version"]), r.id) not in there]


def is_due(ctx: Context, project: Project, index: Index, classes: Classes) -> bool:
    """Whether the network is to be trained on this machine."""
    automatic = WITH_GPU if device() == "cuda" else WITHOUT_GPU
    return place(project) in RESTING or grown(
        project, index, classes, 1 if ctx.settings.fine_tune == "on" else automatic
    )


def grown(project: Project, index: Index, classes: Classes, least: int) -> bool:
    """Whether there are enough labels, and enough more than the network has learnt."""
    info, count = model_info(project), len(labelled(index))
    learnt = len(info.get("trained", ())) if knows(info, classes) else 0
    return count >= max(least, MORE * max(learnt, int(info.get("tried", 0))))


def trained(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> bool:
    """Train the network, from where an earlier job of this worker rested; False where it rests again."""
    resting = RESTING.pop(place(project), None)
    if resting is None or resting.info["classes"] != list(config.classes.fine):
        resting = begun(ctx, project, index, config)
    steps = resting.training.recipe.steps
    try:
        for _ in resting.training:
            resting.done += 1
            progress(resting.done, steps)
            if ctx.board.waiting() and resting.done < steps:
                rest(project, resting)
                return False
        network = resting.training.result()
    except (FloatingPointError, ImageError) as error:
        keep_model(ctx, project, resting.info["version"], error)
        tried = {**model_info(project), "tried": len(resting.info["trained"])}  # with more labels it may come out well
        project.store.write_json(project.key("network.json"), tried)
        return True
    ctx.board.go_on(project.id)
    network_to(project, resting.info["version"], network, config.classes, ctx)
    project.store.write_json(project.key("network.json"), resting.info)
    prune_models(project, resting.info["version"])
    return True


def rest(project: Project, training: Resting) -> None:
    """Keep a training in this process; of many projects only the latest, the others begin anew."""
    RESTING[place(project)] = training
    while len(RESTING) > MOST_RESTING:
        RESTING.pop(next(iter(RESTING)))


def begun(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> Resting:
    """A training on all labels there are, from the network as it came."""
    full = full_samples(ctx, project, index, config)
    if ctx.settings.checkpoint:
        network, note = source_network(ctx.settings.checkpoint, config.classes), ""
    else:
        network, found = build_available(ctx.settings.network, len(config.classes.fine))
        note = found or ""
    share = min(max(STEPS_PER_LABEL * len(full), FEWEST), MOST) / 100
    recipe = Recipe(steps=round(share * ctx.settings.train_steps), seed=len(full))
    info = {
        "version": f"network-{project.state().get('round', 0)}",
        "trained": {str(sample.record.id): sample.record.version for sample in full},
        "classes": list(config.classes.fine),
        "note": note,
    }
    return Resting(Training(network, full, [], config.classes, recipe, device()), 0, info)


def see_pool(ctx: Context, project: Project, index: Index, config: ProjectConfig) -> bool:
    """Have the store hold the network's mask of every task of the pool; False where it rests."""
    version, left = str(model_info(project).get("version")), unseen(project, index, config.classes)
    if not left or (network := stored_network(project, version, config.classes)) is None:
        return True
    network = network.to(device()).eval()
    for done, record in enumerate(left):
        progress(done, len(left))
        if done and ctx.board.waiting():
            return False
        see(ctx, project, network, version, record, config.classes)
    return True


def see(ctx: Context, project: Project, network: Network, version: str, record: TaskRecord, classes: Classes) -> None:
    """Keep the network's mask of a task; a picture that fails has none."""
    try:
        image, _ = ctx.images(project.id).get(project.id, record.id, record.image)
        mask, sure = predict_surely(network, image, device())
    except Exception as error:
        if concerns_all(error, ctx.studio):
            raise
        log.warning("project %d, task %d is not seen by the network: %s", project.id, record.id, error)
        return
    project.save_prediction(version, record.id, mask, sure, classes.fine)


def unseen_mask(project: Project, task: int, classes: Classes) -> tuple[str, int, NDArray[np.uint8]] | None:
    """The network's name, how many labels it has learnt, and its mask (H, W) of a task that is not among them."""
    info = model_info(project)
    if not knows(info, classes) or str(task) in info["trained"]:
        return None
    seen = project.prediction(str(info["version"]), task, classes.fine)
    return None if seen is None else (str(info["version"]), len(info["trained"]), seen[0])


def place(project: Project) -> tuple[str, int]:
    """Names a project among those of all stores."""
    return project.store.url, project.id
