"""How much of a decode step's softmax a page is estimated to hold, from its sketch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lite_attention.pages.layout import OTHERS, PAGE, Moments

# The expected largest of 15 standard Gaussians: where the second cumulant would outgrow what 15 keys can do.
KNEE = 1.74
BEYOND = KNEE**2 / 2  # the two branches meet, with one slope
# What the variance of scores is taken to be, over that of keys which vary alike in all directions. On average models'
# keys have 0.8 to 1.4 times, but some layers have queries along which the keys of single pages vary much more: with 1.5
# such pages were missed, and a model lost a fifth of its perplexity on code (docs/sketch-study.md).
ALIGNED = 4.0


def log_mass(q: Tensor, moments: Moments, scale: Tensor) -> Tensor:
    """Estimated log of the sum of exp(score) over a page's keys, less log(16), which all full pages share.

    Of the 15 keys it is the score of their mean plus half the variance of their scores, the second cumulant. The
    variance is taken as ALIGNED * (|q| * scale * deviation)^2. Where it is large a sum over Gaussian keys would be
    ruled by keys that 15 haven't; from KNEE on it grows with the root alone. The key apart adds the exp of its own
    score.

    Args:
        q: (heads_k, group, head_dim), the queries of one token.
        moments: of (pages, heads_k), as `layout.decode` gives them.
        scale: (heads_k,), softmax scale times the descale of the keys.

    Returns:
        float64 (heads_k, group, pages). NaN where a page has no moments.
    """
    q = q.double() * scale.double()[:, None, None]
    linear = torch.einsum("grd,pgd->grp", q, moments.mean.double())
    spread = math.sqrt(ALIGNED) * q.norm(dim=-1)[..., None] * moments.deviation.double().T[:, None]
    others = math.log(OTHERS / PAGE) + torch.where(spread < KNEE, spread.square() / 2, KNEE * spread - BEYOND)
    apart = torch.einsum("grd,pgd->grp", q, moments.difference.double()) - math.log(PAGE)
    return linear + torch.logaddexp(others, apart)


def shares(log_masses: Tensor) -> Tensor:
    """The share that each page has of the mass of all, (..., pages); those whose log-mass isn't finite have none."""
    finite = log_masses.isfinite()
    return log_masses.masked_fill(~finite, -torch.inf).softmax(-1).where(finite, 0.0)


def needed(share: Tensor, always: Tensor, eps: float) -> Tensor:
    """The fewest pages, beside those that are `always` listed, without which no head misses more than eps.

    Pages rank by the largest share that any head of the group has in them. Dropped are those of the lowest ranks, as
    many as leave each head's sum over what is dropped at most eps. Pages of equal rank stay or go together, so that no
    order of pages matters.

    Args:
        share: float64, (heads_k, group, pages).
        always: bool, (heads_k, pages), one or more of each head true.
        eps: at least 0.

    Returns:
        bool (heads_k, pages).
    """
    rank = share.amax(1).masked_fill(always, torch.inf)
    ascending, order = rank.sort(dim=-1)
    priced = share.masked_fill(always[:, None], torch.inf)
    dropped = priced.gather(2, order[:, None].expand_as(share)).cumsum(-1).amax(1)
    cut = ascending.gather(1, (dropped <= eps).sum(-1, keepdim=True))
    return rank >= cut
