"""What the times must come to: ratios of a peer's time to ours, row by row and on average."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean

OURS = "LiteAttention"
OWN_CONTIGUOUS = "own contiguous"  # our kernel on the same keys, copied out of their pages
OWN_DENSE = "own dense"  # our kernel without a list, where the row is one with lists
IDEAL = "ideal"  # the faster of IDEAL_OF times the share of the visible tiles that the lists visit
IDEAL_OF = (OWN_DENSE, "FA3")
BEST_OF = ("FA3", "FA4", "cuDNN")
BEST = "best"  # whichever of BEST_OF is fastest, of those that can compute the row


@dataclass(frozen=True)
class Target:
    """The time of `against`, over ours, is to be `at_least` this."""

    against: str
    at_least: float

    def __str__(self) -> str:
        return f"{self.against} {self.at_least:.2f}"


@dataclass(frozen=True)
class Average:
    """The arithmetic mean of the ratios of all rows whose name matches `rows`, a glob, is to be `at_least` this."""

    rows: str
    target: Target


@dataclass(frozen=True)
class Verdict:
    """A target and what was found; `met` is None where that can't be told, for want of the peers `without`."""

    target: Target
    ratio: float | None
    met: bool | None
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class AverageVerdict:
    """An average, over `measured` of the `rows` rows that belong to it. It is judged only where all were measured.

    Rows that other peers computed may not count for want of the peers `without`.
    """

    average: Average
    rows: int
    measured: int
    ratio: float | None
    met: bool | None
    without: tuple[str, ...] = ()


def ratio(microseconds: Mapping[str, float], against: str, lacking: Collection[str] = ()) -> float | None:
    """Time of `against` over ours: above 1, ours is faster. None where either is missing.

    `lacking` has the peers that said beforehand that they can't compute the row.
    """
    names = BEST_OF if against == BEST else (against,)
    times = [microseconds[name] for name in names if name in microseconds]
    if not times or OURS not in microseconds or missing(microseconds, against, lacking):
        return None
    return min(times) / microseconds[OURS]


def missing(microseconds: Mapping[str, float], against: str, lacking: Collection[str] = ()) -> tuple[str, ...]:
    """The peers without which it isn't known which one is best: they took no part, or failed."""
    names = BEST_OF if against == BEST else ()
    return tuple(name for name in names if name not in microseconds and name not in lacking)


def ideal(microseconds: Mapping[str, float], visited: float) -> float | None:
    """The time that lists of this share could come to. None where a dense kernel of IDEAL_OF has none."""
    times = [microseconds[name] for name in IDEAL_OF if name in microseconds]
    return visited * min(times) if len(times) == len(IDEAL_OF) else None


def judge(
    targets: tuple[Target, ...], microseconds: Mapping[str, float], lacking: Collection[str] = ()
) -> list[Verdict]:
    """What the times of one row say to its targets. `lacking` as in `ratio`."""
    verdicts = []
    for target in targets:
        found = ratio(microseconds, target.against, lacking)
        met = None if found is None else found >= target.at_least
        verdicts.append(Verdict(target, found, met, missing(microseconds, target.against, lacking)))
    return verdicts


def judge_average(
    average: Average, rows: Mapping[str, Mapping[str, float]], lacking: Mapping[str, Collection[str]] | None = None
) -> AverageVerdict:
    """`rows` has the times of every row of the benchmark, by name, and nothing for rows not measured.

    `lacking` has by row what `ratio` has.
    """
    target = average.target
    found = [(rows[name], (lacking or {}).get(name, ())) for name in rows if fnmatchcase(name, average.rows)]
    ratios = [one for times, lacks in found if (one := ratio(times, target.against, lacks)) is not None]
    mean = fmean(ratios) if ratios else None
    met = mean >= target.at_least if mean is not None and len(ratios) == len(found) else None
    compared = [(times, lacks) for times, lacks in found if not times.keys().isdisjoint(BEST_OF)]
    without = {peer for times, lacks in compared for peer in missing(times, target.against, lacks)}
    return AverageVerdict(average, len(found), len(ratios), mean, met, tuple(x for x in BEST_OF if x in without))
