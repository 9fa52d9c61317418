"""`bitfold export` and `bitfold import`: what was quantized, in the formats of others."""

from pathlib import Path
from typing import Annotated

import typer

from bitfold.cli.options import Json, Overwrite
from bitfold.report import outcome, terminal
from bitfold.report.progress import showing_progress

__all__ = ["export", "import_"]


def export(
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="What `bitfold quantize` wrote, or a checkpoint."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="gguf (llama.cpp), onnx (ONNX Runtime), openvino, torch (torch.export), executorch, litert, gptq, awq."
        ),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The exact path: a file for gguf, else a directory.")
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="Of onnx: fast, compact or tensorrt. Of executorch and litert: tokens of the cache (1024)."
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """An artifact in the format of another engine: its integers, scales and zero-points as they are."""
    from bitfold.export.exporting import export_to

    with showing_progress("exporting") as progress:
        result = export_to(artifact, to, out, form=form, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_exported(result)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="Quantized by others: a GGUF file, or a directory (gptq, awq, compressed-tensors, bitsandbytes).",
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the result.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """What others quantized, with the same integers, as a checkpoint that bitfold evaluates and exports."""
    from bitfold.export.importing import import_checkpoint

    with showing_progress("importing") as progress:
        result = import_checkpoint(source, out, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_exported(result)
