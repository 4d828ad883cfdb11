"""What every job needs: settings, store, board, Label Studio, images. Built once per process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.enqueue import Board
from backend.images import ImageCache
from backend.labelstudio import LabelStudio
from backend.project import Project
from backend.settings import Settings
from backend.store import Store


@dataclass(frozen=True)
class Context:
    """The doors to the outside, one each."""

    settings: Settings
    store: Store
    board: Board
    studio: LabelStudio

    def project(self, project: int) -> Project:
        """The store's folder of a project."""
        return Project(self.store, project)

    def images(self, project: int) -> ImageCache:
        """Images of a project at work resolution; only the operator's environment allows hosts."""
        return ImageCache(
            Path(self.settings.cache) / f"{self.settings.image_size}",
            limit_bytes=int(self.settings.cache_gb * 1e9),
            studio=self.studio,
            size=self.settings.image_size,
            allowed_hosts=self.settings.allowed_hosts,
        )


def connect(settings: Settings, **patience: Any) -> Context:
    """Open the doors that `settings` names, with this `patience` with Label Studio; nothing is contacted yet."""
    key = settings.label_studio_api_key.get_secret_value()
    studio = LabelStudio(settings.label_studio_url, key, **patience)
    return Context(settings, Store(settings.store), Board(settings.redis_url), studio)


@lru_cache(maxsize=1)
def context() -> Context:
    """The context of this worker process, from the environment."""
    return connect(Settings.read())
