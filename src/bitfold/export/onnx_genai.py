"""`genai_config.json`, from which onnxruntime-genai, ONNX Runtime's loop that generates, learns a graph's sizes."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bitfold.models.family import head_counts
from bitfold.models.headers import read_json

__all__ = ["genai_config"]

# Its names of the families; it runs them all the same way.
_TYPES = {"gemma3_text": "gemma3_text", "opt": "decoder"}


def genai_config(config: PretrainedConfig, source: Path) -> dict[str, Any]:
    """Its content for a graph of `onnx_decoder`. source: the model's directory, which may have a generation config."""
    made: Any = config
    heads, kv_heads, head_dim = head_counts(config)
    file = source / "generation_config.json"
    asked = read_json(file) if file.is_file() else {}
    ends = asked.get("eos_token_id", made.eos_token_id)
    first_end = ends[0] if isinstance(ends, list) else ends
    pad = asked.get("pad_token_id", made.pad_token_id)
    session = {
        "log_id": "onnxruntime-genai",
        "provider_options": [],
        # Without it processors before VNNI saturate sums of 8 by 8 bits.
        "session.x64quantprecision": "1",
    }
    special = {
        "bos_token_id": asked.get("bos_token_id", made.bos_token_id),
        "eos_token_id": ends,
        "pad_token_id": first_end if pad is None else pad,
    }
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids")}
    return {
        "model": {
            "type": _TYPES.get(made.model_type, made.model_type),
            **{name: token for name, token in special.items() if token is not None},
            "context_length": made.max_position_embeddings,
            "vocab_size": made.vocab_size,
            "decoder": {
                "filename": "model.onnx",
                "session_options": session,
                "hidden_size": made.hidden_size,
                "num_hidden_layers": made.num_hidden_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_size": head_dim,
                "inputs": inputs
                | {
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": made.max_position_embeddings,
            "do_sample": bool(asked.get("do_sample", False)),
            "temperature": float(asked.get("temperature") or 1.0),
            "top_p": float(asked.get("top_p") or 1.0),
            "top_k": int(asked.get("top_k") or 50),
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
        },
    }
