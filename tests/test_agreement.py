"""What the GPU tests of vLLM excuse: a token that rounding may turn, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "gpu"))

from agreement import WORST, agreement, rounding

NOISE = 0.01


def run(tokens, last=None, noise=0.0):
    """One prompt's tokens, and at each place the logits of three; `last` is those at the last place."""
    best = [{"1": 2.0 + noise, "2": 1.0 - noise, "3": 0.5} for _ in tokens]
    return {"tokens": [[tokens]], "best": [[[*best[:-1], last or best[-1]]]]}


def test_equal_tokens_agree():
    assert agreement(run([1, 1, 1]), run([1, 1, 1], noise=NOISE)) == 3


def test_a_token_that_rounding_turns_is_excused():
    found = run([1, 1, 2], {"1": 2.0, "2": 2.0 + NOISE})
    assert agreement(found, run([1, 1, 1], {"1": 2.0, "2": 2.0 - NOISE}, noise=NOISE)) == 2
    tied = run([1, 1, 2], {"1": 2.0, "2": 2.0})
    assert agreement(tied, run([1, 1, 1], {"1": 2.0, "2": 2.0 - NOISE}, noise=NOISE)) == 2


@pytest.mark.parametrize("logits", [{"1": 2.0, "2": 2.0}, {"1": 2.0, "2": 1.99}])
def test_equal_logits_give_one_token(logits):
    with pytest.raises(AssertionError, match="prompt 0 differs at 2"):
        agreement(run([1, 1, 2], logits), run([1, 1, 1], logits, noise=NOISE))


def test_a_token_must_be_the_best_of_its_own_run():
    with pytest.raises(AssertionError, match="not the best token"):
        agreement(run([1, 1, 2], {"1": 2.02, "2": 2.0}), run([1, 1, 1], {"1": 2.0, "2": 1.9}, noise=NOISE))


def test_more_than_rounding_is_no_excuse():
    with pytest.raises(AssertionError, match="by rounding"):
        agreement(run([1, 1, 2], {"1": 2.0, "2": 2.3}), run([1, 1, 1], {"1": 2.0, "2": 1.9}, noise=NOISE))
    with pytest.raises(AssertionError, match="moved by inf"):
        agreement(run([1, 1, 2], {"2": 2.3}), run([1, 1, 1], noise=NOISE))
    assert agreement(run([1, 1, 2], {"2": 2.3}), run([1, 1, 1], noise=NOISE), excuse=True) == 2


def test_what_is_allowed_is_the_callers_to_say():
    found, expected = run([1, 1, 2], {"1": 2.0, "2": 2.04}), run([1, 1, 1], {"1": 2.04, "2": 2.0}, noise=NOISE)
    times = 0.08 / rounding(found, expected)
    assert WORST < times < 10
    with pytest.raises(AssertionError, match="by rounding"):
        agreement(found, expected)
    assert agreement(found, expected, worst=10) == 2
    with pytest.raises(AssertionError, match="by rounding"):
        agreement(found, expected, worst=0.99 * times)


def test_where_nothing_else_differs_rounding_excuses_nothing():
    with pytest.raises(AssertionError, match=r"by rounding 0\.0"):
        agreement(run([1, 1, 2], {"1": 2.0, "2": 2.001}), run([1, 1, 1], {"1": 2.0, "2": 1.999}))
