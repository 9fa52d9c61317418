"""`bitfold quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.options import Device, Dtype, Json, Model
from bitfold.report import outcome, terminal
from bitfold.report.ending import USAGE_ERROR
from bitfold.report.exports import export_all, places
from bitfold.report.mixed import mixed_options
from bitfold.report.progress import showing_progress

__all__ = ["quantize"]

_ENGINES: Any = {"rich_help_panel": "Other engines"}
_MIXED: Any = {"rich_help_panel": "Mixed precision"}


def quantize(
    model: Model,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory of the artifact.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="auto (the default), or any: awq, rtn+distil … (`bitfold recipes`)."),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="Of auto, flat and affine-plus: low, medium (the default) or high."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w<bits>a<bits>, then q<bits>, kv<bits>, g<group> as needed; default w4a16g128."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file (YAML).")] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="key=value, e.g. weight.symmetric=true, awq.steps=40.")
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            help=".txt, .jsonl, .npy; default: an embedded text. Or generate: the model writes; or random."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows; default 128.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; default: the model's, at most 2048.")
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="NAME,…",
            help="Say what would not fit there: transformers, vllm, and the formats of --to.",
            **_ENGINES,
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            help="Export at once, to OUT.gguf or OUT-NAME: gguf,onnx,openvino,torch,executorch,litert,gptq,awq; "
            "implies --for.",
            metavar="NAME,…",
            **_ENGINES,
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn; default 0.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    ignore: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers left alone, e.g. '*.down_proj'.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact at OUT.")
    ] = False,
    no_resume: Annotated[
        bool, typer.Option("--no-resume", help="Start a killed run afresh.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and what it would take.")
    ] = False,
    bits: Annotated[
        float | None,
        typer.Option(help="Find each layer's bits, so many in the mean: 3.25.", **_MIXED),
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="Find each layer's bits; size of the whole: 3.5GB.", **_MIXED)
    ] = None,
    latency: Annotated[
        float | None, typer.Option(help="Seconds of all layers, by --latency-table.", **_MIXED)
    ] = None,
    latency_table: Annotated[
        Path | None, typer.Option(help="JSON: seconds by shape and bits.", **_MIXED)
    ] = None,
    candidates: Annotated[
        str | None, typer.Option(help="Bits to choose from; default 16,8,6,5,4,3,2.", **_MIXED)
    ] = None,
    group_sizes: Annotated[
        str | None, typer.Option(help="Group sizes to choose from, as 128,64.", **_MIXED)
    ] = None,
    per: Annotated[str | None, typer.Option(help="layer (the default) or kind.", **_MIXED)] = None,
    unfused: Annotated[
        bool, typer.Option("--unfused", help="q, k, v and gate, up choose apart.", **_MIXED)
    ] = False,
    sensitivity_windows: Annotated[
        int | None, typer.Option(help="Windows to measure on; default 8.", **_MIXED)
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Only measure, and print the ranking.", **_MIXED)
    ] = False,
    json: Json = False,
) -> None:
    """Quantize a checkpoint: MODEL and a recipe in, an artifact that transformers and vLLM load out."""
    from bitfold.pipeline.estimate import Estimate
    from bitfold.pipeline.quantize import quantize as run

    mixed = mixed_options(candidates, group_sizes, per, unfused, sensitivity_windows, latency_table)
    if sensitivity:
        _sensitivity(
            model,
            {"method": method, "effort": effort, "scheme": scheme, "recipe": recipe}
            | {"set": set or ()}
            | {"ignore": ignore or (), "seed": seed, "calibration": calibration or ()}
            | {"device": device, "dtype": dtype, "mixed": mixed},
            {"--bits": bits, "--fit": fit, "--latency": latency, "--latency-table": latency_table}
            | {"--out": out, "--for": engines, "--to": to}
            | {"--overwrite": overwrite or None, "--no-resume": no_resume or None}
            | {"--dry-run": dry_run or None},
            {"--samples": samples, "--sequence-length": sequence_length},
            json,
        )
        return
    if out is None:
        raise USAGE_ERROR("Missing option '-o' / '--out': see `bitfold quantize --help`")
    exports = places(to, out, overwrite)
    wanted = [name for text in (engines, to) if text for name in text.split(",")]
    with showing_progress("quantizing") as progress:
        result = run(
            model,
            out,
            method=method,
            effort=effort,
            scheme=scheme,
            recipe=recipe,
            set=set or (),
            calibration=calibration or (),
            samples=128 if samples is None else samples,
            sequence_length=sequence_length,
            seed=seed,
            device=device,
            dtype=dtype,
            ignore=ignore or (),
            overwrite=overwrite,
            resume=not no_resume,
            dry_run=dry_run,
            progress=progress,
            bits=bits,
            fit=fit,
            latency=latency,
            mixed=mixed,
            meant_for=list(dict.fromkeys(wanted)),
        )
    made = [] if isinstance(result, Estimate) else export_all(out, exports, overwrite)
    if json:
        more = {"exports": [one.to_json() for one in made]} if to else {}
        terminal.print_json(result.to_json() | more)
        return
    if isinstance(result, Estimate):
        outcome.print_estimate(result, out)
    else:
        outcome.print_quantization(result)
    for one in made:
        outcome.print_exported(one)


def _sensitivity(
    model: str,
    options: dict[str, Any],
    of_results: dict[str, Any],
    of_calibration: dict[str, Any],
    json: bool,
) -> None:
    """Measure, and print the ranking; options of a result that is not made are refused, and those of a calibration that
    has a size of its own here."""
    from bitfold.pipeline.sensitivity import sensitivity as run

    given = [name for name, value in of_results.items() if value is not None]
    if given:
        raise USAGE_ERROR(f"--sensitivity only measures: leave {_and(given)} out")
    given = [name for name, value in of_calibration.items() if value is not None]
    if given:
        raise USAGE_ERROR(
            "--sensitivity measures on windows of its own, as many as --sensitivity-windows says: leave "
            f"{_and(given)} out"
        )
    with showing_progress("measuring") as progress:
        result = run(model, progress=progress, **options)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_sensitivity(result)


def _and(names: list[str]) -> str:
    """Names in a sentence.

    >>> _and(["--bits", "--fit", "--out"])
    '--bits, --fit and --out'
    """
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1]) if part])
