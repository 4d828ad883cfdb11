"""gunicorn's processes with waitress's sockets: a thread is taken only once a request has arrived completely.

A gunicorn thread reads the body of its request itself, so that a few clients that announce a body and send none stop a
process. Here one loop reads all sockets; what arrives too slowly, or is larger than it may be, costs no thread.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from gunicorn.workers.base import Worker
from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher
from waitress.utilities import RequestEntityTooLarge

from backend.admission import HEAD, Admission, admission

#: Requests that one process answers at the same time.
THREADS = 16
#: Seconds in which the head of a request, and a body without a secret, must have arrived.
HEAD_SECONDS = 10.0
#: Seconds in which a body with a secret must have arrived, and in which an answer must be taken.
BODY_SECONDS, ANSWER_SECONDS = 60.0, 120.0
#: Seconds for which a connection may be kept open without a request.
IDLE_SECONDS = 30.0
#: Connections of one process; above the second number, those that wait longest for their request are closed.
MOST, COMFORTABLE = 500, 400


class Parser(HTTPRequestParser):  # type: ignore[misc]  # waitress has no types
    """One request as it arrives; its head decides how large and how slow its body may be.

    Args:
        adj: waitress's settings.
        master: the master secret.
    """

    completed: bool = False
    error: Any = None

    def __init__(self, adj: Adjustments, master: str) -> None:
        super().__init__(adj)
        self.master, self.began = master, time.monotonic()
        self.admission: Admission | None = None

    def parse_header(self, header_plus: bytes) -> None:
        """Parse the head, and judge it.

        Raises:
            ParsingError: junk.
        """
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a length of thousands of digits, half an IPv6 address
            raise ParsingError("Invalid request") from error
        found = self.headers.get("X_FIRST_ROW_SECRET"), self.headers.get("AUTHORIZATION")
        self.admission = admission(self.master, self.path, *found)

    def received(self, data: bytes) -> int:
        """Take bytes; a body that is too large is not waited for: the app answers by the head alone."""
        consumed = int(super().received(data))
        if self.completed or self.admission is None or self.error:
            return consumed
        if self.content_length > self.admission.limit:
            self.completed = self.connection_close = True
            self.headers["CONNECTION"] = "close"
            return len(data)  # what follows is body, not another request
        if self.body_bytes_received > self.admission.limit:
            self.error = RequestEntityTooLarge(f"at most {self.admission.limit} bytes")
            self.completed = True
        return consumed

    @property
    def seconds(self) -> float:
        """How long it may take to arrive."""
        known = self.admission is not None and self.admission.project is not None
        return BODY_SECONDS if known else HEAD_SECONDS


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection."""

    answered = 0.0

    def parser_class(self, adj: Adjustments) -> Parser:
        """Where the next request of this connection arrives."""
        return Parser(adj, self.server.master)

    def service(self) -> None:
        """Answer a request, in a thread of the pool."""
        super().service()
        self.answered = time.monotonic()

    def late(self, now: float, idle: float) -> bool:
        """Whether this connection has used up its time.

        Args:
            now: on the monotonic clock.
            idle: seconds since bytes moved.
        """
        if self.requests:  # being answered
            return False
        if self.request is not None:
            return bool(now - self.request.began > self.request.seconds)
        if self.total_outbufs_len:
            return now - self.answered > ANSWER_SECONDS
        return idle > IDLE_SECONDS


class Server(TcpWSGIServer):  # type: ignore[misc]
    """The connections of one listening socket."""

    channel_class = Channel
    master = ""

    def maintenance(self, now: float) -> None:
        """Close what is late, and the oldest of too many."""
        waiting = [channel for channel in self.active_channels.values() if not channel.requests]
        waiting.sort(key=lambda channel: channel.creation_time)
        spare = max(0, len(self.active_channels) - COMFORTABLE)
        for place, channel in enumerate(waiting):
            if place < spare or channel.late(time.monotonic(), now - channel.last_activity):
                channel.will_close = True

    @property
    def busy(self) -> bool:
        """Whether a request is being answered, or an answer being sent."""
        return any(channel.requests or channel.total_outbufs_len for channel in self.active_channels.values())


class WebWorker(Worker):  # type: ignore[misc]  # gunicorn has no types
    """A process of gunicorn; `app.config["FIRSTROW_SECRET"]` is the master secret."""

    servers: Sequence[Server] = ()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop soon, not only after the next turn."""
        super().handle_exit(sig, frame)
        for server in self.servers:
            server.pull_trigger()

    def run(self) -> None:
        """Serve until told to stop, then finish what has begun."""
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a queue is what threads are for
        sockets: dict[int, Any] = {}
        self.servers = servers = self._servers(sockets)
        while self.alive and self.ppid == os.getppid():
            self._turn(sockets)
        for server in servers:
            wasyncore.dispatcher.close(server)
        until = time.monotonic() + self.cfg.graceful_timeout - 1
        while any(server.busy for server in servers) and time.monotonic() < until:
            self._turn(sockets)

    def _turn(self, sockets: dict[int, Any]) -> None:
        self.notify()
        wasyncore.loop(timeout=1.0, map=sockets, use_poll=True, count=1)

    def _servers(self, sockets: dict[int, Any]) -> list[Server]:
        pool, adjustments = ThreadedTaskDispatcher(), _adjustments()
        pool.set_thread_count(adjustments.threads)
        servers = []
        for listener in self.sockets:
            info = (listener.family, listener.type, listener.proto, listener.getsockname())
            more = {"dispatcher": pool, "adj": adjustments, "sockinfo": info, "bind_socket": False}
            server = Server(self.wsgi, sockets, True, listener.sock, **more)
            server.master = self.wsgi.config["FIRSTROW_SECRET"]
            servers.append(server)
        return servers


def _adjustments() -> Adjustments:
    return Adjustments(
        threads=THREADS,
        connection_limit=MOST,
        cleanup_interval=1,
        max_request_header_size=HEAD,
        max_request_body_size=1 << 62,  # Parser judges
        recv_bytes=1 << 16,
        outbuf_high_watermark=1 << 40,  # a slow reader's answer waits in a file, not in a thread
        log_socket_errors=False,
        ident=None,
    )
