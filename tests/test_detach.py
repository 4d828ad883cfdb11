"""What people gave survives a detach: changed, skipped, drafted, commented, and without its copy or its author."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar
from weakref import ref

import numpy as np
import pytest
import requests
from conftest import Backend
from numpy.typing import NDArray
from team import GROUPS, SEG, Team, cannot_be_shown, saved, wait_for
from test_attach import STAYS
from test_harm import Slow, serve
from test_people import CHOICE, WITH_CHOICE, annotations, answer, lasting, read, set_aside_by_a_round

from backend import cli
from backend.annotator import prelabel, shown_prediction, started_from
from backend.answers_file import CHUNK, OURS, saved_before, write_answers
from backend.attach import apply, plan
from backend.attached import PAGE, look
from backend.cli import main
from backend.coarse_answers import copies_of, digest
from backend.connection import SECRET_HEADER, credentials, keeper_account, keeper_address, recorded
from backend.detach import detach
from backend.detach_answers import Choice, delete_if_same, undo_answers
from backend.embedded import Studio, backend_settings
from backend.enqueue import DEFAULT, STOPPED
from backend.errors import AttachRefused
from backend.export_coarse import export_answers
from backend.generations import clean_generations
from backend.label_config import parse, with_coarse
from backend.labelstudio import LabelStudio
from backend.publish import reopen, set_aside
from backend.server import look_around
from backend.settings import Settings
from backend.sync import refresh_config
from backend.transport import Transport

Pictures = dict[Path, NDArray[np.uint8]]
Share = Callable[..., Backend]
Row = dict[str, Any]


#: What of `around` is another where coarse labels are kept.
KEPT = {
    *("label_config", "labelled", "num_tasks_with_annotations", "useful_annotation_number"),
    *("total_annotations_number", "queue_done", "state", "finished_task_number", "queue_total"),
}


def run(team: Team, *arguments: str, **more: str) -> int:
    """The command, with the settings of this team's backend, and more."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**team.backend.environment, **more}.items():
            patch.setenv(name, value)
        return main(arguments)


def around(team: Team) -> dict[str, Any]:
    """All of a project that attach may touch, and its annotations."""
    row = team.studio.project(team.id)
    return {
        **{name: value for name, value in row.items() if name not in ("control_weights", "parsed_label_config")},
        "tabs": [view["data"] for view in team.studio.views(team.id)],
        "backends": len(team.studio.ml_backends(team.id)),
        "webhooks": len(team.studio.webhooks(team.id)),
        "versions": team.studio.versions(team.id),
        "keeper": [u["id"] for u in team.studio.users() if u["email"] == keeper_address(team.id)],
        "labelled": [t["is_labeled"] for t in team.studio.tasks(team.id)],
    }


@pytest.fixture
def team(share_backend: Share, pictures: Pictures) -> Team:
    """An attached project, on which no round begins any more; Label Studio asks us for prelabels."""
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.studio.patch_project(team.id, label_config=WITH_CHOICE)
    team.attach()
    team.settle()
    wait_for(lambda: named(team), 60, team.log)
    team.backend.context.board.stop(team.id)
    return team


def named(team: Team) -> bool:
    """Have our ML backend take the name of the order in force; whether it has it.

    Each look makes Label Studio save it as it was before, and the worker, too, gives it its name.
    """
    clean_generations(team.backend.context, team.project)
    [backend] = team.studio.ml_backends(team.id)
    return bool(backend["title"] == team.studio.version_in_force(team.id))


def answers(team: Team, person: LabelStudio, tasks: list[int]) -> list[Row]:
    """Coarse answers of a person, one on each of these tasks."""
    regions = prelabel(team.studio.task(team.ranking()[0], team.id))
    made = [person.create_annotation(task, regions, lead_time=5.0) for task in tasks]
    return [annotations(team)[row["id"]] for row in made]


def aside(team: Team, given: list[Row]) -> None:
    """Set answers aside, as a round does."""
    board, keeper = team.backend.context.board, keeper_account(team.studio, team.id)
    board.redis.set(f"firstrow:{team.id}:busy", "this test")  # no round begins
    board.register(team.id)
    for row in given:
        task = team.studio.task(row["task"], team.id)
        assert set_aside(team.backend.context, team.project, task, row, keeper)
    board.stop(team.id)
    board.redis.delete(f"firstrow:{team.id}:busy")


def delete_copies(team: Team, tasks: list[int]) -> None:
    """Press "Delete predictions" in the Data Manager."""
    chosen = {"selectedItems": {"all": False, "included": tasks}}
    params = {"id": "delete_tasks_predictions", "project": team.id}
    team.studio.http.call("POST", "/api/dm/actions/", params=params, body=chosen)
    assert not any(copies_of(task) for task in team.studio.full_tasks(team.id, tasks))


def is_as_given(row: Row, given: Row) -> bool:
    """Whether an annotation counts, is its author's, and says what they gave."""
    same = {**lasting(given), "parent_prediction": None}
    return (
        not row["was_cancelled"]
        and row["completed_by"] == given["completed_by"]
        and {**lasting(row), "parent_prediction": None} == same
    )


def test_only_what_is_as_it_was_given_goes_to_a_file(
    team: Team, make_user: Callable[[str], LabelStudio], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, file = make_user("anna"), tmp_path / "c.json"
    tasks = list(team.masks)
    given = answers(team, anna, tasks)
    same, full, bare, half, drawn = given[:5]
    drafted, talked, plain = given[5:]
    aside(team, [same, full, bare, half, drawn])
    delete_copies(team, [bare["task"]])
    whole = team.annotator().full_result(full["task"])
    anna.update_annotation(full["id"], whole)
    anna.update_annotation(half["id"], half["result"][:1])
    drafts = [
        anna.http.call(
            "POST", f"/api/tasks/{row['task']}/annotations/{row['id']}/drafts", body={"result": whole, "lead_time": 3}
        )
        for row in (drawn, drafted)
    ]
    team.studio.http.call("PATCH", f"/api/tasks/{talked['task']}/", body={"comment_count": 1})
    assert run(team, "detach", "--project", str(team.id), "--dry-run", "--coarse", "file", "--file", str(file)) == 0
    planned = capsys.readouterr().out
    assert "Give 2 coarse labels that were changed after they were set aside back to their authors first." in planned
    assert "Leave 3 coarse labels as annotations: they have a draft or a comment." in planned
    assert "1 coarse labels that are set aside have drafts." in planned
    assert "made anew, as drafts of the user whose key we have" in planned
    assert "Their ids and times are then in the file alone: imported again, they get new ones." in planned
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 0
    said = capsys.readouterr().out
    assert "Kept the control for coarse labels: annotations use it" in said
    left = annotations(team)
    assert set(left) == {full["id"], drawn["id"], drafted["id"], talked["id"]}
    changed = left[full["id"]]
    now = (changed["result"], changed["was_cancelled"], changed["completed_by"])
    assert now == (whole, False, full["completed_by"])
    for row in (drawn, drafted, talked):
        assert is_as_given(left[row["id"]], row)
        assert f"annotation {row['id']} stays" in said
    assert anna.http.raw("GET", f"/api/drafts/{drafts[1]['id']}/").status_code == 200, "not even touched"
    [again] = team.studio.drafts(drawn["task"])
    assert (again["annotation"], again["result"]) == (drawn["id"], whole), "made anew: Label Studio deletes it"
    filed = {row["id"]: row for task in json.loads(file.read_text()) for row in task["annotations"]}
    assert set(filed) == {same["id"], bare["id"], half["id"], plain["id"]}
    assert len(filed[half["id"]]["result"]) == 1
    assert {row["completed_by"] for row in filed.values()} == {anna.whoami()["id"]}
    assert keeper_account(team.studio, team.id) == 0
    assert (around(team)["backends"], around(team)["versions"]) == (0, {})
    anna.patch_annotation(full["id"], **saved(full, result=whole[:1]))  # editors that are still open
    assert annotations(team)[full["id"]]["result"] == whole[:1]
    gone = anna.http.raw("PATCH", f"/api/annotations/{same['id']}/", json=saved(same)).status_code
    assert gone == 404, "what it began from is in the file"
    here, number = look(team.studio, team.id, team.backend.context.settings), int(talked["id"])
    seen = team.studio.annotation(number)
    for change in (
        {"was_cancelled": True},
        {"was_cancelled": False},
    ):  # somebody skips it, and undoes that
        team.studio.patch_annotation(number, **change)
        assert not delete_if_same(here, seen, seen)
    assert delete_if_same(here, seen, team.studio.annotation(number))
    assert number not in annotations(team)


class Meddled(Slow):
    """Label Studio in which something else happens right before a request."""

    asked: ClassVar[list[str]] = []
    happens: ClassVar[Callable[[str], object]]

    def answer(self) -> None:
        """Pass one request on."""
        type(self).happens(f"{self.command} {self.path}")
        super().answer()

    do_GET = do_POST = do_PATCH = do_DELETE = answer  # noqa: N815  (names of http.server)


def test_what_is_changed_between_the_file_and_its_delete_stays(
    studio: Studio,
    team: Team,
    make_user: Callable[[str], LabelStudio],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    anna, file = make_user("anna"), tmp_path / "c.json"
    before = str(recorded(team.studio, team.id, team.backend.context.settings)["before"]["label_config"])
    given = answers(team, anna, list(team.masks)[:6])
    early, late, begun, held, held_early, same = given
    aside(team, [held, held_early])
    team.project.store.delete(team.project.coarse_answer_key(held["id"]))  # its copy alone tells whose it is

    def half(*rows: Row) -> None:
        for row in rows:
            anna.patch_annotation(row["id"], **saved(row, result=row["result"][:1]))

    changes: dict[str, Callable[[], object]] = {
        "GET /api/tasks/?": lambda: half(early, held_early),
        f"GET /api/tasks/{begun['task']}/drafts": lambda: anna.create_draft(begun["task"], begun["id"], [], 1.0),
        **{f"GET /api/annotations/{row['id']}/": partial(half, row) for row in (late, held)},
    }

    def happens(request: str) -> None:
        for key in [key for key in changes if file.exists() and request.startswith(key)]:
            changes.pop(key)()

    Meddled.happens = happens
    detach = ["detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)]
    with serve(studio, Meddled) as url:
        assert run(team, *detach, LABEL_STUDIO_URL=url) == 0
    assert not changes
    said, left = capsys.readouterr().out, annotations(team)
    assert set(left) == {row["id"] for row in given} - {same["id"]}
    for row in (early, late, begun, held, held_early):
        words = f"Task {row['task']}: annotation {row['id']} was changed meanwhile and stays; detach once more."
        assert words in said
        assert left[row["id"]]["result"] == (row["result"] if row is begun else row["result"][:1])
        assert (left[row["id"]]["was_cancelled"], left[row["id"]]["completed_by"]) == (False, row["completed_by"])
    [draft] = team.studio.drafts(begun["task"])
    anna.http.call("DELETE", f"/api/drafts/{draft['id']}/")
    assert run(team, *detach) == 0
    assert "changed meanwhile" not in capsys.readouterr().out
    assert annotations(team) == {}
    filed = {row["id"]: row["result"] for task in json.loads(file.read_text()) for row in task["annotations"]}
    assert filed == {**{row["id"]: row["result"] for row in given}, **{n: row["result"] for n, row in left.items()}}
    assert around(team)["label_config"] == before
    assert (around(team)["backends"], around(team)["versions"], around(team)["keeper"]) == (0, {}, [])


class Unwilling(Slow):
    """Label Studio that deletes no tab."""

    asked: ClassVar[list[str]] = []
    refused = "DELETE /api/dm/views/"


def test_a_project_stays_stopped_after_a_detach_that_ended_badly(
    studio: Studio, share_backend: Share, pictures: Pictures, capsys: pytest.CaptureFixture[str]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before, board = around(team), team.backend.context.board
    team.attach()
    project, settings = ["--project", str(team.id)], team.backend.context.settings
    task, secret = team.ranking()[0], {SECRET_HEADER: settings.project_secret(team.id)}
    event = {"action": "ANNOTATION_CREATED", "project": {"id": team.id}, "task": {"id": task}}

    def ends_badly() -> None:
        with serve(studio, Unwilling) as url:
            assert run(team, "detach", *project, LABEL_STUDIO_URL=url) == 1
        assert "502" in capsys.readouterr().err
        assert board.stopped(team.id)

    def number() -> object:
        return team.project.store.read_json(team.project.key("number.json"))

    ends_badly()
    last = number()
    team.segment(task)
    assert requests.post(f"{settings.url}/webhook", json=event, headers=secret, timeout=30).ok
    board.reconcile(team.id)
    look_around(board)  # as a start of `serve` does
    assert (board.busy(team.id), board.reconciling(team.id)) == (None, None)
    late = board.queue("default").enqueue("backend.jobs.reconcile", team.id, job_id=f"reconcile-{team.id}-late")
    wait_for(lambda: late.get_status() == "finished", 60, team.log)
    assert board.redis.ttl(f"firstrow:{team.id}:stopped") == -1, "however long it takes"
    assert (board.busy(team.id), number()) == (None, last), "nothing has begun"

    assert run(team, "attach", *project) == 0
    team.wait()
    team.settle()
    assert team.project.index()[task].stage == "full", "what happened meanwhile is found"
    ends_badly()
    assert run(team, "detach", *project) == 0
    assert 0 < board.redis.ttl(f"firstrow:{team.id}:stopped") <= STOPPED
    team.studio.delete_annotation(next(iter(annotations(team))))
    after = around(team)
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def test_answers_come_back_without_copies_and_beside_what_label_studio_cannot_show(
    team: Team, make_user: Callable[[str], LabelStudio], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, project = make_user("anna"), ["--project", str(team.id)]
    bare, lost, skipped, mixed, plain = given = answers(team, anna, list(team.masks)[:5])
    aside(team, [bare, lost])
    delete_copies(team, [bare["task"], lost["task"]])
    team.project.store.delete(team.project.coarse_answer_key(lost["id"]))
    anna.patch_annotation(skipped["id"], was_cancelled=True)
    anna.update_annotation(mixed["id"], [*mixed["result"], CHOICE])
    their = plain["task"]
    number = anna.create_prediction(their, team.annotator().full_result(their), "seg-77", 0.9)
    broken = list(team.masks)[6]
    cannot_be_shown(anna, broken)
    file = tmp_path / "all.json"
    assert run(team, "export-coarse", *project, "--file", str(file)) == 1
    assert f"Label Studio cannot show task {broken}" in capsys.readouterr().err
    rows = {row["id"]: row for task in json.loads(file.read_text()) for row in task["annotations"]}
    assert set(rows) == {row["id"] for row in given}
    assert rows[bare["id"]]["completed_by"] == anna.whoami()["id"]
    attached = around(team)
    assert run(team, "detach", *project, "--dry-run") == 0
    planned = capsys.readouterr().out
    for words in (
        "Here you must choose",
        "`--coarse keep`",
        "1 others stay",
        f"Label Studio cannot show task {broken}",
    ):
        assert words in planned
    assert around(team) == attached

    assert run(team, "detach", *project, "--coarse", "keep") == 1
    said = capsys.readouterr()
    assert f"Label Studio cannot show task {broken}" in said.err
    assert f"annotation {lost['id']} counts again, under our account" in said.out
    assert len(team.studio.ml_backends(team.id)) == 1
    team.studio.http.call("DELETE", f"/api/tasks/{broken}/")
    for _ in range(2):
        assert run(team, "detach", *project, "--coarse", "keep") == 0
        left = annotations(team)
        assert is_as_given(left[bare["id"]], bare)
        assert is_as_given(left[plain["id"]], plain)
        assert (left[lost["id"]]["was_cancelled"], left[lost["id"]]["result"]) == (False, lost["result"])
        assert left[skipped["id"]]["was_cancelled"], "their own skip"
        assert left[mixed["id"]]["result"] == [*mixed["result"], CHOICE]
        assert (team.studio.ml_backends(team.id), team.studio.versions(team.id)) == ([], {"seg-77": 1})
        [kept] = [row for row in team.studio.predictions(their) if row["id"] == number]
        assert kept["result"]
        assert keeper_account(team.studio, team.id), "it still has an annotation"
    assert "still handed to it" in capsys.readouterr().out


def test_what_people_say_of_answers_while_they_are_set_aside_stays(
    team: Team, make_user: Callable[[str], LabelStudio], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    anna, ben, project, file = make_user("anna"), make_user("ben"), ["--project", str(team.id)], tmp_path / "c.json"
    given = answers(team, anna, list(team.masks)[:6])
    skipped, bare, updated, marked, plain, saved_too = given
    aside(team, given[:5])
    for row in (skipped, bare):
        anna.patch_annotation(row["id"], **saved(row, was_cancelled=True))  # in an editor that has it open
    delete_copies(team, [bare["task"]])
    half = updated["result"][:1]
    anna.patch_annotation(updated["id"], **saved(updated, result=half))
    team.studio.patch_annotation(marked["id"], ground_truth=True)
    own = ben.create_annotation(plain["task"], [], was_cancelled=True)
    assert run(team, "export-coarse", *project, "--file", str(file)) == 0
    exported = {row["id"]: row for task in json.loads(file.read_text()) for row in task["annotations"]}
    for number in (skipped["id"], bare["id"]):
        assert (exported[number]["was_cancelled"], exported[number]["completed_by"]) == (True, given[0]["completed_by"])
    assert not exported[plain["id"]]["was_cancelled"]
    for choice in ("keep", "file"):
        dry = ["--dry-run", "--coarse", choice, "--file", str(tmp_path / "new.json")]
        assert run(team, "detach", *project, *dry) == 0
        planned = capsys.readouterr().out
        assert "2 coarse labels were skipped by people while they were set aside: they stay skipped." in planned
        assert (STAYS in planned) == (choice == "keep")
        assert ("out of the label config, unless annotations that are left need it." in planned) == (choice == "file")
        for words in ("have drafts", "left as copies alone"):
            assert words not in planned
        assert ("Give 4 coarse labels that were changed" in planned) == (choice == "file")
    for _ in range(2):
        assert run(team, "detach", *project, "--coarse", "keep") == 0
        left = annotations(team)
        for row in (skipped, bare):
            now = left[row["id"]]
            assert (now["was_cancelled"], now["completed_by"]) == (True, row["completed_by"]), "a skip of her own"
            assert (now["result"], now["lead_time"]) == (row["result"], row["lead_time"] + 4.0)
        now = left[updated["id"]]
        assert (now["was_cancelled"], now["completed_by"], now["result"]) == (False, updated["completed_by"], half)
        now = left[marked["id"]]
        assert (now["was_cancelled"], now["ground_truth"], now["result"]) == (False, True, marked["result"])
        assert is_as_given(left[plain["id"]], plain)
        assert left[own["id"]]["was_cancelled"]
        assert is_as_given(left[saved_too["id"]], saved_too)
        assert keeper_account(team.studio, team.id) == 0


def test_what_others_have_open_is_theirs_when_an_answer_is_set_aside(
    team: Team, make_user: Callable[[str], LabelStudio]
) -> None:
    anna, ben = make_user("anna"), make_user("ben")
    tasks = team.ranking()[:3]
    opened = [team.studio.task(task, team.id) for task in tasks]  # in an editor of Ben's
    given = answers(team, anna, tasks)
    aside(team, given)
    whole = [team.annotator().full_result(task) for task in tasks]
    made = ben.create_annotation(tasks[0], whole[0], **started_from(opened[0]))
    skip = ben.create_annotation(tasks[1], [], was_cancelled=True, **started_from(opened[1]))
    draft = {"result": whole[2], "lead_time": 3, **started_from(opened[2])}
    number = ben.http.call("POST", f"/api/tasks/{tasks[2]}/drafts", body=draft)["id"]
    assert [read(team, task).stage for task in tasks] == ["full", "returned", "returned"]
    for _ in range(2):
        assert run(team, "detach", "--project", str(team.id), "--coarse", "keep") == 0
        left = annotations(team)
        assert all(is_as_given(left[row["id"]], row) for row in given)
        assert left[made["id"]]["result"] == whole[0]
        assert (left[skip["id"]]["was_cancelled"], left[skip["id"]]["completed_by"]) == (True, ben.whoami()["id"])
        assert len(left) == 5
        assert ben.http.call("GET", f"/api/drafts/{number}/")["result"] == whole[2]
    sent = ben.create_annotation(tasks[2], whole[2], draft_id=number, **started_from(opened[2]))
    assert annotations(team)[sent["id"]]["result"] == whole[2]


class Died(Exception):
    """Somebody has killed the process."""


class Mortal(Transport):
    """Calls Label Studio, and dies instead of a change of it: `changes` are made before."""

    changes: int

    def call(self, method: str, path: str, *args: Any, **more: Any) -> Any:
        """Send one request."""
        if method != "GET":
            self.changes -= 1
            if self.changes < 0:
                raise Died(path)
        return super().call(method, path, *args, **more)


def detach_until(team: Team, choice: Choice, file: Path, changes: int = 10**6) -> str:
    """Detach, and die after so many changes of Label Studio; instead of which one, nothing if it ended."""
    door, settings = LabelStudio(team.studio.url, ""), team.backend.context.settings
    door.http = mortal = Mortal(team.studio.url, team.studio.http.credentials.key)
    mortal.changes = changes
    try:
        extra, kept = team.project.extra(), team.project.coarse_answers()
        for _ in detach(door, team.id, settings, choice, file, extra, kept):
            pass
    except Died as death:
        return str(death)
    return ""


def attach_again(team: Team, predictions: list[Row]) -> None:
    """Attach a project, and have it be as after a round that has made these predictions."""
    apply(plan(team.studio, team.id, team.backend.context.settings, GROUPS))
    assert team.studio.import_predictions(team.id, predictions) == len(predictions)
    team.studio.patch_project(team.id, model_version=predictions[0]["model_version"])
    refresh_config(team.backend.context, team.project)


@pytest.mark.parametrize(("choice", "first"), [("keep", 1), ("file", 3)])
def test_a_detach_that_died_at_any_change_is_ended_by_the_next_one(
    share_backend: Share,
    make_user: Callable[[str], LabelStudio],
    pictures: Pictures,
    tmp_path: Path,
    choice: Choice,
    first: int,
) -> None:
    team, anna = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:3])), make_user("anna")
    before, studio, every = around(team), team.studio, int(os.environ.get("FIRSTROW_DEATHS", "5"))
    team.attach()
    team.settle()
    team.backend.context.board.stop(team.id)
    tasks, names = team.ranking()[:2], ("task", "result", "score", "model_version")
    regions = prelabel(studio.task(tasks[0], team.id))
    rows = [row for task in studio.full_tasks(team.id, team.masks) for row in task["predictions"]]
    predictions = [{name: row[name] for name in names} for row in rows]
    assert not detach_until(team, choice, tmp_path / "none.json")
    for changes in count(first % every, every):
        attach_again(team, predictions)
        began = {task: studio.predictions(task)[0]["id"] for task in tasks}
        made = [anna.create_annotation(t, regions, lead_time=5.0, parent_prediction=began[t])["id"] for t in tasks]
        given = [annotations(team)[number] for number in made]
        aside(team, given[:1])
        file = tmp_path / f"{changes}.json"
        died = detach_until(team, choice, file, changes)
        if not died:
            assert changes > 10
            return
        assert not detach_until(team, choice, file)
        after, left = around(team), annotations(team)
        if choice == "keep":
            assert set(left) == set(made), died
            assert all(is_as_given(left[row["id"]], row) for row in given), died
        else:
            filed = [row for task in json.loads(file.read_text()) for row in task["annotations"]]
            assert {row["id"]: digest(row) for row in filed} == {row["id"]: digest(row) for row in given}, died
            assert left == {}, died
        changed = {name: after[name] for name in before if after[name] != before[name]}
        assert changed.keys() <= (KEPT if choice == "keep" else set()), (died, changed)
        for number in left:
            studio.delete_annotation(number)
        studio.patch_project(team.id, label_config=before["label_config"])


def test_file_of_answers_survives_a_full_disk(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    write_answers([{"id": 1, "annotations": [{"id": 5, "result": ["x" * 100]}]}], file)
    was = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(AttachRefused):
            write_answers([{"id": 1, "annotations": [{"id": 5, "result": ["x" * 100]}, {"id": 6}]}], file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)
    assert file.read_bytes() == was
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("indent", [None, 2])
def test_file_of_answers_is_read_answer_by_answer(tmp_path: Path, indent: int | None) -> None:
    file, odd = tmp_path / "c.json", {"id": 1, "result": [2**70, "half a character \ud83d", "]},[{"]}
    answers = [odd, {"id": 2, "result": list(range(CHUNK // 4))}, {"id": 3, "result": []}]
    rows = [{"id": row["id"], "meta": OURS, "annotations": [row]} for row in answers]
    file.write_text(json.dumps(rows, indent=indent))
    assert list(saved_before((), file)) == rows
    assert list(saved_before({1, 3}, file)) == rows[1:2]
    write_answers(saved_before({3}, file), file)
    assert list(saved_before((), file)) == json.loads(file.read_text()) == rows[:2]
    whole = file.read_text()
    for damaged in ("", "{}", "[7]", "[" * 100_000, whole[:-3], whole[:CHUNK], whole.replace("coarse labels", "mine")):
        file.write_text(damaged)
        with pytest.raises(AttachRefused, match="holds no coarse labels of ours"):
            list(saved_before((), file))
    write_answers([], file)
    assert list(saved_before((), file)) == json.loads(file.read_text()) == []


class Alive(dict[str, Any]):
    """A task of which can be told whether it is alive."""


class Watched(LabelStudio):
    """Label Studio, and how many of the tasks that it gave were alive at most."""

    most = 0

    def full_tasks(self, project: int, tasks: Iterable[int], unshown: set[int] | None = None) -> Iterator[Row]:
        """The tasks, one after another."""
        given: list[ref[Alive]] = []
        for row in super().full_tasks(project, tasks, unshown):
            given.append(ref(task := Alive(row)))
            self.most = max(self.most, sum(one() is not None for one in given))
            yield task


def test_answers_pass_page_by_page(studio: Studio, tmp_path: Path) -> None:
    door, file, count = Watched(studio.url, studio.token), tmp_path / "c.json", PAGE + 5
    xml = SEG.format(tag="BrushLabels")
    config = parse(xml := with_coarse(xml, parse(xml, GROUPS).classes))
    assert config.coarse is not None
    mask = {"format": "rle", "rle": list(range(9)), "brushlabels": [config.coarse.labels[0]]}
    region = {"id": "cl1", "from_name": config.coarse.name, "to_name": "photo", "type": "brushlabels", "value": mask}
    results: list[list[Row]] = [[region], *[[]] * (count - 2), [region]]
    project = int(door.create_project("many answers", xml)["id"])
    door.import_tasks(
        project,
        [{"data": {"picture": "/a"}, "annotations": [{"result": r, "ground_truth": False}]} for r in results],
    )
    settings = Settings.read(backend_settings(tmp_path, "redis://127.0.0.1:9", studio))
    assert export_answers(door, project, settings, {}, {}, file) == 2
    assert len(json.loads(file.read_text())) == 2
    file.unlink()
    [step] = undo_answers(look(door, project, settings), "file", file, ask=False)
    assert step.text.startswith(f"Save 2 coarse labels to {file}")
    assert list(step.run()) == [f"  {PAGE} of {count} tasks"]
    assert len(json.loads(file.read_text())) == 2
    assert list(undo_answers(look(door, project, settings), "file", file, ask=False)) == []
    assert 1 < door.most <= PAGE


def test_no_open_editor_loses_its_work_by_a_detach(
    share_backend: Share, make_user: Callable[[str], LabelStudio], pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = team.attach()
    team.segment(team.ranking()[0])
    team.wait(before)
    people = [make_user(name) for name in ("anna", "ben", "chi")]
    opened = [person.next_task(team.id) for person in people]
    begun = [shown_prediction(task) for task in opened if task]
    assert all(begun)
    [anna, ben, chi], [one, two, three] = people, [int(task["id"]) for task in opened if task]
    draft = {"result": team.annotator().full_result(one), "parent_prediction": begun[0]["id"], "lead_time": 3}  # type: ignore[index]
    number = anna.http.call("POST", f"/api/tasks/{one}/drafts", body=draft)["id"]
    assert run(team, "detach", "--project", str(team.id)) == 0
    assert team.studio.versions(team.id) == {}
    anna.create_annotation(one, draft["result"], draft_id=number, parent_prediction=begun[0]["id"])  # type: ignore[index]
    ben.create_annotation(two, team.annotator().full_result(two), parent_prediction=begun[1]["id"])  # type: ignore[index]
    chi.create_annotation(three, [], was_cancelled=True, parent_prediction=begun[2]["id"])  # type: ignore[index]
    made = [row for row in annotations(team).values() if not row["was_cancelled"]]
    assert len(made) == 3, [
        (r["id"], r["task"], r["completed_by"], r["created_username"], len(r["result"]), r["was_cancelled"])
        for r in annotations(team).values()
    ]
    parked = team.studio.projects(f"First Row: open prelabels of project {team.id}")
    assert len(parked) == 1


@pytest.mark.parametrize("noted", [True, False], ids=["the store has our note", "nobody has it"])
def test_a_project_of_open_prelabels_goes_with_a_detach_of_another_day(
    team: Team, make_user: Callable[[str], LabelStudio], services_folder: Path, noted: bool
) -> None:
    detach, title = ["detach", "--project", str(team.id)], f"First Row: open prelabels of project {team.id}"
    others = int(team.studio.create_project(f"{title}0", SEG.format(tag="BrushLabels"))["id"])
    opened = make_user("anna").next_task(team.id)
    assert opened is not None
    assert run(team, *detach) == 0

    def left() -> set[int]:
        return {int(row["id"]) for row in team.studio.projects(title)}

    [parked] = left() - {others}
    [task] = team.studio.full_tasks(parked, [int(row["id"]) for row in team.studio.tasks(parked)])
    assert shown_prediction(opened)["id"] in {row["id"] for row in task["predictions"]}  # type: ignore[index]
    if not noted:
        team.project.store.delete(team.project.key("config.json"))
    assert run(team, *detach) == 0
    assert left() == {parked, others}, "somebody may still have it open"
    with sqlite3.connect(services_folder / "label-studio" / "label_studio.sqlite3", timeout=60) as database:
        database.execute(
            "UPDATE project SET created_at = datetime('now', '-25 hours') WHERE id IN (?, ?)", (parked, others)
        )
    database.close()
    assert run(team, *detach) == 0
    assert left() == {others}, "that is another project's"
    team.studio.delete_project(others)


def test_what_was_served_before_we_are_asked_can_be_submitted_after_a_detach(
    team: Team, make_user: Callable[[str], LabelStudio]
) -> None:
    [backend] = team.studio.ml_backends(team.id)
    queue, anna = team.project.state()["queue"], make_user("anna")
    titled = {**credentials(team.backend.context.settings, team.id), "title": "first-row-0"}
    team.studio.patch_ml(backend["id"], **titled)  # as between an order and its cleaning up
    team.studio.patch_project(team.id, model_version=queue)
    opened = anna.next_task(team.id)
    shown = shown_prediction(opened)  # type: ignore[arg-type]
    assert (shown or {})["model_version"] == queue
    assert run(team, "detach", "--project", str(team.id)) == 0
    given = anna.create_annotation(opened["id"], shown["result"], **started_from(opened))  # type: ignore[index,arg-type]
    assert given["parent_prediction"] == shown["id"]  # type: ignore[index]


def test_no_open_editor_loses_its_work_by_a_detach_that_keeps_coarse_labels(
    share_backend: Share, make_user: Callable[[str], LabelStudio], pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), dict(list(pictures.items())[:4]))
    anna, ben = make_user("anna"), make_user("ben")
    team.attach()
    coarse = set_aside_by_a_round(team, anna)
    served = ben.next_task(team.id)
    assert served is not None
    whole = team.annotator().full_result(served["id"])
    full = ben.create_annotation(served["id"], whole, lead_time=9.0, **started_from(served))
    assert coarse["parent_prediction"]
    assert full["parent_prediction"]
    part = {row["id"]: row["result"][:1] for row in (coarse, full)}
    drafts = [
        person.http.call(
            "POST",
            f"/api/tasks/{row['task']}/annotations/{row['id']}/drafts",
            body={"result": part[row["id"]], "lead_time": 1.0},
        )["id"]
        for person, row in ((anna, coarse), (ben, full))
    ]
    team.settle()
    assert run(team, "detach", "--project", str(team.id), "--coarse", "keep") == 0
    assert not team.studio.versions(team.id)
    assert not any(row["was_cancelled"] for row in annotations(team).values())
    goes_on = {"result": part[coarse["id"]], "lead_time": 2.0}
    assert anna.http.raw("PATCH", f"/api/drafts/{drafts[0]}/", json=goes_on).status_code == 404, "it has another id"
    ben.http.call("PATCH", f"/api/drafts/{drafts[1]}/", body={"result": part[full["id"]], "lead_time": 2.0})
    for person, row, draft in ((anna, coarse, drafts[0]), (ben, full, drafts[1])):
        person.patch_annotation(row["id"], **saved(row, result=part[row["id"]], draft_id=draft))
        now = annotations(team)[row["id"]]
        assert (now["result"], now["was_cancelled"]) == (part[row["id"]], False)
        assert now["completed_by"] == person.whoami()["id"]
        person.patch_annotation(row["id"], **saved(row, result=part[row["id"]], was_cancelled=True))
        now = annotations(team)[row["id"]]
        assert (now["was_cancelled"], now["completed_by"]) == (True, person.whoami()["id"])


def coarse_answers(team: Team) -> None:
    """Two coarse answers: one that is set aside, one that stands."""
    team.attach()
    last = team.backend.round(team.id)
    answer(team)
    team.wait(last)


def test_detach_asks_what_becomes_of_coarse_labels(
    share_backend: Share, pictures: Pictures, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    before = around(team)
    coarse_answers(team)
    team.settle()
    attached, made = around(team), annotations(team)
    assert run(team, "detach", "--project", str(team.id)) == 1
    assert "--coarse keep" in capsys.readouterr().err
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file") == 1
    file = tmp_path / "coarse.json"
    for choice in ("keep", "file"):
        dry = ["--dry-run", "--coarse", choice, "--file", str(file)]
        assert run(team, "detach", "--project", str(team.id), *dry) == 0
        planned = capsys.readouterr().out
        assert "Disconnect the ML backend" in planned
        assert "forget which it was (`parent_prediction`)" in planned
    assert around(team) == attached
    assert run(team, "export-coarse", "--project", str(team.id), "--file", str(tmp_path / "all.json")) == 0
    rows = json.loads((tmp_path / "all.json").read_text())
    exported = [row for task in rows for row in task["annotations"]]
    assert {row["id"] for row in exported} == set(made)
    assert all(row["lead_time"] == 5.0 and row["completed_by"] for row in exported)
    assert annotations(team) == made

    for _ in range(2):  # every step may be repeated
        assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 0
        after = around(team)
        assert {name: after[name] for name in before if after[name] != before[name]} == {}
        assert annotations(team) == {}
    saved = [row for task in json.loads(file.read_text()) for row in task["annotations"]]
    assert len(saved) == len(made), "a second detach does not write over what the first one saved"
    assert {digest(row) for row in saved} == {digest(row) for row in made.values()}
    everything = ["export-coarse", "--project", str(team.id), "--file", str(tmp_path / "all.json")]
    assert run(team, *everything) == 1, "an earlier export is not replaced"
    assert run(team, *everything, "--force") == 0
    again = [row for task in json.loads((tmp_path / "all.json").read_text()) for row in task["annotations"]]
    aside = {number for number, row in made.items() if row["was_cancelled"]}
    assert {row["id"] for row in again} == aside, "the store remembers what was set aside"


def test_a_detach_that_goes_on_keeps_what_was_saved_before(
    share_backend: Share, pictures: Pictures, tmp_path: Path
) -> None:
    team, file = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures), tmp_path / "coarse.json"
    team.attach()
    one = answer(team)["annotations"][0]
    early = {"id": 1, "data": {}, "annotations": [{"id": 10**9, "result": one["result"]}]}
    file.write_text(json.dumps([early]))
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 1, "not ours"
    file.write_text(json.dumps([{**early, "meta": OURS}]))
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 0
    rows = json.loads(file.read_text())
    assert {row["id"] for task in rows for row in task["annotations"]} == {one["id"], 10**9}
    assert annotations(team) == {}
    file.write_text("somebody's notes")
    team.attach()
    answer(team)
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 1
    assert file.read_text() == "somebody's notes"
    assert len(annotations(team)) == 1


def test_detach_gives_coarse_labels_back_as_they_were(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    before = around(team)
    team.attach()
    given = answer(team)["annotations"][0]
    record = read(team, given["task"])
    assert reopen(team.backend.context, team.project, record).stage == "returned"
    assert run(team, "detach", "--project", str(team.id), "--coarse", "keep") == 0
    [row] = annotations(team).values()
    assert lasting(row) == {**lasting(given), "parent_prediction": row["parent_prediction"]}
    assert row["parent_prediction"] in (None, given["parent_prediction"]), "unset where the prediction is deleted"
    assert (row["completed_by"], row["was_cancelled"]) == (given["completed_by"], False)
    after = around(team)
    assert {name for name in before if after[name] != before[name]} <= KEPT
    assert after["labelled"].count(True) == 1


def test_detach_during_a_round_stops_it_first(make_backend: Callable[..., Backend], pictures: Pictures) -> None:
    team = Team(make_backend(FIRSTROW_COARSE_TASKS="1", FIRSTROW_TRAIN_STEPS="400"), pictures)
    before = around(team)
    team.attach()
    given = answer(team)["annotations"][0]
    team.segment(team.ranking()[-1])
    board = team.backend.context.board
    assert board.busy(team.id)
    assert run(team, "detach", "--project", str(team.id), "--coarse", "keep") == 0
    assert board.busy(team.id) is None
    row = annotations(team)[given["id"]]
    assert lasting(row) == {**lasting(given), "parent_prediction": row["parent_prediction"]}
    assert row["parent_prediction"] in (None, given["parent_prediction"]), "unset where the prediction is deleted"
    assert not row["was_cancelled"]
    after = around(team)
    for name in ("sampling", "model_version", "tabs", "backends", "webhooks", "versions", "keeper"):
        assert after[name] == before[name], name


def test_detach_says_where_a_job_outlasts_it(
    share_backend: Share, pictures: Pictures, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    team.attach()
    team.settle()
    board = team.backend.context.board
    registry = board.queue(DEFAULT).started_job_registry
    monkeypatch.setattr(cli, "STOP_SECONDS", 0.2)
    board.redis.zadd(registry.key, {f"clean-{team.id}-1:1": time.time() + 600})
    try:
        assert run(team, "detach", "--project", str(team.id)) == 1
        assert "run `firstrow detach" in capsys.readouterr().err
        assert team.studio.ml_backends(team.id) == []
        assert board.redis.ttl(f"firstrow:{team.id}:stopped") == -1, "until a detach that ends"
    finally:
        board.redis.zrem(registry.key, f"clean-{team.id}-1:1")
    assert run(team, "detach", "--project", str(team.id)) == 0
    assert board.redis.ttl(f"firstrow:{team.id}:stopped") > 0


def test_detach_refuses_nothing_where_there_is_no_coarse_label(share_backend: Share, pictures: Pictures) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="0"), pictures)
    before = around(team)
    team.attach()
    assert run(team, "detach", "--project", str(team.id)) == 0
    after = around(team)
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def test_nothing_is_set_aside_without_our_ml_backend_and_detach_gives_all_back(
    share_backend: Share, pictures: Pictures
) -> None:
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="2"), pictures)
    before = around(team)
    last = team.attach()
    board, answered = team.backend.context.board, {}
    for _ in range(2):
        [row] = answer(team)["annotations"]
        answered[row["id"]] = row
        last = team.wait(last)
    team.settle()
    given = {row["id"]: row for row in annotations(team).values() if not row["was_cancelled"]}
    aside_before = {number for number, row in annotations(team).items() if row["was_cancelled"]}
    [backend] = team.studio.ml_backends(team.id)
    team.studio.delete_ml(backend["id"])
    for task in team.ranking()[:2]:  # full segmentations, after which coarse answers were set aside
        team.segment(task)
    board.request_round(team.id, "this test")
    until = time.monotonic() + 60
    while (error := board.error(team.id)) is None or "has no ML backend" not in error["message"] or board.busy(team.id):
        assert time.monotonic() < until, team.log()
        time.sleep(0.2)
    now = annotations(team)
    assert {number for number, row in now.items() if row["was_cancelled"]} == aside_before
    assert {number: now[number] for number in given} == given
    board.redis.flushdb()
    for key in team.project.store.list(team.project.key()):  # the note is lost, too
        team.project.store.delete(key)
    assert run(team, "detach", "--project", str(team.id), "--coarse", "keep") == 0
    assert not any(row["was_cancelled"] for row in annotations(team).values())
    assert all(is_as_given(annotations(team)[number], row) for number, row in answered.items())
    after = around(team)
    assert all(after[name] == before[name] for name in ("tabs", "backends", "webhooks", "versions", "keeper"))
    assert "firstrow-coarse" in after["label_config"], "the answers that were kept need it"
