"""What is exported to phones, and what is refused, without their engines."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_models import exactly
from hypothesis import given
from hypothesis import strategies as st
from tiny_artifacts import everywhere, quantize, scheme, write

from bitfold.errors import ExportError, MissingExtraError
from bitfold.export import compressed_tensors, native
from bitfold.export.executorch_decoder import (
    CachedDecoder,
    IntegerLinear,
    PhoneLinears,
    trace_cached,
)
from bitfold.export.exporting import export_to
from bitfold.export.fitting import Planned, misfits
from bitfold.export.layout import LayerEntry
from bitfold.export.phone_rules import expected_inputs, unsuitable_input, unsuitable_weight
from bitfold.export.reading import read_model
from bitfold.export.stored_bytes import halves, stored_in
from bitfold.export.torch_decoder import build_decoder
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.config import read_config
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme
from models_zoo import TOKENS, Zoo

ENGINES = ["executorch", "litert"]


def phone_scheme(notation: str, **weight: object) -> Scheme:
    """Symmetric weights, and inputs with zero-points, as XNNPACK has them."""
    made = scheme(notation, symmetric=True, **weight)
    if made.activation is None:
        return made
    return made.model_copy(
        update={"activation": made.activation.model_copy(update={"symmetric": False})}
    )


# -- rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "why"),
    [
        (TensorScheme(bits=8), None),
        (TensorScheme(bits=5), None),
        (TensorScheme(bits=4, granularity="tensor"), None),
        (TensorScheme(bits=4, granularity="group", group_size=32), None),
        (TensorScheme(bits=2, granularity="group", group_size=96), None),
        (TensorScheme(bits=4, symmetric=False), "weight.symmetric=true"),
        (TensorScheme(bits=8, granularity="group", group_size=32), "weight.granularity=channel"),
        (TensorScheme(bits=4, granularity="group", group_size=48), "weight.group_size=32"),
        (TensorScheme(bits=4, kept=2), "integers alone"),
        (TensorScheme(grid="nf4", bits=4), "integers alone"),
    ],
)
def test_weights(weight: TensorScheme, why: str | None) -> None:
    found = unsuitable_weight(weight)
    assert found is None if why is None else why in str(found)


@pytest.mark.parametrize(
    ("inputs", "fits"),
    [
        (None, True),
        (TensorScheme(granularity="token"), True),
        (TensorScheme(granularity="token", symmetric=False), True),
        (TensorScheme(granularity="token", bits=4), False),
        (TensorScheme(granularity="token", narrow=True), False),
        (TensorScheme(granularity="token", clipped=True), False),
        (TensorScheme(granularity="tensor", static=True), False),
        (TensorScheme(granularity="tensor"), False),
        (TensorScheme(granularity="group", group_size=32), False),
        (TensorScheme(granularity="token", grid="fp8_e4m3"), False),
    ],
)
def test_inputs(inputs: TensorScheme | None, fits: bool) -> None:
    assert (unsuitable_input(inputs) is None) == fits


REFUSED = {
    "w4a8g32": (compressed_tensors, scheme("w4a16g32"), "weight.symmetric=true"),
    "w8a16g32": (compressed_tensors, scheme("w8a16g32", symmetric=True), "granularity=channel"),
    "static": (compressed_tensors, scheme("w8a8", symmetric=True, static=True), "static=false"),
    "w4a4": (compressed_tensors, scheme("w4a4", symmetric=True), "choose a8"),
    "nf4": (native, scheme("wnf4a16g32"), "integers alone"),
    "kv": (native, scheme("w8a8kv8", symmetric=True), "quantizes queries, keys or values"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_computed_otherwise_is_refused(
    case: str, engine: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    format, asked, why = REFUSED[case]
    write(
        quantize(checkpoint("llama", torch.float32), everywhere(asked)),
        tmp_path / "artifact",
        format,
    )
    with pytest.raises(ExportError, match=why):
        export_to(tmp_path / "artifact", engine, tmp_path / "model")
    assert [file.name for file in tmp_path.iterdir()] == ["artifact"]


def test_families_and_forms_are_refused(checkpoint: Zoo, tmp_path: Path) -> None:
    model = checkpoint("opt", torch.float32)
    with pytest.raises(ExportError, match="LiteRT is written for llama, mistral, qwen2, qwen3"):
        export_to(model, "litert", tmp_path / "model")
    with pytest.raises(ExportError, match="executorch has no form '7'"):
        export_to(model, "executorch", tmp_path / "model", form="7")


@pytest.mark.parametrize(
    ("engine", "module"),
    [("executorch", "executorch.exir"), ("litert", "ai_edge_litert.schema_py_generated")],
)
def test_missing_packages_are_named(
    engine: str, module: str, checkpoint: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'\.\[{engine}\]'"):
        export_to(checkpoint("llama", torch.float32), engine, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", ENGINES)
def test_for_says_it_all_before(engine: str, checkpoint: Zoo) -> None:
    made = quantize(checkpoint("llama", torch.float32), everywhere(phone_scheme("w4a8g32")))

    def said(asked: Scheme) -> list[tuple[str, bool]]:
        linears = {n: LayerEntry(asked, e.in_features) for n, e in made.layout.linears.items()}
        layout = replace(made.layout, linears=linears)
        shapes = dict.fromkeys(linears, (64, 64))
        found = misfits(Planned(Checkpoint(made.checkpoint), layout, shapes, ()), engine)
        return [(one.clause, one.stops) for one in found]

    assert said(phone_scheme("w4a8g32")) == []
    [(clause, stops)] = said(scheme("w4a8g32", symmetric=True))
    assert "activation.symmetric=false" in clause
    assert not stops
    [(clause, stops)] = said(phone_scheme("w4a16g32"))
    assert "rounds to 8 bits" in clause
    assert not stops
    both = said(scheme("w4a4"))
    assert all(stops for _, stops in both)
    assert ["weight.symmetric=true" in both[0][0], "choose a8" in both[1][0]] == [True, True]


# -- the layers that ExecuTorch's are traced of ------------------------------------------------------


def xnnpack_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In float64, with inputs rounded as XNNPACK's xnn_f32_qd8_asymmetric_quantization_params says."""
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round().clamp(-128, 127)
    codes = ((x / scale).round() + zero).clamp(-128, 127)
    return ((codes - zero) * scale) @ weight.double().T


@pytest.mark.parametrize(("bits", "block"), [(8, None), (4, None), (4, 32), (3, 64)])
def test_a_layer_in_integers(bits: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(bits)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (24, 128), generator=generator).to(torch.int8)
    scale = torch.rand(24, 128 // block if block else 1, generator=generator) + 0.1
    kind = {"granularity": "group", "group_size": block} if block else {}
    value = QuantizedTensor(codes, scale, None, TensorScheme(bits=bits, **kind))
    layer = IntegerLinear(value, scale, torch.ones(24))
    x = torch.randn(1, 7, 128, generator=generator)
    expected = xnnpack_linear(x, value.dequantize(torch.float64)) + 1
    assert float((layer(x) - expected).abs().max() / expected.std()) < 1e-5
    assert layer.bits == (8 if bits == 8 else 4)


def test_a_cache_of_a_fixed_size(checkpoint: Zoo, tmp_path: Path) -> None:
    """The program that is traced computes what the model does, whole and token by token, twice over."""
    for family in ("llama-biased", "mistral", "gemma3", "opt-350m"):
        directory = checkpoint(family, torch.float32)
        model = read_model(directory)
        plain, _ = build_decoder(
            model, read_config(model.checkpoint), lambda _: None, PhoneLinears()
        )
        decoder = CachedDecoder(plain.network, 32).eval()
        with torch.no_grad():
            expected = exactly(directory)(TOKENS).logits
            for tokens, wanted in zip(TOKENS, expected, strict=True):
                pieces, start = [], 0
                for piece in tokens.split([9, 1, 1, 13]):
                    pieces.append(decoder(piece[None], torch.tensor([start]))[0])
                    start += len(piece)
                difference = (torch.cat(pieces) - wanted).abs().max() / wanted.std()
                assert difference < 1e-5, family


def test_a_traced_graph_has_our_integers(checkpoint: Zoo, tmp_path: Path) -> None:
    made = quantize(checkpoint("llama", torch.bfloat16), everywhere(phone_scheme("w4a8g32")))
    write(made, tmp_path / "artifact", compressed_tensors)
    model = read_model(tmp_path / "artifact")
    linears = PhoneLinears()
    plain, types = build_decoder(model, read_config(model.checkpoint), lambda _: None, linears)
    assert expected_inputs(model)
    assert linears.scale_error == 0
    assert types["4 bits"] == sum(value.shape.numel() for value in made.weights.values())
    program = trace_cached(CachedDecoder(plain.network, 32).eval())
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("dequantize_per_channel_group" in target for target in targets) == 14
    assert sum("quantized_decomposed.quantize_per_token" in target for target in targets) == 14
    for name, value in made.weights.items():
        assert torch.equal(program.state_dict[f"network.{name}.codes"], value.codes)


# -- where weights lie in a file -------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_halves_of_bytes(rows: int, columns: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (rows, columns)))
    packed = halves(codes.to(torch.int8), 8).reshape(rows, -1)
    for row in range(rows):
        for column in range(columns):
            half = (int(packed[row, column // 2]) >> (4 * (column % 2))) & 15
            assert half - 8 == int(codes[row, column])


def test_weights_are_found_in_a_file(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one, two, other = (random.integers(0, 256, n, dtype=np.uint8) for n in (100, 64, 40))
    head, gap = bytes(32), bytes(12)
    file = tmp_path / "file"
    file.write_bytes(head + one.tobytes() + gap + two.tobytes() + b"end")
    found = stored_in(file, {"one": one, "two": two}, {"other": other})
    assert [(name, its.offset, its.length) for name, its in found.items()] == [
        ("the graph", 0, 32),
        ("one", 32, 100),
        ("the graph, part 2", 132, 12),
        ("two", 144, 64),
        ("the graph, part 3", 208, 3),
    ]
    with pytest.raises(ExportError, match="The integers of other are not in file"):
        stored_in(file, {"one": one, "other": other}, {})
