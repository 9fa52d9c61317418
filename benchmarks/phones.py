"""What phones would run: artifacts in ExecuTorch and LiteRT, their size, perplexity, speed and memory on this machine.

scripts/make_phones_environment.sh /tmp/phones
/tmp/phones/bin/python benchmarks/phones.py --out docs/results/phones
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from bitfold.assets import DEMO_MODEL, EVALUATION_TEXT
from bitfold.engines.phone_engine import PHONE_FORMATS, phone_engine
from children import bitfold_json, examples
from measuring import Asked, Row, Rows, command_line, markdown_table, provenance, write_results

_SAME = "weight.symmetric=true,activation.symmetric=false"
SCHEMES = (f"w8a8:{_SAME}", f"w4a8g32:{_SAME}")
_PROMPT, _STEPS, _REPEATS = 256, 32, 5


def main() -> None:
    """A row for each engine and scheme."""
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL)
    add("--method", default="rtn")
    add("--format", nargs="+", default=["litert", "executorch"], choices=list(PHONE_FORMATS))
    add("--scheme", nargs="+", default=SCHEMES, help="SCHEME[:KEY=VALUE,…]")
    add("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    add("--rows", type=Path, default=Path("out/benchmarks/phones.jsonl"), help="finished rows")
    options = parser.parse_args()
    known = Rows(options.rows, ("model", "method", "format", "scheme"))
    rows = []
    for format in options.format:
        for scheme in options.scheme:
            of = {"model": options.model.name, "method": options.method}
            of |= {"format": format, "scheme": scheme}

            def make(format: str = format, scheme: str = scheme) -> Row:
                return _row(options.model, options.method, format, scheme)

            rows.append(known.get(of, make, f"{format} {scheme}"))
    write_results(options.out, {"command": command_line(), "rows": rows}, _page(rows))


def _row(model: Path, method: str, format: str, scheme: str) -> Row:
    with tempfile.TemporaryDirectory(prefix="bitfold-phones-") as name:
        artifact, out = Path(name) / "artifact", Path(name) / format
        asked = Asked.parse(method, scheme).arguments
        bitfold_json("quantize", model, "-o", artifact, *asked)
        made = bitfold_json("export", artifact, "--to", format, "-o", out)
        texts = ("--against", artifact, "--text", EVALUATION_TEXT)
        verified = bitfold_json("verify", out, *texts)
        file = out / PHONE_FORMATS[format].file
        return {
            "bytes": file.stat().st_size,
            "export_seconds": made["process_seconds"],
            "notes": made["notes"],
            "verified": verified,
            **_speed(out, format),
        }


def _speed(out: Path, format: str) -> Row:
    """Medians of a prompt, and of one token behind it; what the model takes of memory."""
    tokens = (torch.arange(_PROMPT) * 37 % 4096).tolist()
    prompts, steps = [], []
    with phone_engine(out, format, Path(sys.executable)) as engine:
        for _ in range(_REPEATS):
            engine.start()
            engine.decode(tokens)
            prompts.append(engine.seconds)
        for _ in range(_STEPS):
            engine.decode(tokens[:1])
            steps.append(engine.seconds)
        return {
            "version": engine.version,
            "prompt_seconds": statistics.median(prompts),
            "step_seconds": statistics.median(steps),
            "memory": engine.memory,
        }


def _page(rows: list[Row]) -> str:
    header = ["engine", "scheme", "file, MB", "perplexity", "in PyTorch", "KL", "difference"]
    header += ["prompt, tokens/s", "step, ms", "tokens/s", "memory, MB"]
    table = markdown_table(header, [_cells(row) for row in rows])
    versions = {f"{PHONE_FORMATS[row['format']].name} {row['version']}" for row in rows}
    return "\n".join(
        [
            "# Artifacts in the engines of phones\n",
            f"{rows[0]['model']} by `{rows[0]['method']}`, in {', '.join(sorted(versions))},",
            "on this machine's processor with one thread: a phone's has other kernels of the same library (XNNPACK).",
            "Perplexity and KL on the first 16 windows of 512 tokens of the embedded text, in the engine and in",
            "bitfold's simulation; difference: of the probe's logits, root mean square over their spread. Speed: the",
            f"median of {_REPEATS} prompts of {_PROMPT} tokens, and of {_STEPS} single tokens behind them, with a",
            "cache of 512, while other work ran on both cores. Memory: what the engine's process took for the model",
            "at most. Layers that are not quantized (the head, and with it the embedding) are in float32.\n",
            f"`{command_line()}`\n",
            provenance(rows),
            "",
            *table,
            "",
        ]
    )


def _cells(row: Row) -> list[str]:
    text = row["verified"]["text"]
    return [
        PHONE_FORMATS[row["format"]].name,
        row["scheme"],
        f"{row['bytes'] / 1e6:.2f}",
        f"{text['perplexity_engine']:.2f}",
        f"{text['perplexity_simulation']:.2f}",
        f"{text['kl_mean']:.1e}",
        f"{row['verified']['difference']:.1e}",
        f"{_PROMPT / row['prompt_seconds']:,.0f}",
        f"{1e3 * row['step_seconds']:.2f}",
        f"{1 / row['step_seconds']:,.0f}",
        f"{row['memory'] / 1e6:.0f}" if row["memory"] > 0 else "",
    ]


if __name__ == "__main__":
    main()
