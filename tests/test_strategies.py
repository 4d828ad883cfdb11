"""One contract for all strategies, and the order of each where it is obvious."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from model.extras import NUMBERS, VECTORS
from model.scoring import ImageScore
from model.spread import typicality, van_der_corput
from model.strategies import COVER, DEFAULT, NEEDS, REFERENCES, STRATEGIES, Pool, Ranking

PLAIN = [field.name for field in fields(ImageScore) if field.type == "float"]
NAMES = [*PLAIN, *NUMBERS, "oracle"]
ALL = STRATEGIES | REFERENCES
EVERY = pytest.mark.parametrize("name", ALL)
#: Strategies whose answer is chance, if weighted.
CHANCE = {"random", "foreground-random", "power-bald", "class-stratified", "badge"}


def make(n: int, labelled: int = 0, seed: int = 0, /, **scores: Any) -> Pool:
    """A pool without structure; named scores are as given."""
    rng = np.random.default_rng(seed)
    return Pool(
        {name: scores.get(name, rng.random(n)) for name in NAMES},
        rng.normal(size=(n, 12)).astype(np.float32),
        rng.normal(size=(n, 8)).astype(np.float32),
        rng.normal(size=(labelled, 12)).astype(np.float32),
        rng.normal(size=(labelled, 8)).astype(np.float32),
        arrays(n, rng),
        arrays(labelled, rng),
        {name: rng.random(labelled) for name in NAMES},
    )


def arrays(n: int, rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    """Vectors and matrices of n images."""
    root = rng.normal(size=(n, 6, 3))
    return {
        "own": rng.normal(size=(n, 12)),
        "fisher": root @ root.transpose(0, 2, 1),
        "class_entropy": rng.random((n, 3)),
    }


def taken(pool: Pool, rows: NDArray[np.intp]) -> Pool:
    """The pool in another order, or a part of it."""
    scores = {name: values[rows] for name, values in pool.scores.items()}
    vectors = {name: values[rows] for name, values in pool.vectors.items()}
    parts = {"scores": scores, "embedding": pool.embedding[rows], "features": pool.features[rows], "vectors": vectors}
    return Pool(**{**vars(pool), **parts})


def ask(name: str, pool: Pool, seed: int = 0) -> Ranking:
    """The strategy's answer, checked for what holds of every answer."""
    ranking = ALL[name](pool, np.random.default_rng(seed))
    assert sorted(ranking.order) == list(range(len(pool)))
    assert ranking.order.dtype == np.intp
    for values in (ranking.utility, *ranking.parts.values()):
        assert values.shape == (len(pool),)
        assert np.isfinite(values).all()
    return ranking


def ordered(name: str, pool: Pool, seed: int = 0) -> list[int]:
    """Pool indices, most wanted first."""
    return [int(i) for i in ask(name, pool, seed).order]


@EVERY
@pytest.mark.parametrize("labelled", [0, 1, 5])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 40])
def test_any_size_of_pool_gives_a_permutation(name: str, n: int, labelled: int) -> None:
    ask(name, make(n, labelled))


@EVERY
def test_a_pool_that_says_nothing_is_ranked(name: str) -> None:
    assert ordered(name, Pool({key: np.zeros(0) for key in NAMES})) == []


@EVERY
@pytest.mark.parametrize("labelled", [0, 4])
def test_same_seed_same_answer(name: str, labelled: int) -> None:
    pool = make(60, labelled)
    first, second = ask(name, pool, 7), ask(name, pool, 7)
    np.testing.assert_array_equal(first.order, second.order)
    np.testing.assert_array_equal(first.utility, second.utility)


@pytest.mark.parametrize("name", sorted(set(ALL) - CHANCE - {"coverage", "first-row", "novel-egl", "typiclust"}))
def test_the_order_of_tasks_in_the_project_means_nothing(name: str) -> None:
    pool, rows = make(50, 3), np.random.default_rng(1).permutation(50)
    assert [int(rows[i]) for i in ordered(name, taken(pool, rows))] == ordered(name, pool)


@EVERY
@pytest.mark.parametrize("labelled", [0, COVER])
def test_an_order_follows_its_utility(name: str, labelled: int) -> None:
    ranking = ask(name, make(50, labelled))
    falling = ranking.utility[ranking.order]
    assert (np.diff(falling) <= 1e-6).all()


@EVERY
@pytest.mark.parametrize("labelled", [0, 4])
def test_identical_images_tie_and_ties_are_broken_by_chance(name: str, labelled: int) -> None:
    pool = taken(make(1, labelled), np.zeros(30, np.intp))
    orders = {tuple(ordered(name, pool, seed)) for seed in range(5)}
    assert len(orders) > 1


@EVERY
def test_the_first_places_are_the_same_however_many_are_wanted(name: str) -> None:
    pool = make(30, 2)
    whole = ask(name, pool).order.tolist()
    for count in (1, 3):
        found = ask(name, dataclasses.replace(pool, places=count)).order.tolist()
        assert found[:count] == whole[:count]
        assert sorted(found) == sorted(whole)


@EVERY
def test_inputs_stay_as_they_are(name: str) -> None:
    pool = make(30, 2)
    before = copy.deepcopy(pool)
    for array in parts_of(pool):
        array.setflags(write=False)
    ask(name, pool)
    for now, then in zip(parts_of(pool), parts_of(before), strict=True):
        np.testing.assert_array_equal(now, then)


def parts_of(pool: Pool) -> list[NDArray[Any]]:
    """Every array of a pool."""
    found: list[NDArray[Any]] = []
    for part in vars(pool).values():
        found += part.values() if isinstance(part, dict) else [part] if isinstance(part, np.ndarray) else []
    return found


def test_what_strategies_need_is_there_to_be_had() -> None:
    assert NEEDS.keys() <= ALL.keys()
    assert {extra for needs in NEEDS.values() for extra in needs} <= {*NUMBERS, *VECTORS, "oracle"}
    assert not STRATEGIES.keys() & REFERENCES.keys()
    assert not any("oracle" in NEEDS.get(name, ()) for name in STRATEGIES)


@EVERY
def test_a_strategy_reads_only_what_it_says(name: str) -> None:
    pool, needs = make(20, 4), NEEDS.get(name, ())
    scores = {key: values for key, values in pool.scores.items() if key in PLAIN or key in needs}
    vectors = {key: values for key, values in pool.vectors.items() if key in needs}
    seen = {key: values for key, values in pool.labelled_vectors.items() if key in needs}
    bare = Pool(**{**vars(pool), "scores": scores, "vectors": vectors, "labelled_vectors": seen})
    assert ordered(name, bare) == ordered(name, pool)


@EVERY
def test_thousands_of_images_are_ranked(name: str) -> None:
    rng = np.random.default_rng(0)
    pool = Pool(
        {key: rng.random(2500) for key in NAMES},
        rng.normal(size=(2500, 300)).astype(np.float32),
        rng.normal(size=(2500, 300)).astype(np.float32),
        vectors=arrays(2500, rng),
    )
    assert sorted(ask(name, pool).order) == list(range(2500))


@EVERY
def test_many_labelled_images_are_taken_into_account(name: str) -> None:
    assert sorted(ask(name, make(200, 3000)).order) == list(range(200))


@pytest.mark.parametrize("part", ["entropy", "embedding", "features", "labelled_embedding", "labelled_features"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(part: str, value: float) -> None:
    pool = make(4, 2)
    parts = {**vars(pool), **{name: values for name, values in pool.scores.items() if name == part}}
    parts[part] = np.array(parts[part])
    parts[part].flat[0] = value
    scores = {**pool.scores, **({part: parts.pop(part)} if part in NAMES else {})}
    with pytest.raises(ValueError, match=rf"^{part} of the pool has values that are not finite; score those"):
        Pool(**{**parts, "scores": scores})


def test_parts_that_do_not_fit_together_are_refused() -> None:
    pool = make(4, 2)
    for change in (
        {"features": pool.features[:3]},
        {"scores": {**pool.scores, "egl": np.zeros(5)}},
        {"labelled_embedding": pool.labelled_embedding[:1]},
        {"labelled_embedding": pool.labelled_embedding[:, :3]},
        {"labelled_features": pool.labelled_features[:, :3]},
    ):
        with pytest.raises(ValueError, match=r"differ in length|an embedding and features each|columns in the pool"):
            Pool(**{**vars(pool), **change})


@pytest.mark.parametrize("part", ["labelled_vectors", "labelled_scores"])
def test_labelled_parts_that_do_not_fit_together_are_refused(part: str) -> None:
    pool = make(4, 2)
    short = {name: values[:1] for name, values in getattr(pool, part).items()}
    with pytest.raises(ValueError, match="labelled images differ in length"):
        Pool(**{**vars(pool), part: short})


@pytest.mark.parametrize("part", ["vectors", "labelled_vectors", "labelled_scores"])
def test_further_numbers_that_are_not_finite_are_refused(part: str) -> None:
    pool = make(4, 2)
    bad = {name: np.full_like(values, np.nan) for name, values in getattr(pool, part).items()}
    with pytest.raises(ValueError, match="not finite; score those"):
        Pool(**{**vars(pool), part: bad})


@pytest.mark.parametrize("name", NEEDS)
def test_a_strategy_without_what_it_needs_says_so(name: str) -> None:
    pool, needs = make(10, 5), NEEDS[name]
    scores = {key: values for key, values in pool.scores.items() if key not in needs}
    vectors = {key: values for key, values in pool.vectors.items() if key not in needs}
    with pytest.raises(KeyError):
        ask(name, Pool(**{**vars(pool), "scores": scores, "vectors": vectors}))


def test_the_learned_gradient_without_the_labelled_images_numbers_says_so() -> None:
    with pytest.raises(KeyError):
        ask("learned-gradient", Pool(**{**vars(make(10, 8)), "labelled_scores": {}}))


@EVERY
@pytest.mark.parametrize("labelled", [0, 5])
def test_a_network_that_says_nothing_of_any_image_does_no_harm(name: str, labelled: int) -> None:
    # Zero gradients, one place in feature space, no class seen, a Fisher matrix without rank.
    pool = make(25, labelled)
    zero = {part: np.zeros_like(values) for part, values in vars(pool).items() if isinstance(values, np.ndarray)}
    for part in ("scores", "vectors", "labelled_vectors", "labelled_scores"):
        zero[part] = {key: np.zeros_like(values) for key, values in getattr(pool, part).items()}
    ask(name, Pool(**zero))


@EVERY
def test_copies_of_a_few_images_are_ranked(name: str) -> None:
    ask(name, taken(make(3, 2), np.repeat(np.arange(3), 10)))


def test_the_default_is_there() -> None:
    assert DEFAULT in STRATEGIES


@pytest.mark.parametrize(
    ("name", "score"),
    [("entropy", "entropy"), ("egl", "egl"), ("gradient-magnitude", "magnitude"), ("coarse-egl", "coarse_egl")],
)
def test_a_score_ranks_by_itself_alone(name: str, score: str) -> None:
    values = np.array([0.2, 5.0, 0.0, 1.0])
    assert ordered(name, make(4, 1, **{score: values})) == [1, 3, 0, 2]
    assert ordered(name, make(4, 1, 9, **{score: values})) == [1, 3, 0, 2]


def first_places(foreground: NDArray[np.float64], times: int) -> NDArray[np.float64]:
    """How often each image is wanted most."""
    pool = make(len(foreground), foreground=foreground)
    firsts = [STRATEGIES["foreground-random"](pool, np.random.default_rng(seed)).order[0] for seed in range(times)]
    return np.bincount(firsts, minlength=len(foreground)) / times


def test_foreground_random_chooses_in_proportion_to_the_share_of_foreground() -> None:
    share = np.array([0.4, 0.2, 0.1, 0.0, 0.1])
    times = 4000
    expected = share / share.sum()
    error = np.sqrt(expected * (1 - expected) / times)
    assert (np.abs(first_places(share, times) - expected) <= 4 * error + 1e-6).all()


def test_foreground_random_is_chance_where_nobody_sees_foreground() -> None:
    np.testing.assert_allclose(first_places(np.zeros(4), 2000), 0.25, atol=0.04)


def test_random_gives_every_image_the_same_chance() -> None:
    firsts = [STRATEGIES["random"](make(4), np.random.default_rng(seed)).order[0] for seed in range(2000)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=4) / 2000, 0.25, atol=0.04)


def test_magnitude_range_spreads_every_prefix() -> None:
    order = ordered("magnitude-range", make(16, magnitude=np.arange(16.0)))
    assert order[:7] == [8, 4, 12, 2, 6, 10, 14]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 8, 100])
def test_van_der_corput_names_every_place_once(size: int) -> None:
    assert sorted(van_der_corput(size)) == list(range(size))


def pointing(degrees: list[float], labelled: list[float], **scores: Any) -> Pool:
    """A pool whose gradients point in these directions."""
    pool = make(len(degrees), len(labelled), **scores)
    ours, theirs = (
        np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], 1).reshape(-1, 2)
        for angles in (np.array(degrees, float), np.array(labelled, float))
    )
    return Pool(pool.scores, ours, pool.features, theirs, pool.labelled_features)


def test_direction_range_avoids_what_is_labelled() -> None:
    pool = pointing([5, 95, 0, 185], labelled=[0])
    assert ordered("direction-range", pool) == [3, 1, 0, 2]


def test_direction_range_avoids_what_it_chose_itself() -> None:
    order = ordered("direction-range", pointing([0, 1, 120, 121, 240, 241], labelled=[]))
    assert {place // 2 for place in order[:3]} == {0, 1, 2}


def test_an_image_without_gradient_has_no_direction() -> None:
    pool = pointing([5, 95, 185], labelled=[0])
    pool.embedding[2] = 0
    assert ordered("direction-range", pool) == [1, 0, 2]


def test_length_does_not_count_for_direction() -> None:
    pool = pointing([5, 95, 185], labelled=[0])
    pool.embedding[0] *= 1e6
    pool.embedding[2] *= 1e-6
    assert ordered("direction-range", pool) == [2, 1, 0]


def blobs(sizes: list[int], labelled: list[int], seed: int = 0) -> tuple[Pool, NDArray[np.intp]]:
    """A pool of images in groups that are far apart in feature space, and the group of each."""
    rng = np.random.default_rng(seed)
    middles = rng.normal(size=(len(sizes), 8)) * 30
    group = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    pool = make(len(group), len(labelled), seed)
    features = middles[group] + rng.normal(size=(len(group), 8))
    seen = middles[labelled] + rng.normal(size=(len(labelled), 8)) if labelled else np.zeros((0, 8))
    return Pool(pool.scores, pool.embedding, features, pool.labelled_embedding, seen), group


@pytest.mark.parametrize("name", ["coverage", "first-row", "novel-egl"])
@pytest.mark.parametrize("seed", range(5))
def test_the_first_three_images_are_of_three_groups(name: str, seed: int) -> None:
    pool, group = blobs([20, 30, 25], [], seed)
    assert set(group[ordered(name, pool, seed)[:COVER]]) == {0, 1, 2}


@pytest.mark.parametrize("name", ["coverage", "first-row", "novel-egl"])
def test_coverage_begins_where_nobody_labelled(name: str) -> None:
    pool, group = blobs([40, 30, 5], [0, 1])
    assert group[ordered(name, pool)[0]] == 2


def test_where_every_group_has_a_label_the_one_with_the_fewest_comes_first() -> None:
    pool, group = blobs([40, 40], [0] * 60 + [1])
    assert group[ordered("coverage", pool)[0]] == 1


def test_coverage_prefers_the_typical_image_of_a_group() -> None:
    rng = np.random.default_rng(0)
    features = np.concatenate([np.zeros((1, 4)), rng.normal(size=(40, 4)) * 3])
    base = make(41)
    order = ordered("coverage", Pool(base.scores, base.embedding, features, np.zeros((0, 12)), np.zeros((0, 4))))
    assert order[0] == 0


def test_coverage_of_a_sampled_pool_still_finds_all_groups() -> None:
    pool, group = blobs([1500, 1200, 900], [])
    assert set(group[ordered("coverage", pool)[:COVER]]) == {0, 1, 2}


def test_novel_egl_multiplies_gradient_length_by_novelty_once_three_are_labelled() -> None:
    pool = pointing([0, 90, 90, 10], labelled=[0, 0, 0], coarse_egl=np.array([100.0, 4.0, 9.0, 100.0]))
    ranking = ask("novel-egl", pool)
    novelty = 1 - np.cos(np.radians([0, 90, 90, 10]))
    # The two at 90 degrees are copies: after the longer one the shorter one is nothing new.
    assert [int(i) for i in ranking.order[:2]] == [2, 3]
    assert ranking.utility[2] == pytest.approx(3 * novelty[2], abs=1e-5)
    assert ranking.utility[3] == pytest.approx(10 * novelty[3], abs=1e-5)
    assert ranking.utility[1] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("labelled", range(COVER + 1))
def test_novel_egl_covers_only_what_is_missing_of_the_first_three(labelled: int) -> None:
    pool, group = blobs([20, 20, 20], list(range(labelled)))
    ranking, missing = ask("novel-egl", pool), COVER - labelled
    assert set(group[ranking.order[:missing]]) == set(range(labelled, COVER))
    then = (ranking.parts["gradient"] * ranking.parts["novelty"])[ranking.order[missing:]]
    assert (np.diff(then) <= 1e-6).all()
    assert ("typicality" in ranking.parts) == (missing > 0)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("least-confidence", "least_confidence"),
        ("entropy-top", "entropy_top"),
        ("entropy-foreground", "entropy_foreground"),
        ("bald", "bald"),
        ("pseudo-loss", "pseudo_loss"),
        ("egl-settles", "egl_settles"),
        ("egl-huang", "egl_huang"),
        ("entropy-gradnorm", "entropy_gradnorm"),
        ("coarse-egl-segment", "segment_egl"),
        ("oracle-gradient", "oracle"),
    ],
)
def test_a_score_is_wanted_high(name: str, number: str) -> None:
    assert ordered(name, make(4, 0, **{number: np.array([0.2, 0.4, 0.1, 0.3])})) == [1, 3, 0, 2]


def test_a_margin_is_wanted_low() -> None:
    assert ordered("margin", make(4, 0, margin=np.array([0.2, 0.4, 0.1, 0.3]))) == [2, 0, 3, 1]


def test_magnitude_range_goes_on_where_the_labelled_images_left_it() -> None:
    magnitude = np.arange(16.0)
    assert [ordered("magnitude-range", make(16, m, magnitude=magnitude))[0] for m in range(4)] == [8, 4, 12, 2]


def test_power_bald_chooses_in_proportion_to_bald() -> None:
    pool = make(3, 0, bald=np.array([0.5, 0.3, 0.2]))
    firsts = [STRATEGIES["power-bald"](pool, np.random.default_rng(seed)).order[0] for seed in range(3000)]
    np.testing.assert_allclose(np.bincount(firsts, minlength=3) / 3000, [0.5, 0.3, 0.2], atol=0.04)


def learnt(labelled: int, sign: float) -> list[int]:
    """Ranks five images of rising entropy after labelled ones whose gradient grew (or shrank) with entropy."""
    pool, rising = make(5, labelled, entropy=np.arange(5.0)), np.arange(float(labelled))
    same = {name: np.zeros(5) for name in ("egl", "least_confidence", "foreground")}
    seen = {name: np.zeros(labelled) for name in ("egl", "least_confidence", "foreground")}
    seen |= {"entropy": rising, "magnitude": np.exp(sign * rising)}
    return ordered(
        "learned-gradient", Pool(**{**vars(pool), "scores": {**pool.scores, **same}, "labelled_scores": seen})
    )


def test_the_learned_gradient_is_learnt() -> None:
    assert learnt(8, 1.0) == [4, 3, 2, 1, 0]
    assert learnt(8, -1.0) == [0, 1, 2, 3, 4]


def test_too_few_labels_teach_no_gradient() -> None:
    assert learnt(3, -1.0) == [4, 3, 2, 1, 0]


def stratified(labelled: int, seed: int) -> list[int]:
    """Ranks a pool in which the first six images hold much of a common class, the last two a little of a rare one."""
    pool = make(8, labelled)
    entropy = np.array([[9.0, 8, 7, 6, 5, 4, 0, 0], [0, 0, 0, 0, 0, 0, 0.2, 0.1]]).T
    return ordered("class-stratified", Pool(**{**vars(pool), "vectors": {"class_entropy": entropy}}), seed)


def test_classes_take_turns_and_a_rare_one_gets_its_share() -> None:
    for seed in range(10):
        assert set(stratified(20, seed)[:2]) == {0, 6}


def test_the_noise_of_class_stratified_fades() -> None:
    assert len({tuple(sorted(stratified(20, seed)[:4])) for seed in range(20)}) == 1
    assert len({tuple(sorted(stratified(0, seed)[:4])) for seed in range(20)}) > 3


def with_own(vectors: NDArray[np.float64]) -> Pool:
    """A pool with these gradients against the network's own classes."""
    return Pool(**{**vars(make(len(vectors))), "vectors": {"own": vectors}})


def test_badge_begins_with_the_longest_and_goes_far_from_it() -> None:
    vectors = np.array([[10.0, 0], [9.99, 0], [0, 9], [0, 8.99], [-0.001, 0]])
    for seed in range(10):
        order = ordered("badge", with_own(vectors), seed)
        assert order[0] == 0
        assert order[1] in (2, 3)


def test_coreset_goes_to_the_farthest_image() -> None:
    pool = make(4, 1)
    features = np.array([[1.0], [5.0], [9.0], [20.0]])
    assert ordered("coreset", Pool(**{**vars(pool), "features": features, "labelled_features": np.zeros((1, 1))})) == [
        3,
        2,
        1,
        0,
    ]


@pytest.mark.parametrize("labelled", [[], [0], [0, 1]])
def test_typiclust_takes_one_image_of_each_group(labelled: list[int]) -> None:
    pool, group = blobs([40, 30, 20], labelled)
    missing = {0, 1, 2} - set(labelled)
    assert set(group[ordered("typiclust", pool)[: len(missing)]]) == missing


def test_bait_wants_what_the_pool_is_made_of_and_nobody_labelled() -> None:
    fisher = np.zeros((5, 2, 2))
    fisher[:3, 0, 0] = [1.0, 2.0, 0.5]  # most of the pool tells about the first direction
    fisher[3:, 1, 1] = [1.0, 0.9]
    pool = make(5, 1)
    nothing = Pool(**{**vars(pool), "vectors": {"fisher": fisher}, "labelled_vectors": {"fisher": np.zeros((1, 2, 2))}})
    assert ordered("bait", nothing)[0] == 1
    known = np.diag([50.0, 0.0])[None]
    informed = Pool(**{**vars(nothing), "labelled_vectors": {"fisher": known}})
    assert ordered("bait", informed)[0] == 3


def test_bait_is_greedy_on_the_trace() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(12, 4, 2))
    fisher = root @ root.transpose(0, 2, 1)
    pool = Pool(**{**vars(make(12)), "vectors": {"fisher": fisher}, "labelled_vectors": {}})
    target, chosen = fisher.mean(0), list[int]()
    known = np.eye(4) * np.trace(target) / 4
    for _ in range(4):
        left = [i for i in range(12) if i not in chosen]
        best = min(left, key=lambda i: float(np.trace(np.linalg.inv(known + fisher[i]) @ target)))
        chosen.append(best)
        known = known + fisher[best]
    assert ordered("bait", pool)[:4] == chosen


@pytest.mark.parametrize("seed", range(5))
def test_first_row_takes_the_telling_and_typical_image_of_the_group_without_a_label(seed: int) -> None:
    pool, group = blobs([20, 30, 25], [0, 1], seed)
    telling = np.random.default_rng(seed).random(75)
    first = ordered("first-row", Pool(**{**vars(pool), "scores": {**pool.scores, "egl": telling}}))[0]
    assert group[first] == 2
    rivals = np.flatnonzero(group == 2)
    typical = dict(zip(rivals, typicality(pool.features[rivals], pool.features[rivals]), strict=True))
    # Nobody in its group is both more typical and more telling.
    assert not any(typical[r] > typical[first] and telling[r] > telling[first] for r in rivals)


def test_among_equally_typical_images_first_row_takes_the_telling_one() -> None:
    features = np.array([[0.0, 0], [0, 2], [2, 0], [2, 2]])  # a square: all are alike to the others
    pool = make(4, 0, egl=np.array([0.1, 0.4, 0.2, 0.3]))
    assert (
        ordered("first-row", Pool(**{**vars(pool), "features": features, "labelled_features": np.zeros((0, 2))}))[0]
        == 1
    )


@pytest.mark.parametrize("name", ["first-row", "typiclust"])
def test_with_more_labels_than_clusters_a_group_without_one_still_comes_first(name: str) -> None:
    pool, group = blobs([40, 30, 20], [0] * 200 + [1] * 150)
    pool.features[group == 2] = pool.features[group == 2][0]  # a region too tight to be split
    assert group[ordered(name, pool)[0]] == 2
