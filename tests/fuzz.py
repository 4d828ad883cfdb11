"""Give damaged things to what reads them, many more than the suite does: `python -m tests.fuzz pictures --count 40000`.

Prints how many were read, refused as they should be, or raised what nobody foresaw; the slowest, the largest memory.
"""

from __future__ import annotations

import argparse
import atexit
import io
import json
import logging
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from flask.testing import FlaskClient
from PIL import Image, features

from backend.connection import SECRET_HEADER
from backend.embedded import start_redis
from backend.errors import ConfigError, MaskError
from backend.label_config import Control, parse
from backend.regions import bitmask, brush, polygon, to_mask
from backend.rle import decode_rle, encode_rle
from backend.settings import Settings
from model.data import ImageError, decode, original_size

LABELS = ("soil", "crop")
TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels")
#: Values that readers of JSON do not expect.
ODD = (None, True, -1, 0, 2**31, 2**70, 1e308, float("nan"), float("inf"), "", "x", [], {}, [[[]]], [[1, 2]], "\ud800")
#: Pieces that label configs are made of.
WORDS = (
    "<View>", "</View>", '<Image name="i" value="$image"/>', '<BrushLabels name="s" toName="i">', "</BrushLabels>",
    '<Label value="soil"/>', '<Label value="crop" alias="c" hotkey="1"/>', '<PolygonLabels name="coarse" toName="i">',
    "</PolygonLabels>", '<Label value="Plant" classes="crop,soil"/>', "<!DOCTYPE x>", "<!--", "-->", "<![CDATA[",
    "&amp;", "&x;", "\0", "\ud800", "é", " ", ">", "<", '"', '<Label value=""/>', '<Label value="Mixed"/>', "<?xml?>",
    "\n",
)  # fmt: skip


def pictures() -> list[bytes]:
    """Small pictures of every format that is read, in several of its variants."""
    y, x = np.mgrid[:32, :48]
    image = Image.fromarray(np.stack([x * 5, y * 7, (x + y) * 3], -1).astype(np.uint8))
    deep = Image.fromarray((x * 1300).astype(np.uint16))
    exif = Image.Exif()
    exif[274] = 6
    how: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (image, "JPEG", {"exif": exif}),
        (image, "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {"exif": exif}),
        (image.convert("P"), "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (image, "WEBP", {"exif": exif}),
        (image, "WEBP", {"lossless": True}),
        *((image, "TIFF", {"compression": kind}) for kind in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate")),
        (deep, "TIFF", {}),
        (image.convert("1"), "TIFF", {"compression": "group4"}),
        (image, "BMP", {}),
        (image.convert("P"), "GIF", {"save_all": True, "append_images": [image.rotate(90).convert("P")]}),
        *([(image, "AVIF", {})] if features.check("avif") else []),
    ]
    return [saved(*each) for each in how]


def saved(image: Image.Image, kind: str, options: Mapping[str, Any]) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Bytes with a few of them changed, lost, doubled or cut off."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at, length = dice.randrange(len(found) + 1), dice.choice((1, 2, 4, 8))
        match dice.randrange(6):
            case 0:
                found[at : at + 1] = bytes([dice.randrange(256)])
            case 1:
                found[at : at + length] = dice.choice((b"\0", b"\xff", b"\x7f", b"\x80")) * length
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = found[at : at + 8 * length]
            case 4:
                found[at : at + length] = dice.randbytes(length)
            case _:
                if dice.random() < 0.3:
                    del found[at:]
    return bytes(found)


def read_picture(dice: random.Random, bases: list[bytes]) -> None:
    """Decode a damaged picture."""
    data = damaged(dice.choice(bases), dice)
    original_size(data)
    decode(data, 64)


def read_rle(dice: random.Random, bases: list[bytes]) -> None:
    """Decode damaged brush bytes."""
    decode_rle(np.frombuffer(damaged(dice.choice(bases), dice), np.uint8), (32, 48))


def brushes() -> list[bytes]:
    """Brush bytes of a few masks."""
    rng = np.random.default_rng(0)
    return [encode_rle(rng.random((32, 48)) < share).tobytes() for share in (0.0, 0.02, 0.5, 1.0)]


def regions() -> list[bytes]:
    """Regions of every type, as JSON."""
    mask = np.zeros((32, 48), bool)
    mask[5:20, 8:30] = True
    found = []
    for tag, draw in zip(TAGS, (brush, bitmask, polygon), strict=True):
        kind = tag.lower()
        value = {**draw(mask, (48, 32)), kind: ["crop"]}
        region = {"id": "r", "from_name": "seg", "to_name": "i", "type": kind, "value": value}
        found.append(json.dumps([{**region, "original_width": 48, "original_height": 32}]).encode())
    return found


def read_region(dice: random.Random, bases: list[bytes]) -> None:
    """Draw a damaged annotation."""
    result: Any = json.loads(dice.choice(bases))
    for _ in range(dice.choice((1, 1, 2, 3))):
        result = odd(result, dice)
    control = Control("seg", dice.choice(TAGS), "i", LABELS)
    to_mask(result, control, (24, 16), LABELS)


def odd(value: Any, dice: random.Random) -> Any:
    """JSON of which one place has another value."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice(list(value))
        return {**value, key: odd(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.9:
        at = dice.randrange(len(value))
        return [*value[:at], odd(value[at], dice), *value[at + 1 :]]
    if isinstance(value, str) and value and dice.random() < 0.5:
        return damaged(value.encode("utf-8", "surrogatepass"), dice).decode("latin-1")
    return dice.choice(ODD)


def read_config(dice: random.Random, bases: list[bytes]) -> None:
    """Understand a damaged label config."""
    if dice.random() < 0.5:
        parse(damaged(dice.choice(bases), dice).decode("utf-8", dice.choice(("replace", "surrogateescape"))))
    else:
        parse("".join(dice.choice(WORDS) for _ in range(dice.randrange(30))))


def configs() -> list[bytes]:
    """Label configs."""
    inner = '<Label value="soil"/><Label value="crop" alias="c"/><Label value="weed"/>'
    fine = f'<BrushLabels name="s" toName="i">{inner}</BrushLabels>'
    coarse = (
        '<BrushLabels name="coarse" toName="i"><Label value="Ground" classes="soil"/>'
        '<Label value="Plant" classes="c,weed"/></BrushLabels>'
    )
    image = '<Image name="i" value="$image"/>'
    return [f"<View>{image}{fine}</View>".encode(), f"<View>{image}{coarse}{fine}</View>".encode()]


class RefusedError(Exception):
    """An answer of 400 or 403: as it should be."""


@lru_cache(maxsize=1)
def client() -> tuple[FlaskClient, dict[str, str]]:
    """The app on a real Redis, without a server around it, and the headers of project 22."""
    from backend.app import create_app  # here: it takes seconds

    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    settings = Settings.read({
        "LABEL_STUDIO_URL": "http://127.0.0.1:9",
        "LABEL_STUDIO_API_KEY": "0" * 40,
        "REDIS_URL": stack.enter_context(start_redis(folder)),
        "FIRSTROW_STORE": str(folder / "store"),
        "FIRSTROW_SECRET": "fuzz",
    })  # fmt: skip
    return create_app(settings).test_client(), {SECRET_HEADER: settings.project_secret(22)}


def asker(path: str) -> Callable[[random.Random, list[bytes]], None]:
    """Sends damaged JSON to a route; what is answered otherwise than with 200, 201, 400 or 403 is raised by status."""

    def ask(dice: random.Random, bases: list[bytes]) -> None:
        body = dice.choice(bases)
        if dice.random() < 0.2:
            body = damaged(body, dice)
        else:
            for _ in range(dice.choice((1, 1, 2, 3))):
                body = json.dumps(odd(json.loads(body), dice)).encode()
        door, headers = client()
        status = door.post(path, data=body, content_type="application/json", headers=headers).status_code
        if status in (400, 403):
            raise RefusedError
        if status not in (200, 201):
            raise type(f"Answer{status}", (Exception,), {})

    return ask


def webhooks() -> list[bytes]:
    """Events as Label Studio sends them."""
    annotation = {"id": 5, "task": 31, "result": json.loads(regions()[0]), "completed_by": 1}
    rows: dict[str, dict[str, Any]] = {
        "ANNOTATION_CREATED": {"task": {"id": 31, "data": {}}, "annotation": annotation},
        "ANNOTATION_UPDATED": {"task": {"id": 31, "data": {}}, "annotation": annotation},
        "ANNOTATIONS_CREATED": {"task": [{"id": 31}, {"id": 32}], "annotation": [annotation]},
        "ANNOTATIONS_DELETED": {"annotations": [{"id": 5}, {"id": 6}]},
        "TASKS_CREATED": {"tasks": [{"id": 31}, {"id": 32}]},
        "TASKS_DELETED": {"tasks": [{"id": 31}]},
        "PROJECT_UPDATED": {},
        "START_TRAINING": {},
    }
    project = {"id": 22, "label_config": "<View/>"}
    return [json.dumps({"action": action, "project": project, **row}).encode() for action, row in rows.items()]


def predicts() -> list[bytes]:
    """Questions for prelabels as Label Studio asks them."""
    task = {"id": 31, "project": 22, "data": {"image": "/a.jpg"}, "annotations": [], "predictions": []}
    more = {"label_config": "<View/>", "params": {"login": None, "password": None, "context": None}}
    one, many = [task], [{**task, "id": number} for number in range(30)]
    return [json.dumps({"project": "22.1795345419", "tasks": tasks, **more}).encode() for tasks in (one, many)]


Target = tuple[Callable[[], list[bytes]], Callable[[random.Random, list[bytes]], None], tuple[type[Exception], ...]]
TARGETS: dict[str, Target] = {
    "pictures": (pictures, read_picture, (ImageError,)),
    "rles": (brushes, read_rle, (ValueError,)),
    "regions": (regions, read_region, (MaskError,)),
    "configs": (configs, read_config, (ConfigError,)),
    "webhooks": (webhooks, asker("/webhook"), (RefusedError,)),
    "predicts": (predicts, asker("/predict"), (RefusedError,)),
}


def run(name: str, count: int, seed: int) -> bool:
    """Read so many damaged things; whether all were read or refused."""
    make, read, refusals = TARGETS[name]
    bases, uncaught, refused, slowest = make(), Counter[str](), 0, (0.0, 0)
    for number in range(count):
        start = time.perf_counter()
        try:
            read(random.Random(f"{seed}:{number}"), bases)
        except refusals:
            refused += 1
        except Exception as error:  # what is counted here
            uncaught[type(error).__name__] += 1
        slowest = max(slowest, (time.perf_counter() - start, number))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kinds = ", ".join(f"{kind} {times}" for kind, times in uncaught.most_common()) or "nothing"
    sys.stdout.write(
        f"{name}: {count} damaged, {count - refused - uncaught.total()} read, {refused} refused, "
        f"{uncaught.total()} raised what nobody catches ({kinds}); slowest {slowest[0]:.3f} s (number {slowest[1]}), "
        f"largest memory of the process {memory:.0f} MB\n"
    )
    return not uncaught


def main() -> int:
    """The exit status: 0 when nothing uncaught was raised."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)} (default: all)")
    parser.add_argument("--count", type=int, default=2000, help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    good = [run(name, given.count, given.seed) for name in given.targets]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
