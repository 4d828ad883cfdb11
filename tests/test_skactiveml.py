"""BADGE, CoreSet and TypiClust pick what scikit-activeml picks on the same vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skactiveml.base import SkactivemlClassifier
from skactiveml.pool import Badge, CoreSet, TypiClust
from skactiveml.utils import MISSING_LABEL

from model.spread import NEIGHBOURS
from model.strategies import STRATEGIES, Pool

N, PICKS = 90, 8


class Fed(np.random.Generator):
    """A generator that draws what the library's random state draws after the same seed."""

    def __init__(self, seed: int, unlabelled: int) -> None:
        super().__init__(np.random.PCG64(seed))
        first = np.random.RandomState(seed).randint(1, 2**31)
        # The library mixes the number of images without a label into its seed.
        self.state = np.random.RandomState((first * (unlabelled + 1)) % 2**31)

    def choice(self, a: Any, size: Any = None, replace: Any = True, p: Any = None, *rest: Any) -> Any:  # type: ignore[override]
        return self.state.choice(a, 1, replace=False, p=p)[0]


class Given(SkactivemlClassifier):  # type: ignore[misc]
    """A classifier whose probabilities are given."""

    def __init__(self, probabilities: Any = None, classes: Any = None, missing_label: Any = MISSING_LABEL) -> None:
        super().__init__(classes=classes, missing_label=missing_label)
        self.probabilities = probabilities

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Given:  # noqa: N803
        return self

    def predict_proba(self, X: Any) -> Any:  # noqa: N803
        return self.probabilities[: len(X)]  # labelled images come last, and are not asked for


def scene(seed: int, labelled: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Features in clumps, as those of a pool are, and labels of its last images."""
    rng = np.random.default_rng(seed)
    clump = rng.choice(5, N, p=[0.4, 0.25, 0.15, 0.12, 0.08])  # of different sizes: no ties
    features = rng.normal(size=(5, 6))[clump] * 4 + rng.normal(size=(N, 6))
    y = np.full(N, MISSING_LABEL)
    y[N - labelled :] = 0
    return features, y


def pool_of(features: NDArray[np.float64], labelled: int, own: NDArray[np.float64] | None = None) -> Pool:
    """The same for our strategies."""
    cut = N - labelled
    vectors = {} if own is None else {"own": own[:cut]}
    return Pool({}, features[:cut], features[:cut], features[cut:], features[cut:], vectors)


@pytest.mark.parametrize("labelled", [0, 1, 4, 12])
@pytest.mark.parametrize("seed", range(5))
def test_badge_draws_the_same_images_whatever_is_labelled(seed: int, labelled: int) -> None:
    features, y = scene(seed, labelled)
    p = np.random.default_rng(seed + 100).dirichlet(np.ones(3), N)
    residual = p - np.eye(3)[p.argmax(1)]
    own = (residual[:, :, None] * features[:, None]).reshape(N, -1)
    library = Badge(random_state=seed)
    picked = library.query(features, y, Given(p, [0, 1, 2]), fit_clf=False, batch_size=PICKS)
    ours = STRATEGIES["badge"](pool_of(features, labelled, own), Fed(seed, N - labelled))
    assert [int(i) for i in ours.order[:PICKS]] == [int(i) for i in picked]


@pytest.mark.parametrize("labelled", [1, 4, 12])
@pytest.mark.parametrize("seed", range(4))
def test_coreset_picks_the_same_images(seed: int, labelled: int) -> None:
    features, y = scene(seed, labelled)
    picked = CoreSet(random_state=seed).query(features, y, batch_size=PICKS)
    ours = STRATEGIES["coreset"](pool_of(features, labelled), np.random.default_rng(seed))
    assert [int(i) for i in ours.order[:PICKS]] == [int(i) for i in picked]


class Beginning(np.random.Generator):
    """A generator that breaks the tie between equals for one image."""

    def __init__(self, first: int) -> None:
        super().__init__(np.random.PCG64(0))
        self.first = first

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.roll(np.arange(x), self.first + 1)


@pytest.mark.parametrize("seed", range(4))
def test_coreset_without_labels_goes_on_like_the_library_from_its_chance_image(seed: int) -> None:
    features, y = scene(seed, 0)
    picked = CoreSet(random_state=seed).query(features, y, batch_size=PICKS)
    ours = STRATEGIES["coreset"](pool_of(features, 0), Beginning(int(picked[0])))
    assert [int(i) for i in ours.order[:PICKS]] == [int(i) for i in picked]


@pytest.mark.parametrize("labelled", [0, 1, 4, 12])
@pytest.mark.parametrize("seed", range(4))
def test_typiclust_picks_the_same_image_given_the_same_seed_of_its_clusters(seed: int, labelled: int) -> None:
    features, y = scene(seed, labelled)
    rng = np.random.default_rng(seed)
    clusters = {"n_init": "auto", "random_state": int(np.random.default_rng(seed).integers(2**31))}
    picked = TypiClust(k=NEIGHBOURS, cluster_algo_dict=clusters, random_state=seed).query(features, y)
    ours = STRATEGIES["typiclust"](pool_of(features, labelled), rng)
    assert int(ours.order[0]) == int(picked[0])


def test_typiclust_counts_its_choices_as_labelled() -> None:
    features, _ = scene(0, 0)
    rng = np.random.default_rng(3)
    ours = STRATEGIES["typiclust"](pool_of(features, 0), np.random.default_rng(3)).order
    chosen: list[int] = []
    for _ in range(3):
        y = np.full(N, MISSING_LABEL)
        y[chosen] = 0
        # Two draws for each place of ours: the seed of the clusters, and among equals.
        clusters = {"n_init": "auto", "random_state": int(rng.integers(2**31))}
        rng.choice(1), rng.choice(1)
        chosen.append(int(TypiClust(k=NEIGHBOURS, cluster_algo_dict=clusters, random_state=0).query(features, y)[0]))
    assert [int(i) for i in ours[:3]] == chosen
