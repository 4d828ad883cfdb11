"""With FIRSTROW_LEARNER=deep, too, damaged files are made again without a hand, and a killed worker loses nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Backends
from team import Team
from test_harm import Pictures, killed, labelled_team, recovered

from backend.embedded import Studio

#: Kinds of files that this learner alone leaves, a round for each group; a round that trains looks at no earlier score.
KINDS = [(["network.json"], True), (["models/"], True), (["scores/", "predictions/"], False)]


@pytest.fixture(scope="module")
def team(
    studio: Studio, redis_url: str, tmp_path_factory: pytest.TempPathFactory, pictures: Pictures
) -> Iterator[Team]:
    """A project with coarse and full labels, and a backend of its own that trains a network."""
    with Backends(studio, redis_url, tmp_path_factory.mktemp("deep")) as backends:
        backend = backends.start(FIRSTROW_COARSE_TASKS="1", FIRSTROW_LEARNER="deep")
        yield labelled_team(backend, dict(list(pictures.items())[:4]))


@pytest.mark.parametrize(("kinds", "train"), KINDS, ids=["network", "models", "scores"])
@pytest.mark.parametrize("left", [0.5, 0.0, None], ids=["half", "empty", "zeros"])
def test_a_damaged_file_is_made_whole_without_a_hand(
    team: Team, kinds: list[str], train: bool, left: float | None
) -> None:
    recovered(team, kinds, lambda data: bytes(len(data)) if left is None else data[: int(left * len(data))], train)


@pytest.mark.parametrize("step", ["train", "score", "publish"])
def test_a_worker_killed_in_a_step_costs_only_that_step(team: Team, step: str) -> None:
    killed(team, step, 0.0)
