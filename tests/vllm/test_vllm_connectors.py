"""KV connectors: pages that come from outside get their sketches, and requests the lists that they would have had."""

from __future__ import annotations

import pytest
import random_model
from engine import SMALL, generate_by_lists

SAMPLING = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "detokenize": False}
LISTS = {"eps": 0.3, "min_context": 100, "newest": 16}
# The first ends with a token after its last page; of the second the last token alone is computed where all is loaded.
PROMPTS = random_model.prompts(513, 336, 150)
BEGINNING = [*PROMPTS[0][:485], *random_model.prompts(203)[0]]  # begins with pages of the first one
ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
}


def rounds() -> list[dict]:
    """In chunks; a prompt of which a part is stored; all of them from the prefix cache."""
    return [{"prompts": prompts, "sampling": SAMPLING} for prompts in (PROMPTS, [BEGINNING], [*PROMPTS, BEGINNING])]


def generate(model: str, rounds: list[dict], connector: str, options: dict, **others) -> dict:
    """From an engine whose sketches are all wrong when it starts."""
    transfer = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": options} | others
    return generate_by_lists(model, [{"poison": True}, *rounds], LISTS, **ENGINE, kv_transfer_config=transfer)


def with_store(model: str, folder, does: str, **options) -> dict:
    return generate(
        model,
        rounds(),
        "PageStore",
        {"folder": str(folder), "does": does, **options},
        kv_connector_module_path="page_store",
        kv_load_failure_policy="recompute",
    )


def tokens(reported: dict) -> list:
    return [each["tokens"] for each in reported["rounds"]]


def left_out(reported: dict) -> list[float]:
    """By lists, over all steps: how many there were, pages, mass. Rows that are attended to whole add nothing."""
    stats = reported["stats"]
    rows = stats["rows_listed"] + stats["rows_dense"]
    return [stats["rows_listed"], stats["visible"] - stats["read"], stats["left_out"] * rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model.write(tmp_path_factory.mktemp("random"), **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def computed(model, folder) -> dict:
    """What an engine generates that computes the prompts itself, and stores them."""
    found = with_store(model, folder, "save")
    assert found["rounds"][0]["cached"] == [0, 0, 0]
    assert found["stats"]["read"] < 0.9 * found["stats"]["visible"]
    return found


@pytest.mark.parametrize(("does", "loaded"), [("load", [512, 320, 144]), ("load ahead", [512, 336, 144])])
def test_loaded_pages_have_their_sketches(model, folder, computed, does, loaded):
    """One of them arrives damaged, and is computed again, with those after it."""
    found = with_store(model, folder, does, damages=5)
    assert "Recovered from KV load failure: 1 request" in found.log
    assert [each["cached"] for each in found["rounds"]] == [loaded, [640], [*loaded, 672]]
    assert tokens(found) == tokens(computed)
    assert left_out(found) == pytest.approx(left_out(computed), rel=1e-6)


def test_a_connector_of_vllm_among_several(model, tmp_path):
    """What it stores whole, in one step, it loads again into pages with wrong sketches."""
    prompts = [{"prompts": random_model.prompts(238), "sampling": SAMPLING}]
    examples = [
        {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / name)},
        }
        for name in ("first", "second")
    ]
    found = generate(model, [*prompts, {"forget": True}, *prompts], "MultiConnector", {"connectors": examples})
    first, again = found["rounds"]
    assert first["tokens"] == again["tokens"]
    assert (first["cached"], again["cached"]) == ([0], [224])
    assert found["stats"]["read"] < 0.9 * found["stats"]["visible"]
