"""Coarse answers at a detach: they become annotations of their authors again, or go to a file and are deleted.

Three kinds: an annotation that stands, one that is set aside (our account has it), and a copy whose annotation is gone,
as earlier releases left it. No copy is deleted while our account has its annotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from backend.answers_file import OURS, saved_before, write_answers
from backend.attached import Attached, Undo, one_by_one, readable, tasks_of_keeper
from backend.coarse_answers import (
    COARSE_COPY,
    active,
    author,
    commented,
    copies_of,
    digest,
    give_back,
    is_cluster,
    is_vote,
    original_of,
)
from backend.errors import AttachRefused, LabelStudioError
from backend.label_config import ProjectConfig
from backend.labelstudio import Row

#: What becomes of coarse labels: they stay annotations (and the control that they need), or go to a file.
Choice = Literal["keep", "file"]


def undo_answers(here: Attached, coarse: Choice | None, file: Path | None, ask: bool) -> Iterator[Undo]:
    """Coarse labels become annotations again, or go to a file.

    Args:
        here: the project.
        coarse: what becomes of them.
        file: where they go.
        ask: whether a missing choice is a sentence of the plan, not an error.

    Raises:
        AttachRefused: nobody has said what becomes of them, or no file was named.
    """
    count = sum(len(answers_of(here, task)) for task in here.answers)
    if not count:
        return
    if coarse is None or (coarse == "file" and file is None):
        text = (
            f"people gave {count} coarse labels: say what becomes of them. `--coarse keep` leaves them as annotations "
            "of their authors, and the control that they need in the label config; `--coarse file --file PATH` saves "
            "them to a file and deletes them, but for those with a draft or a comment"
        )
        if not ask:
            raise AttachRefused(text)
        yield Undo(f"Here you must choose: {text}.", list)
    elif coarse == "file" and file is not None:
        yield from plan_file(here, file)
    else:
        yield from plan_keep(here, count)


def plan_keep(here: Attached, count: int) -> Iterator[Undo]:
    """Coarse labels stay annotations, or become ones again."""
    aside = sum(bool(copies_of(task) or set_aside(here, task)) for task in here.answers)
    if not aside:
        yield Undo(f"Leave {count} coarse labels where they are, as annotations.", list)
        return
    yield Undo(
        f"Give the coarse labels of {aside} tasks back to their authors, as annotations with their ids, regions, lead "
        "and creation times. Their `updated_at` and `updated_by` change, and that they began from a prelabel of ours "
        "(`parent_prediction`) may be forgotten; what earlier releases had deleted gets new ids and times.",
        lambda: one_by_one(here.answers, partial(answers_back, here)),
    )


def plan_file(here: Attached, file: Path) -> Iterator[Undo]:
    """Coarse labels go to a file, but for those that must stay."""
    saved_before(answer_rows(here), file)  # refused before anything is changed
    drafts = all_drafts(here)
    stay = [reason for task in here.answers for _, _, reason in staying(here, task, drafts.get(task["id"], set()))]
    changed = sum(reason == CHANGED for reason in stay)
    if changed:
        text = f"Give {changed} coarse labels that were changed after they were set aside back to their authors first."
        yield Undo(text, list)
    if len(stay) > changed:
        count = len(stay) - changed
        yield Undo(f"Leave {count} coarse labels as annotations: they have a draft or a comment.", list)
    count = sum(len(row["annotations"]) for row in answer_rows(here, drafts))
    text = f"Save {count} coarse labels to {file}, then delete them; their tasks are free again."
    text = text if count else "No other coarse labels are left to save."
    yield Undo(text, lambda: answers_to_file(here, file))


# What is there


def is_answer(annotation: Row, config: ProjectConfig | None) -> bool:
    """Whether an annotation holds coarse labels that we asked for, and nothing else."""
    regions = regions_of(annotation)
    ours = any(is_cluster(region) for region in regions) and not annotation.get("ground_truth")
    return config is not None and ours and all(is_vote(region, config) for region in regions)


def regions_of(annotation: Row) -> list[Row]:
    """The regions of an annotation; none where its result is something else, as a program may have written it."""
    result = annotation.get("result")
    good = isinstance(result, list) and all(isinstance(region, dict) for region in result)
    return list(result) if good and result else []


def set_aside(here: Attached, task: Row) -> list[tuple[Row, Row]]:
    """Annotations of a task that are set aside, each with what it was as given; empty where nobody knows."""
    copied = {int(row["id"]): row for row in map(original_of, copies_of(task)) if "id" in row}
    known = {**here.kept, **copied}
    return [
        (row, known.get(row["id"], {}))
        for row in task.get("annotations") or []
        if is_aside(here, row, row["id"] in copied)
    ]


def is_aside(here: Attached, annotation: Row, copied: bool) -> bool:
    """Whether an annotation is set aside: our account has it, or had it before somebody deleted the account.

    Where accounts may not be made the keeper is the key's own user, whose other annotations and skips are theirs.
    """
    by, kept = author(annotation), annotation["id"] in here.kept and bool(annotation.get("was_cancelled"))
    return by in (None, here.keeper, here.account) and (by == here.account or copied or kept)


def orphans(task: Row) -> list[Row]:
    """Copies of a task whose annotation is gone."""
    present = {row["id"] for row in task.get("annotations") or []}
    return [copy for copy in copies_of(task) if original_of(copy).get("id") not in present]


def answers_of(here: Attached, task: Row) -> list[Row]:
    """All coarse answers of a task as people gave them, each once; those that were changed since as they are now."""
    given = {int(row["id"]): row for row in active(task) if is_answer(row, here.config)}
    given |= {int(row["id"]): as_given(row, original) for row, original in set_aside(here, task)}
    return [*given.values(), *(original_of(copy) for copy in orphans(task))]


def as_given(annotation: Row, original: Row) -> Row:
    """An annotation that was set aside as its author gave it; with what it says now, if that was changed."""
    return original if original and digest(original) == digest(annotation) else {**annotation, **of_author(original)}


def of_author(original: Row) -> dict[str, Any]:
    """Fields of an annotation that setting it aside has changed, as they were."""
    return {name: original[name] for name in ("completed_by", "was_cancelled", "ground_truth") if name in original}


# As annotations


def answers_back(here: Attached, task: Row) -> Iterator[str]:
    """Give back what of a task is set aside, make anew what earlier releases deleted, then delete the copies."""
    stuck = set()
    for row, original in set_aside(here, task):
        if reason := back(here, row, original):
            stuck.add(row["id"])
            yield f"Task {task['id']}: {reason}"
    for copy in orphans(task):
        original = original_of(copy)
        if not any(names_of(row) == names_of(original) for row in task["annotations"]):
            by = author(original)
            here.studio.create_annotation(task["id"], original["result"], **({"completed_by": by} if by else {}))
    delete_copies(here, task, stuck)


def back(here: Attached, annotation: Row, original: Row) -> str:
    """Give an annotation back to its author; why our account still has it, or nothing.

    Label Studio deletes an annotation's drafts at any change of it: they are made anew, as drafts of the key's user.
    """
    number, task, studio = int(annotation["id"]), int(annotation["task"]), here.studio
    try:
        drafts = [row for row in studio.drafts(task) if row.get("annotation") == number]
        give_back(studio, number, original)
        for draft in drafts:
            studio.create_draft(task, number, draft.get("result") or [], float(draft.get("lead_time") or 0))
        now = studio.annotation(number)
    except LabelStudioError as error:
        if error.status != 404:
            raise
        return ""  # somebody has deleted it
    if now["was_cancelled"]:
        return f"annotation {number} is still set aside."
    if here.account and author(now) == here.account:
        return f"annotation {number} counts again, under our account: its author is gone, or not known."
    return ""


def delete_copies(here: Attached, task: Row, stuck: set[int]) -> None:
    """Delete the copies of a task, but for those of annotations that are still set aside."""
    for copy in copies_of(task):
        if original_of(copy).get("id") not in stuck:
            here.studio.delete_prediction(int(copy["id"]))


def names_of(annotation: Row) -> list[tuple[Any, Any]]:
    """Names the regions of an annotation: one that was made again from a copy has the same."""
    return sorted((str(r.get("id")), str(r.get("from_name"))) for r in regions_of(annotation))


def give_the_rest(here: Attached) -> Iterator[str]:
    """Give back whatever is set aside by now, and delete the copies."""
    left = here.studio.tasks_with_version(here.id, COARSE_COPY) | tasks_of_keeper(here)
    for task in readable(here, sorted(left)):
        yield from answers_back(here, task)


def still_aside(here: Attached) -> set[int]:
    """Tasks with answers that are set aside by now."""
    left = here.studio.tasks_with_version(here.id, COARSE_COPY) | tasks_of_keeper(here)
    tasks = readable(here, sorted(left))
    return {int(task["id"]) for task in tasks if any(row["was_cancelled"] for row, _ in set_aside(here, task))}


# To a file

CHANGED = "changed after it was set aside"


def all_drafts(here: Attached) -> dict[int, set[int]]:
    """Annotations that drafts hang on, by task."""
    tasks = {int(task["id"]) for task in here.answers} & here.studio.tasks_with_draft(here.id)
    return {task: here.studio.drafted(task) for task in tasks}


def staying(here: Attached, task: Row, drafts: set[int]) -> Iterator[tuple[Row, Row, str]]:
    """Coarse answers of a task that must not be deleted as they are: annotation, original, and why."""
    aside = {int(row["id"]): original for row, original in set_aside(here, task)}
    for row in task.get("annotations") or []:
        if row["id"] in aside or (not row.get("was_cancelled") and is_answer(row, here.config)):
            original = aside.get(row["id"], {})
            if row["id"] in drafts:
                yield row, original, "somebody has a draft of it"
            elif commented(task) or commented(row):
                yield row, original, "it has comments"
            elif row["id"] in aside and digest(row) != digest(original):
                yield row, original, CHANGED


def answer_rows(here: Attached, drafts: Mapping[int, set[int]] | None = None) -> list[dict[str, Any]]:
    """All coarse answers as Label Studio's own JSON export would have them; without those that stay if `drafts`."""
    rows = []
    for task in here.answers:
        hung = (drafts or {}).get(task["id"], set())
        stay = set() if drafts is None else {row["id"] for row, _, _ in staying(here, task, hung)}
        answers = [row for row in answers_of(here, task) if row.get("id") not in stay]
        if answers:
            rows.append({"id": task["id"], "data": task["data"], "meta": OURS, "annotations": answers})
    return rows


def answers_to_file(here: Attached, file: Path) -> Iterator[str]:
    """Give back what must stay, save all others, look whether they are there, then delete those one by one."""
    drafts = all_drafts(here)
    yield from one_by_one(here.answers, lambda task: give_staying(here, task, drafts.get(task["id"], set())))
    here = replace(here, answers=list(readable(here, [task["id"] for task in here.answers])))
    rows = answer_rows(here, all_drafts(here))
    write_answers([*rows, *saved_before(rows, file)], file)
    saved = {row["id"]: row["annotations"] for row in rows}
    tasks = [task for task in here.answers if task["id"] in saved]
    yield from one_by_one(tasks, lambda task: delete_answers(here, task, saved[task["id"]]))


def give_staying(here: Attached, task: Row, drafts: set[int]) -> Iterator[str]:
    """Give those of a task's coarse answers back that must not be deleted, then delete their copies."""
    aside = {int(row["id"]) for row, _ in set_aside(here, task)}
    for row, original, reason in list(staying(here, task, drafts)):
        failed = back(here, row, original) if row["id"] in aside else ""
        stays = "is its author's again" if reason == CHANGED else "stays an annotation"
        yield f"Task {task['id']}: annotation {row['id']} {stays}: {failed or reason}."
        for copy in copies_of(task):
            if original_of(copy).get("id") == row["id"] and not failed:
                here.studio.delete_prediction(int(copy["id"]))


def delete_answers(here: Attached, task: Row, saved: list[Row]) -> Iterator[str]:
    """Delete the coarse answers of a task that are in a file, and their copies; not what was changed since."""
    stuck, drafts = set(), here.studio.drafted(task["id"])
    aside = {int(row["id"]): (row, original) for row, original in set_aside(here, task)}
    gone = {row["id"] for row in task.get("annotations") or []}
    for answer in saved:
        number = int(answer.get("id") or 0)
        if number in gone and (number in drafts or not delete_if_same(here, number, digest(answer))):
            yield f"Task {task['id']}: annotation {number} was changed meanwhile and stays; detach once more."
            if number in aside and back(here, *aside[number]):
                stuck.add(number)
    still = {number for number in aside if number not in {answer.get("id") for answer in saved}}
    delete_copies(here, task, stuck | still)


def delete_if_same(here: Attached, annotation: int, content: str) -> bool:
    """Delete an annotation, unless it is not what was saved any more."""
    try:
        if digest(here.studio.annotation(annotation)) != content:
            return False
        here.studio.delete_annotation(annotation)
    except LabelStudioError as error:
        if error.status != 404:
            raise
    return True
