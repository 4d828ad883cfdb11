"""Masks <-> regions of Label Studio: brush, bitmask and polygon. Alone in knowing percent coordinates.

Maps are at work resolution, regions at the original one. Both ways take the nearest pixel, so a map that went out and
came back is the same map; only polygons are simplified.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backend import decoder
from backend.errors import MaskError
from backend.label_config import MEANS, Control, ProjectConfig
from backend.rle import Ints, decode_rle, encode_changes
from model.classes import IGNORE

#: A pixel that no region covers, and one whose region has a label that is not asked for.
UNLABELLED, FOREIGN = 255, 254
#: More regions than this make the editor slow and help nobody.
MOST_REGIONS = 60
#: Smaller pieces, as a share of the image, of one class share a region.
TINY = 0.0005
#: How far, in pixels, the outline of a polygon may be from the mask's: stairs become lines.
EPSILON = 0.75
#: More pixels than any camera has: refused before memory is taken for them.
MOST_PIXELS = 200_000_000
#: Most regions of one annotation that are read, and points of one polygon: more than people or their tools draw.
MOST_READ, MOST_POINTS = 10_000, 100_000
#: No point of a polygon is further away, in pixels, so that no product of two is too large.
FAR = 1e9
#: Crossings of a polygon's outline with rows that are computed at once: bounds memory.
AT_ONCE = 1_000_000

#: What readers of broken JSON, numbers and pictures raise.
UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    OSError,
    EOFError,
    SyntaxError,
    RuntimeError,
    MemoryError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Region = dict[str, Any]
Mask = NDArray[np.bool_]
Map = NDArray[np.uint8]
Size = tuple[int, int]


def to_mask(result: Sequence[Mapping[str, Any]], control: Control, size: Size, labels: Sequence[str]) -> Map:
    """Draw the regions of one control, later ones over earlier ones.

    Args:
        result: regions of an annotation or prediction; those of other controls do not count.
        control: the control.
        size: (width, height) of the mask that is wanted.
        labels: names; their positions are the mask's values.

    Returns:
        (H, W) position in `labels`, FOREIGN where the region has another label, or UNLABELLED.

    Raises:
        MaskError: a region cannot be read; it names the region.
    """
    drawn = np.full((size[1], size[0]), UNLABELLED, np.uint8)
    for region in of_control(result, control):
        try:
            drawn[read_region(region, control.tag, size)] = position(region, control, labels)
        except UNREADABLE as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
            name = f"region {str(region.get('id'))[:50]} of {control.name!r}"
            raise MaskError(f"{name} cannot be read: {reason[:300]}. Delete or redraw it in Label Studio") from error
    return drawn


def of_control(result: Any, control: Control) -> list[Mapping[str, Any]]:
    """The regions of one control.

    Raises:
        MaskError: the result is no list of regions, or has more than anybody draws.
    """
    if not isinstance(result, list | tuple) or not all(isinstance(region, Mapping) for region in result):
        raise MaskError("the annotation is not a list of regions: delete it in Label Studio")
    regions = [region for region in result if region.get("from_name") == control.name]
    if len(regions) > MOST_READ:
        raise MaskError(f"the annotation has {len(regions)} regions, more than {MOST_READ}: merge or delete some")
    return regions


def position(region: Mapping[str, Any], control: Control, labels: Sequence[str]) -> int:
    """Where the region's label stands in `labels`."""
    names = region["value"].get(control.tag.lower()) or []
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"it has {len(names)} labels instead of one")
    return list(labels).index(names[0]) if names[0] in labels else FOREIGN


def read_region(region: Mapping[str, Any], tag: str, size: Size) -> Mask:
    """(H, W) the pixels of a region, at the size that is wanted."""
    if region.get("image_rotation"):
        raise ValueError("it was drawn on a rotated image")
    value = region["value"]
    if tag == "PolygonLabels":
        if len(value["points"]) > MOST_POINTS:
            raise ValueError(f"it has {len(value['points'])} points, more than {MOST_POINTS}")
        return fill(np.asarray(value["points"], np.float64) / 100 * size, size)
    width, height = int(region["original_width"]), int(region["original_height"])
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise ValueError(f"an image of {width}x{height} pixels")
    if tag == "BrushLabels":
        mask = decode_rle(rle_bytes(value["rle"]), (height, width))
    else:
        mask = decode_png(value["imageDataURL"], (width, height))
    return mask[nearest(size[1], height)][:, nearest(size[0], width)]


def rle_bytes(numbers: Sequence[int]) -> Map:
    """The numbers of a brush region, if they are bytes."""
    if not isinstance(numbers, list):
        raise ValueError("its mask is no list")
    try:
        return np.frombuffer(bytes(numbers), np.uint8)
    except (ValueError, TypeError) as error:
        raise ValueError("its mask is not a list of numbers from 0 to 255") from error


def nearest(wanted: int, given: int) -> Ints:
    """For each of the wanted rows (or columns), the given one under its middle."""
    found: Ints = (2 * np.arange(wanted) + 1) * given // (2 * wanted)
    return found


def decode_png(url: str, size: Size) -> Mask:
    """(H, W) mask of a data URL: what is not transparent, or in an image without transparency what is bright."""
    data = base64.b64decode(url.partition("base64,")[2], validate=True)
    if len(data) < 24 or struct.unpack(">II", data[16:24]) != size:  # before anything is unpacked
        raise ValueError(f"its picture is no PNG of {size[0]}x{size[1]} pixels, as its image is")
    return decoder.resident().mask(data, size)


def fill(points: NDArray[np.float64], size: Size) -> Mask:
    """(H, W) pixels whose middle is inside a polygon, by the even-odd rule.

    Args:
        points: (P, 2) x and y in pixels.
        size: (width, height).
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise ValueError("a polygon needs three points or more, each of two numbers")
    points = np.clip(points, -FAR, FAR)
    start, end = points, np.roll(points, -1, axis=0)
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.clip(np.ceil(low - 0.5), 0, size[1]).astype(np.int64)
    crossed = np.clip(np.ceil(high - 0.5), 0, size[1]).astype(np.int64) - first
    turns = np.zeros((size[1], size[0] + 1), np.int64)
    total = np.cumsum(crossed)
    for part in np.split(np.arange(len(points)), np.flatnonzero(np.diff(total // AT_ONCE)) + 1):
        row, x = crossings(start[part], end[part], first[part], crossed[part])
        column = np.clip(np.ceil(x - 0.5), 0, size[0]).astype(np.int64)
        np.add.at(turns, (row, column), 1)
    inside: Mask = np.cumsum(turns, axis=1)[:, :-1] % 2 == 1
    return inside


def crossings(
    start: NDArray[np.float64], end: NDArray[np.float64], first: Ints, crossed: Ints
) -> tuple[Ints, NDArray[np.float64]]:
    """Where edges cross the middles of rows: the rows, and the places in them.

    Args:
        start: (P, 2) x and y of one end of each edge.
        end: (P, 2) of the other.
        first: (P,) the first row that each crosses.
        crossed: (P,) how many it crosses.
    """
    edge = np.repeat(np.arange(len(start)), crossed)
    row = np.arange(edge.size) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[edge]
    slope = (row + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
    return row, start[edge, 0] + slope * (end[edge, 0] - start[edge, 0])


def coarse_regions(
    clusters: Map, guesses: Sequence[str], config: ProjectConfig, original: Size, scores: Sequence[float]
) -> list[Region]:
    """One region per cluster in the coarse control.

    Args:
        clusters: (H, W) cluster of every pixel.
        guesses: coarse label of each cluster.
        config: the project's controls.
        original: (width, height) of the task's image.
        scores: how sure each guess is, 0..1.

    Raises:
        ValueError: the project has no coarse control.
    """
    if config.coarse is None:
        raise ValueError("the project has no coarse control")
    found = []
    for cluster, (label, score) in enumerate(zip(guesses, scores, strict=True)):
        mask = clusters == cluster
        if mask.any():
            region = write_region(mask, config.coarse, label, original, f"cl{cluster}", score)
            meta = {"text": [f"cluster {cluster}"], "cluster": cluster, MEANS: config.groups}
            found.append({**region, "meta": meta})
    return found


def fine_regions(prediction: Map, confidence: Map, config: ProjectConfig, original: Size) -> list[Region]:
    """A mask as connected pieces in the fine control, largest first; an implicit background gets none.

    Args:
        prediction: (H, W) fine class, IGNORE for none.
        confidence: (H, W) 0..255.
        config: the project's controls and classes.
        original: (width, height) of the task's image.
    """
    implicit = config.background == ""
    seen = np.where(prediction == 0, IGNORE, prediction).astype(np.uint8) if implicit else prediction
    pieces, sizes, owner = label_pieces(seen)
    groups = share(sizes, owner, seen.size, config.fine.tag == "PolygonLabels")
    found = []
    for number, members in enumerate(groups):
        mask = np.isin(pieces, members) if len(members) > 1 else pieces == members[0]
        fine = int(owner[members[0]])
        score = float(confidence[mask].mean()) / 255
        found.append(write_region(mask, config.fine, config.classes.fine[fine], original, f"p{number}_{fine}", score))
    return sorted(found, key=lambda region: -outlined(region))


def outlined(region: Region) -> float:
    """Area inside a polygon, its holes included: what lies in a hole must be drawn later. 0 for other types."""
    return float(cv2.contourArea(np.array(region["value"].get("points", [[0, 0]]), np.float32)))


def label_pieces(seen: Map) -> tuple[NDArray[np.int32], Ints, Ints]:
    """Connected pieces of one class.

    Args:
        seen: (H, W) class, IGNORE for none.

    Returns:
        (H, W) number of the piece, 0 for none; pixels and class of each piece, by number.
    """
    pieces = np.zeros(seen.shape, np.int32)
    owner = [IGNORE]
    for value in np.unique(seen[seen != IGNORE]):
        count, numbers = cv2.connectedComponents((seen == value).astype(np.uint8), connectivity=8)
        here = numbers > 0
        pieces[here] = numbers[here] + len(owner) - 1
        owner += [int(value)] * (count - 1)
    return pieces, np.bincount(pieces.ravel(), minlength=len(owner)), np.array(owner)


def share(sizes: Ints, owner: Ints, pixels: int, alone: bool) -> list[list[int]]:
    """Which pieces make a region together: large ones alone, the rest by class; at most MOST_REGIONS regions.

    Args:
        sizes: (P + 1,) pixels of each piece, first of none.
        owner: (P + 1,) class of each piece.
        pixels: of the image.
        alone: regions cannot have several pieces, so the small ones go.
    """
    order = [int(piece) for piece in np.argsort(-sizes, kind="stable") if piece > 0]
    room = MOST_REGIONS if alone else max(MOST_REGIONS - np.unique(owner[1:]).size, 0)
    large = [piece for piece in order if sizes[piece] >= TINY * pixels][:room]
    if alone:
        return [[piece] for piece in large]
    rest: dict[int, list[int]] = {}
    for piece in order[len(large) :]:
        rest.setdefault(int(owner[piece]), []).append(piece)
    return [[piece] for piece in large] + list(rest.values())


def write_region(mask: Mask, control: Control, label: str, original: Size, name: str, score: float) -> Region:
    """A region of the control's own type, at the original size.

    Args:
        mask: (H, W) at any size.
        control: its tag says the type.
        label: one of its labels.
        original: (width, height) of the task's image.
        name: id, unique within a result.
        score: 0..1.
    """
    kind = control.tag.lower()
    value = {"brushlabels": brush, "bitmasklabels": bitmask, "polygonlabels": polygon}[kind](mask, original)
    return {
        "id": name,
        "from_name": control.name,
        "to_name": control.to_name,
        "type": kind,
        "original_width": original[0],
        "original_height": original[1],
        "image_rotation": 0,
        "score": round(score, 3),
        "value": {**value, kind: [label]},
    }


def brush(mask: Mask, original: Size) -> dict[str, Any]:
    """Brush bytes at the original size, without making the large mask.

    Each row's changes are moved to the original columns and repeated for the original rows.
    """
    width, height = original
    edge = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    row, column = np.nonzero(edge)
    moved = np.searchsorted(nearest(width, mask.shape[1]), np.arange(mask.shape[1] + 1))[column]
    count = np.bincount(row, minlength=mask.shape[0])
    source = nearest(height, mask.shape[0])
    many = count[source]
    at = (
        np.arange(many.sum())
        - np.repeat(np.cumsum(many) - many, many)
        + np.repeat((np.cumsum(count) - count)[source], many)
    )
    changes = moved[at] + np.repeat(np.arange(height) * width, many)
    twice = np.diff(changes, prepend=-1) == 0  # a row ends inside and the next begins inside
    changes = changes[~(twice | np.append(twice[1:], False))]
    return {"format": "rle", "rle": encode_changes(changes, width * height).tolist()}


def bitmask(mask: Mask, original: Size) -> dict[str, Any]:
    """A PNG of white on transparent (black would be painted dark), one bit per pixel."""
    width, height = original
    rows = np.packbits(mask[:, nearest(width, mask.shape[1])], axis=1)
    unfiltered = np.pad(rows, ((0, 0), (1, 0)))[nearest(height, mask.shape[0])]
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0),
        b"PLTE": bytes([0, 0, 0, 255, 255, 255]),
        b"tRNS": bytes([0, 255]),
        b"IDAT": zlib.compress(unfiltered.tobytes(), 6),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items()]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    return {"imageDataURL": "data:image/png;base64," + base64.b64encode(png).decode()}


def polygon(mask: Mask, original: Size) -> dict[str, Any]:
    """The outline of the largest piece of a mask as points in percent; holes are filled."""
    height, width = mask.shape
    # Pixels are doubled so that the two halves of a border pixel tell on which side of it the outline runs.
    double = np.repeat(np.repeat(mask.astype(np.uint8), 2, axis=0), 2, axis=1)
    contours, _ = cv2.findContours(double, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    outline = max(contours, key=cv2.contourArea)
    corners = cv2.approxPolyDP((outline + 1) // 2, EPSILON, True)[:, 0]
    points = corners * 100 / np.array([width, height])
    return {"points": points.tolist(), "closed": True}
