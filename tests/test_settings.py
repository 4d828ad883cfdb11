"""Settings come from the environment, all faults at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backend import settings as module
from backend.errors import SettingsError, StoreError
from backend.settings import SECRET_KEY, Settings
from backend.store import Store
from model.network import NETWORKS
from model.strategies import STRATEGIES

KEY = {"LABEL_STUDIO_API_KEY": "0" * 40}
GIVEN = {
    "LABEL_STUDIO_URL": "https://studio.example.com/label/",
    "LABEL_STUDIO_API_KEY": "key",
    "REDIS_URL": "rediss://:pass@redis.example.com:6380/3",
    "LOG_LEVEL": "debug",
    "FIRSTROW_URL": "http://firstrow.internal:9090/",
    "FIRSTROW_PORT": "9091",
    "FIRSTROW_STORE": "memory://store",
    "FIRSTROW_CACHE": "~/pictures",
    "FIRSTROW_CACHE_GB": "0.5",
    "FIRSTROW_SECRET": "hush",
    "FIRSTROW_NETWORK": "fcn_resnet50",
    "FIRSTROW_CHECKPOINT": "/models/field.safetensors",
    "FIRSTROW_STRATEGY": "entropy",
    "FIRSTROW_LEARNER": "deep",
    "FIRSTROW_FINE_TUNE": "on",
    "FIRSTROW_COARSE_TASKS": "0",
    "FIRSTROW_RETRAIN_EVERY": "3",
    "FIRSTROW_TRAIN_STEPS": "7",
    "FIRSTROW_IMAGE_SIZE": "512",
    "FIRSTROW_CLUSTERS": "image",
    "FIRSTROW_ALLOWED_HOSTS": "a.example.com, b.example.com,",
    "FIRSTROW_RECONCILE_SECONDS": "60",
}


def faults(environ: dict[str, str]) -> dict[str, str]:
    """What is wrong, by variable."""
    with pytest.raises(SettingsError) as error:
        Settings.read(environ)
    lines = str(error.value).splitlines()[1:]
    return {name: text for name, _, text in (line.strip().partition(": ") for line in lines)}


def test_defaults_serve_most() -> None:
    found = Settings.read(KEY)
    assert found.label_studio_url == "http://localhost:8080"
    assert (found.url, found.port) == ("http://localhost:9090", 9090)
    assert found.cache == Path.home() / ".cache" / "firstrow"
    assert found.allowed_hosts == ()


def test_every_setting_is_read() -> None:
    assert GIVEN.keys() == {field.alias for field in Settings.model_fields.values()}
    found, default = Settings.read(GIVEN), Settings.read(KEY)
    for name in Settings.model_fields:
        assert getattr(found, name) != getattr(default, name), name
    assert found.label_studio_url == "https://studio.example.com/label"
    assert found.url == "http://firstrow.internal:9090"
    assert found.cache == Path.home() / "pictures"
    assert found.allowed_hosts == ("a.example.com", "b.example.com")
    assert found.log_level == "DEBUG"


def test_a_relative_store_lies_where_the_command_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {
        "": tmp_path / "firstrow-store",
        "./own": tmp_path / "own",
        "~/own": Path.home() / "own",
        "/own": Path("/own"),
    }
    found = {given: Settings.read({**KEY, "FIRSTROW_STORE": given}) for given in folders}
    monkeypatch.chdir("/")
    assert {given: Path(one.store) for given, one in found.items()} == folders
    with pytest.raises(StoreError, match=f"no {SECRET_KEY} in the store {tmp_path}/firstrow-store"):
        found[""].secret_value()


def test_empty_means_default() -> None:
    assert Settings.read({**dict.fromkeys(GIVEN, ""), **KEY}) == Settings.read(KEY)


def test_all_faults_at_once() -> None:
    wrong = {
        "LABEL_STUDIO_URL": "localhost:8080",
        "REDIS_URL": "localhost",
        "LOG_LEVEL": "loud",
        "FIRSTROW_URL": "https://",
        "FIRSTROW_PORT": "99999",
        "FIRSTROW_STORE": "nonsense://bucket",
        "FIRSTROW_CACHE_GB": "inf",
        "FIRSTROW_NETWORK": "unet",
        "FIRSTROW_STRATEGY": "best",
        "FIRSTROW_COARSE_TASKS": "-1",
        "FIRSTROW_RETRAIN_EVERY": "0",
        "FIRSTROW_TRAIN_STEPS": "many",
        "FIRSTROW_IMAGE_SIZE": "1.5",
        "FIRSTROW_CLUSTERS": "pool",
        "FIRSTROW_RECONCILE_SECONDS": "0",
    }
    found = faults(wrong)
    assert found.keys() == {*wrong, "LABEL_STUDIO_API_KEY"}
    assert "personal access token" in found["LABEL_STUDIO_API_KEY"]
    assert "http://" in found["LABEL_STUDIO_URL"]
    assert "(default: 9090)" in found["FIRSTROW_PORT"]
    assert "lraspp_mobilenet_v3_large" in found["FIRSTROW_NETWORK"]
    assert "first-row" in found["FIRSTROW_STRATEGY"]


def test_a_typing_error_is_found() -> None:
    found = faults({**KEY, "FIRSTROW_STARTEGY": "entropy", "FIRSTROW_ZZZZ": "1"})
    assert found["FIRSTROW_STARTEGY"] == "there is no such setting; did you mean FIRSTROW_STRATEGY?"
    assert found["FIRSTROW_ZZZZ"] == "there is no such setting"


def test_other_variables_are_none_of_our_business() -> None:
    environ = {**KEY, "PATH": "/bin", "REDIS_HOST": "x", "FIRSTROW_DATA": "/data", "FIRSTROW_STUDIO": "/studio"}
    assert Settings.read(environ) == Settings.read(KEY)
    root = Path(__file__).parents[1]
    code = "".join(path.read_text() for folder in ("backend", "tests") for path in (root / folder).glob("*.py"))
    unread = [name for name in module.OTHERS if f'environ.get("{name}"' not in code]
    assert not unread, "a name that nobody reads hides a typing error"


def test_nothing_is_read_but_what_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRSTROW_PORT", "9999")
    monkeypatch.setenv("PORT", "9999")
    assert Settings.read(KEY).port == 9090
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "key")
    assert Settings.read().port == 9999


def test_settings_do_not_show_keys() -> None:
    shown = repr(Settings.read({**GIVEN, "LABEL_STUDIO_API_KEY": "not-for-eyes", "FIRSTROW_SECRET": "nor-this"}))
    assert "not-for-eyes" not in shown
    assert "nor-this" not in shown


def test_names_are_the_real_ones() -> None:
    assert set(module.NETWORKS) == set(NETWORKS)
    assert set(module.STRATEGIES) == set(STRATEGIES)


def test_a_user_without_a_home_can_say_where_the_cache_is() -> None:
    if os.getuid():
        pytest.skip("only root can become somebody without a home")
    code = "import os; from backend.settings import Settings; os.setuid(54321); print(Settings.read().cache)"
    environ = {name: value for name, value in os.environ.items() if name != "HOME"} | KEY
    for given, words in (({}, "no home folder"), ({"FIRSTROW_CACHE": "/data"}, "/data")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**environ, **given}, capture_output=True, text=True, check=False)
        assert words in done.stdout + done.stderr


def test_the_secret_is_made_once(tmp_path: Path) -> None:
    environ = {**KEY, "FIRSTROW_STORE": str(tmp_path)}
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: Settings.read(environ).secret_value(make=True), range(16)))
    assert len(found) == 1
    assert len(found.pop()) >= 32
    assert (tmp_path / SECRET_KEY).stat().st_mode & 0o777 == 0o600
    assert Settings.read({**environ, "FIRSTROW_SECRET": "mine"}).secret_value(make=True) == "mine"


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    Store(str(tmp_path)).write(SECRET_KEY, b"")
    with pytest.raises(StoreError, match="set FIRSTROW_SECRET"):
        Settings.read({**KEY, "FIRSTROW_STORE": str(tmp_path)}).secret_value(make=True)


def test_reading_settings_loads_nothing_heavy() -> None:
    code = "import sys, json; import backend.settings; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "sklearn", "label_studio_sdk", "flask"} & set(json.loads(done.stdout))
