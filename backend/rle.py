"""Label Studio's brush format: a bit stream of runs over the RGBA bytes of an image, whose alpha is the mask.

Header: 32 bits number of bytes, 5 bits word size - 1, four times 4 bits of a field size - 1. Then blocks: 1 bit (1 =
one value repeated, 0 = that many values), 2 bits which field size, the length - 1 in that many bits, the value or
values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from model.compiled import compiled

Ints = NDArray[np.int64]

#: Field sizes that Label Studio writes.
SIZES = np.array([3, 4, 8, 16])
#: Bits of the header.
HEADER = 53
#: The longest run that one block holds.
LONGEST = 65536


def encode_rle(mask: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bytes that `label_studio_sdk.converter.brush.mask2rle` gives for a mask of 0 and 255.

    Args:
        mask: (H, W), not 0 = inside.
    """
    inside = np.asarray(mask, bool).ravel()
    changes = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    return encode_changes(np.append(0, changes) if inside[:1].any() else changes, inside.size)


def encode_changes(changes: Ints, pixels: int) -> NDArray[np.uint8]:
    """The bytes for a mask that is given by where it changes.

    Args:
        changes: ascending flat positions; outside up to the first, inside up to the second, and so on.
        pixels: H * W.
    """
    ends = np.append(changes, pixels)
    length: Ints = np.diff(ends, prepend=0) * 4
    value: Ints = np.arange(length.size) % 2 * 255
    value, length = value[length > 0], length[length > 0]
    parts = -(-length // LONGEST)
    if (parts > 1).any():
        last = np.cumsum(parts) - 1
        rest = length - (parts - 1) * LONGEST
        value, length = np.repeat(value, parts), np.full(int(parts.sum()), LONGEST)
        length[last] = rest
    size: Ints = np.searchsorted(1 << SIZES, length)  # the smallest field that holds length - 1
    field = SIZES[size]
    code = ((4 | size) << (field + 8)) | ((length - 1) << 8) | value
    head = int(f"{pixels * 4:032b}{7:05b}" + "".join(f"{bits - 1:04b}" for bits in SIZES), 2)
    return pack(np.append([head >> 26, head & (1 << 26) - 1], code), np.append([27, 26], field + 11))


def pack(code: Ints, width: Ints) -> NDArray[np.uint8]:
    """Codes of fewer than 32 bits, one after the other, as bytes; always with padding, as the official encoder has.

    Each 32-bit word gets the sum of what starts in it and of what hangs over from the word before: bits never overlap.
    """
    end = np.cumsum(width)
    begin = end - width
    word = begin >> 5
    window = code.astype(np.uint64) << (64 - width - (begin & 31)).astype(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))  # a word without a start cannot be: codes are too short
    words = np.zeros(first.size + 1, np.uint64)
    words[:-1] = np.add.reduceat(window >> np.uint64(32), first)
    words[1:] += np.add.reduceat(window & np.uint64(0xFFFFFFFF), first)
    return words.astype(">u4").view(np.uint8)[: int(end[-1]) // 8 + 1]


def decode_rle(rle: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Brush bytes -> mask; edges that people drew half transparent count from one half on.

    Args:
        rle: bytes of any writer: any field sizes, runs and literals.
        shape: (H, W).

    Raises:
        ValueError: the bytes are for another size, are cut short or are no brush mask.
    """
    data = np.concatenate([np.asarray(rle, np.uint8), np.zeros(4, np.uint8)])
    if rle.size * 8 < HEADER:
        raise ValueError("the brush mask has no header")
    total, sizes = header(data)
    if total != shape[0] * shape[1] * 4:
        raise ValueError(f"the brush mask has {total // 4} pixels, but its image has {shape[1]}x{shape[0]}")
    inside = np.zeros(shape[0] * shape[1], np.bool_)
    if not walk(data, rle.size * 8, sizes, total, inside):
        raise ValueError("the brush mask is cut short")
    return inside.reshape(shape)


def header(data: NDArray[np.uint8]) -> tuple[int, Ints]:
    """Number of bytes of the image, and field sizes."""
    head = int.from_bytes(data[:7].tobytes(), "big") >> 3
    if (head >> 16 & 31) != 7:
        raise ValueError("the brush mask has words of other than 8 bits")
    return head >> 21, np.array([(head >> shift & 15) + 1 for shift in (12, 8, 4, 0)])


@compiled
def walk(data: NDArray[np.uint8], end: int, sizes: Ints, total: int, inside: NDArray[np.bool_]) -> bool:
    """Go through the blocks until the image is covered; what follows is padding, however long.

    Args:
        data: the bytes, and four more.
        end: bit at which they end.
        sizes: of the fields.
        total: bytes of the image.
        inside: (pixels,) all False; set where alpha, each fourth byte, is at least one half.

    Returns:
        Whether the image was covered; else the bytes are cut short.
    """
    at, covered = HEADER, 0
    while covered < total:
        if at + 3 > end:
            return False
        kind = number(data, at, 3)
        size = sizes[kind & 3]
        values = at + 3 + size
        if values > end:
            return False
        length = number(data, at + 3, size) + 1
        at = values + (8 if kind >= 4 else 8 * length)
        if at > end:
            return False
        stop = min(covered + length, total)
        if kind < 4:
            for alpha in range(covered + (3 - covered) % 4, stop, 4):
                inside[alpha >> 2] = number(data, values + 8 * (alpha - covered), 8) > 127
        elif number(data, values, 8) > 127:
            inside[covered >> 2 : stop >> 2] = True
        covered = stop
    return True


@compiled
def number(data: NDArray[np.uint8], at: int, width: int) -> int:
    """The number that up to 16 bits from a position on make."""
    byte = at >> 3
    window = (np.int64(data[byte]) << 16) | (np.int64(data[byte + 1]) << 8) | np.int64(data[byte + 2])
    return int((window >> (24 - width - (at & 7))) & ((1 << width) - 1))
