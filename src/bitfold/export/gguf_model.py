"""A model in llama.cpp's words: its architecture, the settings it reads, the names and the order of its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from bitfold.errors import ExportError, MissingExtraError
from bitfold.models.family import head_counts
from bitfold.numerics import QuantizedTensor

__all__ = [
    "DIALECTS",
    "GEMMA3_PATTERN",
    "ROPE_FACTORS",
    "Dialect",
    "dialect_of",
    "gguf_package",
    "has_factors",
    "llama3_factors",
    "row_order",
    "settings",
    "with_rows",
    "without_offset",
]


@dataclass(frozen=True)
class Dialect:
    """architecture: llama.cpp's name. interleaved: rotary pairs are adjacent there, half a head apart here, so that
    rows of queries and keys change places. norm_offset: what a norm's stored gain lacks to be the factor."""

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0


DIALECTS: Mapping[str, Dialect] = {
    "llama": Dialect("llama", interleaved=True),
    "mistral": Dialect("llama", interleaved=True),
    "qwen2": Dialect("qwen2"),
    "qwen3": Dialect("qwen3"),
    "gemma": Dialect("gemma", norm_offset=1.0),
    "gemma3_text": Dialect("gemma3", norm_offset=1.0),
}
GEMMA3_PATTERN = 6
"""Of Gemma 3's layers every so many one sees all tokens, the others a window."""
ROPE_FACTORS = "rope_freqs.weight"
"""llama.cpp's tensor of what each pair's angle is divided by, [head_dim / 2] float32: Llama 3's rotary embedding."""


def dialect_of(model_type: str) -> Dialect:
    """Raises ExportError for a family that llama.cpp, or bitfold's way to it, does not have."""
    try:
        return DIALECTS[model_type]
    except KeyError:
        known = ", ".join(DIALECTS)
        raise ExportError(
            f"GGUF is written for {known}, not for '{model_type}': use another --to, or another model."
        ) from None


def settings(config: PretrainedConfig, dialect: Dialect) -> dict[str, Any]:
    """What llama.cpp must know of a model, by key behind the architecture's name.

    Raises ExportError where llama.cpp would compute something else.
    """
    made: Any = config
    heads, kv_heads, head_dim = head_counts(config)
    result: dict[str, Any] = {
        "block_count": made.num_hidden_layers,
        "context_length": made.max_position_embeddings,
        "embedding_length": made.hidden_size,
        "feed_forward_length": made.intermediate_size,
        "vocab_size": made.vocab_size,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(made.rms_norm_eps),
        "rope.dimension_count": head_dim,
    }
    _check_activation(made, dialect)
    if dialect.architecture == "gemma3":
        return result | _gemma3(made, head_dim, dialect)
    window = getattr(made, "sliding_window", None)
    used = window and getattr(made, "use_sliding_window", True)
    if used and window < made.max_position_embeddings:
        result["context_length"] = window  # llama.cpp lets every layer see all: the same up to here
    return result | _rope(made.rope_parameters, dialect, made.max_position_embeddings)


def _check_activation(config: Any, dialect: Dialect) -> None:
    asked = getattr(config, "hidden_activation", None) or config.hidden_act
    expected = ("gelu_pytorch_tanh", "gelu") if dialect.norm_offset else ("silu", "swish")
    if asked not in expected:
        raise ExportError(
            f"llama.cpp computes {expected[0]} in this architecture, the model has {asked}: it cannot run there."
        )


def has_factors(config: Any) -> bool:
    """Whether a file has a tensor of factors for the rotary embedding, that of Llama 3."""
    return bool(config.rope_parameters.get("rope_type") == "llama3")


def _rope(parameters: Mapping[str, Any], dialect: Dialect, longest: int) -> dict[str, Any]:
    """Rotary embedding; that of Llama 3 has a tensor instead of settings."""
    kind = parameters.get("rope_type", "default")
    result: dict[str, Any] = {"rope.freq_base": float(parameters["rope_theta"])}
    known = {"linear": True, "yarn": not dialect.norm_offset, "llama3": dialect.interleaved}
    if kind in ("default", "llama3") and known.get(kind, True):
        return result
    if not known.get(kind):
        raise ExportError(
            f"The model's rotary embedding is of type '{kind}', and bitfold writes default and linear ones to GGUF, "
            "yarn but for Gemma, and llama3 for Llama and Mistral: use another --to."
        )
    result |= {"rope.scaling.type": kind, "rope.scaling.factor": float(parameters["factor"])}
    return result | (_yarn(parameters, longest) if kind == "yarn" else {})


def _yarn(parameters: Mapping[str, Any], longest: int) -> dict[str, Any]:
    """llama.cpp multiplies queries and keys by 1 + 0.1 ln(factor) and by attn_factor; of what else there may be it has
    the usual values alone, for which ExportError is raised where a model has others."""
    usual = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0, "mscale_all_dim": 0}
    for name, value in usual.items():
        found = parameters.get(name)
        if found is not None and found != value:
            raise ExportError(
                f"The model's rotary embedding is a yarn with {name}={found}, and llama.cpp computes this "
                f"architecture's with {value} alone: use another --to."
            )
    original = parameters.get("original_max_position_embeddings") or longest
    result: dict[str, Any] = {"rope.scaling.original_context_length": int(original)}
    if (asked := parameters.get("attention_factor")) is not None:
        there = 1 + 0.1 * math.log(float(parameters["factor"]))
        result["rope.scaling.attn_factor"] = float(asked) / there
    return result


def llama3_factors(parameters: Mapping[str, Any], head_dim: int) -> Tensor:
    """By what Llama 3 divides the angle of each pair, [head_dim / 2] float32: 1 for waves that are short against the
    original context, `factor` for long ones, between them a mean of both frequencies.

    From the definition of rope_type llama3 (transformers' documentation of rope_parameters), in float64.
    """
    base, factor = float(parameters["rope_theta"]), float(parameters["factor"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    waves = parameters["original_max_position_embeddings"] * frequency / (2 * math.pi)
    short = ((waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - short) / factor + short)).float()


def _gemma3(config: Any, head_dim: int, dialect: Dialect) -> dict[str, Any]:
    """Layers with a window and without take turns, with a rotary embedding each."""
    pattern = [(i + 1) % GEMMA3_PATTERN != 0 for i in range(config.num_hidden_layers)]
    if [kind == "sliding_attention" for kind in config.layer_types] != pattern:
        raise ExportError(
            f"llama.cpp lets every {GEMMA3_PATTERN}th layer of a Gemma 3 see all tokens, this model's config.json "
            "does not: it cannot run there."
        )
    if config.query_pre_attn_scalar != head_dim:
        raise ExportError(
            f"llama.cpp divides a Gemma 3's attention by √{head_dim}, this model by √{config.query_pre_attn_scalar:g}: "
            "it cannot run there."
        )
    rope = config.rope_parameters
    local = rope["sliding_attention"]["rope_theta"]
    longest = config.max_position_embeddings
    return _rope(rope["full_attention"], dialect, longest) | {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(local),
    }


def row_order(name: str, dialect: Dialect, config: PretrainedConfig) -> Tensor | None:
    """In which order llama.cpp wants the rows of a parameter, by full name; None where it is ours."""
    heads, kv_heads, head_dim = head_counts(config)
    layer = name.rpartition(".")[0]
    count = {"q_proj": heads, "k_proj": kv_heads}.get(layer.rpartition(".")[2])
    if not dialect.interleaved or count is None:
        return None
    return torch.arange(count * head_dim).reshape(count, 2, -1).transpose(1, 2).flatten()


def with_rows(value: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """The rows of a weight in another order."""
    parts: dict[str, Tensor | None] = {"codes": value.codes, "kept": value.kept}
    if value.scale.shape[0] > 1:
        parts |= {"scale": value.scale, "zero": value.zero, "shift": value.shift}
    there = {name: part for name, part in parts.items() if part is not None}
    # Bytes are moved: of the scales of mxfp4 rows cannot be picked.
    moved: dict[str, Any] = {
        name: part.view(torch.uint8)[order].view(part.dtype)
        if part.element_size() == 1
        else part[order]
        for name, part in there.items()
    }
    return replace(value, **moved)


def without_offset(name: str, value: Tensor, dialect: Dialect) -> Tensor:
    """A norm's gain as the factor it is, float32; every other parameter as it is."""
    if value.ndim == 1 and "norm" in name and name.endswith(".weight"):
        return value.float() + dialect.norm_offset
    return value


def gguf_package() -> Any:
    """The package gguf, which writes and reads the file's head; MissingExtraError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError(
            "GGUF files are written and read with the package gguf: pip install -c constraints.txt '.[gguf]'."
        ) from error
    return gguf
