"""Our predictions at a detach: deleted, but for versions of others; what somebody may have open is moved away."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from math import isclose

from backend.attached import PAGE, Attached, Undo, does, opened_since, readable
from backend.connection import OURS
from backend.generations import AT_ONCE, QUEUE
from backend.labelstudio import Row


def undo_predictions(here: Attached) -> Iterator[Undo]:
    """Delete our rank predictions and prelabels, not versions that were there before us.

    A prelabel that somebody may have open is moved to a project of its own first, also where they go on with what they
    have submitted: Label Studio refuses what was begun from a prediction that is gone.
    """
    studio, before, bins = here.studio, here.before.get("versions", []), old_bins(here)
    sizes = {v: n for v, n in studio.versions(here.id).items() if OURS.fullmatch(v) and v not in before}
    if here.annotated and (bins or sizes):
        yield Undo(
            "Annotations that began from a prediction that is deleted below forget which it was (`parent_prediction`); "
            "of a prelabel that is moved, once that is deleted.",
            list,
        )
    for bin_project in bins:
        text = f"Delete the project {bin_project['title']!r}: nobody has its prelabels open any more."
        yield Undo(text, does(studio.delete_project, int(bin_project["id"])))
    opened, others = survey(here, sizes)
    if opened:
        yield Undo(
            f"Move {len(opened)} prelabels that people may have open to a project {bin_title(here)!r}, so that they "
            "can submit and update their work; delete that project tomorrow, or detach again then.",
            lambda: park(here, opened),
        )
    for version, count in sorted(sizes.items()):
        theirs = others[version]
        text = f"Delete {count - len(theirs)} predictions of {version!r}"
        more = f", which First Row made; {len(theirs)} others stay" if theirs else ""
        yield Undo(f"{text}{more}.", partial(remove, here, version, theirs))


def remove(here: Attached, version: str, theirs: set[int]) -> Iterator[str]:
    """Delete what is left of a version; of a large one a page of tasks at a time, so that people can go on.

    Args:
        here: the project.
        version: name of the version.
        theirs: predictions that stay.
    """
    studio, size = here.studio, here.studio.versions(here.id).get(version, 0)
    if size > AT_ONCE or theirs:
        ids = sorted(studio.tasks_with_version(here.id, version))
        for start in range(0, len(ids), PAGE):
            for task in readable(here, ids[start : start + PAGE]):
                for row in of_versions(task, [version]):
                    if int(row["id"]) not in theirs:
                        studio.delete_prediction(int(row["id"]))
            yield f"  {min(start + PAGE, len(ids))} of {len(ids)} tasks"
    if size and not theirs:
        studio.delete_version(here.id, version)


def survey(here: Attached, sizes: Mapping[str, int]) -> tuple[list[int], dict[str, set[int]]]:
    """Look at prelabels.

    Args:
        here: the project.
        sizes: versions that have names like ours.

    Returns:
        Ids of ours that people may have open; and of each version those that are not ours. Versions that `/setup`
        names, `seg-7`, are names that others give, too.
    """
    opened, theirs, empty = [], {version: set[int]() for version in sizes}, {version: set[int]() for version in sizes}
    tasks = served(here, sizes) | lately_annotated(here) if sizes else set()
    for task in readable(here, sorted(tasks)):
        rows = of_versions(task, sizes)
        for row in rows:
            if not row.get("result"):
                empty[row["model_version"]].add(int(row["id"]))
            elif not made_by_us(row):
                theirs[row["model_version"]].add(int(row["id"]))
        opened += opened_of(task, [row for row in rows if int(row["id"]) not in theirs[row["model_version"]]])
    others = {version: rows | empty[version] if rows else rows for version, rows in theirs.items()}
    return [number for number in opened if not any(number in rows for rows in others.values())], others


def opened_of(task: Row, ours: Sequence[Row]) -> list[int]:
    """Prelabels of a task that people may have open: it was served lately, or what was begun from one was saved."""
    since = opened_since()
    begun = [row for row in task.get("annotations") or [] if str(row.get("updated_at", "")) >= since]
    parents = {row.get("parent_prediction") for row in begun}
    fresh = not task.get("is_labeled") and any(str(row.get("created_at", "")) >= since for row in ours)
    return [int(row["id"]) for row in ours if row["id"] in parents or (fresh and may_be_open(row))]


def lately_annotated(here: Attached) -> set[int]:
    """Tasks with an annotation that somebody may still have open in an editor."""
    since = opened_since()
    return {task for task, changed in here.annotated.items() if changed >= since}


def served(here: Attached, sizes: Mapping[str, int]) -> set[int]:
    """Tasks with prelabels that were served, or that somebody has a draft of."""
    studio, found = here.studio, here.studio.tasks_with_draft(here.id)
    for version in sizes:
        if not version.startswith(QUEUE):
            found |= studio.tasks_with_version(here.id, version)
    return found | studio.head(here.id) if serves_what_is_stored(here) else found


def serves_what_is_stored(here: Attached) -> bool:
    """Whether Label Studio serves the head's stored prelabels without asking us.

    It asks the project's first ML backend alone, and only while that has the name of the order in force.
    """
    if here.ours is None:
        return False
    first = all(int(backend["id"]) >= int(here.ours["id"]) for backend in here.studio.ml_backends(here.id))
    return not first or here.studio.version_in_force(here.id) != here.ours["title"]


def of_versions(task: Row, versions: Collection[str]) -> list[Row]:
    """Predictions of a task that are of these versions."""
    return [row for row in task.get("predictions") or [] if row.get("model_version") in versions]


def made_by_us(prediction: Row) -> bool:
    """Whether a prediction with regions is one of ours: its score is the mean of theirs, as `/predict` answers it."""
    if str(prediction["model_version"]).startswith(QUEUE):
        return True
    regions, score = prediction["result"], prediction.get("score")
    scores = [region["score"] for region in regions if isinstance(region, Mapping) and "score" in region]
    if score is None or len(scores) < len(regions):
        return False
    return isclose(float(score), sum(map(float, scores)) / len(scores), abs_tol=1e-6)


def may_be_open(prediction: Row) -> bool:
    """Whether an editor may have begun from it: an old prelabel of ours is emptied, but its id still counts."""
    return bool(prediction.get("result")) or not str(prediction.get("model_version")).startswith(QUEUE)


def park(here: Attached, predictions: Sequence[int]) -> list[str]:
    """Move predictions to a project of their own; their ids stay, and with them what people have begun."""
    config = str(here.studio.project(here.id)["label_config"])
    made = int(here.studio.create_project(bin_title(here), config)["id"])
    [task] = here.studio.import_tasks(made, [dict.fromkeys(image_keys(here), "")])
    for prediction in predictions:
        here.studio.patch_prediction(prediction, task=task, project=made)
    return []


def image_keys(here: Attached) -> list[str]:
    """The keys that a task's data must have."""
    config = here.config
    return [config.image_key] if config else ["image"]


def bin_title(here: Attached) -> str:
    """Name of the project for prelabels that people may have open."""
    return f"First Row: open prelabels of project {here.id}"


def old_bins(here: Attached) -> list[Row]:
    """Such projects of former detaches that nobody needs any more."""
    rows = here.studio.projects(bin_title(here))
    return [row for row in rows if row["title"] == bin_title(here) and str(row["created_at"]) < opened_since()]
