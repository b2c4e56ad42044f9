"""An eps for each layer: the choice on costs that are known, and on a small model from texts to the file."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from quality_models import LAYERS, VOCABULARY, write_model, write_text
from safetensors.torch import load_file, save_file

from lite_attention.cli import main
from lite_attention.layer_eps import LayerEps, read_layer_eps
from lite_attention.pages import decode_pages
from lite_attention.quality import command
from lite_attention.quality import decoder as decoding
from lite_attention.quality.budgets import Rung, choose, default_budget, dense_rung, over_share
from lite_attention.quality.calibrate import Calibration, Together, calibrate
from lite_attention.quality.decoder import Decoder
from lite_attention.quality.load import load
from lite_attention.quality.loss import measure_loss
from lite_attention.quality.setting import DENSE, Setting
from lite_attention.quality.tally import Tally

TARGET = 0.4
BUDGET = 0.2
HARMFUL = 0  # the layer that the model's output depends on


def ladder(*costs, reads=(0.2, 0.4, 0.6)):
    """Rungs at 0.1, 0.05 and so on, each with what it costs every text, and dense below them."""
    rungs = [Rung(0.1 / 2**n, cost, (0.0,) * len(cost), reads[n], 0.05) for n, cost in enumerate(costs)]
    return [*rungs, dense_rung(len(costs[0]))]


def chosen(ladders, budget):
    return {layer: rung.eps for layer, rung in choose(ladders, budget).items()}


def test_layers_that_cost_little_keep_the_target():
    ladders = {0: ladder((0.003,), (0.001,)), 1: ladder((0.007,), (0.001,))}
    assert chosen(ladders, 0.01) == {0: 0.1, 1: 0.1}
    assert over_share({layer: rungs[0] for layer, rungs in ladders.items()}, 0.01) == []


def test_the_layer_goes_down_that_saves_most_for_each_byte():
    ladders = {0: ladder((0.004,), (0.001,)), 1: ladder((0.03,), (0.003,)), 2: ladder((0.001,), (0.0,))}
    assert chosen(ladders, 0.01) == {0: 0.1, 1: 0.05, 2: 0.1}
    assert chosen(ladders, 0.006) == {0: 0.05, 1: 0.05, 2: 0.1}
    assert over_share({layer: rungs[0] for layer, rungs in ladders.items()}, 0.01) == [0, 1]
    # Where the same costs a quarter of the bytes, it is the other layer's turn.
    cheap = {0: ladder((0.01,), (0.001,)), 1: ladder((0.012,), (0.001,), reads=(0.2, 1.0))}
    assert chosen(cheap, 0.014) == {0: 0.05, 1: 0.1}


def test_a_smaller_eps_that_saves_nothing_is_passed_over():
    """As of layer 18 of SmolLM2, whose loss any list makes."""
    assert chosen({0: ladder((0.03,), (0.031,), (0.029,)), 1: ladder((0.002,))}, 0.01) == {0: 0.0, 1: 0.1}


def test_a_layer_goes_back_up_that_a_later_step_made_needless():
    ladders = {0: ladder((0.004,), (0.0,), reads=(0.2, 0.25)), 1: ladder((0.02,))}
    assert chosen(ladders, 0.01) == {0: 0.1, 1: 0.0}


def test_each_text_is_within_the_budget_and_chance_gives_no_credit():
    ladders = {0: ladder((0.008, 0.001), (0.002, 0.0)), 1: ladder((0.001, 0.02), (-0.005, 0.003))}
    assert chosen(ladders, 0.0095) == {0: 0.1, 1: 0.05}
    assert chosen(ladders, 0.005) == {0: 0.05, 1: 0.05}
    assert chosen({0: ladder((-0.02, 0.0)), 1: ladder((0.011, 0.0))}, 0.01) == {0: 0.1, 1: 0.0}


def test_a_budget_that_no_rung_keeps():
    with pytest.raises(ValueError, match=r"budget: got 0\.001; needs at least 0\.002, what the smallest eps cost"):
        choose({0: ladder((0.02,), (0.002,))[:-1]}, 0.001)


def test_the_budget_follows_the_target():
    assert [default_budget(eps) for eps in (0.02, 0.05, 0.1)] == pytest.approx([0.0025, 0.0053125, 0.01])
    assert 0 < default_budget(1e-6) < 0.001


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers all leave out much, but only of one does the output depend on attention."""
    folder = write_model(tmp_path_factory.mktemp("small"))
    weights = load_file(folder / "model.safetensors")
    for layer in set(range(LAYERS)) - {HARMFUL}:
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"] *= 0.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


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


def test_the_layer_that_the_output_depends_on_gets_a_smaller_eps(model):
    texts = [(name, tokens_of(300, seed)) for seed, name in enumerate(("code", "prose"))]
    setting, said = Setting(TARGET, newest=16), []
    result = calibrate(Decoder(model, 1, 300), "small", texts, 24, setting, BUDGET, said.append)
    found = result.found
    assert (found.target, found.texts, found.context, found.positions) == (TARGET, ("code", "prose"), 300, 24)
    assert 0 < found.eps[HARMFUL] < TARGET / 3 and found.eps[1] == found.eps[2] == TARGET
    # By the mass that is left out there would be nothing to choose between.
    left_out = [rung.left_out for rung in result.at_target.values()]
    assert min(left_out) > 0.8 * max(left_out) > 0.1
    for one in result.together:
        assert one.alone <= BUDGET < one.at_target
        assert one.divergence <= BUDGET and one.divergence == pytest.approx(one.alone, rel=0.2, abs=1e-3)
        assert one.rounding < 1e-6 and one.read_at_target < one.read < 1
    assert not result.over
    assert "calibration, code: prefill" in said and f"calibration, prose: layer {HARMFUL}, eps 0.1, 0.025" in said
    assert not any("layer 1, eps 0.1" in each for each in said)  # its share is enough


def test_a_layer_alone_is_what_the_loss_says_with_all_others_dense(model):
    tokens, others = tokens_of(300), tuple(layer for layer in range(LAYERS) if layer != HARMFUL)
    decoder = Decoder(model, 1, 300)
    result = calibrate(decoder, "small", [("code", tokens)], 24, Setting(TARGET, newest=16), BUDGET)
    eps = result.chosen[HARMFUL].eps
    assert 0 < eps < TARGET
    settings = [Setting(each, 16, others) for each in (TARGET, eps)] + [Setting(TARGET, 16)]
    *alone, together = measure_loss(decoder, "code", tokens, 24, settings)
    for rung, loss in zip((result.at_target[HARMFUL], result.chosen[HARMFUL]), alone, strict=True):
        assert rung.divergence[0] == pytest.approx(loss.divergence, rel=1e-4)
        assert rung.read == loss.layers[HARMFUL].bytes and rung.left_out == loss.layers[HARMFUL].left_out
        assert 0 < rung.error[0] < rung.divergence[0]
    assert result.together[0].at_target == pytest.approx(together.divergence, rel=1e-4)


def test_dense_layers_stay_dense_and_a_large_budget_changes_nothing(model):
    texts, setting = [("code", tokens_of(300))], Setting(TARGET, newest=16, dense_layers=(-2,))
    result = calibrate(Decoder(model, 1, 300), "small", texts, 24, setting, 10.0)
    assert result.found.eps == {0: TARGET, 2: TARGET} and result.chosen == result.at_target
    assert result.together[0].divergence == result.together[0].at_target
    with pytest.raises(ValueError, match="no layer that decodes from lists"):
        calibrate(Decoder(model, 1, 300), "small", texts, 24, Setting(TARGET, dense_layers=(0, 1, 2)), 1.0)


class Known:
    """A model of two layers and one position that says how far apart it is from dense attention, by layer and eps.

    Rounding makes 0.004 in one layer or in both.
    """

    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2))
    sketch_bits = 12
    truncate = prefill = lambda *args: None

    def __init__(self):
        self.settings = []

    def decode(self, rows, tokens, setting, tally):
        self.settings.append(setting)
        if setting == DENSE:
            return torch.zeros(1, 1, 2)
        lists = [layer for layer in (0, 1) if setting.lists(layer, 2)]
        eps = {layer: setting.eps_of(layer, 2) for layer in lists}
        for layer in (0, 1):
            tally._add(layer, torch.tensor([1 - eps.get(layer, 0), 1, 0, 0, 0, 0, 1], dtype=torch.float64))
        apart = 0.004 + sum((1, 0.1)[layer] * each for layer, each in eps.items())
        p = torch.sigmoid(torch.tensor(known_logit(apart)))
        return torch.stack([p, 1 - p]).log()[None, None]


def known_logit(apart):
    """Of a distribution over two tokens that is this far from an even one: -(log 4p(1-p)) / 2 = apart."""
    rest = math.sqrt(1 - math.exp(-2 * apart))
    return math.log((1 + rest) / (1 - rest))


def test_rounding_is_not_counted_for_each_layer():
    known = Known()
    result = calibrate(known, "known", [("a", torch.zeros(3, dtype=torch.long))], 1, Setting(0.16), 0.03)
    assert result.at_target[0].divergence == pytest.approx((0.16,), abs=1e-5)
    assert result.at_target[1].divergence == pytest.approx((0.016,), abs=1e-5)
    assert result.found.eps == {0: 0.01, 1: 0.16}
    (one,) = result.together
    assert one.rounding == pytest.approx(0.004, abs=1e-5) and one.alone == pytest.approx(0.026, abs=1e-5)
    assert one.divergence == pytest.approx(0.03, abs=1e-5) and not result.over
    assert known.settings.count(Setting(0.0, dense_layers=(1,))) == 1

    known = Known()  # with a budget beside which rounding is nothing, it is measured once
    calibrate(known, "known", [("a", torch.zeros(3, dtype=torch.long))], 1, Setting(0.9), 0.99)
    assert [each for each in known.settings if each.eps == 0] == [Setting(0.0)]


def test_the_command_writes_the_file_and_compares(folder, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt", 500)
    common = ["--device", "cpu", "--context", "300", "--positions", "20", "--newest", "16", "--only", "loss"]
    run = ["quality", str(folder), str(text), *common, "--eps", str(TARGET), "--out", str(tmp_path / "out")]
    path = tmp_path / "layers.toml"
    assert main([*run, "--calibrate", str(path), "--calibrate-kl", str(BUDGET)]) == 0
    found, shown = read_layer_eps(path), capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    own = [list(each) for each in found.eps.items()]
    assert list(found.eps) == list(range(LAYERS)) and found.model == folder.name and found.context == 300
    assert [one["setting"]["layer_eps"] for one in data["loss"]] == [[], own]
    # What the calibration says of all layers together is what the loss says.
    (together,) = data["calibration"]["together"]
    plain, by_layer = data["loss"]
    assert together["at_target"] == pytest.approx(plain["divergence"], rel=1e-6)
    assert together["divergence"] == pytest.approx(by_layer["divergence"], rel=1e-6)
    assert together["divergence"] <= BUDGET == data["calibration"]["budget"] < together["at_target"]
    assert together["read"] == by_layer["read"]["bytes"] > plain["read"]["bytes"] == together["read_at_target"]
    assert f"# All layers together, 'text.txt': KL {together['divergence']:.4f}" in path.read_text()
    for layer, eps in found.eps.items():
        rung = data["calibration"]["chosen"][str(layer)]
        assert f"{layer} = {{ eps = {eps} }}  # KL {rung['divergence'][0]:.5f}" in path.read_text()
        assert f"| {layer} | {eps:.4g} | " in (tmp_path / "out" / "README.md").read_text()
    assert "eps 0.4, by layer" in shown and "KL at the target" in shown and "Warning" not in shown

    assert main([*run, "--layer-eps", str(path)]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["calibration"] is None and again["loss"] == data["loss"]

    with pytest.raises(SystemExit, match=r"--layer-eps: got '.*layers\.toml', made with sketch_bits 12, where .* is 8"):
        main([*run, "--layer-eps", str(path), "--sketch-bits", "8"])
    assert main([*run, "--calibrate", str(path), "--calibrate-kl", "9", "--sketch-bits", "8"]) == 0
    assert read_layer_eps(path).sketch_bits == 8


def test_a_budget_that_is_missed_together_and_layers_without_lists_are_said():
    rungs = {0: Rung(0.1, (0.01,), (0.0,), 0.2, 0.1), 1: dense_rung(1)}
    found = LayerEps("m", 0.1, ("a",), 300, 20, {layer: rung.eps for layer, rung in rungs.items()})
    for divergence, missed in ((0.02, True), (0.0135, False)):
        together = Together("a", 0.002, 0.05, 0.2, 0.01, divergence, 0.001, 0.6)
        calibration = Calibration(found, 0.01, rungs, rungs, (together,))
        *warning, last = command._advice(calibration)
        assert bool(warning) == missed and last.startswith("Layers 1 have an eps of 0.")
        assert not missed or "more than 0.01 nats a token in a." in warning[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate", "{}/a.toml", "--eps", "0.1,0.2"], "--eps: got 0.1,0.2; needs one number above 0"),
        (["--calibrate", "{}/a.toml", "--eps", "0"], "--eps: got 0; needs one number above 0"),
        (["--calibrate", "{}/no/a.toml", "--eps", "0.1"], "no/a.toml; needs the path of a file, in a folder that"),
        (["--calibrate-kl", "0.01"], "--calibrate-kl: got no --calibrate with it"),
        (["--layer-eps", "{}/no.toml"], "no.toml': No such file"),
    ],
)
def test_what_the_command_refuses(arguments, words, folder, tmp_path):
    text = write_text(tmp_path / "text.txt", 500)
    given = [each.format(tmp_path) for each in arguments]
    with pytest.raises(SystemExit) as stopped:
        main(["quality", str(folder), str(text), "--device", "cpu", "--context", "300", "--lengths", "200", *given])
    assert words in str(stopped.value)
