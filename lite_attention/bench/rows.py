"""The rows of the benchmark: what is timed, and the ratios asked of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from random import Random
from typing import Literal

from lite_attention.bench.page_work import NeededPages, RandomPages, SketchedPrefill
from lite_attention.bench.shapes import Shape
from lite_attention.bench.skip_fixed import Pattern
from lite_attention.bench.skip_voting import Voting
from lite_attention.bench.skip_work import SkipPlan
from lite_attention.bench.targets import BEST, IDEAL, OWN_CONTIGUOUS, OWN_DENSE, Average, Target

K = 1024


@dataclass(frozen=True)
class Row:
    """One workload. `bound` says which ceiling it is held against: matrix products, or memory.

    With `skip`, LiteAttention computes it with skip lists or from listed pages; the peers compute it whole.
    """

    name: str
    shape: Shape
    targets: tuple[Target, ...]
    bound: Literal["compute", "memory"] = "compute"
    skip: SkipPlan | None = None

    @property
    def unit(self) -> str:
        return "TFLOP/s" if self.bound == "compute" else "TB/s"

    def needs(self, against: str) -> bool:
        return any(target.against == against for target in self.targets)


def select(patterns: list[str] | None) -> list[Row]:
    """The rows whose name matches one of the globs, all of ROWS without any. A glob without a row is an error.

    Rows of FURTHER are those of a glob that matches none of ROWS: others run what they ran without them.
    """
    found: set[str] = set()
    for pattern in patterns or ["*"]:
        of_sets = ({row.name for row in each if fnmatchcase(row.name, pattern)} for each in (ROWS, FURTHER))
        matching = next(filter(None, of_sets), None)
        if matching is None:
            raise SystemExit(f"--only: got {pattern!r}, which no row matches; --list has their names")
        found |= matching
    return [row for row in (*ROWS, *FURTHER) if row.name in found]


def log_uniform(count: int, shortest: int, longest: int, seed: int) -> tuple[int, ...]:
    """Lengths whose logarithms are uniform between those of `shortest` and `longest`; the same ones every time."""
    random = Random(seed)
    return tuple(int(shortest * (longest / shortest) ** random.random()) for _ in range(count))


def _dense(name: str, batch: int, tokens: int, heads: int, head_dim: int, causal: bool) -> Row:
    lens = (tokens,) * batch
    mask = "causal" if causal else "full"
    targets = (Target("FA3", 1.00), Target(BEST, 0.98))
    return Row(f"dense-hd{head_dim}-{mask}-{name}", Shape(lens, lens, heads, heads, head_dim, causal), targets)


def _paged_prefill(page_size: int, at_least: float) -> Row:
    shape = Shape((4 * K,), (32 * K,), 32, 8, 128, causal=True, layout="paged", page_size=page_size)
    return Row(f"prefill-page{page_size}-4k-over-32k", shape, (Target("FA3", at_least), Target(OWN_CONTIGUOUS, 0.98)))


def _serving(
    name: str,
    q_lens: tuple[int, ...],
    k_lens: tuple[int, ...],
    at_least: float,
    heads: int = 32,
    heads_k: int = 8,
    head_dim: int = 128,
) -> Row:
    """A step of a server: keys in pages of 16, the plan made before."""
    shape = Shape(q_lens, k_lens, heads, heads_k, head_dim, causal=True, layout="paged", page_size=16, planned=True)
    return Row(name, shape, (Target("FA3", at_least),), bound="memory")


def _decode(
    name: str,
    batch: int,
    tokens: int,
    at_least: float,
    heads: int = 32,
    heads_k: int = 8,
    head_dim: int = 128,
    q: int = 1,
) -> Row:
    return _serving(f"decode-{name}", (q,) * batch, (tokens,) * batch, at_least, heads, heads_k, head_dim)


def _fp8(name: str, shape: Shape) -> Row:
    """Against FA3 over FP8, which rounds more: queries beside FP8 keys, and weights."""
    bound = "memory" if shape.planned else "compute"
    return Row(f"fp8-{name}", shape, (Target("FA3", 1.00),), bound=bound)


def _fp8_prefill(head_dim: int, causal: bool) -> Row:
    lens, heads = (8 * K,) * 2, 2048 // head_dim
    name = f"qkv-hd{head_dim}-{'causal' if causal else 'full'}-8k-b2"
    return _fp8(name, Shape(lens, lens, heads, heads, head_dim, causal, fp8="qkv"))


def _fp8_decode(name: str, batch: int, tokens: int, heads: int = 32, heads_k: int = 8, head_dim: int = 128) -> Row:
    row = _decode(name, batch, tokens, 1.0, heads, heads_k, head_dim)
    return _fp8(f"kv-{row.name}", replace(row.shape, fp8="kv"))


def _skip(size: str, tokens: int, heads: int, causal: bool) -> tuple[Row, ...]:
    """Rows with skip lists: of everything, and of random tiles and runs of tiles that skip more and more.

    Not beside FA4's lists under a causal mask: `FA4` says why.
    """
    shape = Shape((tokens,), (tokens,), heads, heads, 128, causal)
    name = f"skip-{'causal' if causal else 'full'}-{size}"
    sparse = () if causal else (Target("FA4 sparse", 1.00),)
    return (
        Row(f"{name}-0", shape, (Target(OWN_DENSE, 0.98),), skip=Pattern(0.0)),
        *(
            Row(f"{name}-{kind}-{percent}", shape, _SKIP_TARGETS[percent] + sparse, skip=Pattern(percent / 100, run))
            for kind, run in (("random", 1), ("runs", 4))
            for percent in _SKIP_TARGETS
        ),
    )


def _pages(name: str, batch: int, tokens: int, target: Target | None, plan: SkipPlan) -> Row:
    """A decode step from listed pages. Its lists are made within, as they differ from layer to layer."""
    targets = () if target is None else (target,)
    shape = Shape((1,) * batch, (tokens,) * batch, 32, 8, 128, causal=True, layout="paged", page_size=16, planned=True)
    return Row(f"pages-{name}", shape, targets, bound="memory", skip=plan)


_SKIP_TARGETS = {  # by the percentage that is skipped
    20: (Target(IDEAL, 0.95),),
    40: (Target(IDEAL, 0.95),),
    60: (Target(IDEAL, 0.95),),
    80: (Target(IDEAL, 0.97), Target("FA3", 4.8)),
    90: (Target(IDEAL, 0.95), Target("FA3", 9.3)),
}
_VIDEO = 75_600  # tokens: five seconds, as a diffusion model sees them
_VARLEN = log_uniform(64, 128, 32 * K, seed=0)
_DECODE = log_uniform(256, 512, 32 * K, seed=1)

ROWS: tuple[Row, ...] = (
    *(
        _dense(f"{tokens // K}k-b{batch}", batch, tokens, 2048 // head_dim, head_dim, causal)
        for head_dim in (64, 128, 256)
        for causal in (False, True)
        for tokens, batch in ((2 * K, 8), (8 * K, 2), (16 * K, 1), (32 * K, 1))
    ),
    _dense("32k-h40", 1, 32 * K, 40, 128, causal=False),
    _dense("75600-h12", 1, _VIDEO, 12, 128, causal=False),
    Row("chunk-8k-over-128k", Shape((8 * K,), (128 * K,), 32, 8, 128, causal=True), (Target("FA3", 1.00),)),
    _paged_prefill(16, 1.03),
    _paged_prefill(64, 1.10),
    _paged_prefill(128, 1.03),
    Row(
        "varlen-64x128-32k",
        Shape(_VARLEN, _VARLEN, 32, 8, 128, causal=True, layout="packed"),
        (Target("FA3", 1.05),),
    ),
    _decode("b8-32k", 8, 32 * K, 0.99),
    _decode("b32-8k", 32, 8 * K, 0.99),
    _decode("b64-4k", 64, 4 * K, 0.99),
    _decode("b64-32k", 64, 32 * K, 0.99),
    _serving("decode-b256-512-32k", (1,) * 256, _DECODE, 0.99),
    _decode("b1-8k", 1, 8 * K, 1.25),
    _decode("b4-4k", 4, 4 * K, 1.20),
    _decode("b1-32k", 1, 32 * K, 1.10),
    _decode("hd64-b64-8k", 64, 8 * K, 1.20, heads=9, heads_k=3, head_dim=64),
    _decode("b128-2k", 128, 2 * K, 1.20),
    *(_decode(f"group{group}-b16-16k", 16, 16 * K, 0.99, heads=8 * group) for group in (1, 4, 8, 16)),
    *(_decode(f"q{q}-b16-16k", 16, 16 * K, 0.99, q=q) for q in (2, 4, 8)),
    _serving("mixed-2k-and-63-decodes", (2 * K,) + (1,) * 63, (8 * K,) * 64, 1.05),
    *(_fp8_prefill(head_dim, causal) for head_dim in (64, 128, 256) for causal in (False, True)),
    _fp8_decode("b64-8k", 64, 8 * K),
    _fp8_decode("b16-16k", 16, 16 * K),
    _fp8_decode("b4-4k", 4, 4 * K),
    _fp8_decode("hd64-b64-8k", 64, 8 * K, heads=8, heads_k=2, head_dim=64),
    *_skip("32k-h40", 32 * K, 40, causal=False),
    *_skip("75600-h12", _VIDEO, 12, causal=False),
    *_skip("32k-h40", 32 * K, 40, causal=True),
    *_skip("75600-h12", _VIDEO, 12, causal=True),
    Row(
        "skip-voting-75600-h12",
        Shape((_VIDEO,), (_VIDEO,), 12, 12, 128, causal=False),
        (Target(IDEAL, 0.95),),
        skip=Voting(steps=50, skipped=0.8),
    ),
    _pages("random-20-b64-32k", 64, 32 * K, Target("FA3", 4.5), RandomPages(0.20)),
    _pages("random-10-b64-32k", 64, 32 * K, Target("FA3", 8.0), RandomPages(0.10)),
    _pages("random-5-b64-32k", 64, 32 * K, Target("FA3", 14.0), RandomPages(0.05)),
    _pages("step-b64-32k", 64, 32 * K, Target("FA3", 5.0), NeededPages(0.10)),
    _pages("step-b8-128k", 8, 128 * K, Target("FA3", 5.0), NeededPages(0.10)),
    _pages("step-b1-128k", 1, 128 * K, Target("FA3", 2.5), NeededPages(0.10)),
    _pages("short-b64-4k", 64, 4 * K, Target(OWN_DENSE, 0.98), NeededPages(min_context=8 * K)),
    Row(
        "pages-prefill-8k",
        Shape((8 * K,), (8 * K,), 32, 8, 128, causal=True, layout="paged", page_size=16),
        (Target(OWN_DENSE, 0.99),),
        skip=SketchedPrefill(),
    ),
)

# Rows that nothing is asked of. From which context on lists gain, for the default of `min_context`: steps with lists
# forced, beside our dense kernel and FA3; below that context they lose. Of the 64 pages at 1k, the six that are always
# read and one for each of four query heads are 16%; of more pages 10% are needed. A small cache stays in L2 from call
# to call, as one of a model's many layers doesn't: this is to the advantage of who reads all of it. And steps with the
# smaller sketches.
FURTHER: tuple[Row, ...] = (
    *(
        _pages(f"context-{tokens // K}k-b{batch}", batch, tokens, None, NeededPages(0.10))
        for tokens in (1 * K, 2 * K, 4 * K, 8 * K, 16 * K)
        for batch in (1, 8, 64)
    ),
    *(
        _pages(f"8bits-b{batch}-{tokens // K}k", batch, tokens, None, NeededPages(0.10, sketch_bits=8))
        for batch, tokens in ((64, 32 * K), (8, 128 * K), (1, 128 * K))
    ),
)

AVERAGES: tuple[Average, ...] = (
    Average("dense-*", Target("FA3", 1.04)),
    Average("dense-*", Target(BEST, 1.00)),
    Average("dense-hd64-*", Target("FA3", 1.10)),
)
