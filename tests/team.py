"""A project of a team with hidden masks, and people who label it: for the tests on a real Label Studio."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests
from conftest import Backend
from numpy.typing import NDArray
from rich.console import Console

from backend.annotator import Annotator
from backend.attach import apply, plan
from backend.generations import KEEP_ORDERS, clean_generations
from backend.label_config import ProjectConfig, parse
from backend.labelstudio import LabelStudio
from backend.project import Project
from backend.status import show

SEG = """<View><Image name="photo" value="$picture"/><{tag} name="seg" toName="photo">
<Label value="soil"/><Label value="crop"/><Label value="weed"/></{tag}></View>"""
GROUPS = {"Soil": ["soil"], "Plant": ["crop", "weed"]}
Masks = Mapping[int, NDArray[np.uint8]]


class Team:
    """A project with pictures, its hidden masks, and an annotator."""

    def __init__(self, backend: Backend, pictures: Mapping[Path, NDArray[np.uint8]], tag: str = "BrushLabels") -> None:
        self.backend, self.studio = backend, backend.context.studio
        self.id = int(self.studio.create_project("field", SEG.format(tag=tag))["id"])
        ids = self.studio.upload(self.id, list(pictures))
        self.masks: Masks = dict(zip(ids, pictures.values(), strict=True))
        self.project = Project(backend.context.store, self.id)

    def attach(self) -> int:
        """Attach the project; returns the first round that has an order."""
        self.backend.context.board.register(self.id)
        apply(plan(self.studio, self.id, self.backend.context.settings, GROUPS))
        self.backend.context.board.request_round(self.id, "attached")
        return self.wait()

    def wait(self, after: int = 0) -> int:
        return self.backend.wait(self.id, after)

    def settle(self, seconds: float = 120) -> None:
        """Wait until nothing is left to do, and no round waits for its next try: at two looks in a row."""
        board, until, quiet = self.backend.context.board, time.monotonic() + seconds, 0
        while quiet < 2:
            waits = board.redis.exists(f"firstrow:{self.id}:retry") or board.wished(self.id) or board.busy(self.id)
            quiet = 0 if waits else quiet + 1
            assert time.monotonic() < until, (board.error(self.id), board.jobs(self.id), self.log())
            time.sleep(0.2)

    @contextmanager
    def without_rounds(self) -> Iterator[None]:
        """No round begins meanwhile: the order in force stays. What happens is remembered."""
        self.settle()
        assert self.backend.context.board.stop(self.id)
        try:
            yield
        finally:
            self.backend.context.board.register(self.id)

    def log(self) -> str:
        """The end of the worker's log."""
        return (self.backend.folder / "worker-gpu-default.log").read_text()[-4000:]

    @property
    def config(self) -> ProjectConfig:
        return parse(self.studio.project(self.id)["label_config"], GROUPS)

    def annotator(self, studio: LabelStudio | None = None) -> Annotator:
        return Annotator(studio or self.studio, self.id, self.config, self.masks)

    def ranking(self) -> list[int]:
        return [row["task"] for row in self.project.store.read_json(self.project.key("ranking.json"))]

    def coarse(self) -> int:
        """Give every coarse label that is asked for; returns the round after."""
        while self.backend.context.board.state(self.id)["phase"] == "coarse":
            before = self.backend.round(self.id)
            assert self.annotator().label_next().ask == "coarse"  # type: ignore[union-attr]
            self.wait(before)
        return self.backend.round(self.id)

    def segment_all(self, person: LabelStudio) -> list[int]:
        """Have one person segment all that the order in force serves them; the tasks as they came."""
        served: list[int] = []
        with self.without_rounds():
            while (task := person.next_task(self.id)) is not None and task["id"] not in served:
                served.append(int(task["id"]))
                person.create_annotation(task["id"], self.annotator().full_result(task["id"]))
        return served

    def segment(self, task: int) -> None:
        """Segment one task, whatever Label Studio would serve."""
        annotator = self.annotator()
        self.studio.create_annotation(task, annotator.full_result(task))


def wait_for(condition: Callable[[], object], seconds: float = 60, say: Callable[[], object] = str) -> None:
    """Wait until a condition holds; where it does not in this time, `say` tells what is there instead."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, say()
        time.sleep(0.02)


def clean_old_orders(team: Team, version: str) -> None:
    """Have every order be older than orders are kept, and three processes clean up at once, until a version is gone.

    The worker cleans up, too, with the ages that it read before, and cleaners give way to jobs that wait.
    """

    def gone() -> bool:
        history = team.project.store.read_json(team.project.key("generations.json"))
        for entry in history.values():
            entry["published"] = min(entry["published"], time.time() - KEEP_ORDERS - 60)
        team.project.store.write_json(team.project.key("generations.json"), history)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: clean_generations(team.backend.context, team.project), range(3)))
        return version not in team.studio.versions(team.id)

    wait_for(gone, 60, lambda: f"{version} is not gone")


def stages(team: Team) -> dict[int, str]:
    return {record.id: record.stage for record in team.project.index().values()}


def shown(found: Mapping[str, Any]) -> str:
    """What a terminal shows of a status, without breaks and frames."""
    console = Console(record=True, width=1000, file=io.StringIO())
    show(found, console)
    return " ".join(re.sub("[\u2500-\u257f]", " ", console.export_text()).split())


def saved(row: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What Label Studio's editor sends when somebody updates an annotation that it has open, or skips it (`more`)."""
    return {
        "lead_time": (row["lead_time"] or 0.0) + 4.0,
        "result": row["result"],
        "draft_id": 0,
        "parent_prediction": row["parent_prediction"],
        "parent_annotation": row["parent_annotation"],
        "started_at": row["created_at"],
        **more,
    }


def cannot_be_shown(studio: LabelStudio, task: int) -> None:
    """Submit an annotation that Label Studio stores and cannot write: it answers 500 whenever the task is shown."""
    mask = {"format": "rle", "rle": [0], "brushlabels": ["crop"]}
    region = {"id": "x", "from_name": "seg", "to_name": "photo", "type": "brushlabels", "value": mask}
    region["meta"] = {"text": ["half a character \ud83d"]}
    made = requests.post(
        f"{studio.url}/api/tasks/{task}/annotations/",
        data=json.dumps({"result": [region]}),  # our own door refuses it
        headers={"Content-Type": "application/json", "Authorization": studio.http.credentials.header()},
        timeout=60,
    )
    assert made.status_code == 500
