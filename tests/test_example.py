"""The example: its videos, and a run of it that is too short to learn anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.append(str(Path(__file__).parents[1] / "examples"))

import moving_shapes


def test_patches_are_the_video():
    video = moving_shapes.videos(torch.arange(moving_shapes.CLASSES), torch.Generator().manual_seed(0))
    assert -1 <= video.min() < -0.9 and 0 < video.max() <= 1
    assert torch.equal(moving_shapes.unpatched(moving_shapes.patches(video)), video)
    moved = (video[:, 1:] - video[:, :-1]).abs().amax((1, 2, 3, 4))
    assert (moved > 0.1).all()


def test_it_samples_with_lists_what_it_samples_densely(monkeypatch, tmp_path):
    small = ["--device", "cpu", "--depth", "1", "--width", "128", "--train-steps", "2", "--batch", "1", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["moving_shapes.py", *small, "--thresholds", "-10", "--out", str(tmp_path)])
    moving_shapes.main()
    found = json.loads((tmp_path / "numbers.json").read_text())["thresholds"]["-10.0"]
    assert found["relative error of the videos"] < 0.01
    assert {"frames.png", "sparsity-10.png", "skip-map-10-layer-0.png"} <= {each.name for each in tmp_path.iterdir()}
