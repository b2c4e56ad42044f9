"""The file of an eps for each layer, and the layers that a model has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lite_attention.layer_eps import LayerEps, check_bits, check_layers, read_layer_eps, write_layer_eps

FOUND = LayerEps('a "small" model', 0.1, ("code.txt", "näme\\.txt"), 8192, 2048, {0: 0.1, 3: 1e-05}, 8)


def write(path):
    write_layer_eps(FOUND, path, ["all: 0.003 in 'näme'"], {0: "KL 0", 3: "KL 0.002"})


def test_a_file_has_all_that_was_found_on_lines_to_read(tmp_path):
    path = tmp_path / "smol.toml"
    write(path)
    assert read_layer_eps(path) == FOUND
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# An eps for each layer") and lines[1] == "# all: 0.003 in 'näme'"
    assert {"target = 0.1", "context = 8192", "sketch_bits = 8"} <= set(lines)
    assert lines[lines.index("[layers]") + 1 :] == [
        "0 = { eps = 0.1 }  # KL 0",
        "3 = { eps = 1e-05 }  # KL 0.002",
    ]


def test_a_file_of_an_earlier_version_is_read(tmp_path):
    path = tmp_path / "earlier.toml"
    write(path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(" }", ", left_out = 0.0991 }").replace("sketch_bits = 8\n", ""), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert "left_out" in text and "sketch_bits" not in text
    assert read_layer_eps(path) == replace(FOUND, sketch_bits=12)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("eps = 1e-05", "eps = 1.0", "eps of layer 3 is 1.0, not a number from 0 to below 1"),
        ("eps = 1e-05", 'eps = "0.1"', "eps of layer 3 is '0.1', not a number"),
        ("target = 0.1", "", "'target' is missing"),
        ("sketch_bits = 8", "sketch_bits = 4", "sketch_bits is 4, not 12 or 8"),
        ("3 = {", "last = {", "invalid literal"),
        ("0 = { eps = 0.1 }  # KL 0\n3 = { eps = 1e-05 }", "", "there are no layers"),
        ("[layers]", "[layers", ""),
    ],
)
def test_a_file_that_is_not_one_is_refused_with_its_name(before, after, reason, tmp_path):
    path = tmp_path / "other.toml"
    write(path)
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^--layer-eps: got '.*other\.toml': .*needs a file that `python") as refused:
        read_layer_eps(path, "--layer-eps")
    assert reason in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"path: got '.*none\.toml': No such file or directory; needs a file"):
        read_layer_eps(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("layer_eps", "dense_layers", "message"),
    [
        ([4], [], "layer_eps: got 4; needs -4 to 3, the model's layers"),
        ([0], [-5], "dense_layers: got -5; needs -4 to 3, the model's layers"),
        ([0, -1], [1, 3], "layer_eps and dense_layers: got -1 and 3, which are one layer; needs it in one of them"),
        ([2, -2], [], "layer_eps: got 2 and -2, which are one layer; needs it once"),
    ],
)
def test_layers_that_a_model_has_not_or_that_are_named_twice(layer_eps, dense_layers, message):
    with pytest.raises(ValueError, match=message):
        check_layers(layer_eps, dense_layers, 4)


def test_layers_that_a_model_has():
    check_layers([0, -1], [1, -2], 4)


def test_an_eps_is_for_the_sketches_that_it_was_found_with():
    check_bits(FOUND, 8, "smol.toml", "layer_eps")
    words = (
        r"layer_eps: got 'smol.toml', made with sketch_bits 8, where sketch_bits is 12; needs sketch_bits 8, or a file"
    )
    with pytest.raises(ValueError, match=words):
        check_bits(FOUND, 12, "smol.toml", "layer_eps")
