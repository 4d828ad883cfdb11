"""gunicorn around the app. Importing this loads what its processes share; each opens connections of its own."""

from __future__ import annotations

import gc
import logging
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from redis import RedisError

from backend.app import create_app
from backend.enqueue import Board
from backend.prelabels import warm_up
from backend.settings import Settings
from backend.web_worker import WebWorker

log = logging.getLogger(__name__)


def serve(settings: Settings, host: str, port: int, workers: int) -> None:
    """Run gunicorn in this process until it is told to stop.

    Args:
        settings: for each worker's app.
        host: address to listen on.
        port: port to listen on.
        workers: processes; modules are loaded before the fork, connections opened after it.

    Raises:
        StoreError: the secret can be neither read nor made.
    """
    settings.secret_value(make=True)  # made here if at all: two workers could make two
    look_around(Board(settings.redis_url))

    class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
        def load_config(self) -> None:
            for name, value in _gunicorn(settings, host, port, workers).items():
                if name in self.cfg.settings:  # control_socket_disable came with gunicorn 25
                    self.cfg.set(name, value)

        def load(self) -> Flask:
            return create_app(settings)

    warm_up()
    gc.freeze()  # what is loaded by now is shared by the processes: none looks through it for garbage, and so copies it
    Server().run()


def look_around(board: Board) -> None:
    """Have every project compared with Label Studio: nobody took its events while this process was down."""
    try:
        for project in board.projects():
            board.reconcile(project)
    except RedisError as error:
        log.warning("Redis does not answer (%s): workers will look for lost events", type(error).__name__)
    finally:
        board.redis.close()


def _gunicorn(settings: Settings, host: str, port: int, workers: int) -> dict[str, Any]:
    return {
        "bind": f"{host}:{port}",
        "workers": workers,
        "worker_class": WebWorker,
        "timeout": 120,
        "graceful_timeout": 10,
        "loglevel": settings.log_level.lower(),
        "control_socket_disable": True,
    }
