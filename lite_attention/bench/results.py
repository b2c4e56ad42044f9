"""What a run found, and the JSON of it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from lite_attention.bench.ceilings import Ceilings
from lite_attention.bench.check import Agreement
from lite_attention.bench.rows import AVERAGES, ROWS, Row
from lite_attention.bench.shapes import Shape
from lite_attention.bench.targets import IDEAL, OURS, AverageVerdict, Verdict, ideal, judge, judge_average
from lite_attention.bench.timing import Time

Status = Literal["measured", "mismatch", "not built", "failed", "not run"]
WRONG: tuple[Status, ...] = ("mismatch", "failed", "not run")


@dataclass
class RowResult:
    """One row: its times by contender, or why there are none.

    `shape` is that of the row, or smaller. `absent` says of each peer without a time why it has none, `method` how it
    was timed. `lacking` has those of `absent` that said beforehand that they can't compute the row. `visited` is the
    share of the visible tiles that skip lists visit, None in rows without lists.
    """

    row: Row
    shape: Shape
    status: Status = "measured"
    reason: str | None = None
    method: str | None = None
    times: dict[str, Time] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    lacking: set[str] = field(default_factory=set)
    agreements: list[Agreement] = field(default_factory=list)
    visited: float | None = None

    @property
    def microseconds(self) -> dict[str, float]:
        """Medians, and in rows with lists the ideal."""
        found = {name: time.median for name, time in self.times.items()}
        best = None if self.visited is None else ideal(found, self.visited)
        return found if best is None else found | {IDEAL: best}

    def rate(self, name: str) -> float:
        """TFLOP/s or TB/s of a contender, as `row.unit` says; with lists, of the products of visited tiles."""
        work = self.shape.flops if self.row.bound == "compute" else self.shape.kv_bytes
        if name == OURS and self.visited is not None:
            work *= self.visited
        return work / self.microseconds[name] / 1e6

    def rate_text(self, name: str) -> str:
        """`rate` as people read it: 653, 3.05, 0.012."""
        rate = self.rate(name)
        return f"{rate:.0f}" if rate >= 100 else f"{rate:.2f}" if rate >= 1 else f"{rate:.2g}"

    def verdicts(self) -> list[Verdict]:
        """Targets hold for the row at its full size, none at another."""
        return judge(self.row.targets, self.microseconds, self.lacking) if self.shape == self.row.shape else []


@dataclass
class Run:
    """A run so far. `peers` has the identities of those that take part, `missing` why others don't."""

    environment: dict[str, str]
    device: str
    scale: float
    repetitions: int
    ceilings: Ceilings
    peers: dict[str, str]
    missing: dict[str, str]
    rows: list[RowResult] = field(default_factory=list)

    @property
    def wrong(self) -> list[RowResult]:
        return [row for row in self.rows if row.status in WRONG]

    def averages(self) -> list[AverageVerdict]:
        """Those of which some row was measured, at full size, beside some peer that the average is about."""
        full = {one.row.name: one for one in self.rows if one.shape == one.row.shape}
        times = {row.name: full[row.name].microseconds if row.name in full else {} for row in ROWS}
        lacking = {name: one.lacking for name, one in full.items()}
        judged = [judge_average(average, times, lacking) for average in AVERAGES]
        return [one for one in judged if one.measured or one.without]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(_plain(self._as_dict()), indent=1, allow_nan=False) + "\n")

    def _as_dict(self) -> dict[str, object]:
        return {
            "environment": self.environment,
            "device": self.device,
            "scale": self.scale,
            "repetitions": self.repetitions,
            "ceilings": {
                "copy_tb_s": self.ceilings.copy,
                "copied_bytes": self.ceilings.copied_bytes,
                "product_tflop_s": self.ceilings.product,
                "product_side": self.ceilings.side,
            },
            "peers": self.peers,
            "missing_peers": self.missing,
            "rows": [_row_as_dict(row) for row in self.rows],
            "averages": [asdict(one) for one in self.averages()],
        }


def _row_as_dict(result: RowResult) -> dict[str, object]:
    return {
        "name": result.row.name,
        "shape": asdict(result.shape),
        "flops": result.shape.flops,
        "kv_bytes": result.shape.kv_bytes,
        "status": result.status,
        "reason": result.reason,
        "method": result.method,
        "microseconds": {name: asdict(time) for name, time in result.times.items()},
        "visited": result.visited,
        "ideal_microseconds": result.microseconds.get(IDEAL),
        "unit": result.row.unit,
        "rates": {name: result.rate(name) for name in result.times},
        "absent": result.absent,
        "lacking": sorted(result.lacking),
        "agreements": [asdict(one) | {"right": one.right} for one in result.agreements],
        "verdicts": [asdict(one) for one in result.verdicts()],
    }


def _plain(x: object) -> object:
    """JSON has no NaN and no infinity: they become strings."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
