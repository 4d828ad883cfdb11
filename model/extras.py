"""What only some query strategies need to know about an image: computed when a strategy asks for it by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.clusters import pieces
from model.gradients import gradient_embedding

#: Passes with dropout, the share of features that each leaves out, and the passes whose masks are taken as labelings.
PASSES, DROPPED, LABELINGS = 10, 0.25, 4
#: Share of the pixels that count as the most uncertain ones.
TOP = 0.1
#: Features that the Fisher matrix keeps of the last layers' inputs, besides the constant 1.
FISHER_FEATURES = 15


class View(NamedTuple):
    """An image as a network sees it.

    Attributes:
        log_p: (C, H, W) log of the class probabilities p.
        p: (C, H, W) class probabilities.
        own: (C, H, W) bool, true at the most probable class.
        rows: (H, W) the target, rows of `Classes.sets()`.
        sets: (K, C) bool, what each row allows.
        foreground: (H, W) bool.
        layers: (D, h, w) each, inputs of the last layers.
        squared: (H, W) from `squared_features`.
        last: the last layers.
    """

    log_p: Tensor
    p: Tensor
    own: Tensor
    rows: Tensor
    sets: Tensor
    foreground: Tensor
    layers: Sequence[Tensor]
    squared: Tensor
    last: Sequence[nn.Conv2d]

    @property
    def entropy(self) -> Tensor:
        """(H, W) nats."""
        return -(self.p * self.log_p).sum(0)


def entropy_top(view: View) -> Tensor:
    """Mean entropy of the most uncertain pixels."""
    flat = view.entropy.flatten()
    return flat.topk(math.ceil(TOP * len(flat))).values.mean()


def entropy_foreground(view: View) -> Tensor:
    """Mean entropy of the foreground; 0 without one."""
    inside = view.entropy[view.foreground]
    return inside.mean() if len(inside) else view.entropy.new_zeros(())


def class_entropy(view: View) -> Tensor:
    """(C,) entropy summed over the pixels of each predicted class, over all pixels."""
    return (view.own * view.entropy).sum((1, 2)) / view.entropy.numel()


def egl_settles(view: View) -> Tensor:
    """Expected gradient length per pixel, its mean: sum over y of p_y |p - e_y| |f| (Settles et al. 2008)."""
    p = view.p
    away = (p.square().sum(0) - 2 * p + 1).clamp_min(0).sqrt()
    return ((p * away).sum(0) * view.squared.clamp_min(0).sqrt()).mean()


def egl_huang(view: View) -> Tensor:
    """Expected squared gradient length over likely labelings of the whole image (Huang et al. 2016).

    Their beam search has no counterpart for images; the labelings are masks of passes with dropout, equally likely.
    """
    p, size = view.p, (view.p.shape[1], view.p.shape[2])
    lengths = []
    for _, logits in zip(range(LABELINGS), dropout_passes(view), strict=False):
        mask = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0].argmax(0)
        lengths.append(gradient_embedding(p - one_hot(mask, len(p)), view.layers).square().sum())
    found: Tensor = torch.stack(lengths).mean()
    return found


def entropy_gradnorm(view: View) -> Tensor:
    """Length of the gradient that the mean entropy has at the last layer; dH/dz = -p (log p + H)."""
    found: Tensor = gradient_embedding(-view.p * (view.log_p + view.entropy), view.layers).norm()
    return found


def bald(view: View) -> Tensor:
    """What passes with dropout disagree about: entropy of their mean less their mean entropy (Houlsby et al. 2011).

    At the last layers' resolution. Two running sums: memory does not grow with the number of passes.
    """
    total = spread = view.log_p.new_zeros(())
    for logits in dropout_passes(view):
        log_p = logits.log_softmax(0)
        total, spread = total + log_p.exp(), spread - (log_p.exp() * log_p).sum(0)
    mean = total / PASSES
    found: Tensor = (torch.special.entr(mean).sum(0) - spread / PASSES).mean().clamp_min(0)
    return found


def segment_egl(view: View) -> Tensor:
    """Expected squared gradient length when each segment has one label, drawn from what its coarse label allows.

    Segments are connected pixels of one predicted class and one row of the target, at the last layers' resolution:
    (1 / N^2) [sum_m (1 - |pi_m|^2) |phi_m|^2 + |sum_m (A_m - pi_m phi_m')|^2], pi_m the mean of p in segment m,
    restricted to what the target allows and normalised, phi_m the sum of its features, A_m that of p f'.
    """
    f = with_constant(view.layers)
    p, rows = lowered(view.p, f), nearest(view.rows, f)
    segment = (
        torch.from_numpy(pieces((p.argmax(0) * len(view.sets) + rows).cpu().numpy())).to(f.device).long().flatten()
    )
    count = int(segment.max()) + 1
    p, f = p.flatten(1), f.flatten(1)
    mean = p.new_zeros(len(p), count).index_add(1, segment, p) * view.sets[row_of(segment, rows, count)].T
    pi = mean / mean.sum(0).clamp_min(1e-12)
    phi = f.new_zeros(len(f), count).index_add(1, segment, f)
    spread = ((1 - pi.square().sum(0)).clamp_min(0) * phi.square().sum(0)).sum()
    return (spread + (p @ f.T - pi @ phi.T).square().sum()) / f.shape[1] ** 2


def own(view: View) -> Tensor:
    """(E,) gradient against the network's own most probable classes, as in BADGE (Ash et al. 2020)."""
    return gradient_embedding(view.p - view.own.float(), view.layers)


def fisher(view: View) -> Tensor:
    """(K, K) Fisher matrix of the last layer, mean over pixels of (diag p - p p') (x) f f' (BAIT, Ash et al. 2021).

    Features are projected at random, always alike, to a few dimensions and a constant: K = C * 16.
    """
    f = with_constant(view.layers)
    draw = torch.Generator().manual_seed(0)
    projection = torch.randn(FISHER_FEATURES, len(f) - 1, generator=draw).to(f) / math.sqrt(FISHER_FEATURES)
    p = lowered(view.p, f).flatten(1)
    x = torch.cat([projection @ f[:-1].flatten(1), f[-1:].flatten(1)])
    weight = torch.diag_embed(p.T) - p.T[:, :, None] * p.T[:, None]
    blocks = torch.einsum("ncd,in,jn->cidj", weight, x, x) / x.shape[1]
    return blocks.reshape(2 * (len(p) * len(x),))


Extra = Callable[[View], Tensor]
#: Numbers and arrays by the names that strategies know them by.
NUMBERS: dict[str, Extra] = {
    f.__name__: f
    for f in (entropy_top, entropy_foreground, bald, egl_settles, egl_huang, entropy_gradnorm, segment_egl)
}
VECTORS: dict[str, Extra] = {f.__name__: f for f in (own, fisher, class_entropy)}


def extra(name: str) -> Extra:
    """The function of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in NUMBERS | VECTORS:
        raise ValueError(f"there is no extra {name!r}; choose from {', '.join(NUMBERS | VECTORS)}")
    return (NUMBERS | VECTORS)[name]


def dropout_passes(view: View) -> Iterator[Tensor]:
    """Logits (C, h, w) of passes in each of which other features are left out, for every image the same ones."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(PASSES):
        total = torch.zeros((), device=view.log_p.device)
        for layer, conv in zip(view.layers, view.last, strict=True):
            kept = torch.rand(len(layer), generator=draw).to(layer.device) >= DROPPED
            total = total + conv((layer * kept[:, None, None] / (1 - DROPPED))[None])[0]
        yield total


def one_hot(mask: Tensor, classes: int) -> Tensor:
    """(C, H, W) of a class map (H, W)."""
    return F.one_hot(mask, classes).movedim(-1, 0)


def with_constant(layers: Sequence[Tensor]) -> Tensor:
    """(D + 1, h, w) the inputs of all last layers, and the 1 of their biases."""
    return torch.cat([*layers, torch.ones_like(layers[0][:1])])


def lowered(p: Tensor, like: Tensor) -> Tensor:
    """(C, h, w) probabilities at the last layers' resolution, by area."""
    return F.adaptive_avg_pool2d(p, (like.shape[1], like.shape[2]))


def nearest(rows: Tensor, like: Tensor) -> Tensor:
    """(h, w) the target at the last layers' resolution."""
    size = (like.shape[1], like.shape[2])
    return F.interpolate(rows[None, None].float(), size=size, mode="nearest-exact")[0, 0].long()


def row_of(segment: Tensor, rows: Tensor, count: int) -> Tensor:
    """(M,) the row of the target that each segment has."""
    return rows.new_zeros(count).scatter(0, segment, rows.flatten())
