"""How much of a decode step's softmax a page is estimated to hold, from its sketch."""

from __future__ import annotations

import torch
from torch import Tensor

KNEE = (
    1.77  # the expected largest of 16 standard Gaussians: where the second cumulant would outgrow what 16 keys can do
)
BEYOND = KNEE**2 / 2  # the two branches meet, with one slope


def log_mass(q: Tensor, mean: Tensor, deviation: Tensor, scale: Tensor) -> Tensor:
    """Estimated log of the sum of exp(score) over a page's keys, less log(16), which all full pages share.

    It is q.mean plus half the variance of the scores, the second cumulant, as if channels were independent. Where that
    variance is large a sum over Gaussian keys would be ruled by keys that a page of 16 hasn't; from KNEE on it grows
    with the deviation alone. The squares of a query, by which deviations are weighed, count as `rounded_squares`.

    Args:
        q: (heads_k, group, head_dim), the queries of one token.
        mean, deviation: (pages, heads_k, head_dim), as `layout.decode` gives them.
        scale: (heads_k,), softmax scale times the descale of the keys.

    Returns:
        float64 (heads_k, group, pages). NaN where a page has no moments.
    """
    scale = scale.double()[:, None, None]
    linear = torch.einsum("grd,pgd->grp", q.double() * scale, mean.double())
    variance = torch.einsum("grd,pgd->grp", rounded_squares(q) * scale.square(), deviation.double().square())
    spread = variance.sqrt()
    return linear + torch.where(spread < KNEE, variance / 2, KNEE * spread - BEYOND)


def rounded_squares(q: Tensor) -> Tensor:
    """float64 of q's shape: its squares, as float16 holds them where the largest of each query lies just below 2**13.

    For a sketch of 4 bits that is plenty, and tensor cores take it as it is.
    """
    squares = q.float().square()
    largest = squares.amax(-1, keepdim=True)
    exponent = (13 - torch.frexp(largest).exponent).clamp(-126, 126).where(largest.isfinite(), 0)
    power = torch.ldexp(torch.ones_like(largest), exponent)
    return (squares * power).half().double() / power.double()


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
