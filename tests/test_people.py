"""Nothing a person made is changed, lost or misread: on a real Label Studio, by the calls that its editor makes."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import requests
from conftest import Backend
from numpy.typing import NDArray
from team import GROUPS, SEG, Team, clean_old_orders, saved, shown, stages, wait_for

from backend.annotator import prelabel, shown_prediction, started_from
from backend.attach import apply, detach, plan
from backend.coarse_answers import copies_of, may_be_set_aside, original_of
from backend.connection import SECRET_HEADER, keeper_account, note_of, our_backend, write_note
from backend.errors import InUseError
from backend.label_config import parse
from backend.labelstudio import LabelStudio
from backend.project import TaskRecord
from backend.publish import reopen, set_aside
from backend.status import status
from backend.sync import read_task, refresh_config
from model.classes import IGNORE, MIXED, UNKNOWN

log = logging.getLogger(__name__)
Pictures = dict[Path, NDArray[np.uint8]]
Share = Callable[..., Backend]
User = Callable[[str], LabelStudio]
#: What setting an annotation aside changes, and what Label Studio counts itself.
CHANGING = {"was_cancelled", "completed_by", "updated_at", "updated_by", "created_ago", "created_username"}
CHOICE = {"from_name": "quality", "to_name": "photo", "type": "choices", "value": {"choices": ["sharp"]}}
WITH_CHOICE = SEG.format(tag="BrushLabels").replace(
    "</View>",
    '<Choices name="quality" toName="photo"><Choice value="sharp"/><Choice value="blurred"/></Choices></View>',
)


def annotations(team: Team) -> dict[int, dict[str, Any]]:
    """Every annotation of a project, by id."""
    tasks = team.studio.full_tasks(team.id, team.masks)
    return {int(row["id"]): row for task in tasks for row in task["annotations"]}


def lasting(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of an annotation must never change."""
    return {name: value for name, value in row.items() if name not in CHANGING}


def undated(row: Mapping[str, Any]) -> dict[str, Any]:
    """All of an annotation, but for how long ago it was made."""
    return {**row, "created_ago": ""}


def answer(team: Team, studio: LabelStudio | None = None) -> dict[str, Any]:
    """Give the next task its coarse answer; the task as it then is, without waiting for a round."""
    work = team.annotator(studio).label_next()
    assert work is not None
    assert work.ask == "coarse"
    return team.studio.task(work.task, team.id)


def read(team: Team, task: int) -> Any:
    """Read one task as a round does, and keep its record."""
    project = team.project
    config = refresh_config(team.backend.context, project)
    record = read_task(team.backend.context, project, config, project.index()[task])
    assert record is not None
    project.save_index({**project.index(), task: record}, config)
    return record


def test_answers_without_a_mask_stand_for_ever_and_are_counted(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    team.studio.patch_project(team.id, label_config=WITH_CHOICE)
    first, second, third, fourth, empty = list(team.masks)[:5]
    for task in (first, second):
        team.studio.create_annotation(task, [CHOICE])
    before = team.attach()
    for task in (third, fourth):
        team.studio.create_annotation(task, [CHOICE])
    team.studio.create_annotation(empty, [])
    before = team.wait(before)
    made = annotations(team)
    for _ in range(2):  # each round could call something back
        served = team.studio.next_task(team.id)
        assert served is not None
        team.segment(int(served["id"]))
        before = team.wait(before)
    now = annotations(team)
    assert len(made) == 5
    assert {number: undated(now[number]) for number in made} == {number: undated(row) for number, row in made.items()}
    assert [stages(team)[task] for task in (first, second, third, fourth, empty)] == ["other"] * 5
    report = status(team.backend.context, team.id)
    assert report["without_mask"] == 5
    assert "5 tasks are annotated without a mask: Label Studio will not serve them again." in shown(report)
    assert not {first, second, third, fourth, empty} & set(team.ranking())


@pytest.mark.parametrize("who", ["somebody", "the person whose key we have"])
def test_a_coarse_answer_is_set_aside_and_nothing_of_it_is_lost(
    share_backend: Share, make_user: Callable[[str], LabelStudio], pictures: Pictures, who: str
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    person = make_user("anna") if who == "somebody" else team.studio
    team.attach()
    last, before = team.backend.round(team.id), answer(team, person)
    given = before["annotations"][0]
    team.wait(last)
    team.coarse()  # until no more are wanted
    task = team.studio.task(before["id"], team.id)
    [row] = task["annotations"]
    assert lasting(row) == lasting(given)
    assert (row["was_cancelled"], row["completed_by"]) == (True, keeper_account(team.studio, team.id))
    assert not task["is_labeled"]
    copy = original_of(copies_of(task)[-1])
    assert undated(copy) == undated(given)
    kept = team.project.store.read_json(team.project.coarse_answer_key(row["id"]))
    assert (kept["task"], kept["annotation"]["lead_time"]) == (task["id"], 5.0)
    order = team.ranking()
    assert task["id"] in order
    assert team.segment_all(person) == order, "the same person gets it again, in its place"


def test_what_we_did_not_ask_for_is_never_set_aside(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    team.studio.patch_project(team.id, label_config=WITH_CHOICE)
    team.attach()
    beside, truth = team.ranking()[:2]
    drawn = team.ranking()[-1]  # on a task that we did not ask coarsely
    regions = {task: prelabel(team.studio.task(task, team.id)) for task in (beside, truth)}
    plain = [{**{k: v for k, v in r.items() if k != "meta"}, "id": f"r{n}"} for n, r in enumerate(regions[beside])]
    made = {
        beside: team.studio.create_annotation(beside, [*regions[beside], CHOICE]),
        truth: team.studio.create_annotation(truth, regions[truth], ground_truth=True),
        drawn: team.studio.create_annotation(drawn, plain),
    }
    team.settle()
    for task in made:
        record = read(team, task)
        assert (record.stage, record.callable) == ("coarse", False)
    team.coarse()
    for task, was in made.items():
        [row] = team.studio.task(task, team.id)["annotations"]
        assert lasting(row) == lasting(was)
        assert not row["was_cancelled"]
        assert task not in team.ranking()
    assert status(team.backend.context, team.id)["without_mask"] == len(made)


def test_a_coarse_answer_that_people_have_commented_on_stays(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="3"), pictures)
    before = team.attach()
    commented = {}
    for name in ("comment_count", "unresolved_comment_count"):
        task = answer(team)
        before = team.wait(before)
        assert team.project.index()[task["id"]].callable
        comment(team, task["id"], **{name: 1})
        commented[task["id"]] = task["annotations"][0]
    team.coarse()
    for _ in range(2):
        before = team.backend.round(team.id)
        team.segment(team.ranking()[0])
        team.wait(before)
    team.settle()
    for task, given in commented.items():
        [row] = team.studio.task(task, team.id)["annotations"]
        assert undated(row) == undated(given)
        assert task not in team.ranking()
        assert (team.project.index()[task].stage, team.project.index()[task].callable) == ("coarse", False)
    assert status(team.backend.context, team.id)["without_mask"] == len(commented)
    comment(team, task, comment_count=0, unresolved_comment_count=0)
    wait_for(lambda: stages(team)[task] == "returned", 120, lambda: (stages(team), team.log()))


def comment(team: Team, task: int, **counts: int) -> None:
    """Have a task count comments: the community edition has none, but keeps the numbers that others count in."""
    team.studio.http.call("PATCH", f"/api/tasks/{task}/", body=counts)
    assert counts.items() <= team.studio.task(task, team.id).items()


def test_comments_of_every_form_keep_an_answer(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), dict(list(pictures.items())[:3]))
    team.attach()
    task = answer(team)
    comment(team, task["id"], comment_count=1)
    team.settle()
    assert reopen(team.backend.context, team.project, read(team, task["id"])).stage == "coarse", "nothing done"
    [given], extra = task["annotations"], team.project.extra()
    [row] = team.studio.task(task["id"], team.id)["annotations"]
    assert undated(row) == undated(given)

    def may(task: dict[str, Any], given: dict[str, Any]) -> bool:
        return may_be_set_aside(task, given, team.config, str(extra["since"]), int(extra["keeper"]))

    assert may(task, given)
    for name, value in (("comment_count", 1), ("unresolved_comment_count", 1), ("comments", [{"id": 1}])):
        assert not may({**task, name: value}, given)
        assert not may(task, {**given, name: value})


def test_an_update_before_it_is_set_aside_stays(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    task = answer(team)
    given = task["annotations"][0]
    record = read(team, task["id"])
    assert record.callable
    whole = [*given["result"], *team.annotator().full_result(task["id"])]
    team.studio.update_annotation(given["id"], whole)
    assert reopen(team.backend.context, team.project, record).stage == "coarse", "nothing done"
    assert read(team, task["id"]).stage == "full"
    [row] = team.studio.task(task["id"], team.id)["annotations"]
    assert (row["was_cancelled"], row["result"]) == (False, whole)
    keeper = int(team.project.extra()["keeper"])
    assert not set_aside(team.backend.context, team.project, task, given, keeper), "changed since it was read"
    assert copies_of(team.studio.task(task["id"], team.id)) == []


def test_an_open_editor_can_update_what_was_set_aside(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    task = answer(team)
    given, author = task["annotations"][0], team.studio.whoami()["id"]
    record = read(team, task["id"])
    assert reopen(team.backend.context, team.project, record).stage == "returned"
    whole = team.annotator().full_result(task["id"])
    team.studio.update_annotation(given["id"], whole)
    assert read(team, task["id"]).stage == "full", "their work counts, under their name"
    [row] = team.studio.task(task["id"], team.id)["annotations"]
    assert (row["result"], row["was_cancelled"], row["completed_by"]) == (whole, False, author)


def test_only_what_label_studio_lost_to_our_own_change_is_put_back(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    task, board = answer(team), team.backend.context.board
    given = task["annotations"][0]
    assert reopen(team.backend.context, team.project, read(team, task["id"])).stage == "returned"
    team.settle()  # the round may have done so, too
    ours = board.own_update(team.id, given["id"])
    whole = team.annotator().full_result(task["id"])

    def told(result: object, at: str) -> TaskRecord:
        """What reading the task comes to after this event of its answer."""
        row = {"id": given["id"], "task": task["id"], "result": result, "updated_at": at}
        body = {
            "action": "ANNOTATION_UPDATED",
            "project": {"id": team.id},
            "task": {"id": task["id"]},
            "annotation": row,
        }
        settings = team.backend.context.settings
        secret = {SECRET_HEADER: settings.project_secret(team.id)}
        assert requests.post(f"{settings.url}/webhook", json=body, headers=secret, timeout=30).ok
        team.settle()
        return read(team, task["id"])

    assert told(given["result"][:1], given["updated_at"]).stage == "returned", "a replay of what was before"
    assert told(given["result"][:1], "2999-01-01T00:00:00Z").stage == "returned", "nothing Label Studio has said"
    between = datetime.fromisoformat(ours["done"]) - timedelta(microseconds=1)
    assert told(whole, between.isoformat()).stage == "full"
    row = annotations(team)[given["id"]]
    assert (row["result"], row["was_cancelled"], row["completed_by"]) == (whole, False, given["completed_by"])


def test_an_answer_that_somebody_goes_on_with_is_left(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    team.settle()
    team.backend.context.board.redis.set(f"firstrow:{team.id}:busy", "this test")  # it is the only round
    ctx, task = team.backend.context, answer(team)
    given, whole = task["annotations"][0], team.annotator().full_result(task["id"])

    def begin() -> None:
        team.studio.create_draft(task["id"], given["id"], whole, 1.0)

    def end() -> None:
        [draft] = team.studio.drafts(task["id"])
        team.studio.http.call("DELETE", f"/api/drafts/{draft['id']}/")

    def goes() -> bool:
        """Set the answer aside as it was read before somebody was at it."""
        keeper = int(team.project.extra()["keeper"])
        try:
            return set_aside(ctx, team.project, task, given, keeper)
        finally:
            assert not copies_of(team.studio.task(task["id"], team.id)), "no copy of what stays is left"

    read(team, task["id"])
    begin()
    with pytest.raises(InUseError, match="once the draft is submitted"):
        reopen(ctx, team.project, team.project.index()[task["id"]])
    with pytest.raises(InUseError, match="once the draft is submitted"):
        goes()
    end()
    for name in ("ground_truth", "was_cancelled"):  # somebody's mark, or skip, since the answer was read
        team.studio.patch_annotation(given["id"], **{name: True})
        assert not goes()
        [row] = annotations(team).values()
        assert (row[name], row["completed_by"]) == (True, given["completed_by"])
        team.studio.patch_annotation(given["id"], **{name: False})
    assert reopen(ctx, team.project, read(team, task["id"])).stage == "returned"
    team.studio.update_annotation(given["id"], whole)
    begin()
    with pytest.raises(InUseError, match="goes on with it in a draft"):
        read(team, task["id"])
    end()
    assert read(team, task["id"]).stage == "full"


def test_what_was_saved_last_stands(share_backend: Share, make_user: User, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    anna = make_user("anna")
    task = answer(team, anna)
    given = task["annotations"][0]
    assert reopen(team.backend.context, team.project, read(team, task["id"])).stage == "returned"
    anna.update_annotation(given["id"], given["result"][:1])
    anna.update_annotation(given["id"], given["result"])  # undone, and saved again
    team.settle()
    assert read(team, task["id"]).stage == "returned"
    assert annotations(team)[given["id"]]["result"] == given["result"]


class Watched(LabelStudio):
    """Label Studio as we call it: `looks` once an annotation is read; when each of our `changes` began and ended."""

    looks: threading.Event
    changes: list[tuple[float, float]]

    def annotation(self, annotation: int) -> dict[str, Any]:
        self.looks.set()
        return super().annotation(annotation)

    def patch_annotation(self, annotation: int, **fields: object) -> dict[str, Any]:
        began = time.monotonic()
        row = super().patch_annotation(annotation, **fields)
        self.changes.append((began, time.monotonic()))
        return row


def test_saves_at_the_very_moment_are_kept(share_backend: Share, make_user: User, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    anna, redis, busy = make_user("anna"), team.backend.context.board.redis, f"firstrow:{team.id}:busy"
    team.settle()
    redis.set(busy, "this test")
    task = answer(team, anna)
    given, keeper = task["annotations"][0], int(team.project.extra()["keeper"])
    studio = Watched(team.studio.url, team.studio.http.credentials.key)
    team.backend = replace(team.backend, context=replace(team.backend.context, studio=studio))
    first, *rest = given["result"]
    pauses, tries = random.Random(1), int(os.environ.get("FIRSTROW_SAVES", 8))
    aside, met, lost = 0, 0, []

    def save(pause: float, result: list[dict[str, Any]]) -> tuple[float, float]:
        """Save once our code is there; when that began and was answered."""
        assert studio.looks.wait(60)
        time.sleep(pause)
        began = time.monotonic()
        anna.update_annotation(given["id"], result)
        return began, time.monotonic()

    for number in range(10 * tries):  # at least `tries`, and until the moment was met
        if number >= tries and aside and met:
            break
        redis.set(busy, f"this test {number}")  # it is the only round
        read(team, task["id"])
        now = studio.task(task["id"], team.id)
        result = [{**first, "meta": {**first["meta"], "save": number}}, *rest]
        studio.looks, studio.changes, aimed = threading.Event(), [], number % 2
        if not aimed:
            studio.looks.set()
        with ThreadPoolExecutor(1) as pool:
            person = pool.submit(save, pauses.uniform(0, 0.1 if aimed else 0.3), result)
            aside += set_aside(team.backend.context, team.project, now, now["annotations"][0], keeper)
            read(team, task["id"])
        read(team, task["id"])
        began, ended = person.result()
        meets = any(begin < ended and began < end for begin, end in studio.changes)
        [last] = studio.task(task["id"], team.id)["annotations"]
        met += meets
        if last["result"] == result:
            assert (last["was_cancelled"], last["completed_by"]) == (False, given["completed_by"]), "it is theirs again"
        else:
            assert meets, "what was saved before our change, or after it, is never lost"
            lost.append(number)
            anna.update_annotation(given["id"], result)
    redis.delete(busy)
    log.info("%d saves, %d set aside, %d saves met a change of ours, lost %s", number, aside, met, lost)
    assert aside
    assert met
    assert len(lost) <= 2 + met // 2, lost


def delete_predictions(team: Team) -> None:
    """Choose all tasks in the Data Manager and press "Delete predictions"."""
    chosen = {"selectedItems": {"all": True, "excluded": []}}
    action = {"id": "delete_tasks_predictions", "project": team.id}
    team.studio.http.call("POST", "/api/dm/actions/", params=action, body=chosen)


def set_aside_by_a_round(team: Team, person: LabelStudio) -> dict[str, Any]:
    """A person's coarse answer that a round has set aside; the annotation as it was given."""
    last, given = team.backend.round(team.id), answer(team, person)["annotations"][0]
    team.wait(last)
    team.coarse()
    team.settle()
    assert annotations(team)[given["id"]]["was_cancelled"]
    return dict(given)


def test_an_answer_is_found_when_its_copy_or_its_record_was_deleted(
    share_backend: Share, make_user: User, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:4]))
    team.attach()
    anna = make_user("anna")
    given = set_aside_by_a_round(team, anna)
    store, key = team.project.store, team.project.coarse_answer_key(given["id"])
    kept, data = store.read_json(key), store.read(key) or b""
    for damaged in (b"", data[: len(data) // 2], b"null"):
        store.write(key, damaged)
        assert read(team, given["task"]).stage == "returned"
        again = store.read_json(key)
        assert again["aside"] <= kept["aside"]
        assert {**again, "aside": kept["aside"]} == kept
    store.delete(key)
    assert read(team, given["task"]).stage == "returned"
    assert store.exists(key)

    def delete_all_predictions() -> None:
        delete_predictions(team)
        assert copies_of(team.studio.task(given["task"], team.id)) == []

    delete_all_predictions()
    assert read(team, given["task"]).stage == "returned"
    [copy] = copies_of(team.studio.task(given["task"], team.id))
    assert original_of(copy)["completed_by"] == given["completed_by"]
    delete_all_predictions()
    whole = team.annotator().full_result(given["task"])
    anna.update_annotation(given["id"], whole)
    team.settle()
    assert read(team, given["task"]).stage == "full"
    row = annotations(team)[given["id"]]
    assert (row["result"], row["was_cancelled"], row["completed_by"]) == (whole, False, given["completed_by"])


def test_an_empty_answer_means_background_also_when_the_copy_was_made_anew(
    share_backend: Share, make_user: User, pictures: Pictures
) -> None:
    backend = share_backend(FIRSTROW_COARSE_TASKS="1")
    team, anna = Team(backend, dict(list(pictures.items())[:3])), make_user("anna")
    team.studio.patch_project(team.id, label_config=swapped(team, '<Label value="crop"/>'))
    apply(plan(team.studio, team.id, backend.context.settings))
    backend.context.board.request_round(team.id, "attached")
    team.wait()
    team.settle()
    backend.context.board.redis.set(f"firstrow:{team.id}:busy", "this test")  # it is the only round
    served = anna.next_task(team.id)
    assert served is not None
    task = int(served["id"])
    anna.create_annotation(task, prelabel(served), **started_from(served))
    assert reopen(backend.context, team.project, read(team, task)).stage == "returned"
    anna.create_annotation(task, [])
    assert read(team, task).stage == "full"
    for _ in range(2):
        delete_predictions(team)
        assert read(team, task).stage == "full"
    assert len(copies_of(team.studio.task(task, team.id))) == 1


def test_a_skip_of_what_is_set_aside_stays_its_authors(
    share_backend: Share, make_user: User, pictures: Pictures
) -> None:
    team, anna = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures), make_user("anna")
    team.attach()
    given = answer(team, anna)["annotations"][0]
    assert reopen(team.backend.context, team.project, read(team, given["task"])).stage == "returned"
    anna.patch_annotation(given["id"], **saved(given, was_cancelled=True))
    team.settle()
    assert read(team, given["task"]).stage == "returned"
    team.studio.patch_project(team.id, skip_queue="REQUEUE_FOR_ME")  # the answer is marked as ground truth
    assert read(team, given["task"]).stage == "returned"
    assert annotations(team)[given["id"]]["ground_truth"]
    team.studio.patch_project(team.id, skip_queue="IGNORE_SKIPPED")  # nothing may stay set aside
    read(team, given["task"])
    team.settle()
    row = annotations(team)[given["id"]]
    assert (row["was_cancelled"], row["completed_by"]) == (True, given["completed_by"])
    assert (row["ground_truth"], row["result"]) == (False, given["result"])


def test_a_detach_gives_back_what_was_handed_to_an_account_that_is_gone(
    share_backend: Share, make_user: User, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:4]))
    team.attach()
    given = set_aside_by_a_round(team, make_user("anna"))
    team.backend.context.board.stop(team.id)
    team.studio.delete_user(int(team.project.extra()["keeper"]))
    assert annotations(team)[given["id"]]["completed_by"] is None
    known = {"note": team.project.extra(), "kept": team.project.coarse_answers()}
    list(detach(team.studio, team.id, team.backend.context.settings, "keep", **known))
    row = annotations(team)[given["id"]]
    assert {**lasting(row), "parent_prediction": None} == {**lasting(given), "parent_prediction": None}
    assert (row["was_cancelled"], row["completed_by"]) == (False, given["completed_by"])


def test_answers_that_cannot_be_set_aside_cost_only_themselves(
    share_backend: Share, make_user: User, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    before = team.attach()
    anna = make_user("anna")
    odd = anna.next_task(team.id)
    assert odd is not None
    first, *rest = prelabel(odd)
    beyond = json.dumps({"result": [{**first, "meta": {**first["meta"], "x": 2**70}}, *rest], **started_from(odd)})
    token = {"Authorization": f"Token {anna.http.credentials.key}", "Content-Type": "application/json"}
    url = f"{team.studio.url}/api/tasks/{odd['id']}/annotations/"
    assert requests.post(url, data=beyond, headers=token, timeout=60).ok
    before = team.wait(before)
    team.studio.patch_project(team.id, skip_queue="IGNORE_SKIPPED")
    given = answer(team, anna)["annotations"][0]
    before = team.wait(before)
    team.settle()
    assert not annotations(team)[given["id"]]["was_cancelled"], "nobody would get it again"
    team.studio.delete_user(int(team.project.extra()["keeper"]))
    team.studio.patch_project(team.id, skip_queue="REQUEUE_FOR_OTHERS")
    team.segment(team.ranking()[-1])
    before = team.wait(before)
    team.settle()
    rows = status(team.backend.context, team.id)["unusable"]["tasks"]
    unusable = {row["task"]: row["reason"] for row in rows}
    assert "64-bit" in unusable[odd["id"]]
    assert "firstrow attach" in unusable[given["task"]]
    team.attach()
    team.settle()
    assert annotations(team)[given["id"]]["was_cancelled"]


def test_a_persons_own_skip_stays_a_skip_where_their_account_keeps_answers(
    share_backend: Share, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:3]))
    team.attach()
    studio, settings = team.studio, team.backend.context.settings
    note = note_of(our_backend(studio, team.id, settings))
    write_note(studio, team.id, settings, {**note, "keeper": studio.whoami()["id"]})  # as where none can be made
    task = team.ranking()[-1]
    skip = studio.create_annotation(task, [], was_cancelled=True)
    team.settle()
    assert read(team, task).stage == "new"
    assert annotations(team)[skip["id"]]["was_cancelled"]


def test_what_was_asked_is_known_when_predictions_and_index_are_gone(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    team.attach()
    task, last = answer(team)["id"], team.backend.round(team.id)
    team.wait(last)
    team.settle()
    assert team.project.index()[task].callable
    for version in team.studio.versions(team.id):  # as two days and the cleaning leave it
        if version.startswith("first-row"):
            team.studio.delete_version(team.id, version)
    team.project.store.delete(team.project.key("index.json"))
    record = read_task(
        team.backend.context, team.project, refresh_config(team.backend.context, team.project), TaskRecord(task)
    )
    assert record is not None
    assert (record.stage, record.asked, record.callable) == ("coarse", True, True)
    row, config, keeper = team.studio.task(task, team.id), team.config, int(team.project.extra()["keeper"])
    [given] = [original_of(copy) for copy in copies_of(row)] or row["annotations"]
    assert may_be_set_aside(row, given, config, given["created_at"], keeper)
    assert not may_be_set_aside(row, given, config, "2999-01-01T00:00:00Z", keeper), "it was made before `attach`"
    assert not may_be_set_aside(row, given, config, "", keeper), "our ML backend was taken away"


def test_a_picture_that_goes_while_its_clusters_are_asked_costs_no_order(
    share_backend: Share, pictures: Pictures, services_folder: Path
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), dict(list(pictures.items())[:5]))
    before = team.attach()
    team.settle()
    asked = next(int(task) for task in team.backend.context.board.state(team.id)["coarse"])
    name = team.studio.task(asked, team.id)["data"]["picture"].rpartition("/")[2]
    next(services_folder.rglob(name)).unlink()
    shutil.rmtree(team.backend.environment["FIRSTROW_CACHE"])
    [added] = team.studio.upload(team.id, [list(pictures)[7]])
    team.wait(before)
    assert added in team.ranking()


def test_a_slip_of_a_key_leaves_a_cluster_a_vote(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.attach()
    served = team.studio.next_task(team.id)
    assert served is not None
    shown = prelabel(served)
    slip = {**shown[0], "from_name": "seg", "value": {**shown[0]["value"], "brushlabels": ["weed"]}}
    team.studio.create_annotation(served["id"], [slip, *shown[1:]])
    record = read(team, served["id"])
    assert record.stage == "coarse"
    assert record.callable
    config = team.project.config()
    mask = team.project.own_coarse(record, config)
    assert mask is not None
    names = {config.classes.coarse[value] for value in np.unique(mask) if value < len(config.classes.coarse)}
    assert "Plant" in names, "weed on a cluster means plant"
    assert team.project.labels(served["id"], config) is None


# Editors that are open


def test_no_open_editor_loses_its_work_by_a_new_order_or_by_cleaning_up(
    make_backend: Callable[..., Backend], make_user: Callable[[str], LabelStudio], pictures: Pictures
) -> None:
    team = Team(make_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = team.attach()
    team.segment(team.ranking()[0])
    before = team.wait(before)
    team.settle()
    dora, *people = [make_user(name) for name in ("dora", "anna", "ben", "chi")]
    looked_at = dora.next_task(team.id)  # prelabels of an earlier order, with which those of the next are gathered
    assert looked_at is not None
    team.segment(team.ranking()[-1])
    before = team.wait(before)
    team.settle()
    opened = [task for person in people if (task := person.next_task(team.id))]
    prelabels = [prediction for task in opened if (prediction := shown_prediction(task))]
    begun = [{"parent_prediction": prediction["id"]} for prediction in prelabels]
    [anna, ben, chi], [one, two, three] = people, [int(task["id"]) for task in opened]
    result = {task: team.annotator().full_result(task) for task in (one, two, three)}
    draft = anna.http.call("POST", f"/api/tasks/{one}/drafts", body={"result": result[one], "lead_time": 3, **begun[0]})
    early = ben.create_annotation(two, result[two], **begun[1])
    before = team.wait(before)  # a new order
    team.segment(next(task for task in team.ranking() if task not in (one, two, three)))
    team.wait(before)
    clean_old_orders(team, prelabels[1]["model_version"])
    anna.http.call("PATCH", f"/api/drafts/{draft['id']}/", body={"result": result[one], "lead_time": 4})
    anna.create_annotation(one, result[one], draft_id=draft["id"], **begun[0])
    ben.patch_annotation(early["id"], **saved(early, result=result[two][:1]))
    chi.create_annotation(three, result[three], was_cancelled=True, **begun[2])  # a skip keeps what was drawn
    made = annotations(team)
    assert made[early["id"]]["result"] == result[two][:1]
    assert sorted(row["task"] for row in made.values() if row["task"] in (one, two, three)) == sorted([one, two, three])


# Right classes


def swapped(team: Team, labels: str) -> str:
    """The project's label config with other labels in the team's own control."""
    old = team.studio.project(team.id)["label_config"]
    start = old.index(">", old.index('name="seg"')) + 1
    return str(old[:start] + labels + old[old.index("</BrushLabels>", start) :])


@pytest.mark.parametrize(
    ("labels", "unknown"),
    [
        (("weed", "crop", "soil"), ()),
        (("stone", "soil", "crop", "weed"), ()),
        (("soil", "crop", "thistle"), ("weed",)),
        (("soil", "crop"), ("weed",)),
    ],
)
def test_classes_stay_right_when_the_label_config_changes(
    share_backend: Share, pictures: Pictures, labels: tuple[str, ...], unknown: tuple[str, ...]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = team.attach()
    tasks = team.ranking()[:2]
    for task in tasks:
        team.segment(task)
    before = team.wait(before)
    truth = {task: team.project.labels(task, team.project.config()) for task in tasks}
    curve = team.project.store.read_json(team.project.key("curve.json")) or []
    names = team.project.config().classes.fine
    team.studio.patch_project(team.id, label_config=swapped(team, "".join(f'<Label value="{n}"/>' for n in labels)))
    team.wait(before)
    config = team.project.config()
    assert config.fine.labels == labels
    for task in tasks:
        now, was = team.project.labels(task, config), truth[task]
        assert now is not None
        assert was is not None
        for value, name in enumerate(names):
            here = now[was == value]
            assert (here == (255 if name in unknown else config.classes.fine.index(name))).all(), name
    model = team.project.store.read_json(team.project.key("model.json"))
    assert sorted(model["classes"]) == sorted(config.classes.fine), "learnt anew for these classes"
    now_curve = team.project.store.read_json(team.project.key("curve.json")) or []
    assert now_curve == curve, "no model has not seen these pictures"
    report = status(team.backend.context, team.id)
    assert [row["label"] for row in report["labels"] if row["why"] == "gone"] == (list(unknown) if unknown else [])
    fresh = set(labels) - set(names)
    assert {row["label"] for row in report["labels"] if row["why"] == "new"} == fresh
    for name in unknown:
        says = f"Label {name!r} is not in the label config any more, but 2 tasks have it, or coarse labels that "
        says += (
            "stood for it: those pixels count as unknown. Was it renamed? Then give it its old name back, or relabel "
        )
        says += "these regions."
        assert says in shown(report)
    for name in fresh:
        group = config.classes.coarse[config.classes.coarse_of()[config.classes.fine.index(name)]]
        says = (
            f"Label {name!r} is new and counts as {group!r}: `firstrow attach --group` says otherwise, or confirms it."
        )
        assert says in shown(report)
    assert team.backend.context.board.error(team.id) is None
    todo = plan(team.studio, team.id, team.backend.context.settings)
    assert todo.project == team.id, "plain attach accepts it, too"


@pytest.mark.parametrize(
    ("labels", "groups", "unknown", "bare"),
    [
        (("weed", "soil", "stone", "crop"), None, set(), True),
        (("soil", "crop", "thistle"), None, {"Plant"}, False),
        (("soil", "crop"), None, {"Plant"}, False),
        (("soil", "crop"), None, {"Plant"}, True),
        (("earth", "crop", "weed", "Mixed"), None, {"Soil"}, False),
        (("soil", "crop", "weed"), {"Soil": ["soil"], "Plant": ["crop"], "Weed": ["weed"]}, {"Plant"}, False),
        (("soil", "crop", "weed"), {"Soil": ["soil"], "Plant": ["crop"], "Weed": ["weed"]}, {"Plant"}, True),
    ],
)
def test_coarse_answers_stay_right_when_the_label_config_changes(
    share_backend: Share,
    pictures: Pictures,
    labels: tuple[str, ...],
    groups: dict[str, list[str]] | None,
    unknown: set[str],
    bare: bool,
) -> None:
    """With `bare` the answer does not say what its labels mean, as one that was drawn by hand."""
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:4]))
    team.attach()
    mixed = answer_with_a_mixed_cluster(team, bare)
    before = team.coarse()
    team.settle()
    config, records = team.project.config(), [r for r in team.project.index().values() if r.coarse]
    was = {record.id: team.project.own_coarse(record, config) for record in records}
    assert {*np.unique(was[mixed])} >= {0, 1, MIXED}  # type: ignore[call-overload]

    def change() -> None:
        xml = swapped(team, "".join(f'<Label value="{n}"/>' for n in labels))
        team.studio.patch_project(team.id, label_config=xml)
        team.wait(before)

    def confirm() -> None:
        apply(plan(team.studio, team.id, team.backend.context.settings, groups))
        team.backend.context.board.request_round(team.id, "attached")

    for step in (confirm,) if groups else (change, confirm):
        step()
        team.settle()
        now = team.project.config()
        assert now.fine.labels == labels
        for record in (team.project.index()[r.id] for r in records):
            seen, old = team.project.own_coarse(record, now), was[record.id]
            assert seen is not None
            assert old is not None
            for value, (name, members) in enumerate(GROUPS.items()):
                said = {now.classes.coarse[v] if v < MIXED else v for v in seen[old == value]}
                if name in unknown:
                    assert said <= {UNKNOWN}
                else:
                    assert all(set(members) <= set(now.groups[str(coarse)]) for coarse in said)
            assert (seen[old == MIXED] == MIXED).all()
        report = status(team.backend.context, team.id)
        lost = {label for members in GROUPS.values() for label in members} - set(labels)
        assert {row["label"] for row in report["labels"] if row["why"] == "gone"} == lost
        assert team.backend.context.board.error(team.id) is None


def answer_with_a_mixed_cluster(team: Team, bare: bool) -> int:
    """Give the next task its coarse answer, with one plant cluster called Mixed; the task."""
    task, before = answer(team), team.backend.round(team.id)
    given = task["annotations"][0]
    plants = [region for region in given["result"] if region["value"]["brushlabels"] == ["Plant"]]
    assert len(plants) > 1
    plants[0]["value"]["brushlabels"] = ["Mixed"]
    for region in given["result"] if bare else []:
        del region["meta"]["means"]
    team.studio.update_annotation(given["id"], given["result"])
    team.wait(before)
    team.settle()
    return int(task["id"])


def test_a_background_renamed_without_attach_makes_no_pixel_background(
    share_backend: Share, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), dict(list(pictures.items())[:3]))
    settings = team.backend.context.settings
    crop, weed = '<Label value="crop"/>', '<Label value="weed"/>'
    team.studio.patch_project(team.id, label_config=swapped(team, crop + weed))
    team.studio.connect_ml(url=settings.url, project=team.id, title="by hand")  # as on Label Studio's settings page
    before = team.wait()
    team.studio.patch_project(team.id, label_config=swapped(team, '<Label value="soil"/>' + crop + weed))
    before = team.wait(before)
    team.settle()
    task = team.ranking()[0]
    regions = [r for r in team.annotator().full_result(task) if r["value"]["brushlabels"] != ["soil"]]
    team.studio.create_annotation(task, regions)
    before = team.wait(before)
    was = team.project.labels(task, team.project.config())
    assert was is not None
    assert set(np.unique(was)) == {1, 2, IGNORE}
    team.studio.patch_project(team.id, label_config=swapped(team, crop + weed + '<Label value="loam"/>'))
    team.wait(before)
    team.settle()
    config = team.project.config()
    assert (config.background, config.classes.fine) == ("loam", ("crop", "weed", "loam"))
    now = team.project.labels(task, config)
    assert now is not None
    assert (now == np.array([IGNORE, 0, 1, *[IGNORE] * 253], np.uint8)[was]).all()
    said = {(row["label"], row["why"]) for row in status(team.backend.context, team.id)["labels"]}
    assert said == {("loam", "new")}, "no region of the old name is left"


def test_a_config_that_changes_in_mid_round_starts_it_anew(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before, task = team.attach(), team.ranking()[0]
    team.project.store.delete(team.project.key("pool.npz"))  # the round is a long one: all features are made anew
    team.segment(task)
    board = team.backend.context.board
    steps = {"fit_codebook": "started"}.items()
    wait_for(lambda: any({job["step"]: job["status"]}.items() >= steps for job in board.jobs(team.id)), 30, team.log)
    labels = '<Label value="weed"/><Label value="soil"/><Label value="crop"/>'
    team.studio.patch_project(team.id, label_config=swapped(team, labels))
    team.wait(before)
    config = team.project.config()
    assert config.fine.labels == ("weed", "soil", "crop")
    stored = team.project.labels(task, config)
    assert stored is not None
    truth = cv2.resize(team.masks[task], stored.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    named = np.array(config.classes.fine)[stored] == np.array(["soil", "crop", "weed"])[truth]
    assert named.mean() > 0.95, "of pixels at the rims of plants some differ, by the smaller size"
    assert team.project.store.read_json(team.project.key("model.json"))["classes"] == list(config.classes.fine)
    log = "".join(path.read_text() for path in team.backend.folder.glob("worker*.log"))
    assert f"project {team.id}: the label config was changed during the round" in log


def test_one_class_an_empty_pool_and_two_peoples_work(
    share_backend: Share, make_user: Callable[[str], LabelStudio], pictures: Pictures
) -> None:
    backend = share_backend(FIRSTROW_COARSE_TASKS="0")
    team = Team(backend, dict(list(pictures.items())[:3]))
    one = swapped(team, '<Label value="crop"/>')
    team.studio.patch_project(team.id, label_config=one)
    apply(plan(team.studio, team.id, backend.context.settings))
    backend.context.board.request_round(team.id, "attached")
    before = team.wait()
    assert parse(one).classes.fine == ("background", "crop")
    first, second, third = team.ranking()
    brush = team_regions(team, first)
    anna, ben = make_user("anna"), make_user("ben")
    early = anna.create_annotation(first, brush)
    late = ben.create_annotation(first, [])
    ben.create_annotation(second, [], was_cancelled=True)
    before = team.wait(before)
    assert stages(team)[first] == "full"
    assert stages(team)[second] == "new", "a skip says nothing"
    assert {row["id"] for row in team.studio.task(first, team.id)["annotations"]} == {early["id"], late["id"]}
    for task in (second, third):
        team.studio.create_annotation(task, team_regions(team, task))
    team.wait(before)
    state = backend.context.board.state(team.id)
    assert team.ranking() == []
    assert team.studio.project(team.id)["model_version"] == state["queue"], "a pool that ran dry"
    assert backend.context.board.error(team.id) is None


def team_regions(team: Team, task: int) -> list[dict[str, Any]]:
    """The plants of a task as regions of the only label."""
    from backend.regions import fine_regions

    config, mask = parse(team.studio.project(team.id)["label_config"]), team.masks[task]
    sure = np.full(mask.shape, 255, np.uint8)
    return fine_regions((mask > 0).astype(np.uint8), sure, config, (mask.shape[1], mask.shape[0]))


def test_an_empty_project_waits_for_tasks(share_backend: Share, pictures: Pictures) -> None:
    backend = share_backend(FIRSTROW_COARSE_TASKS="0")
    team = Team(backend, {})
    before = team.attach()
    assert team.ranking() == []
    (added,) = team.studio.upload(team.id, [next(iter(pictures))])
    team.wait(before)
    assert team.ranking() == [added]


def test_a_project_whose_skips_count_as_done_is_not_asked_coarsely(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    team.studio.patch_project(team.id, skip_queue="IGNORE_SKIPPED")
    said = plan(team.studio, team.id, team.backend.context.settings, GROUPS).sentences
    assert any("none are asked for" in sentence for sentence in said)
    team.attach()
    assert team.backend.context.board.state(team.id)["phase"] == "full"


def test_tasks_are_served_again_whatever_becomes_of_skips(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:4]))
    team.attach()
    board, given = team.backend.context.board, set_aside_by_a_round(team, team.studio)

    def change_to(skips: str, stage: str) -> dict[str, Any]:
        team.studio.patch_project(team.id, skip_queue=skips)
        wait_for(
            lambda: team.project.extra()["skips"] == skips and stages(team)[given["task"]] == stage,
            60,
            lambda: (stages(team), board.error(team.id), team.log()),
        )
        team.settle()
        return annotations(team)[given["id"]]

    assert not change_to("REQUEUE_FOR_OTHERS", "returned")["ground_truth"]
    row = change_to("IGNORE_SKIPPED", "coarse")
    assert lasting(row) == lasting(given)
    assert (row["was_cancelled"], row["completed_by"]) == (False, given["completed_by"])
    assert status(team.backend.context, team.id)["without_mask"] == list(stages(team).values()).count("coarse") > 0
    change_to("REQUEUE_FOR_OTHERS", "returned")
    row = change_to("REQUEUE_FOR_ME", "returned")
    assert (row["was_cancelled"], row["ground_truth"]) == (True, True), "else Label Studio does not serve it"
    order = team.ranking()
    assert given["task"] in order
    assert team.segment_all(team.studio) == order


def test_people_who_get_their_own_skips_back_are_served_in_order_too(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.studio.patch_project(team.id, skip_queue="REQUEUE_FOR_ME")
    team.attach()
    task = answer(team)
    team.settle()
    other = team.studio.create_annotation(task["id"], [], ground_truth=True)
    assert not read(team, task["id"]).callable, "one annotation of a task can be marked as ground truth, and one is"
    team.studio.delete_annotation(other["id"])
    more = team.studio.create_annotation(task["id"], task["annotations"][0]["result"])
    assert not read(team, task["id"]).callable, "one annotation of a task can be marked, and there are two"
    team.studio.delete_annotation(more["id"])
    record = read(team, task["id"])
    assert record.stage == "returned" or reopen(team.backend.context, team.project, record).stage == "returned"
    team.backend.context.board.changed(team.id, [task["id"]])  # a round may have read it before
    team.settle()
    order = team.ranking()
    assert task["id"] in order
    assert team.segment_all(team.studio) == order
