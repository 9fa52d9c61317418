"""Tiny GGUF files: random models with the demo's tokenizer, and what llama.cpp's own quantizer makes of a file."""

import ctypes
import shutil
from collections.abc import Callable
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bitfold
from bitfold.runtime.load import load
from models_zoo import CONFIGS, random_model

__all__ = [
    "DEMO",
    "TEXT",
    "TOKENS",
    "by_llama_cpp",
    "changed",
    "distance",
    "logits",
    "quantized_by_llama_cpp",
    "small",
]

DEMO = Path(bitfold.__file__).parent / "assets" / "tiny-llama"
TOKENS = torch.arange(8) * 37 % 4096
TEXT = "Über the naïve café, 1234 dogs' tails — don't\n\n  wag: x_1 = f(y)[0];\t<tag> 日本語 🙂"


def small(family: str, directory: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    """A random model of a family, with the demo's tokenizer. settings: of its config."""
    config = deepcopy(CONFIGS[family])
    config.vocab_size, config.max_position_embeddings = 4096, 128
    for name, value in settings.items():
        setattr(config, name, value)
    if family == "gemma3":
        config.num_hidden_layers = 6
        config.layer_types = ["sliding_attention"] * 5 + ["full_attention"]
        config.query_pre_attn_scalar = config.head_dim
    monkeypatch.setitem(CONFIGS, family, config)
    random_model(family, torch.float32).save_pretrained(directory)
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def logits(model: Path, tokens: Tensor = TOKENS) -> Tensor:
    """Of PyTorch, [length, vocabulary]."""
    with torch.no_grad():
        return load(model, dtype="float32")(tokens[None]).logits[0]


def distance(file: Path, model: Path, tokens: Tensor = TOKENS) -> float:
    """Root mean square difference of the logits of llama.cpp and of PyTorch, over their spread."""
    from bitfold.engines.llama_cpp import LlamaCpp

    with LlamaCpp(file, context=len(tokens)) as engine:
        found = engine.logits(tokens)
    expected = logits(model, tokens)
    return float((found - expected).square().mean().sqrt() / expected.std())


def quantized_by_llama_cpp(values: np.ndarray, type: str) -> np.ndarray:
    """Bytes [rows, bytes of a row] that llama.cpp's quantizer makes of float32 [rows, columns], without an importance
    matrix."""
    import gguf

    package = find_spec("xllamacpp")
    assert package is not None
    assert package.origin is not None
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("*.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    kind = gguf.GGMLQuantizationType[type]
    rows, columns = values.shape
    inputs, size = gguf.GGML_QUANT_SIZES[kind]
    made = np.zeros((rows, columns // inputs * size), dtype=np.uint8)
    written = quantize(int(kind), values.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    assert written == made.size
    return made


def by_llama_cpp(file: Path, out: Path, type_of: Callable[[str], str]) -> Path:
    """A file whose matrices llama.cpp's quantizer has rounded. type_of: ggml's type of a tensor, by its name."""
    import gguf

    def rounded(name: str, data: np.ndarray, type: Any) -> tuple[np.ndarray, Any]:
        if data.ndim < 2:
            return data, type
        kind = gguf.GGMLQuantizationType[type_of(name)]
        values = np.ascontiguousarray(gguf.quants.dequantize(data, type), dtype=np.float32)
        made = quantized_by_llama_cpp(values, kind.name)
        return made, kind

    return changed(file, out, rounded)


def changed(
    file: Path,
    out: Path,
    tensor: Callable[[str, np.ndarray, Any], tuple[np.ndarray, Any] | None],
    settings: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    """A copy of a file, but for what `tensor` makes of each tensor (None: left out), for settings of other values
    (None: left out), and for further tensors in float32."""
    import gguf

    reader, settings = gguf.GGUFReader(file), settings or {}
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(out, settings.get("general.architecture", architecture))
    for name, field in reader.fields.items():
        if name.startswith(("GGUF.", "bitfold.")) or name == "general.architecture":
            continue
        kind = field.types[0]
        value = settings.get(name, field.contents())
        if value is not None and kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, kind)
    for one in reader.tensors:
        made = tensor(one.name, np.array(one.data), one.tensor_type)
        if made is not None:
            writer.add_tensor(one.name, made[0], raw_dtype=made[1])
    for name, data in (more or {}).items():
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
