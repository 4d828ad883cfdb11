"""Projects that ask for the first time are remembered once Label Studio confirms that they point to us."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence

from redis import RedisError

from backend.connection import same_url
from backend.context import Context, connect
from backend.errors import LabelStudioError

log = logging.getLogger(__name__)

#: Seconds after which Label Studio is asked: while it connects us it does not list the connection yet.
ASK_AFTER: Sequence[float] = (0.5, 3.0, 15.0)
#: Projects that are looked up at the same time, and seconds before one is looked up again.
MOST, AGAIN = 8, 60.0
#: Look-ups that are remembered: any number can be named in a request without a secret.
REMEMBERED = 1000


class Welcome:
    """Looks new projects up in Label Studio, in the background: it asks us while it answers.

    Args:
        where: settings and board.
        ask_after: seconds before each attempt.
    """

    def __init__(self, where: Context, ask_after: Sequence[float] = ASK_AFTER) -> None:
        self.where, self.ask_after = where, ask_after
        self._lock = threading.Lock()
        self._asking: set[int] = set()
        self._asked: dict[int, float] = {}

    def look_up(self, project: int) -> None:
        """Begin to look a project up, unless that is under way or has just been done in vain."""
        now = time.monotonic()
        with self._lock:
            recent = now - self._asked.get(project, -AGAIN) < AGAIN
            if project in self._asking or recent or len(self._asking) >= MOST:
                return
            if len(self._asked) >= REMEMBERED:
                self._asked.clear()
            self._asked[project] = now
            self._asking.add(project)
        threading.Thread(target=self._run, args=(project,), daemon=True).start()

    def _run(self, project: int) -> None:
        try:
            if self._confirmed(project):
                self._register(project)
        except RedisError as error:
            log.error("project %d: Redis does not answer (%s); it is not remembered", project, type(error).__name__)
        finally:
            with self._lock:
                self._asking.discard(project)

    def _confirmed(self, project: int) -> bool:
        url, why = self.where.settings.url, ""
        for seconds in self.ask_after:
            time.sleep(seconds)
            try:
                # A door of its own: this is another thread.
                rows = connect(self.where.settings).studio.ml_backends(project)
            except LabelStudioError as error:
                why = str(error)
                continue
            if any(same_url(str(row["url"]), url) for row in rows):
                return True
            why = f"Label Studio has no ML backend at {url} there: connect it at this address, or set FIRSTROW_URL"
        log.warning("project %d asked for the first time and is not remembered: %s", project, why)
        return False

    def _register(self, project: int) -> None:
        if self.where.board.stopped(project):
            log.warning(
                "project %d is being detached: only `firstrow attach --project %d` takes it up", project, project
            )
            return
        log.warning(
            "project %d is new; `firstrow attach --project %d --dry-run` says what it still lacks", project, project
        )
        self.where.board.register(project)
        self.where.board.reconcile(project)
