"""How fast artifacts write on this machine, against the original in plain transformers.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --model DIR --prompt 200 1000 --new 64

Without --model a Llama with random weights is made, wide enough to time: hidden size 2048, 8 layers. It is quantized to
each scheme, by rounding to nearest. In one process the original in bfloat16 by transformers' own `generate`, and every
artifact by bitfold's, take turns: of each the medians, by the process' CPU time and by the clock. Peak memory is that
of a process of its own for each.

Whether it is the artifact's text is measured too: the logits of a text by the quick forms and by transformers in
bfloat16, each against transformers in float32, one token at a time as they come in decoding; and where what is written
after it begins to differ.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from children import bitfold_json, child_json, examples, fix_environment, machine, source_version
from measuring import Row, command_line, markdown_table, show_table, write_results

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ORIGINAL = "original, bfloat16"
WRITTEN = 64
"""Tokens written after a text, to see whether they are the same."""


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--model", type=Path, help="directory of an original checkpoint in bfloat16")
    add("--schemes", nargs="+", default=["w4a16g128", "w8a8"])
    add("--prompt", type=int, nargs="+", default=[64, 256, 1024], help="tokens of the prompts")
    add("--new", type=int, default=32, help="tokens that are written after the first")
    add("--turns", type=int, default=5)
    add("--agree", type=int, default=128, help="tokens of text on which logits are compared")
    add("--threads", type=int, default=1)
    add("--hidden", type=int, default=2048, help="of the random model")
    add("--layers", type=int, default=8, help="of the random model")
    add("-o", "--out", type=Path, default=Path("docs/results/decoding"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    with tempfile.TemporaryDirectory(prefix="bitfold-decoding-") as directory:
        work = Path(directory)
        model = options.model or random_llama(work / "original", options.hidden, options.layers)
        artifacts = {scheme: work / scheme for scheme in options.schemes}
        for scheme, path in artifacts.items():
            bitfold_json("quantize", model, "-o", path, "--method", "rtn", "--scheme", scheme)
        speeds = [
            timed(model, artifacts, tokens, options.new, options.turns) for tokens in options.prompt
        ]
        content = {
            "command": command_line(),
            "bitfold": source_version(),
            "machine": machine(),
            "model": describe(model),
            "prompts": options.prompt,
            "new": options.new,
            "turns": options.turns,
            "speeds": speeds,
            "memory": {
                name: child_json(__file__, "memory", kind, path)
                for name, kind, path in [
                    (ORIGINAL, "transformers", model),
                    *((scheme, "bitfold", path) for scheme, path in artifacts.items()),
                ]
            },
            "agreement": {
                scheme: child_json(__file__, "agreement", path, str(options.agree))
                for scheme, path in artifacts.items()
            },
        }
    write_results(options.out, content, page(content))
    show_table(*speed_table(content))


# -- models -------------------------------------------------------------------------------------------


def random_llama(out: Path, hidden: int, layers: int) -> Path:
    """A Llama in bfloat16 with random weights, and the demo model's tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bitfold.assets import DEMO_MODEL

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 128 * 128,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        vocab_size=32000,
        max_position_embeddings=4096,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(out)
    for file in Path(DEMO_MODEL).glob("tokenizer*"):
        shutil.copy(file, out)
    return out


def describe(model: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    parts = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    return ", ".join([config["model_type"], *(f"{part} {config.get(part)}" for part in parts)])


def plain(path: Path, dtype: str = "bfloat16") -> "PreTrainedModel":
    """As transformers loads it; no bitfold in it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def text_of(tokens: int) -> "Tensor":
    """The first tokens of the embedded text, [1, tokens]."""
    import torch

    import bitfold
    from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT

    ids = bitfold.load_tokenizer(DEMO_MODEL)(EVALUATION_TEXT.read_text(), verbose=False)
    return torch.tensor([ids["input_ids"][:tokens]])


# -- what is measured ---------------------------------------------------------------------------------


def timed(
    original: Path, artifacts: dict[str, Path], tokens: int, new: int, turns: int
) -> dict[str, Row]:
    """Of each model, in turns: tokens a second of a prompt and of what follows, by CPU time and by the clock."""
    import bitfold

    models = {ORIGINAL: plain(original)}
    models |= {name: bitfold.load_quick(path, device="cpu")[0] for name, path in artifacts.items()}
    ids = text_of(tokens)
    found: dict[str, list[list[float]]] = {name: [] for name in models}
    for turn in range(turns + 1):
        for name, model in models.items():
            write = write_plainly if name == ORIGINAL else write_quickly
            first = clocked(lambda: write(model, ids, 1))  # noqa: B023
            whole = clocked(lambda: write(model, ids, 1 + new))  # noqa: B023
            if turn:  # the first one warms up
                found[name].append([*first, *(b - a for a, b in zip(first, whole, strict=True))])
    rows = {}
    for name, turned in found.items():
        prompt_cpu, prompt, decode_cpu, decode = map(statistics.median, zip(*turned, strict=True))
        rows[name] = {
            "prompt_per_cpu_second": tokens / prompt_cpu,
            "prompt_per_second": tokens / prompt,
            "new_per_cpu_second": new / decode_cpu,
            "new_per_second": new / decode,
        }
    return rows


def clocked(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU time and of the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - clock


def write_plainly(model: "PreTrainedModel", ids: "Tensor", new: int) -> list[int]:
    """transformers' own greedy generation, that stops at no token."""
    limits: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new}
    mask = ids.new_ones(ids.shape)
    found = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits)
    return list(map(int, found[0, ids.shape[1] :]))


def write_quickly(model: "PreTrainedModel", ids: "Tensor", new: int) -> list[int]:
    """bitfold's, likewise."""
    from transformers import DynamicCache

    from bitfold.evaluate.generation import greedy

    cache = DynamicCache(config=model.config)
    return greedy(model, ids[0], new, cache, ends=frozenset())[0]


def memory(kind: str, path: Path) -> Row:
    """Peak memory of a process that loads a model and writes 8 tokens."""
    import bitfold
    from bitfold.evaluate import peak_rss_mb

    ids = text_of(64)
    before = peak_rss_mb()
    if kind == "transformers":
        write_plainly(plain(path), ids, 8)
    else:
        write_quickly(bitfold.load_quick(path, device="cpu")[0], ids, 8)
    return {"peak_rss_mb": peak_rss_mb(), "before_mb": before}


def agreement(path: Path, tokens: int) -> Row:
    """Logits of a text, token by token through a cache, against those of transformers in float32."""

    import bitfold

    ids = text_of(tokens)
    model = bitfold.load(path, device="cpu", dtype="float32")
    exact, text = by_token(model, ids), write_quickly(model, ids, WRITTEN)
    row: Row = {"tokens": tokens}
    ways: dict[str, Callable[[], PreTrainedModel]] = {
        "quick": lambda: bitfold.load_quick(path, device="cpu")[0],
        "transformers_bfloat16": lambda: bitfold.load(path, device="cpu", dtype="bfloat16"),
    }
    best, second = exact.topk(2).values.unbind(-1)
    gap = (best - second) / exact.std(dim=-1)
    row["median_gap"] = float(gap.median())
    for name, loaded in ways.items():
        model = loaded()
        found, said = by_token(model, ids), write_quickly(model, ids, WRITTEN)
        same = found.argmax(dim=-1) == exact.argmax(dim=-1)
        error = (found - exact).norm() / exact.norm()
        row[name] = {"error": float(error), "same_top": float(same.double().mean())}
        differs = [at for at, (a, b) in enumerate(zip(said, text, strict=True)) if a != b]
        row[name]["same_written"] = differs[0] if differs else WRITTEN
        if not bool(same.all()):
            row[name]["largest_gap_lost"] = float(gap[~same].max())
    return row


def by_token(model: "PreTrainedModel", ids: "Tensor") -> "Tensor":
    """Logits [tokens, vocabulary], each token in a pass of its own."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        passes = [
            model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[0]
            for at in range(ids.shape[1])
        ]
    return torch.cat(passes).float()


# -- tables -------------------------------------------------------------------------------------------


def speed_table(content: Row) -> tuple[list[str], list[list[str]]]:
    header = ["prompt tokens", "model", "prompt tokens/s", "÷ original"]
    header += ["new tokens/s", "÷ original", "by the clock: prompt", "new"]
    lines = []
    for tokens, rows in zip(content["prompts"], content["speeds"], strict=True):
        base = rows[ORIGINAL]
        for name, row in rows.items():
            cells = [str(tokens), name]
            for key in ("prompt_per_cpu_second", "new_per_cpu_second"):
                cells += [f"{row[key]:.1f}", f"{row[key] / base[key]:.2f}"]
            for key in ("prompt_per_second", "new_per_second"):
                cells.append(f"{row[key] / base[key]:.2f}")
            lines.append(cells)
    return header, lines


def memory_table(content: Row) -> tuple[list[str], list[list[str]]]:
    lines = [
        [name, f"{row['peak_rss_mb']:.0f}", f"{row['peak_rss_mb'] - row['before_mb']:.0f}"]
        for name, row in content["memory"].items()
    ]
    return ["model", "peak MiB", "beside Python and libraries"], lines


def agreement_table(content: Row) -> tuple[list[str], list[list[str]]]:
    header = [
        "artifact",
        "run by",
        "error of the logits",
        "same top token",
        "largest gap lost",
        "same text",
    ]
    lines = []
    for scheme, row in content["agreement"].items():
        for way in ("quick", "transformers_bfloat16"):
            one = row[way]
            lost = f"{one['largest_gap_lost']:.4f}" if "largest_gap_lost" in one else "–"
            cells = [scheme, way.replace("_", ", "), f"{one['error']:.2%}"]
            lines.append(
                [*cells, f"{one['same_top']:.1%}", lost, f"{one['same_written']} of {WRITTEN}"]
            )
    return header, lines


def page(content: Row) -> str:
    first = next(iter(content["agreement"].values()))
    lines = [
        "# Decoding",
        "",
        f"Written by `{content['command']}`.",
        "",
        f"bitfold {content['bitfold']}; {content['machine']}.",
        "",
        f"Model: {content['model']}. The original is in bfloat16 and run by transformers' own `generate`; artifacts by "
        f"`bitfold generate`'s quick forms. Medians of {content['turns']} turns in one process, {content['new']} new "
        "tokens after the first; tokens per second of CPU time, and the ratios by the clock.",
        "",
        *markdown_table(*speed_table(content)),
        "",
        "## Memory",
        "",
        "Of a process of its own that loads the model and writes 8 tokens.",
        "",
        *markdown_table(*memory_table(content)),
        "",
        "## The same text?",
        "",
        f"Logits of the same artifact against transformers in float32, on {first['tokens']} tokens of text, each token "
        "in a pass of its own: relative error, and how often the same token is on top. Gap: between the first and the "
        "second, in standard deviations of the logits; the largest of those where the first changed, "
        f"beside a median of {first['median_gap']:.3f}. Same text: how many of the tokens written after it come before "
        "the first other one.",
        "",
        *markdown_table(*agreement_table(content)),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(memory(sys.argv[2], Path(sys.argv[3]))))
    elif sys.argv[1:2] == ["agreement"]:
        print(json.dumps(agreement(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
