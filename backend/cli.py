"""The firstrow command: thin; each subcommand names its settings in one line and leaves the work to a module."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import orjson
from redis import RedisError
from rich.console import Console

from backend.errors import FirstRowError
from backend.settings import Settings

EPILOG = (
    "Settings come from the environment (LABEL_STUDIO_URL, LABEL_STUDIO_API_KEY, REDIS_URL, FIRSTROW_*); see README."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The exit status: 0, 1 after a fault (one line on stderr), 2 for wrong usage, 130 after Ctrl-C.
    """
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given) or 0)
    except FirstRowError as error:
        return _fail(str(error))
    except RedisError as error:
        return _fail(f"Redis does not answer ({error}): start it or set REDIS_URL")
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="firstrow", description="Active learning for Label Studio.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"firstrow {version('firstrow')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _demo(commands.add_parser("demo", help="play a whole loop on a Label Studio of its own"))
    _serve(commands.add_parser("serve", help="answer Label Studio (the web process)"))
    _worker(commands.add_parser("worker", help="run jobs: clusters, training, scoring, publishing"))
    _attach(commands.add_parser("attach", help="connect a project; safe to repeat"))
    _detach(commands.add_parser("detach", help="put back what was there before attach"))
    _status(commands.add_parser("status", help="stages, round, jobs, head of the queue, last error"))
    _bench(commands.add_parser("bench", help="learning curves of query strategies on pixel-labelled folders"))
    secret = commands.add_parser("secret", help="print the secret to enter as Basic auth password (user firstrow)")
    secret.set_defaults(run=_run_secret)
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="a pixel-labelled folder; a rendered field by default")
    parser.add_argument("--folder", default=".demo", help="where it keeps its things (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--exit", action="store_true", help="stop everything at the end")
    parser.set_defaults(run=_run_demo)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 when Label Studio is elsewhere (default: %(default)s)"
    )
    parser.add_argument("--port", type=_positive, help="(default: FIRSTROW_PORT)")
    parser.add_argument("--workers", type=_positive, default=2, help="processes (default: %(default)s)")
    parser.set_defaults(run=_run_serve)


def _worker(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queues", type=_queues, default="gpu,default", help="first one first (default: %(default)s)")
    parser.set_defaults(run=_run_worker)


def _attach(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    parser.add_argument(
        "--group",
        type=_group,
        action="append",
        default=[],
        metavar="COARSE=FINE,FINE",
        help="fine classes of one coarse label, for example Vegetation=Crop,Weed; may be repeated",
    )
    parser.set_defaults(run=_run_attach)


def _detach(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.set_defaults(run=_run_detach)


def _status(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_run_status)


def _bench(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(required=True, metavar="STEP")
    run = steps.add_parser("run", help="run what is missing in a folder of results")
    run.add_argument("--data", action="append", required=True, metavar="DIR", help="pixel-labelled; may be repeated")
    run.add_argument("--source", metavar="DIR", help="pixel-labelled folder to learn first")
    run.add_argument("--strategies", type=_names, required=True, metavar="A,B", help="see README")
    run.add_argument("--budget", type=_positive, default=20, help="labelled images (default: %(default)s)")
    run.add_argument("--tail", type=_counts, default=(), metavar="25,50,100", help="further numbers of labelled images")
    run.add_argument("--query-size", type=_positive, default=1, help="picked at a time (default: %(default)s)")
    run.add_argument("--seeds", type=_positive, default=5, help="curves per strategy (default: %(default)s)")
    run.add_argument(
        "--scale", choices=("smoke", "head", "small", "gpu"), default="head", help="(default: %(default)s)"
    )
    run.add_argument("--network", default="lraspp_efficientnet_lite0", help="(default: %(default)s)")
    run.add_argument("--start", choices=("pretrained", "scratch"), default="pretrained", help="(default: %(default)s)")
    run.add_argument("--no-weak", action="store_true", help="train on full labels only")
    run.add_argument("--layers", choices=("last", "head", "all"), default="last", help="whose gradient (default: last)")
    run.add_argument("--workers", type=_positive, help="processes (default: the cores, or 1 for a GPU)")
    run.add_argument("--queue", action="store_true", help="over firstrow workers; they must see the same folders")
    run.add_argument("--out", required=True, metavar="OUT", help="folder of the results")
    run.set_defaults(run=_run_bench)
    report = steps.add_parser("report", help="figures, tables and summary of a folder of results")
    report.add_argument("out", metavar="OUT")
    report.set_defaults(run=_run_report)
    render = steps.add_parser("render", help="render two pixel-labelled fields, field-source and field-target")
    render.add_argument("out", metavar="DIR")
    render.set_defaults(run=_run_render)


def _project(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", type=_positive, required=True, metavar="ID", help="Label Studio's project id")


def _run_demo(given: argparse.Namespace) -> int:
    from backend import demo

    return demo.main(given.folder, given.data, given.rounds, not given.exit)


def _run_serve(given: argparse.Namespace) -> None:
    settings = _settings()
    from backend.server import serve

    serve(settings, given.host, given.port or settings.port, given.workers)


def _run_worker(given: argparse.Namespace) -> int:
    _settings()  # its faults are worth one line here, not one per restart of the worker
    from backend.supervisor import run

    return run(given.queues.split(","))


def _run_attach(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend import attach
    from backend.context import connect

    ctx = connect(settings)
    plan = attach.plan(ctx.studio, given.project, ctx.settings, _groups(given.group))
    for sentence in plan.sentences:
        _say(sentence)
    if not given.dry_run:
        ctx.board.register(given.project)  # first: without Redis it must not be half done
        attach.apply(plan)
        ctx.board.reconcile(given.project)


def _run_detach(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend import attach
    from backend.context import connect

    ctx = connect(settings)
    for sentence in attach.detach(ctx.studio, given.project, ctx.settings):
        _say(sentence)
    ctx.board.forget(given.project)
    ctx.project(given.project).forget_order()


def _run_status(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend.context import connect
    from backend.status import show, status

    found = status(connect(settings), given.project)
    if given.json:
        _say(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())
    else:
        show(found, Console())


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
        out=Path(given.out),
    )
    board = Board(_settings(quiet=True).redis_url) if given.queue else None
    written = bench.bench(order, given.workers or bench.cores(), board, Console(stderr=True))
    _say(f"{written} rows written to {order.out / 'results.csv'}")


def _run_report(given: argparse.Namespace) -> None:
    from backend import bench

    _say(f"report in {bench.report(Path(given.out))}")


def _run_render(given: argparse.Namespace) -> None:
    from backend import bench

    bench.render(Path(given.out))


def _run_secret(given: argparse.Namespace) -> None:
    _say(_settings(quiet=True).secret_value())


def _settings(quiet: bool = False) -> Settings:
    """The settings, and a log on stderr; `quiet` for commands whose output is for people, their faults one line."""
    settings = Settings.read()
    level = "ERROR" if quiet else settings.log_level
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    return settings


def _groups(given: Sequence[tuple[str, list[str]]]) -> Mapping[str, Sequence[str]] | None:
    return dict(given) or None


def _group(text: str) -> tuple[str, list[str]]:
    name, equals, members = text.partition("=")
    found = [member.strip() for member in members.split(",") if member.strip()]
    if not (name.strip() and equals and found):
        raise argparse.ArgumentTypeError(f"{text!r} is not COARSE=FINE,FINE")
    return name.strip(), found


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_positive(part) for part in text.split(",")}))


def _queues(text: str) -> str:
    names = text.split(",")
    if not names or set(names) - {"gpu", "default"} or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError("one or both of gpu and default, with a comma between")
    return text


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _fail(text: str) -> int:
    sys.stderr.write(f"firstrow: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
