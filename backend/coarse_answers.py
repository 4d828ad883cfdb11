"""A person's coarse answers: what counts as one, and how one is set aside while its task is segmented in full.

Nothing is deleted. Label Studio serves a task again when its annotation counts as skipped by somebody else: so the
annotation is handed to an account that `attach` made, our keeper, and marked as skipped. Id, content and times stay, an
editor that has it open can still update it, and `give_back` undoes it exactly. Before that the whole annotation is
copied, to the store and to a prediction.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import orjson

from backend.errors import LabelStudioError
from backend.label_config import MEANS, MOST_ROWS, ProjectConfig
from backend.labelstudio import LabelStudio, Row

#: `model_version` of the predictions that keep a copy of a coarse answer.
COARSE_COPY = "coarse-labels"
#: Ids of regions that were made from clusters.
CLUSTER = re.compile(r"cl\d+(_.*)?")
#: Key in the `meta` of a copy's first region: all of the annotation but its regions.
HEADER = "first_row"
#: Key beside it, in a copy that was made anew: when the annotation was set aside, in Label Studio's time.
ASIDE = "first_row_aside"
#: Where people get their own skipped tasks back, others' skips count as work on a task, but for ground truth.
OWN_SKIPS = "REQUEUE_FOR_ME"
#: What becomes of skipped tasks -> what more one needs to be served again in its place, by measurement; none: never.
SKIPS: dict[str, dict[str, Any]] = {"REQUEUE_FOR_OTHERS": {}, OWN_SKIPS: {"ground_truth": True}}
#: Fields of an annotation that tell whether anybody has touched it.
TOUCHED = ("updated_at", "was_cancelled", "ground_truth", "lead_time")

#: Where the labels of mask regions stand in their value.
LABELS = ("brushlabels", "bitmasklabels", "polygonlabels")

Kind = Literal["full", "coarse", "other"]
Region = Mapping[str, Any]


def is_cluster(region: Region) -> bool:
    """Whether a region was made from a cluster, whatever label or control it has now."""
    meta = region.get("meta")
    return (isinstance(meta, Mapping) and "cluster" in meta) or bool(CLUSTER.fullmatch(str(region.get("id"))))


def is_vote(region: Region, config: ProjectConfig) -> bool:
    """Whether a region is a coarse answer: a cluster, or one drawn with the coarse control."""
    return is_cluster(region) or (config.coarse is not None and region.get("from_name") == config.coarse.name)


def means_of(region: Region) -> dict[str, list[str]]:
    """Fine classes of each coarse label as they were when a region was shown; none where it does not say it."""
    meta = region.get("meta")
    means = meta.get(MEANS) if isinstance(meta, Mapping) else None
    rows = {name: of for name, of in means.items() if isinstance(of, list)} if isinstance(means, Mapping) else {}
    if sum(map(len, rows.values())) > MOST_ROWS:
        return {}  # nothing that we have written
    return {str(label): [str(name) for name in members] for label, members in rows.items()}


def votes_of(result: Iterable[Region], config: ProjectConfig) -> list[Region]:
    """The coarse answers among regions; what one does not say of its label, another of them says for it."""
    votes = [region for region in result if is_vote(region, config)]
    means = next(filter(None, map(means_of, votes)), None)
    return [region if means is None or means_of(region) else {**region, "meta": {MEANS: means}} for region in votes]


def fine_classes(region: Region, config: ProjectConfig) -> frozenset[str]:
    """The fine classes that a coarse answer allows, by their names when it was given; none for Mixed.

    Args:
        region: a coarse answer; a fine label on a cluster allows its whole coarse class.
        config: the project's controls.
    """
    labels = labels_of([region])
    if len(labels) != 1:
        return frozenset()
    [label] = labels
    if region.get("from_name") == config.fine.name:
        named = [members for members in config.groups.values() if label in members]
        return frozenset(named[0] if named else labels)
    return config.members(label, means_of(region))


def kind_of(annotation: Row, config: ProjectConfig, asked: bool) -> Kind:
    """What a person's annotation is to us.

    Args:
        annotation: with its `result`.
        config: the project's controls.
        asked: whether the task showed clusters: then only a region that was drawn makes it a full segmentation.

    Returns:
        `full` with a region of the team's own control that is no cluster (or empty, where pixels without a region mean
        background), `coarse` with coarse answers alone or beside other controls, else `other`.
    """
    regions: Sequence[Region] = annotation.get("result") or []
    if any(region.get("from_name") == config.fine.name and not is_cluster(region) for region in regions):
        return "full"
    if not regions and config.background == "" and not asked:
        return "full"
    return "coarse" if any(is_vote(region, config) for region in regions) else "other"


def may_be_set_aside(task: Row, annotation: Row, config: ProjectConfig, since: str, keeper: int) -> bool:
    """Whether an annotation is one that we asked for, and nothing more.

    Args:
        task: with its number of comments.
        annotation: one of it.
        config: the project's controls.
        since: when our ML backend was connected, in Label Studio's time; empty where there is none.
        keeper: id of the account that annotations are handed to; 0 without one.
    """
    regions: Sequence[Region] = annotation.get("result") or []
    pure = bool(regions) and all(is_vote(region, config) for region in regions)
    plain = not any(annotation.get(name) for name in ("ground_truth", "was_cancelled"))
    plain &= not commented(task) and not commented(annotation)
    ours = bool(since) and str(annotation.get("created_at", "")) >= since and keeper not in (0, author(annotation))
    return pure and plain and ours


def is_served(task: Row, aside: Sequence[Row], skips: str) -> bool:
    """Whether Label Studio serves a task again once these of its annotations are set aside.

    Where people get their own skipped tasks back, it does so for one annotation alone, marked as ground truth; a mark
    that a person has made on another of the task would be lost.

    Args:
        task: with its annotations.
        aside: some of them.
        skips: what becomes of skipped tasks.
    """
    if skips != OWN_SKIPS:
        return skips in SKIPS
    numbers = {row["id"] for row in aside}
    others = [row for row in task.get("annotations") or [] if row["id"] not in numbers]
    return len(numbers) == 1 and not any(row.get("ground_truth") for row in others)


def untouched(now: Row, before: Row, *changed: str) -> bool:
    """Whether nobody has touched an annotation since, but for `changed` fields."""
    fields = [name for name in TOUCHED if name not in changed]
    return digest(now) == digest(before) and all(now.get(name) == before.get(name) for name in fields)


def commented(row: Row) -> bool:
    """Whether people have commented on a task or an annotation."""
    return any(bool(row.get(name)) for name in ("comment_count", "unresolved_comment_count", "comments"))


def was_asked(task: Row, config: ProjectConfig, ours: re.Pattern[str], since: str) -> bool:
    """Whether Label Studio still shows that a task was served with clusters.

    A prediction of ours tells it, and where that is deleted by now, regions of an annotation that came from one; those
    can also have been imported from another project.

    Args:
        task: with its annotations and predictions.
        config: the project's controls.
        ours: versions of our predictions.
        since: when annotations that count for that were made at the earliest, in Label Studio's time; empty: none do.
    """
    answered = any(
        isinstance(meta := region.get("meta"), Mapping) and "cluster" in meta
        for annotation in task.get("annotations") or []
        if since and str(annotation.get("created_at", "")) >= since
        for region in annotation.get("result") or []
    )
    return answered or any(
        is_vote(region, config)
        for prediction in task.get("predictions") or []
        if ours.fullmatch(str(prediction.get("model_version"))) or prediction.get("model_version") == COARSE_COPY
        for region in prediction.get("result") or []
    )


def author(annotation: Row) -> int | None:
    """Id of the person who made an annotation; None if their account is gone."""
    by = annotation.get("completed_by")
    by = by.get("id") if isinstance(by, Mapping) else by
    return int(by) if by else None


def digest(annotation: Row) -> str:
    """Tells whether what an annotation says has changed."""
    result = annotation.get("result") or []
    try:
        text = orjson.dumps(result, option=orjson.OPT_SORT_KEYS)
    except orjson.JSONEncodeError:  # a number of more than 64 bits, or half a character
        text = json.dumps(result, sort_keys=True).encode()
    return hashlib.sha256(text).hexdigest()


def copy_of(annotation: Row, aside: str = "") -> list[dict[str, Any]]:
    """Regions for a prediction that keeps all of an annotation: its other fields go into the first region's `meta`.

    Args:
        annotation: as it was given.
        aside: when it was set aside, for a copy that is made anew later.
    """
    header = {name: value for name, value in annotation.items() if name != "result"}
    first, *rest = annotation["result"]
    more = {HEADER: {**header, "completed_by": author(annotation)}, **({ASIDE: aside} if aside else {})}
    return [{**first, "meta": {**(first.get("meta") or {}), **more}}, *rest]


def aside_since(copy: Row) -> str:
    """When the annotation that a copy was made of was set aside, in Label Studio's time."""
    regions = copy.get("result") or [{}]
    return str((regions[0].get("meta") or {}).get(ASIDE) or copy.get("created_at"))


def record_of(task: int, annotation: Row, aside: str = "", now: Row | None = None) -> dict[str, Any]:
    """What the store keeps of an answer that is set aside.

    Args:
        task: its task.
        annotation: the answer as it was given.
        aside: when it was set aside, in Label Studio's time.
        now: the annotation as we left it; None before it is set aside.
    """
    record = {"task": task, "annotation": annotation}
    return record if now is None else {**record, "aside": aside, "left": left_as(now)}


def left_as(annotation: Row) -> dict[str, Any]:
    """What tells later whether a person has touched an annotation since we left it, and how."""
    return {name: annotation[name] for name in ("updated_at", "ground_truth")}


def said_since(annotation: Row, original: Row, left: Row) -> dict[str, bool]:
    """What a person has said of an answer after it was set aside, besides its regions: a skip, or a ground truth.

    An editor that has the answer open skips it by saving it as it is, marked as skipped, which it is already. An update
    that leaves every region as it was looks the same.

    Args:
        annotation: as it is now.
        original: as it was given.
        left: `left_as` it was then; empty where nobody knows.

    Returns:
        Fields that must stay when it is given back.
    """
    if not left or annotation["updated_at"] == left["updated_at"]:
        return {}
    if annotation["ground_truth"] and not left["ground_truth"]:
        return {"ground_truth": True}
    skipped = annotation["was_cancelled"] and digest(annotation) == digest(original)
    return {"was_cancelled": True} if skipped else {}


def original_of(copy: Row) -> Row:
    """The annotation that a copy was made of: the inverse of `copy_of`.

    Copies of releases before this one have its author in the `meta` of each region, and nothing else.
    """
    regions = list(copy.get("result") or [])
    metas = [dict(region.get("meta") or {}) for region in regions]
    header: Row = next((meta.pop(HEADER) for meta in metas[:1] if HEADER in meta), {})
    for meta in metas[:1]:
        meta.pop(ASIDE, None)
    authors = [] if header else [meta.pop("completed_by", None) for meta in metas]
    header = header or {"completed_by": next(filter(None, authors), None)}
    plain = [{name: value for name, value in region.items() if name != "meta"} for region in regions]
    return {**header, "result": [{**r, "meta": meta} if meta else r for r, meta in zip(plain, metas, strict=True)]}


def copies_of(task: Row) -> list[Row]:
    """The copies of coarse answers among a task's predictions, what was set aside first first."""
    rows = [row for row in task.get("predictions") or [] if row.get("model_version") == COARSE_COPY]
    return sorted(rows, key=lambda row: (aside_since(row), int(row["id"])))


def active(task: Row) -> list[Row]:
    """A task's annotations that count, the newest first."""
    rows = [row for row in task.get("annotations") or [] if not row.get("was_cancelled")]
    return sorted(rows, key=lambda row: str(row.get("updated_at", "")), reverse=True)


def held(task: Row, copy: Row, keeper: int) -> Row | None:
    """The annotation that a copy was made of, while the keeper has it; None if it is with its author, or gone."""
    number = original_of(copy).get("id")
    rows = [row for row in task.get("annotations") or [] if row["id"] == number and author(row) in (keeper, None)]
    return rows[0] if rows and keeper else None


def uncopied(task: Row, keeper: int) -> list[Row]:
    """Annotations that the keeper has, skipped, and whose copies somebody has deleted."""
    copied = {original_of(copy).get("id") for copy in copies_of(task)}
    rows = [row for row in task.get("annotations") or [] if keeper and author(row) == keeper]
    return [row for row in rows if row["was_cancelled"] and row["id"] not in copied]


def give_back(
    studio: LabelStudio, annotation: int, original: Row, change: Callable[..., Row] | None = None, **more: object
) -> bool:
    """Return an annotation that was set aside to its author.

    Args:
        studio: Label Studio.
        annotation: its id.
        original: as it was before.
        change: what changes its fields; by default Label Studio's PATCH.
        more: what a person has said of it since, see `said_since`.

    Returns:
        False where the author's account is gone: the annotation counts again, and stays the keeper's.
    """
    counts = {"was_cancelled": False, "ground_truth": bool(original.get("ground_truth"))}
    patch, by = change or partial(studio.patch_annotation, annotation), author(original)
    if by:
        try:
            patch(**{**counts, **more, "completed_by": by})
            return True
        except LabelStudioError as error:
            if error.status != 400:
                raise
    patch(**counts)
    return False


def labels_of(regions: Iterable[Region]) -> set[str]:
    """The labels that mask regions have."""
    values = [value for region in regions if isinstance(value := region.get("value"), Mapping)]
    return {str(name) for value in values for kind in LABELS for name in value.get(kind) or []}
