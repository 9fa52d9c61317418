"""The loss of which rotations are learned, and its gradient, are those of the whole turned model by one graph."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import bitfold
from bitfold.errors import DataError
from bitfold.models.family import ValueOutput
from bitfold.models.skeleton import Skeleton
from bitfold.numerics.straight_through import fake_quantize_trainable
from bitfold.pipeline import bases as learning
from bitfold.pipeline.bases import Turning
from bitfold.pipeline.estimate import Estimate
from bitfold.pipeline.hooks import quantizing
from bitfold.pipeline.job import Job, prepare
from bitfold.pipeline.rewrite import rewrite_block
from bitfold.pipeline.turned import TurnedSkeleton
from bitfold.recipe import Recipe
from bitfold.transforms import fold
from bitfold.transforms.rotation import Rotation
from bitfold.transforms.spinquant import tangent
from bitfold.transforms.stream import rotate_stream
from models_zoo import TOKENS as ALL_TOKENS
from models_zoo import Zoo

WINDOWS = torch.tensor([1, 0])
# Without those that pad: PyTorch's embedding gives their rows no gradient, which the reference would lack.
TOKENS = ALL_TOKENS.clamp(min=2)
F64 = torch.float64


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", TOKENS.repeat(4, 1).numpy())
    return tmp_path / "ids.npy"


def turning_of(
    model: Path,
    scheme: str,
    ids: Path,
    *settings: str,
    method: str = "rotation",
    dtype: str = "float64",
) -> tuple[Job, Turning]:
    parts = ("rotation.heads=true", "rotation.steps=2")
    job = prepare(
        str(model),
        ids.parent / "out",
        Recipe.make(method, scheme, set=[*parts, *settings]),
        calibration=[ids],
        samples=2,
        sequence_length=None,
        device="cpu",
        dtype=dtype,
    )
    rotation = job.plan.recipe.stream_transform
    assert isinstance(rotation, Rotation)
    assert isinstance(job.skeleton, TurnedSkeleton)
    return job, Turning(job, job.skeleton, rotation)


def whole(job: Job, turning: Turning, rotation: Rotation) -> Tensor:
    """The loss by one graph: every weight of the model turned at once, values by one block-diagonal matrix."""
    plain, plan = Skeleton(job.skeleton.checkpoint), job.plan
    stream = plain.family.stream(plain.config)
    assert stream is not None
    stored = plain.checkpoint.read(list(plain.sources.values()), device="cpu", dtype=F64)
    weights = {name: stored[source] for name, source in plain.sources.items()}
    count = len(plain.blocks)
    turned = rotate_stream(weights, plain.family, stream, plan.sites, count, turning.stream)
    hidden = job.skeleton.embed(_outer(turned, plain), TOKENS[WINDOWS])
    exact = plain.embed(_outer(weights, plain), TOKENS[WINDOWS])
    site = next(site for site in plan.sites if isinstance(site, ValueOutput))
    for index in range(count):
        block, start = _block(turned, plain, index), _block(weights, plain, index)
        across = torch.block_diag(*turning.heads[index])
        block[f"{site.value}.weight"] = across @ block[f"{site.value}.weight"]
        if f"{site.value}.bias" in block:
            block[f"{site.value}.bias"] = across @ block[f"{site.value}.bias"]
        every = turning.heads[index].repeat_interleave(plan.heads.shared, dim=0)
        block[f"{site.output}.weight"] = block[f"{site.output}.weight"] @ torch.block_diag(*every).T
        maps = plan.block_maps(plain.block_name(index))
        for place in plan.sites:
            if place.runs_at in maps:
                map = rotation.running(place, maps[place.runs_at], turning.stream)
                assert map is not None
                block = fold(block, map, plan.heads)
        scheme = plan.block_schemes(plain.block_name(index))[site.value]
        activation, weight = scheme.activation, scheme.weight
        inputs = {}
        if activation is None:
            assert weight is not None
            for name in plain.family.linears:
                rounded = fake_quantize_trainable(block[f"{name}.weight"], weight)
                block[f"{name}.weight"] = rounded
        else:
            through = partial(fake_quantize_trainable, scheme=activation)
            inputs = dict.fromkeys(plain.family.linears, through)
        attention = plan.attention[f"{plain.block_name(index)}.{plain.family.attention}"]
        with quantizing(
            plain.blocks[index], inputs, plain.family.attention, attention, fake_quantize_trainable
        ):
            hidden = plain.run(index, block, hidden)
        exact = plain.run(index, start, exact)
    log_q = job.skeleton.head(_outer(turned, plain), hidden).log_softmax(-1)
    log_p = plain.head(_outer(weights, plain), exact).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _outer(weights: dict[str, Tensor], plain: Skeleton) -> dict[str, Tensor]:
    start = plain.family.blocks + "."
    return {name: value for name, value in weights.items() if not name.startswith(start)}


def _block(weights: dict[str, Tensor], plain: Skeleton, index: int) -> dict[str, Tensor]:
    start = plain.block_name(index) + "."
    return {n.removeprefix(start): v for n, v in weights.items() if n.startswith(start)}


@pytest.mark.parametrize("family", ["llama-biased", "qwen3", "gemma", "opt"])
@pytest.mark.parametrize(
    ("scheme", "online", "graphs"),
    [("w4a4", False, 2**30), ("w4a4q4kv4", True, 0), ("w3a16", False, 0)],
)
def test_loss_and_gradient_are_those_of_the_whole_model(
    family: str,
    scheme: str,
    online: bool,
    graphs: int,
    checkpoint: Zoo,
    ids: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitfold.pipeline.backward._GRAPHS", graphs)
    job, turning = turning_of(
        checkpoint(family, F64), scheme, ids, f"rotation.online={str(online).lower()}"
    )
    rotation = job.plan.recipe.stream_transform
    assert isinstance(rotation, Rotation)
    loss = turning.gradient(WINDOWS)
    bases = [turning.stream, *turning.heads]
    mine = [one.grad for one in bases]
    expected = whole(job, turning, rotation)
    wanted = torch.autograd.grad(expected, bases)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert turning.loss(WINDOWS) == pytest.approx(loss, rel=1e-6)
    keeps_ones = job.skeleton.family.name == "opt"
    for place, (found, right) in enumerate(zip(mine, wanted, strict=True)):
        assert found is not None
        # Gradients differ by what leaves the manifold; what counts is along it.
        along = tangent(bases[place].detach(), found, keeps_ones and place == 0)
        right = tangent(bases[place].detach(), right, keeps_ones and place == 0)
        assert (
            along - right
        ).norm() < 1e-5 * right.norm()  # transformers' norms compute in float32


def test_diagonals_inside_the_mlp_are_there_while_learning(checkpoint: Zoo, ids: Path) -> None:
    model = checkpoint("llama", F64)
    _, plain = turning_of(model, "w4a4", ids)
    _, balanced = turning_of(model, "w4a4", ids, method="rotation+smoothquant")
    before, after = plain._block(0), balanced._block(0)
    ratio = after["mlp.down_proj.weight"] / before["mlp.down_proj.weight"]
    assert not torch.allclose(ratio[0], torch.ones_like(ratio[0]))
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    torch.testing.assert_close(
        after["mlp.up_proj.weight"], before["mlp.up_proj.weight"] / ratio[0][:, None]
    )
    assert torch.equal(before["self_attn.q_proj.weight"], after["self_attn.q_proj.weight"])


def quantize(model: Path, out: Path, ids: Path, **more: Any) -> bitfold.Quantization:
    options = {"method": "spinquant", "scheme": "w4a4", "set": ["rotation.steps=4"], "samples": 6}
    result = bitfold.quantize(model, out, calibration=ids, **(options | more))
    assert isinstance(result, bitfold.Quantization)
    return result


def test_diagonals_of_two_parts_are_those_of_the_loop_over_blocks(
    checkpoint: Zoo, ids: Path
) -> None:
    """Each part is fitted to what the one before left."""
    model = checkpoint("llama", F64)
    _, turning = turning_of(model, "w4a4", ids, method="rotation+smoothquant+awq")
    job = prepare(
        str(model),
        ids.parent / "out",
        Recipe.make("smoothquant+awq", "w4a4"),
        calibration=[ids],
        samples=2,
        sequence_length=None,
        device="cpu",
        dtype=F64,
    )
    with torch.no_grad():
        plain, streams = job.skeleton.load_block(0, F64), job.start_streams()
        found = rewrite_block(job.skeleton, 0, job.plan, streams, plain, lambda *_: None)
    name = "mlp.down_proj.weight"
    ratio = (found.weights[name] / plain[name])[0]
    assert ratio.log().std() > 0.05
    torch.testing.assert_close((turning._block(0)[name] / plain[name])[0], ratio, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("method", "scheme"),
    [("rotation+flat", "w4a4kv4"), ("rotation+flat", "w4a4"), ("spinquant+awq", "w4a4")],
)
def test_rotations_are_learned_before_other_methods(
    method: str, scheme: str, checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    settings = ["rotation.steps=2"] + (["affine.epochs=0"] if "flat" in method else [])
    model = checkpoint("llama", torch.float32)
    result = quantize(model, tmp_path / "out", ids, method=method, scheme=scheme, set=settings)
    assert result.rotation is not None
    assert bitfold.verify(tmp_path / "out").difference == 0


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_run_in_half_precision_learns(
    stored: torch.dtype, checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    result = quantize(checkpoint("llama", stored), tmp_path / "out", ids, dtype="bfloat16")
    assert result.rotation is not None
    assert result.rotation["before"] > 0
    assert bitfold.verify(tmp_path / "out").difference < 0.1


def test_bfloat16_products_where_they_are_quick(
    checkpoint: Zoo, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only where they change the first loss little."""
    monkeypatch.setattr(learning, "has_fast_bfloat16", lambda device: True)
    for allowed, low in ((1e9, True), (0.0, False)):
        monkeypatch.setattr(learning, "_LARGEST_CHANGE", allowed)
        _, turning = turning_of(checkpoint("llama", torch.float32), "w4a4", ids, dtype="float32")
        exact = turning.loss(WINDOWS)
        assert turning.gradient(WINDOWS) == pytest.approx(exact, rel=0.2 if low else 1e-5)
        assert turning._low == low


def test_a_stream_that_takes_no_rotation_learns_none(
    checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    settings = ["rotation.steps=2", "rotation.where_possible=true"]
    result = quantize(checkpoint("gemma3", torch.float32), tmp_path / "out", ids, set=settings)
    assert result.rotation is None
    assert any("rotations are not learned" in note for note in result.notes)
    # That of heads is the one it would have without learning.
    settings[0] = "rotation.steps=0"
    quantize(checkpoint("gemma3", torch.float32), tmp_path / "plain", ids, set=settings)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert shards
    for file in shards:
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()


def test_that_it_learns_none_is_said_of_mixed_bits_too(
    checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    settings = ["rotation.steps=2", "rotation.where_possible=true"]
    model = checkpoint("gemma3", torch.float32)
    result = quantize(
        model, tmp_path / "out", ids, scheme="w4a16", bits=5.0, method="rotation", set=settings
    )
    assert sum("rotations are not learned" in note for note in result.notes) == 1


def test_a_width_without_a_hadamard_matrix_is_learned_and_recorded(
    ids: Path, tmp_path: Path
) -> None:
    """92: its random rotation comes from a factorization, whose tensors lie column by column."""
    config = LlamaConfig(
        **{"vocab_size": 96, "hidden_size": 92, "num_hidden_layers": 2, "intermediate_size": 96},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 46},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    settings = ["rotation.steps=2", "rotation.online=false", "activation.clipped=false"]
    result = quantize(tmp_path / "model", tmp_path / "out", ids, set=settings)
    assert result.rotation is not None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "opt"])
def test_an_artifact_computes_what_was_simulated(
    family: str, checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    result = quantize(checkpoint(family, torch.float32), tmp_path / "out", ids)
    assert result.rotation is not None
    assert result.rotation["steps"] == 4
    assert result.rotation["note"] in result.notes
    assert bitfold.verify(tmp_path / "out").difference == 0


def test_the_folded_form_loads_in_plain_transformers(
    checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    settings = ["rotation.steps=2", "rotation.online=false", "activation.clipped=false"]
    model = checkpoint("llama", torch.float32)
    result = quantize(model, tmp_path / "out", ids, set=settings)
    assert (result.format, result.online) == ("compressed-tensors", None)


def test_a_dry_run_learns_nothing(checkpoint: Zoo, ids: Path, tmp_path: Path) -> None:
    model, out = checkpoint("llama", torch.float32), tmp_path / "out"
    found = bitfold.quantize(
        model, out, calibration=ids, method="spinquant", scheme="w4a4", dry_run=True
    )
    assert isinstance(found, Estimate)
    assert found.disk_bytes > found.size_bytes + 64 * 64 * 8  # the rotations, while it grows
    assert not list(tmp_path.glob("*out*"))


def test_one_window_is_too_little(checkpoint: Zoo, ids: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one window, and rotations are learned on some"):
        quantize(checkpoint("llama", torch.float32), tmp_path / "out", ids, samples=1)
    with pytest.raises(DataError, match="more text, or --effort low"):
        quantize(
            *(checkpoint("llama", torch.float32), tmp_path / "out", ids),
            **{"samples": 1, "method": "affine-plus", "set": []},
        )
    assert not (tmp_path / "out").exists()


def test_a_killed_run_learns_only_once(
    checkpoint: Zoo, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "whole", ids)
    real, calls = learning.learned_bases, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return real(*arguments)

    def dies(done: float, total: int, what: str) -> None:
        if what.startswith(f"block {len(calls)} "):
            raise KeyboardInterrupt

    monkeypatch.setattr(learning, "learned_bases", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", ids, progress=dies)  # before the first block
    assert (tmp_path / ".out.partial" / "bases.safetensors").exists()
    quantize(model, tmp_path / "out", ids)
    assert calls == [1]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_damaged_bases_are_learned_again(
    damage: str, checkpoint: Zoo, ids: Path, tmp_path: Path
) -> None:
    model = checkpoint("llama", torch.float32)
    quantize(model, tmp_path / "whole", ids)

    def dies(done: float, total: int, what: str) -> None:
        if what.startswith("block 2 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", ids, progress=dies)
    file = tmp_path / ".out.partial" / "bases.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    file.write_bytes(content[:-8] if damage == "cut" else content)
    if damage == "gone":
        file.unlink()
    assert quantize(model, tmp_path / "out", ids).resumed_blocks == 0
    for name in ("model.safetensors.index.json", "report.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
