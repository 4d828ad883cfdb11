"""Bodies of Label Studio's requests -> the few fields that we read.

Everything else (masks, drafts, meta data) is skipped without being built: a body costs its own size in memory, not the
twenty to sixty times as much that lists and dictionaries of it would take.
"""

from __future__ import annotations

import threading
from typing import Any

import msgspec

from backend.errors import FirstRowError

#: Rows (tasks, annotations) in one request. Label Studio sends the tasks of a whole project at once.
MOST_ROWS = 250_000
#: Bytes above which bodies are read one at a time.
LARGE = 1 << 20

Scalar = int | float | str | bool | None
_counted = threading.local()
_one_at_a_time = threading.Lock()


class PayloadError(FirstRowError):
    """A body that Label Studio would not send."""


class Row(msgspec.Struct, gc=False):
    """A task, an annotation or a project: an object with an id."""

    id: Scalar | msgspec.UnsetType = msgspec.UNSET
    task: Scalar | msgspec.UnsetType = msgspec.UNSET
    label_config: str | msgspec.UnsetType | None = msgspec.UNSET
    skip_queue: str | msgspec.UnsetType | None = msgspec.UNSET

    def __post_init__(self) -> None:
        _counted.rows = _counted.rows + 1
        if _counted.rows > MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS} tasks or annotations in one request")


One = Scalar | Row | msgspec.UnsetType
Many = list[Row | None] | Scalar | Row | msgspec.UnsetType


class Body(msgspec.Struct):
    """What we read of any request."""

    action: str | msgspec.UnsetType = msgspec.UNSET
    project: One = msgspec.UNSET
    task: One = msgspec.UNSET
    tasks: Many = msgspec.UNSET
    annotation: Many = msgspec.UNSET
    annotations: Many = msgspec.UNSET
    job: One = msgspec.UNSET


class Saved(msgspec.Struct):
    """The regions of an annotation, as text: built only where somebody asks for them; and when it was saved."""

    result: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    updated_at: str = ""


class Update(msgspec.Struct):
    """What we read of an annotation that was updated."""

    annotation: Saved | msgspec.UnsetType = msgspec.UNSET


_decoder, _update_decoder = msgspec.json.Decoder(Body), msgspec.json.Decoder(Update)


def decode(body: bytes) -> dict[str, Any]:
    """The fields that we read, as dictionaries and lists; those that are missing stay missing.

    The regions of an updated annotation stay text: its `result` is bytes of JSON.

    Raises:
        PayloadError: not JSON, not an object, or a field has the wrong form.
    """
    _counted.rows = 0
    try:
        fields = dict(msgspec.to_builtins(_decoder.decode(body)))
        if fields.get("action") == "ANNOTATION_UPDATED" and isinstance(fields.get("annotation"), dict):
            saved = _update_decoder.decode(body).annotation
            if isinstance(saved, Saved) and isinstance(saved.result, msgspec.Raw):
                fields["annotation"] |= {"result": bytes(saved.result), "updated_at": saved.updated_at}
        return fields
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PayloadError(f"the body is not an object as Label Studio sends it: {str(error)[:120]}") from error


def reading(size: int | None) -> threading.Lock | None:
    """What to hold while a body of this many bytes is read; None for small ones."""
    return None if size is not None and size <= LARGE else _one_at_a_time
