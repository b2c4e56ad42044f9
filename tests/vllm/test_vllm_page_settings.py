"""Settings of decoding from lists: where they come from, what is refused, and with which words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def plugins():
    import vllm.engine.arg_utils  # noqa: F401  (there before plugins are, as where an engine is started)
    from vllm.plugins import load_general_plugins

    from vllm_plugin import selection

    load_general_plugins()
    selection.install()  # again, where an earlier test has loaded them without it


def resolve(settings: object = None, **environment: str):
    from vllm_plugin.settings import resolve

    variables = {f"LITE_ATTENTION_{name.upper()}": text for name, text in environment.items()}
    return resolve({} if settings is None else {"lite_attention": settings}, variables)


def test_off_until_asked_for():
    assert not resolve().enabled
    assert not resolve({"min_context": 128}).enabled
    assert not resolve({"eps": 0}).enabled
    assert not resolve({"pages": True, "eps": 0.0}).enabled
    assert not resolve({"pages": False, "eps": 0.1}).enabled
    assert not resolve({"pages": False, "eps": 0, "layer_eps": {0: 0.1}}).enabled
    assert not resolve({"layer_eps": {}}).enabled


def test_on_by_eps_or_by_name():
    assert resolve({"eps": 0.1}).enabled
    asked = resolve({"pages": True})
    assert asked.enabled and asked.eps == 0.02 and asked.sketch_bits == 12
    assert resolve({"layer_eps": {0: 0.1}}).enabled


def test_the_environment_sets_what_arguments_do_not():
    settings = resolve({"eps": 0.1}, eps="0.3", min_context="256", dense_layers="0,-1", pages="true")
    assert (settings.eps, settings.min_context, settings.dense_layers) == (0.1, 256, (0, -1))
    assert resolve(dense_layers="3").dense_layers == (3,)
    assert resolve(sketch_bits="8").sketch_bits == 8 and resolve({"sketch_bits": 12}, sketch_bits="8").sketch_bits == 12
    assert resolve(eps="0.05").enabled and not resolve(eps="0.05", pages="false").enabled


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"eps": 1}, {}, r"additional_config\['lite_attention'\]\['eps'\]: got 1; needs a number from 0, .* below 1"),
        ({"eps": -0.1}, {}, "got -0.1; needs a number from 0"),
        ({"eps": "much"}, {}, "got 'much'; needs a number from 0"),
        ({"eps": True}, {}, "got True; needs a number from 0"),
        ({"min_context": -1}, {}, "got -1; needs an integer of 0 or more"),
        ({"newest": 0}, {}, "got 0; needs an integer of 1 or more"),
        ({"dense_layers": ["first"]}, {}, r"got \['first'\]; needs a list of integers"),
        ({"layer_eps": {"3": 0.1, "4": 1}}, {}, r"\['layer_eps'\]: got \{'4': 1\}; needs numbers from 0 to below 1"),
        ({"layer_eps": {"first": 0.1}}, {}, r"got \{'first': 0.1\}; needs numbers from 0 to below 1 by the index"),
        ({"layer_eps": [0.1]}, {}, r"got \[0.1\]; needs numbers from 0 to below 1 by the index"),
        ({"layer_eps": "no.toml"}, {}, r"\['layer_eps'\]: got 'no.toml': No such file or directory; needs a file"),
        ({"layer_eps": {3: 0.1}, "eps": 0}, {}, r"\['layer_eps'\]: got layers .* where eps is 0, .* 'pages' false"),
        (None, {"layer_eps": "no.toml"}, "LITE_ATTENTION_LAYER_EPS: got 'no.toml': No such file"),
        ({"pages": "on"}, {}, "got 'on'; needs true or false"),
        (
            {"sketch_bits": 4},
            {},
            r"\['sketch_bits'\]: got 4; needs 12, 8 of a channel's mean and 4 of .*, or 8, 4 of each",
        ),
        ({"sketch_bits": "8"}, {}, "got '8'; needs 12, 8 of a channel's mean"),
        ({"sketch_bits": True}, {}, "got True; needs 12, 8 of a channel's mean"),
        (None, {"sketch_bits": "16"}, "LITE_ATTENTION_SKETCH_BITS: got 16; needs 12, 8 of a channel's mean"),
        (
            {"epsilon": 0.1},
            {},
            "got the key 'epsilon'; needs one of pages, eps, min_context, newest, dense_layers, layer_",
        ),
        (0.1, {}, "got 0.1; needs an object of pages, eps"),
        (None, {"eps": "2"}, "LITE_ATTENTION_EPS: got 2; needs a number from 0"),
        (None, {"eps": "some"}, "LITE_ATTENTION_EPS: got 'some'; needs a number"),
        (None, {"dense_layers": "0,last"}, "LITE_ATTENTION_DENSE_LAYERS: got '0,last'; needs a list of integers"),
        ({"eps": 2, "newest": 0}, {}, "'eps'.*; .*'newest'"),
    ],
)
def test_what_is_refused(settings, environment, message):
    with pytest.raises(ValueError, match=message):
        resolve(settings, **environment)


def test_an_eps_for_each_layer_by_mapping_json_or_file(tmp_path):
    from lite_attention.layer_eps import LayerEps, write_layer_eps

    layers = {0: 0.05, 2: 0.0}
    found = LayerEps("model", 0.1, ("text",), 8192, 2048, layers)
    write_layer_eps(found, tmp_path / "own.toml", ["of a test"], {0: "KL 0.001", 2: "KL 0"})
    for settings in (
        resolve({"layer_eps": layers}),
        resolve(layer_eps='{"0": 0.05, "2": 0}'),
        resolve({"layer_eps": str(tmp_path / "own.toml")}),
        resolve(layer_eps=str(tmp_path / "own.toml")),
    ):
        assert settings.layer_eps == layers
        assert [settings.own_eps(layer, 4) for layer in range(4)] == [0.05, None, 0.0, None]
    with pytest.raises(
        ValueError, match=r"\['layer_eps'\]: got '.*own\.toml', made with sketch_bits 12, where .* is 8"
    ):
        resolve({"layer_eps": str(tmp_path / "own.toml"), "sketch_bits": 8})
    from_the_end = resolve({"layer_eps": {-1: 0.3}})
    assert [from_the_end.own_eps(layer, 4) for layer in range(4)] == [None, None, None, 0.3]


def test_variables_that_nothing_reads():
    from vllm_plugin import settings

    known = ["EPS", "PAGES", "MIN_CONTEXT", "NEWEST", "DENSE_LAYERS", "METRICS_DIR", "CACHE", "FA3", "TEST_MODEL"]
    environment = {f"LITE_ATTENTION_{name}": "1" for name in (*known, "SKIP_CUDA_BUILD")} | {"LITE_OTHER": "1"}
    assert settings.unread(environment) == []
    misspelled = {f"LITE_ATTENTION_{name}": "1" for name in ("ESP", "DENSE_LAYER", "SOMETHING_ELSE")}
    layers, esp, other = settings.unread(environment | misspelled)
    assert "LITE_ATTENTION_DENSE_LAYER is ignored" in layers and "did you mean LITE_ATTENTION_DENSE_LAYERS?" in layers
    assert "LITE_ATTENTION_ESP is ignored" in esp and "did you mean LITE_ATTENTION_EPS?" in esp
    assert "LITE_ATTENTION_SOMETHING_ELSE is ignored" in other and "there are LITE_ATTENTION_PAGES, " in other


def test_a_misspelled_variable_is_named_once(model, monkeypatch):
    from vllm_plugin import selection

    said = []
    monkeypatch.setattr(selection.logger, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setattr(selection, "_told", set())
    monkeypatch.setenv("LITE_ATTENTION_ESP", "0.1")
    for _ in range(2):
        engine_config(model, attention_backend="LITE_ATTENTION")
    assert [line for line in said if "LITE_ATTENTION_ESP" in line] == [
        "LITE_ATTENTION_ESP is ignored: no setting has this name; did you mean LITE_ATTENTION_EPS?"
    ]


def engine_config(model: str, **arguments):
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=model, **arguments).create_engine_config()


def test_the_engine_refuses_at_once(model):
    """Where the command line is parsed, before a worker is started."""
    with pytest.raises(ValueError, match="got 7; needs a number"):
        engine_config(model, attention_backend="LITE_ATTENTION", additional_config={"lite_attention": {"eps": 7}})
    with pytest.raises(ValueError, match="dense_layers: got 30; needs -30 to 29"):
        engine_config(
            model,
            attention_backend="LITE_ATTENTION",
            additional_config={"lite_attention": {"eps": 0.1, "dense_layers": [30]}},
        )
    with pytest.raises(ValueError, match="layer_eps and dense_layers: got -1 and 29, which are one layer"):
        engine_config(
            model,
            attention_backend="LITE_ATTENTION",
            additional_config={"lite_attention": {"eps": 0.1, "layer_eps": {"-1": 0.1}, "dense_layers": [29]}},
        )


def test_workers_get_what_the_first_process_resolved(model, monkeypatch):
    from vllm_plugin import settings

    monkeypatch.setenv("LITE_ATTENTION_EPS", "0.1")
    monkeypatch.setenv("LITE_ATTENTION_NEWEST", "32")
    monkeypatch.setenv("LITE_ATTENTION_LAYER_EPS", '{"0": 0.01, "-1": 0.05}')
    monkeypatch.setenv("LITE_ATTENTION_SKETCH_BITS", "8")
    given = {"lite_attention": {"min_context": 100}, "other": 1}
    config = engine_config(model, attention_backend="LITE_ATTENTION", additional_config=given)
    monkeypatch.delenv("LITE_ATTENTION_EPS")  # as a worker on another machine
    monkeypatch.delenv("LITE_ATTENTION_LAYER_EPS")
    monkeypatch.delenv("LITE_ATTENTION_SKETCH_BITS")
    monkeypatch.setenv("LITE_ATTENTION_NEWEST", "16")
    found = settings.of(config)
    assert (found.enabled, found.eps, found.min_context, found.newest) == (True, 0.1, 100, 32)
    assert found.layer_eps == {0: 0.01, -1: 0.05} and found.sketch_bits == 8
    assert config.additional_config["other"] == 1
    assert given == {"lite_attention": {"min_context": 100}, "other": 1}


def test_settings_for_another_backend_are_not_ignored_in_silence(model, monkeypatch):
    from vllm_plugin import selection

    said = []
    monkeypatch.setattr(selection.logger, "warning", lambda message, *values: said.append(message % values))
    engine_config(model, additional_config={"lite_attention": {"eps": 0.1}})
    assert any("are ignored: the attention backend is not LITE_ATTENTION" in line for line in said)


def test_pages_of_another_size_are_refused():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from vllm_plugin import sketches

    shape = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    with pytest.raises(ValueError, match=r"block_size: got 128; .* needs 16: --block-size 16"):
        sketches.with_room(FullAttentionSpec(block_size=128, **shape), "model.layers.0.attn", 12)
    with pytest.raises(NotImplementedError, match=r"model\.layers\.0\.attn can't decode from listed pages"):
        sketches.with_room(SlidingWindowSpec(block_size=16, sliding_window=64, **shape), "model.layers.0.attn", 12)
    spec = sketches.with_room(FullAttentionSpec(block_size=16, **shape), "model.layers.0.attn", 12)
    page = 16 * 2 * 2 * 64 * 2
    assert spec.page_size_bytes == page + 256 and spec.page_size_bytes % 256 == 0  # 2 * 112, and what aligns pages
    assert sketches.room(spec, 12) == 256
    eight = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    assert sketches.room(eight, 12) == 8 * 208 + 128
    assert sketches.room(eight, 8) == 8 * 144 + 128
    fewer = sketches.with_room(eight, "model.layers.0.attn", 8)
    assert fewer.page_size_bytes == 16 * 8 * 2 * 128 * 2 + 1280 and sketches.room(fewer, 8) == 1280


@pytest.mark.parametrize("arguments", [{"logits_soft_cap": 30.0}, {"alibi_slopes": [0.5, 0.25]}])
def test_scores_without_an_estimate_are_refused(arguments, monkeypatch):
    from vllm_plugin import impl

    config = SimpleNamespace(additional_config={"lite_attention": {"eps": 0.1}})
    monkeypatch.setattr(impl, "get_current_vllm_config_or_none", lambda: config)
    with pytest.raises(NotImplementedError, match=r"softcap or ALiBi slopes.* needs 'pages' false"):
        impl.LiteAttentionImpl(2, 64, 0.125, 2, kv_cache_dtype="auto", **arguments)
    config.additional_config = {"lite_attention": {"eps": 0}}
    assert impl.LiteAttentionImpl(2, 64, 0.125, 2, kv_cache_dtype="auto", **arguments).listing is None


@pytest.mark.parametrize(("bits", "room"), [(12, 1792), (8, 1280)])
def test_a_layer_with_lists_asks_for_the_room_of_its_sketches(bits, room, monkeypatch):
    import torch
    from vllm.model_executor.layers import attention
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_plugin import sketches
    from vllm_plugin.settings import PageSettings

    spec = FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, dtype=torch.bfloat16)
    listing = SimpleNamespace(settings=PageSettings(eps=0.1, sketch_bits=bits), wants=lambda name: name == "listed")

    class Layer(SimpleNamespace):
        def get_kv_cache_spec(self, vllm_config):
            return spec

    monkeypatch.setattr(attention, "Attention", Layer)
    sketches.install()
    found = {
        name: Layer(layer_name=name, impl=SimpleNamespace(listing=listing)).get_kv_cache_spec(None)
        for name in ("listed", "dense")
    }
    assert found["listed"].page_size_bytes == spec.page_size_bytes + room and found["dense"] is spec
