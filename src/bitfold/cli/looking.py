"""`bitfold inspect`, `recipes`, `generate` and `demo`: what there is, and what it does."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bitfold.cli.options import Device, Dtype, Json, Model
from bitfold.report import outcome, terminal, trained
from bitfold.report.progress import showing_progress

__all__ = ["demo", "generate", "inspect", "recipes"]


def inspect(model: Model, json: Json = False) -> None:
    """What a model, GGUF file or export is: family, blocks, sites, sizes, schemes, tokenizer, recipe, provenance."""
    from bitfold.report.describe import describe

    content = describe(model)
    if json:
        terminal.print_json(content)
        return
    console = terminal.console()
    if "adapter" in content:
        console.print(trained.adapter_table(content["adapter"]))
    for one in terminal.description_tables(content):
        console.print(one)
    if "recipe" in content:
        console.print(f"\n[bold]recipe.yaml[/]\n{escape(content['recipe'])}")


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method; all of them without.")
    ] = None,
    json: Json = False,
) -> None:
    """The methods there are, or one of them in full."""
    import yaml

    from bitfold.methods import method_names, method_text
    from bitfold.recipe import Recipe

    if name is not None:
        full = Recipe.make(name)
        if json:
            terminal.print_json({"name": name} | full.model_dump(mode="json"))
        else:
            terminal.console().print(
                escape(f"{method_text(name)}\n# in full, with every default:\n{full.to_yaml()}")
                if "+" not in name
                else escape(full.to_yaml())
            )
        return
    methods = {
        method: yaml.safe_load(method_text(method)) | {"parts": Recipe.make(method).part_names}
        for method in method_names()
    }
    if json:
        terminal.print_json(methods)
        return
    rows = [
        [method, content["summary"], ", ".join(content["parts"]), content["paper"]]
        for method, content in methods.items()
    ]
    heads = ["method", "what it does", "parts", "paper"]
    terminal.console().print(terminal.table(heads, rows, left=True))
    terminal.console().print(
        "Compose with +, e.g. --method smoothquant+awq; see one: bitfold recipes awq"
    )


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 64,
    kv_bits: Annotated[
        int | None,
        typer.Option(
            help="2 to 8: keys and values are stored in so few; default: as the model says."
        ),
    ] = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="As evaluation and verify run it, not in quick forms."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Continue a prompt greedily, and say how fast."""
    from bitfold.evaluate.generation import generate as run

    result = run(
        model,
        prompt,
        max_new_tokens=max_new_tokens,
        device=device,
        dtype=dtype,
        kv_bits=kv_bits,
        exact=exact,
    )
    if json:
        terminal.print_json(result.to_json())
        return
    outcome.print_generation(result, prompt)


def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Directory for the demo's artifacts.")
    ] = Path("out/demo"),
    json: Json = False,
) -> None:
    """Quantize the embedded model, measure it before and after, and let each write a sentence."""
    from bitfold.report.demo import print_demo, run_demo

    with showing_progress("demo") as progress:
        rows = run_demo(out, progress)
    if json:
        terminal.print_json({"rows": rows})
    else:
        print_demo(rows)
