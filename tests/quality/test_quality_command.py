"""The command, from a model's directory and texts to the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from matplotlib import image
from quality_models import HEAD_DIM, LAYERS, write_model, write_text

from lite_attention.cli import main
from lite_attention.pages import sketch_bytes
from lite_attention.quality import command, decoder, measure


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / name, 700, seed) for seed, name in enumerate(("code.py", "prose|1.txt"))]


def quality(folder, texts, out, *arguments):
    return main(["quality", str(folder), *map(str, texts), "--device", "cpu", "--out", str(out), *arguments])


def test_a_run_writes_numbers_tables_and_a_picture(folder, texts, tmp_path, capsys):
    small = ("--context", "400", "--cases", "3", "--prompts", "4", "--tokens", "6", "--lengths", "300")
    status = quality(folder, texts, tmp_path, *small, "--eps", "0,0.3", "--newest", "16", "--commit", "c0ffee")
    data = json.loads((tmp_path / "results.json").read_text())
    assert status == 0 and data["environment"]["commit"] == "c0ffee" and "transformers" in data["environment"]
    assert data["model"]["architecture"] == "LlamaForCausalLM" and data["model"]["heads"] == "4, of keys 2"

    loss = {(one["text"], one["setting"]["eps"]): one for one in data["loss"]}
    assert set(loss) == {(name, eps) for name in ("code.py", "prose|1.txt") for eps in (0.0, 0.3)}
    for one in loss.values():
        read = one["read"]
        assert one["context"] == 400 and one["positions"] == 100 and len(one["layers"]) == LAYERS
        assert read["bytes"] == pytest.approx(read["pages"] + read["sketches"])
    assert all(loss[name, 0.0]["read"]["bytes"] == 1 > loss[name, 0.3]["read"]["bytes"] for name, _ in loss)

    found = [(one["kind"], one["context"], one["setting"]["eps"], one["cases"]) for one in data["retrieval"]]
    assert found == [(kind, 300, eps, 3) for kind in ("passkey", "multi-needle") for eps in (None, 0.0, 0.3)]
    assert [(one["setting"]["eps"], one["tokens"], len(one["agreed"])) for one in data["generation"]] == [
        (0.0, 6, 4),
        (0.3, 6, 4),
    ]
    shown, text = capsys.readouterr().out, (tmp_path / "README.md").read_text()
    for one in data["loss"]:
        for cell in (
            f"{one['perplexity']:.4f}",
            f"{one['change']:+.2%} ± {100 * one['change_error']:.2f}",
            f"{one['read']['bytes']:.3f}",
        ):
            assert cell in shown and f"| {cell} |" in text
    assert "prose\\|1.txt" in text and "c0ffee" in text and "(loss.png)" in text
    pixels = {tuple(round(255 * x) for x in pixel[:3]) for pixel in image.imread(tmp_path / "loss.png").reshape(-1, 4)}
    assert {(0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00)} <= pixels  # a line for each text


def test_all_parts_decode_from_sketches_of_the_bits_asked_for(folder, texts, tmp_path, monkeypatch, capsys):
    small = (
        "--context",
        "300",
        "--cases",
        "1",
        "--prompts",
        "1",
        "--tokens",
        "3",
        "--lengths",
        "300",
        "--newest",
        "16",
    )
    made, read = [], {}

    class Watched(decoder.PagedLayer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.sketch.shape[2])

    monkeypatch.setattr(decoder, "PagedLayer", Watched)
    for bits, size in ((12, sketch_bytes(HEAD_DIM, 12)), (8, sketch_bytes(HEAD_DIM, 8))):
        made.clear()
        assert quality(folder, texts[:1], tmp_path, *small, "--eps", "0.3", "--sketch-bits", str(bits)) == 0
        assert made == [size] * 4 * LAYERS  # of the loss, both kinds of retrieval, and generation
        data = json.loads((tmp_path / "results.json").read_text())
        assert data["sketch_bits"] == bits and f"| sketch_bits | {bits} |" in (tmp_path / "README.md").read_text()
        assert f"sketch_bits: {bits}" in capsys.readouterr().out
        read[bits] = data["loss"][0]["read"]
    assert read[8]["sketches"] / read[12]["sketches"] == pytest.approx(made[0] / sketch_bytes(HEAD_DIM))
    assert read[8]["left_out_estimate"] != read[12]["left_out_estimate"]


def test_a_part_alone_and_what_a_stopped_run_leaves(folder, texts, tmp_path, monkeypatch):
    assert quality(folder, texts[:1], tmp_path, "--only", "loss", "--context", "200", "--eps", "0.3") == 0
    assert (tmp_path / "loss.png").exists()

    def broken(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(measure, "measure_agreement", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        quality(folder, texts[:1], tmp_path, "--only", "loss,generation", "--context", "300", "--eps", "0.2")
    data = json.loads((tmp_path / "results.json").read_text())
    assert [(one["context"], one["setting"]["eps"]) for one in data["loss"]] == [(300, 0.2)]
    assert not data["generation"]


def test_an_interrupt_leaves_a_report_of_what_was_measured(folder, texts, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_retrieval", interrupted)
    small = ("--context", "200", "--eps", "0.3", "--lengths", "300", "--tokens", "5")
    assert quality(folder, texts[:1], tmp_path, *small) == 130
    assert "| eps 0.3 |" in (tmp_path / "README.md").read_text() and (tmp_path / "loss.png").exists()
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--context", "4097"], "--context: got 4097; needs at most 6"),
        (["--context", "500", "--lengths", "400,2000"], "--lengths: got 2000; needs at most 6"),
        (["--context", "500", "--positions", "499"], "--positions: got 499; needs at most 498"),
        (["--context", "500", "--tokens", "250"], "--tokens: got 250; needs less than 250"),
    ],
)
def test_lengths_that_do_not_fit(arguments, words, folder, texts, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        quality(folder, texts, tmp_path, *arguments)
    assert words in str(stopped.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--eps", "0.1,1"], "got '1'; needs numbers from 0, which lists everything, to below 1"),
        (["--only", "loss,speed"], "got 'speed'; needs some of loss, retrieval, generation"),
        (["--sketch-bits", "4"], "--sketch-bits: invalid choice: 4 (choose from 12, 8)"),
        (["--cases", "0"], "got '0'; needs a whole number of 1 or more"),
    ],
)
def test_wrong_arguments(arguments, words, folder, texts, tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality(folder, texts, tmp_path, *arguments)
    assert words in capsys.readouterr().err


def test_missing_files_are_named(folder, texts, tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere/config\.json: there is no such file"):
        quality(tmp_path / "nowhere", texts, tmp_path)
    with pytest.raises(SystemExit, match=r"gone\.txt: there is no such file"):
        quality(folder, [tmp_path / "gone.txt"], tmp_path)


def test_without_the_extra_it_names_it(folder, texts, tmp_path, monkeypatch):
    find = command.importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name))
    with pytest.raises(SystemExit, match=r"rich, for .*: pip install 'lite-attention\[quality\]'"):
        quality(folder, texts, tmp_path)


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "lite_attention.quality", "model", "text", "--tokens", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "got 'x'; needs a whole number of 1 or more" in done.stderr
