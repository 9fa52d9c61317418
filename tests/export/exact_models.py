"""What an exported graph is held against: a checkpoint's arithmetic in float32, in PyTorch; and ways to damage it."""

import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bitfold
from bitfold.export.reading import read_model
from bitfold.numerics.activation import quantize_input

__all__ = ["DEMO", "IDS", "distance", "edit", "exactly", "flip", "quantized"]

DEMO = Path(bitfold.__file__).parent / "assets" / "tiny-llama"
IDS = torch.arange(48) * 37 % 4096


def exactly(directory: Path) -> PreTrainedModel:
    """A checkpoint in float32: s · (q − z) as it is, and inputs rounded as the simulation rounds them."""
    stored = read_model(directory)
    config = AutoConfig.from_pretrained(directory)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    for name in stored.names:
        value = stored.read(name)
        value = value.float() if isinstance(value, Tensor) else value.dequantize(torch.float32)
        model.get_parameter(name).data = value
    for name, scheme in stored.schemes.items():
        if scheme.activation is not None:
            found = stored.calibrated(name)
            parts = [found.get("input_scale", found.get("input_share"))]
            parts += [found.get(f"input_{part}") for part in ("zero_point", "clusters")]

            def rounded(module, args, asked=scheme.activation, parts=parts):
                return (quantize_input(args[0], asked, *parts),)

            model.get_submodule(name).register_forward_pre_hook(rounded)
    model.tie_weights()
    return model.eval()


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference of the logits, over their spread."""
    return float((found - expected).abs().max() / expected.std())


def quantized(out: Path, scheme: str, *settings: str, method: str = "rtn") -> Path:
    """An artifact of the embedded model."""
    bitfold.quantize(DEMO, out, method=method, scheme=scheme, set=settings, samples=2)
    return out


def edit(file: Path, **settings: object) -> None:
    """Put settings into a file of JSON."""
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def flip(file: Path, place: int) -> None:
    """Turn one bit round."""
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte[0] ^ 1]))
