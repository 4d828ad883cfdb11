"""Coarse answers at a detach: they become annotations of their authors again, or go to a file and are deleted.

Three kinds: an annotation that stands, one that is set aside (our account has it), and a copy whose annotation is gone,
as earlier releases left it. No copy is deleted while our account has its annotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from backend.answers_file import OURS, name_of, saved_before, write_answers
from backend.attached import PAGE, Attached, Undo, one_by_one, readable, tasks_aside
from backend.coarse_answers import (
    active,
    author,
    commented,
    copies_of,
    digest,
    give_back,
    is_cluster,
    is_vote,
    original_of,
    untouched,
)
from backend.errors import AttachRefused, LabelStudioError
from backend.label_config import ProjectConfig
from backend.labelstudio import Row

#: What becomes of coarse labels: they stay annotations (and the control that they need), or go to a file.
Choice = Literal["keep", "file"]


@dataclass
class Found:
    """What there is of coarse answers in a project.

    Attributes:
        count: how many there are.
        aside: how many tasks have one that is set aside, or a copy.
        names: what tells each from others.
        changed: how many were changed, skipped or marked after they were set aside.
        skipped: how many of these were skipped.
        drafted: how many that are set aside have a draft.
        gone: how many are left as copies alone.
        staying: how many stay for another reason when the others go to a file.
    """

    count: int = 0
    aside: int = 0
    names: set[int | str] = field(default_factory=set)
    changed: int = 0
    skipped: int = 0
    drafted: int = 0
    gone: int = 0
    staying: int = 0


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
    found = find_answers(here)
    count = found.count
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
        yield from plan_file(here, found, file)
    else:
        yield from plan_keep(here, found)


def find_answers(here: Attached) -> Found:
    """Look once through the tasks that may have coarse answers."""
    found = Found()
    for task, drafts in with_drafts(here):
        answers, aside = answers_of(here, task), set_aside(here, task)
        found.count += len(answers)
        found.aside += bool(copies_of(task) or aside)
        found.names |= set(map(name_of, answers))
        found.skipped += sum("was_cancelled" in here.said(*pair) for pair in aside)
        found.drafted += sum(row["id"] in drafts for row, _ in aside)
        found.gone += len(missing(task))
        for _, _, reason in staying(here, task, drafts):
            found.changed += reason == CHANGED
            found.staying += reason != CHANGED
    return found


def plan_keep(here: Attached, found: Found) -> Iterator[Undo]:
    """Coarse labels stay annotations, or become ones again."""
    if not found.aside:
        yield Undo(f"Leave {found.count} coarse labels where they are, as annotations.", list)
        return
    yield from notes(found)
    if found.gone:
        text = f"{found.gone} coarse labels are left as copies alone: they are made anew, with new ids and times."
        yield Undo(text, list)
    yield Undo(
        f"Give the coarse labels of {found.aside} tasks back to their authors, as annotations with their ids, regions, "
        "lead and creation times. Their `updated_at` and `updated_by` change.",
        lambda: one_by_one(readable(here, here.answers), len(here.answers), partial(answers_back, here)),
    )


def plan_file(here: Attached, found: Found, file: Path) -> Iterator[Undo]:
    """Coarse labels go to a file, but for those that must stay."""
    for _ in saved_before(found.names, file):  # refused before anything is changed
        pass
    if changed := found.changed:
        text = f"Give {changed} coarse labels that were changed after they were set aside back to their authors first."
        yield Undo(text, list)
    if found.staying:
        yield Undo(f"Leave {found.staying} coarse labels as annotations: they have a draft or a comment.", list)
    yield from notes(found)
    count = found.count - found.changed - found.staying
    text = (
        f"Save {count} coarse labels to {file}, then delete them; their tasks are free again. Their ids and times are "
        "then in the file alone: imported again, they get new ones."
    )
    text = text if count else "No other coarse labels are left to save."
    yield Undo(text, lambda: answers_to_file(here, file))


def notes(found: Found) -> Iterator[Undo]:
    """What else becomes of coarse labels that are given back."""
    if found.skipped:
        text = f"{found.skipped} coarse labels were skipped by people while they were set aside: they stay skipped."
        yield Undo(text, list)
    if found.drafted:
        yield Undo(
            f"{found.drafted} coarse labels that are set aside have drafts. Label Studio deletes these at any change: "
            "they are made anew, as drafts of the user whose key we have.",
            list,
        )


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
    return [
        (row, copied.get(row["id"]) or here.given(row["id"]))
        for row in task.get("annotations") or []
        if is_aside(here, row, row["id"] in copied)
    ]


def is_aside(here: Attached, annotation: Row, copied: bool) -> bool:
    """Whether an annotation is set aside: our account has it, or had it before somebody deleted the account.

    Where accounts may not be made the keeper is the key's own user, whose other annotations and skips are theirs.
    """
    by, skipped = author(annotation), bool(annotation.get("was_cancelled"))
    nobody = by in (None, here.keeper, here.account)
    return nobody and (by == here.account or copied or (skipped and annotation["id"] in here.kept))


def orphans(task: Row) -> list[Row]:
    """Copies of a task whose annotation is gone."""
    present = {row["id"] for row in task.get("annotations") or []}
    return [copy for copy in copies_of(task) if original_of(copy).get("id") not in present]


def missing(task: Row) -> list[Row]:
    """Answers of a task of which only a copy is left, but for those that a detach which died has made again."""
    there = [names_of(row) for row in task["annotations"]]
    return [original for original in map(original_of, orphans(task)) if names_of(original) not in there]


def answers_of(here: Attached, task: Row) -> list[Row]:
    """All coarse answers of a task as people gave them, each once; those that were changed since as they are now."""
    given = {int(row["id"]): row for row in active(task) if is_answer(row, here.config)}
    given |= {int(row["id"]): as_given(here, row, original) for row, original in set_aside(here, task)}
    return [*given.values(), *(original_of(copy) for copy in orphans(task))]


def as_given(here: Attached, annotation: Row, original: Row) -> Row:
    """An annotation that was set aside as its author gave it; with what people have said of it since."""
    same = bool(original) and digest(original) == digest(annotation)
    return {**(original if same else {**annotation, **of_author(original)}), **here.said(annotation, original)}


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
    for original in missing(task):
        by = author(original)
        here.studio.create_annotation(task["id"], original["result"], **({"completed_by": by} if by else {}))
    delete_copies(here, task, stuck)


def back(here: Attached, annotation: Row, original: Row) -> str:
    """Give an annotation back to its author; why our account still has it, or nothing.

    Label Studio deletes an annotation's drafts at any change of it: they are made anew, as drafts of the key's user.
    """
    number, task, studio = int(annotation["id"]), int(annotation["task"]), here.studio
    said = here.said(annotation, original)
    try:
        drafts = [row for row in studio.drafts(task) if row.get("annotation") == number]
        give_back(studio, number, original, None, **said)
        for draft in drafts:
            studio.create_draft(task, number, draft.get("result") or [], float(draft.get("lead_time") or 0))
        now = studio.annotation(number)
    except LabelStudioError as error:
        if error.status != 404:
            raise
        return ""  # somebody has deleted it
    if now["was_cancelled"] and not said.get("was_cancelled"):
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
    for task in readable(here, sorted(tasks_aside(here))):
        yield from answers_back(here, task)


def still_aside(here: Attached) -> set[int]:
    """Tasks with answers that are set aside by now."""
    tasks = readable(here, sorted(tasks_aside(here)))
    return {int(task["id"]) for task in tasks if any(row["was_cancelled"] for row, _ in set_aside(here, task))}


# To a file

CHANGED = "changed after it was set aside"


def with_drafts(here: Attached) -> Iterator[tuple[Row, set[int]]]:
    """The tasks that may have coarse answers, each with the ids of its annotations that drafts hang on."""
    drafted = here.studio.tasks_with_draft(here.id)
    for task in readable(here, here.answers):
        yield task, here.studio.drafted(task["id"]) if task["id"] in drafted else set()


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
            elif row["id"] in aside and (digest(row) != digest(original) or here.said(row, original)):
                yield row, original, CHANGED


def rows_to_save(here: Attached, tasks: list[int], file: Path) -> Iterator[dict[str, Any]]:
    """Tasks with the coarse answers that do not stay, as Label Studio's own JSON export would have them.

    What the file already holds of others follows.

    Args:
        here: the project.
        tasks: gets the ids of the tasks that are saved now.
        file: where they go.
    """
    names: set[int | str] = set()
    for task, drafts in with_drafts(here):
        stay = {row["id"] for row, _, _ in staying(here, task, drafts)}
        if answers := [row for row in answers_of(here, task) if row.get("id") not in stay]:
            names |= set(map(name_of, answers))
            tasks.append(task["id"])
            yield {"id": task["id"], "data": task["data"], "meta": OURS, "annotations": answers}
    yield from saved_before(names, file)


def answers_to_file(here: Attached, file: Path) -> Iterator[str]:
    """Give back what must stay, save all others, look whether they are there, then delete those one by one."""
    yield from one_by_one(with_drafts(here), len(here.answers), lambda pair: give_staying(here, *pair))
    tasks: list[int] = []
    write_answers(rows_to_save(here, tasks, file), file)
    yield from one_by_one(saved_in(here, tasks, file), len(tasks), lambda pair: delete_answers(here, *pair))


def saved_in(here: Attached, tasks: Sequence[int], file: Path) -> Iterator[tuple[Row, list[Row]]]:
    """The first tasks in the file as they are now, each with the answers that the file holds."""
    rows = zip(tasks, saved_before((), file), strict=False)
    while page := {task: row["annotations"] for task, row in islice(rows, PAGE)}:
        for task in readable(here, page):
            yield task, page[task["id"]]


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
    there = {row["id"] for row in task.get("annotations") or []}
    for answer in saved:
        number = int(answer.get("id") or 0)
        seen = aside[number][0] if number in aside else answer
        if number in there and (number in drafts or not delete_if_same(here, answer, seen)):
            yield f"Task {task['id']}: annotation {number} was changed meanwhile and stays; detach once more."
            if number in aside and back(here, *aside[number]):
                stuck.add(number)
    copied: set[Any] = {original_of(copy).get("id") for copy in copies_of(task)}
    delete_copies(here, task, stuck | copied - {answer.get("id") for answer in saved})


def delete_if_same(here: Attached, saved: Row, seen: Row) -> bool:
    """Delete an annotation, unless it is not what was saved any more, or somebody has touched it since it was seen."""
    try:
        now = here.studio.annotation(int(seen["id"]))
        if digest(now) != digest(saved) or not untouched(now, seen):
            return False
        here.studio.delete_annotation(int(seen["id"]))
    except LabelStudioError as error:
        if error.status != 404:
            raise
    return True
