"""A model and its tokenizer out of a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lite_attention.quality.decoder import NAME


def load(directory: Path, device: torch.device, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model as `Decoder` takes it. `dtype` is "auto", as the directory says, or the name of one of torch's."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=chosen, attn_implementation=NAME)
    return model.eval().to(device), tokenizer


def described(model: PreTrainedModel, directory: Path) -> dict[str, str]:
    config = model.config
    return {
        "model": directory.resolve().name,
        "architecture": ", ".join(config.architectures or [type(model).__name__]),
        "layers": str(config.num_hidden_layers),
        "heads": f"{config.num_attention_heads}, of keys {config.num_key_value_heads}",
        "positions": str(config.max_position_embeddings),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
