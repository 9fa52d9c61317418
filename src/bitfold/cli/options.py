"""Options that several commands have."""

from typing import Annotated

import typer

__all__ = ["Device", "Dtype", "Json", "Model", "Overwrite"]

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local directory, or a name on the hub.")
]
