"""What is said in compressed-tensors loads in plain transformers, to the bit of the simulation."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_artifacts import (
    Quantized,
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
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitfold
from bitfold.export import compressed_tensors
from bitfold.export.layout import Choice, LayerEntry, Layout, Refusal
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme
from models_zoo import Zoo

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


PER_TENSOR = TensorScheme(bits=4, symmetric=False, granularity="tensor")
STATIC_HEADS = TensorScheme(bits=4, symmetric=False, granularity="tensor", static=True)
PACKED, ONE_BYTE, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
MXFP4, NVFP4 = ("mxfp4-pack-quantized", "group"), ("nvfp4-pack-quantized", "tensor_group")

# name: (schemes, (format, strategy of its scales) of the layers, whether it is dequantized at once)
CASES: dict[str, tuple[SchemeOf, set[tuple[str, str]], bool]] = {
    **{
        f"w{bits}a16{group}": (
            everywhere(scheme(f"w{bits}a16{group}")),
            {(PACKED, "group" if group else "channel")},
            True,
        )
        for bits in (2, 3, 4, 5, 8)
        for group in ("", "g32")
    },
    **{
        f"w{bits}a16{group} symmetric": (
            everywhere(scheme(f"w{bits}a16{group}", symmetric=True)),
            {(PACKED, "group" if group else "channel")},
            False,
        )
        for bits in (2, 3, 4, 5, 8)
        for group in ("", "g32")
    },
    "w4a16 narrow": (
        everywhere(scheme("w4a16", symmetric=True, narrow=True)),
        {(PACKED, "channel")},
        False,
    ),
    "w4a16 per tensor": (everywhere(Scheme(weight=PER_TENSOR)), {(PACKED, "tensor")}, True),
    "w4a8 per tensor": (
        everywhere(Scheme(weight=PER_TENSOR, activation=scheme("w8a8").activation)),
        {(PACKED, "tensor")},
        False,
    ),
    "w8a8": (everywhere(scheme("w8a8")), {(ONE_BYTE, "channel")}, False),
    "w8a8 symmetric": (
        everywhere(scheme("w8a8", symmetric=True)),
        {(ONE_BYTE, "channel")},
        False,
    ),
    "w8a8 static": (everywhere(scheme("w8a8", static=True)), {(ONE_BYTE, "channel")}, False),
    "w8a8 symmetric static": (
        everywhere(scheme("w8a8", symmetric=True, static=True)),
        {(ONE_BYTE, "channel")},
        False,
    ),
    "w4a8": (everywhere(scheme("w4a8")), {(PACKED, "block")}, False),
    "w4a8g32": (everywhere(scheme("w4a8g32")), {(PACKED, "block")}, False),
    "w4a8 symmetric": (everywhere(scheme("w4a8", symmetric=True)), {(PACKED, "channel")}, False),
    "w3a8": (everywhere(scheme("w3a8")), {(PACKED, "block")}, False),
    "w4a4": (everywhere(scheme("w4a4")), {(PACKED, "block")}, False),
    "w4a4 symmetric": (everywhere(scheme("w4a4", symmetric=True)), {(PACKED, "channel")}, False),
    "w4a4 static": (everywhere(scheme("w4a4", static=True)), {(PACKED, "block")}, False),
    "w4a4q4kv4": (everywhere(scheme("w4a4q4kv4")), {(PACKED, "block")}, False),
    "w4a4q4kv4g32 symmetric": (
        everywhere(scheme("w4a4q4kv4g32", symmetric=True)),
        {(PACKED, "group")},
        False,
    ),
    "w4a16kv4": (everywhere(scheme("w4a16kv4")), {(PACKED, "block")}, False),
    "w8a16kv8": (everywhere(scheme("w8a16kv8")), {(ONE_BYTE, "channel")}, False),
    "w4a16kvfp8": (everywhere(scheme("w4a16kvfp8")), {(PACKED, "block")}, False),
    "w16a8": (everywhere(scheme("w16a8")), {("dense", "")}, False),
    "w16a16kv4": (everywhere(scheme("w16a16kv4")), set(), False),
    "w16a16q4kv4": (everywhere(scheme("w16a16q4kv4")), set(), False),
    "wfp8a16": (everywhere(scheme("wfp8a16")), {(FLOAT, "channel")}, False),
    "wfp8a16g32": (everywhere(scheme("wfp8a16g32")), {(FLOAT, "group")}, False),
    "wfp8afp8": (everywhere(scheme("wfp8afp8")), {(FLOAT, "channel")}, False),
    "wfp8afp8 static": (everywhere(scheme("wfp8afp8", static=True)), {(FLOAT, "channel")}, False),
    "w4afp8 symmetric": (
        everywhere(scheme("w4afp8", symmetric=True)),
        {(PACKED, "channel")},
        False,
    ),
    "wfp8a8": (everywhere(scheme("wfp8a8")), {(FLOAT, "channel")}, False),
    "wmxfp4a16": (everywhere(scheme("wmxfp4a16")), {MXFP4}, True),
    "wnvfp4a16": (everywhere(scheme("wnvfp4a16")), {NVFP4}, True),
    "w16amxfp4": (everywhere(scheme("w16amxfp4")), {("dense", "")}, False),
    "w16anvfp4": (everywhere(scheme("w16anvfp4")), {("dense", "")}, False),
    "w4amxfp4 symmetric": (
        everywhere(scheme("w4amxfp4", symmetric=True)),
        {(PACKED, "channel")},
        False,
    ),
    "w4anvfp4g32": (everywhere(scheme("w4anvfp4g32")), {(PACKED, "block")}, False),
    "wnvfp4a16 and w16a16": (by_kind(scheme("wnvfp4a16"), Scheme()), {NVFP4}, True),
    "w4a16 and w8a8": (
        by_kind(scheme("w4a16"), scheme("w8a8")),
        {(PACKED, "block"), (ONE_BYTE, "channel")},
        False,
    ),
    "w4a16 and w3a16g32": (
        by_kind(scheme("w4a16"), scheme("w3a16g32")),
        {(PACKED, "block")},
        False,
    ),
    "w4a16 and w16a16": (by_kind(scheme("w4a16"), Scheme()), {(PACKED, "channel")}, True),
    "w4a4q4kv4 and w8a8q8kv8": (
        by_depth(scheme("w4a4q4kv4"), scheme("w8a8q8kv8")),
        {(PACKED, "block"), (ONE_BYTE, "channel")},
        False,
    ),
    "w4a16g32 and symmetric": (
        by_depth(scheme("w4a16g32"), scheme("w4a16g32", symmetric=True)),
        {(PACKED, "block"), (PACKED, "group")},
        False,
    ),
}


def assert_exact(quantized: Quantized, out: Path, dtype: torch.dtype) -> Choice:
    """The artifact loaded in `dtype` computes what the simulation in `dtype` does, and no less."""
    choice = write(quantized, out, compressed_tensors)
    loaded = logits(load(out, dtype=dtype))
    assert torch.equal(loaded, logits(simulate(quantized, choice, dtype)))
    plain = AutoModelForCausalLM.from_pretrained(quantized.checkpoint, dtype=dtype)
    assert (loaded - logits(plain)).abs().max() > 0.02
    if quantizes_at_run_time(quantized.layout):
        weights_only = simulate(without_activations(quantized), choice, dtype)
        assert (loaded - logits(weights_only)).abs().max() > 0.02
    return choice


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", FLOAT32), ("llama", BFLOAT16), ("qwen2", BFLOAT16), ("opt", FLOAT32)],
    ids=["llama-float32", "llama-bfloat16", "qwen2-bfloat16", "opt-float32"],
)
@pytest.mark.parametrize("case", CASES)
def test_loads_exactly(
    case: str, family: str, dtype: torch.dtype, checkpoint: Zoo, tmp_path: Path
) -> None:
    scheme_of, formats, dequantize = CASES[case]
    choice = assert_exact(
        quantize(checkpoint(family, dtype), scheme_of), tmp_path / "artifact", dtype
    )
    assert {(form.name, form.strategy) for form in choice.formats.values()} == formats
    assert choice.dequantize == dequantize


# Weights that come out in bfloat16 whatever the model runs in: said only of a checkpoint in bfloat16.
IN_BFLOAT16: dict[str, tuple[SchemeOf, set[tuple[str, str]]]] = {
    "wmxfp4amxfp4": (everywhere(scheme("wmxfp4amxfp4")), {MXFP4}),
    "wnvfp4anvfp4": (everywhere(scheme("wnvfp4anvfp4")), {NVFP4}),
    "wmxfp4a8": (everywhere(scheme("wmxfp4a8")), {MXFP4}),
    "wnvfp4afp8 static": (everywhere(scheme("wnvfp4afp8", static=True)), {NVFP4}),
    "wnvfp4a16q4kv4": (everywhere(scheme("wnvfp4a16q4kv4")), {NVFP4}),
    "wmxfp4a16 and w4a16g32": (
        by_kind(scheme("wmxfp4a16"), scheme("w4a16g32", symmetric=True)),
        {MXFP4, (PACKED, "group")},
    ),
    "wmxfp4amxfp4 and wnvfp4anvfp4": (
        by_depth(scheme("wmxfp4amxfp4"), scheme("wnvfp4anvfp4")),
        {MXFP4, NVFP4},
    ),
}


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2"])
@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_loads_exactly_in_bfloat16(case: str, family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    scheme_of, formats = IN_BFLOAT16[case]
    choice = assert_exact(
        quantize(checkpoint(family, BFLOAT16), scheme_of), tmp_path / "artifact", BFLOAT16
    )
    assert {(form.name, form.strategy) for form in choice.formats.values()} == formats
    assert not choice.dequantize
    # bitfold's own loader casts them to the dtype that it is asked for.
    quantized = quantize(checkpoint(family, BFLOAT16), scheme_of)
    loaded = logits(bitfold.load(tmp_path / "artifact", dtype="float32"))
    assert torch.equal(loaded, logits(simulate(quantized, choice, FLOAT32)))


@pytest.mark.parametrize("case", IN_BFLOAT16)
@pytest.mark.parametrize("storage", [torch.float32, torch.float16])
def test_refuses_what_only_bfloat16_can_run(case: str, storage: torch.dtype) -> None:
    layout = replace(tiny_layout(IN_BFLOAT16[case][0]), storage=storage)
    answer = compressed_tensors.choose(layout)
    assert isinstance(answer, Refusal)
    assert f"this checkpoint is in {str(storage)[6:]} (model.layers.0.self_attn" in answer.reason
    assert isinstance(compressed_tensors.choose(replace(layout, storage=BFLOAT16)), Choice)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma", "opt-350m"])
@pytest.mark.parametrize("case", ["w4a16g32", "w4a4q4kv4", "w4a16kv4"])
def test_other_families(case: str, family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint(family, FLOAT32), CASES[case][0])
    assert_exact(quantized, tmp_path / "artifact", FLOAT32)


@pytest.mark.parametrize(
    "case", ["w4a16g32", "w4a4q4kv4", "w8a8 static", "wfp8afp8", "wnvfp4a16", "wmxfp4a16"]
)
def test_bfloat16_checkpoint_in_float32(case: str, checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint("llama", BFLOAT16), CASES[case][0])
    assert_exact(quantized, tmp_path / "artifact", FLOAT32)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_generates_with_a_cache(family: str, checkpoint: Zoo, tmp_path: Path) -> None:
    quantized = quantize(checkpoint(family, FLOAT32), everywhere(scheme("w4a4q4kv4")))
    choice = write(quantized, tmp_path / "artifact", compressed_tensors)
    prompt = torch.arange(10).reshape(1, 10)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        load(tmp_path / "artifact").generate(prompt, **options),
        simulate(quantized, choice, FLOAT32).generate(prompt, **options),
    )


def test_flattened_inputs_matter(checkpoint: Zoo, tmp_path: Path) -> None:
    """OPT's fc1 and fc2 are given [tokens, features], which a `token` would take for one token."""
    quantized = quantize(checkpoint("opt", FLOAT32), everywhere(scheme("w4a4")))
    choice = write(quantized, tmp_path / "artifact", compressed_tensors)
    expected = logits(simulate(quantized, choice, FLOAT32))
    config_file = tmp_path / "artifact" / "config.json"
    text = config_file.read_text()
    for group in json.loads(text)["quantization_config"]["config_groups"].values():
        flat = any("fc" in target for target in group["targets"])
        assert (group["input_activations"]["strategy"] == "group") == flat
    config = json.loads(text)
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] |= {"strategy": "token", "group_size": None}
    config_file.write_text(json.dumps(config))
    assert not torch.equal(logits(load(tmp_path / "artifact")), expected)


SUBPROCESS = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(int(sys.argv[1]))
tokens = torch.arange(2 * 24).reshape(2, 24).mul(37).remainder(96)
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        save_file({"logits": model(tokens).logits}, directory + "/logits.safetensors")
assert not any(name.split(".")[0] == "bitfold" for name in sys.modules)
"""


def test_without_bitfold(checkpoint: Zoo, tmp_path: Path) -> None:
    """In a process that cannot even import bitfold."""
    wanted: dict[Path, Tensor] = {}
    for family, case, dtype in [
        ("llama", "w4a16g32", BFLOAT16),
        ("llama", "w4a4q4kv4", FLOAT32),
        ("qwen2", "w8a8 static", FLOAT32),
        ("opt", "w4a4q4kv4", BFLOAT16),
        ("opt", "w3a16g32 symmetric", FLOAT32),
        ("llama", "wnvfp4a16", FLOAT32),
        ("qwen2", "wmxfp4a16", BFLOAT16),
    ]:
        quantized = quantize(checkpoint(family, dtype), CASES[case][0])
        out = tmp_path / f"{family} {case}"
        wanted[out] = logits(simulate(quantized, write(quantized, out, compressed_tensors), dtype))
    subprocess.run(
        [sys.executable, "-c", SUBPROCESS, str(torch.get_num_threads()), *map(str, wanted)],
        check=True,
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    for out, expected in wanted.items():
        assert torch.equal(load_file(out / "logits.safetensors")["logits"], expected), out


TOKEN4 = TensorScheme(bits=4, symmetric=False, granularity="token")
TOKEN8 = TensorScheme(bits=8, symmetric=False, granularity="token")
REFUSED = {
    "nf4": (everywhere(scheme("wnf4a16")), "nf4"),
    "q4kv8": (everywhere(scheme("w4a4q4kv8")), "one scheme for queries, keys and values"),
    "k4v8": (everywhere(Scheme(key=TOKEN4, value=TOKEN8)), "one scheme for keys and values"),
    "keys only": (everywhere(Scheme(key=TOKEN4)), "one scheme for keys and values"),
    "queries only": (everywhere(Scheme(query=TOKEN4)), "queries, keys and values"),
    "queries in one layer": (by_depth(scheme("w4a4q4kv4"), scheme("w4a4kv4")), "every layer"),
    "kv per layer": (by_depth(scheme("w4a16kv4"), scheme("w4a16kv8")), "all layers"),
    "kv in one layer": (by_depth(scheme("w4a16kv4"), scheme("w4a16")), "all layers"),
    "kv per tensor": (
        everywhere(Scheme(key=STATIC_HEADS, value=STATIC_HEADS)),
        "only per token or group, and dynamic",
    ),
    "keys in mxfp4": (everywhere(scheme("w4a16kvmxfp4")), "mxfp4 for weights and inputs only"),
    "narrow activation": (
        everywhere(
            Scheme(activation=TensorScheme(bits=8, narrow=True, granularity="token")),
        ),
        "narrow",
    ),
    "activation per channel": (everywhere(Scheme(activation=TensorScheme(bits=8))), "per channel"),
    "static per group": (
        everywhere(
            Scheme(
                activation=TensorScheme(granularity="group", group_size=32, static=True),
            )
        ),
        "one scale per tensor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_it_cannot_say(case: str) -> None:
    scheme_of, words = REFUSED[case]
    answer = compressed_tensors.choose(tiny_layout(scheme_of))
    assert isinstance(answer, Refusal)
    assert words in answer.reason


def config_of(layout: Layout) -> dict:
    choice = compressed_tensors.choose(layout)
    assert isinstance(choice, Choice)
    return compressed_tensors.config(layout, choice)


def targets_of(config: dict) -> list[list[str]]:
    return [group["targets"] for group in config["config_groups"].values()]


def test_targets() -> None:
    w4, w8 = scheme("w4a16"), scheme("w8a8")
    uniform = config_of(tiny_layout(everywhere(w4)))
    assert targets_of(uniform) == [["Linear"]]
    assert uniform["ignore"] == ["lm_head"]
    assert uniform["format"] == PACKED
    mixed = config_of(tiny_layout(by_kind(w4, w8)))
    assert targets_of(mixed) == [
        [
            r"re:model\.layers\.[0-9]+\.self_attn\.q_proj$",
            r"re:model\.layers\.[0-9]+\.self_attn\.o_proj$",
        ],
        [r"re:model\.layers\.[0-9]+\.mlp\.down_proj$"],
    ]
    assert mixed["format"] == "mixed-precision"
    odd = config_of(tiny_layout(lambda name: w8 if name == "model.layers.1.mlp.down_proj" else w4))
    assert targets_of(odd)[1] == ["model.layers.1.mlp.down_proj"]
    assert "model.layers.2.mlp.down_proj" in targets_of(odd)[0]


def test_attention_targets() -> None:
    kv = config_of(tiny_layout(everywhere(scheme("w4a16kv4"))))
    assert kv["kv_cache_scheme"]["group_size"] == 16
    assert targets_of(kv) == [["Linear"]]
    qkv = config_of(tiny_layout(everywhere(scheme("w4a4q4kv4"))))
    assert qkv["kv_cache_scheme"] is None
    assert targets_of(qkv) == [["Linear"], ["LlamaAttention"]]
    per_layer = config_of(tiny_layout(by_depth(scheme("w4a4q4kv4"), scheme("w4a4q8kv8"))))
    assert targets_of(per_layer)[1:] == [
        ["model.layers.0.self_attn"],
        ["model.layers.1.self_attn", "model.layers.2.self_attn"],
    ]


def test_extra_config() -> None:
    opt, llama = {"num_attention_heads": 12}, {"num_attention_heads": 4, "num_key_value_heads": 2}
    quantizing = tiny_layout(everywhere(scheme("w4a16kv4")))
    assert compressed_tensors.extra_config(quantizing, opt) == {"num_key_value_heads": 12}
    assert compressed_tensors.extra_config(quantizing, llama) == {}
    assert compressed_tensors.extra_config(tiny_layout(everywhere(scheme("w4a8"))), opt) == {}


@settings(max_examples=150, deadline=None)
@given(weights(["int", "int", "fp8_e4m3", "mxfp4", "nvfp4"]), st.booleans())
def test_tensors_come_back(tensor: QuantizedTensor, with_activation: bool) -> None:
    scheme = Scheme(weight=tensor.scheme, activation=TOKEN8 if with_activation else None)
    layout = Layout({"layer": LayerEntry(scheme, tensor.shape[1])}, storage=BFLOAT16)
    choice = compressed_tensors.choose(layout)
    assert isinstance(choice, Choice)
    form = choice.formats["layer"]
    tensors = compressed_tensors.to_tensors("layer", tensor, form)
    assert all(value.is_contiguous() for value in tensors.values())
    back = compressed_tensors.from_tensors("layer", tensors, tensor.scheme, form)
    assert_same_tensor(back, tensor)
