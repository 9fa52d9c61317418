"""Tiny random models of every family: logits far from uniform, gains and biases far from those of a fresh model."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

__all__ = ["CONFIGS", "TOKENS", "Zoo", "build", "exact_norms", "in_float64", "random_model"]

Zoo = Callable[[str, torch.dtype], Path]
"""The directory of a tiny random checkpoint, given a key of CONFIGS and a dtype."""

TOKENS = torch.arange(2 * 24).reshape(2, 24).mul(37).remainder(96)

_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
_LLAMA = _SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
_OPT = _SIZES | {
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
_GEMMA3 = _LLAMA | {
    "head_dim": 32,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_LLAMA),
    "llama-biased": LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**_LLAMA, sliding_window=8),
    "qwen2": Qwen2Config(**_LLAMA, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_LLAMA, head_dim=32),
    "gemma": GemmaConfig(**_LLAMA, head_dim=32),
    "gemma3": Gemma3TextConfig(**_GEMMA3),
    "opt": OPTConfig(**_OPT, word_embed_proj_dim=64),
    "opt-projected": OPTConfig(**_OPT, word_embed_proj_dim=32),
    "opt-350m": OPTConfig(**_OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt-gelu": OPTConfig(**_OPT, word_embed_proj_dim=64, activation_function="gelu"),
}


def random_model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Weights of 0.15, and gains and biases that are 0.3 away from those of a fresh model."""
    torch.manual_seed(0)
    # A copy: the model writes its dtype into its config, and the next one would be made in that.
    model = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[family]), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * 0.15
        else:
            parameter.data += torch.randn_like(parameter) * 0.3
    return model.to(dtype).eval()


def build(family: str, dtype: torch.dtype, directory: Path) -> Path:
    """Save a random model."""
    random_model(family, dtype).save_pretrained(directory)
    return directory


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model computing in float64 throughout."""
    return exact_norms(model).double()


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The model with norms that compute in the dtype they are given: transformers' RMSNorm goes through float32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            offset = 1.0 if "Gemma" in type(module).__name__ else 0.0
            module.forward = _rms_norm(module, offset)
    return model


def _rms_norm(module: nn.Module, offset: float) -> Callable[[Tensor], Tensor]:
    eps = getattr(module, "variance_epsilon", None) or module.eps

    def forward(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (module.weight + offset)

    return forward
