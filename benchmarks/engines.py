"""Which schemes an engine runs, and whether it computes what was simulated: `bitfold verify OUT --engine vllm` of each.

scripts/make_vllm_environment.sh /tmp/vllm-env
python benchmarks/engines.py --engine-python /tmp/vllm-env/bin/python --out docs/results/engines
"""

import argparse
import json
import tempfile
from pathlib import Path

from bitfold.assets import DEMO_MODEL
from children import Failed, bitfold_json, examples
from measuring import Asked, Row, Rows, command_line, markdown_table, provenance, write_results

WEIGHT, BOTH = (
    "weight.symmetric=true",
    "weight.symmetric=true,activation.symmetric=true",
)
SCHEMES = (
    *("w4a16g128", f"w4a16g128:{WEIGHT}", "w4a16", f"w4a16:{WEIGHT}"),
    *("w2a16g64", "w3a16g128", "w8a16", "wfp8a16", "wmxfp4a16", "wnvfp4a16"),
    *("w8a8", f"w8a8:{WEIGHT}", f"w8a8:{WEIGHT},activation.static=true"),
    *("wfp8afp8", "wfp8afp8:activation.static=true"),
    *("w4a8", f"w4a8:{WEIGHT}", f"w4a8g128:{WEIGHT}", f"w4a4:{BOTH}"),
    *("wmxfp4amxfp4", "wnvfp4anvfp4", "w8a16kv8", f"w4a4q4kv4:{BOTH}", "wnf4a16g64"),
)


def main() -> None:
    """A row for each scheme."""
    parser = argparse.ArgumentParser(**examples(__doc__))
    add = parser.add_argument
    add("--engine-python", required=True, help="the python of vLLM's environment")
    add("--model", type=Path, default=DEMO_MODEL)
    add("--scheme", nargs="+", default=SCHEMES, help="SCHEME[:KEY=VALUE,…]")
    add("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    add("--rows", type=Path, default=Path("out/benchmarks/engines.jsonl"), help="finished rows")
    options = parser.parse_args()
    known = Rows(options.rows, ("model", "scheme"))
    rows = [
        known.get(
            {"model": options.model.name, "scheme": scheme},
            lambda scheme=scheme: _row(options.model, scheme, options.engine_python),  # type: ignore[misc]
            scheme,
        )
        for scheme in options.scheme
    ]
    write_results(options.out, {"command": command_line(), "rows": rows}, _page(rows))


def _row(model: Path, scheme: str, python: str) -> Row:
    """What is made of the scheme by rtn, and what the engine says of it."""
    with tempfile.TemporaryDirectory(prefix="bitfold-engines-") as directory:
        out = Path(directory) / "artifact"
        asked = Asked.parse("rtn", scheme).arguments
        made = bitfold_json("quantize", model, "-o", out, *asked)
        settings = json.loads((out / "config.json").read_text())["quantization_config"]
        row = {"bits_per_weight": made["bits_per_weight"], "format": settings["quant_method"]}
        try:
            return row | {
                "vllm": bitfold_json("verify", out, "--engine", "vllm", "--engine-python", python)
            }
        except Failed as failure:
            if not failure.kind:
                raise
            return row | {"kind": failure.kind, "error": failure.sentence.replace(str(out), "OUT")}


def _page(rows: list[Row]) -> str:
    header = ["scheme", "transformers", "vLLM", "dtype", "perplexity", "in PyTorch"]
    header += ["mean difference", "up to", "largest", "up to", "rounding", "inputs"]
    table = markdown_table(header, [_cells(row) for row in rows])
    failed = [f"- `{row['scheme']}`: {row['error']}" for row in rows if "error" in row]
    return "\n".join(
        [
            "# Which schemes run where\n",
            "Artifacts of tiny-llama by `rtn`. transformers: whether it loads them without bitfold. vLLM: on the CPU,",
            "8 windows of 256 tokens of the embedded text. Differences are of log-probabilities in nats, of the token",
            "that comes next and the 19 likeliest others, in vLLM and in PyTorch; up to: what may be rounding. The",
            "last two are in PyTorch: what rounding to vLLM's dtype does in the mean, what quantizing inputs does.\n",
            f"`{command_line()}`\n",
            provenance(rows),
            "",
            *table,
            "\nWhat vLLM, or bitfold of it, says:\n",
            *failed,
            "",
        ]
    )


def _cells(row: Row) -> list[str]:
    plain = "yes" if row["format"] == "compressed-tensors" else "with bitfold"
    if "error" in row:
        what = "other numbers" if row["kind"] == "VerificationError" else "no"
        return [row["scheme"], plain, what, *[""] * 9]
    text = row["vllm"]["texts"]["text"]
    figures = [
        *(f"{text[key]:.2f}" for key in ("perplexity", "simulation_perplexity")),
        *(f"{text[key]:.4f}" for key in ("mean_difference", "mean_tolerance")),
        *(f"{text[key]:.3f}" for key in ("max_difference", "max_tolerance")),
        f"{text['rounding_mean']:.4f}",
        "" if text["inputs_mean"] is None else f"{text['inputs_mean']:.4f}",
    ]
    return [row["scheme"], plain, "verified", row["vllm"]["dtype"], *figures]


if __name__ == "__main__":
    main()
