"""A real Label Studio with many tasks: publishing an order, and a new order after one label."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from backend import attach
from backend.context import Context, connect
from backend.embedded import backend_settings, start_redis, start_serve, start_studio, start_worker
from backend.errors import JobError
from backend.features import PACK, extractor, make_fit, write_pack
from backend.jobs import split
from backend.perf import Item, missing, processor, ratio
from backend.prepare import SAMPLE_IMAGES, clusters_name, count_clusters
from backend.project import Project, TaskRecord
from backend.publish import publish_order
from backend.rank import Place
from backend.regions import fine_regions
from backend.settings import Settings
from backend.sync import refresh_config
from model.clusters import DEFAULT_K, cluster_map, fit_image
from model.features import spread_pixels
from model.field import render
from model.pixel_pool import PIXELS

#: Tasks of the projects, and the seconds in which the head of a new order is to be served in each.
SOON = {100: 2.0, 1_000: 2.0, 10_000: 3.0}
#: Rounds of each measurement.
ROUNDS = 5
#: People who submit at once.
PEOPLE = 3
#: What a whole order may cost, beside a bare import of as many predictions.
WHOLE = 1.3
CONFIG = (
    '<View><Image name="image" value="$image"/><BrushLabels name="fine" toName="image">'
    '<Label value="Soil"/><Label value="Crop"/><Label value="Weed"/></BrushLabels></View>'
)
SETTINGS = {
    "FIRSTROW_IMAGE_SIZE": "128",
    "FIRSTROW_NETWORK": "lraspp_efficientnet_lite0",
    "FIRSTROW_COARSE_TASKS": "0",
}


@dataclass(frozen=True)
class Stage:
    """A project with many tasks, all prepared, and no worker yet."""

    ctx: Context
    project: Project
    folder: Path
    environment: dict[str, str]


def items(sizes: Sequence[int] = tuple(SOON)) -> Iterator[Item]:
    """Every figure that needs Label Studio: a whole order of the largest project, a new one after a label in each."""
    for tasks in sizes:
        try:
            with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
                stage = build(Path(folder), tasks, stack)
                if tasks == max(sizes):
                    yield publish_item(stage, tasks)
                yield from submit_items(stage, tasks)
        except JobError as error:
            yield missing(f"submit/{SOON[tasks]:g}s {tasks}", 1.0, str(error), processor())


def build(folder: Path, tasks: int, stack: ExitStack) -> Stage:
    """Redis, Label Studio and our web process."""
    redis_url, studio = stack.enter_context(start_redis(folder)), stack.enter_context(start_studio(folder))
    environment = {**SETTINGS, **backend_settings(folder, redis_url, studio)}
    stack.enter_context(start_serve(folder, environment))
    ctx = connect(Settings.read(environment))
    number = int(ctx.studio.create_project("perf", CONFIG)["id"])
    file = folder / "field.jpg"
    Image.fromarray(render(0, "source", (128, 96))[0]).save(file, quality=95)
    [first] = ctx.studio.upload(number, [file])
    image = next(value for value in ctx.studio.task(first, number)["data"].values() if str(value).endswith(".jpg"))
    ids = [first, *ctx.studio.import_tasks(number, [{"image": image}] * (tasks - 1))]
    attach.apply(attach.plan(ctx.studio, number, ctx.settings))
    project = ctx.project(number)
    fill(ctx, project, ids, image)
    return Stage(ctx, project, folder, environment)


def fill(ctx: Context, project: Project, ids: list[int], image: str) -> None:
    """Leave in the store what preparing these tasks would have left; features are drawn around those of one image."""
    refresh_config(ctx, project)
    rng = np.random.default_rng(0)
    pixels, size = ctx.images(project.id).get(project.id, ids[0], image)
    book = fit_image(pixels, DEFAULT_K, rng)
    project.store.write_json(project.key("codebook.json"), {"codebook": book.to_json(), "tasks": len(ids)})
    clusters, labels = clusters_name(ctx, project), cluster_map(pixels, book)
    counts = count_clusters(labels)
    for task in ids:
        project.store.write_map(project.cluster_key(clusters, task), labels)
    stamps = {row["id"]: row.get("updated_at", "") for row in ctx.studio.tasks(project.id)}
    records = {t: TaskRecord(t, image, stamps[t], size=size, clusters=clusters, counts=counts) for t in ids}
    project.save_index(records)
    sees, places = extractor(ctx.settings.network)[0], spread_pixels((labels.shape[0], labels.shape[1]), PIXELS)
    [seen] = sees.sample([pixels], [places])
    spread, draw = seen.std(0), torch.Generator().manual_seed(0)

    def drawn() -> torch.Tensor:
        return seen[torch.randperm(PIXELS, generator=draw)] + spread * torch.randn(seen.shape, generator=draw)

    colour = pixels[places[:, 0], places[:, 1]]
    fit, _ = make_fit(ctx, [drawn() for _ in range(SAMPLE_IMAGES)], [colour] * SAMPLE_IMAGES, rng)
    for part in split(ids, PACK):
        features = torch.stack([fit.scaling(drawn()).half() for _ in part])
        write_pack(ctx, project, fit, [records[task] for task in part], features)
    project.store.write_arrays(project.key("pool.npz"), fit.to_arrays())


def publish_item(stage: Stage, tasks: int) -> Item:
    """A whole order beside a bare import of as many predictions."""
    ctx, project, ratios, seconds = stage.ctx, stage.project, [], []
    index, config = project.index(), project.config()
    for number in range(1, ROUNDS + 1):
        places = [Place(task, "full", 0.0, {}) for task in index]
        rows = [
            {"task": t, "result": [], "score": i / tasks, "model_version": f"bare-{number}"}
            for i, t in enumerate(index)
        ]
        project.store.delete(project.key("served.json"))  # else only the head would change
        start = time.perf_counter()
        publish_order(ctx, project, index, config, places, number)
        between = time.perf_counter()
        ctx.studio.import_predictions(project.id, rows)
        seconds.append(time.perf_counter() - between)
        ratios.append((between - start) / seconds[-1])
    said = f"bulk import of {tasks} predictions, {np.median(seconds):.3g} s"
    return ratio(f"publish/import {tasks}", WHOLE, ratios, said, processor())


def submit_items(stage: Stage, tasks: int) -> Iterator[Item]:
    """From a person's Submit to the head of the new order being served, and the share of Label Studio in it."""
    ctx, project, found, theirs, steps = stage.ctx, stage.project, [], [], []
    with start_worker(stage.folder, stage.environment):
        ctx.board.request_round(project.id, "perf")
        settle(ctx, project)
        for _ in range(ROUNDS + 1):
            seconds, answered = submit(ctx, project)
            found.append(seconds / SOON[tasks])
            theirs.append(answered / seconds)
            steps.append(project.store.read_json(project.key("laps.json")) or {})
        together = [submit_together(ctx, project) / SOON[tasks] for _ in range(ROUNDS)]
        memory = max(child.memory_info().rss for child in workers())
    # The first one loads the backbone.
    each = ", ".join(f"{name} {np.median([row[name] for row in steps[1:]]):.0f}" for name in steps[-1])
    said = f"{SOON[tasks]:g} s from Submit to the new head, of {tasks} tasks; milliseconds: {each}"
    yield ratio(f"submit/{SOON[tasks]:g}s {tasks}", 1.0, found[1:], said, processor())
    said = f"the same, of {PEOPLE} people who submit at once, to a head that has learnt all of it"
    yield ratio(f"submit/{SOON[tasks]:g}s {tasks} together", 1.0, together, said, processor())
    said = f"1.5 GB of memory of the worker, of {tasks} tasks"
    yield ratio(f"memory/1.5GB {tasks}", 1.0, [memory / 1.5e9], said, processor())
    said = "the same; the answers to Submit and to the question for the next task alone"
    yield ratio(f"Label Studio/submit {tasks}", 1.0, theirs[1:], said, processor())


def submit(ctx: Context, project: Project) -> tuple[float, float]:
    """Seconds from submitting the served task until Label Studio serves the head of a newer order.

    Returns:
        All of them, and those that Label Studio took to answer the person's two requests.
    """
    before, task, result = int(project.state()["round"]), ctx.studio.next_task(project.id), drawn(project)
    assert task is not None
    start = time.perf_counter()
    ctx.studio.create_annotation(int(task["id"]), result)
    sent = time.perf_counter()
    # Not asked for a task meanwhile: Label Studio would hold that one for us whatever the new order is.
    settle(ctx, project, before)
    settled = time.perf_counter()
    served = ctx.studio.next_task(project.id)
    taken = time.perf_counter() - start
    theirs = taken - (settled - sent)
    head = project.store.read_json(project.key("ranking.json"))[0]["task"]
    if served is None or served["id"] != head:
        raise JobError(f"Label Studio serves {served and served['id']}, but the new order begins with {head}")
    return taken, theirs


def drawn(project: Project) -> list[dict[str, Any]]:
    """The regions that a person submits."""
    mask = np.zeros((96, 128), np.uint8)
    mask[:, 40:] = 1
    return fine_regions(mask, np.full(mask.shape, 255, np.uint8), project.config(), (128, 96))


def submit_together(ctx: Context, project: Project) -> float:
    """Seconds from several people's submitting at once until an order is served that knows all of it."""
    before, result = int(project.state()["round"]), drawn(project)
    tasks = [row["task"] for row in project.store.read_json(project.key("ranking.json"))[:PEOPLE]]
    start = time.perf_counter()
    with ThreadPoolExecutor(PEOPLE) as people:
        list(people.map(lambda task: ctx.studio.create_annotation(task, result), tasks))
    settle(ctx, project, before)
    while not all(project.index()[task].labelled for task in tasks):  # an event is still on its way
        settle(ctx, project, int(project.state()["round"]))
    return time.perf_counter() - start


def workers() -> list[psutil.Process]:
    """Our workers, without their supervisors."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "backend.worker" in child.cmdline()]


def settle(ctx: Context, project: Project, after: int = 0) -> None:
    """Wait for an order newer than round `after`, and until nothing is left to do."""
    until = time.monotonic() + 600
    while ctx.board.busy(project.id) or ctx.board.wished(project.id) or ctx.board.state(project.id)["round"] <= after:
        if time.monotonic() > until:
            raise JobError(f"no order within 10 min: {ctx.board.error(project.id)}")
        time.sleep(0.005)
