"""Decodes pictures in a process of its own: a file that crashes, hangs or fills a decoder costs that process alone.

The process lives as long as its worker, so that a picture costs two copies through a pipe and no start. Its answer is
the small copy that the cache keeps, which we wrote ourselves and may decode anywhere.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backend.children import inherited
from backend.errors import JobError
from model.data import BUDGET, BYTES, MOST_BYTES, ImageError, decode_sized

#: Most bytes of one image file; a 60-megapixel TIFF fits.
LIMIT = 200_000_000
#: Seconds that one picture may take; the largest that are decoded at all take a tenth of it.
SECONDS = 60
#: Bytes of memory beside what the idle process has: the file twice, the picture, and some for the decoder.
MEMORY = 2 * LIMIT + BUDGET + 100_000_000
#: Seconds in which a picture that ended the process is not tried again by the same worker.
SHUNNED = 3600.0
#: What the parent sends before the file's bytes (their number, work resolution or `MASK`), and the child before its
#: answer (whether it is what was ordered, number of bytes).
ORDER, ANSWER = struct.Struct(">QI"), struct.Struct(">?Q")
READY = b"ready\n"
#: Instead of a work resolution: unpack a mask. Pixels of it that are unpacked at once: bounds memory.
MASK, AT_ONCE = 0, 1_000_000
ROOT = Path(__file__).resolve().parents[1]
COMMAND = (sys.executable, "-m", "backend.decoder")


class Decoder:
    """A process that decodes pictures one after the other; started at the first, and again after it died.

    Args:
        command: what to start.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.command = list(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._shunned: dict[bytes, tuple[float, str]] = {}

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        return self._process.pid if self._process else None

    def copy(self, data: bytes, size: int) -> bytes:
        """A small copy of a picture: JPEG, with the original's width and height in its comment.

        Args:
            data: the file.
            size: longer side of the copy in pixels; smaller pictures keep their size.

        Raises:
            ImageError: it cannot be decoded, or ended the process that tried.
            JobError: the process cannot be started.
        """
        return self._answer(data, size)

    def mask(self, data: bytes, size: tuple[int, int]) -> NDArray[np.bool_]:
        """(H, W) mask of a PNG: what is not transparent, or in a picture without transparency what is bright.

        Args:
            data: the file, whose header was seen to say `size`.
            size: width and height in pixels.

        Raises:
            ImageError: it cannot be decoded, or ended the process that tried.
            JobError: the process cannot be started.
        """
        width, height = size
        bits = np.frombuffer(self._answer(data, MASK), np.uint8)
        return np.unpackbits(bits, count=width * height).reshape(height, width).astype(np.bool_)

    def _answer(self, data: bytes, order: int) -> bytes:
        with self._lock:
            self._check(data)
            process = self._running()
            try:
                good, answer = _ask(process, data, order)
            except (OSError, EOFError) as error:
                reason = _ending(self._ended(), order)
                self._shunned[_mark(data)] = (time.monotonic() + SHUNNED, reason)
                raise ImageError(reason) from error
            except BaseException:  # a job's time is up: half an answer must not pass for that of the next picture
                self._ended()
                raise
        if not good:
            raise ImageError(answer.decode(errors="replace"))
        return answer

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._ended()

    def _check(self, data: bytes) -> None:
        """Refuse a picture that ended the process lately."""
        until, reason = self._shunned.get(_mark(data), (0.0, "")) if self._shunned else (0.0, "")
        if time.monotonic() < until:
            raise ImageError(reason)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._ended()  # somebody ended it while it was idle
        if self._process is None:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**inherited(), "PYTHONPATH": _python_path(), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            if _pipe(self._process.stdout).readline() != READY:
                code = self._ended()
                raise JobError(
                    f"the process that decodes pictures does not start ({' '.join(self.command)}: status {code}); "
                    "the worker's log has its last words"
                )
        return self._process

    def _ended(self) -> int:
        """End the process if it still runs; its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        try:
            process.communicate(timeout=0.2)  # it died already, or ends where its input does
        except (subprocess.TimeoutExpired, OSError, ValueError):
            process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                _pipe(pipe).close()
            except OSError:  # what it never read cannot be flushed
                continue
        return code


@lru_cache(maxsize=1)
def resident() -> Decoder:
    """The decoder of this process."""
    decoder = Decoder()
    atexit.register(decoder.close)
    return decoder


def _ask(process: subprocess.Popen[bytes], data: bytes, order: int) -> tuple[bool, bytes]:
    there, back = _pipe(process.stdin), _pipe(process.stdout)
    there.write(ORDER.pack(len(data), order))
    there.write(data)
    there.flush()
    good, length = ANSWER.unpack(_exactly(back, ANSWER.size))
    return bool(good), _exactly(back, length)


def _exactly(pipe: IO[bytes], length: int) -> bytes:
    found = pipe.read(length)
    if len(found) < length:
        raise EOFError
    return found


def _mark(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise EOFError
    return pipe


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _ending(code: int, order: int) -> str:
    """Why a picture ended the process, in a sentence."""
    what, again = ("the mask", "draw it again") if order == MASK else ("the image", "save it again as JPEG or PNG")
    if code == -signal.SIGALRM:
        return f"{what} takes longer than {SECONDS} s to decode: {again}, or smaller"
    if code == -signal.SIGKILL:
        return f"the process that decoded {what} was killed, perhaps for its memory: {again}, or smaller"
    name = signal.Signals(-code).name if code < 0 and -code in set(signal.Signals) else f"status {code}"
    return f"{what} crashes its decoder ({name}): {again}"


# In the process


def serve(orders: IO[bytes], answers: IO[bytes]) -> None:
    """Answer orders until there are none."""
    answers.write(READY)
    answers.flush()
    while True:
        head = orders.read(ORDER.size)
        if len(head) < ORDER.size:
            return
        length, order = ORDER.unpack(head)
        good, answer = _done(_exactly(orders, length), order)
        answers.write(ANSWER.pack(good, len(answer)))
        answers.write(answer)
        answers.flush()


def _done(data: bytes, order: int) -> tuple[bool, bytes]:
    signal.alarm(SECONDS)  # unlike a timer of the parent it also ends an orphan
    try:
        return True, np.packbits(mask_of(data)).tobytes() if order == MASK else encoded(*decode_sized(data, order))
    except ImageError as error:
        return False, str(error).encode(errors="replace")
    except Exception as error:  # whatever it is, it is the fault of this picture
        reason = f"{type(error).__name__}: {error}"
        if order != MASK:
            reason = f"the image cannot be read: {reason}; save it again as JPEG or PNG"
        return False, reason.encode(errors="replace")
    finally:
        signal.alarm(0)


def mask_of(data: bytes) -> NDArray[np.bool_]:
    """(H, W) mask of a PNG; see `Decoder.mask`.

    Raises:
        ImageError: it takes too much memory.
    """
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        width, height = image.size
        if (BYTES.get(image.mode, MOST_BYTES) + 2) * width * height > BUDGET:
            raise ImageError(f"its picture of {width}x{height} pixels takes too much memory")
        opaque, bright = np.empty((height, width), np.bool_), np.empty((height, width), np.bool_)
        rows = max(1, AT_ONCE // width)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height))).convert("RGBA")
            pixels = np.asarray(strip)
            opaque[top : top + rows] = pixels[..., 3] > 127
            bright[top : top + rows] = pixels[..., :3].max(axis=2) > 127
    return bright if opaque.all() else opaque


def encoded(image: NDArray[np.uint8], size: tuple[int, int]) -> bytes:
    """A copy to keep: JPEG with the original's width and height in its comment.

    Args:
        image: (H, W, 3) RGB.
        size: width and height of the original in pixels.
    """
    buffer = io.BytesIO()
    comment = f"{size[0]}x{size[1]}".encode()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0, comment=comment)
    return buffer.getvalue()


def bound_memory(budget: int) -> None:
    """Let this process have `budget` bytes more than it has now (Linux; elsewhere the check of the header must do)."""
    if sys.platform == "linux":
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + budget if hard == resource.RLIM_INFINITY else min(taken + budget, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def main() -> None:
    """`python -m backend.decoder`: orders on standard input, answers on standard output."""
    for number in (signal.SIGINT, signal.SIGTERM):  # for the worker, which then ends our input
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "wb") as nowhere:  # some decoders talk
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit knows nothing of JPEGs that are decoded small
    Image.init()
    decode_sized(encoded(np.zeros((8, 8, 3), np.uint8), (8, 8)), 8)  # what is loaded at the first picture
    bound_memory(MEMORY)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
