"""Label Studio's brush format: a bit stream of runs over the RGBA bytes of an image, whose alpha is the mask.

Header: 32 bits number of bytes, 5 bits word size - 1, four times 4 bits of a field size - 1. Then blocks: 1 bit (1 =
one value repeated, 0 = that many values), 2 bits which field size, the length - 1 in that many bits, the value or
values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
    blocks: Ints = np.array(block_starts(data, sizes, rle.size * 8), np.int64)
    kind = bits_at(data, blocks, 3)
    field = sizes[kind & 3]
    length = (bits_at(data, blocks + 3, 16) >> (16 - field)) + 1
    ends = np.cumsum(length)
    if not ends.size or ends[-1] < total:
        raise ValueError("the brush mask is cut short")
    kept = int(np.searchsorted(ends, total)) + 1  # what follows is padding
    values: Ints = np.where(kind < 4, length, 1)[:kept]
    at: Ints = (blocks + 3 + field)[:kept]
    if at[-1] + 8 * values[-1] > rle.size * 8:
        raise ValueError("the brush mask is cut short")
    return alpha(data, at, length[:kept], values, total).reshape(shape)


def header(data: NDArray[np.uint8]) -> tuple[int, Ints]:
    """Number of bytes of the image, and field sizes."""
    head = int.from_bytes(data[:7].tobytes(), "big") >> 3
    if (head >> 16 & 31) != 7:
        raise ValueError("the brush mask has words of other than 8 bits")
    return head >> 21, np.array([(head >> shift & 15) + 1 for shift in (12, 8, 4, 0)])


def block_starts(data: NDArray[np.uint8], sizes: Ints, end: int) -> list[int]:
    """Bit positions of all blocks. Each says only by its content how long it is, so this is a plain loop."""
    triples = sliding(np.unpackbits(data), 3).tobytes()
    fields = [int(size) for size in sizes]
    step = [0] * 4 + [3 + size + 8 for size in fields]
    whole = data.tobytes()
    at, found = HEADER, []
    while at + 11 < end:
        found.append(at)
        kind = triples[at]
        if kind >= 4:
            at += step[kind]
            continue
        size, place = fields[kind], at + 3
        window = int.from_bytes(whole[place >> 3 : (place >> 3) + 3], "big")
        length = (window >> (24 - (place & 7) - size)) & ((1 << size) - 1)
        at += 3 + size + 8 * (length + 1)
    return found


def sliding(bits: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """The number that the `width` bits from each position on make."""
    found = np.zeros(bits.size - width + 1, np.uint8)
    for offset in range(width):
        found <<= 1
        found |= bits[offset : offset + found.size]
    return found


def bits_at(data: NDArray[np.uint8], at: Ints, width: int) -> Ints:
    """The number that up to 16 bits from each position on make."""
    byte = at >> 3
    window: Ints = (data[byte].astype(np.int64) << 16) | (data[byte + 1].astype(np.int64) << 8) | data[byte + 2]
    found: Ints = (window >> (24 - width - (at & 7))) & ((1 << width) - 1)
    return found


def alpha(data: NDArray[np.uint8], at: Ints, length: Ints, values: Ints, total: int) -> NDArray[np.bool_]:
    """(pixels,) whether alpha, each fourth byte, is at least one half.

    Args:
        data: the bytes.
        at: bit position of the first value of each block.
        length: bytes of the image that each block covers.
        values: how many values each block has: one, or as many as its length.
        total: bytes of the image.
    """
    if (values > 1).any():
        owner = np.repeat(np.arange(at.size), values)
        within = np.arange(owner.size) - np.repeat(np.cumsum(values) - values, values)
        at = at[owner] + 8 * within
        length = np.where(values > 1, 1, length)[owner]
    ends = np.minimum(np.cumsum(length), total) // 4
    return np.repeat(bits_at(data, at, 8) > 127, np.diff(ends, prepend=0))
