"""How the instant learner learns, in use and in the benchmark alike: from labels, coarse answers and weak labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.by_score import PREDICTORS
from model.classes import Classes
from model.heads import LEFT_OUT, Head, LabelledPixels, Sums, fit, solve, weak_sums
from model.pool import Pool

#: Pixels that an annotation teaches with, and pixels of each image of the pool that weak labels are made of.
LABELLED, WEAK = 800, 20
#: Labelled images up to which weak labels help.
WEAK_UNTIL = 3
#: What strategies read, by the names of `model.pixel_scores`; "oracle" is the magnitude against hidden masks.
READS: Mapping[str, tuple[str, ...]] = {
    "foreground-random": ("foreground",),
    "least-confidence": ("least_confidence",),
    "margin": ("margin",),
    "entropy": ("entropy", "coarse_entropy", "fine_entropy"),
    "entropy-top": ("entropy_top",),
    "entropy-foreground": ("entropy_foreground",),
    "bald": ("bald",),
    "power-bald": ("bald",),
    "pseudo-loss": ("pseudo_loss",),
    "egl": ("egl",),
    "egl-settles": ("egl_settles",),
    "egl-huang": ("egl_huang",),
    "learned-gradient": (*PREDICTORS, "magnitude"),
    "entropy-gradnorm": ("entropy_gradnorm",),
    "class-stratified": ("class_entropy",),
    "gradient-magnitude": ("magnitude",),
    "magnitude-range": ("magnitude",),
    "direction-range": ("embedding",),
    "coarse-egl": ("magnitude", "variance", "coarse_egl"),
    "coarse-egl-segment": ("segment_egl",),
    "badge": ("own",),
    "coreset": ("pooled",),
    "typiclust": ("pooled",),
    "bait": ("fisher",),
    "coverage": ("pooled",),
    "novel-egl": ("coarse_egl", "embedding", "pooled"),
    "oracle-gradient": ("oracle",),
}


def head_of(
    total: Sums,
    images: Sequence[LabelledPixels],
    own: Sequence[Sums] | None,
    coarse: Head | None,
    weak: Tensor,
    classes: Classes,
) -> Head:
    """The head of all labels; while they are few, with the pool's other pixels as the coarse head guesses them.

    Args:
        total: the sums of all labelled images.
        images: those that are left out in turn to find how sure the head may be, see `left_out_of`.
        own: the sums of each of them, if they are at hand.
        coarse: of background and foreground; None where nobody has named both, or weak labels are not wanted.
        weak: (P, D) pixels from all over the pool; none where more than `WEAK_UNTIL` images are labelled.
        classes: fine and coarse classes.

    Raises:
        ValueError: there is no labelled pixel.
    """
    if coarse is not None and len(weak) and total.images <= WEAK_UNTIL:
        total = total + weak_sums(solve(total), coarse, weak, classes, 1 / total.images)
    return fit(images, total, own)


def left_out_of(labelled: Sequence[int]) -> list[int]:
    """Which of the labelled images are left out in turn."""
    return list(labelled[:: max(1, len(labelled) // LEFT_OUT)][:LEFT_OUT])


def head_from_coarse(coarse: Head, classes: Classes) -> Head:
    """The head before any label: the coarse head, each side shared by its classes alike."""
    side = torch.from_numpy((classes.coarse_of() != 0).astype(np.int64))
    shared = torch.bincount(side, minlength=2).float().log()
    return Head(classes.fine, coarse.weights[side], (coarse.bias - shared)[side])


def no_opinion(classes: Classes, dimensions: int) -> Head:
    """The head that finds all classes alike, of features of so many numbers."""
    count = len(classes.fine)
    return Head(classes.fine, torch.zeros(count, dimensions), torch.zeros(count))


def pool_of(
    mine: Mapping[str, NDArray[np.float64]], theirs: Mapping[str, NDArray[np.float64]], count: int, labelled: int
) -> Pool:
    """What a strategy sees.

    Args:
        mine: scores of the images that may be picked, by the names of `model.pixel_scores`.
        theirs: the same of the labelled images; may lack all where there are none.
        count: how many may be picked.
        labelled: how many are labelled.
    """
    seen = {name: theirs.get(name, values[:0]) for name, values in mine.items()}
    vectors = {name for name, values in mine.items() if values.ndim > 1}
    nothing, none = np.zeros((count, 1)), np.zeros((labelled, 1))
    return Pool(
        scores={name: mine[name] for name in mine.keys() - vectors},
        embedding=mine.get("embedding", nothing),
        features=mine.get("pooled", nothing),
        labelled_embedding=seen.get("embedding", none),
        labelled_features=seen.get("pooled", none),
        vectors={name: mine[name] for name in vectors},
        labelled_vectors={name: seen[name] for name in vectors},
        labelled_scores={name: seen[name] for name in seen.keys() - vectors},
    )
