"""config.json of a model from what a GGUF file says of it: the way back from `gguf_model.settings`."""

import math
from typing import Any

import torch
from torch import Tensor

from bitfold.errors import CheckpointError
from bitfold.export.gguf_model import GEMMA3_PATTERN, ROPE_FACTORS, llama3_factors
from bitfold.export.gguf_reading import GgufFile, token_id

__all__ = ["config_of", "model_type_of"]

# transformers' model_type and class, by llama.cpp's architecture. Mistral is "llama" there, and computes the same.
_MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
}
_EMBEDDINGS = "token_embd.weight"
_LOCAL_BASE = 10_000.0
# llama.cpp knows this Gemma 3 by its depth: its attention is divided by √(width / heads).
_GEMMA3_27B = 62


def model_type_of(file: GgufFile) -> str | None:
    """transformers' name of the family in a file; None for one that bitfold does not read."""
    return _MODELS.get(file.architecture, (None,))[0]


def config_of(file: GgufFile) -> dict[str, Any]:
    """What transformers' config.json says of the model in a file, but for its dtype.

    Raises CheckpointError for a family that bitfold does not read, or settings that transformers cannot say.
    """
    if file.architecture not in _MODELS:
        raise CheckpointError(
            f"{file.path} holds a '{file.architecture}', and bitfold reads {', '.join(_MODELS)}: use another file."
        )
    if int(file.setting("expert_count", 0)):
        raise CheckpointError(
            f"{file.path} has layers of {file.setting('expert_count')} experts, which bitfold does not read: use a "
            "model without."
        )
    model_type, model = _MODELS[file.architecture]
    heads, width = int(file.setting("attention.head_count")), int(file.setting("embedding_length"))
    head_dim = int(file.setting("attention.key_length", width // heads))
    gemma = model_type.startswith("gemma")
    vocabulary = _vocabulary(file)
    _check(file, head_dim)
    result: dict[str, Any] = {
        "architectures": [model],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": int(file.setting("feed_forward_length")),
        "num_hidden_layers": int(file.setting("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.setting("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "max_position_embeddings": int(file.setting("context_length")),
        "rms_norm_eps": _rounded(file.setting("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file, "bos", vocabulary),
        "eos_token_id": _token(file, "eos", vocabulary),
        "pad_token_id": _token(file, "padding", vocabulary),
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
    }
    if model_type in ("llama", "qwen3"):
        result["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if model_type == "llama":
        result["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if model_type == "gemma3_text":
        return result | _gemma3(file, head_dim, width // heads)
    return result | {"rope_parameters": _rope(file, head_dim)}


def _check(file: GgufFile, head_dim: int) -> None:
    """Raises CheckpointError for what transformers' classes of these families do not compute."""
    turned = int(file.setting("rope.dimension_count", head_dim))
    if turned != head_dim:
        raise CheckpointError(
            f"{file.path} turns {turned} of {head_dim} dimensions of a head, which no family that bitfold reads does: "
            "use another file."
        )
    blocks, said = _blocks(file), int(file.setting("block_count"))
    if blocks != said:
        raise CheckpointError(
            f"{file.path} has tensors of {blocks} layers, but its head says {said}: it is damaged; make or download it "
            "again."
        )
    if file.setting("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path} has values wider or narrower than keys, which bitfold does not read: use another file."
        )


def _blocks(file: GgufFile) -> int:
    """Layers that have tensors."""
    numbers = (name.split(".")[1] for name in file.tensors if name.startswith("blk."))
    return len({number for number in numbers if number.isdecimal()})


def _vocabulary(file: GgufFile) -> int:
    """Rows of the embeddings."""
    if _EMBEDDINGS not in file.tensors:
        raise CheckpointError(
            f"{file.path} has no {_EMBEDDINGS}: it holds no whole model (a vocabulary, an adapter?); use another file."
        )
    return file.tensors[_EMBEDDINGS].shape[0]


def _token(file: GgufFile, name: str, vocabulary: int) -> int | None:
    """The number of a special token; None where there is none."""
    try:
        return token_id(file.settings, name, vocabulary)
    except ValueError as error:
        raise CheckpointError(
            f"The vocabulary of {file.path} is damaged ({error}): make or download the file again."
        ) from error


def _rope(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """The rotary embedding."""
    result: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _rounded(file.setting("rope.freq_base", 10_000.0)),
    }
    kind = file.setting("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        return result | _llama3(file, head_dim, result["rope_theta"])
    if kind == "none":
        old = float(file.setting("rope.scale_linear", 1.0))
        return result if old == 1 else result | {"rope_type": "linear", "factor": _rounded(old)}
    if kind == "linear":
        factor = _rounded(file.setting("rope.scaling.factor"))
        return result | {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return result | _yarn(file)
    raise CheckpointError(
        f"{file.path} has a rotary embedding of type '{kind}', and bitfold reads linear, yarn and Llama 3's: use "
        "another file."
    )


def _yarn(file: GgufFile) -> dict[str, Any]:
    """YaRN: llama.cpp multiplies queries and keys by 1 + 0.1 ln(factor), as transformers does if not told otherwise,
    and has beta_fast = 32, beta_slow = 1 whatever the file says."""
    factor = _rounded(file.setting("rope.scaling.factor"))
    result: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": int(
            file.setting("rope.scaling.original_context_length")
        ),
    }
    attention = float(file.setting("rope.scaling.attn_factor", 1.0))
    if attention != 1:
        result["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
    return result


def _llama3(file: GgufFile, head_dim: int, base: float) -> dict[str, Any]:
    """The numbers behind Llama 3's factors, one for each pair: 1 for short waves, `factor` for long ones, between them
    1 / factor + (1 − 1 / factor) · s with s linear in the frequency. One of the numbers is free, and taken as 1."""
    found = file.read(ROPE_FACTORS)
    assert isinstance(found, Tensor)
    factors = found.double().flatten()
    if factors.numel() == head_dim // 2 and (factors == 1).all():
        return {}
    factor = float(factors.max())
    frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    if factors.numel() == head_dim // 2 and int(between.sum()) >= 2:
        waves = (frequency / (2 * math.pi))[between]
        rows = torch.stack([waves, torch.ones_like(waves)], dim=1)
        slope, offset = torch.linalg.lstsq(rows, smooth[between, None]).solution.flatten().tolist()
        result = {
            "rope_type": "llama3",
            "factor": _rounded(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(1 - 1 / offset, 3),
            "original_max_position_embeddings": round(-slope / offset),
        }
        again = llama3_factors(result | {"rope_theta": base}, head_dim).double()
        if torch.allclose(again, factors, rtol=1e-4):
            return result
    raise CheckpointError(
        f"{file.path} has factors for the rotary embedding ({ROPE_FACTORS}) that are not those of a Llama 3: bitfold "
        "does not read them; use another file."
    )


def _gemma3(file: GgufFile, head_dim: int, per_head: int) -> dict[str, Any]:
    """Layers with a window and without take turns, with a rotary embedding each."""
    blocks = int(file.setting("block_count"))
    kinds = ["sliding_attention", "full_attention"]
    local = _rounded(file.setting("rope.freq_base_swa", _LOCAL_BASE))
    return {
        "layer_types": [kinds[(i + 1) % GEMMA3_PATTERN == 0] for i in range(blocks)],
        "sliding_window": int(file.setting("attention.sliding_window")),
        "query_pre_attn_scalar": per_head if blocks == _GEMMA3_27B else head_dim,
        "rope_parameters": {
            "full_attention": _rope(file, head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _rounded(value: float) -> float:
    """A number that was written in decimals, from its nearest in float32.

    >>> _rounded(9.999999974752427e-07)
    1e-06
    """
    return float(f"{float(value):.7g}")
