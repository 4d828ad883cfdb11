"""What people gave survives a detach: changed, skipped, drafted, commented, and without its copy or its author."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from conftest import Backend
from numpy.typing import NDArray
from team import Team
from test_people import CHOICE, WITH_CHOICE, annotations, around, lasting, read, run

from backend.annotator import prelabel, started_from
from backend.answers_file import write_answers
from backend.coarse_answers import COARSE_COPY, copies_of, copy_of
from backend.connection import keeper_account
from backend.errors import AttachRefused
from backend.labelstudio import LabelStudio

Pictures = dict[Path, NDArray[np.uint8]]
Share = Callable[..., Backend]
Row = dict[str, Any]


@pytest.fixture
def team(share_backend: Share, pictures: Pictures) -> Team:
    """An attached project, on which no round begins any more."""
    team = Team(share_backend(FIRSTROW_COARSE_TASKS="1"), pictures)
    team.studio.patch_project(team.id, label_config=WITH_CHOICE)
    team.attach()
    team.settle()
    team.backend.context.board.stop(team.id)
    return team


def answers(team: Team, person: LabelStudio, tasks: list[int]) -> list[Row]:
    """Coarse answers of a person, one on each of these tasks."""
    regions = prelabel(team.studio.task(team.ranking()[0], team.id))
    made = [person.create_annotation(task, regions, lead_time=5.0) for task in tasks]
    return [annotations(team)[row["id"]] for row in made]


def aside(team: Team, given: list[Row]) -> None:
    """Set answers aside, as a round does."""
    keeper, project = keeper_account(team.studio, team.id), team.project
    for row in given:
        project.store.write_json(project.coarse_answer_key(row["id"]), {"task": row["task"], "annotation": row})
        team.studio.create_prediction(row["task"], copy_of(row), COARSE_COPY)
        team.studio.patch_annotation(row["id"], was_cancelled=True, completed_by=keeper)


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
    assert run(team, "detach", "--project", str(team.id), "--coarse", "file", "--file", str(file)) == 0
    said = capsys.readouterr().out
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
    saved = {row["id"]: row for task in json.loads(file.read_text()) for row in task["annotations"]}
    assert set(saved) == {same["id"], bare["id"], half["id"], plain["id"]}
    assert len(saved[half["id"]]["result"]) == 1
    assert {row["completed_by"] for row in saved.values()} == {anna.whoami()["id"]}
    assert keeper_account(team.studio, team.id) == 0
    assert (around(team)["backends"], around(team)["versions"]) == (0, {})


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
    made = requests.post(
        f"{team.studio.url}/api/tasks/{broken}/annotations/",
        data=json.dumps({"result": [{**CHOICE, "id": "x", "meta": {"text": ["half a character \ud83d"]}}]}),
        headers={"Content-Type": "application/json", "Authorization": f"Token {anna.http.credentials.key}"},
        timeout=60,
    )
    assert made.status_code == 500
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
