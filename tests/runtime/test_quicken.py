"""Models in quick forms: the artifact's text, closer to float64 than bfloat16 is, and no weight in two forms."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.errors import RecipeError
from bitfold.evaluate import generate
from bitfold.runtime.load import load, load_tokenizer
from bitfold.runtime.quantized_linear import QuantizedLinear
from bitfold.runtime.quick_int4 import no_int4
from bitfold.runtime.quick_int8 import no_int8
from bitfold.runtime.quick_loading import load_quick
from bitfold.runtime.quicken import forms_of, quicken

LAYERS = 42
SCHEMES = {
    "w4a16g128": {"int4": LAYERS, "half": 1},
    "w3a16g64": {"int4": LAYERS, "half": 1},
    "w8a16": {"int8": LAYERS, "half": 1},
    "w8a8": {"int8": LAYERS, "half": 1},
    "w4a4": {"int8": LAYERS, "half": 1},
}
PROMPTS = ("Once upon a time", "The history of the city", "In 1905")

pytestmark = pytest.mark.skipif(
    no_int4(bitfold.Scheme.parse("w4a16g32"), (64, 64), torch.bfloat16) is not None
    or no_int8(bitfold.Scheme.parse("w8a8")) is not None,
    reason="no quick forms on this machine",
)


@pytest.fixture(scope="module", params=SCHEMES)
def artifact(request, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("quick") / request.param
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme=request.param)
    return out


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@torch.no_grad()
def logits(model, tokens: int = 100):
    ids = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.double()


def test_it_is_closer_than_bfloat16(artifact):
    exact = logits(load(artifact, device="cpu", dtype="float64"))
    quick, layers = load_quick(artifact, device="cpu")
    assert forms_of(layers) == SCHEMES[artifact.name]
    plain = logits(load(artifact, device="cpu", dtype="bfloat16"))
    error, of_plain = ((one - exact).norm() / exact.norm() for one in (logits(quick), plain))
    assert error <= of_plain
    if artifact.name != "w4a4":  # a code of 4 bits that flips is a large step
        assert error <= 0.01


def test_it_writes_the_artifacts_text(artifact, tokenizer):
    exact = load(artifact, device="cpu")
    if artifact.name == "w4a16g128" and not torch.cpu._is_vnni_supported():
        pytest.skip("at one near tie another token follows from AVX2's order of sums")
    for prompt in PROMPTS if artifact.name != "w4a4" else ():
        wanted = generate(exact, prompt, tokenizer=tokenizer, max_new_tokens=24)
        found = generate(artifact, prompt, max_new_tokens=24, device="cpu")
        assert found.tokens == wanted.tokens
        assert found.forms == SCHEMES[artifact.name]
        assert found.to_json()["prompt_tokens_per_second"] > 0


def test_no_weight_is_held_in_two_forms(artifact):
    quick, layers = load_quick(artifact, device="cpu")
    dense = dict(load(artifact).named_modules())
    for layer in layers:
        if layer.form == "int4":
            module = quick.get_submodule(layer.name)
            held = sum(value.nbytes for value in module.state_dict().values())
            # Codes, scale and zero-point of a group, what the latter loses; places of channels.
            weight = dense[layer.name].weight
            assert held <= weight.numel() * (0.5 + 9 / 64) + 8 * len(weight)
        assert not list(quick.get_submodule(layer.name).parameters())
    embedding = quick.get_input_embeddings().weight
    assert embedding.dtype == torch.bfloat16
    assert quick.dtype == torch.float32


def test_after_loading(artifact):
    """The same layers, and the same numbers, as straight from the files."""
    model = load(artifact, device="cpu")
    layers = quicken(model)
    straight, others = load_quick(artifact, device="cpu")
    assert forms_of(layers) == forms_of(others)
    assert torch.equal(logits(model), logits(straight))


def test_bfloat16(artifact):
    model, _ = load_quick(artifact, device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    exact = logits(load(artifact, device="cpu", dtype="float64"))
    assert (logits(model) - exact).norm() <= 0.5 * exact.norm()


def test_loading_for_evaluation_is_exact(artifact):
    """What evaluation and verification load has no quick forms."""
    bitfold.verify(artifact)
    kinds = {type(module) for module in load(artifact).modules()}
    assert not [kind for kind in kinds if kind.__module__.startswith("bitfold.runtime.quick_")]


def test_what_has_no_form_runs_as_it_was_loaded(tmp_path):
    bitfold.quantize(DEMO_MODEL, tmp_path / "nf4", method="rtn", scheme="wnf4a16g64")
    model, layers = load_quick(tmp_path / "nf4", device="cpu")
    assert forms_of(layers) == {"as loaded": LAYERS, "half": 1}
    assert isinstance(model.get_submodule(layers[0].name), QuantizedLinear)
    found = generate(tmp_path / "nf4", PROMPTS[0], max_new_tokens=8, device="cpu")
    assert found.form_notes == (
        f"{LAYERS} layers run as they were loaded ({layers[0].name}): "
        "only weights that are all integers have a quick form.",
    )


def test_maps_that_run_still_run(tmp_path):
    bitfold.quantize(DEMO_MODEL, tmp_path / "out", method="quarot", scheme="w4a4")
    exact, (quick, layers) = load(tmp_path / "out"), load_quick(tmp_path / "out", device="cpu")
    assert forms_of(layers) == {"int8": LAYERS, "half": 1}
    found, wanted = logits(quick), logits(exact)
    assert (found - wanted).norm() <= 0.1 * wanted.norm()


def test_an_original_is_left_alone():
    model, layers = load_quick(DEMO_MODEL, device="cpu")
    assert layers == []
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    assert generate(DEMO_MODEL, PROMPTS[0], max_new_tokens=2).forms == {}


def test_weights_that_were_changed_are_left_alone(tmp_path):
    bitfold.quantize(DEMO_MODEL, tmp_path / "out", method="rtn", scheme="w4a16g128")
    model = load(tmp_path / "out", device="cpu")
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        model.get_submodule(name).weight[0, 0] += 1
    hooked = "model.layers.1.mlp.up_proj"
    model.get_submodule(hooked).register_forward_hook(lambda *args: None)
    left = {layer.name: layer.why for layer in quicken(model) if layer.form is None}
    assert left == {
        name: "its weight is not the one that the files hold",
        hooked: "something runs before or behind it",
    }


def test_refusals(tmp_path):
    model = load(DEMO_MODEL, device="cpu")
    with pytest.raises(RecipeError, match="is none"):
        quicken(model, tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="for the CPU only: load it with"):
        quicken(model.to("meta"))


def test_the_command_line_says_what_ran(artifact, capsys):
    from typer.testing import CliRunner

    from bitfold.cli import app

    arguments = ["generate", str(artifact), "--prompt", PROMPTS[0], "--max-new-tokens", "3"]
    said = [CliRunner().invoke(app, [*arguments, *more, "--json"]) for more in ([], ["--exact"])]
    quick, exact = (json.loads(one.stdout) for one in said)
    assert quick["forms"] == SCHEMES[artifact.name]
    assert exact["forms"] == {}
