"""Quick forms of a head: on any processor that has products with float16, and only where nothing else runs at it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import bitfold
from bitfold.assets import DEMO_MODEL
from bitfold.runtime.load import load
from bitfold.runtime.quick_loading import load_quick
from bitfold.runtime.quick_outer import no_half
from bitfold.runtime.quicken import quicken

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"

pytestmark = pytest.mark.skipif(
    no_half(torch.ones(1, 1)) is not None, reason="no products with float16 on this machine"
)


@torch.no_grad()
def logits(model, tokens: int = 100):
    ids = torch.randint(4096, (1, tokens), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits.double()


def test_a_head_that_something_listens_to_is_left_alone(tmp_path):
    bitfold.quantize(DEMO_MODEL, tmp_path / "out", method="rtn", scheme="w8a8")
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model, heard = load(tmp_path / "out", device="cpu"), []
        getattr(model.get_output_embeddings(), register)(lambda *args: heard.append(1))  # noqa: B023
        head = quicken(model)[-1]
        assert (head.name, head.form) == ("lm_head", None)
        assert head.why == "something runs before or behind it"
        logits(model, 3)
        assert heard == [1]


@pytest.mark.parametrize(("tied", "static"), [(True, False), (False, False), (False, True)])
def test_a_head_whose_input_alone_is_quantized_is_left_alone(tmp_path, tied, static):
    """As others' checkpoints of compressed-tensors may have it."""
    out = tmp_path / "out"
    bitfold.quantize(DEMO_MODEL, out, method="rtn", scheme="w8a8")
    config = json.loads((out / "config.json").read_text())
    settings = config["quantization_config"]
    every = settings["config_groups"]["group_0"]
    every["targets"] = ["re:.*_proj$"]
    alone = {"weights": None, "format": "dense", "targets": ["re:lm_head$"]}
    if static:
        alone["input_activations"] = every["input_activations"] | {
            "dynamic": False,
            "strategy": "tensor",
        }
    settings["config_groups"]["group_1"] = every | alone
    settings["ignore"] = []
    config["tie_word_embeddings"] = tied
    if not tied:
        (shard,) = (file for file in out.glob("*.safetensors") if EMBEDDING in load_file(file))
        tensors = load_file(shard)
        added = {"lm_head.weight": tensors[EMBEDDING].clone()}
        if static:
            added["lm_head.input_scale"] = torch.tensor([0.03], dtype=torch.bfloat16)
        save_file(tensors | added, shard, metadata={"format": "pt"})
        index = json.loads((out / INDEX).read_text())
        index["weight_map"] |= dict.fromkeys(added, shard.name)
        (out / INDEX).write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config))
    wanted = logits(load(out, device="cpu", dtype="float32"))
    quick, layers = load_quick(out, device="cpu")
    (head,) = (layer for layer in layers if layer.name == "lm_head")
    assert head.form is None
    assert head.why == (
        "its input alone is quantized" if static else "something runs before or behind it"
    )
    # What the head would give without the rounding of its input, from layers that are quick or not: as much further.
    plain, bare = load(out, device="cpu", dtype="float32"), load_quick(out, device="cpu")[0]
    for model in (plain, bare):
        del model.lm_head.forward
    rounding = (logits(plain) - wanted).norm()
    assert 0.7 < (logits(bare) - logits(quick)).norm() / rounding < 1.4
