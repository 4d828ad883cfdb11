"""How the instant learner learns, in use and in the benchmark alike: from labels, coarse answers and weak labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.classes import Classes
from model.heads import LEFT_OUT, Head, LabelledPixels, Sums, fit, solve, weak_sums

#: Pixels that an annotation teaches with, and pixels of each image of the pool that weak labels are made of.
LABELLED, WEAK = 800, 20
#: Labelled images up to which weak labels help.
WEAK_UNTIL = 3


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
