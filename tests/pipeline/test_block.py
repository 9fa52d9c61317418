"""One quantized block against simulations that share nothing with the pipeline."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitfold.errors import EquivalenceError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.family import FcPair, NormSite, Site
from bitfold.models.skeleton import Skeleton
from bitfold.numerics import MapShape, Scheme
from bitfold.part import Need
from bitfold.pipeline.block import QuantizedBlock, quantize_block, run_quantized
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.streams import Streams
from bitfold.recipe import Recipe
from bitfold.transforms import SiteTransform, Transform
from bitfold.transforms.groups import Diagonal, OnlineMatrix
from models_zoo import TOKENS, Zoo, exact_norms
from reference import relative, round_tensor

FLOAT64 = torch.float64
Arrays = Mapping[str, np.ndarray]


class Run:
    """The first block of a model, quantized with TOKENS as calibration text and as probe."""

    def __init__(self, path: Path, recipe: Recipe, dtype: torch.dtype = FLOAT64) -> None:
        self.skeleton = Skeleton(Checkpoint(path))
        exact_norms(self.skeleton.model)
        self.plan: Plan = make_plan(self.skeleton, recipe)
        with torch.no_grad():
            outer = self.skeleton.load_outer(dtype)
            self.streams = Streams.start(self.skeleton, outer, TOKENS, TOKENS, keep_original=True)
        self.dtype = dtype
        self.hidden = self.streams.probe_original
        self.weights = {n: w.numpy() for n, w in self.skeleton.load_block(0, FLOAT64).items()}
        self.block: QuantizedBlock = quantize_block(
            self.skeleton, 0, self.plan, self.streams, dtype
        )

    def output(self) -> np.ndarray:
        return run_quantized(self.skeleton, 0, self.block, self.dtype)(self.hidden).numpy()


# --- a Llama block, written from the mathematics ---


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * gain


def rotated(x: np.ndarray) -> np.ndarray:
    """RoPE on [batch, head, token, 16]: dimension j turns with j + 8, angles in float32 as everywhere."""
    half = x.shape[-1] // 2
    frequency = np.float32(1) / np.float32(10000) ** (np.arange(half, dtype=np.float32) / half)
    angle = np.arange(x.shape[2], dtype=np.float32)[:, None] * frequency
    cos, sin = np.cos(angle).astype(np.float64), np.sin(angle).astype(np.float64)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def llama_block(
    x: np.ndarray, w: Arrays, act: int | None, heads: int | None, inputs: dict[str, np.ndarray]
) -> np.ndarray:
    """x [batch, token, 64] through 4 query and 2 KV heads of 16 and an inner width of 96; `act` and `heads` are the
    bits of the layers' inputs and of q, k, v; each layer's unrounded input is left in `inputs`."""

    def linear(name: str, given: np.ndarray) -> np.ndarray:
        inputs[name] = given
        if act is not None:
            given = round_tensor(given, given.shape[-1], act, symmetric=act == 8)
        return given @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def per_head(name: str, given: np.ndarray, count: int) -> np.ndarray:
        return linear(name, given).reshape(*x.shape[:2], count, 16).transpose(0, 2, 1, 3)

    def quantized(given: np.ndarray) -> np.ndarray:
        return given if heads is None else round_tensor(given, 16, heads, symmetric=False)

    n = rms_norm(x, w["input_layernorm.weight"])
    q = quantized(rotated(per_head("self_attn.q_proj", n, 4)))
    k = quantized(rotated(per_head("self_attn.k_proj", n, 2)))
    v = quantized(per_head("self_attn.v_proj", n, 2))
    mixed = np.empty_like(q)
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].transpose(0, 2, 1) / np.sqrt(16)
        scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), 1)] = -np.inf
        chance = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, head] = chance / chance.sum(-1, keepdims=True) @ v[:, head // 2]
    x = x + linear("self_attn.o_proj", mixed.transpose(0, 2, 1, 3).reshape(x.shape))
    n = rms_norm(x, w["post_attention_layernorm.weight"])
    gate, up = linear("mlp.gate_proj", n), linear("mlp.up_proj", n)
    return x + linear("mlp.down_proj", gate / (1 + np.exp(-gate)) * up)


def rounded_weights(weights: Arrays, bits: int, group: int | None, *, symmetric: bool) -> Arrays:
    return {
        name: round_tensor(w, group or w.shape[1], bits, symmetric=symmetric) if w.ndim == 2 else w
        for name, w in weights.items()
    }


CASES = {
    # scheme: (weight bits, group, activation bits, bits of q, k, v), and how near the simulations come: float32's cos
    # and sin differ in the last bit, which may flip a code. On a symmetric grid the largest entry of a token lies on
    # a tie, always, so that many flip.
    "w4a16g32": (4, 32, None, None, 2e-6),
    "w4a4q4kv4g16": (4, 16, 4, 4, 2e-6),
    "w8a6q5kv5": (8, None, 6, 5, 1e-4),
    "w3a8": (3, None, 8, None, 1e-2),
}


@pytest.mark.parametrize("scheme", CASES)
@pytest.mark.parametrize("family", ["llama", "llama-biased"])
def test_rtn_is_the_independent_simulation(family: str, scheme: str, checkpoint: Zoo) -> None:
    bits, group, act, heads, tolerance = CASES[scheme]
    run = Run(checkpoint(family, FLOAT64), Recipe.make("rtn", scheme))
    x, inputs = run.hidden.numpy(), {}
    weights = rounded_weights(run.weights, bits, group, symmetric=False)
    expected = llama_block(x, weights, act, heads, {})
    exact = llama_block(x, run.weights, None, None, inputs)
    assert relative(expected, exact) > 5 * tolerance  # there is something to see
    assert relative(run.output(), expected) < tolerance
    # Each layer's own error on its unquantized input.
    for name, found in run.block.errors.items():
        given = inputs[name]
        wanted = given @ run.weights[f"{name}.weight"].T
        if act is not None:
            given = round_tensor(given, given.shape[-1], act, symmetric=act == 8)
        assert found == pytest.approx(
            relative(given @ weights[f"{name}.weight"].T, wanted), rel=max(tolerance, 1e-4)
        )
    assert len(run.block.errors) == 7


def test_static_activations_have_the_range_of_the_calibration(checkpoint: Zoo) -> None:
    recipe = Recipe.make(
        "rtn", "w8a8", set=["activation.static=true", "activation.symmetric=false"]
    )
    run = Run(checkpoint("llama", FLOAT64), recipe)
    inputs: dict[str, np.ndarray] = {}
    llama_block(run.hidden.numpy(), run.weights, None, None, inputs)
    for name, quantizer in run.block.inputs.items():
        low, high = min(inputs[name].min(), 0.0), max(inputs[name].max(), 0.0)
        assert float(quantizer.scale) == pytest.approx((high - low) / 255, rel=1e-6)
        assert int(quantizer.zero) == -128 - round(low / ((high - low) / 255))


def test_smoothquant_is_the_independent_simulation(checkpoint: Zoo) -> None:
    """Statistics, s, folding and rounding from the paper; every linear layer's input has a diagonal."""
    recipe = Recipe.make("smoothquant", "w8a7", set=["smoothquant.alpha=0.6"])
    run = Run(checkpoint("llama", FLOAT64), recipe)
    inputs: dict[str, np.ndarray] = {}
    llama_block(run.hidden.numpy(), run.weights, None, None, inputs)
    w = dict(run.weights)

    def scale(*readers: str, shared: int = 1) -> np.ndarray:
        peak = np.abs(inputs[readers[0]]).max(axis=(0, 1))
        weight_peak = np.max([np.abs(w[f"{r}.weight"]).max(axis=0) for r in readers], axis=0)
        if shared > 1:  # channels of query heads that read one KV head
            peak = peak.reshape(2, shared, 16).max(axis=1).ravel()
            weight_peak = weight_peak.reshape(2, shared, 16).max(axis=1).ravel()
        s = peak**0.6 / weight_peak**0.4
        return s / np.exp(np.log(s).mean())

    def fold(s: np.ndarray, producer: str, *readers: str, on_inputs: np.ndarray) -> None:
        w[producer] = w[producer] / (s if w[producer].ndim == 1 else s[:, None])
        for reader in readers:
            w[f"{reader}.weight"] = w[f"{reader}.weight"] * on_inputs

    qkv = [f"self_attn.{x}_proj" for x in "qkv"]
    s = scale(*qkv)
    fold(s, "input_layernorm.weight", *qkv, on_inputs=s)
    s = scale("self_attn.o_proj", shared=2)
    repeated = np.repeat(s.reshape(2, 1, 16), 2, axis=1).ravel()
    fold(s, "self_attn.v_proj.weight", "self_attn.o_proj", on_inputs=repeated)
    s = scale("mlp.gate_proj", "mlp.up_proj")
    fold(s, "post_attention_layernorm.weight", "mlp.gate_proj", "mlp.up_proj", on_inputs=s)
    s = scale("mlp.down_proj")
    fold(s, "mlp.up_proj.weight", "mlp.down_proj", on_inputs=s)

    x = run.hidden.numpy()
    same = llama_block(x, w, None, None, {})
    assert relative(same, llama_block(x, run.weights, None, None, {})) < 1e-12
    assert run.block.folding_error < 1e-12
    weights = rounded_weights(w, 8, None, symmetric=False)
    for name, tensor in run.block.tensors.items():
        found = tensor.dequantize(FLOAT64).numpy()
        assert relative(found, weights[f"{name}.weight"]) < 1e-5
    for name, plain in run.block.plain.items():
        assert relative(plain.numpy(), weights[name]) < 1e-6
    assert relative(run.output(), llama_block(x, weights, 7, None, {})) < 1e-4


# --- folding is checked, whatever found it ---


class Broken(SiteTransform):
    """A transform that takes the wrong thing for granted at one kind of site."""

    needs = frozenset[Need]({"channels"})

    where: str

    def fit(
        self, site: Site, weights: object, statistics: object, schemes: object, heads: object
    ) -> Transform | None:
        scale = torch.linspace(0.5, 2, 64, dtype=FLOAT64)
        if self.where == "offset" and isinstance(site, NormSite):
            return Diagonal(NormSite(site.norm, site.readers, 0.0), scale)
        if self.where == "reader left out" and isinstance(site, NormSite):
            return Diagonal(NormSite(site.norm, site.readers[:1], site.offset), scale)
        if self.where == "online reader left out" and isinstance(site, NormSite):
            blocks = scale.view(-1, 1, 1)
            return OnlineMatrix(NormSite(site.norm, site.readers[:1]), blocks, 1 / blocks)
        if isinstance(site, FcPair) and self.where in ("gelu", "negative"):
            inner = torch.linspace(0.5, 2, 96, dtype=FLOAT64)
            inner[0] *= -1 if self.where == "negative" else 1
            return Diagonal(FcPair(site.fc1, site.fc2, homogeneous=True), inner)
        return None


@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("gemma", "offset"),
        ("gemma3", "offset"),
        ("qwen3", "reader left out"),
        ("llama", "reader left out"),
        ("llama", "online reader left out"),
        ("opt-gelu", "gelu"),
        ("opt", "negative"),
        ("opt-350m", "negative"),
    ],
)
@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16])
def test_a_broken_fold_stops_the_run(
    family: str, where: str, dtype: torch.dtype, checkpoint: Zoo
) -> None:
    recipe = Recipe(scheme=Scheme.parse("w8a8"), transforms=(Broken(where=where),), method="broken")
    with pytest.raises(EquivalenceError, match=r"layers\.0 computes by \d.*broken"):
        Run(checkpoint(family, torch.float32), recipe, dtype)


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["rtn", "smoothquant", "awq", "wush"])
def test_every_method_in_every_dtype(method: str, dtype: torch.dtype, checkpoint: Zoo) -> None:
    """Whatever a checkpoint is run in, folding is an equivalence and the result is near that in float64."""
    recipe = Recipe.make(method, "w8a8g32")
    path = checkpoint("llama", torch.bfloat16)
    run, exact = Run(path, recipe, dtype), Run(path, recipe)
    assert run.block.folding_error < {FLOAT64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)
    with torch.no_grad():
        weights = exact.skeleton.load_block(0, FLOAT64)
        original = exact.skeleton.run(0, weights, exact.hidden).numpy()
    found = run_quantized(run.skeleton, 0, run.block, dtype)(run.hidden).double().numpy()
    assert relative(found, original) < 1.3 * relative(exact.output(), original)


class Mixed(SiteTransform):
    """A matrix of two blocks behind every norm, which stays there and runs."""

    needs = frozenset[Need]({"channels"})

    def fit(
        self, site: Site, weights: object, statistics: object, schemes: object, heads: object
    ) -> Transform | None:
        if not isinstance(site, NormSite):
            return None
        generator = torch.Generator().manual_seed(0)
        blocks = torch.eye(32, dtype=FLOAT64) + 0.05 * torch.randn(
            2, 32, 32, dtype=FLOAT64, generator=generator
        )
        return OnlineMatrix(site, blocks, torch.linalg.inv(blocks))

    def online_map(self, site: Site, width: int, heads: object) -> MapShape | None:
        return MapShape("blocks", (2, width // 2)) if isinstance(site, NormSite) else None


@pytest.mark.parametrize("dtype", [FLOAT64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma", "opt"])
def test_what_runs_is_simulated_as_it_is_stored(
    family: str, dtype: torch.dtype, checkpoint: Zoo
) -> None:
    """In the checkpoint's dtype, whatever it is run in; the fold is an equivalence all the same."""
    recipe = Recipe(method="mixed", scheme=Scheme.parse("w8a16g32"), transforms=(Mixed(),))
    run = Run(checkpoint(family, torch.bfloat16), recipe, dtype)
    assert run.block.folding_error < {FLOAT64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)
    found = {name: value for name, value in run.block.plain.items() if "online" in name}
    assert set(found) == {site.online for site in run.plan.sites if isinstance(site, NormSite)}
    for name, value in found.items():
        assert (value.dtype, value.shape) == (torch.bfloat16, (2, 32, 32))
        assert torch.equal(run.block.weights(dtype)[name], value.to(dtype))
    with torch.no_grad():
        original = run.skeleton.run(0, run.skeleton.load_block(0, dtype), run.hidden)
    output = run_quantized(run.skeleton, 0, run.block, dtype)(run.hidden)
    assert relative(output.double().numpy(), original.double().numpy()) < 0.05


def test_the_streams_are_read_not_advanced(checkpoint: Zoo) -> None:
    run = Run(checkpoint("llama", torch.float32), Recipe.make("awq", "w4a16g32"), torch.float32)
    outer = run.skeleton.load_outer(torch.float32)
    with torch.no_grad():
        embedded = run.skeleton.embed(outer, TOKENS)
    streams = [stream for stream in vars(run.streams).values() if stream is not None]
    assert len(streams) == 4
    for stream in streams:
        assert torch.equal(stream, embedded)


def test_nothing_of_the_run_stays_in_the_model(checkpoint: Zoo) -> None:
    """Hooks and q/k/v quantizers are gone: the skeleton gives what transformers gives."""
    path = checkpoint("llama", torch.float32)
    recipe = Recipe.make("smoothquant", "w4a4q4kv4")
    skeleton = Skeleton(Checkpoint(path))
    plan = make_plan(skeleton, recipe)
    with torch.no_grad():
        outer = skeleton.load_outer()
        streams = Streams.start(skeleton, outer, TOKENS, TOKENS, keep_original=False)
        block = quantize_block(skeleton, 0, plan, streams, torch.float32)
        run_quantized(skeleton, 0, block, torch.float32)(streams.probe_original)
        hidden = streams.probe_original
        for index in range(2):
            hidden = skeleton.run(index, skeleton.load_block(index), hidden)
        found = skeleton.head(outer, hidden)
        expected: Tensor = AutoModelForCausalLM.from_pretrained(path).eval()(TOKENS).logits
    assert torch.equal(found, expected)
