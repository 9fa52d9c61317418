"""A block on disk is the block in memory, and what is not is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitfold.errors import VerificationError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.shards import block_from_tensors, block_tensors, check_shard
from bitfold.pipeline.streams import Streams
from bitfold.recipe import Recipe
from models_zoo import TOKENS, Zoo

SCHEMES = {
    "w4a16g32": [],
    "w3a16": ["weight.symmetric=true"],
    "w8a8": ["activation.static=true"],
    "w4a4q4kv4": ["activation.static=true"],
    "wnf4a16g16": [],
    "wfp8afp8": [],
    "wmxfp4amxfp4": [],
    "wnvfp4anvfp4": [],
    "w16a8": [],
}


def quantized(path: Path, scheme: str) -> tuple[Skeleton, Plan, QuantizedBlock, Streams]:
    skeleton = Skeleton(Checkpoint(path))
    plan = make_plan(skeleton, Recipe.make("rtn", scheme, set=SCHEMES[scheme]))
    with torch.no_grad():
        outer = skeleton.load_outer(torch.float32)
        streams = Streams.start(skeleton, outer, TOKENS, TOKENS, keep_original=False)
    return skeleton, plan, quantize_block(skeleton, 1, plan, streams, torch.float32), streams


def stored(tensors: dict[str, Tensor], file: Path) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)
    return file


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_there_and_back(family: str, scheme: str, checkpoint: Zoo, tmp_path: Path) -> None:
    path = checkpoint(family, torch.bfloat16)
    skeleton, plan, block, streams = quantized(path, scheme)
    file = stored(block_tensors(skeleton, 1, plan, block), tmp_path / "shard")
    check_shard(file, skeleton, 1, plan, block)
    again = block_from_tensors(skeleton, 1, plan, load_file(file))
    hidden = streams.probe_quantized
    runs = [run_quantized(skeleton, 1, b, torch.float32)(hidden) for b in (block, again)]
    assert torch.equal(*runs)
    assert again.plain.keys() == block.plain.keys()
    assert again.inputs.keys() == block.inputs.keys()


@pytest.mark.parametrize("ending", ["weight_packed", "weight_scale", "weight_zero_point"])
def test_a_tensor_that_differs_is_named(ending: str, checkpoint: Zoo, tmp_path: Path) -> None:
    skeleton, plan, block, _ = quantized(checkpoint("llama", torch.bfloat16), "w4a16g32")
    tensors = block_tensors(skeleton, 1, plan, block)
    name = f"{skeleton.block_name(1)}.mlp.up_proj.{ending}"
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8).flatten()[3] ^= 1  # one bit
    file = stored(tensors, tmp_path / "shard")
    with pytest.raises(VerificationError, match=r"layers\.1\.mlp\.up_proj"):
        check_shard(file, skeleton, 1, plan, block)
