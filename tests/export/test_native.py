"""bitfold's own format loads exactly where bitfold was imported, and not at all where it was not."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from tiny_artifacts import (
    SchemeOf,
    assert_same_tensor,
    by_depth,
    by_kind,
    everywhere,
    load,
    logits,
    quantize,
    quantizes_at_run_time,
    scheme,
    simulate,
    tiny_layout,
    weights,
    without_activations,
    write,
)
from transformers import AutoModelForCausalLM

from bitfold.errors import CheckpointError, RecipeError
from bitfold.export import choose_format, compressed_tensors, native
from bitfold.export.layout import Refusal, WeightFormat
from bitfold.numerics import CodebookShape, MapShape, QuantizedTensor, Scheme, TensorScheme
from models_zoo import Zoo

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
TOKEN4 = TensorScheme(bits=4, symmetric=False, granularity="token")
TOKEN8 = TensorScheme(bits=8, symmetric=False, granularity="token")
PER_TENSOR = TensorScheme(bits=4, symmetric=False, granularity="tensor")

CASES: dict[str, SchemeOf] = {
    "wnf4a16": everywhere(scheme("wnf4a16")),
    "wnf4a16g32": everywhere(scheme("wnf4a16g32")),
    "wnf4a8": everywhere(scheme("wnf4a8")),
    "w4a4q4kv8": everywhere(scheme("w4a4q4kv8")),
    "w16a16q4kv8": everywhere(scheme("w16a16q4kv8")),
    "k4v8": everywhere(scheme("w8a16").model_copy(update={"key": TOKEN4, "value": TOKEN8})),
    "keys only": everywhere(scheme("w3a16g32").model_copy(update={"key": TOKEN4})),
    "kv in one layer": by_depth(scheme("w4a16kv4"), scheme("w4a16")),
    "narrow activation": everywhere(
        scheme("w5a8").model_copy(
            update={"activation": TensorScheme(bits=4, narrow=True, granularity="token")}
        )
    ),
    "nf4 and w4a4 static": by_kind(scheme("wnf4a16"), scheme("w4a4", static=True)),
    "fp8 and w8a8 static": by_kind(scheme("wfp8afp8"), scheme("w8a8", symmetric=True, static=True)),
    "w4a8 per tensor": everywhere(Scheme(weight=PER_TENSOR, activation=TOKEN8)),
    "wmxfp4amxfp4": everywhere(scheme("wmxfp4amxfp4")),
    "wnvfp4anvfp4": everywhere(scheme("wnvfp4anvfp4")),
    "wnf4amxfp4": everywhere(scheme("wnf4amxfp4")),
    "wmxfp4a16kvnf4": everywhere(scheme("wmxfp4a16kvnf4")),
    "w2a16 and w16a8": by_kind(scheme("w2a16"), scheme("w16a8")),
}


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", FLOAT32), ("qwen2", BFLOAT16), ("opt", FLOAT32), ("opt", BFLOAT16)],
    ids=["llama-float32", "qwen2-bfloat16", "opt-float32", "opt-bfloat16"],
)
@pytest.mark.parametrize("case", CASES)
def test_loads_exactly(
    case: str, family: str, dtype: torch.dtype, checkpoint: Zoo, tmp_path: Path
) -> None:
    quantized = quantize(checkpoint(family, dtype), CASES[case])
    choice = write(quantized, tmp_path / "artifact", native)
    loaded = logits(load(tmp_path / "artifact"))
    assert torch.equal(loaded, logits(simulate(quantized, choice, dtype)))
    plain = AutoModelForCausalLM.from_pretrained(quantized.checkpoint)
    assert (loaded - logits(plain)).abs().max() > 0.02
    if quantizes_at_run_time(quantized.layout):
        weights_only = simulate(without_activations(quantized), choice, dtype)
        assert (loaded - logits(weights_only)).abs().max() > 0.02


@pytest.mark.parametrize("case", ["nf4 and w4a4 static", "wmxfp4amxfp4", "wnvfp4anvfp4"])
def test_bfloat16_checkpoint_in_float32(case: str, checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", BFLOAT16), CASES[case])
    choice = write(quantized, tmp_path / "artifact", native)
    loaded = load(tmp_path / "artifact", dtype=FLOAT32, device_map={"": "cpu"})
    assert torch.equal(logits(loaded), logits(simulate(quantized, choice, FLOAT32)))


def test_saves_and_loads_again(checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("qwen2", FLOAT32), CASES["w4a4q4kv8"])
    write(quantized, tmp_path / "artifact", native)
    loaded = load(tmp_path / "artifact")
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(loaded))


def test_generates_with_a_cache(checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("opt", FLOAT32), CASES["w4a4q4kv8"])
    choice = write(quantized, tmp_path / "artifact", native)
    prompt = torch.arange(10).reshape(1, 10)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        load(tmp_path / "artifact").generate(prompt, **options),
        simulate(quantized, choice, FLOAT32).generate(prompt, **options),
    )


SUBPROCESS = """
import sys
from transformers import AutoModelForCausalLM

asked = {"attn_implementation": "sdpa"}  # in place of the one in config.json
for directory, options in [(sys.argv[1], {}), (sys.argv[2], {}), (sys.argv[2], asked)]:
    try:
        AutoModelForCausalLM.from_pretrained(directory, **options)
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__, error)
    else:
        sys.exit(f"{directory} was loaded by a transformers that does not know its format")
"""


def test_does_not_load_without_bitfold(checkpoint: Zoo, tmp_path: Path) -> None:
    """transformers just warns of an unknown method: the attention, or the shapes, must stop it."""
    outs = [tmp_path / case for case in ("w16a16q4kv8", "fp8 and w8a8 static")]
    for out in outs:
        write(quantize(checkpoint("llama", FLOAT32), CASES[out.name]), out, native)
    done = subprocess.run(
        [sys.executable, "-c", SUBPROCESS, *map(str, outs)],
        check=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    asked, shapes = 'ValueError Specified `attn_implementation="bitfold"`', "RuntimeError"
    starts = [asked, asked, shapes]
    for line, start in zip(done.stdout.splitlines(), starts, strict=True):
        assert line.startswith(start)
    assert "Unknown quantization type, got bitfold" in done.stderr
    assert "size mismatch" in done.stderr


def test_refuses_other_attention(checkpoint: Zoo, tmp_path: Path) -> None:
    write(quantize(checkpoint("llama", FLOAT32), CASES["w4a4q4kv8"]), tmp_path / "kv", native)
    with pytest.raises(RecipeError, match="'eager' cannot turn or quantize queries"):
        load(tmp_path / "kv", attn_implementation="eager")
    write(quantize(checkpoint("llama", FLOAT32), CASES["wnf4a16"]), tmp_path / "nf4", native)
    load(tmp_path / "nf4", attn_implementation="eager")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "has version 2, this bitfold reads 1"),
        (["linears"], None, "is damaged"),
        (["linears", 0, "scheme", "weight", "bits"], 9, "is damaged"),
        (["linears", 0, "modules", 0], "model.layers.7.mlp.up_proj", "has no such module"),
        (["linears", 0, "modules", 0], "model.norm", "it is a LlamaRMSNorm"),
        (["attention", 0, "modules", 0], "model.layers.7.self_attn", "has no such module"),
    ],
)
def test_bad_config(
    path: list, value: object, message: str, checkpoint: Zoo, tmp_path: Path
) -> None:
    write(quantize(checkpoint("llama", FLOAT32), CASES["w4a4q4kv8"]), tmp_path / "out", native)
    config_file = tmp_path / "out" / "config.json"
    config = json.loads(config_file.read_text())
    *parents, last = ["quantization_config", *path]
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    config_file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


REFUSED = {
    "weight per token": everywhere(Scheme(weight=TOKEN4)),
    "activation per channel": everywhere(Scheme(activation=TensorScheme(bits=8))),
    "static per group": everywhere(
        Scheme(activation=TensorScheme(granularity="group", group_size=32, static=True))
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_run(case: str) -> None:
    assert isinstance(native.choose(tiny_layout(REFUSED[case])), Refusal)


ONLINE = {
    "model.layers.0.input_layernorm": MapShape("blocks", (1, 64)),
    "model.layers.1.mlp.down_proj": MapShape("hadamard", (1, 96, 1)),
    "model.layers.2.input_layernorm": MapShape("blocks", (1, 64)),
}


def test_what_runs_is_for_this_format_and_goes_with_packed_weights() -> None:
    layout = replace(tiny_layout(everywhere(scheme("w4a16"))), online=ONLINE)
    format, _, notes = choose_format(layout)
    assert format is native
    assert "no maps that run (model.layers.0.input_layernorm)" in notes[0]
    unpacked = replace(tiny_layout(everywhere(scheme("w16a4"))), online=ONLINE)
    with pytest.raises(RecipeError, match="would drop them unseen"):
        choose_format(unpacked)


def test_what_runs_comes_back() -> None:
    layout = tiny_layout(everywhere(scheme("w4a16")))
    choice = native.choose(layout)
    assert not isinstance(choice, Refusal)
    assert "online" not in native.config(layout, choice)
    assert native.read_online(native.config(layout, choice)) == {}
    config = json.loads(json.dumps(native.config(replace(layout, online=ONLINE), choice)))
    assert len(config["online"]) == 2
    assert native.read_online(config) == ONLINE


@pytest.mark.parametrize(
    "damaged",
    [
        None,
        3,
        [{}],
        [{"kind": "blocks", "shape": [0, 64], "modules": []}],
        [{"kind": "blocks", "shape": ["one", 64], "modules": []}],
        [{"kind": "hadamard", "shape": [1, 64], "modules": []}],
        [{"kind": "hadamard", "shape": [1, 6, 1], "modules": []}],
    ],
)
def test_what_runs_and_is_damaged(damaged: object) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        native.read_online({"online": damaged})


def test_config_comes_back() -> None:
    layout = tiny_layout(by_depth(scheme("wnf4a16q4kv8"), scheme("w3a8g32")))
    choice = native.choose(layout)
    assert not isinstance(choice, Refusal)
    config = json.loads(json.dumps(native.config(layout, choice)))
    linears, attention = native.read_config(config)
    assert {name: scheme.notation for name, scheme in linears.items()} == {
        name: "wnf4a16" if ".0." in name else "w3a8g32" for name in layout.linears
    }
    assert attention == {
        "model.layers.0.self_attn": layout.attention["model.layers.0.self_attn"].scheme.model_copy(
            update={"weight": None}
        )
    }


@settings(max_examples=150, deadline=None)
@given(weights(["int", "int", "fp8_e4m3", "nf4", "mxfp4", "nvfp4"]))
def test_tensors_come_back(tensor: QuantizedTensor) -> None:
    form = WeightFormat(native.NAME, tensor.scheme.granularity)
    tensors = native.to_tensors("layer", tensor, form)
    assert all(value.is_contiguous() for value in tensors.values())
    assert tensors["layer.weight"].shape != tensor.shape  # see test_does_not_load_without_bitfold
    assert_same_tensor(native.from_tensors("layer", tensors, tensor.scheme, form), tensor)


@pytest.mark.parametrize(
    ("dim", "entries", "books"), [(1, 4, 1), (2, 16, 4), (3, 5, 2), (4, 200, 8), (4, 256, 1)]
)
def test_codebooks_come_back(dim: int, entries: int, books: int) -> None:
    shape = CodebookShape(dim=dim, entries=entries, books=books)
    scheme = TensorScheme(grid="codebook", bits=2, codebook=shape)
    codes = torch.arange(7 * 24).remainder(entries).view(7, 24).to(torch.uint8)
    codebook = torch.randint(-127, 128, (books, entries, dim)).to(torch.int8)
    tensor = QuantizedTensor(codes, torch.rand(7, 1).bfloat16(), None, scheme, codebook=codebook)
    form = WeightFormat(native.NAME, "channel")
    tensors = native.to_tensors("layer", tensor, form)
    assert tensors["layer.weight"].dtype == torch.int32
    assert_same_tensor(native.from_tensors("layer", tensors, scheme, form), tensor)
    again = TensorScheme.model_validate(json.loads(scheme.model_dump_json(exclude_none=True)))
    assert again == scheme


def test_codebooks_are_not_for_compressed_tensors() -> None:
    shape = CodebookShape(dim=2, entries=16)
    weight = TensorScheme(grid="codebook", bits=2, codebook=shape)
    refusal = compressed_tensors.choose(tiny_layout(everywhere(Scheme(weight=weight))))
    assert isinstance(refusal, Refusal)
    assert "no codebooks" in refusal.reason
