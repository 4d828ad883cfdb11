"""`make demo`: the whole loop on real parts, with an annotator played from hidden masks."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from xml.sax.saxutils import quoteattr

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from backend.annotator import Annotator, Work
from backend.attach import apply, plan
from backend.contactsheet import because, contact_sheet
from backend.context import Context, connect
from backend.embedded import Services, start_services
from backend.errors import FirstRowError, JobError
from backend.features import extractor, load_fit
from backend.head import load_model
from backend.label_config import ProjectConfig, parse
from backend.learn import is_trained, load_network, network_key
from backend.project import Project
from backend.settings import Settings
from model.classes import Classes
from model.data import Folder, FolderError, ImageError
from model.field import write_folder
from model.masks import predict
from model.metrics import confusion, iou, mean_iou
from model.pictures import palette
from model.scoring import Scorer

log = logging.getLogger(__name__)
console = Console()

#: Pictures of the rendered field: enough for an order to matter, few enough for two CPU cores.
POOL, HELD_OUT = 60, 20
#: Images of the queue's head that are printed and pictured.
SHOWN = 5
#: Longer side of any mask that we meet: no mask is made smaller.
FULL_SIZE = 1 << 16
#: Seconds to wait for a round before giving up.
PATIENCE = 1800
#: Seconds between lines where no bar can be drawn, because nobody looks at a terminal.
EVERY = 5.0
#: Settings that let a round end within a minute on two CPU cores.
QUICK = {"FIRSTROW_IMAGE_SIZE": "320", "FIRSTROW_TRAIN_STEPS": "60"}

LABELS = """<View style="display:flex">
  <View style="flex:1"><Image name="image" value="$image" zoom="true"/></View>
  <View style="width:260px;padding-left:8px">
    <Header value="Full segmentation" size="5"/>
    <BrushLabels name="seg" toName="image">
{labels}
    </BrushLabels>
  </View>
</View>"""


@dataclass
class Line:
    """One line of the demo's table."""

    step: str
    labelled: int
    unseen: float
    held_out: float
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)


def run(folder: Path, data: Path | None = None, rounds: int = 4, leave: bool = True) -> int:
    """Play the demo.

    Args:
        folder: where everything of the demo lives; emptied first.
        data: a folder laid out like those that `firstrow bench` reads; a field is rendered when None.
        rounds: full segmentations, one per round.
        leave: keep everything running at the end, until Ctrl-C.

    Returns:
        The exit status.
    """
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    with until_interrupted(), ExitStack() as stack:
        images = Folder(data) if data else rendered(folder / "field")
        services = stack.enter_context(started(folder / "run"))
        context = connect(Settings.read(services.environment))
        demo = Demo(context, services, images)
        demo.play(rounds, folder)
        if leave:
            console.print(f"[b]The project[/b]   {services.studio.url}/projects/{demo.id}/data")
            console.print("\nEverything keeps running. Open the address above; [b]Ctrl-C[/b] ends it.")
            signal.pause()
    console.print(f"\nEverything is stopped. Logs and data are in {folder / 'run'}.", soft_wrap=True)
    return 0


@contextmanager
def until_interrupted() -> Iterator[None]:
    """Have SIGTERM and SIGINT end everything in order.

    SIGINT too gets a handler of ours: a process whose parent ignores it (a shell's background job) inherits that.
    """

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nStopped; nothing is left running.")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def started(folder: Path) -> Iterator[Services]:
    """Redis, Label Studio, the web process and a worker."""
    with doing("Starting Redis, Label Studio, the web process and a worker ..."):
        environment = {**QUICK, **{k: v for k, v in os.environ.items() if k.startswith("FIRSTROW_")}}
        manager = start_services(folder, environment)
        services = manager.__enter__()
    try:
        console.print(f"[b]Label Studio[/b]  {services.studio.url}")
        console.print(f"[b]Login[/b]         {services.studio.username}  /  {services.studio.password}")
        console.print(f"[b]Settings[/b]      {settings_file(folder, services.environment)}", soft_wrap=True)
        yield services
    finally:
        manager.__exit__(None, None, None)


def settings_file(folder: Path, environment: Mapping[str, str]) -> Path:
    """Write settings for a shell, so that commands reach this demo; for our own user only: the key is in there."""
    file = folder / "settings.sh"
    file.touch(0o600)
    file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()))
    return file


class Reminder:
    """Lines at most every few seconds, where there is no terminal to draw a bar in."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        """Print, unless that was just done."""
        if not console.is_terminal and time.monotonic() - self.last >= EVERY:
            console.print(text)
            self.last = time.monotonic()


@contextmanager
def doing(text: str) -> Iterator[None]:
    """Show what is being done: beside a spinner, or without a terminal at once and every few seconds."""
    if console.is_terminal:
        with console.status(text):
            yield
        return
    console.print(text)
    began, ended = time.monotonic(), threading.Event()

    def remind() -> None:
        while not ended.wait(EVERY):
            console.print(f"  {time.monotonic() - began:.0f} s")

    reminding = threading.Thread(target=remind, daemon=True)
    reminding.start()
    try:
        yield
    finally:
        ended.set()
        reminding.join()


def label_config(classes: Classes) -> str:
    """The label config that ships with First Row, where it has these classes; else one like it."""
    shipped = Path(__file__).resolve().parent.parent / "label_config.xml"
    if shipped.is_file() and set(parse(shipped.read_text("utf-8")).classes.fine) == set(classes.fine):
        return shipped.read_text("utf-8")
    colours = ["#" + bytes(colour).hex() for colour in palette(len(classes.fine))]
    pairs = zip(classes.fine, colours, strict=True)
    return LABELS.format(labels="\n".join(f'      <Label value={quoteattr(n)} background="{c}"/>' for n, c in pairs))


def rendered(folder: Path) -> Folder:
    """A rendered field: the target whose masks the demo hides."""
    if not (folder / "dataset.json").is_file():
        with doing("Rendering a field ..."):
            write_folder(folder, n_train=POOL, n_test=HELD_OUT, style="target", seed=1)
    return Folder(folder)


class Demo:
    """One project, from upload to contact sheet."""

    def __init__(self, context: Context, services: Services, images: Folder) -> None:
        self.context, self.services, self.images = context, services, images
        self.lines: list[Line] = []

    def play(self, rounds: int, folder: Path) -> None:
        """Make the project, attach it, and label until `rounds` images are segmented."""
        self.create()
        self.attach()
        self.wait("first order", 0)
        self.show_head("The queue at first")
        self.coarse_labels()
        for number in range(1, rounds + 1):
            self.segment(number)
        self.show_table()
        path = folder / "contact-sheet.png"
        with doing("Drawing a contact sheet ..."):
            contact_sheet(self.context, self.project, self.head(), path)
        console.print(f"[b]Contact sheet[/b] {path}")

    def create(self) -> None:
        """A project of pictures, as a team would have it."""
        classes = self.images.classes
        made = self.context.studio.create_project(f"First Row: {self.images.path.name}", label_config(classes))
        self.id = int(made["id"])
        names, ids, reminder = self.images.names("train"), list[int](), Reminder()
        with bar() as progress:
            task = progress.add_task("Uploading", total=len(names))
            for name in names:
                ids += self.context.studio.upload(self.id, [self.images.file(name)])
                progress.advance(task)
                reminder.say(f"Uploading: {len(ids)} of {len(names)}")
        self.names = dict(zip(ids, names, strict=True))

    def attach(self) -> None:
        """What `firstrow attach --project ID` does."""
        groups = {
            coarse.capitalize(): [self.images.classes.fine[c] for c in members]
            for coarse, members in zip(self.images.classes.coarse, self.images.classes.groups, strict=True)
        }
        with doing("Attaching the project ..."):
            apply(plan(self.context.studio, self.id, self.context.settings, groups))
        self.context.board.request_round(self.id, "attached")
        self.project = Project(self.context.store, self.id)
        self.config: ProjectConfig = parse(self.context.studio.project(self.id)["label_config"], groups)
        masks = Masks(self.images, self.names, self.config)
        self.annotator = Annotator(self.context.studio, self.id, self.config, masks)

    def coarse_labels(self) -> None:
        """Correct cluster guesses until no more are asked for."""
        while self.context.board.state(self.id)["phase"] == "coarse":
            asked, before = len(self.context.board.state(self.id)["coarse"]), self.round()
            for _ in range(asked):
                work = self.annotator.label_next()
                if work is None or work.ask != "coarse":
                    raise JobError("Label Studio served no task with clusters although coarse labels are wanted")
                console.print(f"  task {work.task}: {work.fixed} of {work.shown} clusters corrected")
            self.wait("order after coarse labels", before)
        self.show_head("The queue after coarse labels")

    def segment(self, number: int) -> None:
        """Segment the task that Label Studio serves; watch the retraining and the new order."""
        before = self.round()
        work = self.annotator.label_next()
        if work is None:
            raise JobError("Label Studio has no task left to serve")
        seconds = self.wait(f"round {number}", before)
        self.lines.append(self.measure(f"round {number}", work, seconds))
        self.show_head(f"The queue after round {number} (task {work.task} segmented)")

    def measure(self, step: str, work: Work, seconds: float) -> Line:
        """Mean IoU of the new label under the model before, and on held-out images under the model now."""
        curve = self.project.store.read_json(self.project.key("curve.json")) or []
        unseen = [row["miou"] for row in curve if row["task"] == work.task]
        with doing("Measuring on held-out images ..."):
            held_out = held_out_miou(self.context, self.project, self.config, self.images)
        labelled = self.context.board.state(self.id)["stages"]["full"]
        return Line(step, labelled, unseen[-1] if unseen else float("nan"), held_out, seconds)

    def round(self) -> int:
        """Number of the order in force."""
        return int(self.context.board.state(self.id).get("round", 0))

    def wait(self, what: str, before: int) -> float:
        """Wait for an order newer than `before`; returns the seconds since the call."""
        began, board, reminder = time.monotonic(), self.context.board, Reminder()
        with bar() as progress:
            task = progress.add_task(what, total=None)
            while self.round() <= before or board.busy(self.id):
                error = board.error(self.id)
                if error and not board.busy(self.id):
                    raise JobError(f"{error['step']}: {error['message']}")
                if time.monotonic() - began > PATIENCE:
                    raise JobError(f"{what}: no new order after {PATIENCE} s; see the worker's log")
                reminder.say(show_jobs(progress, task, what, board.jobs(self.id)))
                time.sleep(0.2)
            seconds = time.monotonic() - began
            progress.update(task, description=f"{what}: {seconds:.1f} s", total=1, completed=1)
        return seconds

    def head(self) -> list[dict[str, object]]:
        """The first places of the order in force."""
        return list(self.project.store.read_json(self.project.key("ranking.json")) or [])[:SHOWN]

    def show_head(self, title: str) -> None:
        """Print the queue's head, with reasons, beside what Label Studio serves."""
        served = self.context.studio.next_task(self.id)
        table = Table(title=title)
        for name in ("place", "task", "image", "asks for", "utility", "because"):
            table.add_column(name)
        for place, row in enumerate(self.head(), 1):
            task = int(str(row["task"]))
            utility = f"{float(str(row['utility'])):.3g}" if row["utility"] is not None else ""
            table.add_row(str(place), str(task), self.names[task], str(row["ask"]), utility, because(row))
        console.print(table)
        console.print(f"  Label Studio serves task {served['id'] if served else None} next")

    def show_table(self) -> None:
        """Print mIoU per round."""
        table = Table(title="mIoU per round")
        for name in ("", "segmented", "on the new label, before learning it", "on held-out images", "submit to order"):
            table.add_column(name)
        for line in self.lines:
            unseen = "" if np.isnan(line.unseen) else f"{line.unseen:.3f}"
            table.add_row(line.step, str(line.labelled), unseen, f"{line.held_out:.3f}", f"{line.seconds:.1f} s")
        console.print(table)


class Masks(Mapping[int, NDArray[np.uint8]]):
    """Hidden masks by task id, in the order of the project's classes, at the original size."""

    def __init__(self, images: Folder, names: dict[int, str], config: ProjectConfig) -> None:
        self.images, self.names = images, names
        self.order = np.full(256, 255, np.uint8)
        for position, name in enumerate(images.classes.fine):
            self.order[position] = config.classes.fine.index(name)

    def __getitem__(self, task: int) -> NDArray[np.uint8]:
        return self.order[self.images.mask(self.names[task], FULL_SIZE)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def held_out_miou(context: Context, project: Project, config: ProjectConfig, images: Folder) -> float:
    """Mean IoU of the model in force on the held-out images (one confusion matrix over all of them)."""
    predicted = predictor(context, project, config)
    if predicted is None:
        return float("nan")
    size, table = context.settings.image_size, np.zeros((len(config.classes.fine),) * 2, np.int64)
    masks = Masks(images, dict(enumerate(images.names("test")[:HELD_OUT])), config)
    for number, name in masks.names.items():
        image = images.image(name, size)
        mask = masks.order[images.mask(masks.names[number], size)]
        table += confusion(predicted(image), mask, len(config.classes.fine))
    log.debug("held-out IoU %s", iou(table))
    return float(mean_iou(table))


def predictor(
    context: Context, project: Project, config: ProjectConfig
) -> Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None:
    """Gives the mask (H, W) of an image (H, W, 3) by the model in force; None before it has learnt anything."""
    if context.settings.learner == "instant":
        model, fit = load_model(project), load_fit(project)
        head = model and model.learnt
        if head is None or fit is None:
            return None
        scaling, sees = fit.scaling, extractor(context.settings.network)[0]
        return lambda image: predict(sees.maps([image]), scaling, head)[0]
    if not is_trained(context, network_key(context, project, config.classes)):
        return None
    scorer = Scorer(load_network(context, project, config.classes)[0], config.classes, "cpu")
    anything = config.classes.any_row
    return lambda image: scorer.score(image, np.full(image.shape[:2], anything, np.uint8)).prediction


def bar() -> Progress:
    """A progress bar that stays after it has ended."""
    return Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console)


def show_jobs(progress: Progress, task: TaskID, what: str, jobs: list[dict[str, object]]) -> str:
    """Show the jobs of the round in one bar; the same in words."""
    running = [job for job in jobs if job["status"] == "started"]
    ended = sum(job["status"] in ("finished", "failed") for job in jobs)
    step = ", ".join(f"{job['step']} {job['done']}/{job['total']}" for job in running) or "waiting"
    progress.update(task, description=f"{what}: {step}", total=max(len(jobs), 1), completed=ended)
    return f"{what}: {step}"


def main(folder: str, data: str | None, rounds: int, leave: bool, say: Callable[[str], None] = console.print) -> int:
    """Entry of the `demo` command; faults become one line."""
    try:
        return run(Path(folder), Path(data) if data else None, rounds, leave)
    except (FirstRowError, FolderError, ImageError) as error:
        say(f"[red]{error}[/red]")
        return 1
