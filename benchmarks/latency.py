"""What runs costs time: latency of artifacts by methods that fold and methods that do not, as ratios against rtn's.

    python benchmarks/latency.py MODEL --calibration FILE --out docs/results/latency
    python benchmarks/latency.py --random 4 --out latency-1b

The artifacts are made by `bitfold quantize` (a few steps of fitting: what a matrix holds does not change its time).
Those of methods that fold must have the tensors of rtn's, or this stops. Each is loaded in each dtype and its weights
made dense, so that only what runs differs; the first that does not fold also as it is loaded. In every round all of
them take turns, in changing order: the prompt, then tokens one by one with the cache. A ratio is of two times of one
round; the table has median and quartiles of all rounds.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from children import bitfold_json, fix_environment, machine, source_version
from depth import SHAPE, write_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Row = dict[str, Any]
Times = dict[str, list[float]]
BASE = "rtn"


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    with tempfile.TemporaryDirectory(prefix="bitfold-latency-", dir=options.work) as directory:
        model, name = options.model, ""
        if model is None:
            model = Path(directory) / "model"
            write_checkpoint(model, options.random)
            name = f"random Llama, {options.random} layers of width {SHAPE['hidden_size']}"
        artifacts, costs = make(model, Path(directory), options)
        rows = []
        for dtype in options.dtype:
            rows += measure(artifacts, list(costs)[:1], dtype, options)
    content = {
        "command": "python " + shlex.join(sys.argv),
        "machine": machine(),
        "bitfold": source_version(),
        "model": name or model.name,
        "scheme": options.scheme,
        "prompt": options.prompt,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "costs": costs,
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(content))
    print(page(content))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="directory of a checkpoint")
    add("--random", type=int, help="in its place: layers of a random Llama of TinyLlama's shape")
    add("--calibration", type=Path, help="default: bitfold's own text")
    add("--method", nargs="+", default=["affine", "affine-online", "quarot", "flat"])
    add("--scheme", default="w3a16g128")
    add("--epochs", type=int, default=1, help="of the fit; 0: identities run, in the same time")
    add("--dtype", nargs="+", default=["float32", "bfloat16", "float16"])
    add("--prompt", type=int, default=128, help="tokens of the prompt")
    add("--tokens", type=int, default=16, help="generated one by one after it")
    add("--rounds", type=int, default=40)
    add("--threads", type=int, default=1)
    add("--device", default="auto")
    add("--work", type=Path, help="where the artifacts go; default: the system's place")
    add("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    if (options.model is None) == (options.random is None):
        parser.error("give a MODEL, or --random")
    return options


def make(
    model: Path, directory: Path, options: argparse.Namespace
) -> tuple[dict[str, Path], dict[str, Any]]:
    """An artifact per method, and what those say that leave something to run."""
    from bitfold import Recipe

    artifacts = {method: directory / method for method in (BASE, *options.method)}
    costs: dict[str, Any] = {}
    for method, out in artifacts.items():
        asked = ["--method", method, "--scheme", options.scheme, "--samples", "4"]
        if "affine" in Recipe.make(method, options.scheme).part_names:
            asked += ["--set", f"affine.epochs={options.epochs}"]
        if method != BASE:
            asked += ["--calibration", options.calibration] if options.calibration else []
            # A random model has no tokenizer.
            asked += ["--calibration", random_tokens(directory)] if options.random else []
        made = bitfold_json("quantize", model, "-o", out, *asked)
        if made["online"] is not None:
            costs[method] = made["online"]
        elif stored(out) != stored(artifacts[BASE]):
            raise SystemExit(f"{method} has other tensors than {BASE}: it is not folded")
    return artifacts, costs


def random_tokens(directory: Path) -> Path:
    """A file of four windows of random token ids."""
    import numpy as np

    file = directory / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (4, 64)))
    return file


def stored(artifact: Path) -> dict[str, tuple[Any, ...]]:
    """Name, dtype and shape of every tensor."""
    from bitfold.models.checkpoint import Checkpoint

    return {n: (info.dtype, info.shape) for n, info in Checkpoint(artifact).tensors.items()}


def measure(
    artifacts: Mapping[str, Path],
    as_loaded: Iterable[str],
    dtype: str,
    options: argparse.Namespace,
) -> list[Row]:
    """as_loaded: methods that are measured with packed weights too."""
    import bitfold

    def load(method: str) -> "PreTrainedModel":
        return bitfold.load(artifacts[method], device=options.device, dtype=dtype)

    models = {method: dense(load(method)) for method in artifacts}
    models |= {f"{method}, as loaded": load(method) for method in as_loaded}
    times: dict[str, Times] = {name: {"prefill": [], "token": []} for name in models}
    names = list(models)
    for turn in range(-2, options.rounds):  # two rounds to warm up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            prefill, token = once(models[name], options.prompt, options.tokens)
            if turn >= 0:
                times[name]["prefill"].append(prefill)
                times[name]["token"].append(token)
    return [
        {"dtype": dtype, "method": name, "device": models[name].device.type}
        | {kind: summary(values, times[BASE][kind]) for kind, values in times[name].items()}
        for name in models
    ]


def once(model: "PreTrainedModel", prompt: int, tokens: int) -> tuple[float, float]:
    """Seconds of a prompt, and of one token after it."""
    import torch

    vocabulary = model.config.vocab_size
    ids = (torch.arange(prompt, device=model.device) * 7919 % vocabulary)[None]
    with torch.no_grad():
        start = now(model)
        output = model(ids, use_cache=True)
        first = now(model)
        for index in range(tokens):
            output = model(
                ids[:, index : index + 1], past_key_values=output.past_key_values, use_cache=True
            )
        last = now(model)
    return first - start, (last - first) / tokens


def now(model: "PreTrainedModel") -> float:
    """The time when the device has finished."""
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def dense(model: "PreTrainedModel") -> "PreTrainedModel":
    """The model with ordinary linear layers of the dequantized weights."""
    from torch import nn

    from bitfold.runtime.quantized_linear import QuantizedLinear

    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantizedLinear):
            continue
        if module.scheme.activation is not None:
            raise SystemExit("activations are quantized when the model runs: give a w…a16 scheme")
        weight = module.dequantize(model.dtype)
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta", dtype=weight.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", module.bias)
        model.set_submodule(name, linear)
    return model


def summary(values: list[float], base: list[float]) -> dict[str, float]:
    """Median seconds; median and quartiles of the ratios to the base's times of the same round."""
    lower, middle, upper = quantiles([a / b for a, b in zip(values, base, strict=True)], n=4)
    return {"seconds": median(values), "ratio": middle, "lower": lower, "upper": upper}


def page(content: dict[str, Any]) -> str:
    lines = [
        f"# Latency: {content['model']}, {content['scheme']}",
        "",
        f"Written by `{content['command']}`.",
        "",
        f"bitfold {content['bitfold']}; {content['machine']}.",
        "",
        "Ratios of times within a round against rtn's: median, and quartiles of "
        f"{content['rounds']} rounds in which all take turns. Prefill: a prompt of {content['prompt']} tokens; token: "
        f"the mean of {content['tokens']} after it, one by one with the cache. Weights are dense, except as loaded, "
        "where bitfold's own format unpacks them at every step. A method without a share of its own is folded: its "
        "artifact has the tensors of rtn's (compared by name, dtype and shape).",
        "",
        *(f"- {method}: {cost['note']}" for method, cost in content["costs"].items()),
        "",
        "| device | dtype | method | prefill ms | ratio | quartiles | token ms | ratio | quartiles |",
        "| :-- | :-- | :-- | --: | --: | --: | --: | --: | --: |",
    ]
    for row in content["rows"]:
        cells = [row["device"], row["dtype"], row["method"]]
        for kind in ("prefill", "token"):
            found = row[kind]
            cells += [f"{1e3 * found['seconds']:.2f}"]
            if row["method"] == BASE:
                cells += ["1", ""]
            else:
                cells += [f"{found['ratio']:.3f}", f"{found['lower']:.3f} – {found['upper']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
