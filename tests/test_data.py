"""Images decode upright and small; image and target change together; folders say what is wrong with them."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from model import data
from model.classes import IGNORE
from model.data import Folder, FolderError, ImageError, augment, decode, original_size, work_size

DATA = Path(os.environ.get("FIRSTROW_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


def picture(height: int = 60, width: int = 80) -> NDArray[np.uint8]:
    """(H, W, 3): dark at the upper left, red to the right, green downwards."""
    ramps = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return np.stack([*ramps, np.zeros_like(ramps[0])], 2).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A file's content."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int, kind: str) -> bytes:
    """The picture as a camera held that way stores it."""
    back = {**data.TURNS, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    stored = Image.fromarray(picture())
    stored = stored.transpose(back[orientation]) if orientation in back else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright(orientation: int, kind: str) -> None:
    content = turned(orientation, kind)
    assert original_size(content) == (80, 60)
    seen = decode(content, 40)
    assert seen.shape == (30, 40, 3)
    wanted = np.asarray(Image.fromarray(picture()).resize((40, 30), Image.Resampling.BILINEAR))
    assert np.abs(seen.astype(int) - wanted).max() < 12


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(picture()[..., 0].astype(np.uint16) * 256)
    else:
        image = Image.fromarray(picture()).convert(mode)
    seen = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"), 80)
    assert seen.shape == (60, 80, 3)
    assert seen.dtype == np.uint8
    assert seen[:, :10].mean() + 40 < seen[:, -10:].mean()


def test_a_large_jpeg_decodes_to_what_the_full_one_shows(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    Image.fromarray(picture(1200, 1600)).save(path, quality=95)
    seen = decode(path, 320)
    full = np.asarray(Image.open(path).resize((320, 240), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(seen - full).mean() < 2


def test_small_images_stay_as_they_are() -> None:
    content = encoded(Image.fromarray(picture()))
    np.testing.assert_array_equal(decode(content, 640), picture())
    assert work_size((3, 4000), 640) == (1, 640)
    assert work_size((4000, 3000), 640) == work_size((3000, 4000), 640)[::-1] == (640, 480)


@pytest.mark.parametrize(
    "content", [b"", b"<html>no image</html>", encoded(Image.fromarray(picture()))[:90], turned(1, "JPEG")[:700]]
)
def test_an_unreadable_image_says_so(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"the image cannot be read: .*; save it again as JPEG or PNG"):
        decode(content, 64)
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.jpg cannot be read"):
        decode(path, 64)


def test_size_of_no_image_is_an_error() -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        original_size(b"no image")


def write_folder(path: Path, **changes: Any) -> Folder:
    """A folder with one image whose mask is soil above, crop below and unknown in the last row."""
    (path / "images").mkdir(parents=True)
    (path / "masks").mkdir()
    Image.fromarray(picture()).save(path / "images" / "a.jpg", quality=95)
    mask = np.zeros((60, 80), np.uint8)
    mask[30:] = 1
    mask[58:] = 200
    Image.fromarray(changes.pop("mask", mask)).save(path / "masks" / "a.png")
    facts = {
        "classes": [{"id": 1, "name": "crop"}, {"id": 0, "name": "soil"}, {"id": 2, "name": "weed"}],
        "groups": {"plant": ["weed", "crop"], "bare": ["soil"]},
        "ignore": {"value": 200},
        "splits": {"train": ["a"], "test": []},
    }
    (path / "dataset.json").write_text(json.dumps(facts | changes))
    return Folder(path)


def test_a_folder_gives_classes_splits_images_and_masks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set")
    assert folder.classes.fine == ("soil", "crop", "weed")
    assert folder.classes.coarse == ("plant", "bare")
    assert folder.classes.groups == ((2, 1), (0,))
    assert folder.names("train") == ["a"]
    assert folder.image("a", 40).shape == (30, 40, 3)
    mask = folder.mask("a", 40)
    assert mask.shape == (30, 40)
    assert mask[:, 0].tolist() == [0] * 15 + [1] * 14 + [IGNORE]
    with pytest.raises(FolderError, match="no split 'dev', only train, test"):
        folder.names("dev")
    with pytest.raises(FolderError, match="has no image b"):
        folder.image("b", 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": [{"id": 1, "name": "soil"}]}, "ids must be 0, 1, 2"),
        ({"groups": {"plant": ["moss"]}}, "lacks or misstates 'moss'"),
        ({"groups": {"plant": ["crop", "weed"]}}, "must be in exactly one of plant"),
        ({"splits": None}, "lacks or misstates"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=message):
        write_folder(tmp_path / "set", **changes)


def test_a_folder_without_description(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"has no dataset\.json: name a folder with"):
        Folder(tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((30, 40), np.uint8), "one 8-bit channel and 80 x 60 pixels"),
        (np.zeros((60, 80, 3), np.uint8), "one 8-bit channel"),
        (np.full((60, 80), 9, np.uint8), r"does not name: \[9\]"),
    ],
)
def test_a_wrong_mask_is_refused(mask: NDArray[np.uint8], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", mask=mask)
    with pytest.raises(FolderError, match=message):
        folder.mask("a", 40)
    (tmp_path / "set" / "masks" / "a.png").unlink()
    with pytest.raises(FolderError, match=r"a\.png cannot be read"):
        folder.mask("a", 40)


@pytest.mark.parametrize("size", [(60, 80), (32, 48), (96, 128)])
def test_image_and_target_move_together(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        target = (picture()[..., 0] > 125).astype(np.uint8)
        image = np.repeat((target * 200)[..., None], 3, 2)
        seen, rows = augment(image, target, size, 9, rng)
        assert seen.shape == (*size, 3)
        assert rows.shape == size
        known = rows != 9
        assert known.mean() > 0.15
        agree = (seen[..., 0] > 90) == (rows == 1)
        assert agree[known].mean() > 0.95  # all but the edge


def test_same_seed_same_views_and_different_ones_in_a_row() -> None:
    target = np.zeros((60, 80), np.uint8)
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    views = [augment(picture(), target, (48, 48), 9, first)[0] for _ in range(3)]
    again = [augment(picture(), target, (48, 48), 9, second)[0] for _ in range(3)]
    np.testing.assert_array_equal(views, again)
    assert not np.array_equal(views[0], views[1])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets at {DATA}; name their folder in FIRSTROW_DATA")
@pytest.mark.parametrize("name", ["peanut", "camvid"])
def test_real_folders_are_complete(name: str) -> None:
    folder = Folder(DATA / name)
    for split in folder.splits:
        chosen = folder.names(split)[::30]
        assert chosen
        for image in chosen:
            assert folder.image(image, 320).shape[:2] == folder.mask(image, 320).shape == (240, 320)
