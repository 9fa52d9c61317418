"""`bitfold eval` and `bitfold verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from bitfold.cli.options import Device, Dtype, Json, Model
from bitfold.report.progress import showing_progress

__all__ = ["eval", "verify"]

_ENGINE: Any = {"rich_help_panel": "In another engine"}


def eval(
    model: Model,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Evaluation text; may be repeated."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAME,…", help="Files of questions (.jsonl), and tasks of lm-eval."),
    ] = None,
    kl_base: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's --kl-divergence-base FILE: compare with its logits."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Make the file of --kl-base, of MODEL on --text.")
    ] = False,
    sequence_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a window; default: the model's, at most 2048 (--write: 512)."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The original: adds KL and top-1 agreement; of tasks, the recovery."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Only the first so many windows of a text, questions of a task."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Perplexity of a model on a text, accuracy on tasks, and its distance to the original."""
    from bitfold.report.measuring import Measures, measure, print_measures

    measures = Measures(text or (), tasks, kl_base, write, against, sequence_length, limit)
    measures.check()
    with showing_progress("evaluating") as progress:
        found = measure(model, measures, device, dtype, progress)
    print_measures(found, json)


def verify(
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="An artifact of bitfold, or a GGUF file made from one."),
    ],
    engine: Annotated[
        str | None, typer.Option(help="vllm: run it there too, and compare.", **_ENGINE)
    ] = None,
    engine_python: Annotated[
        str | None, typer.Option(help="The python of the engine's environment.", **_ENGINE)
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Of a GGUF file: the artifact it was made from.", **_ENGINE)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A text to compare on; vllm: an embedded one.", **_ENGINE)
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Load a result the way a user would, and compare it with the simulation recorded at quantization."""
    from bitfold.report.verifying import verify_and_print

    verify_and_print(out, engine, engine_python, against, text, device, json)
