"""vLLM on a Hopper GPU, decoding from lists of pages that a KV connector loads while their requests wait.

Of each prompt the last token alone is left to compute, so that the first step of the requests is the replay of a full
CUDA graph. How long lists are is known, as nearly all mass may be left out: a page with a wrong sketch would be listed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "vllm"))

import random_model
from page_counts import NEARLY_ALL, expected
from processes import Reported, run
from vllm_missing import missing

pytestmark = [pytest.mark.skipif(missing() is not None, reason=str(missing())), pytest.mark.timeout(900)]

LENGTHS, NEW = (513, 336), 20
LISTS = {"min_context": 100, "newest": 24}
LAYERS, HEADS_K = 4, 2


def generate(folder: Path, does: str, runner: str) -> Reported:
    """From an engine whose sketches are all wrong when it starts."""
    engine = random_model.SMALL_ENGINE | {
        "model": random_model.write(folder),
        "attention_backend": "LITE_ATTENTION",
        "additional_config": {"lite_attention": LISTS | {"eps": NEARLY_ALL}},
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]},
        "kv_transfer_config": {
            "kv_connector": "PageStore",
            "kv_connector_module_path": "page_store",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"folder": str(folder / "pages"), "does": does},
        },
    }
    sampling = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "detokenize": False}
    rounds = [{"poison": True}, {"prompts": random_model.prompts(*LENGTHS), "sampling": sampling}]
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1" if runner == "V2" else "0"}
    return run("probe_pages.py", {"engine": engine, "rounds": rounds}, **variables)


@pytest.mark.parametrize("runner", ["V1", "V2"])
def test_a_graph_replayed_after_a_load_finds_sketches(tmp_path, runner):
    due = [expected(length, NEW, **LISTS) for length in LENGTHS]
    for does, cached in (("save", [0, 0]), ("load ahead", [512, 336])):
        found = generate(tmp_path, does, runner)
        stats = found["stats"]
        assert found["rounds"][0]["cached"] == cached
        assert stats["rows_listed"] == sum(each["rows_listed"] for each in due)
        left_out = sum(each["visible"] - each["read"] for each in due)  # rows that are attended to whole add nothing
        assert stats["visible"] - stats["read"] == left_out * LAYERS * HEADS_K
