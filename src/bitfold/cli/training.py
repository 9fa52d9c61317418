"""`bitfold train …`: training in few bits."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.options import Device, Dtype, Json, Model, Overwrite
from bitfold.report import terminal, trained
from bitfold.report.progress import showing_progress

__all__ = ["bitfit", "merge", "qat", "qlora", "train"]

train = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Train in few bits: all weights through their rounding (qat), or adapters (qlora) and biases (bitfit) on a "
    "base that stays packed.",
)

_Text = Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text to train on.")]
_Out = Annotated[Path, typer.Option("-o", "--out", help="Directory of the adapter.")]
_Evaluate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Perplexity on this text, before and after."),
]
_EvaluateWindows = Annotated[
    int | None, typer.Option(help="Only the first so many windows of --evaluate.")
]
_Steps = Annotated[int, typer.Option(help="Steps of the optimizer.")]
_Batch = Annotated[int, typer.Option(help="Windows in a step.")]
_Accumulate = Annotated[int, typer.Option(help="Pieces of a step's batch, to save memory.")]
_Rate = Annotated[
    float | None, typer.Option(help="Of LoRA's matrices; default: 2e-4 · 4096 / width.")
]
_BiasRate = Annotated[float | None, typer.Option(help="Of biases; default: 1e-3 · 4096 / width.")]
_Length = Annotated[
    int | None,
    typer.Option(help="Tokens of a window; default: the model's, at most 256 (qat: 512)."),
]
_Teacher = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Imitate this model's logits, too: the original, say."),
]
_TeacherWeight = Annotated[float, typer.Option(help="Of the teacher in the loss, 0 to 1.")]
_Scheme = Annotated[
    str | None,
    typer.Option(help="Of an original as it is loaded; default nf4 in groups of 64; w16a16: none."),
]
_Double = Annotated[
    bool, typer.Option("--double/--single", help="Quantize the scales of an original, too.")
]
_HoldBack = Annotated[
    float, typer.Option(help="Share of the text that the best state is chosen by; 0: the last.")
]
_Seed = Annotated[int, typer.Option(help="Seed of everything drawn.")]
_NoResume = Annotated[bool, typer.Option("--no-resume", help="Start a killed run afresh.")]


def qat(
    model: Model,
    text: _Text,
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the artifact.")],
    evaluate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Perplexity of the artifact on this text, and KL to TEACHER."
        ),
    ] = None,
    evaluate_windows: _EvaluateWindows = None,
    scheme: Annotated[
        str,
        typer.Option(help="Of the artifact: w2a16g64, w4a8, …; inputs are rounded as they come."),
    ] = "w4a16g128",
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Of the scheme: weight.symmetric=true; may be repeated."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="How weights are trained through rounding: lsq, qat, twn, ternary.")
    ] = "lsq",
    start: Annotated[
        str,
        typer.Option(
            help="The method of PTQ whose codes lsq begins with: quantease, gptq, …; rtn: none."
        ),
    ] = "quantease",
    teacher: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="Imitate its logits: MODEL itself, usually."),
    ] = None,
    teacher_weight: _TeacherWeight = 1.0,
    written: Annotated[
        int,
        typer.Option(help="Windows that the teacher writes itself, drawn as often as the text's."),
    ] = 512,
    steps: _Steps = 500,
    batch: _Batch = 8,
    accumulate: _Accumulate = 1,
    rate: Annotated[float | None, typer.Option(help="Default: 2e-5 · 4096 / width.")] = None,
    sequence_length: _Length = None,
    hold_back: _HoldBack = 0.05,
    seed: _Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
    no_resume: _NoResume = False,
    json: Json = False,
) -> None:
    """Train all weights through their rounding: what comes out is an artifact like any of quantize's."""
    from bitfold.training.qat import QatOptions, train_qat

    options = QatOptions(
        method=method,
        start=start,
        scheme=scheme,
        settings=tuple(set or ()),
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        rate=rate,
        sequence_length=sequence_length,
        written=written,
        teacher_weight=teacher_weight,
        hold_back=hold_back,
        seed=seed,
        evaluate_windows=evaluate_windows,
    )
    more = {"evaluation": evaluate, "teacher": teacher, "device": device}
    _run(
        train_qat,
        model,
        text,
        out,
        options,
        more,
        overwrite,
        no_resume,
        json,
        trained.print_trained,
    )


def qlora(
    model: Model,
    text: _Text,
    out: _Out,
    evaluate: _Evaluate = None,
    evaluate_windows: _EvaluateWindows = None,
    steps: _Steps = 100,
    batch: _Batch = 4,
    accumulate: _Accumulate = 1,
    rate: _Rate = None,
    bias_rate: _BiasRate = None,
    rank: Annotated[int, typer.Option(help="Of LoRA's matrices.")] = 16,
    alpha: Annotated[float, typer.Option(help="LoRA's product is scaled by alpha / rank.")] = 32.0,
    dropout: Annotated[float, typer.Option(help="Of LoRA's input.")] = 0.05,
    target: Annotated[
        list[str] | None,
        typer.Option(help="q_proj, say; may be repeated. Default: all linear layers."),
    ] = None,
    bitfit: Annotated[bool, typer.Option("--bitfit", help="Train the biases, too.")] = False,
    sequence_length: _Length = None,
    teacher: _Teacher = None,
    teacher_weight: _TeacherWeight = 0.5,
    scheme: _Scheme = None,
    double: _Double = True,
    hold_back: _HoldBack = 0.05,
    seed: _Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    no_resume: _NoResume = False,
    json: Json = False,
) -> None:
    """Train LoRA adapters on an artifact, a checkpoint of bitsandbytes', or an original rounded to nf4."""
    from bitfold.training.adapters import AdapterOptions, train_qlora

    options = AdapterOptions(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        rate=rate,
        bias_rate=bias_rate,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        targets=tuple(target or ()),
        bitfit=bitfit,
        sequence_length=sequence_length,
        teacher_weight=teacher_weight,
        scheme=scheme,
        double=double,
        hold_back=hold_back,
        seed=seed,
        evaluate_windows=evaluate_windows,
    )
    more = {"evaluation": evaluate, "teacher": teacher, "device": device, "dtype": dtype}
    _run(train_qlora, model, text, out, options, more, overwrite, no_resume, json)


def bitfit(
    model: Model,
    text: _Text,
    out: _Out,
    evaluate: _Evaluate = None,
    evaluate_windows: _EvaluateWindows = None,
    steps: _Steps = 100,
    batch: _Batch = 4,
    accumulate: _Accumulate = 1,
    bias_rate: _BiasRate = None,
    sequence_length: _Length = None,
    teacher: _Teacher = None,
    teacher_weight: _TeacherWeight = 0.5,
    scheme: _Scheme = None,
    double: _Double = True,
    hold_back: _HoldBack = 0.05,
    seed: _Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    no_resume: _NoResume = False,
    json: Json = False,
) -> None:
    """Train biases alone, added where a model has none; what they changed by is a small file."""
    from bitfold.training.adapters import AdapterOptions, train_bitfit

    options = AdapterOptions(
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        bias_rate=bias_rate,
        sequence_length=sequence_length,
        teacher_weight=teacher_weight,
        scheme=scheme,
        double=double,
        hold_back=hold_back,
        seed=seed,
        evaluate_windows=evaluate_windows,
    )
    more = {"evaluation": evaluate, "teacher": teacher, "device": device, "dtype": dtype}
    _run(train_bitfit, model, text, out, options, more, overwrite, no_resume, json)


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A directory of train's.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the checkpoint.")],
    into: Annotated[
        str | None,
        typer.Option(metavar="ORIGINAL", help="The full-precision model; default: the base."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """An adapter and its base as one checkpoint in floating point, which is no longer on the base's grid."""
    from bitfold.report.outcome import print_exported
    from bitfold.training.adapters import merge_adapter

    with showing_progress("merging") as progress:
        result = merge_adapter(adapter, out, into=into, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(result.to_json())
        return
    print_exported(result)


def _run(
    function: Any,
    model: str,
    text: Path,
    out: Path,
    options: Any,
    more: dict[str, Any],
    overwrite: bool,
    no_resume: bool,
    json: bool,
    show: Any = trained.print_adapter,
) -> None:
    with showing_progress("training") as progress:
        result = function(
            model,
            text,
            out,
            options=options,
            overwrite=overwrite,
            resume=not no_resume,
            progress=progress,
            **more,
        )
    if json:
        terminal.print_json(result.to_json())
        return
    show(result)


def _add(command: Any, example: str) -> None:
    train.command(epilog=f"Example: bitfold train {example}")(command)


_add(qat, "qat ./llama --teacher ./llama --text text.txt --scheme w2a16g64 -o ./llama-w2")
_add(qlora, "qlora ./llama-w4 --text law.txt --evaluate law-test.txt -o ./llama-law")
_add(bitfit, "bitfit ./llama-w4 --text law.txt -o ./llama-law-biases")
_add(merge, "merge ./llama-law --into ./llama -o ./llama-law-merged")
