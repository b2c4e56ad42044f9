"""A diffusion model small enough to train in one minute, sampled with LiteAttention and without.

    python examples/moving_shapes.py --out moving-shapes    # on a Hopper GPU; needs matplotlib and rich

It learns videos of one shape that bounces through a dark square: what shape and which way is the prompt. Then it draws
the same videos with dense attention and with skip lists at some thresholds, and writes pictures of them, of skip maps,
and of how sparsity grows over the steps.

The model is a diffusion transformer (Peebles and Xie, arXiv 2212.09748) trained by rectified flow (Liu et al., arXiv
2209.03003) and sampled with classifier-free guidance (Ho and Salimans, arXiv 2207.12598).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from lite_attention import LiteAttention, collect_stats, plot

FRAMES, SIDE, CHANNELS, PATCH = 8, 64, 3, 2  # so that tiles are small parts of a frame
GRID = (FRAMES, SIDE // PATCH, SIDE // PATCH)  # tokens in time, down and across
PATCH_SIZE = CHANNELS * PATCH * PATCH
SHAPES, DIRECTIONS = 3, 4
CLASSES = SHAPES * DIRECTIONS
NO_CLASS = CLASSES  # what the unconditional branch of guidance is given
HEAD_DIM = 128
TURNS = (HEAD_DIM // 2 - 2 * (HEAD_DIM // 6), HEAD_DIM // 6, HEAD_DIM // 6)  # rotary angles of each axis


def videos(classes: Tensor, generator: torch.Generator) -> Tensor:
    """A video of each class, (n, FRAMES, CHANNELS, SIDE, SIDE), from -1 to 1. Place, speed and colour are random."""
    device, n = classes.device, classes.shape[0]

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    heading = (classes % DIRECTIONS + random(n) - 0.5) * (2 * math.pi / DIRECTIONS)
    velocity = torch.stack([heading.sin(), heading.cos()], -1) * (0.03 + 0.03 * random(n, 1))
    time = torch.arange(FRAMES, device=device).view(1, -1, 1)
    path = 0.2 + 0.6 * random(n, 1, 2) + time * velocity[:, None]
    centre = 0.15 + 0.7 * (1 - (path - 0.15).div(0.7).remainder(2).sub(1).abs())  # bounces off the walls
    pixel = (torch.arange(SIDE, device=device) + 0.5) / SIDE
    dy = pixel.view(1, 1, -1, 1) - centre[:, :, 0, None, None]
    dx = pixel.view(1, 1, 1, -1) - centre[:, :, 1, None, None]
    square = torch.maximum(dy.abs(), dx.abs())
    distance = torch.stack(
        [(dy.square() + dx.square()).sqrt(), square.expand(dy.shape[0], FRAMES, SIDE, SIDE), dy.abs() + dx.abs()]
    )
    distance = distance[classes // DIRECTIONS, torch.arange(n, device=device)]
    inside = torch.sigmoid((0.14 - distance) * 60)
    colour = 0.4 + 0.6 * random(n, 1, CHANNELS, 1, 1)
    return 2 * inside[:, :, None] * colour - 1


def patches(video: Tensor) -> Tensor:
    """(n, tokens, PATCH_SIZE)."""
    x = video.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH))  # n, frame, channel, down, in patch, across, in patch
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)


def unpatched(tokens: Tensor) -> Tensor:
    """The video that `patches` made them of."""
    x = tokens.unflatten(1, GRID).unflatten(4, (CHANNELS, PATCH, PATCH))
    return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_steps: int) -> None:
        super().__init__()
        self.heads = width // HEAD_DIM
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm_q, self.norm_k = nn.RMSNorm(HEAD_DIM), nn.RMSNorm(HEAD_DIM)
        self.attend = LiteAttention(num_steps=num_steps, stats_steps=num_steps)

    def forward(self, x: Tensor, rotary: Tensor, stream: str | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, HEAD_DIM)).unbind(2)
        q, k = (rotated(norm(y.float()), rotary).to(v.dtype) for norm, y in ((self.norm_q, q), (self.norm_k, k)))
        if stream is None:  # training: LiteAttention has no backward pass
            y = functional.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
        else:
            y = self.attend(q.contiguous(), k.contiguous(), v.contiguous(), stream=stream)
        return self.out(y.flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_steps: int) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_steps)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor, rotary: Tensor, stream: str | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate1 * self.attention(normal(x) * (1 + scale1) + shift1, rotary, stream)
        return x + gate2 * self.mlp(normal(x) * (1 + scale2) + shift2)


class VideoTransformer(nn.Module):
    """Predicts the velocity from noise to video at a time between 0 (noise) and 1."""

    def __init__(self, width: int, depth: int, num_steps: int) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(PATCH_SIZE, width), nn.Linear(width, PATCH_SIZE)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(CLASSES + 1, width)
        self.blocks = nn.ModuleList(Block(width, num_steps) for _ in range(depth))
        self.register_buffer("rotary", angles(), persistent=False)

    def forward(self, x: Tensor, time: Tensor, classes: Tensor, stream: str | None = None) -> Tensor:
        """x: (n, tokens, PATCH_SIZE). `stream` names the branch of guidance; None is for training."""
        frequencies = torch.exp(torch.linspace(0, math.log(1000), self.width // 2, device=x.device))
        waves = time[:, None] * frequencies
        condition = functional.silu(self.time(torch.cat([waves.sin(), waves.cos()], -1)) + self.classes(classes))
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, condition, self.rotary, stream)
        return self.leave(normal(x))


def normal(x: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:])


def angles() -> Tensor:
    """Of the rotary embedding in three axes (RoPE, arXiv 2104.09864): (tokens, HEAD_DIM / 2)."""
    places = torch.meshgrid(*(torch.arange(n) for n in GRID), indexing="ij")
    turns = [place.flatten()[:, None] * 100 ** -torch.linspace(0, 1, n) for place, n in zip(places, TURNS, strict=True)]
    return torch.cat(turns, -1)


def rotated(x: Tensor, rotary: Tensor) -> Tensor:
    """x: (n, tokens, heads, HEAD_DIM)."""
    cos, sin = rotary.cos()[:, None], rotary.sin()[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def train(model: VideoTransformer, steps: int, batch: int, rate: float) -> float:
    """The mean loss of the last tenth."""
    device = model.rotary.device
    generator = torch.Generator(device).manual_seed(0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in track(range(steps), "training"):
        classes = torch.randint(CLASSES, (batch,), generator=generator, device=device)
        target = patches(videos(classes, generator))
        classes = classes.where(torch.rand(batch, generator=generator, device=device) > 0.1, NO_CLASS)
        noise = torch.randn(target.shape, generator=generator, device=device)
        time = torch.randn(batch, generator=generator, device=device).sigmoid()
        mixed = noise.lerp(target, time[:, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(mixed, time, classes)
        loss = functional.mse_loss(predicted.float(), target - noise)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.detach())
    last = max(1, steps // 10)
    return torch.stack(losses[-last:]).mean().item()


@torch.inference_mode()
def sample(model: VideoTransformer, classes: Tensor, steps: int, guidance: float) -> Tensor:
    device = classes.device
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(len(classes), math.prod(GRID), PATCH_SIZE, generator=generator, device=device)
    branches = {"cond": classes, "uncond": torch.full_like(classes, NO_CLASS)}
    for step in range(steps):
        time = torch.full((len(classes),), step / steps, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = {name: model(x, time, each, name).float() for name, each in branches.items()}
        x = x + (velocity["uncond"] + guidance * (velocity["cond"] - velocity["uncond"])) / steps
    return unpatched(x)


def draw_frames(rows: dict[str, Tensor], shown: int = 8) -> Figure:
    """A row of frames for each video."""
    figure = Figure(figsize=(1.2 * shown, 1.3 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), shown, squeeze=False)
    for row, (name, video) in enumerate(rows.items()):
        for column, frame in enumerate(torch.linspace(0, FRAMES - 1, shown).long().tolist()):
            axes = panels[row, column]
            axes.imshow(((video[frame] + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            axes.set(xticks=[], yticks=[])
        panels[row, 0].set_ylabel(name, fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("moving-shapes"), help="folder for pictures and numbers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--width", type=int, default=384, help="of the model, a multiple of 128")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--train-steps", type=int, default=880)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--steps", type=int, default=50, help="of denoising")
    parser.add_argument(
        "--thresholds", type=float, nargs="+", default=[-10.0, -8.0, -6.0, -4.0, -2.0], help="in log2 units"
    )
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = VideoTransformer(options.width, options.depth, options.steps).to(options.device)
    loss = train(model, options.train_steps, options.batch, 1e-3)
    layers = [block.attention.attend for block in model.blocks]
    classes = torch.tensor([0, 6], device=options.device)
    for layer in layers:
        layer.enable_skip_optimization(False)
    dense = sample(model, classes, options.steps, options.guidance)

    options.out.mkdir(parents=True, exist_ok=True)
    rows, numbers = {"dense": dense[1]}, {"loss": loss, "thresholds": {}}
    for threshold in options.thresholds:
        for layer in layers:
            layer.enable_skip_optimization(True)
            layer.reset_skip_state()
            layer.set_threshold(threshold)
        lite = sample(model, classes, options.steps, options.guidance)
        stats = collect_stats(model)
        sparsity = sum(x.mean for streams in stats.values() for x in streams.values()) / (2 * len(layers))
        error = ((lite - dense).norm() / dense.norm()).item()
        numbers["thresholds"][threshold] = {
            "relative error of the videos": error,
            "sparsity, mean over steps": sparsity,
        }
        rows[f"{threshold:g}: {sparsity:.0%}"] = lite[1]
        plot.draw_sparsity(stats).savefig(options.out / f"sparsity{threshold:g}.png", dpi=100)
        for number, layer in enumerate(layers):
            picture = plot.draw_list(layer.skip_list("cond"), entry=1)
            picture.savefig(options.out / f"skip-map{threshold:g}-layer-{number}.png", dpi=100)
    draw_frames(rows).savefig(options.out / "frames.png", dpi=100)
    (options.out / "numbers.json").write_text(json.dumps(numbers, indent=1))
    print(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
