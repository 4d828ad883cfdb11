"""Whatever is sent: a short answer in JSON, never a fault of ours."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backend.app import create_app
from backend.connection import SECRET_HEADER
from backend.events import EVENTS
from backend.secret import project_secret
from backend.settings import Settings

MASTER = "s3cret-password"
SECRET = project_secret(MASTER, 22)
PATHS = ("/", "/health", "/setup", "/predict", "/webhook", "/versions", "/job_status", "/is_training", "/train", "/x")
BOUNDED = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.integers() | st.integers(1, 50) | st.floats() | st.sampled_from([2**31, 2**63, 2**64, 10**30, -1, 0])
texts = st.text(max_size=20) | st.sampled_from(
    ["22", "22.1795345419", "22.x", "", "-22", "٢٢", "9" * 30, "\x00", "\ud800"]
)
scalars = st.none() | st.booleans() | numbers | texts
names = st.sampled_from(["id", "task", "tasks", "annotation", "project", "label_config", "data", "result"]) | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
projects = st.sampled_from([22, "22", "22.1795345419", {"id": 22}, {"id": 22, "label_config": "<View/>"}]) | anything
rows = st.fixed_dictionaries({"id": numbers | anything}, optional={"task": numbers | anything, "result": anything})
several = rows | anything | st.lists(rows | anything, max_size=5)
webhooks = st.fixed_dictionaries(
    {"action": st.sampled_from(EVENTS) | anything, "project": projects},
    optional=dict.fromkeys(("task", "tasks", "annotation", "annotations"), several),
)
predicts = st.fixed_dictionaries(
    {"project": projects, "tasks": st.lists(rows | anything, max_size=20) | anything},
    optional={"params": anything, "label_config": anything, "force_reload": anything, "try_fetch": anything},
)
others = st.fixed_dictionaries({}, optional={"project": projects, "job": anything, "schema": anything})
headers = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=60)
credentials = st.one_of(
    headers,
    st.binary(max_size=30).map(lambda raw: "Basic " + base64.b64encode(raw).decode()),
    st.sampled_from(["Basic", "Bearer", "Digest", "Basic ÿ", SECRET, SECRET[:-1] + "ÿ", "9" * 5000 + "-" + "a" * 43]),
)


def encoded(value: object) -> bytes:
    """JSON as Label Studio's Python would write it: NaN and huge numbers included, half characters too."""
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def client(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlaskClient]:
    """The app on a real Redis, without a server around it."""
    given = {
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "REDIS_URL": f"{redis_url}/98",
        "FIRSTROW_STORE": str(tmp_path_factory.mktemp("store")),
        "FIRSTROW_SECRET": MASTER,
    }
    app = create_app(Settings.read(given))
    with app.test_client() as client:
        yield client


def check(client: FlaskClient, path: str, body: bytes, method: str = "POST", **more: Any) -> int:
    """Send a request; the answer is no fault of ours, and short JSON where it is an error. Returns the status."""
    kind = more.pop("content_type", "application/json")
    answer = client.open(path, method=method, data=body, content_type=kind, **more)
    assert answer.status_code < 500, (answer.status_code, answer.get_data(), path, body)
    if answer.status_code >= 400:
        assert set(orjson.loads(answer.get_data())) == {"error"}
        assert len(answer.get_data()) < 600
    return answer.status_code


@BOUNDED
@given(body=webhooks)
def test_webhooks(client: FlaskClient, body: object) -> None:
    assert check(client, "/webhook", encoded(body), headers={SECRET_HEADER: SECRET}) in (201, 400, 403)


@BOUNDED
@given(body=predicts)
def test_predicts(client: FlaskClient, body: dict[str, Any]) -> None:
    assert check(client, "/predict", encoded(body), headers={SECRET_HEADER: SECRET}) in (200, 400, 403)


@BOUNDED
@given(path=st.sampled_from(PATHS), body=others, with_secret=st.booleans())
def test_other_routes(client: FlaskClient, path: str, body: object, with_secret: bool) -> None:
    check(client, path, encoded(body), headers={SECRET_HEADER: SECRET} if with_secret else {})


@BOUNDED
@given(
    path=st.sampled_from(PATHS) | st.text(max_size=20).map(lambda text: f"/{text}"),
    method=st.sampled_from(["GET", "POST", "PUT", "HEAD", "OPTIONS", "X"]),
    body=st.binary(max_size=200) | st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b'"\\ud800"', b"\xff", b"{}x"]),
    content_type=st.sampled_from(["application/json", "application/json; charset=x", "text/plain", ""]) | headers,
    secret=st.none() | headers | st.just(SECRET) | credentials,
    authorization=st.none() | credentials,
    query=st.dictionaries(st.sampled_from(["project", "job", "x"]), texts.filter(lambda text: text != "\ud800")),
)
def test_raw_requests(
    client: FlaskClient,
    path: str,
    method: str,
    body: bytes,
    content_type: str,
    secret: str | None,
    authorization: str | None,
    query: dict[str, str],
) -> None:
    more = {SECRET_HEADER: secret, "Authorization": authorization}
    shown = {name: value for name, value in more.items() if value is not None}
    if method in ("HEAD", "OPTIONS"):
        answer = client.open(path, method=method, headers=shown)
        assert answer.status_code < 500
    else:
        check(client, path, body, method, content_type=content_type, headers=shown, query_string=query)
