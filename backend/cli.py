"""The firstrow command: thin; each subcommand names its settings in one line and leaves the work to a module."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from redis import RedisError
from rich.console import Console

from backend import cli_bench
from backend.cli_bench import positive
from backend.errors import AttachRefused, FirstRowError, JobError
from backend.perf import GROUPS
from backend.settings import Settings

if TYPE_CHECKING:
    from backend.context import Context

#: Seconds that `detach` waits for running jobs.
STOP_SECONDS = 120
EPILOG = "Settings come from the environment (LABEL_STUDIO_*, REDIS_URL, FIRSTROW_*): see docs/settings.md."


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
    _export_coarse(commands.add_parser("export-coarse", help="write all coarse labels to a file"))
    _status(commands.add_parser("status", help="stages, round, jobs, head of the queue, last error"))
    cli_bench.add(commands.add_parser("bench", help="learning curves of query strategies on pixel-labelled folders"))
    _perf(commands.add_parser("perf", help="how fast this machine is at it, as ratios measured side by side"))
    _secret(commands.add_parser("secret", help="print a project's secret, its Basic auth password (user firstrow)"))
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="FOLDER", help="a pixel-labelled folder; a rendered field by default")
    parser.add_argument("--folder", default=".demo", help="where it keeps its things (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=4, help="(default: %(default)s)")
    parser.add_argument("--exit", action="store_true", help="stop everything at the end")
    parser.set_defaults(run=_run_demo)


def _serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 when Label Studio is elsewhere (default: %(default)s)"
    )
    parser.add_argument("--port", type=positive, help="(default: FIRSTROW_PORT)")
    parser.add_argument("--workers", type=positive, default=2, help="processes (default: %(default)s)")
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
    parser.add_argument("--dry-run", action="store_true", help="print the plan only")
    parser.add_argument(
        "--coarse",
        choices=("keep", "file"),
        help="coarse labels stay annotations, with the control that they need; or are saved to a file and deleted",
    )
    parser.add_argument("--file", type=Path, metavar="PATH", help="where coarse labels are saved, with --coarse file")
    parser.set_defaults(run=_run_detach)


def _export_coarse(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.add_argument("--file", type=Path, metavar="PATH", help="(default: coarse-ID.json)")
    parser.add_argument("--force", action="store_true", help="replace the file where there is one")
    parser.set_defaults(run=_run_export_coarse)


def _status(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=_run_status)


def _secret(parser: argparse.ArgumentParser) -> None:
    _project(parser)
    parser.set_defaults(run=_run_secret)


def _perf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="a line per item: name, ratio, target, base, device")
    groups = ",".join(GROUPS)
    parser.add_argument("--only", type=_groups_of_perf, default=GROUPS, metavar="A,B", help=f"(default: {groups})")
    parser.set_defaults(run=_run_perf)


def _project(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--project", type=positive, required=True, metavar="ID", help="Label Studio's project id")


def _run_demo(given: argparse.Namespace) -> int:
    _say("Loading ...")  # takes ten seconds
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

    ctx = _connect(settings)
    plan = attach.plan(ctx.studio, given.project, ctx.settings, _groups(given.group))
    for sentence in plan.sentences:
        _say(sentence)
    if not given.dry_run:
        ctx.board.register(given.project)  # first: without Redis it must not be half done
        attach.apply(plan)
        ctx.board.reconcile(given.project)


def _run_detach(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend.detach import detach, plan_detach

    ctx = _connect(settings)
    project = ctx.project(given.project)
    known: dict[str, Any] = {"note": project.extra(), "kept": project.coarse_answers()}
    wanted = (ctx.studio, given.project, ctx.settings, given.coarse, given.file)
    _say(f"Looking at project {given.project} ...")
    planned = [step.text for step in plan_detach(*wanted, **known, ask=given.dry_run)]  # refused before we stop
    if given.dry_run:
        for sentence in planned:
            _say(sentence)
        return
    _say("Stop the jobs of this project.")
    if not ctx.board.stop(given.project, STOP_SECONDS):
        _say("A job is still busy with one long step; after it, it changes nothing more.")
    try:
        for sentence in detach(*wanted, **known):
            _say(sentence)
        if ctx.board.running(given.project):
            raise JobError(
                f"a job of project {given.project} is still busy: what it has asked Label Studio for may be done after "
                f"we looked, so run `firstrow detach --project {given.project}` once more when it has ended"
            )
    except BaseException:
        _forget(ctx, given.project)
        ctx.board.stop(given.project, 0)  # until `attach`, or a detach that ends
        raise
    _forget(ctx, given.project)


def _forget(ctx: Context, project: int) -> None:
    """There is no order of ours any more."""
    ctx.board.forget(project)
    ctx.project(project).forget_order()


def _run_export_coarse(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend.export_coarse import export_answers

    ctx, file = _connect(settings), given.file or Path(f"coarse-{given.project}.json")
    if file.exists() and not given.force:
        raise AttachRefused(f"{file} is there already: name another file, or replace it with `--force`")
    project = ctx.project(given.project)
    count = export_answers(ctx.studio, project.id, ctx.settings, project.extra(), project.coarse_answers(), file)
    _say(f"{count} coarse labels of project {given.project} are in {file}.")


def _run_status(given: argparse.Namespace) -> None:
    settings = _settings(quiet=True)
    from backend.status import show, status

    found = status(_connect(settings), given.project)
    if given.json:
        _say(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())
    else:
        show(found, Console())


def _run_perf(given: argparse.Namespace) -> int:
    from backend import perf

    return perf.run(given.only, given.json)


def _run_secret(given: argparse.Namespace) -> None:
    _say(_settings(quiet=True).project_secret(given.project))


def _connect(settings: Settings) -> Context:
    """The doors of a command that somebody waits for: of a Redis that does not answer they say so within seconds."""
    from backend.context import connect

    found = connect(settings)
    found.board.hurry()
    return found


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


def _groups_of_perf(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if set(names) - set(GROUPS):
        raise argparse.ArgumentTypeError(f"of {', '.join(GROUPS)}, with a comma between")
    return names


def _queues(text: str) -> str:
    names = text.split(",")
    if not names or set(names) - {"gpu", "default"} or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError("one or both of gpu and default, with a comma between")
    return text


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # somebody may read it through a pipe


def _fail(text: str) -> int:
    sys.stderr.write(f"firstrow: {text}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
