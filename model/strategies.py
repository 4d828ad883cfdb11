"""Query strategies: scores of a pool -> the order in which its images are wanted. Pure functions over arrays."""

from __future__ import annotations

import numpy as np

from model import by_score, by_vector
from model.by_vector import COVER
from model.pool import Pool, Ranking, Strategy, followed, from_order
from model.spread import farthest_first, unit

__all__ = ["COVER", "DEFAULT", "NEEDS", "REFERENCES", "STRATEGIES", "Pool", "Ranking", "Strategy"]


def first_row(pool: Pool, rng: np.random.Generator) -> Ranking:
    """The most telling typical image of the largest region of feature space without a label, one image at a time.

    Telling is the expected squared gradient (`egl`). By itself it asks for outliers, which teach little about the rest;
    typicality alone asks for what is known already.
    """
    telling = pool.scores["egl"]
    order, utility, parts = by_vector.best_of_clusters(pool, [telling], rng)
    return Ranking(order, utility, {**parts, "gradient": np.sqrt(np.maximum(telling, 0))})


def novel_egl(pool: Pool, rng: np.random.Generator) -> Ranking:
    """Cover with the first images, then length of the gradient (root of the coarse EGL) times novelty of direction."""
    missing = COVER - len(pool.labelled_features)
    length = np.sqrt(np.maximum(pool.scores["coarse_egl"], 0))
    far = farthest_first(unit(pool.embedding), unit(pool.labelled_embedding), length, rng)
    scored = Ranking(far.order, far.utility, {"gradient": length, "novelty": far.novelty})
    if missing <= 0:
        return scored
    head = by_vector.coverage(pool, rng)
    return from_order(followed(head.order[:missing], scored.order), {**head.parts, **scored.parts})


STRATEGIES: dict[str, Strategy] = {
    "first-row": first_row,
    "random": by_score.random,
    "foreground-random": by_score.foreground_random,
    "least-confidence": by_score.least_confidence,
    "margin": by_score.margin,
    "entropy": by_score.entropy,
    "entropy-top": by_score.entropy_top,
    "entropy-foreground": by_score.entropy_foreground,
    "bald": by_score.bald,
    "power-bald": by_score.power_bald,
    "pseudo-loss": by_score.pseudo_loss,
    "egl": by_score.egl,
    "egl-settles": by_score.egl_settles,
    "egl-huang": by_score.egl_huang,
    "learned-gradient": by_score.learned_gradient,
    "entropy-gradnorm": by_score.entropy_gradnorm,
    "class-stratified": by_score.class_stratified,
    "gradient-magnitude": by_score.gradient_magnitude,
    "magnitude-range": by_score.magnitude_range,
    "direction-range": by_vector.direction_range,
    "coarse-egl": by_score.coarse_egl,
    "coarse-egl-segment": by_score.coarse_egl_segment,
    "badge": by_vector.badge,
    "coreset": by_vector.coreset,
    "typiclust": by_vector.typiclust,
    "bait": by_vector.bait,
    "coverage": by_vector.coverage,
    "novel-egl": novel_egl,
}
DEFAULT = "first-row"
#: Strategies that look at hidden labels: a benchmark's references, no choice for a live project.
REFERENCES: dict[str, Strategy] = {"oracle-gradient": by_score.oracle_gradient}
#: Numbers and arrays from `model.extras` that a strategy reads besides the plain ones.
NEEDS: dict[str, tuple[str, ...]] = {
    "entropy-top": ("entropy_top",),
    "entropy-foreground": ("entropy_foreground",),
    "bald": ("bald",),
    "power-bald": ("bald",),
    "egl-settles": ("egl_settles",),
    "egl-huang": ("egl_huang",),
    "entropy-gradnorm": ("entropy_gradnorm",),
    "class-stratified": ("class_entropy",),
    "coarse-egl-segment": ("segment_egl",),
    "badge": ("own",),
    "bait": ("fisher",),
    "oracle-gradient": ("oracle",),
}
