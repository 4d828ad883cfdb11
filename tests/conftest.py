"""Real parts: one Redis and one Label Studio for the whole run, a fresh project and fresh workers where a test asks."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
from numpy.typing import NDArray

from backend.context import Context, connect
from backend.embedded import Studio, backend_settings, start_redis, start_serve, start_studio, start_worker
from backend.labelstudio import LabelStudio
from backend.settings import Settings
from model.field import render

#: Small and quick: what is tested is the loop, not the network.
QUICK = {"FIRSTROW_IMAGE_SIZE": "128", "FIRSTROW_TRAIN_STEPS": "4", "FIRSTROW_NETWORK": "lraspp_efficientnet_lite0"}

#: Files that take longest, first: a file goes to a process as a whole. The soak mostly waits, and the first small file
#: waits behind it.
FIRST = (
    "soak",
    "people",
    "harm",
    "harm_deep",
    "regions",
    "loop",
    "detach",
    "benchmark",
    "attach",
    "machines",
    "training",
    "embedded",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the longest files begin first."""
    place = {f"test_{name}": number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session")
def services_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs and data of the services of this run."""
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="session")
def redis_url(services_folder: Path) -> Iterator[str]:
    """A real Redis server."""
    with start_redis(services_folder) as url:
        yield url


@pytest.fixture
def database_url(redis_url: str) -> str:
    """An empty database of the real Redis server, for one test."""
    return f"{redis_url}/{next(DATABASES)}"


@pytest.fixture(scope="session")
def studio(services_folder: Path) -> Iterator[Studio]:
    """A real Label Studio."""
    with start_studio(services_folder) as running:
        yield running


@pytest.fixture
def label_studio(studio: Studio) -> LabelStudio:
    """Our door to it, with the administrator's key."""
    return LabelStudio(studio.url, studio.token)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The pixel-labelled sets that tests use when they are there."""
    given = Path(os.environ.get("FIRSTROW_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not given.is_dir():
        pytest.skip(f"no pixel-labelled sets in {given}: set FIRSTROW_DATA to the folder that holds them")
    return given


@dataclass
class Backend:
    """A running backend of our own: a web process and a worker, with a store of their own."""

    context: Context
    environment: dict[str, str]
    folder: Path
    stack: ExitStack

    def wait(self, project: int, after: int = 0, seconds: float = 240) -> int:
        """Wait for an order newer than round `after`, and until nothing is left to do; returns its round."""
        board, until = self.context.board, time.monotonic() + seconds
        while board.busy(project) or board.wished(project) or self.round(project) <= after:
            error = board.error(project)
            if (error and not board.under_way(project)) or time.monotonic() > until:
                logs = "\n".join(log.read_text()[-3000:] for log in self.folder.glob("*.log"))
                raise AssertionError(f"no new order after round {after}: {error}, jobs {board.jobs(project)}\n{logs}")
            time.sleep(0.05)
        return self.round(project)

    def round(self, project: int) -> int:
        """Number of the order in force."""
        return int(self.context.board.state(project).get("round", 0))


class Backends:
    """Starts backends, each with a Redis database, a store and a web process of its own."""

    def __init__(self, studio: Studio, redis_url: str, folder: Path) -> None:
        self.studio, self.redis_url, self.folder = studio, redis_url, folder
        self.stacks: list[ExitStack] = []
        self.shared: dict[tuple[tuple[str, str], ...], Backend] = {}

    def start(self, worker: bool = True, **settings: str) -> Backend:
        """A backend with these settings."""
        folder, redis_url = self.folder / f"backend-{next(FOLDERS)}", f"{self.redis_url}/{next(DATABASES)}"
        folder.mkdir()
        environment = {**QUICK, **backend_settings(folder, redis_url, self.studio), **settings}
        self.stacks.append(inner := ExitStack())
        inner.enter_context(start_serve(folder, environment))
        if worker:
            inner.enter_context(start_worker(folder, environment))
        return Backend(connect(Settings.read(environment)), environment, folder, inner)

    def share(self, **settings: str) -> Backend:
        """The backend with these settings that all tests share: loading torch takes longer than most of them."""
        key = tuple(sorted(settings.items()))
        if key not in self.shared:
            self.shared[key] = self.start(True, **settings)
        return self.shared[key]

    def rest(self) -> None:
        """Have no project of an ended test looked after: each look at its counters is work for Label Studio."""
        for backend in self.shared.values():
            for project in backend.context.board.projects():
                backend.context.board.forget(project)

    def __enter__(self) -> Backends:
        return self

    def __exit__(self, *error: object) -> None:
        """Stop all, side by side: each takes seconds."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ExitStack.close, self.stacks))


DATABASES = itertools.count(1)
FOLDERS = itertools.count(1)


@pytest.fixture(scope="session")
def backends(studio: Studio, redis_url: str, services_folder: Path) -> Iterator[Backends]:
    """Backends that live as long as the run."""
    with Backends(studio, redis_url, services_folder) as backends:
        yield backends


@pytest.fixture
def share_backend(backends: Backends) -> Iterator[Callable[..., Backend]]:
    """A shared backend; keyword arguments are settings."""
    yield backends.share
    backends.rest()


@pytest.fixture
def make_backend(studio: Studio, redis_url: str, tmp_path: Path) -> Iterator[Callable[..., Backend]]:
    """Start a backend of a test's own; keyword arguments are settings."""
    with Backends(studio, redis_url, tmp_path) as backends:
        yield backends.start


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, NDArray[np.uint8]]:
    """Eight small pictures of a rendered field, and their masks (0 soil, 1 crop, 2 weed)."""
    folder, found = tmp_path_factory.mktemp("pictures"), {}
    for number in range(8):
        image, mask = render(number, "target", (160, 120))
        path = folder / f"field-{number}.jpg"
        cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
        found[path] = mask
    return found


@pytest.fixture(scope="session")
def make_user(studio: Studio) -> Callable[[str], LabelStudio]:
    """Sign somebody up at Label Studio, as people do in a browser; gives the door with their own key."""

    def make(name: str) -> LabelStudio:
        with requests.Session() as browser:
            browser.get(f"{studio.url}/user/signup/", timeout=30)
            form = {
                "email": f"{name}-{secrets.token_hex(4)}@example.com",
                "password": secrets.token_urlsafe(12),
                "csrfmiddlewaretoken": browser.cookies["csrftoken"],
            }
            browser.post(f"{studio.url}/user/signup/", data=form, headers={"Referer": studio.url}, timeout=30)
            token = browser.get(f"{studio.url}/api/current-user/token", timeout=30).json()["token"]
        return LabelStudio(studio.url, token)

    return make
