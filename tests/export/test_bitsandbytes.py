"""bitsandbytes' checkpoints, by a writer of the tests' own that computes in float64, compute the same once imported.

bitsandbytes 0.50 itself: files of it, of tiny-llama in nf4 (absmax nested and not) and fp4, gave the values of its
`dequantize_4bit` to the last bit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.errors import CheckpointError
from bitfold.export.importing import import_checkpoint
from bitfold.export.reading import read_model
from bitfold.numerics import QuantizedTensor
from bitfold.runtime.frozen import FrozenLinear, load_frozen
from models_zoo import TOKENS, build

# Dettmers et al. 2023, appendix E; and the E2M1-like levels of fp4, sign in the upper bit.
NF4 = np.float32([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
HALF = np.float32([0.0, 0.0052083333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25])
FP4 = np.concatenate([HALF, -HALF])
EDGE = "model.layers.1.mlp.down_proj"  # 96 inputs


def four_bits(
    weight: np.ndarray, kind: str, size: int, *, nested: bool
) -> tuple[dict[str, Tensor], np.ndarray]:
    """The tensors of one weight, and its values in float64."""
    levels = NF4 if kind == "nf4" else FP4
    flat = weight.astype(np.float64).ravel()
    blocks = np.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    absmax = np.abs(blocks).max(axis=1).astype(np.float32)
    tensors: dict[str, Tensor] = {}
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(weight.shape)
    }  # fmt: skip
    if nested:
        offset = float(np.float32(absmax.mean()))
        outer = np.pad(absmax - offset, (0, -len(absmax) % 256)).reshape(-1, 256)
        scale = np.abs(outer).max(axis=1).astype(np.float32)
        ramp = np.linspace(-1, 1, 256).astype(np.float32)
        near = np.abs(outer[:, :, None] / scale[:, None, None] - ramp).argmin(axis=2).ravel()
        bytes_ = near[: len(absmax)].astype(np.uint8)
        tensors["absmax"] = torch.from_numpy(bytes_)
        tensors["nested_absmax"] = torch.from_numpy(scale)
        tensors["nested_quant_map"] = torch.from_numpy(ramp)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        places = np.arange(len(absmax)) // 256
        scales = ramp[bytes_].astype(np.float64) * scale[places] + offset
    else:
        tensors["absmax"] = torch.from_numpy(absmax)
        scales = absmax.astype(np.float64)
    codes = np.abs(blocks[:, :, None] / scales[:, None, None] - levels).argmin(axis=2)
    values = (levels.astype(np.float64)[codes] * scales[:, None]).ravel()[: len(flat)]
    codes = np.pad(codes.ravel()[: len(flat)], (0, len(flat) % 2)).reshape(-1, 2)
    packed = (codes[:, :1] << 4 | codes[:, 1:]).astype(np.uint8)
    tensors["quant_map"] = torch.from_numpy(levels.copy())
    said = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8).copy()
    tensors[f"quant_state.bitsandbytes__{kind}"] = torch.from_numpy(said)
    named = {f"weight.{name}": value for name, value in tensors.items()}
    return named | {"weight": torch.from_numpy(packed)}, values.reshape(weight.shape)


def eight_bits(weight: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    codes = np.rint(weight * 127.0 / largest[:, None]).astype(np.int8)
    values = codes.astype(np.float64) * largest[:, None].astype(np.float64) / 127
    tensors = {
        "weight": torch.from_numpy(codes),
        "SCB": torch.from_numpy(largest),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return tensors, values


def written(
    directory: Path, kind: str, *, nested: bool = False, size: int = 64
) -> tuple[Path, dict[str, np.ndarray]]:
    """A random Llama whose linear layers are in bitsandbytes' tensors, and their values."""
    build("llama", torch.float32, directory)
    tensors, values = load_file(directory / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).numpy()
        made, exact = (
            eight_bits(weight) if kind == "int8" else four_bits(weight, kind, size, nested=nested)
        )
        layer = name.removesuffix(".weight")
        tensors |= {f"{layer}.{part}": value for part, value in made.items()}
        values[name] = exact
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory, values


CASES = {
    "nf4": ("nf4", False, 64),
    "nf4-nested": ("nf4", True, 64),
    "nf4-wide": ("nf4", False, 4096),  # blocks over many rows
    "fp4": ("fp4", False, 64),
    "fp4-nested": ("fp4", True, 64),
    "int8": ("int8", False, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_values_are_the_same(case: str, tmp_path: Path) -> None:
    kind, nested, size = CASES[case]
    source, values = written(tmp_path / "a", kind, nested=nested, size=size)
    import_checkpoint(source, tmp_path / "b")
    stored = read_model(tmp_path / "b")
    assert {n for n in stored.names if n.endswith("_proj.weight")} == values.keys()
    for name, exact in values.items():
        found = stored.read(name)
        assert isinstance(found, QuantizedTensor) == (kind != "fp4")
        wide = found.dequantize(torch.float64) if isinstance(found, QuantizedTensor) else found
        assert np.abs(wide.numpy() - exact).max() <= 3e-7 * np.abs(exact).max(), name
    # And the whole computes what a model with those values does.
    model = AutoModelForCausalLM.from_pretrained(build("llama", torch.float32, tmp_path / "c"))
    for name, exact in values.items():
        model.get_parameter(name).data = torch.from_numpy(exact).float()
    with torch.no_grad():
        expected = model.eval()(TOKENS).logits
        logits = bitfold.load(tmp_path / "b", dtype="float32")(TOKENS).logits
    assert torch.allclose(logits, expected, atol=1e-4 * float(expected.std()))


def test_what_is_said_of_it(tmp_path: Path) -> None:
    exact = import_checkpoint(written(tmp_path / "a", "nf4")[0], tmp_path / "b")
    assert exact.notes == ()
    assert sum(count for type, count in exact.types.items() if type == "4 bits") > 0
    groups = {
        n: s.weight.describe() for n, s in read_model(tmp_path / "b").schemes.items() if s.weight
    }
    assert groups[EDGE] == "nf4 symmetric, group 32"
    assert groups["model.layers.0.mlp.up_proj"] == "nf4 symmetric, channel"
    loose = import_checkpoint(written(tmp_path / "c", "fp4")[0], tmp_path / "d")
    assert "and 13 others: bitfold has no grid with their levels" in loose.notes[0]
    assert "quantization_config" not in json.loads((tmp_path / "d" / "config.json").read_text())
    eight = import_checkpoint(written(tmp_path / "e", "int8")[0], tmp_path / "f")
    assert "bitsandbytes rounds inputs to 8 bits" in eight.notes[0]


def broken(directory: Path, change: dict[str, Tensor | None]) -> None:
    tensors: dict[str, Tensor | None] = dict(load_file(directory / "model.safetensors"))
    tensors |= {f"{EDGE}.{name}": value for name, value in change.items()}
    left = {name: value for name, value in tensors.items() if value is not None}
    save_file(left, directory / "model.safetensors", metadata={"format": "pt"})


def state(**changes: Any) -> Tensor:
    content = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 96]}
    raw = json.dumps(content | changes).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        ("nf4", {STATE: None}, f"has {EDGE}.weight in few bits without what says how"),
        ("nf4", {STATE: state(shape=[64])}, f"how the weight of {EDGE} is quantized"),
        ("nf4", {STATE: state(blocksize=0)}, f"how the weight of {EDGE} is quantized"),
        ("nf4", {STATE: state(dtype="int3")}, f"how the weight of {EDGE} is quantized"),
        ("nf4", {STATE: torch.tensor([1, 2], dtype=torch.uint8)}, "how the weight of"),
        ("nf4", {STATE: state(shape=[64, 128])}, f"does not hold the weight of {EDGE}"),
        ("nf4", {"weight.absmax": torch.ones(5)}, "5 scales for 96 blocks"),
        ("nf4", {"weight.absmax": None}, f"does not hold the weight of {EDGE}"),
        ("nf4", {"weight.quant_map": torch.arange(16.0)}, "quant_map is not nf4's"),
        ("nf4", {"weight": torch.ones(6144, 1, dtype=torch.bfloat16)}, "bnb_4bit_quant_storage"),
        ("fp4", {"weight.quant_map": torch.ones(3)}, f"does not hold the weight of {EDGE}"),
        ("int8", {"SCB": torch.ones(3)}, f"does not hold the weight of {EDGE}"),
        ("int8", {"SCB": None}, "in few bits without what says how"),
        ("int8", {"weight_format": torch.tensor(2, dtype=torch.uint8)}, "GPU's tiles"),
    ],
)
def test_damage_is_named(
    kind: str, change: dict[str, Tensor | None], sentence: str, tmp_path: Path
) -> None:
    source, _ = written(tmp_path / "a", kind)
    broken(source, change)
    with pytest.raises(CheckpointError, match=sentence):
        import_checkpoint(source, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_trained_on_the_same_values(case: str, tmp_path: Path) -> None:
    """As a frozen base: packed, and nested scales as they are stored where blocks end with rows."""
    kind, nested, size = CASES[case]
    source, values = written(tmp_path / "a", kind, nested=nested, size=size)
    model = load_frozen(source, device=torch.device("cpu"), dtype=torch.float32)
    stays = {}
    for name, exact in values.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        packed = isinstance(layer, FrozenLinear)
        assert packed == (kind != "fp4")
        weight = layer.dequantize(torch.float32) if packed else layer.weight
        assert np.abs(weight.double().numpy() - exact).max() < 1e-6 * np.abs(exact).max()
        stays[name] = packed and layer.block
    # Rows of 64 inputs; those of 96 share blocks.
    expected = 256 if case == "nf4-nested" else 0
    assert stays["model.layers.1.self_attn.q_proj.weight"] == expected
    assert not stays[f"{EDGE}.weight"]
    assert torch.isfinite(model(input_ids=TOKENS).logits).all()
