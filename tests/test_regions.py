"""Masks come back from regions as they went, whoever wrote the regions."""

from __future__ import annotations

import base64
import json
import struct
import time
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import cv2
import numpy as np
import pytest
from label_studio_sdk.converter.brush import decode_rle as sdk_decode
from label_studio_sdk.converter.brush import mask2rle
from numpy.typing import NDArray
from PIL import Image

from backend.errors import MaskError
from backend.label_config import ProjectConfig, parse, with_coarse
from backend.regions import (
    MOST_POINTS,
    MOST_READ,
    MOST_REGIONS,
    UNLABELLED,
    coarse_regions,
    fine_regions,
    to_mask,
    write_region,
)
from backend.rle import decode_rle, encode_rle

Map = NDArray[np.uint8]
TAGS = ("BrushLabels", "BitmaskLabels", "PolygonLabels")
#: Work size and original size, (width, height); the last is not a whole multiple, and turned.
SIZES = [((64, 48), (64, 48)), ((64, 48), (1296, 966)), ((37, 60), (371, 599))]


def config_of(tag: str, labels: tuple[str, ...] = ("soil", "crop", "weed")) -> ProjectConfig:
    inside = "".join(f'<Label value="{label}"/>' for label in labels)
    xml = f'<View><Image name="i" value="$image"/><{tag} name="seg" toName="i">{inside}</{tag}></View>'
    return parse(with_coarse(xml, parse(xml).classes))


def blobs(size: tuple[int, int], kinds: int, seed: int, scale: float = 4) -> Map:
    rng = np.random.default_rng(seed)
    fields = [cv2.GaussianBlur(rng.random(size[::-1]).astype(np.float32), (0, 0), scale) for _ in range(kinds)]
    return np.asarray(np.argmax(fields, axis=0), np.uint8)


def sure(mask: Map, value: int = 255) -> Map:
    return np.full(mask.shape, value, np.uint8)


# brush bytes


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (2, 3), (7, 5), (33, 64), (300, 400)])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_brush_bytes_are_those_of_the_sdk(shape: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(0).random(shape) < share
    mine = encode_rle(mask)
    assert mine.tolist() == list(mask2rle(mask.astype(np.uint8) * 255))  # type: ignore[no-untyped-call]
    np.testing.assert_array_equal(decode_rle(mine, shape), mask)


def test_literals_and_half_transparent_edges_are_read() -> None:
    values = np.random.default_rng(1).integers(0, 256, 96)
    values[50:60] = 200
    literals = [
        f"010{n - 1:08b}" + "".join(f"{v:08b}" for v in part) for n, part in ((50, values[:50]), (36, values[60:]))
    ]
    bits = f"{96:032b}{7:05b}0010001101111111{literals[0]}101{9:04b}{200:08b}{literals[1]}"
    bits += "0" * (-len(bits) % 8)
    rle = np.array([int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)], np.uint8)
    np.testing.assert_array_equal(sdk_decode(rle.tolist()), values)
    np.testing.assert_array_equal(decode_rle(rle, (4, 6)).ravel(), values[3::4] > 127)


def test_every_cut_of_brush_bytes_is_noticed() -> None:
    rle = encode_rle(blobs((40, 30), 2, 0) == 1)
    for length in range(rle.size - 2):
        with pytest.raises(ValueError, match="brush mask"):
            decode_rle(rle[:length], (30, 40))


# there and back


@pytest.mark.parametrize(("work", "original"), SIZES)
@pytest.mark.parametrize("tag", TAGS[:2])
def test_masks_come_back_exactly(tag: str, work: tuple[int, int], original: tuple[int, int]) -> None:
    config = config_of(tag)
    mask = blobs(work, 3, 2)
    mask[:5, :9] = UNLABELLED
    result = fine_regions(mask, sure(mask), config, original)
    np.testing.assert_array_equal(to_mask(result, config.fine, work, config.classes.fine), mask)
    rows = (2 * np.arange(original[1]) + 1) * work[1] // (2 * original[1])
    columns = (2 * np.arange(original[0]) + 1) * work[0] // (2 * original[0])
    large = to_mask(result, config.fine, original, config.classes.fine)
    np.testing.assert_array_equal(large, mask[rows][:, columns])


@pytest.mark.parametrize(("work", "original"), SIZES)
def test_brush_regions_at_the_original_size_are_those_of_the_sdk(
    work: tuple[int, int], original: tuple[int, int]
) -> None:
    config = config_of("BrushLabels")
    mask = blobs(work, 2, 4) == 1
    region = write_region(mask, config.fine, "crop", original, "a", 1.0)
    large = to_mask([region], config.fine, original, ["crop"]) == 0
    assert region["value"]["rle"] == list(mask2rle(large.astype(np.uint8) * 255))  # type: ignore[no-untyped-call]


def test_polygons_keep_what_lies_in_holes() -> None:
    config = config_of("PolygonLabels")
    yards = np.hypot(*np.mgrid[-60:60, -80:80])
    mask = np.select([yards < 20, yards < 24, yards < 50], [2, 0, 1], 0).astype(np.uint8)  # thin ring in a thick one
    result = fine_regions(mask, sure(mask), config, (1600, 1200))
    back = to_mask(result, config.fine, (160, 120), config.classes.fine)
    assert (back == mask).mean() > 0.99
    assert all(0 <= value <= 100 for region in result for point in region["value"]["points"] for value in point)
    assert max(len(region["value"]["points"]) for region in result) < 100


def test_a_rectangle_is_a_polygon_of_four_points() -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:5, 4:10] = True
    config = config_of("PolygonLabels")
    region = write_region(mask, config.fine, "crop", (200, 100), "a", 1.0)
    assert sorted(region["value"]["points"]) == [[20.0, 20.0], [20.0, 50.0], [50.0, 20.0], [50.0, 50.0]]
    np.testing.assert_array_equal(to_mask([region], config.fine, (20, 10), ["crop"]) == 0, mask)


def test_pictures_of_the_sdk_and_of_browsers_are_read() -> None:
    config = config_of("BitmaskLabels")
    mask = blobs((64, 48), 2, 5) == 1
    grey = mask.astype(np.uint8) * 255
    region = write_region(mask, config.fine, "crop", (64, 48), "a", 1.0)
    for picture in (Image.fromarray(grey), Image.fromarray(np.stack([grey * 0, grey * 0, grey * 0, grey], axis=2))):
        file = BytesIO()
        picture.save(file, "PNG")
        region["value"]["imageDataURL"] = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        np.testing.assert_array_equal(to_mask([region], config.fine, (64, 48), ["crop"]) == 0, mask)


# what people see


@pytest.mark.parametrize("tag", TAGS)
def test_few_regions_with_their_own_names_even_for_speckles(tag: str) -> None:
    config = config_of(tag)
    mask = np.random.default_rng(6).integers(0, 3, (200, 300), np.uint8)
    mask[:100] = blobs((300, 100), 3, 6)
    result = fine_regions(mask, sure(mask), config, (300, 200))
    assert 1 < len(result) <= MOST_REGIONS
    assert len({region["id"] for region in result}) == len(result)
    json.dumps(result)


def test_pieces_are_connected_and_scored() -> None:
    config = config_of("BrushLabels")
    mask = np.zeros((20, 40), np.uint8)
    mask[5:15, 5:15] = mask[5:15, 20:38] = 1
    confidence = sure(mask, 51)
    confidence[:, 29:] = 255
    result = fine_regions(mask, confidence, config, (40, 20))
    crops = [region for region in result if region["value"]["brushlabels"] == ["crop"]]
    assert [region["score"] for region in crops] == [pytest.approx(0.6), 0.2]  # the larger one first
    assert len(result) == 3


def test_tiny_pieces_of_a_class_share_a_region() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[10:90:10, 10:90:10] = 1
    mask[15:90:10, 15:90:10] = 2
    config = config_of("BrushLabels")
    result = fine_regions(mask, sure(mask), config, (100, 100))
    assert [region["value"]["brushlabels"] for region in result] == [["soil"], ["crop"], ["weed"]]
    np.testing.assert_array_equal(to_mask(result, config.fine, (100, 100), config.classes.fine), mask)


def test_an_implicit_background_gets_no_region() -> None:
    config = config_of("BrushLabels", ("crop", "weed"))
    mask = blobs((64, 48), 3, 7)
    result = fine_regions(mask, sure(mask), config, (64, 48))
    assert {region["value"]["brushlabels"][0] for region in result} == {"crop", "weed"}
    back = to_mask(result, config.fine, (64, 48), config.classes.fine)
    np.testing.assert_array_equal(np.where(back == UNLABELLED, 0, back), mask)
    assert fine_regions(mask * 0, sure(mask), config, (64, 48)) == []


def test_clusters_carry_their_number_and_guess() -> None:
    config = config_of("PolygonLabels")
    assert config.coarse is not None
    clusters = blobs((64, 48), 2, 8) * 2
    result = coarse_regions(clusters, ["Background", "Foreground", "Foreground"], config, (640, 480), [0.5, 0.6, 0.75])
    assert [region["id"] for region in result] == ["cl0", "cl2"]
    means = {"Background": ["soil"], "Foreground": ["crop", "weed"]}
    assert result[1]["meta"] == {"text": ["cluster 2"], "cluster": 2, "means": means}
    assert result[1]["score"] == 0.75
    back = to_mask(result, config.coarse, (64, 48), config.coarse.labels)
    np.testing.assert_array_equal(back, clusters // 2)


def test_later_regions_cover_earlier_ones_and_other_controls_do_not_count() -> None:
    config = config_of("BrushLabels")
    everything, half = np.ones((4, 6), bool), np.arange(24).reshape(4, 6) < 12
    crop = write_region(everything, config.fine, "crop", (6, 4), "a", 1.0)
    weed = write_region(half, config.fine, "weed", (6, 4), "b", 1.0)
    other = {**crop, "from_name": "coarse"}
    drawn = to_mask([crop, weed, other], config.fine, (6, 4), config.fine.labels)
    np.testing.assert_array_equal(drawn, np.where(half, 2, 1))


# what cannot be read


@pytest.mark.parametrize(
    ("tag", "change", "sentence"),
    [
        ("BrushLabels", {"original_width": 7}, "24 pixels, but its image has 7x4"),
        ("BrushLabels", {"original_height": 10**9}, "an image of"),
        ("BrushLabels", {"original_width": None}, "cannot be read"),
        ("BrushLabels", {"image_rotation": 90}, "rotated"),
        ("BrushLabels", {"value": {"rle": [1, 2], "brushlabels": ["crop"]}}, "no header"),
        ("BrushLabels", {"value": {"rle": [1, 256], "brushlabels": ["crop"]}}, "numbers from 0 to 255"),
        ("BrushLabels", {"value": {"rle": ["a"], "brushlabels": ["crop"]}}, "numbers from 0 to 255"),
        ("BrushLabels", {"value": {"brushlabels": ["crop"]}}, "'rle' is missing"),
        ("BrushLabels", {"value": []}, "cannot be read"),
        ("BitmaskLabels", {"original_width": 7}, "no PNG of 7x4 pixels"),
        ("BitmaskLabels", {"value": {"imageDataURL": "data:,x", "bitmasklabels": ["crop"]}}, "no PNG"),
        ("BitmaskLabels", {"value": {"imageDataURL": "base64,?", "bitmasklabels": ["crop"]}}, "cannot be read"),
        ("PolygonLabels", {"value": {"points": [[0, 0], [1, 1]], "polygonlabels": ["crop"]}}, "three points"),
        ("PolygonLabels", {"value": {"points": [[0, 0], [1], [2]], "polygonlabels": ["crop"]}}, "cannot be read"),
    ],
)
def test_broken_regions_are_named(tag: str, change: dict[str, Any], sentence: str) -> None:
    config = config_of(tag)
    region = write_region(np.ones((4, 6), bool), config.fine, "crop", (6, 4), "r7", 1.0)
    with pytest.raises(MaskError, match=f"region r7 of 'seg' .*{sentence}"):
        to_mask([{**region, **change}], config.fine, (6, 4), config.fine.labels)


@pytest.mark.parametrize("labels", [[], ["crop", "weed"]])
def test_labels_that_are_gone_are_said(labels: list[str]) -> None:
    config = config_of("BrushLabels")
    region = write_region(np.ones((4, 6), bool), config.fine, "crop", (6, 4), "r7", 1.0)
    region["value"]["brushlabels"] = labels
    with pytest.raises(MaskError, match=r"region r7 .*label"):
        to_mask([region], config.fine, (6, 4), config.fine.labels)


def test_a_cut_picture_is_named_unless_only_its_end_mark_is_gone() -> None:
    config = config_of("BitmaskLabels")
    mask = blobs((64, 48), 2, 9) == 1
    region = write_region(mask, config.fine, "crop", (64, 48), "r7", 1.0)
    whole, refused = base64.b64decode(region["value"]["imageDataURL"].partition(",")[2]), 0
    for length in range(len(whole)):
        cut = base64.b64encode(whole[:length]).decode()
        region["value"]["imageDataURL"] = f"data:image/png;base64,{cut}"
        try:
            drawn = to_mask([region], config.fine, (64, 48), config.fine.labels)
        except MaskError as error:
            refused += "region r7" in str(error)
        else:
            np.testing.assert_array_equal(drawn != UNLABELLED, mask)
    assert refused >= len(whole) - 24  # checksums and end mark


# masks that somebody made to do harm, or a broken tool


def region_of(tag: str, size: tuple[int, int] = (64, 48), **value: Any) -> dict[str, Any]:
    """A region of the control `seg`."""
    kind = tag.lower()
    head = {"id": "r", "from_name": "seg", "to_name": "i", "type": kind}
    return {**head, "original_width": size[0], "original_height": size[1], "value": {kind: ["crop"], **value}}


def drawn(tag: str, regions: Any, size: tuple[int, int] = (64, 48)) -> Map:
    config = config_of(tag)
    return to_mask(regions, config.fine, size, config.fine.labels)


def used(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds and bytes at the peak that some work took."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        work()
        return time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_padding_of_a_brush_mask_costs_nothing() -> None:
    whole = encode_rle(np.ones((8, 8), bool))
    padded = np.concatenate([whole, np.zeros(10_000_000, np.uint8)])
    decode_rle(whole, (8, 8))  # compiles
    seconds, memory = used(lambda: np.testing.assert_array_equal(decode_rle(padded, (8, 8)), True))
    assert seconds < 1  # 4.8 s when each block of it was read
    assert memory < 20_000_000  # once more its own size; 363 MB then


def test_literals_of_a_large_mask_take_no_more_memory_than_the_mask() -> None:
    values = 4 * 1000 * 1000
    block = "010" + f"{255:08b}" + f"{200:08b}" * 256  # 256 literals
    bits = f"{values:032b}{7:05b}0010001101111111" + block * (values // 256)
    rle = np.packbits(np.frombuffer(bits.encode(), np.uint8) - 48)
    del bits
    decode_rle(encode_rle(np.ones((8, 8), bool)), (8, 8))
    _, memory = used(lambda: np.testing.assert_array_equal(decode_rle(rle, (1000, 1000)), True))
    assert memory < 3 * rle.size  # 293 MB when an array told of each value where it stood


def test_a_polygon_of_many_points_takes_bounded_memory() -> None:
    zigzag = [[n % 100, 100 * (n % 2)] for n in range(MOST_POINTS)]
    seconds, memory = used(lambda: drawn("PolygonLabels", [region_of("PolygonLabels", points=zigzag)], (640, 480)))
    assert memory < 150_000_000  # 2 GB when all crossings with rows were held at once
    assert seconds < 60
    with pytest.raises(MaskError, match=f"it has {MOST_POINTS + 1} points, more than {MOST_POINTS}"):
        drawn("PolygonLabels", [region_of("PolygonLabels", points=[*zigzag, [0, 0]])])


def test_many_regions_of_a_large_image_take_the_memory_of_one() -> None:
    mask = np.zeros((3000, 4000), bool)
    mask[10:20, 10:20] = True
    one = region_of("BrushLabels", (4000, 3000), rle=encode_rle(mask).tolist())
    drawn("BrushLabels", [one], (640, 480))
    seconds, memory = used(lambda: drawn("BrushLabels", [one] * 1000, (640, 480)))
    assert memory < 40_000_000
    assert seconds < 60
    with pytest.raises(MaskError, match=f"{MOST_READ + 1} regions, more than {MOST_READ}: merge or delete some"):
        drawn("BrushLabels", [one] * (MOST_READ + 1))


@pytest.mark.parametrize("width", [12_000, 20_000])
def test_a_bitmask_that_unpacks_to_much_is_refused(width: int) -> None:
    head = struct.pack(">IIBBBBB", width, 10_000, 8, 6, 0, 0, 0)
    chunks = {b"IHDR": head, b"IDAT": zlib.compress(bytes(10**7), 9), b"IEND": b""}
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks.items()]
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()
    region = region_of("BitmaskLabels", (width, 10_000), imageDataURL=url)

    def refuse() -> None:
        with pytest.raises(MaskError, match=r"cannot be read.*takes too much memory"):
            drawn("BitmaskLabels", [region])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert used(refuse)[1] < 5_000_000


def test_a_bitmask_wider_than_a_strip_is_read_whole() -> None:
    mask = blobs((1500, 1200), 2, 3) == 1
    region = write_region(mask, config_of("BitmaskLabels").fine, "crop", (1500, 1200), "r", 1.0)
    np.testing.assert_array_equal(drawn("BitmaskLabels", [region], (1500, 1200)) != UNLABELLED, mask)


@pytest.mark.parametrize("width", [float("inf"), float("nan"), 10**30, -5, None, "wide", [], {}, 0])
def test_absurd_sizes_are_refused(width: Any) -> None:
    region = region_of("BrushLabels", rle=encode_rle(np.ones((48, 64), bool)).tolist())
    with pytest.raises(MaskError, match="region r of 'seg' cannot be read"):
        drawn("BrushLabels", [{**region, "original_width": width}])


@pytest.mark.parametrize(
    "points", [[[0, 0], [1e308, 1e308], [1e308, -1e308]], [[0, 0], [1, float("inf")], [2, 2]], [[float("nan")] * 2] * 3]
)
def test_points_that_are_no_places(points: list[list[float]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert drawn("PolygonLabels", [region_of("PolygonLabels", points=points)]).shape == (48, 64)
        except MaskError as error:
            assert "each of two numbers" in str(error)  # noqa: PT017


def nested(depth: int) -> Any:
    found: Any = 1
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("value", [nested(5000), {}, None, 7, "x", [None], [[1]], [{"a": 1}], [1.5], [256], 10**30])
def test_values_of_other_kinds_are_refused(tag: str, value: Any) -> None:
    region = region_of(tag, rle=value, points=value, imageDataURL=value)
    with pytest.raises(MaskError, match="region r of 'seg' cannot be read"):
        drawn(tag, [region])


@pytest.mark.parametrize("result", [None, 7, "x", {"a": 1}, [None], [[]], ["x"]])
def test_what_is_no_list_of_regions_is_refused(result: Any) -> None:
    with pytest.raises(MaskError, match="not a list of regions"):
        drawn("BrushLabels", result)
