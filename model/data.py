"""Images, masks and their splits; image and target changed together."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from model.classes import IGNORE, Classes

#: What Pillow raises on files that are damaged, cut off, far too large or no images.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
    BufferError,
    Warning,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
#: What is read. Each further decoder is one more thing that a file can upset, and that of EPS starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF")
#: How files begin that are often taken for pictures.
OTHERS = {
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "Photoshop",
    b"<svg": "SVG",
    b"<!do": "a web page, perhaps a login",
    b"<htm": "a web page, perhaps a login",
    b"<?xm": "XML, perhaps an error of the storage",
    b"\0\0\0\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL": "JPEG XL",
    b"\0\0\1\0": "an icon",
}
#: Most bytes of memory that decoding one image may take.
BUDGET = 512_000_000
#: Bytes per pixel by Pillow's mode, of the image as it is stored and of what is made of it on the way to RGB.
BYTES = {"1": 2, "L": 1, "P": 5, "RGB": 4, "I;16": 9, "I;16B": 9, "I;16L": 9}
#: Of all other modes.
MOST_BYTES = 8
#: Bytes per pixel that the decoders of these formats take besides.
WORKSPACE = {"WEBP": 8, "AVIF": 8, "GIF": 5, "TIFF": 4}
#: Bytes per pixel, of the whole image, that are kept of a progressive JPEG until its last scan.
PROGRESSIVE = 6
#: EXIF orientation -> what turns the stored pixels upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image cannot be decoded; the message says why and what to do."""


class FolderError(ValueError):
    """A folder does not hold what a pixel-labelled data set needs."""


class Sample(Protocol):
    """An image and what is known about its pixels, fetched when a batch needs it."""

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H, W, 3) and target (H, W), rows of `Classes.sets`."""
        ...


@dataclass(frozen=True)
class Pair:
    """A sample held in memory."""

    image: NDArray[np.uint8]
    target: NDArray[np.uint8]

    def load(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Image (H, W, 3) and target (H, W), rows of `Classes.sets`."""
        return self.image, self.target


def decode(source: Path | bytes, size: int) -> NDArray[np.uint8]:
    """An image at work resolution.

    Args:
        source: a file, or its content.
        size: the longer side becomes this long, in pixels, when it is longer.

    Returns:
        (H, W, 3) RGB, turned as its EXIF orientation says.

    Raises:
        ImageError: it cannot be decoded.
    """
    return decode_sized(source, size)[0]


def decode_sized(source: Path | bytes, size: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """An image at work resolution as `decode` gives it, and width and height of the original as people see it.

    Raises:
        ImageError: it cannot be decoded.
    """
    with opened(source) as image:
        original, wanted = image.size, work_size(image.size, size)
        # A JPEG decodes straight to 1/2, 1/4 or 1/8 of its size: a quarter of the time for a large photograph.
        image.draft("RGB", wanted)
        check_memory(image, original)
        turn = orientation(image)
        small = as_rgb(image).resize(wanted, Image.Resampling.BILINEAR).convert("RGB")
        return np.array(small.transpose(TURNS[turn]) if turn in TURNS else small), upright(original, turn)


def check_memory(image: Image.Image, original: tuple[int, int]) -> None:
    """Refuse what would take more than BUDGET to decode.

    Args:
        image: not yet decoded, perhaps to be decoded to a smaller size.
        original: its width and height in the file.

    Raises:
        ImageError: naming its size and what to do.
    """
    pixels, whole = image.width * image.height, original[0] * original[1]
    kind = str(image.format)
    needed = pixels * (BYTES.get(image.mode, MOST_BYTES) + WORKSPACE.get(kind, 0))
    needed += whole * PROGRESSIVE * bool(image.info.get("progressive"))
    if needed > BUDGET:
        raise ImageError(
            f"it has {original[0]} x {original[1]} pixels, too many to decode ({needed / 1e6:.0f} MB of memory, at "
            f"most {BUDGET / 1e6:.0f}): make it smaller, or save it as a JPEG that is not progressive"
        )


def original_size(source: Path | bytes) -> tuple[int, int]:
    """Width and height of an image as people see it, in pixels; without decoding it where the format allows.

    Raises:
        ImageError: it is no image.
    """
    with opened(source) as image:
        original = image.size
        image.draft("RGB", (1, 1))
        check_memory(image, original)  # the orientation of a PNG may stand behind its pixels
        return upright(original, orientation(image))


def upright(size: tuple[int, int], turn: int) -> tuple[int, int]:
    """Width and height after an EXIF orientation has been followed."""
    return (size[1], size[0]) if turn >= 5 else size


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    """An image file, its pixels not yet decoded; whatever Pillow raises meanwhile becomes an ImageError."""
    name = "the image" if isinstance(source, bytes) else f"the image {source}"
    again = "save it again as JPEG or PNG"
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats()) as image:
            yield image
    except ImageError as error:
        raise ImageError(f"{name} cannot be read: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} cannot be read: {unknown(source)}; {again}") from error
    except MemoryError as error:
        raise ImageError(f"{name} cannot be read: it takes too much memory; {again}, or smaller") from error
    except UNREADABLE as error:
        reason = str(error) or type(error).__name__
        raise ImageError(f"{name} cannot be read: {reason}; {again}") from error


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def unknown(source: Path | bytes) -> str:
    """What a file is that is none of FORMATS."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            return unknown(file.read(32))
    head = source[:32]
    start = head.lstrip()[:4].lower()
    kind = next((name for magic, name in OTHERS.items() if head.startswith(magic) or start == magic.lower()), "")
    if head[4:8] == b"ftyp":
        kind = "HEIC or AVIF"
    what = f"it is {kind}" if kind else "it is empty" if not head else "it is damaged, or no picture"
    return f"{what}, not one of {', '.join(formats())}"


def work_size(original: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height after the longer side is made at most `size`."""
    factor = min(1.0, size / max(original))
    return max(1, round(original[0] * factor)), max(1, round(original[1] * factor))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright, and whatever is none."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) and value in TURNS else 1


def as_rgb(image: Image.Image) -> Image.Image:
    """Three channels of eight bits, or one of which all three are copies."""
    if image.mode.startswith("I"):
        # Pillow cuts sixteen bits off at 255 instead of scaling them.
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


class Folder:
    """A pixel-labelled folder: dataset.json, images/NAME.jpg and masks/NAME.png with class ids."""

    def __init__(self, path: Path) -> None:
        """Read what the folder says about itself.

        Raises:
            FolderError: dataset.json is missing or incomplete.
        """
        self.path = path
        try:
            self._facts: dict[str, Any] = json.loads((path / "dataset.json").read_text("utf-8"))
            self.classes = classes_of(self._facts)
            self.splits: dict[str, list[str]] = {key: list(names) for key, names in self._facts["splits"].items()}
            self._ignore = int(self._facts.get("ignore", {}).get("value", IGNORE))
        except OSError as error:
            raise FolderError(
                f"{path} has no dataset.json: name a folder with dataset.json, images and masks"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(f"{path / 'dataset.json'} lacks or misstates {error}") from error

    def names(self, split: str) -> Sequence[str]:
        """The images of a split, such as "train" or "test".

        Raises:
            FolderError: there is no such split.
        """
        if split not in self.splits:
            raise FolderError(f"{self.path} has no split {split!r}, only {', '.join(self.splits)}")
        return self.splits[split]

    def file(self, name: str) -> Path:
        """Where an image is.

        Raises:
            FolderError: it is not there.
        """
        for suffix in (".jpg", ".jpeg", ".png"):
            found = self.path / "images" / f"{name}{suffix}"
            if found.is_file():
                return found
        raise FolderError(f"{self.path / 'images'} has no image {name}")

    def image(self, name: str, size: int) -> NDArray[np.uint8]:
        """(H, W, 3) at work resolution.

        Raises:
            ImageError: it cannot be decoded.
        """
        return decode(self.file(name), size)

    def mask(self, name: str, size: int) -> NDArray[np.uint8]:
        """(H, W) fine class ids or IGNORE, the nearest pixel at work resolution.

        Raises:
            FolderError: the mask is missing, has another size than the image, or ids that are no classes.
        """
        original, path = original_size(self.file(name)), self.path / "masks" / f"{name}.png"
        try:
            with opened(path) as image:
                ids = np.array(image)
        except ImageError as error:
            raise FolderError(str(error)) from error
        if ids.dtype != np.uint8 or ids.shape != original[::-1]:
            raise FolderError(f"{path} must have one 8-bit channel and {original[0]} x {original[1]} pixels")
        unknown = set(np.unique(ids).tolist()) - {*range(len(self.classes.fine)), self._ignore}
        if unknown:
            raise FolderError(f"{path} has class ids that dataset.json does not name: {sorted(unknown)}")
        small = cv2.resize(ids, work_size(original, size), interpolation=cv2.INTER_NEAREST_EXACT)
        return cast(NDArray[np.uint8], np.where(small == self._ignore, IGNORE, small).astype(np.uint8))


def classes_of(facts: dict[str, Any]) -> Classes:
    """The classes that a dataset.json describes.

    Raises:
        KeyError: a part is missing, or a group names an unknown class.
        ValueError: ids are not 0, 1, 2 and so on, or a class is not in exactly one group.
    """
    entries = sorted(facts["classes"], key=lambda entry: int(entry["id"]))
    if [int(entry["id"]) for entry in entries] != list(range(len(entries))):
        raise ValueError("classes: their ids must be 0, 1, 2 and so on")
    number = {str(entry["name"]): int(entry["id"]) for entry in entries}
    groups = {str(name): tuple(number[str(member)] for member in members) for name, members in facts["groups"].items()}
    return Classes(tuple(number), tuple(groups), tuple(groups.values()))


def augment(
    image: NDArray[np.uint8],
    target: NDArray[np.uint8],
    size: tuple[int, int],
    outside: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A random view of an image: cut out, larger or smaller, mirrored left to right, in another light.

    Args:
        image: (H, W, 3).
        target: (H, W), rows of `Classes.sets`; gets the same geometry, by nearest pixel.
        size: height and width of the view, in pixels.
        outside: row for pixels of the view outside the image; the row of any class, so that they count for nothing.
        rng: where the randomness comes from.

    Returns:
        Image and target of the wanted size.
    """
    matrix = view((image.shape[0], image.shape[1]), size, rng)
    seen = cv2.warpAffine(image, matrix, size[::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    rows = cv2.warpAffine(target, matrix, size[::-1], flags=cv2.INTER_NEAREST, borderValue=outside)
    return relight(cast(NDArray[np.uint8], seen), rng), cast(NDArray[np.uint8], rows)


def view(
    shape: tuple[int, int], size: tuple[int, int], rng: np.random.Generator, scales: tuple[float, float] = (0.7, 1.4)
) -> NDArray[np.float64]:
    """(2, 3) affine map of a random view, image to view coordinates (x, y)."""
    scale = float(np.exp(rng.uniform(*np.log(scales))))
    # Not upside down: no camera that looks ahead sees that.
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    matrix = np.diag([mirror * scale, scale, 1.0])[:2]
    for axis, (length, seen) in enumerate([(shape[1], size[1]), (shape[0], size[0])]):
        # The view's middle lies so that it leaves the image by no more than it must.
        slack = abs(length * scale - seen) / 2
        matrix[axis, 2] = (seen - 1) / 2 - matrix[axis, axis] * (length - 1) / 2 + rng.uniform(-slack, slack)
    return matrix


def relight(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Another brightness, contrast, colour of light and saturation, each by up to about a fifth."""
    gain = rng.uniform(0.8, 1.25) * rng.uniform(0.93, 1.07, 3)
    ramp = np.arange(256.0)[:, None]
    bent = 255 * (ramp / 255) ** rng.uniform(0.8, 1.25)
    table = np.clip(bent * gain, 0, 255).astype(np.uint8)[None]
    lit = cv2.LUT(image, table)
    grey = cv2.cvtColor(cv2.cvtColor(lit, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    strength = rng.uniform(0.75, 1.25)
    return cast(NDArray[np.uint8], cv2.addWeighted(lit, strength, grey, 1 - strength, 0))
