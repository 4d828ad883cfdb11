"""Strategies that order the pool by one number of each image."""

from __future__ import annotations

import numpy as np

from model.pool import Floats, Pool, Ranking, by_utility, from_order
from model.spread import van_der_corput

#: Labelled images from which on noise has faded; see `class_stratified`.
QUIET = 15
#: Labelled images that `learned_gradient` needs for its regression.
ENOUGH = 4
#: Strength of that regression's ridge, in units of the predictors' variance.
RIDGE = 1.0
PREDICTORS = ("egl", "entropy", "least_confidence", "foreground")


def random(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Chance."""
    return by_utility(rng.random(len(pool)), {}, rng)


def foreground_random(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Chance in proportion to the share of foreground (Efraimidis and Spirakis 2006: weighted, without replacement)."""
    share = np.maximum(pool.scores["foreground"], 1e-9)
    utility = np.log(np.maximum(rng.random(len(pool)), 1e-300)) / share
    return by_utility(utility, {"foreground": pool.scores["foreground"]}, rng)


def entropy(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Mean entropy of the network's classes."""
    parts = {name: pool.scores[name] for name in ("coarse_entropy", "fine_entropy")}
    return by_utility(pool.scores["entropy"], parts, rng)


def egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected gradient length with labels drawn from the network (Settles et al. 2008, squared form)."""
    return by_utility(pool.scores["egl"], {"egl": pool.scores["egl"]}, rng)


def gradient_magnitude(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Largest gradient of the loss against the pseudo ground truth."""
    return by_utility(pool.scores["magnitude"], {"magnitude": pool.scores["magnitude"]}, rng)


def magnitude_range(pool: Pool, rng: np.random.Generator) -> Ranking:
    """A wide range of gradient magnitudes: quantiles in van der Corput order, so that every prefix is spread.

    The order goes on where the labelled images left it.
    """
    ranked = by_utility(-pool.scores["magnitude"], {}, rng).order
    order = ranked[np.roll(van_der_corput(len(pool)), -len(pool.labelled_features))]
    return from_order(order, {"magnitude": pool.scores["magnitude"]})


def coarse_egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected squared gradient length with labels drawn from what the coarse label allows."""
    parts = {"magnitude": pool.scores["magnitude"], "variance": pool.scores["variance"]}
    return by_utility(pool.scores["coarse_egl"], parts, rng)


def least_confidence(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Mean of 1 - the highest probability."""
    return by_utility(pool.scores["least_confidence"], {}, rng)


def margin(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Smallest mean distance between the two highest probabilities."""
    return by_utility(-pool.scores["margin"], {"margin": pool.scores["margin"]}, rng)


def entropy_top(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Mean entropy of the tenth of the pixels that is least sure: background does not wash it out."""
    return by_utility(pool.scores["entropy_top"], {}, rng)


def entropy_foreground(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Mean entropy of the foreground."""
    return by_utility(pool.scores["entropy_foreground"], {}, rng)


def bald(pool: Pool, rng: np.random.Generator) -> Ranking:
    """What passes with dropout disagree about (Houlsby et al. 2011)."""
    return by_utility(pool.scores["bald"], {}, rng)


def power_bald(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Chance in proportion to BALD: its log and Gumbel noise (Kirsch et al. 2022, beta = 1)."""
    return by_utility(noisy_log(pool.scores["bald"], 1.0, rng), {"bald": pool.scores["bald"]}, rng)


def pseudo_loss(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Largest mean loss against the pseudo ground truth."""
    return by_utility(pool.scores["pseudo_loss"], {}, rng)


def egl_settles(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected gradient length pixel by pixel (Settles et al. 2008)."""
    return by_utility(pool.scores["egl_settles"], {}, rng)


def egl_huang(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Expected squared gradient length over likely labelings of the whole image (Huang et al. 2016)."""
    return by_utility(pool.scores["egl_huang"], {}, rng)


def learned_gradient(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Gradient length as learnt from labelled images: a ridge regression of its log from `PREDICTORS`.

    Stands where Yuan et al. (2019) would; their text could not be checked, so it does not carry their name. With fewer
    than `ENOUGH` labelled images nothing can be learnt, and the mean of the standardised predictors is the utility.
    """
    labelled = len(pool.labelled_features)
    seen = np.array([pool.labelled_scores[name] if labelled else np.zeros(0) for name in PREDICTORS]).T
    here = np.array([pool.scores[name] for name in PREDICTORS]).T
    both = np.concatenate([here, seen.reshape(-1, len(PREDICTORS))])
    if not len(both):
        return by_utility(np.zeros(0), {}, rng)
    deviation = both.std(0)
    both = (both - both.mean(0)) / np.where(deviation > 1e-12, deviation, 1)
    x, z = both[len(here) :], both[: len(here)]
    if len(x) < ENOUGH:
        return by_utility(z.mean(1), {}, rng)
    y = np.log(np.maximum(pool.labelled_scores["magnitude"], 1e-12))
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(len(PREDICTORS)), x.T @ (y - y.mean()))
    return by_utility(z @ weights, {}, rng)


def entropy_gradnorm(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Length of the gradient of the mean entropy."""
    return by_utility(pool.scores["entropy_gradnorm"], {}, rng)


def coarse_egl_segment(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Coarse EGL where a segment has one label: gradients of neighbouring pixels add up instead of cancelling."""
    return by_utility(pool.scores["segment_egl"], {}, rng)


def oracle_gradient(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Largest gradient against the hidden labels: what a perfect label source would do for `gradient_magnitude`."""
    return by_utility(pool.scores["oracle"], {}, rng)


def class_stratified(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Classes take turns, each with its own noisy entropy; the noise fades with the labelled images.

    After the idea of ClaSP PE (TMLR 2026): strata let rare classes have their share, noise spreads the first picks.
    """
    values = np.asarray(pool.vectors["class_entropy"] if len(pool) else np.zeros((0, 1)), np.float64)
    labelled = len(pool.labelled_features)
    beta = 1 / max(1 - labelled / QUIET, 1e-3)
    columns = [c for c in rng.permutation(values.shape[1]) if values[:, c].any()] or [0]
    wishes = [by_utility(noisy_log(values[:, c], beta, rng), {}, rng).order for c in columns]
    turns = np.stack(wishes, axis=1).ravel()
    _, first = np.unique(turns, return_index=True)
    return from_order(turns[np.sort(first)], {})


def noisy_log(values: Floats, beta: float, rng: np.random.Generator) -> Floats:
    """Log of values plus Gumbel noise of scale 1 / beta: its order is a draw in proportion to values ** beta."""
    noise = rng.gumbel(0, 1 / beta, len(values))
    return np.asarray(np.log(np.maximum(values, 1e-12)) + noise, np.float64)
