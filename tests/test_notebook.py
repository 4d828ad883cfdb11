"""The code in docs/strategies.md runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from backend import cli
from model.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "strategies.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def test_a_researchers_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept, space = dict(STRATEGIES), dict[str, object]()
    try:
        for block in BLOCKS:
            exec(block, space)  # noqa: S102
    finally:
        STRATEGIES.clear()
        STRATEGIES.update(kept)
    assert len(space["gradients"]) == 8  # type: ignore[arg-type]
    assert [row.n for row in space["rows"]] == [0, 1, 2, 3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", BLOCKS)
def test_it_takes_fewer_than_thirty_lines(block: str) -> None:
    assert len(block.strip().splitlines()) < 30


def test_its_commands_are_understood() -> None:
    commands = re.findall(r"^\.venv/bin/firstrow (.*)$", TEXT, re.M)
    assert len(commands) == 3
    for command in commands:
        cli._parser().parse_args(command.split())


def test_strategies_named_there_exist() -> None:
    table = TEXT.partition("## Sources")[2].partition("## What the reviewers")[0]
    assert set(re.findall(r"`([a-z-]+)`", table)) <= set(STRATEGIES)
