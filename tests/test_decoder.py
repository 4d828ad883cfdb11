"""Pictures are decoded in a process of its own: what ends that process costs one picture."""

from __future__ import annotations

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from backend.decoder import Decoder, encoded
from backend.errors import JobError
from backend.images import unpacked
from backend.regions import decode_png
from model.data import FORMATS, ImageError, decode, formats, original_size

ROOT = Path(__file__).parents[1]
#: A decoder that really crashes, hangs or fills its memory, where a picture's bytes ask for it.
FRAGILE = """
import ctypes, os, signal
from backend import decoder
def weak(real):
    def decode(data, *size):
        if b"crash" in data: ctypes.string_at(0)
        if b"killed" in data: os.kill(os.getpid(), signal.SIGKILL)
        if b"exit" in data: os._exit(7)
        while b"hang" in data: pass
        if b"fill" in data: return bytearray(10**10)
        return real(data, *size)
    return decode
decoder.decode_sized, decoder.mask_of = weak(decoder.decode_sized), weak(decoder.mask_of)
decoder.SECONDS = 1
decoder.main()
"""


def picture(kind: str = "PNG", size: tuple[int, int] = (64, 48), mode: str = "RGB", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, kind, **how)
    return buffer.getvalue()


def blank_png(width: int, height: int, colour: int = 2, depth: int = 8) -> bytes:
    """A PNG of zeros, made without the memory that decoding it would take."""
    channels = {0: 1, 2: 3, 6: 4}[colour]
    row = bytes(1 + width * channels * depth // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    head = b"".join(n.to_bytes(4, "big") for n in (width, height)) + bytes([depth, colour, 0, 0, 0])
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    parts = [len(c).to_bytes(4, "big") + n + c + zlib.crc32(n + c).to_bytes(4, "big") for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()


@pytest.fixture
def fragile() -> Iterator[Decoder]:
    made = Decoder([sys.executable, "-c", FRAGILE])
    yield made
    made.close()


def test_a_copy_is_what_decoding_here_gives(decoder: Decoder) -> None:
    data = picture("JPEG", (1600, 1200))
    assert decoder.copy(data, 320) == encoded(decode(data, 320), original_size(data))
    image, size = unpacked(decoder.copy(data, 320))
    assert (image.shape, size) == ((240, 320, 3), (1600, 1200))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_that_we_mean(kind: str, decoder: Decoder) -> None:
    if kind not in formats():
        pytest.skip(f"Pillow was built without {kind}")
    assert unpacked(decoder.copy(picture(kind), 32))[1] == (64, 48)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (picture("EPS"), "EPS"),
        (picture("PDF"), "PDF"),
        (picture("ICO"), "an icon"),
        (picture("JPEG2000"), "JPEG 2000"),
        (picture("PPM"), "damaged, or no picture"),
        (picture("TGA"), "damaged, or no picture"),
        (b"<!DOCTYPE html><html>", "a web page, perhaps a login"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"8BPS" + bytes(40), "Photoshop"),
        (b"", "it is empty"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str, decoder: Decoder) -> None:
    with pytest.raises(ImageError, match=f"{name}.*not one of JPEG, PNG, .*save it again as JPEG or PNG"):
        decoder.copy(data, 32)


ENDINGS = [
    (b"crash", "crashes its decoder .SIGSEGV."),
    (b"killed", "was killed"),
    (b"exit", "crashes its decoder .status 7."),
    (b"hang", "takes longer than"),
    (b"fill", "MemoryError"),
]


@pytest.mark.parametrize(("magic", "reason"), ENDINGS)
def test_a_mask_that_ends_the_process_costs_one_mask(
    fragile: Decoder, magic: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.decoder.resident", lambda: fragile)
    buffer = io.BytesIO()
    drawn = np.arange(48 * 64).reshape(48, 64) % 7 == 0
    Image.fromarray(drawn).convert("L").save(buffer, "PNG")

    def url(more: bytes = b"") -> str:
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue() + more).decode()

    np.testing.assert_array_equal(decode_png(url(), (64, 48)), drawn)
    with pytest.raises(ImageError, match=reason):
        decode_png(url(magic), (64, 48))
    np.testing.assert_array_equal(decode_png(url(), (64, 48)), drawn)


@pytest.mark.parametrize(("magic", "reason"), ENDINGS)
def test_what_ends_the_process_costs_one_picture(fragile: Decoder, magic: bytes, reason: str) -> None:
    good, bad = picture(), picture() + magic
    before = fragile.copy(good, 32)
    first = fragile.pid
    with pytest.raises(ImageError, match=f"{reason}.*save it again"):
        fragile.copy(bad, 32)
    assert fragile.copy(good, 32) == before
    second = fragile.pid
    assert (second != first) == (magic != b"fill")
    with pytest.raises(ImageError, match=reason):
        fragile.copy(bad, 32)
    assert fragile.pid == second, "it is not tried again at once"
    with pytest.raises(ImageError, match=reason):
        fragile.copy(bad + b" other", 32)
    assert fragile.copy(good, 32) == before


def test_a_process_that_died_between_pictures_blames_none(fragile: Decoder) -> None:
    before = fragile.copy(picture(), 32)
    process = psutil.Process(fragile.pid)
    process.kill()
    psutil.wait_procs([process], timeout=10)
    assert fragile.copy(picture(), 32) == before


def test_a_job_whose_time_is_up_leaves_no_half_answer(fragile: Decoder) -> None:
    class TimeIsUp(Exception):
        pass

    def ring(*_: object) -> None:
        raise TimeIsUp

    old = signal.signal(signal.SIGALRM, ring)
    before = fragile.copy(picture(), 32)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(TimeIsUp):
            fragile.copy(picture() + b"hang", 32)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert fragile.copy(picture(), 32) == before
    assert fragile.copy(picture(size=(10, 10)), 32) != before


def test_many_threads_share_one_process(decoder: Decoder) -> None:
    sizes = {(w, 30): Decoder for w in range(20, 36)}
    found: dict[tuple[int, int], tuple[int, int]] = {}

    def work(size: tuple[int, int]) -> None:
        found[size] = unpacked(decoder.copy(picture(size=size), 64))[1]

    threads = [threading.Thread(target=work, args=[size]) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {size: size for size in sizes}


def test_a_decoder_that_cannot_start_is_nobodys_picture() -> None:
    with pytest.raises(JobError, match="does not start"):
        Decoder([sys.executable, "-c", ""]).copy(picture(), 32)


def test_nothing_is_left_when_its_parent_is_killed() -> None:
    code = (
        "import sys, time\nfrom backend.decoder import Decoder, encoded\nimport numpy as np\nd = Decoder()\n"
        "d.copy(encoded(np.zeros((8, 8, 3), np.uint8), (8, 8)), 8)\nprint(d.pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
        _, left = psutil.wait_procs([child], timeout=10)
        assert not left


def test_secrets_stay_with_the_worker(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "hunter2")
    monkeypatch.setenv("FIRSTROW_SECRET", "hunter2")
    fresh = Decoder()
    try:
        fresh.copy(picture(), 32)
        assert "hunter2" not in psutil.Process(fresh.pid).environ().values()
    finally:
        fresh.close()


def test_a_small_file_of_many_pixels_takes_little_memory() -> None:
    data, fresh = blank_png(13300, 13300), Decoder()
    assert len(data) < 1_000_000
    try:
        fresh.copy(picture(), 32)
        with pytest.raises(
            ImageError, match=r"13300 x 13300 pixels, too many to decode .*make it smaller, or save it as a"
        ):
            fresh.copy(data, 64)
        assert peak(fresh) < 150e6  # of which 70 for numpy and its like; 1.4 GB before there was a limit
    finally:
        fresh.close()


def test_a_large_jpeg_is_decoded_small() -> None:
    buffer, fresh = io.BytesIO(), Decoder()
    Image.new("L", (13300, 13300)).save(buffer, "JPEG", quality=30)
    try:
        image, size = unpacked(fresh.copy(buffer.getvalue(), 320))
        assert (image.shape, size) == ((320, 320, 3), (13300, 13300))
        assert peak(fresh) < 200e6
    finally:
        fresh.close()


def peak(decoder: Decoder) -> float:
    """Most memory that a decoder had, in bytes (Linux)."""
    lines = Path(f"/proc/{decoder.pid}/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_of_a_large_picture_stays_within_the_budget(mode: str) -> None:
    fresh, buffer = Decoder(), io.BytesIO()
    image = Image.fromarray(np.zeros((6000, 8000), np.uint16)) if mode == "I;16" else Image.new(mode, (8000, 6000))
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG", **({"compress_level": 1} if mode != "CMYK" else {}))
    try:
        if mode == "CMYK":
            with pytest.raises(ImageError, match="too many to decode"):
                fresh.copy(buffer.getvalue(), 64)
        else:
            assert unpacked(fresh.copy(buffer.getvalue(), 64))[1] == (8000, 6000)
        assert peak(fresh) < 70e6 + 512e6 + 2 * len(buffer.getvalue())
    finally:
        fresh.close()


def test_time_is_not_lost_between_processes(decoder: Decoder) -> None:
    data = picture("JPEG", (640, 480))
    decoder.copy(data, 640)
    began = time.perf_counter()
    for _ in range(20):
        decoder.copy(data, 640)
    assert time.perf_counter() - began < 5  # 0.2 s where nobody else works
