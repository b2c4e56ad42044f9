"""What the times must come to: ratios of a peer's time to ours, row by row and on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from statistics import fmean

OURS = "LiteAttention"
OWN_CONTIGUOUS = "own contiguous"  # our kernel on the same keys, copied out of their pages
OWN_DENSE = "own dense"  # our kernel without a list, where the row is one with lists
IDEAL = "ideal"  # the faster of IDEAL_OF times the share of the visible tiles that the lists visit
IDEAL_OF = (OWN_DENSE, "FA3")
BEST_OF = ("FA3", "FA4", "cuDNN")
BEST = "best"  # whichever of BEST_OF is fastest, of those that computed the row


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
    """A target and what was found; `met` is None where that can't be told."""

    target: Target
    ratio: float | None
    met: bool | None


@dataclass(frozen=True)
class AverageVerdict:
    """An average, over `measured` of the `rows` rows that belong to it. It is judged only where all were measured."""

    average: Average
    rows: int
    measured: int
    ratio: float | None
    met: bool | None


def ratio(microseconds: Mapping[str, float], against: str) -> float | None:
    """Time of `against` over ours: above 1, ours is faster. None where either is missing."""
    names = BEST_OF if against == BEST else (against,)
    times = [microseconds[name] for name in names if name in microseconds]
    return min(times) / microseconds[OURS] if times and OURS in microseconds else None


def ideal(microseconds: Mapping[str, float], visited: float) -> float | None:
    """The time that lists of this share could come to. None where a dense kernel of IDEAL_OF has none."""
    times = [microseconds[name] for name in IDEAL_OF if name in microseconds]
    return visited * min(times) if len(times) == len(IDEAL_OF) else None


def judge(targets: tuple[Target, ...], microseconds: Mapping[str, float]) -> list[Verdict]:
    """What the times of one row say to its targets."""
    verdicts = []
    for target in targets:
        found = ratio(microseconds, target.against)
        verdicts.append(Verdict(target, found, None if found is None else found >= target.at_least))
    return verdicts


def judge_average(average: Average, rows: Mapping[str, Mapping[str, float]]) -> AverageVerdict:
    """`rows` has the times of every row of the benchmark, by name, and nothing for rows not measured."""
    names = [name for name in rows if fnmatchcase(name, average.rows)]
    ratios = [found for name in names if (found := ratio(rows[name], average.target.against)) is not None]
    mean = fmean(ratios) if ratios else None
    whole = mean is not None and len(ratios) == len(names)
    return AverageVerdict(average, len(names), len(ratios), mean, mean >= average.target.at_least if whole else None)
