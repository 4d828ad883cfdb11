"""Attach, check and detach on a real Label Studio."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from backend import app, attach
from backend.coarse_answers import copy_of, original_of
from backend.connection import FLAGS, NOTE, SECRET_HEADER, keeper_address, note_of
from backend.context import connect
from backend.embedded import Studio, backend_settings, start_serve, start_studio
from backend.enqueue import Board
from backend.errors import AttachRefused, ConfigError, LabelStudioError
from backend.label_config import parse
from backend.labelstudio import LabelStudio
from backend.secret import project_of, project_secret
from backend.settings import SECRET_KEY, Settings
from backend.steps import unreachable
from backend.store import Store
from backend.sync import refresh_config
from backend.welcome import Welcome

CONFIG = """<View>
  <!-- the team's own words stay -->
  <Image name="picture" value="$photo"/>
  <BrushLabels name="seg" toName="picture">
    <Label value="Soil" background="#8B5A2B" hotkey="1"/><Label value="Crop"/><Label value="Weed"/>
  </BrushLabels>
</View>"""
MASTER = "a secret"


class Backend:
    """Answers Label Studio as an ML backend does; refuses secrets not derived from `master` where that is set."""

    def __init__(self, master: str | None) -> None:
        self.events: list[tuple[str, str | None, Any]] = []
        self.asked, self.hold, self.held = threading.Event(), threading.Event(), False
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({"status": "UP"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                backend.events.append((self.path, self.headers.get(SECRET_HEADER), body))
                if backend.held and self.path == "/setup":
                    backend.held = False
                    backend.asked.set()
                    backend.hold.wait(2)
                self.answer({"model_version": "seg-0", "results": [[] for _ in body.get("tasks", [])]})

            def answer(self, body: dict[str, Any]) -> None:
                given = base64.b64decode((self.headers.get("Authorization") or "Basic ")[6:]).decode()
                open_to_all = master is None or self.path in ("/webhook", "/health")
                ours = given.startswith("firstrow:") and project_of(master or "", given.removeprefix("firstrow:"))
                self.send_response(200 if open_to_all or ours else 401)
                data = json.dumps(body).encode()
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend(MASTER)
    yield made
    made.stop()


@pytest.fixture
def sam() -> Iterator[Backend]:
    made = Backend(None)
    yield made
    made.stop()


@pytest.fixture
def door(label_studio: LabelStudio) -> LabelStudio:
    return label_studio


@pytest.fixture
def settings(studio: Studio, backend: Backend, tmp_path: Path) -> Settings:
    return settings_for(studio, backend.url, tmp_path)


def settings_for(studio: Studio, url: str, folder: Path, **more: str) -> Settings:
    return Settings.read(
        {
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.token,
            "FIRSTROW_URL": url,
            "FIRSTROW_STORE": str(folder / "store"),
            "FIRSTROW_SECRET": MASTER,
            **more,
        }
    )


@pytest.fixture
def project(door: LabelStudio) -> Iterator[int]:
    made = door.create_project("team", CONFIG, sampling="Sequential sampling")["id"]
    door.import_tasks(made, [{"photo": f"/data/upload/{n}.jpg"} for n in range(3)])
    yield made
    door.delete_project(made)


def state(door: LabelStudio, project: int) -> dict[str, Any]:
    """All of a project that attach may touch."""
    row = door.project(project)
    flags = ("label_config", "model_version", *FLAGS)
    return {
        **{flag: row[flag] for flag in flags},
        "keeper": [user["email"] for user in door.users() if user["email"] == keeper_address(project)],
        "tabs": [view["data"] for view in door.views(project)],
        "backends": [(b["id"], b["title"], b["url"]) for b in door.ml_backends(project)],
        "webhooks": [(w["id"], w["url"], w["headers"]) for w in door.webhooks(project)],
        "versions": door.versions(project),
    }


def coarse_region(name: str = "cl3_0") -> dict[str, Any]:
    return {
        "id": name,
        "from_name": "coarse",
        "to_name": "picture",
        "type": "brushlabels",
        "original_width": 4,
        "original_height": 2,
        "image_rotation": 0,
        "meta": {"text": ["cluster 3"], "cluster": 3},
        "value": {"format": "rle", "rle": [0, 0, 0, 32], "brushlabels": ["Background"]},
    }


def test_plan_changes_nothing(door: LabelStudio, project: int, settings: Settings) -> None:
    before = state(door, project)
    sentences = attach.plan(door, project, settings).sentences
    assert "images in 'photo', fine labels by BrushLabels 'seg'" in sentences[0]
    assert "Background = Soil" in sentences[1]
    assert "Foreground = Crop, Weed" in sentences[1]
    for part in ("Connect the ML backend", "Put a control", "sampling", "secret", "tab 'First Row'"):
        assert any(part in sentence for sentence in sentences), part
    assert state(door, project) == before


def test_attach_then_detach_leaves_the_project_as_it_was(
    door: LabelStudio, project: int, settings: Settings, backend: Backend
) -> None:
    door.create_view(project, {"title": "Theirs", "ordering": ["tasks:id"]})
    before = state(door, project)
    attach.apply(attach.plan(door, project, settings))
    after = state(door, project)
    assert after["sampling"] == "Uncertainty sampling"
    assert after["show_collab_predictions"]
    assert after["backends"][0][1:] == ("first-row-0", backend.url)
    assert [(url, headers) for _, url, headers in after["webhooks"]] == [
        (f"{backend.url}/webhook", {SECRET_HEADER: project_secret(MASTER, project)})
    ]
    assert [tab["title"] for tab in after["tabs"]] == ["First Row", "Theirs"]
    assert after["tabs"][0]["ordering"] == ["tasks:predictions_score"]
    assert parse(after["label_config"]).coarse is not None
    assert "the team's own words stay" in after["label_config"]
    said = list(attach.detach(door, project, settings))
    assert any("Disconnect the ML backend" in sentence for sentence in said)
    assert state(door, project) == before
    assert list(attach.detach(door, project, settings)) == [f"Project {project} has no ML backend of ours."]


def test_attach_twice_changes_nothing(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    before = state(door, project)
    again = attach.plan(door, project, settings)
    assert again.steps == ()
    assert again.sentences[-1] == "Everything is in place; nothing to change."
    assert attach.check(door, project, settings) == []
    attach.apply(again)
    assert state(door, project) == before


def test_events_carry_the_secret(door: LabelStudio, project: int, settings: Settings, backend: Backend) -> None:
    attach.apply(attach.plan(door, project, settings))
    task = next(door.tasks(project))["id"]
    door.create_annotation(task, [])
    event = next(e for e in backend.events if e[0] == "/webhook" and e[2]["action"] == "ANNOTATION_CREATED")
    assert event[1] == project_secret(MASTER, project)


def test_note_survives_new_titles(door: LabelStudio, project: int, settings: Settings) -> None:
    groups = {"Ground": ["Soil"], "Vegetation": ["Crop", "Weed"]}
    attach.apply(attach.plan(door, project, settings, groups))
    ours = attach.our_backend(door, project, settings)
    assert ours is not None
    door.patch_ml(ours["id"], **attach.credentials(settings, project), title="first-row-8")
    note = attach.recorded(door, project, settings)
    assert note["groups"] == groups
    assert note["before"]["label_config"] == CONFIG
    assert attach.check(door, project, settings) == []  # the groups come from the note
    assert door.project(project)["model_version"] == "first-row-8"


def test_a_note_that_label_studio_loses_is_written_again(
    door: LabelStudio, project: int, settings: Settings, backend: Backend
) -> None:
    attach.apply(attach.plan(door, project, settings))
    whole, ours = attach.recorded(door, project, settings), attach.our_backend(door, project, settings)
    assert ours is not None
    credentials = attach.credentials(settings, project)
    door.patch_ml(ours["id"], **credentials, extra_params={NOTE: {**whole, "keeper": "7"}})
    door.delete_user(int(whole["keeper"]))
    plan, backend.held = attach.plan(door, project, settings), True
    thread = threading.Thread(target=door.ml_backends, args=(project,))
    thread.start()
    assert backend.asked.wait(5)  # while it waits for us Label Studio has the old row in hand, which it then saves
    for step in plan.steps:
        step.run()
    backend.hold.set()
    thread.join()
    assert "keeper" not in attach.recorded(door, project, settings), "lost"
    attach.apply(replace(plan, steps=()))
    assert attach.check(door, project, settings) == []
    [keeper] = [user["id"] for user in door.users() if user["email"] == keeper_address(project)]
    assert attach.recorded(door, project, settings) == {**whole, "keeper": keeper}
    list(attach.detach(door, project, settings))
    assert door.project(project)["label_config"] == CONFIG


def test_junk_in_our_note_stops_nothing(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    ours, note = attach.our_backend(door, project, settings), attach.recorded(door, project, settings)
    assert ours is not None
    for junk in (7, [], {NOTE: "x"}, {NOTE: {"keeper": "x", "before": [1], "groups": {"a": 1}}}):
        assert note_of({"extra_params": junk}) == {}
        door.patch_ml(ours["id"], **attach.credentials(settings, project), extra_params=junk)
        assert attach.check(door, project, settings)
    list(attach.detach(door, project, settings, note=note))  # what the store remembers
    assert door.project(project)["label_config"] == CONFIG
    assert not [user for user in door.users() if user["email"] == keeper_address(project)]


def test_other_groups_replace_the_control(door: LabelStudio, project: int, settings: Settings) -> None:
    before = state(door, project)
    attach.apply(attach.plan(door, project, settings))
    groups = {"Ground": ["Soil"], "Useful": ["Crop"], "Useless": ["Weed"]}
    todo = attach.plan(door, project, settings, groups)
    assert "Coarse labels: Ground = Soil; Useful = Crop; Useless = Weed." in todo.sentences
    attach.apply(todo)
    now = parse(door.project(project)["label_config"])
    assert now.coarse is not None
    assert now.coarse.labels == ("Ground", "Useful", "Useless", "Mixed")
    assert attach.recorded(door, project, settings)["groups"] == groups
    assert attach.check(door, project, settings) == []
    with pytest.raises(ConfigError, match="'Wheat' is not a label"):
        attach.plan(door, project, settings, {"Ground": ["Soil"], "Plant": ["Wheat", "Weed", "Crop"]})
    list(attach.detach(door, project, settings))
    assert state(door, project) == before


def test_polygons_without_a_background(door: LabelStudio, settings: Settings) -> None:
    xml = (
        '<View><Image name="i" value="$image"/><PolygonLabels name="p" toName="i">'
        '<Label value="Crop"/><Label value="Weed"/></PolygonLabels></View>'
    )
    project = door.create_project("polygons", xml)["id"]
    try:
        todo = attach.plan(door, project, settings)
        assert "No label means background: pixels without a region count as 'background'." in todo.sentences
        attach.apply(todo)
        assert attach.plan(door, project, settings).steps == ()
        list(attach.detach(door, project, settings))
        assert door.project(project)["label_config"] == xml
    finally:
        door.delete_project(project)


def test_half_attached_is_said_and_repaired(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    whole = state(door, project)
    [hook] = door.webhooks(project)
    door.patch_webhook(hook["id"], url=hook["url"], headers={})
    door.delete_view(door.views(project)[0]["id"])
    door.patch_project(project, sampling="Uniform sampling")
    said = attach.check(door, project, settings)
    assert len(said) == 3
    assert any("sampling = Uncertainty sampling (now Uniform sampling)" in sentence for sentence in said)
    attach.apply(attach.plan(door, project, settings))
    assert state(door, project) == whole


def test_connected_by_label_studios_own_page(door: LabelStudio, project: int, settings: Settings) -> None:
    door.connect_ml(**{**attach.credentials(settings, project), "title": "my model"})
    said = attach.check(door, project, settings)
    assert any("its title is not that of a ranking" in sentence for sentence in said)
    assert any("secret on the webhook" in sentence for sentence in said)
    attach.apply(attach.plan(door, project, settings))
    assert attach.check(door, project, settings) == []
    assert [b["title"] for b in door.ml_backends(project)] == ["first-row-0"]
    list(attach.detach(door, project, settings))
    assert door.project(project)["label_config"] == CONFIG
    assert door.project(project)["model_version"] == ""


def test_connected_by_hand_and_never_attached_can_be_detached(
    door: LabelStudio, project: int, settings: Settings
) -> None:
    before = state(door, project)
    door.connect_ml(**{**attach.credentials(settings, project), "title": "my model"})
    said = list(attach.detach(door, project, settings))
    assert (
        "It was connected without `attach`: sampling and label config stay as they are, but for a control of ours."
        in said
    )
    assert state(door, project) == before


def test_another_backend_came_first(door: LabelStudio, project: int, settings: Settings, sam: Backend) -> None:
    door.connect_ml(project=project, url=sam.url, title="SAM", is_interactive=True)
    before = state(door, project)
    todo = attach.plan(door, project, settings)
    assert any("'SAM': prelabels for the head of the queue will travel" in sentence for sentence in todo.sentences)
    attach.apply(todo)
    assert [title for _, title, _ in state(door, project)["backends"]] == ["SAM", "first-row-0"]
    list(attach.detach(door, project, settings))
    assert state(door, project) == before  # SAM's version is in force again


def test_versions_of_others_stay(door: LabelStudio, project: int, settings: Settings) -> None:
    tasks = [task["id"] for task in door.tasks(project)]
    door.import_predictions(
        project,
        [{"task": tasks[0], "result": [], "score": 0.5, "model_version": v} for v in ("seg-1", "theirs")],
    )
    door.patch_project(project, model_version="theirs")
    before = state(door, project)
    attach.apply(attach.plan(door, project, settings))
    rows = [{"task": t, "result": [], "score": 0.5, "model_version": "first-row-4"} for t in tasks]
    door.import_predictions(project, rows)
    ours = attach.our_backend(door, project, settings)
    assert ours is not None
    door.patch_ml(ours["id"], **attach.credentials(settings, project), title="first-row-4")
    assert attach.check(door, project, settings) == ["Set model_version = first-row-4 (now theirs)."]
    attach.apply(attach.plan(door, project, settings))
    door.import_predictions(project, [{**row, "model_version": "first-row-5"} for row in rows])
    door.patch_project(project, model_version="first-row-5")  # a new order, before our ML backend has its name
    assert attach.check(door, project, settings) == []
    door.patch_project(project, model_version="first-row-4")
    door.delete_version(project, "first-row-5")
    said = list(attach.detach(door, project, settings))
    assert "Delete 3 predictions of 'first-row-4'." in said
    assert state(door, project) == before


def test_a_changed_config_keeps_its_changes(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    theirs = door.project(project)["label_config"].replace('value="Weed"', 'value="Thistle"')
    door.patch_project(project, label_config=theirs)
    list(attach.detach(door, project, settings))
    left = door.project(project)["label_config"]
    assert parse(left).coarse is None
    assert parse(left).fine.labels == ("Soil", "Crop", "Thistle")


def test_a_coarse_control_of_the_team_stays(door: LabelStudio, settings: Settings) -> None:
    own = CONFIG.replace(
        "</View>",
        '<BrushLabels name="coarse" toName="picture"><Label value="Background"/><Label value="Foreground"/>'
        '<Label value="Mixed"/></BrushLabels></View>',
    )
    project = door.create_project("own", own)["id"]
    try:
        todo = attach.plan(door, project, settings)
        assert not any("Put a control" in sentence for sentence in todo.sentences)
        attach.apply(todo)
        list(attach.detach(door, project, settings))
        assert door.project(project)["label_config"] == own
    finally:
        door.delete_project(project)


STAYS = "The control for coarse labels stays in the label config: annotations that are kept need it."


def test_coarse_annotations_keep_their_control(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    task = next(door.tasks(project))["id"]
    door.create_annotation(task, [coarse_region()])
    attached = door.project(project)["label_config"]
    said = list(attach.detach(door, project, settings))
    assert "Leave 1 coarse labels where they are, as annotations." in said
    assert STAYS in said
    assert door.project(project)["label_config"] == attached
    assert door.project(project)["sampling"] == "Sequential sampling"


def test_coarse_copies_become_annotations_again(door: LabelStudio, project: int, settings: Settings) -> None:
    attach.apply(attach.plan(door, project, settings))
    waiting, done, again = (task["id"] for task in door.tasks(project))
    author = door.whoami()["id"]
    for task in (waiting, done, again):
        copy = [{**coarse_region(), "meta": {**coarse_region()["meta"], "completed_by": author}}]
        door.create_prediction(task, copy, "coarse-labels")  # as releases did that deleted the annotation
    door.create_annotation(done, [{**coarse_region("f1"), "from_name": "seg", "value": FINE}])
    door.create_annotation(again, [coarse_region()])  # a detach that died before it deleted the copy
    said = list(attach.detach(door, project, settings))
    made = said.index("2 coarse labels are left as copies alone: they are made anew, with new ids and times.")
    assert said[made + 1].startswith("Give the coarse labels of 3 tasks back")
    [restored] = door.task(waiting, project)["annotations"]
    assert restored["completed_by"] == author
    assert {**coarse_region(), "origin": restored["result"][0].get("origin")} == {
        "origin": None,
        **restored["result"][0],
    }
    assert door.versions(project) == {}
    assert len(door.task(again, project)["annotations"]) == 1
    assert sorted(len(a["result"]) for a in door.task(done, project)["annotations"]) == [1, 1]


FINE = {"format": "rle", "rle": [0, 0, 0, 32], "brushlabels": ["Crop"]}


def test_a_copy_holds_the_whole_annotation() -> None:
    regions = [coarse_region(), {"id": "x", "from_name": "coarse"}]
    annotation = {"id": 7, "completed_by": 3, "lead_time": 4.5, "created_at": "2026-01-01T00:00:00Z", "result": regions}
    assert original_of({"result": copy_of(annotation)}) == annotation
    assert original_of({"result": regions}) == {"completed_by": None, "result": regions}


def test_a_moved_backend(
    door: LabelStudio, project: int, settings: Settings, sam: Backend, studio: Studio, tmp_path: Path
) -> None:
    before = state(door, project)
    attach.apply(attach.plan(door, project, settings))
    moved = settings_for(studio, sam.url, tmp_path)
    assert any("its address is" in sentence for sentence in attach.check(door, project, moved))
    attach.apply(attach.plan(door, project, moved))
    now = state(door, project)
    assert [url for _, _, url in now["backends"]] == [sam.url]
    assert [url for _, url, _ in now["webhooks"]] == [f"{sam.url}/webhook"]
    list(attach.detach(door, project, moved))
    assert state(door, project) == before


def test_image_hosts_are_the_operators_to_allow(
    door: LabelStudio, studio: Studio, sam: Backend, tmp_path: Path
) -> None:
    settings = settings_for(studio, sam.url, tmp_path)
    project = door.create_project("hosts", CONFIG)["id"]
    try:
        urls = (
            "http://192.168.3.4:8000/a.png",
            "https://me:secret@1.1.1.1/b.png?sig=secret",
            f"{door.url}/data/upload/1/c.png",
            "s3://x/y",
            "http://[::1/",
        )
        door.import_tasks(project, [{"photo": url} for url in urls])
        todo = attach.plan(door, project, settings)
        (said,) = [s for s in todo.sentences if "will not be fetched" in s]
        assert said.startswith("Images on 1.1.1.1, 192.168.3.4:8000 will not be fetched: nobody allowed it.")
        assert said.endswith("FIRSTROW_ALLOWED_HOSTS=1.1.1.1,192.168.3.4:8000")
        assert "secret" not in said
        attach.apply(todo)
        assert "image_hosts" not in attach.recorded(door, project, settings)
        allowing = settings.model_copy(update={"allowed_hosts": ("a.example.com", "192.168.3.4")})
        sentences = attach.plan(door, project, allowing).sentences
        assert "Images will be fetched from 192.168.3.4:8000." in sentences
        assert any(s.endswith("FIRSTROW_ALLOWED_HOSTS=a.example.com,192.168.3.4,1.1.1.1") for s in sentences)

        # What an earlier release wrote down, or any member of the project writes there now, counts for nothing.
        ours = attach.our_backend(door, project, settings)
        assert ours is not None
        note = {**ours["extra_params"]["firstrow"], "image_hosts": ["1.1.1.1", "192.168.3.4:8000"]}
        door.patch_ml(ours["id"], **attach.credentials(settings, project), extra_params={"firstrow": note})
        assert attach.plan(door, project, settings).steps == ()
        ctx = connect(settings)
        refresh_config(ctx, ctx.project(project))
        assert ctx.images(project).hosts == frozenset()
    finally:
        door.delete_project(project)


def test_our_own_backend(door: LabelStudio, project: int, make_backend: Callable[..., Any]) -> None:
    running = make_backend(worker=False).context
    settings = running.settings
    before = state(door, project)
    attach.apply(attach.plan(door, project, settings))
    assert attach.check(door, project, settings) == []
    task = next(door.tasks(project))["id"]
    made = door.create_annotation(task, [])
    assert task in running.board.take(project)[0]  # the webhook came with our secret and was let in
    door.delete_annotation(made["id"])
    list(attach.detach(door, project, settings))
    assert state(door, project) == before
    assert app.SECRET_HEADER == SECRET_HEADER


def test_the_former_secret_is_named_and_renewed(
    door: LabelStudio, project: int, make_backend: Callable[..., Any]
) -> None:
    """Before each project had a secret of its own, Label Studio held the master secret."""
    running = make_backend(worker=False).context
    settings = running.settings
    attach.apply(attach.plan(door, project, settings))
    whole = state(door, project)
    # As it was left: Label Studio checks on PATCH, so the former connection is made while nobody refuses it.
    [ours], [hook] = door.ml_backends(project), door.webhooks(project)
    before = {SECRET_HEADER: settings.secret_value(), "Theirs": "stays"}
    door.patch_webhook(hook["id"], url=hook["url"], headers=before)
    [sentence] = attach.check(door, project, settings)
    assert sentence == f"Set our secret on the webhook to {settings.url}/webhook."
    task = next(door.tasks(project))["id"]
    door.create_annotation(task, [])
    assert running.board.take(project)[0] == set()  # the master secret opens nothing
    attach.apply(attach.plan(door, project, settings))
    [hook] = door.webhooks(project)
    assert hook["headers"] == {**before, SECRET_HEADER: settings.project_secret(project)}
    assert {**whole, "webhooks": []} == {**state(door, project), "webhooks": []}
    assert ours["id"] == door.ml_backends(project)[0]["id"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_new_master_secret_is_handed_out_by_attach(
    door: LabelStudio, project: int, studio: Studio, redis_url: str, tmp_path: Path, stored: bool
) -> None:
    def environment(secret: str) -> dict[str, str]:
        return {**given, **({} if stored else {"FIRSTROW_SECRET": secret})}

    given = backend_settings(tmp_path, f"{redis_url}/97", studio)
    with start_serve(tmp_path, environment("one")):
        settings = Settings.read(environment("one"))
        attach.apply(attach.plan(door, project, settings))
        whole, former = state(door, project), settings.project_secret(project)
    if stored:
        Store(settings.store).delete(SECRET_KEY)
    with start_serve(tmp_path, environment("two")):
        settings = Settings.read(environment("two"))
        assert settings.project_secret(project) != former
        assert attach.check(door, project, settings) == [
            f"Renew the connection to the ML backend at {settings.url}: its secret is a former or a wrong one.",
            f"Set our secret on the webhook to {settings.url}/webhook.",
        ]
        attach.apply(attach.plan(door, project, settings))
        assert attach.check(door, project, settings) == []
        board, task = Board(given["REDIS_URL"]), next(door.tasks(project))["id"]
        board.taken(project)
        door.create_annotation(task, [])
        assert board.take(project)[0] == {task}
        [hook] = door.webhooks(project)
        assert hook["headers"] == {SECRET_HEADER: settings.project_secret(project)}
        assert door.ml_backends(project)[0]["state"] == "CO"
        assert (
            requests.post(
                f"{settings.url}/setup", json={"project": project}, auth=("firstrow", former), timeout=9
            ).status_code
            == 401
        )
    assert {**whole, "webhooks": []} == {**state(door, project), "webhooks": []}


@pytest.mark.parametrize("with_secret", [False, True])
def test_connected_by_hand_is_remembered_once_label_studio_confirms(
    door: LabelStudio, project: int, make_backend: Callable[..., Any], with_secret: bool
) -> None:
    """As people do on Label Studio's settings page: without authentication, or with what `firstrow secret` prints."""
    running = make_backend(worker=False).context
    fields = attach.credentials(running.settings, project) if with_secret else {"url": running.settings.url}
    door.connect_ml(**{**fields, "project": project, "title": "by hand"})
    assert door.ml_backends(project)[0]["state"] == "CO"
    nowhere = 10**6 + project
    assert requests.post(f"{running.settings.url}/setup", json={"project": nowhere}, timeout=9).ok
    until = time.monotonic() + 30
    while project not in running.board.projects():
        assert time.monotonic() < until
        time.sleep(0.05)
    assert running.board.projects() == [project]
    attach.apply(attach.plan(door, project, running.settings))
    assert attach.check(door, project, running.settings) == []
    assert requests.post(f"{running.settings.url}/setup", json={"project": project}, timeout=9).status_code == 401
    running.board.stop(project, 0)  # a detach that did not end
    running.board.redis.srem("firstrow:projects", project)
    Welcome(running, ask_after=(0,)).look_up(project)
    time.sleep(1)
    assert running.board.projects() == [], "only attach goes on from here"


# What cannot work


def test_nobody_answers_at_our_address(door: LabelStudio, project: int, studio: Studio, tmp_path: Path) -> None:
    before = state(door, project)
    nobody = Backend(None)
    nobody.stop()
    todo = attach.plan(door, project, settings_for(studio, nobody.url, tmp_path))
    with pytest.raises(
        AttachRefused, match=f"cannot reach us at {nobody.url}: start `firstrow serve`, or set FIRSTROW_URL"
    ):
        attach.apply(todo)
    assert state(door, project) == before


def test_another_secret_answers(door: LabelStudio, project: int, studio: Studio, tmp_path: Path) -> None:
    before = state(door, project)
    other = Backend("another")
    try:
        with pytest.raises(AttachRefused, match="has another secret"):
            attach.apply(attach.plan(door, project, settings_for(studio, other.url, tmp_path)))
    finally:
        other.stop()
    assert state(door, project) == before


def test_several_annotations_per_task(door: LabelStudio, project: int, settings: Settings) -> None:
    door.patch_project(project, maximum_annotations=2)
    with pytest.raises(AttachRefused, match="wants 2 annotations per task"):
        attach.plan(door, project, settings)
    assert "wants 2 annotations per task" in attach.check(door, project, settings)[0]


@pytest.mark.parametrize(
    "config",
    [
        '<View><Text name="t" value="$text"/><Choices name="c" toName="t"><Choice value="x"/></Choices></View>',
        '<View><Image name="i" value="$image"/><Choices name="c" toName="i"><Choice value="x"/></Choices></View>',
    ],
)
def test_no_image_or_no_masks(door: LabelStudio, settings: Settings, config: str) -> None:
    project = door.create_project("other", config)["id"]
    try:
        with pytest.raises(ConfigError):
            attach.plan(door, project, settings)
        assert len(attach.check(door, project, settings)) == 1
    finally:
        door.delete_project(project)


@pytest.mark.parametrize("version", ["1.19.0", "0.9", "1.9.2.post1"])
def test_old_label_studio(version: str) -> None:
    with pytest.raises(AttachRefused, match=f"Label Studio {version} is too old: upgrade it to 1.20"):
        attach.check_version(version)


@pytest.mark.parametrize("version", ["1.20.0", "1.23.2", "2.0", "1.24.0.dev1", ""])
def test_new_label_studio(version: str) -> None:
    attach.check_version(version)


def test_wrong_key(project: int, settings: Settings, studio: Studio) -> None:
    with pytest.raises(LabelStudioError, match="set LABEL_STUDIO_API_KEY"):
        attach.plan(LabelStudio(studio.url, "wrong"), project, settings)


def test_label_studio_as_it_comes_does_not_talk_to_us(backend: Backend, tmp_path: Path) -> None:
    with start_studio(tmp_path, allow_private=False) as closed:
        door = LabelStudio(closed.url, closed.token)
        project = door.create_project("closed", CONFIG)["id"]
        before = state(door, project)
        with pytest.raises(AttachRefused, match="ML_BLOCK_LOCAL_IP=false and SSRF_PROTECTION_ENABLED=false"):
            attach.apply(attach.plan(door, project, settings_for(closed, backend.url, tmp_path)))
        assert state(door, project) == before
    assert backend.events == []


def test_other_refusals_are_passed_on() -> None:
    assert unreachable("http://10.0.0.5:9090", LabelStudioError("You do not have permission", 403)) is None
    assert unreachable("http://10.0.0.5:9090", LabelStudioError("Title is too short", 400)) is None
