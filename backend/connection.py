"""What ties a project to us: our ML backend, webhook and tab, and the note that we keep in Label Studio."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from backend.errors import AttachRefused, NotAttached
from backend.labelstudio import LabelStudio, Row
from backend.settings import Settings

#: Key of our note in the `extra_params` of our ML backend; kept there, it survives the loss of our store.
NOTE = "firstrow"
#: Header by which we know that a webhook call comes from our Label Studio.
SECRET_HEADER = "X-First-Row-Secret"  # noqa: S105  (its name)
#: User name that goes with the secret where Label Studio uses Basic auth.
USER = "firstrow"
#: Title of our ML backend before the first round; each round counts on.
FIRST_TITLE = "first-row-0"
#: Title of our Data Manager tab.
TAB = "First Row"
#: What the first `ordering` entry of our tab is.
BY_SCORE = "tasks:predictions_score"
#: How often a note is written before we give up.
TRIES = 8
#: Versions of our rank predictions and of our prelabels; a number above the highest is somebody else's.
OURS = re.compile(r"(first-row|seg)-[0-9]{1,10}")
HIGHEST = 10**9

#: Project settings that make Label Studio serve the lowest score first, and ask us only for the task it serves.
FLAGS = {
    "sampling": "Uncertainty sampling",
    "show_collab_predictions": True,
    "evaluate_predictions_automatically": False,
}


def our_backend(studio: LabelStudio, project: int, settings: Settings) -> Row | None:
    """Our ML backend in a project: the one that carries our note, else the one at our address; None without one."""
    return ours_among(studio.ml_backends(project), settings)


def need_backend(studio: LabelStudio, project: int, settings: Settings) -> Row:
    """Our ML backend in a project.

    Raises:
        NotAttached: there is none; nothing of the project may be changed then.
    """
    ours = our_backend(studio, project, settings)
    if ours is None:
        raise NotAttached(
            f"project {project} has no ML backend at {settings.url}: run `firstrow attach --project {project}`, or "
            f"`firstrow detach --project {project}` to undo what is left of us"
        )
    return ours


def ours_among(rows: Sequence[Row], settings: Settings) -> Row | None:
    """Our ML backend among those of a project; None without one."""
    noted = [row for row in rows if isinstance(row["extra_params"], Mapping) and NOTE in row["extra_params"]]
    return next(iter(noted + [row for row in rows if same_url(row["url"], settings.url)]), None)


def recorded(studio: LabelStudio, project: int, settings: Settings) -> dict[str, Any]:
    """Our note about a project, empty if `attach` never ran: see `is_noted`."""
    return note_of(our_backend(studio, project, settings))


def note_of(backend: Row | None) -> dict[str, Any]:
    """The note in one of the rows of `ml_backends`; without what is not of the form that `attach` writes.

    Any member of the organisation may write there.
    """
    extra = (backend or {}).get("extra_params")
    note = extra.get(NOTE) if isinstance(extra, Mapping) else None
    good = {name: value for name, value in note.items() if is_noted(name, value)} if isinstance(note, Mapping) else {}
    if "before" in good:
        good["before"] = {part: value for part, value in good["before"].items() if BEFORE.get(part, never)(value)}
    return good


def never(_: object) -> bool:
    """No value is of the right form."""
    return False


def is_noted(name: str, value: object) -> bool:
    """Whether a part of a note has the form that `attach` writes."""
    if name == "keeper":
        return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
    if name == "before":
        return isinstance(value, Mapping) and isinstance(value.get("label_config"), str)
    if name in ("groups", "meant"):
        return isinstance(value, Mapping) and all(all_of(str, members) for members in value.values())
    return name in ("config", "background") and isinstance(value, str | None)


def all_of(kind: type, value: object) -> bool:
    """Whether this is a list of such things."""
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


#: What a note says of the project before us, and which values are of the right form.
BEFORE: dict[str, Callable[[object], bool]] = {
    "label_config": lambda value: isinstance(value, str),
    "model_version": lambda value: isinstance(value, str),
    "views": lambda value: all_of(int, value),
    "versions": lambda value: all_of(str, value),
    "sampling": lambda value: isinstance(value, str),
    "show_collab_predictions": lambda value: isinstance(value, bool),
    "evaluate_predictions_automatically": lambda value: isinstance(value, bool),
}


def write_note(
    studio: LabelStudio, project: int, settings: Settings, note: Mapping[str, Any], **fields: object
) -> None:
    """Write our note, and other fields of our ML backend, until they are there.

    Label Studio saves all of an ML backend whenever it has asked for its health, as it was before it asked: a note that
    is written meanwhile is lost.

    Raises:
        AttachRefused: our ML backend is gone, or the note is lost again and again.
    """
    for _ in range(TRIES):
        ours = our_backend(studio, project, settings)
        if ours is None:
            raise AttachRefused(f"the ML backend of project {project} is gone: run `firstrow attach` again")
        extra = ours["extra_params"] if isinstance(ours["extra_params"], Mapping) else {}
        studio.patch_ml(
            ours["id"], **credentials(settings, project), **fields, extra_params={**extra, NOTE: dict(note)}
        )
        if note_of(our_backend(studio, project, settings)) == note:
            return
    raise AttachRefused(f"Label Studio loses what we note in the ML backend of project {project}: attach again")


def credentials(settings: Settings, project: int) -> dict[str, Any]:
    """What every change of our ML backend must carry: Label Studio checks it by calling us with exactly this."""
    return {
        "url": settings.url,
        "project": project,
        "auth_method": "BASIC_AUTH",
        "basic_auth_user": USER,
        "basic_auth_pass": settings.project_secret(project),
    }


def our_webhooks(studio: LabelStudio, project: int, urls: Iterable[str]) -> list[Row]:
    """Webhooks that call one of these backend addresses."""
    wanted = {webhook_url(url) for url in urls}
    return [row for row in studio.webhooks(project) if row["url"] in wanted]


def webhook_url(url: str) -> str:
    """Where events of a backend at `url` go; Label Studio makes up the same address."""
    return url.rstrip("/") + "/webhook"


def our_tabs(studio: LabelStudio, project: int, before: Sequence[int]) -> list[Row]:
    """Data Manager tabs named like ours that were not there `before` we came."""
    return [v for v in studio.views(project) if v["data"].get("title") == TAB and v["id"] not in before]


def same_url(one: str, other: str) -> bool:
    """Whether two backend addresses are the same but for a final slash."""
    return one.rstrip("/") == other.rstrip("/")


def digest(label_config: str) -> str:
    """Tells whether anybody has changed a label config since."""
    return hashlib.sha256(label_config.encode()).hexdigest()


def keeper_address(project: int) -> str:
    """Address of the account that keeps coarse labels which are set aside; nobody can get mail there, or log in."""
    return f"first-row-{project}@firstrow.invalid"


def keeper_account(studio: LabelStudio, project: int) -> int:
    """Id of a project's keeper account; 0 without one."""
    rows = [row["id"] for row in studio.users() if row["email"] == keeper_address(project)]
    return int(rows[0]) if rows else 0
