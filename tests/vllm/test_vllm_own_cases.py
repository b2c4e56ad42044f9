"""The cases of vLLM's own tests/v1/attention/test_attention_backends.py, with LITE_ATTENTION as the backend under test.

They compare a backend with PyTorch's attention on batches in a paged KV cache, with vLLM's own metadata. The models
that they name are fetched from a hub only for the shapes in their config.json, which are given here.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys

import pytest
import torch
from processes import vllm_version
from smollm2 import cache_directory
from vllm_sdist import vllm_tests

from vllm_plugin.register import backend_member

# The shapes of Llama-3-8B, and of Phi-tiny-MoE's attention, whose own configuration asks for code from the hub; with a
# quarter and half of the heads, which are computed alike: in bfloat16 they take a CPU minutes.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
SLIDING = LLAMA | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_size": 1024,
    "sliding_window": 2047,
}

# The name of each test of vLLM's, and the shapes for the model that it names.
CASES = {
    "test_causal_backend_correctness": LLAMA,
    "test_sliding_window_backend_correctness": SLIDING,
    "test_non_causal_backend_correctness": LLAMA,
}


@pytest.fixture(scope="module")
def own():
    """vLLM's test module."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    folder = vllm_tests(vllm_version(), cache_directory())
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("tests.v1.attention.test_attention_backends")
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def vllm_config():
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    with set_current_vllm_config(config):
        yield config


def parameters(test) -> list[dict]:
    """The cases that vLLM's marks give a test, without those of a quantised KV cache and with one model."""
    axes = []
    for mark in test.pytestmark:
        if mark.name == "parametrize" and mark.args[0] != "model":
            axes.append([(mark.args[0], value) for value in mark.args[1]])
    found = [dict(case) for case in itertools.product(*axes)]
    return [case for case in found if case.get("kv_cache_dtype", "auto") == "auto"]


@pytest.mark.parametrize("name", CASES)
def test_case(own, vllm_config, tmp_path, monkeypatch, name):
    computed = []
    correctness, run_attention_backend = own._test_backend_correctness, own.run_attention_backend

    def only_ours(batch_spec, model, backends, *args, block_size=16, **kwargs):
        # vLLM calls it with its backends for small pages, and again with FlexAttention alone, which needs pages of 128.
        if block_size == 16:
            correctness(batch_spec, model, [backend_member()], *args, **kwargs)

    def counted(backend, *args, **kwargs):
        computed.append(backend.name)
        return run_attention_backend(backend, *args, **kwargs)

    monkeypatch.setattr(own, "_test_backend_correctness", only_ours)
    monkeypatch.setattr(own, "run_attention_backend", counted)
    (tmp_path / "config.json").write_text(json.dumps(CASES[name]))
    test = getattr(own, name)
    cases = parameters(test)
    for case in cases:
        with torch.inference_mode():
            test(vllm_config, model=str(tmp_path), **case)
    assert computed == ["LITE_ATTENTION"] * len(cases)
    assert len(cases) >= 3
