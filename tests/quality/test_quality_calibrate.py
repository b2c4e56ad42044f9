"""An eps for each layer: the choice on curves that are known, and on a small model from texts to the file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from quality_models import LAYERS, VOCABULARY, write_model, write_text

from lite_attention.cli import main
from lite_attention.layer_eps import read_layer_eps
from lite_attention.pages import decode_pages
from lite_attention.quality import calibrate as calibration
from lite_attention.quality import decoder as decoding
from lite_attention.quality.budgets import choose
from lite_attention.quality.calibrate import DIVISORS, calibrate
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.load import load
from lite_attention.quality.setting import Setting
from lite_attention.quality.tally import Tally

TARGET = 0.4


def curve(*left_out, target=0.1):
    """What is left out at the target, at a half of it, and so on."""
    return {target / 2**n: each for n, each in enumerate(left_out)}


def test_a_layer_within_the_target_keeps_it():
    assert choose(curve(0.1, 0.2, 0.3), 0.1) == 0.1


def test_between_two_that_were_measured():
    """A quarter of the way in mass is a quarter of the way in logarithms, rounded down."""
    assert choose(curve(0.24, 0.16, 0.08, 0.01), 0.1) == pytest.approx(0.025 * 2**0.25, rel=1e-3)
    assert choose(curve(0.24, 0.16, 0.08, 0.01), 0.1) <= 0.025 * 2**0.25
    assert choose(curve(0.24, 0.1), 0.1) == 0.05
    assert choose(curve(0.2, 0.0), 0.1) == pytest.approx(0.05 * 2**0.5, rel=1e-3)


def test_what_is_chosen_leaves_out_no_more_where_mass_goes_as_a_power_of_eps():
    for power in (0.3, 0.7, 1.0):
        mass = {0.1 / divisor: 0.25 * divisor**-power for divisor in DIVISORS}
        chosen = choose(mass, 0.1)
        assert 0.85 * 0.1 < 0.25 * (chosen / 0.1) ** power <= 0.1


def test_of_a_curve_that_is_not_monotone_the_largest_counts():
    assert choose(curve(0.2, 0.08, 0.3, 0.01), 0.1) == pytest.approx(0.05 * 2 ** (0.02 / 0.12), rel=1e-3)


def test_a_target_that_is_never_reached():
    assert choose(curve(0.4, 0.3, 0.2), 0.1) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small"), sharp=4.0)


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, torch.device("cpu"), "auto")[0]


def tokens_of(n, seed=0):
    return torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed))


def test_each_layer_has_its_eps_and_no_other(model, monkeypatch):
    given = []

    def watched(*args, eps, **kwargs):
        given.append(eps)
        return decode_pages(*args, eps=eps, **kwargs)

    monkeypatch.setattr(decoding, "decode_pages", watched)
    decoder, tokens = Decoder(model, 1, 300), tokens_of(300)
    decoder.prefill(0, tokens[:290])
    tally = Tally(0.2)
    decoder.decode([0], tokens[None, 290:], Setting(0.2, newest=16, layer_eps=((0, 0.0), (-1, 0.05))), tally)
    assert given == [0.0, 0.2, 0.05]
    first, middle, last = tally.layers().values()
    assert (first.pages, first.sketches) == (1, 0) and first.left_out < 1e-4
    assert middle.pages < last.pages < 1 and middle.sketches == last.sketches > 0


def test_a_calibration_measures_and_chooses_for_each_layer(model):
    texts = [(name, tokens_of(300, seed)) for seed, name in enumerate(("code", "prose"))]
    setting, said = Setting(TARGET, newest=16, dense_layers=(1,)), []
    result = calibrate(Decoder(model, 1, 300), "small", texts, 24, setting, said.append)
    found = result.found
    assert (found.target, found.texts, found.context, found.positions) == (TARGET, ("code", "prose"), 300, 24)
    assert set(found.eps) == set(found.left_out) == set(result.before) == {0, LAYERS - 1}  # 1 is dense
    assert max(result.before.values()) > TARGET  # else there is nothing to calibrate
    for layer, eps in found.eps.items():
        assert found.left_out[layer] <= TARGET + 0.02 and TARGET / max(DIVISORS) <= eps <= TARGET
        assert eps == TARGET or found.left_out[layer] > 0.6 * TARGET  # no smaller than it must be
    assert not result.never
    assert len(said) == 2 * (1 + len(DIVISORS)) + 2 * 2 and "calibration, code: prefill" in said


def test_masses_are_averages_over_texts_and_layers_without_hope_are_named(monkeypatch):
    """A model that leaves out, by text, 0.1 and 0.3 in layer 0 whatever its eps, and twice its eps in layer 1."""

    class Known:
        model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2))
        text, truncate = -1, lambda *args: None

        def prefill(self, row, tokens):
            self.text += 1

        def decode(self, rows, tokens, setting, tally):
            for layer, left_out in ((0, (0.1, 0.3)[self.text % 2]), (1, 2 * setting.eps_of(1, 2))):
                tally._add(layer, torch.tensor([1, 1, 0, 0, left_out, 0, 1], dtype=torch.float64))
            return torch.zeros(1, 1, 1)

    texts = [(name, torch.zeros(9, dtype=torch.long)) for name in ("a", "b")]
    result = calibrate(Known(), "known", texts, 4, Setting(0.16))
    assert result.before == {0: 0.2, 1: 0.32}
    assert result.found.left_out == {0: 0.2, 1: 0.16}
    assert result.found.eps == {0: 0.16 / 32, 1: 0.08} and result.never == (0,)


def test_the_command_writes_the_file_and_compares(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "DIVISORS", (1, 4))
    text = write_text(tmp_path / "text.txt", 500)
    common = ["--device", "cpu", "--context", "300", "--positions", "20", "--newest", "16", "--only", "loss"]
    run = ["quality", str(folder), str(text), *common, "--eps", str(TARGET), "--out", str(tmp_path / "out")]
    path = tmp_path / "layers.toml"
    assert main([*run, "--calibrate", str(path)]) == 0
    found, shown = read_layer_eps(path), capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    own = [list(each) for each in found.eps.items()]
    assert list(found.eps) == list(range(LAYERS)) and found.model == folder.name and found.context == 300
    assert [one["setting"]["layer_eps"] for one in data["loss"]] == [[], own]
    plain, by_layer = (one["read"] for one in data["loss"])
    assert by_layer["left_out"] < plain["left_out"] and by_layer["bytes"] > plain["bytes"]
    for layer, eps in found.eps.items():
        one = data["loss"][1]["layers"][str(layer)]
        assert one["left_out"] == pytest.approx(found.left_out[layer], abs=1e-4)
        assert f"| {layer} | {eps:.4g} | " in (tmp_path / "out" / "README.md").read_text()
    assert "eps 0.4, by layer" in shown and "left out at the target" in shown

    assert main([*run, "--layer-eps", str(path)]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["calibration"] is None and again["loss"] == data["loss"]


def test_layers_that_never_reach_the_target_are_said(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "DIVISORS", (1, 1.01))
    text = write_text(tmp_path / "text.txt", 500)
    arguments = ["--device", "cpu", "--context", "300", "--positions", "20", "--newest", "16", "--only", "loss"]
    out = ["--out", str(tmp_path / "out"), "--calibrate", str(tmp_path / "layers.toml")]
    assert main(["quality", str(folder), str(text), *arguments, "--eps", str(TARGET), *out]) == 0
    assert "leave out more than 0.4 with every eps that was tried" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate", "{}/a.toml", "--eps", "0.1,0.2"], "--eps: got 0.1,0.2; needs one number above 0"),
        (["--calibrate", "{}/a.toml", "--eps", "0"], "--eps: got 0; needs one number above 0"),
        (["--calibrate", "{}/no/a.toml", "--eps", "0.1"], "no/a.toml; needs the path of a file, in a folder that"),
        (["--layer-eps", "{}/no.toml"], "no.toml': No such file"),
    ],
)
def test_what_the_command_refuses(arguments, words, folder, tmp_path):
    text = write_text(tmp_path / "text.txt", 500)
    given = [each.format(tmp_path) for each in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["quality", str(folder), str(text), "--device", "cpu", "--context", "300", "--lengths", "200", *given])
    assert words in str(stopped.value)
