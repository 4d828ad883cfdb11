"""create_app(settings): the Flask app of label-studio-ml with our manager, our checks and no tracebacks; wiring only.

Importing label-studio-ml where torch is loaded already sets torch's multiprocessing to `spawn`; harmless here.
"""

from __future__ import annotations

import hmac
import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
from flask import Flask, Response, abort, current_app, jsonify, request
from flask.json.provider import JSONProvider
from redis import Redis, RedisError
from redis.backoff import NoBackoff
from redis.retry import Retry
from werkzeug.exceptions import HTTPException

from backend.connection import SECRET_HEADER
from backend.context import Context, connect
from backend.enqueue import DEFAULT, GPU
from backend.errors import FirstRowError
from backend.events import EventError, handle, parse, project_id
from backend.settings import Settings


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Imports of `module` fail inside: a None in sys.modules means "not installed" to the import system."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# label-studio-ml imports torch only for its multiprocessing, which we do not use: 2 s and 490 MB saved per start.
with _hidden("torch"):
    from label_studio_ml import api
    from label_studio_ml.model import LabelStudioMLManager, ModelWrapper

from backend.plugin import FirstRow, version  # noqa: E402  (imports label_studio_ml, so it must come after)

log = logging.getLogger(__name__)

#: Answered without our secret too, so that connecting through Label Studio's own page works before `attach`. They only
#: read; a wrong secret is refused everywhere but at /health.
OPEN = {"/setup", "/predict", "/versions", "/job_status", "/is_training", "/metrics"}
HEALTH = {"/", "/health"}
#: What rq takes for a job id.
JOB_ID = re.compile(r"[A-Za-z0-9_-]+")
#: Bytes. Label Studio takes 250 MiB itself; a request for a whole project's tasks with their masks can be larger.
LARGEST = 1 << 30


class Manager(LabelStudioMLManager):  # type: ignore[misc]  # label-studio-ml has no types
    """What the routes of label-studio-ml call; holds no model, so any number of processes may serve.

    Args:
        where: settings, store and board.
    """

    def __init__(self, where: Context) -> None:
        self.where = where

    def fetch(self, project: object = None, label_config: str | None = None, *args: Any, **kwargs: Any) -> ModelWrapper:
        """Answer `/setup`; the first one of a project has it compared with Label Studio."""
        number = project_id(project)
        try:
            self._welcome(number)
        except RedisError as error:
            log.warning("project %d: Redis does not answer (%s)", number, type(error).__name__)
        return self._model(number, label_config)

    def predict(
        self, tasks: object, project: object = None, label_config: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[list[list[dict[str, Any]]], ModelWrapper]:
        """Answer `/predict`; `args` and `kwargs` are options of label-studio-ml that mean nothing to us."""
        if not isinstance(tasks, list):
            raise EventError("predict: no list of tasks in the request")
        found = self._model(project_id(project), label_config)
        return found.model.predict(tasks), found

    def webhook(self, event: object, data: dict[str, Any]) -> dict[str, Any]:
        """Answer `/webhook`: remember the event and return."""
        found = parse({**data, "action": event})
        return {"job": handle(found, self.where.board) if found else None}

    def train(self, *args: Any, **kwargs: Any) -> None:
        """Label Studio before 1.4.1 trained this way.

        Raises:
            EventError: always.
        """
        raise EventError("train: this Label Studio is too old; the Start Training button of 1.20 and later works")

    def is_training(self, project: object) -> dict[str, Any]:
        """Whether a round is in progress."""
        return {"is_training": self.where.board.busy(project_id(project)) is not None}

    def versions(self) -> list[str]:
        """The versions in force, of all projects: the request does not name one."""
        return sorted({version(self.where, project) for project in self.where.board.projects()})

    def _get_models_from_workdir(self, project: object) -> list[str]:
        return [version(self.where, project_id(project))]

    def _model(self, project: int, label_config: str | None) -> ModelWrapper:
        model = FirstRow(project, label_config, where=self.where)
        return ModelWrapper(model=model, model_version=model.model_version)

    def _welcome(self, project: int) -> None:
        board = self.where.board
        if project in board.projects():
            return
        log.warning(
            "project %d asks for the first time; `firstrow attach --project %d --dry-run` says what it still lacks",
            project,
            project,
        )
        board.register(project)
        board.reconcile(project)


class _Json(JSONProvider):
    """orjson: a request with masks is megabytes of numbers."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return orjson.dumps(obj, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return orjson.loads(s)


def create_app(settings: Settings) -> Flask:
    """The WSGI application.

    label-studio-ml has one app per process: a second call gives the same app, with these settings.

    Args:
        settings: where Redis and the store are, and the secret.

    Returns:
        The app; only the store has been contacted, for the secret.

    Raises:
        StoreError: the secret can be neither read nor made.
    """
    doors = connect(settings)
    _hurry(doors.board.redis)
    app: Flask = api.init_app(model_class=FirstRow)
    api._manager = Manager(doors)
    app.config.update(FIRSTROW=doors, FIRSTROW_SECRET=settings.secret_value(), MAX_CONTENT_LENGTH=LARGEST)
    if "versions_get" not in app.view_functions:
        _install(app)
    return app


def _hurry(redis: Redis) -> None:
    """Label Studio's annotator waits while we wait: one second at most, and one retry (a restarted Redis) at once."""
    redis.set_retry(Retry(NoBackoff(), 1))
    redis.connection_pool.connection_kwargs.update(socket_timeout=1, socket_connect_timeout=0.5)


def _install(app: Flask) -> None:
    """Routes that Label Studio calls and label-studio-ml lacks; checks and errors of ours."""
    app.json = _Json(app)
    # Headers carry our secret, bodies people's data and a token: neither is logged, at any level.
    app.before_request_funcs[None].remove(api.log_request_info)
    app.after_request_funcs[None].remove(api.log_response_info)
    logging.getLogger("label_studio_ml").setLevel(logging.INFO)
    for name, view in app.view_functions.items():
        # Its exception_handler answers tracebacks: take the function inside, and leave errors to Flask.
        app.view_functions[name] = inspect.getclosurevars(view).nonlocals.get("f", view)
    app.before_request(_check_secret)
    app.before_request(_check_body)
    app.add_url_rule("/versions", "versions_get", lambda: {"versions": api._manager.versions()}, methods=["GET"])
    app.add_url_rule("/job_status", "job_status", _job_status, methods=["GET", "POST"])
    for kind in (Exception, AssertionError, IndexError, FileNotFoundError, RedisError, FirstRowError, HTTPException):
        app.register_error_handler(kind, _answer_error)


def _check_secret() -> None:
    if request.path in HEALTH:
        return
    basic = request.authorization
    given = request.headers.get(SECRET_HEADER) or (basic.password if basic else None)
    if given is None and request.path in OPEN:
        return
    wanted: str = current_app.config["FIRSTROW_SECRET"]
    if given is None or not hmac.compare_digest(given.encode(), wanted.encode()):
        log.warning(
            "refused %s without our secret; `firstrow attach --project ID` sets it in Label Studio", request.path
        )
        abort(401, "our secret is missing or wrong; `firstrow attach --project ID` sets it in Label Studio")


def _check_body() -> None:
    if request.method != "POST" or request.url_rule is None:
        return
    body = request.get_json()
    if not isinstance(body, dict) or (request.path == "/webhook" and "action" not in body):
        raise EventError(f"{request.path}: the body is not an object as Label Studio sends it")


def _job_status() -> Response:
    given = request.get_json() if request.method == "POST" else request.args
    name = str(given.get("job"))
    for queue in (GPU, DEFAULT) if JOB_ID.fullmatch(name) else ():
        job = _doors().board.queue(queue).fetch_job(name)
        if job is not None:
            status = job.get_status(refresh=False)
            return jsonify(job=name, job_status=status.value if status else "unknown", **job.meta)
    return jsonify(job=name, job_status="unknown")


def _answer_error(error: Exception) -> tuple[Response, int]:
    """Short JSON; a traceback goes to the log only, and only where nobody foresaw the error."""
    if isinstance(error, HTTPException):
        return jsonify(error=error.description or error.name), error.code or 500
    if isinstance(error, FirstRowError):
        return jsonify(error=str(error)), 400
    if isinstance(error, RedisError):
        log.error("%s: Redis does not answer: %s", request.path, error)
        return jsonify(error="Redis does not answer; the next reconcile finds what this request told us"), 503
    log.error("%s failed", request.path, exc_info=error)
    return jsonify(error=f"{type(error).__name__} in First Row; its log says more"), 500


def _doors() -> Context:
    doors: Context = current_app.config["FIRSTROW"]
    return doors
