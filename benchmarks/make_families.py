"""Checkpoints of other architectures, made from a Llama's: its weights moved, then trained where that is not enough.

    python benchmarks/make_families.py ../shared/bench/tiny-llama --train TEXT --work out/families

What an architecture has and Llama lacks starts where it changes least: a norm's gain is the mean size of what it
normalizes, SiLU becomes 1.702 · GELU(x / 1.702). That is Mistral exactly, and Gemma nearly. Elsewhere Adam then brings
the outputs back to the Llama's: the loss is KL(Llama ‖ other) on windows of the train text, in bfloat16 autocast, for
so many minutes of CPU time.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import examples, fix_environment

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    Weights = dict[str, Tensor]

__all__ = ["FAMILIES", "Training", "make_family"]

FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
TRAINED = ("qwen2", "qwen3", "gemma3_text")
MADE = "made.json"
# x · σ(x) = 1.702 · y · σ(1.702 y) with y = x / 1.702, and y · σ(1.702 y) is GELU(y) to 0.02.
GELU_OF_SILU = 1.702
# Gemma 3's sliding layers see fewer tokens than a window of training has.
SLIDING_WINDOW = 128
MEASURED_WINDOWS = 16


@dataclass(frozen=True)
class Training:
    """minutes: of CPU time. length, batch: tokens of a window, windows of a step. rate: Adam's largest step,
    relative to the root mean square of a tensor."""

    minutes: float = 4.0
    length: int = 256
    batch: int = 8
    rate: float = 2e-3
    seed: int = 0


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    training = Training(minutes=options.minutes, seed=options.seed)
    for family in options.family:
        path = make_family(options.source, family, options.train, training, options.work)
        print(path, (path / MADE).read_text())


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("source", type=Path, help="directory of a Llama checkpoint")
    add_making_arguments(parser)
    return parser.parse_args()


def add_making_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of making checkpoints, for this command and for families.py."""
    add = parser.add_argument
    add("--train", type=Path, required=True, help="text to train on")
    add("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="FAMILY")
    add("--minutes", type=float, default=Training.minutes, help="CPU time of one family's training")
    add("--seed", type=int, default=Training.seed)
    add("--work", type=Path, default=Path("out/families"), help="where the checkpoints go")
    add("--threads", type=int, default=1)


def make_family(source: Path, family: str, train: Path, training: Training, work: Path) -> Path:
    """The directory of the source's relative in a family; made unless one made the same way is there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitfold.models.checkpoint import sha256_of

    out = work / family
    sums = [sha256_of(file) for file in sorted(source.glob("*.safetensors"))]
    how: dict[str, Any] = {"source": source.name, "source_sha256": sums, "family": family}
    if family in TRAINED:
        how |= {"train": train.name} | asdict(training)
    if (out / MADE).is_file():
        made = json.loads((out / MADE).read_text())
        if made["how"] == how:
            return out
    tokenizer = AutoTokenizer.from_pretrained(source)
    llama = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if llama.config.model_type != "llama":
        raise SystemExit(f"{source} is a {llama.config.model_type}: give a Llama's checkpoint.")
    windows = read_windows(train, tokenizer, training.length)
    torch.manual_seed(training.seed)
    other = moved(llama, family, windows[:MEASURED_WINDOWS])
    measured = windows[:MEASURED_WINDOWS]
    result: dict[str, Any] = {"how": how, "kl_moved": distance(llama, other, measured)}
    if family in TRAINED:
        result |= train_towards(llama, other, windows[MEASURED_WINDOWS:], training)
        result["kl_trained"] = distance(llama, other, measured)
    other.to(llama.config.dtype or torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / MADE).write_text(json.dumps(result, indent=1) + "\n")
    return out


def read_windows(text: Path, tokenizer: Any, length: int) -> "Tensor":
    """Token ids [windows, length] of a text."""
    from bitfold.data import read_text, tokenize, windows

    return windows(tokenize(read_text(text), tokenizer), length)


# -- moving ----------------------------------------------------------------------------------------


def moved(llama: "PreTrainedModel", family: str, windows: "Tensor") -> "PreTrainedModel":
    """The Llama's weights in another architecture, the nearest that its function can be without training."""
    from transformers import AutoModelForCausalLM

    sizes = mean_sizes(llama, windows)
    weights = {name: value.clone() for name, value in llama.state_dict().items()}
    other = AutoModelForCausalLM.from_config(config_of(llama.config, family)).float()
    adapt: Mapping[str, Callable[[Weights, Mapping[str, float]], None]] = {
        "mistral": lambda weights, sizes: None,
        "qwen2": partial(add_biases, llama.config),
        "qwen3": partial(add_head_norms, llama.config),
        "gemma": partial(as_gemma, llama.config),
        "gemma3_text": partial(as_gemma3, llama.config),
    }
    adapt[family](weights, sizes)
    other.load_state_dict(weights)
    return other


def config_of(llama: "PretrainedConfig", family: str) -> "PretrainedConfig":
    from transformers import AutoConfig

    shared = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    settings = {name: getattr(llama, name) for name in shared}
    settings["head_dim"] = head_dim_of(llama)
    if family == "mistral":
        settings["sliding_window"] = None
    if family == "gemma3_text":
        rotary = settings["rope_parameters"]
        settings["rope_parameters"] = {"sliding_attention": rotary, "full_attention": rotary}
        settings["sliding_window"] = SLIDING_WINDOW
        settings["query_pre_attn_scalar"] = settings["head_dim"]
    return AutoConfig.for_model(family, **settings)


def head_dim_of(config: "PretrainedConfig") -> int:
    from bitfold.models.family import head_counts

    return head_counts(config)[2]


def mean_sizes(llama: "PreTrainedModel", windows: "Tensor") -> dict[str, float]:
    """The mean root mean square of every linear layer's output, over tokens; of queries and keys per head.

    It is the gain with which a norm of the output is nearest to the output itself.
    """
    import torch

    head = head_dim_of(llama.config)
    sizes: dict[str, float] = {}

    def note(name: str, module: object, inputs: object, output: "Tensor") -> None:
        width = head if name.endswith(("q_proj", "k_proj", "v_proj")) else output.shape[-1]
        parts = output.float().unflatten(-1, (-1, width))
        sizes[name] = float(parts.square().mean(dim=-1).sqrt().mean())

    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in llama.named_modules()
        if name.endswith("_proj")
    ]
    with torch.no_grad():
        llama(input_ids=windows)
    for hook in hooks:
        hook.remove()
    return sizes


def layer_names(config: "PretrainedConfig") -> Iterator[str]:
    return (f"model.layers.{index}." for index in range(config.num_hidden_layers))


def add_biases(config: "PretrainedConfig", weights: "Weights", sizes: Mapping[str, float]) -> None:
    """Random biases on q, k, v: a tenth of the outputs' size. None but zero leaves the function as it is."""
    import torch

    for layer in layer_names(config):
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = f"{layer}self_attn.{name}"
            bias = torch.randn(weights[f"{linear}.weight"].shape[0])
            weights[f"{linear}.bias"] = bias * sizes[linear] / 10


def add_head_norms(
    config: "PretrainedConfig", weights: "Weights", sizes: Mapping[str, float]
) -> None:
    import torch

    for layer in layer_names(config):
        for kind in ("q", "k"):
            gain = sizes[f"{layer}self_attn.{kind}_proj"]
            weights[f"{layer}self_attn.{kind}_norm.weight"] = torch.full(
                (head_dim_of(config),), gain
            )


def as_gemma(config: "PretrainedConfig", weights: "Weights", sizes: Mapping[str, float]) -> None:
    """GELU for SiLU, embeddings that are multiplied by √hidden, gains stored minus 1."""
    root = math.sqrt(config.hidden_size)
    weights["model.embed_tokens.weight"] /= root
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        weights["model.norm.weight"] *= root
    for layer in layer_names(config):
        weights[f"{layer}mlp.gate_proj.weight"] /= GELU_OF_SILU
        weights[f"{layer}mlp.up_proj.weight"] *= GELU_OF_SILU
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            value -= 1


def as_gemma3(config: "PretrainedConfig", weights: "Weights", sizes: Mapping[str, float]) -> None:
    """Gemma with norms on q and k, and on what attention and MLP add to the stream."""
    import torch

    add_head_norms(config, weights, sizes)
    for layer in layer_names(config):
        before = weights[f"{layer}post_attention_layernorm.weight"]
        weights[f"{layer}pre_feedforward_layernorm.weight"] = before
        for norm, writer in (
            ("post_attention_layernorm", "self_attn.o_proj"),
            ("post_feedforward_layernorm", "mlp.down_proj"),
        ):
            gain = torch.full((config.hidden_size,), sizes[layer + writer])
            weights[f"{layer}{norm}.weight"] = gain
    as_gemma(config, weights, sizes)


# -- training --------------------------------------------------------------------------------------


def train_towards(
    llama: "PreTrainedModel", other: "PreTrainedModel", windows: "Tensor", training: Training
) -> dict[str, Any]:
    """Adam on the KL from the Llama; the rate rises for a twentieth of the time and falls along a cosine."""
    import torch

    groups = [
        {"params": [p], "lr": 0.0, "size": float(p.detach().square().mean().sqrt())}
        for p in other.parameters()
    ]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(training.seed)
    start, budget, losses = time.process_time(), training.minutes * 60, []
    other.train()
    while (progress := (time.process_time() - start) / budget) < 1:
        batch = windows[torch.randint(len(windows), (training.batch,), generator=generator)]
        factor = min(1.0, 20 * progress) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = training.rate * factor * group["size"]
        loss = divergence(llama, other, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    other.eval()
    tenth = max(1, len(losses) // 10)
    return {
        "steps": len(losses),
        "tokens": len(losses) * training.batch * training.length,
        "loss_first_tenth": sum(losses[:tenth]) / tenth,
        "loss_last_tenth": sum(losses[-tenth:]) / tenth,
        "cpu_seconds": time.process_time() - start,
    }


def divergence(llama: "PreTrainedModel", other: "PreTrainedModel", windows: "Tensor") -> "Tensor":
    """KL(Llama ‖ other), mean in nats per token; differentiable in the other."""
    import torch
    from torch.nn.functional import kl_div

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = llama(input_ids=windows, use_cache=False).logits
        found = other(input_ids=windows, use_cache=False).logits
    wanted, found = (logits.float().log_softmax(-1).flatten(0, 1) for logits in (wanted, found))
    return kl_div(found, wanted, reduction="batchmean", log_target=True)


def distance(llama: "PreTrainedModel", other: "PreTrainedModel", windows: "Tensor") -> float:
    import torch

    with torch.no_grad():
        return float(divergence(llama, other, windows))


if __name__ == "__main__":
    main()
