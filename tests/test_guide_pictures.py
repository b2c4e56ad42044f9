"""The pictures and the table of the guide to decoding from lists, from committed results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

image = pytest.importorskip("matplotlib.image")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from guide_pictures import draw_quality, draw_speed, points, speeds, table  # noqa: E402


def test_the_guides_table_is_that_of_the_results():
    assert table() in (ROOT / "docs/decode-pages.md").read_text()


def test_a_text_measured_with_one_eps_in_two_files_counts_once():
    names = ("held-out/0.02-held", "held-out/0.02-kl-0.001-held")
    settings = [point.setting for point in points(names)]
    assert {setting: settings.count(setting) for setting in settings} == {
        "0.02": 9,
        "0.02, by layer": 9,
        "0.02, by layer, KL 0.001": 9,
    }


def test_times_faster_are_of_the_peers_time():
    found = {label: times for label, _, times in speeds()}
    assert round(found["64 x 4k tokens, below min_context"], 2) == 0.99


@pytest.mark.parametrize("draw", [draw_quality, draw_speed])
def test_pictures_are_drawn(tmp_path, draw):
    path = tmp_path / "picture.png"
    draw(path)
    assert image.imread(path).std() > 0
    assert path.stat().st_size < 150_000
