"""Trains examples/moving_shapes.py's model at some sizes, samples at thresholds; what it needs to choose a picture."""
import json, sys, time
from pathlib import Path

import numpy as np
import torch

began = time.monotonic()
import moving_shapes as m
from lite_attention import collect_stats, plot

out = Path(sys.argv[1])
END = 143.0  # seconds of this process
STEPS, GUIDANCE = 50, 2.0
THRESHOLDS = (-10.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0)


def left():
    return END - (time.monotonic() - began)


def set_size(model, frames, side):
    m.FRAMES, m.SIDE = frames, side
    m.GRID = (frames, side // m.PATCH, side // m.PATCH)
    if model is not None:
        model.rotary = m.angles().to(model.rotary.device)


def run(name, frames, side, batch, steps):
    set_size(None, frames, side)
    torch.manual_seed(0)
    model = m.VideoTransformer(384, 6, STEPS).to("cuda")
    t = time.monotonic()
    loss = m.train(model, steps, batch, 1e-3)
    print(f"{name}: {steps} steps in {time.monotonic() - t:.1f} s, loss {loss:.5f}, left {left():.0f} s", flush=True)
    found = {"loss": loss, "train steps": steps, "train seconds": time.monotonic() - t}
    evaluate(model, name, found, THRESHOLDS)
    # The same weights at other sizes: rotary angles let it; what it makes of them is to be seen.
    for other, f, s in (("longer", 2 * frames, side), ("larger", frames, side * 3 // 2)):
        if left() > 25:
            set_size(model, f, s)
            found[other] = {"size": [f, s]}
            evaluate(model, f"{name}-{other}", found[other], (-10.0, -6.0, -3.0))
            set_size(model, frames, side)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1))


def evaluate(model, name, found, thresholds):
    layers = [block.attention.attend for block in model.blocks]
    classes = torch.tensor([0, 6], device="cuda")
    for layer in layers:
        layer.enable_skip_optimization(False)
    dense = m.sample(model, classes, STEPS, GUIDANCE)
    rows, saved = {"dense": dense[1]}, {"dense": dense.half().cpu().numpy()}
    for threshold in thresholds:
        if left() < 6:
            print("no time for", name, threshold)
            break
        t = time.monotonic()
        for layer in layers:
            layer.enable_skip_optimization(True)
            layer.reset_skip_state()
            layer.set_threshold(threshold)
        lite = m.sample(model, classes, STEPS, GUIDANCE)
        stats = collect_stats(model)
        error = ((lite - dense).norm() / dense.norm()).item()
        sparsity = sum(x.mean for streams in stats.values() for x in streams.values()) / (2 * len(layers))
        # at the last step, by layer and head
        now = [[round(x, 3) for x in layer.stats()["cond"].now.tolist()] for layer in layers]
        found[f"{threshold:g}"] = {"error": error, "sparsity": sparsity, "now": now}
        print(f"{name} {threshold:g}: skipped {sparsity:.3f}, error {error:.4f}, {time.monotonic() - t:.1f} s; at the end {now}", flush=True)
        rows[f"{threshold:g}: {sparsity:.0%}"] = lite[1]
        for number, layer in enumerate(layers):
            one = layer.skip_list("cond")
            saved[f"bits{threshold:g}-{number}"] = one.bits.cpu().numpy()
            saved[f"steps{threshold:g}-{number}"] = layer.stats()["cond"].sparsity.numpy().astype(np.float16)
        saved["geometry"] = np.array([one.block_m, one.block_n, one.max_seqlen_q, one.max_seqlen_k, one.kv_tiles])
        saved[f"video{threshold:g}"] = lite.half().cpu().numpy()
        if threshold in (-6.0, -3.0):
            for number in (1, 3, 5):
                plot.draw_list(layers[number].skip_list("cond"), entry=1).savefig(out / f"{name}{threshold:g}-layer-{number}.png", dpi=80)
            plot.draw_sparsity(stats).savefig(out / f"{name}{threshold:g}-sparsity.png", dpi=80)
    np.savez_compressed(out / f"{name}.npz", **saved)
    m.draw_frames(rows).savefig(out / f"{name}-frames.png", dpi=80)


torch.zeros(1, device="cuda")
print(f"start {time.monotonic() - began:.1f} s")
scale = float(sys.argv[2]) if len(sys.argv) > 2 else 1
run("8x64", 8, 64, 6, int(880 * scale))
run("12x48", 12, 48, 8, int(700 * scale))
