"""vLLM on a Hopper GPU: models whose attention is not a Llama's, and speculative decoding.

Models of random weights: of Gemma-2's kind, with a head dimension of 256, a softcap, and sliding windows in every other
layer; and of gpt-oss's, with 64 query heads to 8 KV heads, windows and sinks. LITE_ATTENTION generates what FLASH_ATTN
does; and each of these features is seen to matter, by an engine that serves the same weights without it.

Engines have vLLM's default CUDA graphs, a full one for decode steps and pieces for all others, but of few sizes. The
pieces are not compiled, which would take most of the time. Each engine runs in a process of its own, those of a model
side by side.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from lite_attention import __version__

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "tests" / "vllm"), str(ROOT / "tools")]

import random_model  # noqa: E402
import random_others  # noqa: E402
from agreement import agreement, rounding  # noqa: E402
from processes import Reported, run  # noqa: E402
from vllm_missing import missing  # noqa: E402

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(600)]

LITE = "LITE_ATTENTION"
COMPUTES = f"{LITE} {__version__} computes attention by the kernel for NVIDIA"
NEW, BEST = 32, 100
PROMPTS = random_model.prompts(700, 33, 300, 520)  # three are longer than the windows, and than a step takes
EAGER = {"enforce_eager": True}


def serve(
    model: str, *, backend: str = LITE, prompts: list = PROMPTS, new: int = NEW, best: int = BEST, **changes
) -> Reported:
    """Greedy tokens for all prompts in one batch, the logits of the best at each position, and what was counted."""
    engine = random_model.SMALL_ENGINE | {"model": model, "attention_backend": backend, "max_logprobs": best}
    if "enforce_eager" not in changes:
        engine["compilation_config"] = {"backend": "eager", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]}
    sampling = {"temperature": 0, "max_tokens": new, "ignore_eos": True, "detokenize": False, "logprobs": best}
    reported = run(
        "probe_pages.py",
        {"engine": engine | changes, "rounds": [{"prompts": prompts, "sampling": sampling}]},
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # starts in half the time
    )
    assert backend != LITE or COMPUTES in reported.log
    if "enforce_eager" not in changes:
        assert "'cudagraph_mode': <CUDAGraphMode.FULL_AND_PIECEWISE" in reported.log
        assert "is not supported with" not in reported.log  # else vLLM has chosen another mode
    assert all(len(tokens) == new for (tokens,) in reported["rounds"][0]["tokens"])
    return reported


def generated(engines: dict[str, Future], name: str) -> dict:
    return engines[name].result()["rounds"][0]


def check_beside_flash_attn(engines: dict[str, Future], without: list[str]) -> None:
    """Tokens differ only where rounding may turn them: it moves logits, whose spread is 3, by 0.05.

    What each feature moves them by is told by the first new tokens, before which all engines have had the same.
    """
    found, theirs = generated(engines, "plain"), generated(engines, "FLASH_ATTN")
    apart, first = rounding(found, theirs), random_model.logits_apart(found, theirs)
    moved = {name: random_model.logits_apart(generated(engines, name), theirs) for name in without}
    print(f"logits are apart by {apart:.3f}, those of the first new tokens by {first:.3f}; with {moved}")
    assert max(apart, first) < 0.15
    assert min(moved.values()) > 4 * max(apart, first)
    assert agreement(found, theirs) >= NEW * len(PROMPTS) // 8


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    model = random_others.write_gemma2(tmp_path_factory.mktemp("gemma2"))
    engines = {
        "plain": {},
        "FLASH_ATTN": {"backend": "FLASH_ATTN"},
        "no softcap": EAGER | {"hf_overrides": {"attn_logit_softcapping": None}},
        "no window": EAGER | {"hf_overrides": {"sliding_window": 4096}},
    }
    with ThreadPoolExecutor(len(engines)) as pool:
        yield {name: pool.submit(serve, model, **how) for name, how in engines.items()}


def test_gemma2(gemma2):
    """A head dimension of 256, a softcap in all layers, and windows of 256 tokens in two of four."""
    check_beside_flash_attn(gemma2, ["no softcap", "no window"])


# Leaves out a page here and there, which moves logits by as much as rounding does.
NEARLY_ALL = {"eps": 0.02, "min_context": 64, "newest": 16}


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    model, sinkless = (
        random_others.write_gpt_oss(tmp_path_factory.mktemp("gpt_oss"), sinks=sinks) for sinks in (True, False)
    )
    engines = {
        "plain": (model, {}),
        "FLASH_ATTN": (model, {"backend": "FLASH_ATTN"}),
        "no sinks": (sinkless, EAGER),
        "no window": (model, EAGER | {"hf_overrides": {"sliding_window": 4096}}),
        "lists": (model, {"additional_config": {"lite_attention": NEARLY_ALL}}),
    }
    with ThreadPoolExecutor(len(engines)) as pool:
        yield {name: pool.submit(serve, path, **how) for name, (path, how) in engines.items()}


def test_gpt_oss(gpt_oss):
    """Sinks in all layers, eight query heads to a KV head, and windows of 128 tokens in two of four."""
    check_beside_flash_attn(gpt_oss, ["no sinks", "no window"])


def test_gpt_oss_decodes_from_lists(gpt_oss):
    """Its layers without a window, whose pages are longer than those of the others would be by themselves."""
    found, dense = generated(gpt_oss, "lists"), generated(gpt_oss, "plain")
    stats, apart = gpt_oss["lists"].result()["stats"], rounding(found, dense)
    print(f"logits are apart by {apart:.3f}", {name: stats[name] for name in ("read", "visible", "left_out")})
    assert stats["rows_listed"] >= (NEW - 1) * 3
    assert stats["read"] < stats["visible"]
    assert apart < 0.15
    assert agreement(found, dense) >= NEW * len(PROMPTS) // 8


# Speculative decoding. Drafts are looked up in what the request has had already. Of so few tokens many are what the
# model goes on with and many aren't: a step has several tokens of a request, and those that are refused leave keys
# behind, and sketches where they filled a page.
TOKENS = 24
REPEATING = [[token % TOKENS for token in prompt] for prompt in random_model.prompts(700, 33, 300, 150)]
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
}
SOME = {"additional_config": {"lite_attention": NEARLY_ALL | {"eps": 0.1}}}
SPECULATIVE = {
    "plain": {},
    "drafts": NGRAM,
    "lists": SOME,
    "drafts and lists": NGRAM | SOME,
    "drafts and long lists": NGRAM | {"additional_config": {"lite_attention": NEARLY_ALL}},
}
ANSWERS = {"prompts": REPEATING, "new": 48, "best": 10}


@pytest.fixture(scope="module")
def speculative(tmp_path_factory):
    model = random_model.write(tmp_path_factory.mktemp("speculative"), vocabulary=TOKENS)
    with ThreadPoolExecutor(len(SPECULATIVE)) as pool:
        yield {name: pool.submit(serve, model, **ANSWERS, **how) for name, how in SPECULATIVE.items()}


@pytest.mark.parametrize("how", ["drafts", "drafts and long lists"])
def test_what_drafts_lead_to_is_what_single_steps_lead_to(speculative, how):
    """Whether rows are listed or not; a first difference is excused only where it is of the size of rounding."""
    reported, (found, plain) = speculative[how].result(), (generated(speculative, name) for name in (how, "plain"))
    drafted, accepted = (reported["counters"][f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    apart = rounding(found, plain)
    print(f"{accepted} of {drafted} tokens of drafts accepted; logits are apart by {apart:.3f}")
    assert accepted > 40
    assert drafted - accepted > 10
    assert apart < 0.15
    assert agreement(found, plain) >= 48 * len(REPEATING) // 4
    if how != "drafts":
        assert reported["stats"]["rows_listed"] > 20
        assert reported["stats"]["read"] < reported["stats"]["visible"]


def test_drafts_and_lists_that_leave_pages_out(speculative):
    """A step's tokens share a list, which has what each of them needs: no further from dense than one token's lists."""
    lists, both = (speculative[name].result() for name in ("lists", "drafts and lists"))
    plain = generated(speculative, "plain")
    of_one, of_several = (rounding(each["rounds"][0], plain) for each in (lists, both))
    shares = [each["stats"]["read"] / each["stats"]["visible"] for each in (lists, both)]
    print(f"logits are apart from dense ones by {of_one:.3f} and {of_several:.3f}; shares that are read: {shares}")
    assert both["counters"]["vllm:spec_decode_num_accepted_tokens"] > 40
    assert both["stats"]["rows_listed"] > 20
    assert 0.2 < shares[0] <= shares[1] + 0.02 < 1
    assert 0.01 < both["stats"]["left_out"] < 0.1
    assert 0.02 < of_several < 1.5 * of_one
    assert agreement(both["rounds"][0], lists["rounds"][0], excuse=True) >= 48 * len(REPEATING) // 4
