"""LiteAttention in transformers of diffusers, against the stock ones and against lists kept by hand."""

from __future__ import annotations

import copy
import inspect
import math

import pytest
import torch

pytest.importorskip("diffusers", reason="needs diffusers: pip install 'lite-attention[diffusers]'")

from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXVideoTransformer3DModel,
    PyramidAttentionBroadcastConfig,
    WanPipeline,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusion import HEAD_DIM, HEADS, STEPS, TEXT_DIM, TILE, Expected, denoise, flux, predict, prompt, wan

import lite_attention.diffusers as lite
from lite_attention import calibrate, collect_stats, lite_modules, load_thresholds, save_thresholds
from lite_attention.diffusers.backend import CALLS, attend

FIRST, SECOND = prompt(1), prompt(2)
THRESHOLD = -2.0
MODELS = {"wan": wan, "flux": flux}
LAYERS = {
    "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    "flux": ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"],
}

both = pytest.mark.parametrize("kind", MODELS)
passes = pytest.mark.parametrize("batched", [False, True], ids=["separate", "batched"])


def enable(model, threshold=THRESHOLD, **options):
    lite.enable(model, **{"threshold": threshold, "num_steps": STEPS, "stats_steps": STEPS, "tile": TILE} | options)
    return model


def expected(kind, threshold, batched, *prompts):
    """The latents of each prompt, with fresh lists, and the lists of the last."""
    latents = []
    for embeddings in prompts:
        with pytest.MonkeyPatch.context() as monkeypatch:
            by_hand = Expected(monkeypatch, threshold)
            latents.append(denoise(MODELS[kind](), embeddings, batched=batched, context=by_hand.context))
    return latents, by_hand.lists


def same(x, y):
    torch.testing.assert_close(x, y, rtol=0, atol=0)


@both
@passes
def test_without_a_threshold_it_is_stock(kind, batched):
    model = MODELS[kind]()
    stock = denoise(model, FIRST, batched=batched)
    torch.testing.assert_close(denoise(enable(model, -math.inf), FIRST, batched=batched), stock, rtol=1e-5, atol=1e-5)
    assert all((s.sparsity == 0).all() for layer in collect_stats(model).values() for s in layer.values())


@both
@passes
def test_lists_of_layers_and_streams(kind, batched):
    """Latents of two prompts without a reset between them, and every list after, are those of lists kept by hand."""
    model = enable(MODELS[kind]())
    assert list(lite_modules(model)) == LAYERS[kind]
    latents = [denoise(model, embeddings, batched=batched) for embeddings in (FIRST, SECOND)]
    by_hand, lists = expected(kind, THRESHOLD, batched, FIRST, SECOND)
    for ours, theirs in zip(latents, by_hand, strict=True):
        same(ours, theirs)
    for (stream, layer), skip_list in lists.items():
        assert torch.equal(lite_modules(model)[LAYERS[kind][layer]].skip_list(stream).visits(), skip_list.visits()), (
            f"{stream}, {layer}"
        )
    streams = {"cond_uncond"} if batched else {"cond", "uncond"}
    for stats in collect_stats(model).values():
        assert set(stats) == streams
        for stream in stats.values():
            assert stream.sparsity[0].max() == 0 and stream.sparsity[-1].min() > 0.05
    if not batched:
        assert not torch.equal(lists["cond", 1].visits(), lists["uncond", 1].visits())


def test_a_forgotten_reset_leaks_without_num_steps():
    """What `num_steps` is for, and the test above would show."""
    model = enable(wan(), num_steps=None)
    denoise(model, FIRST)
    leaking = denoise(model, SECOND)
    lite.reset(model)
    fresh = denoise(model, SECOND)
    same(fresh, expected("wan", THRESHOLD, False, SECOND)[0][0])
    assert not torch.allclose(leaking, fresh)


def test_step_index_starts_a_prompt():
    """Also one that comes after an interrupted one."""
    model = wan()
    if "kwargs" not in inspect.signature(model.cache_context).parameters:
        pytest.skip("cache_context of this diffusers takes no step_index")
    enable(model, num_steps=None)
    with_index = lambda name, step: model.cache_context(name, step_index=step)  # noqa: E731
    denoise(model, FIRST, context=with_index, steps=3)
    same(denoise(model, SECOND, context=with_index), expected("wan", THRESHOLD, False, SECOND)[0][0])


def test_reset_of_one_stream():
    model = enable(wan())
    denoise(model, FIRST, steps=5)
    lite.reset(model, "cond")
    for attention in lite_modules(model).values():
        assert attention.skip_list("cond").visits().all()
        assert not attention.skip_list("uncond").visits().all()


def test_stream_by_name():
    model = enable(wan())
    by_name = denoise(model, FIRST, context=lambda name, step: lite.stream(model, name))
    same(by_name, expected("wan", THRESHOLD, False, FIRST)[0][0])
    with lite.stream(model, "outer"):
        with lite.stream(model, "inner"):
            pass
        denoise(model, FIRST, context=lambda name, step: lite.stream(model, "outer"), steps=1)
    assert set(lite_modules(model)["blocks.0.attn1"].streams) == {"cond", "uncond", "outer"}


def test_pipeline():
    """The two lines with a pipeline of diffusers, which names the passes itself."""
    model = wan()
    pipeline = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=model,
    )
    pipeline.set_progress_bar_config(disable=True)

    def latents(embeddings):
        return pipeline(
            prompt_embeds=embeddings[:1],
            negative_prompt_embeds=embeddings[1:],
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    enable(model)
    assert torch.isfinite(latents(FIRST)).all()
    unreset = latents(SECOND)
    stats = collect_stats(model)
    assert {stream for layer in stats.values() for stream in layer} == {"cond", "uncond"}
    assert all(stream.sparsity[-1].min() > 0.05 for layer in stats.values() for stream in layer.values())
    lite.disable(model)
    enable(model)
    same(latents(SECOND), unreset)


def test_calibration(tmp_path):
    """Thresholds of a transformer, to a file and from it into another."""
    model = enable(wan())
    thresholds = calibrate(model, lambda: denoise(model, FIRST), 0.05, step_ranges=2, tolerance=2.0)
    assert [layer.name for layer in thresholds.layers] == LAYERS["wan"]
    assert thresholds.error <= 0.05 and thresholds.sparsity > 0 and thresholds.output_error < 0.5
    save_thresholds(thresholds, tmp_path / "wan.toml")
    other = enable(wan())
    load_thresholds(other, tmp_path / "wan.toml")
    same(denoise(other, FIRST), denoise(model, FIRST))


@both
def test_disable(kind):
    model = MODELS[kind]()
    stock = denoise(model, FIRST, steps=2)
    before = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    state = set(model.state_dict())
    enable(model)
    denoise(model, FIRST, steps=2)
    assert set(model.state_dict()) == state
    lite.disable(model)
    assert {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")} == before
    assert not lite_modules(model) and "cache_context" not in vars(model)
    same(denoise(model, FIRST, steps=2), stock)
    enable(model)  # and in again


@torch.no_grad()
def test_a_copy_has_lists_of_its_own():
    model = enable(wan())
    twin = copy.deepcopy(model)
    with twin.cache_context("twin"):
        predict(twin, torch.randn(1, 4, 3, 8, 8), torch.tensor(500.0), FIRST[:1].clone())
    for name, attention in lite_modules(twin).items():
        assert attention.streams == ("twin",)
        assert lite_modules(model)[name].streams == ()
    lite.disable(twin)
    assert not lite_modules(twin) and lite_modules(model)


def test_two_models_at_once():
    """The step of one between those of the other."""
    models = [enable(wan()), enable(flux())]
    alone = [denoise(model, FIRST, steps=2) for model in (enable(wan()), enable(flux()))]
    contexts = [model.cache_context("cond") for model in models]
    with contexts[0], contexts[1]:
        together = [denoise(model, FIRST, steps=2) for model in models]
    for ours, theirs in zip(together, alone, strict=True):
        same(ours, theirs)


def test_layers():
    model = enable(wan(), layers=lambda name: name != "blocks.0.attn1")
    assert list(lite_modules(model)) == ["blocks.1.attn1"]
    denoise(model, FIRST, steps=1)
    with pytest.raises(ValueError, match="self-attention module that layers takes"):
        enable(wan(), layers=lambda name: False)


@torch.no_grad()
def test_cross_attention_in_a_chosen_module():
    """Flux's processor for image prompts attends to their keys too, whose number is another."""
    model = flux()
    attn = model.transformer_blocks[0].attn
    attn.set_processor(FluxIPAdapterAttnProcessor(HEADS * HEAD_DIM, TEXT_DIM))
    x, text, image = torch.randn(1, 12, 32), torch.randn(1, 7, 32), torch.randn(1, 5, TEXT_DIM)
    stock = attn(x, text, ip_hidden_states=[image])
    enable(model, -math.inf)
    for ours, theirs in zip(attn(x, text, ip_hidden_states=[image]), stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert attn.lite_attention.skip_list().max_seqlen_k == 19


@torch.no_grad()
def test_cross_attention_that_does_not_say_so():
    """LTX's modules don't tell; its cross-attention has a mask."""
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
    model = LTXVideoTransformer3DModel(**sizes, num_layers=1, cross_attention_dim=32, caption_channels=32).eval()
    call = {
        "hidden_states": torch.randn(1, 32, 4),
        "encoder_hidden_states": FIRST[:1],
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
        "timestep": torch.tensor([500.0]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "return_dict": False,
    }
    stock = model(**call)[0]
    enable(model, -math.inf)
    torch.testing.assert_close(model(**call)[0], stock, rtol=1e-5, atol=1e-5)
    streams = {name: attention.streams for name, attention in lite_modules(model).items()}
    assert streams == {"transformer_blocks.0.attn1": ("default",), "transformer_blocks.0.attn2": ()}


@pytest.mark.parametrize(
    "option, message",
    [
        ({"attn_mask": torch.ones(1, 4)}, r"attn_mask: got a mask of \(1, 4\) in blocks.0.attn1"),
        ({"dropout_p": 0.1}, "dropout_p: got 0.1"),
        ({"is_causal": True}, "is_causal: got True"),
        ({"_parallel_config": object()}, "parallel_config: got object"),
    ],
)
def test_refusals(monkeypatch, option, message):
    model = enable(wan())
    monkeypatch.setattr(CALLS, "layer", model._lite_attention_session.layers[0])
    x = torch.randn(1, 4, HEADS, HEAD_DIM)
    with pytest.raises(NotImplementedError, match=message):
        attend(x, x, x, **option)


@torch.no_grad()
def test_a_mask_through_the_model():
    model = enable(wan())
    x = torch.randn(1, 8, 32)
    with pytest.raises(NotImplementedError, match="attn_mask"):
        model.blocks[0].attn1(x, attention_mask=torch.ones(1, 1, 8, 8))
    model.blocks[1].attn1(x)


def test_what_enable_refuses():
    model = enable(wan())
    with pytest.raises(ValueError, match="call disable first"):
        enable(model)
    with pytest.raises(ValueError, match="Linear, without a self-attention"):
        enable(torch.nn.Linear(2, 2))
    for call in (lite.disable, lite.reset, lambda model: lite.stream(model, "cond")):
        with pytest.raises(ValueError, match="enable was called on"):
            call(wan())
    with pytest.raises(RuntimeError, match="outside of the attention modules"):
        attend(*torch.randn(3, 1, 4, HEADS, HEAD_DIM))


def test_caches_of_diffusers():
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    model = wan()
    model.enable_cache(config)
    with pytest.raises(ValueError, match="disable_cache"):
        enable(model)
    model = enable(wan())
    model.enable_cache(config)
    with pytest.raises(ValueError, match="disable_cache"):
        denoise(model, FIRST, steps=1)


def test_another_backend_is_noticed(monkeypatch):
    """diffusers' own setting of a backend would take the attention away from LiteAttention, without a word."""
    model = enable(wan())
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)  # to be as it was after the test
    model.set_attention_backend("native")
    with pytest.raises(RuntimeError, match=r"blocks.0.attn1 did not compute its attention with LiteAttention"):
        denoise(model, FIRST, steps=1)


@torch.no_grad()
def test_compiled():
    """In one graph; the streams of the compiled model are those of the other."""

    def outs(model):
        generator = torch.Generator().manual_seed(3)
        for name in ("cond", "uncond", "cond"):
            with model.cache_context(name):
                latents = torch.randn(1, 4, 3, 8, 8, generator=generator)
                yield model(latents, torch.tensor([500.0]), FIRST[:1], return_dict=False)[0]

    model, twin = enable(wan()), enable(wan())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for ours, theirs in zip(outs(compiled), outs(twin), strict=True):
        same(ours, theirs)
    assert lite_modules(model)["blocks.1.attn1"].streams == ("cond", "uncond")
