"""What keys and values in few bits cost and save: KL to the original, memory, decoding speed, and what is written.

    python benchmarks/kv_cache.py --model DIR ... --calibration FILE --text FILE --windows 20

Weights are untouched. Each bits and granularity is an artifact (`w16a16kv4`), whose KL is that of full passes over
windows; its cache then generates, in turns with an ordinary cache of the original model. A finished row is kept: the
same command goes on where it was stopped. The process' memory is measured with a cache alone, of `--context` tokens.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from children import child_json, examples, fix_environment
from measuring import (
    Asked,
    Row,
    Rows,
    add_measuring_arguments,
    command_line,
    markdown_table,
    measure_of,
    provenance,
    quantize_and_measure,
    settings_of,
    show_table,
    write_results,
)

IDENTITY = ("model", "bits", "granularity", "samples", "prompt", "settings")
CHANNEL = ("key.granularity=channel", "key.group_size=32")
GRANULARITIES: dict[str, tuple[str, ...]] = {
    "token": (),
    "group of 32": ("key.group_size=32", "value.group_size=32"),
    "keys: channel of 32 tokens": CHANNEL,
    "keys: channel of 32 tokens, values: group of 32": (*CHANNEL, "value.group_size=32"),
    "keys: static channel": ("key.static=true", "key.granularity=channel"),
    "static head": (
        *("key.static=true", "key.granularity=head"),
        *("value.static=true", "value.granularity=head"),
    ),
    "static tensor": ("key.static=true", "value.static=true"),
}
TURNS = 3
HEADS, SIZE, LAYERS, PORTION = 8, 128, 8, 512


def main() -> None:
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--model", type=Path, nargs="+", help="directories of original checkpoints")
    add_measuring_arguments(parser)
    add("--samples", type=int, default=32, help="calibration windows, of static scales")
    add("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    add("--prompt", type=int, default=200, help="tokens of the text that a generation begins with")
    add("--new", type=int, default=64, help="tokens that it goes on for")
    add("--context", type=int, default=16384, help="tokens of the cache whose memory is measured")
    add("--threads", type=int, default=1)
    add("--rows", type=Path, default=Path("out/benchmarks/kv_cache.jsonl"), help="finished rows")
    add("-o", "--out", type=Path, default=Path("docs/results/kv_cache"), help="without suffix")
    options = parser.parse_args()
    fix_environment(options.threads)
    finished = Rows(options.rows, IDENTITY)
    rows = []
    for model in options.model:
        measure = measure_of(model, options)
        prompt = beginning(model, options.text, options.prompt)
        for bits in options.bits:
            for name, choice in GRANULARITIES.items():
                asked = Asked.parse("rtn", f"w16a16kv{bits}", *choice)
                of = {"model": model.name, "bits": bits, "granularity": name}
                of |= {"samples": options.samples, "settings": settings_of(options)}
                of["prompt"] = [options.prompt, options.new]
                look = partial(generations, model, prompt, options.new)
                make = partial(
                    quantize_and_measure, measure, asked, options.calibration, options.samples, look
                )
                rows.append(finished.get(of, make, f"{model.name} kv{bits} {name}"))
    memory = [child_json(__file__, "fill", str(options.context), kind) for kind in ("0", "4", "2")]
    command = command_line()
    content = {"command": command, "rows": rows, "memory": memory}
    text = options.text.stem
    write_results(options.out, content, page(content, text))
    show_table(*table(rows, text))


# -- what is measured ---------------------------------------------------------------------------------


def beginning(model: Path, text: Path, tokens: int) -> str:
    """Text of so many tokens."""
    import bitfold

    tokenizer = bitfold.load_tokenizer(model)
    ids = tokenizer(text.read_text()[: 20 * tokens], verbose=False)["input_ids"][:tokens]
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def generations(original: Path, prompt: str, new: int, artifact: Path) -> Row:
    """The artifact's generation and the original's in turns, in bfloat16; of each the best speed."""
    import bitfold

    paths = {"quantized": artifact, "original": original}
    tokenizer = bitfold.load_tokenizer(original)
    models = {name: bitfold.load(path, dtype="bfloat16") for name, path in paths.items()}
    found: dict[str, list[Any]] = {name: [] for name in paths}
    for _ in range(TURNS):
        for name, model in models.items():
            found[name].append(
                bitfold.generate(model, prompt, max_new_tokens=new, tokenizer=tokenizer)
            )
    return {
        name: {
            "tokens_per_second": max(one.decode_tokens_per_second or 0.0 for one in made),
            "cache_bytes_per_token": made[0].cache_bytes_per_token,
            "cache_bytes_bf16": made[0].cache_bytes_bf16,
            "cache_bytes": made[0].cache_bytes,
            "text": made[0].text,
        }
        for name, made in found.items()
    }


def fill(context: int, bits: int) -> Row:
    """Fill a cache with random keys and values, as a model of 8 layers with 8 KV heads of 128 dimensions would; 0 bits:
    an ordinary one. Returns what the process took beside what it had before."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import bitfold
    from bitfold.evaluate import peak_rss_mb
    from bitfold.runtime.kv_cache import cache_memory

    config = LlamaConfig(
        **{"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "head_dim": SIZE},
        **{"hidden_size": 64, "intermediate_size": 64, "vocab_size": 16},
    )
    if bits:
        cache = bitfold.quantized_cache(LlamaForCausalLM(config), bits)
    else:
        from transformers import DynamicCache

        cache = DynamicCache(config=config)
    torch.manual_seed(0)
    shape = (1, HEADS, PORTION, SIZE)
    warm = torch.randn(shape).to(torch.bfloat16)
    cache.update(warm, warm, 0)
    cache.reset()
    before, start = peak_rss_mb(), time.perf_counter()
    for _ in range(0, context, PORTION):
        for layer in range(LAYERS):
            key, value = torch.randn(2, *shape).to(torch.bfloat16)
            cache.update(key, value, layer)
    seconds = time.perf_counter() - start
    held = cache_memory(cache)
    grown = peak_rss_mb() - before
    one_layer = 2 * HEADS * SIZE * held.tokens * 2
    return {
        "bits": bits or 16,
        "context": context,
        "cache_mb": held.bytes / 2**20,
        "bf16_mb": held.bfloat16_bytes / 2**20,
        "one_layer_mb": one_layer / 2**20,
        "peak_growth_mb": grown,
        "seconds": seconds,
    }


# -- tables -------------------------------------------------------------------------------------------


def table(rows: list[Row], text: str) -> tuple[list[str], list[list[str]]]:
    header = [
        "model",
        "bits",
        "granularity",
        "KL",
        "bytes a token",
        "÷ bfloat16",
        "tokens/s ÷ ordinary",
    ]
    lines = []
    for row in rows:
        figures, made, plain = row["texts"][text], row["quantized"], row["original"]
        cells = [row["model"], str(row["bits"]), row["granularity"]]
        cells += [f"{figures['kl_mean']:.5f} ± {figures['kl_se']:.5f}"]
        cells += [f"{made['cache_bytes_per_token']:,.0f}"]
        cells += [f"{made['cache_bytes'] / made['cache_bytes_bf16']:.3f}"]
        lines.append([*cells, f"{made['tokens_per_second'] / plain['tokens_per_second']:.2f}"])
    return header, lines


def memory_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    header = ["cache", "cache MiB", "bfloat16 MiB", "one layer MiB", "peak growth MiB", "s"]
    lines = []
    for row in rows:
        name = "ordinary, bfloat16" if row["bits"] == 16 else f"kv{row['bits']}"
        keys = ("cache_mb", "bf16_mb", "one_layer_mb", "peak_growth_mb", "seconds")
        lines.append([name, *(f"{row[key]:.0f}" for key in keys)])
    return header, lines


def page(content: Row, text: str) -> str:
    rows, memory = content["rows"], content["memory"]
    figures = rows[0]["texts"][text]
    lines = [
        "# Keys and values in few bits",
        "",
        f"Written by `{content['command']}`.",
        "",
        provenance(rows),
        "",
        f"Weights untouched. KL: to the original, mean in nats per token ± standard error over {figures['windows']} "
        f"windows of {text}. Bytes and speed: generation in bfloat16, {rows[0]['prompt'][0]} tokens of prompt and "
        f"{rows[0]['prompt'][1]} new ones; bytes are of all tensors the cache holds at the end, over the tokens; the "
        "speed is that of decoding over an ordinary cache's of the original model, the best of "
        f"{TURNS} turns each.",
        "",
        *markdown_table(*table(rows, text)),
        "",
        "## Memory of the process",
        "",
        f"A cache alone, filled with random keys and values of {LAYERS} layers, {HEADS} KV heads of {SIZE} dimensions, "
        f"{memory[0]['context']:,} tokens in portions of {PORTION}, in bfloat16. Peak growth: of the process' resident "
        "memory; a pass reads one layer back at a time.",
        "",
        *markdown_table(*memory_table(memory)),
        "",
        "## Side by side",
        "",
        *texts(rows),
    ]
    return "\n".join(lines) + "\n"


def texts(rows: list[Row]) -> list[str]:
    """What each went on with, the original first."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of = [row for row in rows if row["model"] == model]
        lines += [f"**{model}**, the original: {_plain(of[0]['original']['text'])}", ""]
        for row in of:
            said = _plain(row["quantized"]["text"])
            lines += [f"* kv{row['bits']}, {row['granularity']}: {said}"]
        lines.append("")
    return lines[:-1]


def _plain(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["fill"]:
        print(json.dumps(fill(int(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
