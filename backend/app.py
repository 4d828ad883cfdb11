"""create_app(settings): the Flask app of label-studio-ml with our manager, our checks and no tracebacks; wiring only.

Importing label-studio-ml where torch is loaded already sets torch's multiprocessing to `spawn`; harmless here.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from threading import BoundedSemaphore
from typing import Any, NoReturn

import orjson
from flask import Flask, Request, Response, abort, current_app, g, jsonify, request
from flask.json.provider import JSONProvider
from redis import Redis, RedisError
from werkzeug.exceptions import HTTPException

from backend.admission import HEALTH, LARGEST, admission
from backend.connection import SECRET_HEADER
from backend.context import Context, connect
from backend.enqueue import DEFAULT, GPU, Board
from backend.errors import FirstRowError
from backend.events import EventError, handle, parse, project_id
from backend.payload import decode, reading
from backend.settings import Settings
from backend.welcome import Welcome


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

from backend.plugin import CHUNK, NO_VERSION, FirstRow, version  # noqa: E402  (imports label_studio_ml, so it must come after)

log = logging.getLogger(__name__)

#: What rq takes for a job id.
JOB_ID = re.compile(r"[A-Za-z0-9_-]+")
#: Where a request without a project means nothing.
NAMED = {"/setup", "/predict", "/is_training"}
#: Requests for many tasks that one process answers at the same time: each may take a minute.
BULK = 2


class Manager(LabelStudioMLManager):  # type: ignore[misc]  # label-studio-ml has no types
    """What the routes of label-studio-ml call; holds no model, so any number of processes may serve.

    Args:
        where: settings, store and board.
    """

    def __init__(self, where: Context) -> None:
        self.where, self.welcome = where, Welcome(where)
        self._bulk = BoundedSemaphore(BULK)

    def fetch(self, project: object = None, label_config: str | None = None, *args: Any, **kwargs: Any) -> ModelWrapper:
        """Answer `/setup`; a project that nobody attached is looked up in Label Studio.

        Without a secret the answer is the same for every project: it tells nothing.
        """
        number = project_id(project)
        try:
            self._greet(number)
        except RedisError as error:
            log.warning("project %d: Redis does not answer (%s)", number, type(error).__name__)
        if g.admission.project is None:
            return ModelWrapper(model=None, model_version=NO_VERSION)
        return self._model(number, label_config)

    def predict(
        self, tasks: object, project: object = None, label_config: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[list[list[dict[str, Any]]], ModelWrapper]:
        """Answer `/predict`; `args` and `kwargs` are options of label-studio-ml that mean nothing to us."""
        if not isinstance(tasks, list):
            raise EventError("predict: no list of tasks in the request")
        number = project_id(project)
        if g.admission.project is None:
            return [[] for _ in tasks], ModelWrapper(model=None, model_version=NO_VERSION)
        found = self._model(number, label_config)
        with self._place(len(tasks)):
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
        """The version in force of the project whose secret the request shows: it names no project."""
        return [version(self.where, g.admission.project)]

    def _get_models_from_workdir(self, project: object) -> list[str]:
        return [version(self.where, project_id(project))]

    def _model(self, project: int, label_config: str | None) -> ModelWrapper:
        model = FirstRow(project, label_config, where=self.where)
        return ModelWrapper(model=model, model_version=model.model_version)

    def _greet(self, project: int) -> None:
        if g.admission.project is not None:
            mark_secured(self.where.board.redis, project)
        if project not in self.where.board.projects():
            self.welcome.look_up(project)

    @contextmanager
    def _place(self, tasks: int) -> Iterator[None]:
        """A place among the requests for many tasks, for those that are one."""
        if tasks <= CHUNK:
            yield
        elif self._bulk.acquire(blocking=False):
            try:
                yield
            finally:
                self._bulk.release()
        else:
            log.warning("predict: %d tasks at once refused: %d such requests are being answered", tasks, BULK)
            abort(503, "other requests for many tasks are being answered: ask again in a minute")


class _Json(JSONProvider):
    """orjson: an answer with masks is megabytes of numbers."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return orjson.dumps(obj, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return orjson.loads(s)


class _Request(Request):
    """Reads of a body only what we use of it."""

    _found: dict[str, Any] | None = None

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        if self._found is None:
            if not (force or self.is_json):
                return self.on_json_loading_failed(None)
            with reading(self.content_length) or nullcontext():
                self._found = decode(self.get_data(cache=False))
        return self._found


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
    _hurry(doors.board)
    app: Flask = api.init_app(model_class=FirstRow)
    api._manager = Manager(doors)
    app.config.update(FIRSTROW=doors, FIRSTROW_SECRET=settings.secret_value(), MAX_CONTENT_LENGTH=LARGEST)
    if "versions_get" not in app.view_functions:
        _install(app)
    return app


def _hurry(board: Board) -> None:
    """Label Studio's annotator waits while we wait: one second at most."""
    board.hurry()
    board.redis.connection_pool.connection_kwargs.update(socket_timeout=1, socket_connect_timeout=0.5)


def _install(app: Flask) -> None:
    """Routes that Label Studio calls and label-studio-ml lacks; checks and errors of ours."""
    app.json = _Json(app)
    app.request_class = _Request
    # Headers carry our secret, bodies people's data and a token: neither is logged, at any level.
    app.before_request_funcs[None].remove(api.log_request_info)
    app.after_request_funcs[None].remove(api.log_response_info)
    logging.getLogger("label_studio_ml").setLevel(logging.INFO)
    for name, view in app.view_functions.items():
        # Its exception_handler answers tracebacks: take the function inside, and leave errors to Flask.
        app.view_functions[name] = inspect.getclosurevars(view).nonlocals.get("f", view)
    app.view_functions["_train"] = lambda: api._manager.train()  # theirs trips over annotations
    app.before_request(_check_head)
    app.before_request(_check_body)
    app.add_url_rule("/versions", "versions_get", lambda: {"versions": api._manager.versions()}, methods=["GET"])
    app.add_url_rule("/job_status", "job_status", _job_status, methods=["GET", "POST"])
    for kind in (Exception, AssertionError, IndexError, FileNotFoundError, RedisError, FirstRowError, HTTPException):
        app.register_error_handler(kind, _answer_error)


def _check_head() -> None:
    """Refuse what shows no secret of ours, and what is too large, before the body is read."""
    headers, master = request.headers, current_app.config["FIRSTROW_SECRET"]
    g.admission = admission(master, request.path, headers.get(SECRET_HEADER), headers.get("Authorization"))
    if g.admission.refused:
        _refuse()
    if (request.content_length or 0) > g.admission.limit:
        abort(413, f"{request.path}: at most {g.admission.limit} bytes are read here")


def _refuse() -> NoReturn:
    log.warning("refused %r without our secret; `firstrow attach --project ID` sets it in Label Studio", request.path)
    abort(401, "our secret is missing or wrong; `firstrow attach --project ID` sets it in Label Studio")


def _check_body() -> None:
    """Refuse what is not Label Studio's, and what concerns another project than the secret."""
    if request.url_rule is None or request.path in HEALTH:
        return
    found = request.get_json() if request.method == "POST" else request.args
    if request.path == "/webhook" and "action" not in found:
        raise EventError("/webhook: the body is not an object as Label Studio sends it")
    if "project" in found or request.path in NAMED or request.endpoint == "get_version":
        _check_project(project_id(found.get("project")))


def _check_project(project: int) -> None:
    ours = g.admission.project
    if ours is None and secured(_doors(), project):
        _refuse()
    if ours is not None and ours != project:
        log.warning("refused %r for project %d with the secret of project %d", request.path, project, ours)
        abort(403, f"the request is about project {project}, its secret is that of project {ours}")


def mark_secured(redis: Redis, project: int) -> None:
    """From now on the project is served only with its secret: Label Studio has it."""
    redis.set(f"firstrow:{project}:secured", 1)


def secured(doors: Context, project: int) -> bool:
    """Whether Label Studio has the secret of this project: it has shown it, or the store tells that `attach` set it."""
    try:
        if doors.board.redis.exists(f"firstrow:{project}:secured"):
            return True
    except RedisError as error:
        log.warning("project %d: Redis does not answer (%s)", project, type(error).__name__)
    return doors.project(project).attached()


def _job_status() -> Response:
    given = request.get_json() if request.method == "POST" else request.args
    name = str(given.get("job"))
    for queue in (GPU, DEFAULT) if JOB_ID.fullmatch(name) else ():
        job = _doors().board.queue(queue).fetch_job(name)
        if job is not None and job.meta.get("project") == g.admission.project:
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
