"""Services as children: they answer, keep to themselves, and are gone when we are, however we go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
from redis import Redis

from backend import embedded
from backend.children import Child, child, stop, wait
from backend.embedded import LOOPBACK, Studio, free_port, start_redis, start_serve, start_studio
from backend.errors import JobError

#: Starts everything, says where, and stays.
PROGRAM = """
    import json, signal, sys
    from pathlib import Path
    from backend.embedded import start_services

    with start_services(Path(sys.argv[1])) as services:
        print(json.dumps(services.environment), flush=True)
        signal.pause()
"""
#: Ignores SIGTERM, and has a child that does.
STUBBORN = """
    import signal, subprocess, sys, time

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if len(sys.argv) == 1:
        other = subprocess.Popen([sys.executable, sys.argv[0], "child"], stdout=subprocess.PIPE)
        other.stdout.readline()
    print("ready", flush=True)
    time.sleep(600)
"""


def script(folder: Path, text: str) -> str:
    """A file with this program."""
    path = folder / "program.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


def gone(processes: list[psutil.Process], seconds: float = 30) -> bool:
    """Whether all of these have ended by then; a zombie that nobody has waited for yet has."""
    until = time.monotonic() + seconds
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if psutil.pid_exists(p.pid)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


@contextmanager
def family(process: subprocess.Popen[bytes]) -> Iterator[list[psutil.Process]]:
    """A process and all its descendants; whoever is left at the end is killed."""
    parent = psutil.Process(process.pid)
    found = [parent, *parent.children(recursive=True)]
    try:
        yield found
    finally:
        for left in found:
            if left.is_running():
                left.kill()


def prints(running: Child, text: str, seconds: float = 30) -> None:
    """Wait until a child has printed this."""
    wait(lambda: text in running.log.read_text(), running, seconds)


def test_redis_answers_and_is_gone_after_the_block(tmp_path: Path) -> None:
    with start_redis(tmp_path) as url, Redis.from_url(url) as redis:
        redis.set("a", "b")
        assert redis.get("a") == b"b"
        process = psutil.Process(redis.info()["process_id"])
        assert redis.config_get("bind")["bind"] == "127.0.0.1"
    assert gone([process], 1)


def test_label_studio_lets_in_who_has_the_login(studio: Studio) -> None:
    headers = {"Authorization": f"Token {studio.token}"}
    me = requests.get(f"{studio.url}/api/current-user/whoami", headers=headers, timeout=30)
    assert me.json()["email"] == studio.username
    with requests.Session() as browser:
        browser.get(f"{studio.url}/user/login/", timeout=30)
        form = {"email": studio.username, "password": studio.password}
        form["csrfmiddlewaretoken"] = browser.cookies["csrftoken"]
        browser.post(f"{studio.url}/user/login/", data=form, headers={"Referer": studio.url}, timeout=30)
        assert browser.get(f"{studio.url}/api/current-user/whoami", timeout=30).json()["id"] == me.json()["id"]
    assert requests.get(f"{studio.url}/api/projects/", timeout=30).status_code == 401


def test_two_label_studios_share_nothing(studio: Studio, tmp_path: Path) -> None:
    with start_studio(tmp_path) as other:
        assert other.url != studio.url
        headers = {"Authorization": f"Token {studio.token}"}
        assert requests.get(f"{other.url}/api/projects/", headers=headers, timeout=30).status_code == 401
    templates = [path for path in embedded.studio_folder().glob("template-*") if path.is_dir()]
    keys = {(path / ".env").read_text() for path in [*templates, tmp_path / "label-studio"]}
    assert len(keys) == len(templates) + 1


def test_label_studio_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTROW_STUDIO", str(tmp_path))
    with pytest.raises(JobError, match=r"no Label Studio in .*make \.venv-studio/installed"), start_studio(tmp_path):
        pass


def test_a_child_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with (
        pytest.raises(JobError, match=r"(?s)thing ended with status 3.*thing\.log:\nthe reason"),
        child("thing", command, tmp_path, {}) as running,
    ):
        wait(lambda: False, running, 30)


def test_a_service_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    settings = {"FIRSTROW_URL": f"http://{LOOPBACK}:{free_port()}", "FIRSTROW_STORE": str(tmp_path / "store")}
    wanted = r"(?s)serve ended with status 1.*serve\.log:.*LABEL_STUDIO_API_KEY: must be set"
    with pytest.raises(JobError, match=wanted), start_serve(tmp_path, settings):
        pass


def test_a_child_that_does_not_answer_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; print('still thinking', flush=True); time.sleep(600)"]
    with child("thing", command, tmp_path, {}) as running:
        prints(running, "thinking")
        with pytest.raises(JobError, match=r"(?s)did not answer within 0\.1 s.*still thinking"):
            wait(lambda: False, running, 0.1)
    assert running.process.returncode == -signal.SIGTERM


def test_a_child_gets_settings_from_us_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRSTROW_PORT", "LABEL_STUDIO_API_KEY", "REDIS_URL", "DJANGO_DB", "KEPT"):
        monkeypatch.setenv(name, "from outside")
    command = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    with child("thing", command, tmp_path, {"FIRSTROW_URL": "from us"}) as running:
        running.process.wait(30)
    found = json.loads(running.log.read_text())
    assert {name: value for name, value in found.items() if value.startswith("from ")} == {
        "FIRSTROW_URL": "from us",
        "KEPT": "from outside",
    }


def test_who_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    with child("stubborn", [sys.executable, script(tmp_path, STUBBORN)], tmp_path, {}) as running:
        prints(running, "ready")
        with family(running.process) as everybody:
            assert len(everybody) == 2
            stop(running.process, ((signal.SIGTERM, 0.2),))
            assert running.process.returncode == -signal.SIGKILL
            assert gone(everybody, 5)


def test_ctrl_c_is_not_lost_while_a_child_starts(tmp_path: Path) -> None:
    hooks: list[str] = []  # Python drops a KeyboardInterrupt that is raised in one of these
    os.register_at_fork(after_in_parent=lambda: hooks.append("run"))
    with child("thing", ["true"], tmp_path, {}) as running:
        assert running.process.wait(30) == 0
    assert hooks == []


def test_nothing_outlives_us_when_we_are_killed(tmp_path: Path) -> None:
    command = [sys.executable, script(tmp_path, PROGRAM), str(tmp_path / "run")]
    with child("parent", command, tmp_path, {}) as running:
        prints(running, "REDIS_URL", 300)
        with family(running.process) as everybody:
            names = " ".join(" ".join(process.cmdline()) for process in everybody)
            for service in ("redis-server", "label-studio", "backend.cli serve", "backend.cli worker"):
                assert service in names
            running.process.kill()
            assert gone(everybody)
    environment = json.loads(running.log.read_text().splitlines()[0])
    with pytest.raises(requests.ConnectionError):
        requests.get(environment["LABEL_STUDIO_URL"], timeout=5)


def test_an_interrupted_demo_leaves_nothing_and_starts_clean(tmp_path: Path) -> None:
    ignoring = "trap '' INT; exec \"$@\""  # as a shell does for what it starts in the background
    command = [
        "sh",
        "-c",
        ignoring,
        "sh",
        sys.executable,
        "-m",
        "backend.cli",
        "demo",
        "--folder",
        str(tmp_path / "demo"),
    ]
    for number in (signal.SIGINT, signal.SIGTERM):
        with child(f"demo-{number}", command, tmp_path, {"OMP_NUM_THREADS": "1"}) as running:
            prints(running, "settings.sh", 300)
            assert "Starting Redis, Label Studio" in running.log.read_text()  # said without a terminal, too
            settings = tmp_path / "demo" / "run" / "settings.sh"
            assert settings.stat().st_mode & 0o077 == 0
            shell = ["sh", "-c", f". {settings}; echo $LABEL_STUDIO_URL"]
            studio = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.strip()
            assert requests.get(f"{studio}/health", timeout=10).ok
            with family(running.process) as everybody:
                os.kill(running.process.pid, number)
                running.process.wait(60)
                assert len(everybody) > 4
                assert gone(everybody)
        assert "Traceback" not in running.log.read_text()
