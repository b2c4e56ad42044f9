"""Small transformers of diffusers with random weights, denoising loops, and what LiteAttention should give in them."""

from __future__ import annotations

import contextlib

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from lite_attention import SkipList, skip_attention

STEPS = 10
TILE = (8, 4)
GUIDANCE = 3.0
HEADS, HEAD_DIM, TEXT, TEXT_DIM = 2, 16, 7, 32


def wan():
    return _sharpened(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def flux():
    return _sharpened(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        axes_dims_rope=(4, 4, 8),
    )


def _sharpened(kind, **config):
    """A model with the same weights each time: such that attention looks at few keys, as that of trained models does.

    With the random weights that models begin with it looks at all of them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**config)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif "norm_q" in name or "norm_added_q" in name:
                torch.nn.init.constant_(parameter, 5.0)
    return model.eval()


def prompt(seed):
    """Embeddings of a prompt and of its negative: (2, tokens, dim)."""
    return torch.randn(2, TEXT, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def denoise(model, embeddings, *, batched=False, context=None, steps=STEPS):
    """The latents after a loop with classifier-free guidance, as diffusers' pipelines make it.

    `context` takes a stream's name and the step's index, and gives the context of a pass.
    """
    context = context or (lambda name, step: model.cache_context(name))
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    shape = (1, 4, 3, 8, 8) if isinstance(model, WanTransformer3DModel) else (1, 48, 4)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    for i, t in enumerate(scheduler.timesteps):
        if batched:
            with context("cond_uncond", i):
                noise = predict(model, latents.expand(2, *shape[1:]), t, embeddings)
        else:
            passes = []
            for name, embedding in zip(("cond", "uncond"), embeddings, strict=True):
                with context(name, i):
                    passes.append(predict(model, latents, t, embedding[None]))
            noise = torch.cat(passes)
        cond, uncond = noise.chunk(2)
        latents = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, latents, return_dict=False)[0]
    return latents


def predict(model, latents, t, embeddings):
    batch = latents.shape[0]
    if isinstance(model, WanTransformer3DModel):
        return model(latents, t.expand(batch), embeddings, return_dict=False)[0]
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(6.0), torch.arange(8.0))
    return model(
        latents,
        embeddings,
        pooled_projections=embeddings.mean(1),
        timestep=t.expand(batch) / 1000,
        img_ids=ids,
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )[0]


class Expected:
    """Stock diffusers whose native attention uses a list for each self-attention and stream: what LiteAttention does.

    The layer is known by the order of the calls in a pass, the stream by the context that the loop is given.
    """

    def __init__(self, monkeypatch, threshold):
        self.threshold = threshold
        self.lists, self.stream, self.layer = {}, None, 0
        backends = _AttentionBackendRegistry._backends
        self.native = backends[AttentionBackendName.NATIVE]
        monkeypatch.setitem(backends, AttentionBackendName.NATIVE, self.attend)

    @contextlib.contextmanager
    def context(self, name, step):
        self.stream, self.layer = name, 0
        yield

    def attend(self, query, key, value, **options):
        if query.shape[1] != key.shape[1]:
            return self.native(query, key, value, **options)
        place = self.stream, self.layer
        self.layer += 1
        if place not in self.lists:
            batch, tokens, heads, _ = query.shape
            self.lists[place] = SkipList.fresh(batch, heads, tokens, tokens, tile=TILE)
        return skip_attention(query, key, value, self.lists[place], self.threshold)[0]
