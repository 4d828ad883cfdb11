"""Masks <-> regions. The only place that knows percent coordinates and Label Studio's run lengths."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from backend.errors import MaskError
from backend.label_config import Control, ProjectConfig

#: A pixel without a region.
UNLABELLED = 255
#: Bits of the four run-length fields that Label Studio's format names in its head.
SIZES = np.array([3, 4, 8, 16])
#: Alpha values above this belong to the mask: brush strokes have soft edges.
OPAQUE = 127
#: Pieces below this share of the image share one region per class, and at most this many get one of their own.
SMALL, MOST = 0.001, 40

Map = NDArray[np.uint8]
Size = tuple[int, int]
Region = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A mask to be shown as one region: (H, W) bool at work resolution, label, confidence 0..1."""

    mask: NDArray[np.bool_]
    label: str
    score: float


def encode_rle(mask: NDArray[Any]) -> NDArray[np.uint8]:
    """Label Studio's brush run lengths of a mask, byte for byte as its SDK writes them.

    Args:
        mask: (H, W), not zero where the mask is.

    Returns:
        The bytes: of an RGBA image whose four channels are all 0 or all 255.
    """
    value = (np.asarray(mask).ravel() != 0).astype(np.uint8) * 255
    start = np.concatenate(([0], np.flatnonzero(value[1:] != value[:-1]) + 1))
    length, value = np.diff(np.append(start, value.size)) * 4, value[start]
    parts = -(-length // 65536)  # runs that 16 bits cannot count are split
    owner = np.repeat(np.arange(length.size), parts)
    last = np.append(owner[1:] != owner[:-1], True)
    length, value = np.where(last, length[owner] - (parts[owner] - 1) * 65536, 65536), value[owner]
    size = np.searchsorted(1 << SIZES, length)
    width = 11 + SIZES[size]
    code = ((4 | size) << (SIZES[size] + 8)) | ((length - 1) << 8) | value
    head = int("".join(f"{s - 1:04b}" for s in SIZES), 2) | 7 << 16 | (np.asarray(mask).size * 4) << 21
    return _pack(np.concatenate(([head >> 27, head & (1 << 27) - 1], code)), np.concatenate(([26, 27], width)))


def _pack(codes: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Write codes of up to 27 bits one after another, most significant bit first.

    Each code lies in at most two 32-bit words: it is shifted into a 64-bit window and both halves are summed up.
    """
    end = np.cumsum(widths)
    word, shift = (end - widths) // 32, 64 - (end - widths) % 32 - widths
    window = codes.astype(np.uint64) << shift.astype(np.uint64)
    words = np.zeros(int(end[-1]) // 32 + 2, np.uint64)
    first = np.concatenate(([0], np.flatnonzero(np.diff(word)) + 1))
    words[word[first]] += np.add.reduceat(window >> np.uint64(32), first)
    words[word[first] + 1] += np.add.reduceat(window & np.uint64(0xFFFFFFFF), first)
    size = int(end[-1]) // 8 + 1  # the SDK pads an aligned stream by a whole byte
    return np.frombuffer(words.astype(">u4").tobytes(), np.uint8)[:size]


def decode_rle(rle: Sequence[int] | NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """The mask that brush run lengths say.

    Args:
        rle: bytes.
        shape: height and width.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the bytes are damaged, or of an image of another size.
    """
    data = np.asarray(rle)
    if data.ndim != 1 or data.size < 7 or data.min() < 0 or data.max() > 255:
        raise ValueError("these are not brush run lengths")
    stream = data.astype(np.uint8).tobytes() + bytes(12)
    number = int.from_bytes(stream[:8], "big")
    total, word = number >> 32, (number >> 27 & 31) + 1
    sizes = [(number >> 11 + 4 * (3 - i) & 15) + 1 for i in range(4)]
    if total != shape[0] * shape[1] * 4:
        raise ValueError(f"the run lengths are of {total // 4} pixels, the image has {shape[0] * shape[1]}")
    if word != 8:
        raise ValueError(f"values of {word} bits are not known")
    lengths, values = _runs(stream, total, sizes, data.size * 8)
    pixels = np.diff(np.cumsum(lengths) // 4, prepend=0)  # alphas in each run: every fourth value is one
    return np.repeat(values > OPAQUE, pixels).reshape(shape)


def _runs(stream: bytes, total: int, sizes: list[int], bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Length and value of each run; literals are runs of one."""
    lengths: list[int] = []
    values: list[int] = []
    position, done = 53, 0
    while done < total:
        byte, offset = position >> 3, position & 7
        window = int.from_bytes(stream[byte : byte + 6], "big") << offset & 0xFFFFFFFFFFFF
        size = sizes[window >> 45 & 3]
        length = (window >> 45 - size & (1 << size) - 1) + 1
        position += 3 + size
        if position > bits:
            raise ValueError("the run lengths end too early")
        if window >> 47:
            lengths.append(length)
            values.append(window >> 37 - size & 255)
            position += 8
        else:
            lengths += [1] * length
            values += _literals(stream, position, length)
            position += 8 * length
        done += length
    return np.array(lengths, np.int64), np.array(values, np.uint8)


def _literals(stream: bytes, position: int, length: int) -> list[int]:
    byte, offset = position >> 3, position & 7
    number = int.from_bytes(stream[byte : byte + length + 1].ljust(length + 1, b"\0"), "big")
    whole = number >> 8 - offset & (1 << 8 * length) - 1
    return list(whole.to_bytes(length, "big"))


def to_mask(result: Sequence[Mapping[str, Any]], control: Control, work: Size, labels: Sequence[str]) -> Map:
    """Paint a control's regions, later ones over earlier ones.

    Args:
        result: regions of an annotation or prediction; those of other controls are passed over.
        control: whose regions are meant.
        work: width and height of the map.
        labels: the map's values are positions in this list.

    Returns:
        (H, W) position of the label, UNLABELLED where there is no region.

    Raises:
        MaskError: a region cannot be read, or has a label that is not in the list; names the region.
    """
    painted = np.full((work[1], work[0]), UNLABELLED, np.uint8)
    for region in result:
        if region.get("from_name") != control.name or region.get("type") == "labels":
            continue
        try:
            mask, label = region_mask(region, work), region_label(region)
        except (KeyError, ValueError, TypeError, IndexError, binascii.Error, cv2.error) as error:
            raise MaskError(
                f"region {region.get('id')} of {control.name} cannot be read ({type(error).__name__}: {error}): "
                "delete the region or draw it again"
            ) from error
        if label is not None and label not in labels:
            raise MaskError(f"region {region.get('id')} has the label {label}, which {control.name} does not have now")
        if label is not None:
            painted[mask] = list(labels).index(label)
    return painted


def region_label(region: Mapping[str, Any]) -> str | None:
    """The label of a region; None for a region that nobody has given one."""
    names = region["value"].get(region["type"]) or []
    return str(names[0]) if names else None


def region_mask(region: Mapping[str, Any], work: Size) -> NDArray[np.bool_]:
    """(H, W) where the region is, at work resolution."""
    value, kind = region["value"], region["type"]
    size = (int(region["original_width"]), int(region["original_height"]))
    if kind == "polygonlabels":
        return polygon_mask(value["points"], work)
    if kind == "brushlabels":
        return shrunk(decode_rle(value["rle"], size[::-1]), work)
    if kind == "bitmasklabels":
        return shrunk(bitmask(value["imageDataURL"], size), work)
    raise ValueError(f"regions of type {kind} are not masks")


def bitmask(url: str, size: Size) -> NDArray[np.bool_]:
    """The mask of a PNG data URL: not black and not transparent."""
    data = base64.b64decode(url.partition("base64,")[2], validate=True)
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("the PNG cannot be decoded")
    if image.shape[1::-1] != size:
        raise ValueError(f"the PNG has {image.shape[1]}x{image.shape[0]} pixels, the image {size[0]}x{size[1]}")
    if image.ndim == 2:
        return np.asarray(image > OPAQUE)
    drawn = image[..., :3].max(-1) > 0
    return np.asarray(drawn & (image[..., 3] > OPAQUE) if image.shape[2] == 4 else drawn)


def polygon_mask(points: Sequence[Sequence[float]], work: Size) -> NDArray[np.bool_]:
    """The inside of a polygon given in per cent; sixteenths of a pixel count."""
    corners = np.array(points, np.float64).reshape(-1, 2) / 100 * work
    mask = np.zeros((work[1], work[0]), np.uint8)
    cv2.fillPoly(mask, [np.round((corners - 0.5) * 16).astype(np.int32)], 1, shift=4)
    return mask.astype(bool)


def shrunk(mask: NDArray[np.bool_], work: Size) -> NDArray[np.bool_]:
    """The nearest pixel at work resolution."""
    return resized(mask.astype(np.uint8), work).astype(bool)


def resized(values: Map, size: Size) -> Map:
    """The nearest pixel at another size (width, height)."""
    if values.shape == size[::-1]:
        return values
    return np.asarray(cv2.resize(values, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def coarse_regions(
    clusters: Map, guesses: Sequence[str], config: ProjectConfig, original: Size, scores: Sequence[float]
) -> list[Region]:
    """One brush region per cluster that is in the image, in our coarse control.

    Args:
        clusters: (H, W) cluster map at work resolution.
        guesses: coarse label per cluster.
        config: of the project, with a coarse control.
        original: width and height of the original image.
        scores: how sure each guess is, 0..1.

    Returns:
        Regions whose id and `meta` carry the cluster's number.
    """
    if config.coarse is None:
        return []
    large, found = resized(clusters, original), []
    for cluster, (label, score) in enumerate(zip(guesses, scores, strict=True)):
        here = large == cluster
        if here.any():
            region = brush(here, config.coarse, label, original, f"cl{cluster}_0", score)
            found.append({**region, "meta": {"text": [f"cluster {cluster}"], "cluster": cluster}})
    return found


def fine_regions(
    prediction: Map, confidence: Map, coarse: Map | None, config: ProjectConfig, original: Size
) -> list[Region]:
    """A mask as regions in the project's own control, so that a wrong plant costs one click and one key.

    Args:
        prediction: (H, W) fine class at work resolution, 255 for none.
        confidence: (H, W) 0..255.
        coarse: (H, W) coarse class; pieces are cut where it changes. None cuts nowhere.
        config: of the project.
        original: width and height of the original image.

    Returns:
        Regions, the largest first, each with class and confidence. An implicit background gets none.
    """
    found: list[Region] = []
    for number, piece in enumerate(pieces(prediction, confidence, coarse, config)):
        name = f"fr{number}"
        mask = resized(piece.mask.astype(np.uint8), original).astype(bool)
        if config.fine.tag == "PolygonLabels":
            found += polygons(mask, config.fine, piece, original, name)
        elif config.fine.tag == "BitmaskLabels":
            found.append(bitmask_region(mask, config.fine, piece, original, name))
        else:
            found.append(brush(mask, config.fine, piece.label, original, name, piece.score))
    return found


def pieces(prediction: Map, confidence: Map, coarse: Map | None, config: ProjectConfig) -> list[Piece]:
    """Connected pieces of one class, cut along the coarse classes; small ones of a class together."""
    found: list[tuple[int, Piece]] = []
    for fine, label in enumerate(config.classes.fine):
        if label not in config.fine.labels:
            continue  # the implicit background
        small = np.zeros(prediction.shape, bool)
        parts = sorted(connected(prediction == fine, coarse), key=lambda part: -int(part.sum()))
        for rank, part in enumerate(parts):
            if part.sum() < SMALL * prediction.size or rank >= MOST:
                small |= part
            else:
                found.append((int(part.sum()), piece(part, label, confidence)))
        if small.any():
            found.append((int(small.sum()), piece(small, label, confidence)))
    return [p for _, p in sorted(found, key=lambda sized: -sized[0])]


def connected(mask: NDArray[np.bool_], coarse: Map | None) -> Iterator[NDArray[np.bool_]]:
    """Connected pieces of a mask, cut where `coarse` changes."""
    for value in [None] if coarse is None else np.unique(coarse[mask]):
        here = mask if value is None or coarse is None else mask & (coarse == value)
        count, numbers = cv2.connectedComponents(here.astype(np.uint8), connectivity=8)
        for number in range(1, count):
            yield numbers == number


def piece(mask: NDArray[np.bool_], label: str, confidence: Map) -> Piece:
    """A piece with its mean confidence."""
    return Piece(mask, label, round(float(confidence[mask].mean()) / 255, 3))


def region(control: Control, value: Region, original: Size, name: str, score: float) -> Region:
    """A region of a control, as Label Studio stores it."""
    return {
        "id": name,
        "from_name": control.name,
        "to_name": control.to_name,
        "type": control.tag.lower(),
        "score": round(float(score), 3),
        "original_width": original[0],
        "original_height": original[1],
        "image_rotation": 0,
        "value": value,
    }


def brush(mask: NDArray[np.bool_], control: Control, label: str, original: Size, name: str, score: float) -> Region:
    """A brush region."""
    value = {"format": "rle", "rle": encode_rle(mask).tolist(), "brushlabels": [label]}
    return region(control, value, original, name, score)


def bitmask_region(mask: NDArray[np.bool_], control: Control, piece: Piece, original: Size, name: str) -> Region:
    """A bitmask region: a PNG whose alpha is the mask."""
    rgba = np.repeat((mask.astype(np.uint8) * 255)[..., None], 4, axis=2)
    data = base64.b64encode(cv2.imencode(".png", rgba)[1].tobytes()).decode()
    value = {"imageDataURL": f"data:image/png;base64,{data}", "bitmasklabels": [piece.label]}
    return region(control, value, original, name, piece.score)


def polygons(mask: NDArray[np.bool_], control: Control, piece: Piece, original: Size, name: str) -> Iterator[Region]:
    """One polygon per connected part, through the pixels' corners of its outline.

    A polygon has no holes: what lies in one is a smaller piece of another class, painted later.
    """
    large = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    outlines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    for number, outline in enumerate(outlines):
        # At twice the size a pixel's outer corners lie half a (small) pixel outside of its border pixels.
        corners = cv2.approxPolyDP(outline, 0.5, True).reshape(-1, 2) / 2 + 0.25
        if len(corners) >= 3:
            points = (corners / original * 100).round(4).tolist()
            value = {"points": points, "closed": True, "polygonlabels": [piece.label]}
            yield region(control, value, original, f"{name}_{number}", piece.score)
