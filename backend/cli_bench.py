"""`firstrow bench`: its arguments; the work is in bench.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from backend.settings import Settings


def add(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `firstrow bench` and its steps."""
    steps = parser.add_subparsers(required=True, metavar="STEP")
    run = steps.add_parser("run", help="run what is missing in a folder of results")
    run.add_argument("--data", action="append", required=True, metavar="DIR", help="pixel-labelled; may be repeated")
    run.add_argument("--source", metavar="DIR", help="pixel-labelled folder to learn first")
    run.add_argument("--strategies", type=_names, required=True, metavar="A,B", help="see docs/strategies.md")
    run.add_argument("--budget", type=positive, default=20, help="labelled images (default: %(default)s)")
    run.add_argument("--tail", type=_counts, default=(), metavar="25,50,100", help="further numbers of labelled images")
    run.add_argument("--query-size", type=positive, default=1, help="picked at a time (default: %(default)s)")
    run.add_argument("--seeds", type=positive, default=5, help="curves per strategy (default: %(default)s)")
    run.add_argument(
        "--scale", choices=("smoke", "head", "small", "gpu"), default="head", help="(default: %(default)s)"
    )
    run.add_argument(
        "--learner", choices=("instant", "deep"), default="instant", help="a head made of sums, or a trained network"
    )
    run.add_argument("--network", default="lraspp_efficientnet_lite0", help="(default: %(default)s)")
    run.add_argument("--start", choices=("pretrained", "scratch"), default="pretrained", help="(default: %(default)s)")
    run.add_argument("--no-weak", action="store_true", help="train on full labels only")
    run.add_argument("--layers", choices=("last", "head", "all"), default="last", help="whose gradient (default: last)")
    run.add_argument("--workers", type=positive, help="processes (default: the cores, or 1 for a GPU)")
    run.add_argument("--queue", action="store_true", help="over firstrow workers; they must see the same folders")
    run.add_argument("--out", required=True, metavar="OUT", help="folder of the results")
    run.set_defaults(run=_run_bench)
    report = steps.add_parser("report", help="figures, tables and summary of a folder of results")
    report.add_argument("out", metavar="OUT")
    report.set_defaults(run=_run_report)
    render = steps.add_parser("render", help="render two pixel-labelled fields, field-source and field-target")
    render.add_argument("out", metavar="DIR")
    render.set_defaults(run=_run_render)


def _run_bench(given: argparse.Namespace) -> None:
    from backend import bench
    from backend.enqueue import Board

    order = bench.Order(
        data=tuple(Path(folder) for folder in given.data),
        strategies=given.strategies,
        budget=given.budget,
        tail=given.tail,
        query_size=given.query_size,
        seeds=given.seeds,
        scale=given.scale,
        network=given.network,
        start=given.start,
        source=Path(given.source) if given.source else None,
        weak=not given.no_weak,
        layers=given.layers,
        learner=given.learner,
        out=Path(given.out),
    )
    board = Board(Settings.read().redis_url) if given.queue else None
    written = bench.bench(order, given.workers or bench.cores(), board, Console(stderr=True))
    sys.stdout.write(f"{written} rows written to {order.out / 'results.csv'}\n")


def _run_report(given: argparse.Namespace) -> None:
    from backend import bench

    sys.stdout.write(f"report in {bench.report(Path(given.out))}\n")


def _run_render(given: argparse.Namespace) -> None:
    from backend import bench

    bench.render(Path(given.out))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive(part) for part in text.split(",")}))


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
