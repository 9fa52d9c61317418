"""Tiny bases with a tokenizer of 96 words, and texts in those words, for the tests of adapters."""

import shutil
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import bitfold
from bitfold.runtime.frozen import FrozenLinear
from models_zoo import TOKENS, build

__all__ = ["TOKENS", "artifact_of", "base", "frozen_of", "logits", "write_text"]

OPTIONS = {"sequence_length": 12, "batch": 2, "precision": "float32"}
"""Of a training that takes a second."""


def base(directory: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """An original with a tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    found = Path(shutil.copytree(build(family, dtype, directory / "made"), directory / family))
    words = {f"w{number}": number for number in range(96)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(found)
    return found


def artifact_of(original: Path, scheme: str = "w4a16g32") -> Path:
    """An artifact by rounding to nearest."""
    tokens = original.parent / "tokens.npy"
    np.save(tokens, np.random.default_rng(0).integers(0, 96, (8, 24)))
    out = original.parent / f"{original.name}-{scheme}"
    bitfold.quantize(original, out, method="rtn", scheme=scheme, calibration=tokens)
    return out


def write_text(file: Path, words: int = 400, seed: int = 0) -> Path:
    """A text of few words, which soon is learned."""
    chosen = np.random.default_rng(seed).integers(1, 6, words)
    file.write_text(" ".join(f"w{number}" for number in chosen))
    return file


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Of TOKENS."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def frozen_of(model: torch.nn.Module) -> dict[str, FrozenLinear]:
    """The packed layers, by name."""
    return {
        name.replace(".base_layer", ""): module
        for name, module in model.named_modules()
        if isinstance(module, FrozenLinear)
    }
