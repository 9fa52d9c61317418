"""Memory and time against depth: random Llamas of TinyLlama-1.1B's shape, quantized, beside `cp` of the same file.

    python benchmarks/depth.py --layers 11 22 --out docs/results/depth
    python benchmarks/depth.py --layers 22 --method auto --scheme w3a16g128 --samples 8 --out docs/results/depth-auto

Each checkpoint is one safetensors file, written block by block into a temporary directory and removed afterwards. The
peak of the resident memory is the kernel's own figure (VmHWM) for the `bitfold quantize` process, less that of an
interpreter that only imports bitfold. Nothing is dropped from the page cache: the file was just written, so both `cp`
and bitfold read it from memory as far as there is room for it.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from children import bitfold_json, fix_environment, machine, source_version

Row = dict[str, Any]

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}

# Tokens of a calibration window.
LENGTH = 256


def main() -> None:
    options = parse_arguments()
    fix_environment(options.threads)
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="bitfold-depth-", dir=options.work) as directory:
            write_checkpoint(Path(directory) / "model", layers)
            for dtype in options.dtype:
                rows.append(measure(Path(directory), layers, dtype, options))
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    command = "python " + shlex.join(sys.argv)
    content = {"command": command, "machine": machine(), "bitfold": source_version(), "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(content))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[11, 22])
    add("--method", default="rtn")
    add("--scheme", default="w4a16g128")
    add("--samples", type=int, help="calibrate on so many windows of 256 random tokens")
    add("--dtype", nargs="+", default=["auto"], help="of the simulation; auto: float32 on a CPU")
    add("--threads", type=int, default=2)
    add("--work", type=Path, help="where the temporary checkpoints go; default: the system's place")
    add("--out", type=Path, default=Path("docs/results/depth"), help="without suffix")
    return parser.parse_args()


def measure(directory: Path, layers: int, dtype: str, options: argparse.Namespace) -> Row:
    model = directory / "model"
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    start = time.perf_counter()
    subprocess.run(["cp", weights, directory / "copy"], check=True)
    copy_seconds = time.perf_counter() - start
    (directory / "copy").unlink()
    asked: list[str | Path] = [
        "--method",
        options.method,
        "--scheme",
        options.scheme,
        "--dtype",
        dtype,
    ]
    if options.samples is not None:
        asked += ["--samples", str(options.samples)]
        asked += ["--calibration", write_tokens(directory / "tokens.npy", options.samples)]
    made = bitfold_json("quantize", model, "-o", directory / "artifact", *asked)
    shutil.rmtree(directory / "artifact")
    return {
        "layers": layers,
        "method": options.method,
        "scheme": options.scheme,
        "dtype": dtype,
        "samples": options.samples,
        "load_average": os.getloadavg()[0],
        "bytes": size,
        "bare_mb": bare_interpreter_mb(),
        "peak_rss_mb": made["peak_rss_mb"],
        "seconds": made["seconds"],
        "process_seconds": made["process_seconds"],
        "process_cpu_seconds": made["process_cpu_seconds"],
        "gb_per_second": size / 1e9 / made["seconds"],
        "cp_seconds": copy_seconds,
        "cp_gb_per_second": size / 1e9 / copy_seconds,
        "artifact_bytes": made["size_bytes"],
        "bits_per_weight": made["bits_per_weight"],
    }


def write_tokens(path: Path, samples: int) -> Path:
    import numpy as np

    generator = np.random.default_rng(0)
    np.save(path, generator.integers(0, SHAPE["vocab_size"], (samples, LENGTH)))
    return path


def bare_interpreter_mb() -> float:
    """Peak resident memory of a Python that imports bitfold and does nothing, in MiB."""
    code = "import bitfold; from bitfold.evaluate.memory import peak_rss_mb; print(peak_rss_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


# -- a checkpoint that never is in memory as a whole -----------------------------------------------


def write_checkpoint(path: Path, layers: int, shape: Mapping[str, int] = SHAPE) -> None:
    """A random Llama in bf16, one file as TinyLlama-1.1B has it, weights N(0, 0.02²)."""
    import torch
    from transformers import LlamaConfig

    config = LlamaConfig(
        **shape, num_hidden_layers=layers, max_position_embeddings=2048, dtype=torch.bfloat16
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    tensors = list(tensor_shapes(layers, shape))
    for name, size in tensors:
        start, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    generator = torch.Generator().manual_seed(0)
    with (path / "model.safetensors").open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for name, size in tensors:
            tensor = torch.ones(size, dtype=torch.bfloat16)
            if not name.endswith("norm.weight"):
                tensor.normal_(0, 0.02, generator=generator)
            stream.write(tensor.view(torch.uint8).numpy().data)


def tensor_shapes(layers: int, shape: Mapping[str, int]) -> Iterator[tuple[str, list[int]]]:
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    yield "model.embed_tokens.weight", [shape["vocab_size"], hidden]
    for index in range(layers):
        prefix = f"model.layers.{index}."
        yield prefix + "input_layernorm.weight", [hidden]
        yield prefix + "self_attn.q_proj.weight", [hidden, hidden]
        yield prefix + "self_attn.k_proj.weight", [keys, hidden]
        yield prefix + "self_attn.v_proj.weight", [keys, hidden]
        yield prefix + "self_attn.o_proj.weight", [hidden, hidden]
        yield prefix + "post_attention_layernorm.weight", [hidden]
        yield prefix + "mlp.gate_proj.weight", [inner, hidden]
        yield prefix + "mlp.up_proj.weight", [inner, hidden]
        yield prefix + "mlp.down_proj.weight", [hidden, inner]
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [shape["vocab_size"], hidden]


# -- the page --------------------------------------------------------------------------------------


def page(content: dict[str, Any]) -> str:
    rows = content["rows"]
    lines = [
        "# Memory and time against depth",
        "",
        f"Written by `{content['command']}`.",
        "",
        f"bitfold {content['bitfold']}; {content['machine']}.",
        "",
        "Random Llamas of TinyLlama-1.1B's shape (hidden 2048, FFN 5632, 32 heads, 4 KV heads, vocabulary 32000) in "
        "bf16, one safetensors file each, "
        f"`bitfold quantize --method {rows[0]['method']} --scheme {rows[0]['scheme']} --dtype …`"
        + (f", {rows[0]['samples']} windows of {LENGTH} tokens." if rows[0]["samples"] else "."),
        "",
        "Peak: VmHWM of the process; above bare: less that of an interpreter that only imports bitfold. Seconds are "
        "without the interpreter's start; reading, rounding, packing, writing, reading back and verifying every block "
        "are in them. GB/s: bf16 weights per second. The file was just written, so it is in the page cache for `cp` "
        "and for bitfold; neither waits for the disk. CPU s: of the whole process, its start (about 4 s) included. "
        "Load: average over a minute at the end; above the number of threads, others worked on the same cores.",
        "",
        "| layers | dtype | weights GB | peak MB | above bare MB | s | CPU s | GB/s | cp s | cp GB/s | load |",
        "| --: | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        cells = [str(row["layers"]), row["dtype"], f"{row['bytes'] / 1e9:.2f}"]
        cells += [f"{row['peak_rss_mb']:.0f}", f"{row['peak_rss_mb'] - row['bare_mb']:.0f}"]
        cells += [f"{row['seconds']:.1f}", f"{row['process_cpu_seconds']:.0f}"]
        cells += [f"{row['gb_per_second']:.3f}", f"{row['cp_seconds']:.2f}"]
        cells += [f"{row['cp_gb_per_second']:.2f}", f"{row['load_average']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        peaks = [row["peak_rss_mb"] for row in rows if row["dtype"] == dtype]
        spread = (max(peaks) - min(peaks)) / min(peaks)
        lines.append(f"Largest difference between the peaks, {dtype}: {spread:.1%}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
