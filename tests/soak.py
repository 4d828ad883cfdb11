"""Label for minutes or hours and watch what grows: `python -m tests.soak --minutes 60` prints a table, writes curves.

The project stays as large as it is: for each task that is labelled the oldest labelled one goes, and its picture comes
as a new one. So whatever grows, leaks.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import psutil
from matplotlib.figure import Figure

from backend.annotator import Annotator
from backend.attach import apply, plan
from backend.context import Context, connect
from backend.embedded import start_services
from backend.generations import MOST_ORDERS
from backend.label_config import parse
from backend.settings import Settings
from model.field import render

QUICK = {"FIRSTROW_IMAGE_SIZE": "128", "FIRSTROW_TRAIN_STEPS": "4", "FIRSTROW_NETWORK": "lraspp_efficientnet_lite0"}
LABELS = """<View><Image name="photo" value="$picture"/><BrushLabels name="seg" toName="photo">
<Label value="soil"/><Label value="crop"/><Label value="weed"/></BrushLabels></View>"""
GROUPS = {"Soil": ["soil"], "Plant": ["crop", "weed"]}
#: Pictures of the project, and labelled ones that stay.
PICTURES, KEPT = 12, 4
#: Seconds that one order may take.
PATIENCE = 120


@dataclass(frozen=True)
class Sample:
    """What there is at one moment: memory in MB, the rest counted."""

    seconds: float
    orders: int
    worker_mb: float
    serve_mb: float
    redis_keys: int
    versions: int
    predictions: int
    files: int
    store_mb: float


#: What must not grow, with the share by which and the number up to which it may.
MAY_GROW = {
    "worker_mb": (1.05, 60),
    "serve_mb": (1.1, 20),
    "redis_keys": (1.2, 60),
    "versions": (1.2, 4),
    "predictions": (1.3, 60),
    "files": (1.2, 20),
    "store_mb": (1.2, 2),
}
#: Up to here old orders are kept: what has yet to come there may rise.
LEVEL = {"versions": MOST_ORDERS + 10, "predictions": (MOST_ORDERS + 10) * PICTURES}


class Soak:
    """A project and somebody who labels it.

    Args:
        context: the doors of the running backend.
        folder: for pictures.
    """

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.studio, self.board = context, context.studio, context.board
        self.id = int(self.studio.create_project("soak", LABELS)["id"])
        self.files, masks = {}, {}
        for number in range(PICTURES):
            image, mask = render(number, "target", (160, 120))
            file = folder / f"soak-{number}.jpg"
            cv2.imwrite(str(file), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
            [task] = self.studio.upload(self.id, [file])
            self.files[task], masks[task] = file, mask
        apply(plan(self.studio, self.id, context.settings, GROUPS))
        self.board.request_round(self.id, "attached")
        config = parse(self.studio.project(self.id)["label_config"], GROUPS)
        self.masks = masks
        self.annotator = Annotator(self.studio, self.id, config, masks)
        self.labelled: list[int] = []
        self.began = time.monotonic()
        self.wait(0)

    def run(self, seconds: float, every: float, say: Callable[[Sample], object], pause: float = 0) -> list[Sample]:
        """Label until the time is over, with pauses after each order; a sample every so many seconds."""
        samples = [self.sample()]
        while time.monotonic() - self.began < seconds:
            self.label()
            time.sleep(pause)
            if time.monotonic() - self.began > samples[-1].seconds + every:
                samples.append(self.sample())
                say(samples[-1])
        return samples

    def label(self) -> None:
        """Label the next task, have the oldest labelled one go and come anew, and wait for the order."""
        before, work = self.order(), self.annotator.label_next()
        if work is None:
            raise RuntimeError("Label Studio has no task to serve")
        if work.ask == "full":
            self.labelled.append(work.task)
        if len(self.labelled) > KEPT:
            task = self.labelled.pop(0)
            file, mask = self.files.pop(task), self.masks.pop(task)
            self.studio.http.call("DELETE", f"/api/tasks/{task}/")
            [new] = self.studio.upload(self.id, [file])
            self.files[new], self.masks[new] = file, mask
        self.wait(before)

    def order(self) -> int:
        """Number of the order in force."""
        return int(self.board.state(self.id).get("round", 0))

    def wait(self, before: int) -> None:
        """Wait for an order newer than `before`, and until nothing is left to do."""
        until = time.monotonic() + PATIENCE
        while self.order() <= before or self.board.busy(self.id) or self.board.wished(self.id):
            if time.monotonic() > until:
                raise RuntimeError(f"no order after {before}: {self.board.error(self.id)}, {self.board.jobs(self.id)}")
            time.sleep(0.05)

    def sample(self) -> Sample:
        """Count everything."""
        store, versions = self.context.store, self.studio.versions(self.id)
        files = [file for file in Path(store.root).rglob("*") if file.is_file()]
        return Sample(
            seconds=round(time.monotonic() - self.began, 1),
            orders=self.order(),
            worker_mb=memory("backend.worker"),
            serve_mb=memory("serve"),
            redis_keys=int(self.board.redis.dbsize()),
            versions=len(versions),
            predictions=sum(versions.values()),
            files=len(files),
            store_mb=round(sum(file.stat().st_size for file in files) / 1e6, 2),
        )


def memory(word: str) -> float:
    """Megabytes of our processes with this word among their arguments."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if word in process.cmdline():
                total += process.memory_info().rss
        except psutil.Error:
            continue
    return round(total / 1e6, 1)


def growing(samples: Sequence[Sample]) -> list[str]:
    """What grew from the middle third to the last third by more than it may, in a sentence each."""
    third, rows, faults = len(samples) // 3, [asdict(sample) for sample in samples], []
    for name, (share, more) in MAY_GROW.items():
        middle = statistics.median(row[name] for row in rows[third : 2 * third])
        last = statistics.median(row[name] for row in rows[2 * third :])
        if last > max(share * middle, middle + more, LEVEL.get(name, 0)):
            faults.append(f"{name} grew from {middle:g} to {last:g}")
    return faults


def draw(samples: Sequence[Sample], file: Path) -> None:
    """Draw a curve of each thing that must not grow, each from 0."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(2, 4, sharex=True).flat
    minutes = [sample.seconds / 60 for sample in samples]
    for axis, name in zip(axes, ["orders", *MAY_GROW], strict=True):
        values = [getattr(sample, name) for sample in samples]
        axis.plot(minutes, values)
        axis.set_title(name.replace("_mb", ", MB").replace("_", " "), fontsize=9)
        axis.set_ylim(0, 1.15 * max(values))
        axis.tick_params(labelsize=8)
    figure.supxlabel("minutes", fontsize=9)
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start everything, label, and say what grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=15, help="seconds between samples (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("soak.csv"), help="beside it goes a picture")
    given = parser.parse_args(arguments)
    names = list(Sample.__dataclass_fields__)

    def show(sample: Sample) -> None:
        sys.stdout.write("  ".join(f"{value:>11}" for value in asdict(sample).values()) + "\n")
        sys.stdout.flush()

    with tempfile.TemporaryDirectory() as folder, start_services(Path(folder), QUICK) as services:
        context = connect(Settings.read(services.environment))
        sys.stdout.write("  ".join(f"{name:>11}" for name in names) + "\n")
        samples = Soak(context, Path(folder)).run(60 * given.minutes, given.every, show)
    draw(samples, given.out.with_suffix(".png"))
    with given.out.open("w", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)
    faults = growing(samples)
    sys.stdout.write("\n".join(faults or ["nothing grew"]) + "\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
