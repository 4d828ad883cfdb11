"""The Docker files, read as Docker reads them; their commands run here as processes, for want of an engine."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from redis import Redis

from backend.children import Child, child, inherited, wait
from backend.connection import webhook_url
from backend.embedded import LOOPBACK, free_port
from backend.errors import LabelStudioError, SettingsError
from backend.labelstudio import LabelStudio
from backend.settings import Settings

ROOT = Path(__file__).parents[1]
SETTINGS = {str(field.alias) for field in Settings.model_fields.values()}
#: `${NAME}`, `${NAME:-default}`, `${NAME:?what to do}`.
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and their arguments, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.M)).splitlines()
    return [(name.upper(), rest.strip()) for name, _, rest in (line.strip().partition(" ") for line in lines) if name]


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Our Dockerfile."""
    return instructions((ROOT / "docker" / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """Our compose file, its variables filled in."""
    loaded = filled(yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text()))
    assert isinstance(loaded, dict)
    return loaded


def filled(value: Any) -> Any:
    """A value with its variables filled in, after parsing as compose does."""
    given = {"LABEL_STUDIO_API_KEY": "0" * 40, "LABEL_STUDIO_PASSWORD": "pass"}
    if isinstance(value, dict):
        return {name: filled(member) for name, member in value.items()}
    if isinstance(value, list):
        return [filled(member) for member in value]
    if isinstance(value, str):
        return VARIABLE.sub(lambda found: found[3] if found[2] == "-" else given[found[1]], value)
    return value


def arguments(dockerfile: list[tuple[str, str]], name: str) -> list[str]:
    """The arguments of every instruction of that name."""
    return [rest for instruction, rest in dockerfile if instruction == name]


def image_environment(dockerfile: list[tuple[str, str]]) -> dict[str, str]:
    """What ENV sets."""
    pairs = [pair.partition("=") for rest in arguments(dockerfile, "ENV") for pair in shlex.split(rest)]
    return {name: value for name, _, value in pairs}


def test_every_instruction_is_known(dockerfile: list[tuple[str, str]]) -> None:
    known = {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in dockerfile} == known
    assert dockerfile[0][0] == "FROM"


def test_the_image_does_not_run_as_root(dockerfile: list[tuple[str, str]]) -> None:
    names = [name for name, _ in dockerfile]
    user = arguments(dockerfile, "USER")
    assert user == ["firstrow"]
    assert names.index("USER") > max(n for n, name in enumerate(names) if name in ("RUN", "COPY"))
    owned = arguments(dockerfile, "RUN")[-1]
    assert re.search(r"useradd .*\bfirstrow\b", owned)
    assert "--owner=firstrow /data" in owned
    assert arguments(dockerfile, "VOLUME") == ["/data"]


def test_what_is_copied_is_there_and_enough(dockerfile: list[tuple[str, str]]) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    sources = [source for rest in arguments(dockerfile, "COPY") for source in rest.split()[:-1]]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch(source, pattern) for pattern in ignored), source
    assert {"backend", "model", "pyproject.toml", "README.md", "LICENSE"} <= set(sources)


def test_lists_are_installed_with_their_hashes(dockerfile: list[tuple[str, str]]) -> None:
    installs = [command for rest in arguments(dockerfile, "RUN") for command in rest.split("&&") if "pip" in command]
    dry = ["make", "--dry-run", "--always-make", ".venv/installed"]
    made = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for options in ("--require-hashes -r requirements/firstrow.txt", "--no-build-isolation"):
        assert sum(f"--no-deps {options}" in install for install in installs) == 1
        assert f"--no-deps {options}" in made
    assert len(installs) == 2


def test_environment_names_are_settings(dockerfile: list[tuple[str, str]], compose: dict[str, Any]) -> None:
    ours = {name for name in image_environment(dockerfile) if name.startswith("FIRSTROW_")}
    for service in ("serve", "worker"):
        ours |= compose["services"][service]["environment"].keys()
    assert ours <= SETTINGS
    assert {"LABEL_STUDIO_URL", "LABEL_STUDIO_API_KEY", "REDIS_URL", "FIRSTROW_URL", "FIRSTROW_STORE"} <= ours


def test_one_image_serves_and_works(dockerfile: list[tuple[str, str]], compose: dict[str, Any]) -> None:
    serve, worker = compose["services"]["serve"], compose["services"]["worker"]
    for key in ("image", "build", "environment", "env_file", "volumes", "depends_on"):
        assert serve[key] == worker[key]
    here = ROOT / "docker"
    assert (here / serve["build"]["context"]).resolve() == ROOT
    assert (here / serve["build"]["context"] / serve["build"]["dockerfile"]).resolve() == here / "Dockerfile"
    assert serve["command"] == json.loads(arguments(dockerfile, "CMD")[0])
    assert "healthcheck" not in serve  # the image's own
    assert worker["healthcheck"] == {"disable": True}


def test_only_the_worker_takes_a_gpu(compose: dict[str, Any]) -> None:
    devices = compose["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert [name for name, service in compose["services"].items() if "deploy" in service] == ["worker"]


def test_label_studio_is_ours_and_talks_to_us(compose: dict[str, Any]) -> None:
    studio = compose["services"]["label-studio"]
    pinned = (ROOT / "requirements" / "studio.in").read_text().strip()
    assert studio["image"].rpartition(":")[2] == pinned.removeprefix("label-studio==")
    environment = studio["environment"]
    assert environment["ML_BLOCK_LOCAL_IP"] == environment["SSRF_PROTECTION_ENABLED"] == "false"
    ours = compose["services"]["serve"]["environment"]
    assert environment["LABEL_STUDIO_USER_TOKEN"] == ours["LABEL_STUDIO_API_KEY"]
    assert environment["LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN"] == "true"


def test_services_find_each_other_and_keep_their_data(compose: dict[str, Any]) -> None:
    services = compose["services"]
    environment = services["serve"]["environment"]
    for name in ("LABEL_STUDIO_URL", "REDIS_URL", "FIRSTROW_URL"):
        host = re.match(r"\w+://([\w.-]+):\d+$", environment[name])
        assert host is not None
        assert host[1] in {*services, *services["serve"]["networks"]["default"]["aliases"]}
    for service in services.values():
        named = [volume.partition(":")[0] for volume in service["volumes"]]
        assert named
        assert set(named) <= compose["volumes"].keys()
    waits = services["worker"]["depends_on"]
    assert all("healthcheck" in services[name] for name in waits)


def test_label_studio_accepts_our_address_as_that_of_a_webhook(
    compose: dict[str, Any], label_studio: LabelStudio
) -> None:
    made = label_studio.create_project("addresses", (ROOT / "label_config.xml").read_text())
    environment = compose["services"]["serve"]["environment"]
    label_studio.create_webhook(made["id"], webhook_url(Settings.read(environment).url), {})
    for refused in ("http://serve:9090", "http://firstrow"):
        with pytest.raises(LabelStudioError, match="Enter a valid URL"):
            label_studio.create_webhook(made["id"], webhook_url(refused), {})
        with pytest.raises(SettingsError, match=r"FIRSTROW_URL: .*events only to"):
            Settings.read({**environment, "FIRSTROW_URL": refused})


@pytest.fixture
def environment(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any], database_url: str, tmp_path: Path
) -> dict[str, str]:
    """The container's environment, with addresses and folders of this machine."""
    inside: dict[str, str] = image_environment(dockerfile) | compose["services"]["serve"]["environment"]
    port = free_port()
    return inside | {
        "LABEL_STUDIO_URL": f"http://{LOOPBACK}:9",
        "REDIS_URL": database_url,
        "FIRSTROW_URL": f"http://{LOOPBACK}:{port}",
        "FIRSTROW_PORT": str(port),
        "FIRSTROW_STORE": str(tmp_path / "store"),
        "FIRSTROW_CACHE": str(tmp_path / "cache"),
    }


def command(dockerfile: list[tuple[str, str]], compose: dict[str, Any], service: str) -> list[str]:
    """What the container of a service runs; the console script is that of this virtual environment."""
    entry = json.loads(arguments(dockerfile, "ENTRYPOINT")[0])
    return [str(Path(sys.executable).parent / entry[0]), *entry[1:], *compose["services"][service]["command"]]


def ended(running: Child) -> int:
    """The exit status after the one SIGTERM by which a container is stopped."""
    running.process.terminate()
    return running.process.wait(30)


def test_serve_answers_and_is_healthy(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    check = json.loads(arguments(dockerfile, "HEALTHCHECK")[0].partition(" CMD ")[2])

    def healthy() -> bool:
        found = [sys.executable, *check[1:]]
        return not subprocess.run(found, env=inherited() | environment, capture_output=True, check=False).returncode

    assert not healthy()
    with child("serve", command(dockerfile, compose, "serve"), tmp_path, environment) as running:
        wait(healthy, running, 60)
        answer = requests.get(f"{environment['FIRSTROW_URL']}/health", timeout=10)
        assert answer.json()["status"] == "UP"
        versions = requests.get(f"{environment['FIRSTROW_URL']}/versions", timeout=10)
        assert versions.status_code == 401  # no project has a secret yet
        assert ended(running) == 0
    assert not healthy()


def test_worker_listens_on_its_queues(
    dockerfile: list[tuple[str, str]], compose: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    with Redis.from_url(environment["REDIS_URL"], decode_responses=True) as redis:
        with child("worker", command(dockerfile, compose, "worker"), tmp_path, environment) as running:
            wait(lambda: bool(redis.smembers("rq:workers")), running, 120)
            assert redis.smembers("rq:workers:gpu") == redis.smembers("rq:workers:default")
            assert ended(running) == 0
        assert redis.smembers("rq:workers") == set()  # it said good-bye
