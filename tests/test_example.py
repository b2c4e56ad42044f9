"""The example: its videos, and runs of it, the README's too, that are too short to learn anything."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import moving_shapes

ROOT = Path(__file__).parents[1]


def resize(monkeypatch, side):
    """Videos of other frames than the example's, which are large for a CPU."""
    patches = side // moving_shapes.PATCH
    monkeypatch.setattr(moving_shapes, "SIDE", side)
    monkeypatch.setattr(moving_shapes, "GRID", (moving_shapes.FRAMES, patches, patches))


def test_patches_are_the_video():
    video = moving_shapes.videos(torch.arange(moving_shapes.CLASSES), torch.Generator().manual_seed(0))
    assert -1 <= video.min() < -0.9 and 0 < video.max() <= 1
    assert torch.equal(moving_shapes.unpatched(moving_shapes.patches(video)), video)
    moved = (video[:, 1:] - video[:, :-1]).abs().amax((1, 2, 3, 4))
    assert (moved > 0.1).all()


def test_it_samples_with_lists_what_it_samples_densely(monkeypatch, tmp_path):
    resize(monkeypatch, 24)
    small = ["--device", "cpu", "--depth", "1", "--width", "128", "--train-steps", "2", "--batch", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["moving_shapes.py", *small, "--thresholds", "-10", "--out", str(tmp_path)])
    moving_shapes.main()
    found = json.loads((tmp_path / "numbers.json").read_text())["thresholds"]["-10.0"]
    assert found["relative error of the videos"] < 0.01
    assert {"frames.png", "sparsity-10.png", "skip-map-10-layer-0.png"} <= {each.name for each in tmp_path.iterdir()}


def test_ten_lines_of_the_readme_draw_a_skip_map(monkeypatch, tmp_path):
    section = (ROOT / "README.md").read_text().partition("### A diffusion model and its skip map\n")[2]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line]) <= 10
    smaller = {
        '"cuda"': '"cpu"',
        "width=384, depth=6": "width=128, depth=4",
        "steps=880": "steps=1",
        "batch=6": "batch=1",
        "=50": "=2",
    }
    for large, small in smaller.items():
        assert large in code
        code = code.replace(large, small)
    resize(monkeypatch, 16)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(code, "README.md", "exec"), found)
    assert found["video"].shape == (2, moving_shapes.FRAMES, moving_shapes.CHANNELS, 16, 16)
    layers = [block.attention.attend for block in found["model"].blocks]
    assert all(layer.threshold.eq(-6).all() and layer.streams == ("cond", "uncond") for layer in layers)
    assert layers[3].skip_list("cond").max_seqlen_q == math.prod(moving_shapes.GRID)
    assert (tmp_path / "skip-map.png").read_bytes().startswith(b"\x89PNG")
    picture = re.search(r"!\[[^]]*\]\((.*?)\)", section)[1]
    assert 0 < (ROOT / picture).stat().st_size < 200_000
