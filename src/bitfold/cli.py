"""The command line: parses, calls the library, prints. It adds nothing that Python cannot do."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from bitfold.errors import did_you_mean
from bitfold.report import outcome, terminal
from bitfold.report.ending import USAGE_ERROR, ending
from bitfold.report.mixed import mixed_options
from bitfold.report.progress import showing_progress as _progress
from bitfold.version import VERSION

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """A misspelt command is answered with the nearest right one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.commands:
            raise USAGE_ERROR(f"There is no command '{name}': {did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Makes language models small enough for the machine in front of you.\n\n"
    "Start with [bold]bitfold demo[/], then: bitfold quantize MODEL -o OUT",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(VERSION)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """Options of the whole."""


Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, nothing else.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local directory, or a name on the hub.")
]


_MIXED: Any = {"rich_help_panel": "Mixed precision"}
_ENGINE: Any = {"rich_help_panel": "In another engine"}


@app.command(
    epilog="Example: bitfold quantize ./llama-3.2-1b -o ./llama-w4 --method awq --scheme w4a16g128"
)
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
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a window; default: the model's, at most 2048.")
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
            {"--bits": bits, "--fit": fit, "--latency": latency, "--out": out},
            json,
        )
        return
    if out is None:
        raise USAGE_ERROR("Missing option '-o' / '--out': see `bitfold quantize --help`")
    target = out
    with _progress("quantizing") as progress:
        result = run(
            model,
            target,
            method=method,
            effort=effort,
            scheme=scheme,
            recipe=recipe,
            set=set or (),
            calibration=calibration or (),
            samples=samples,
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
        )
    if json:
        terminal.print_json(result.to_json())
    elif isinstance(result, Estimate):
        outcome.print_estimate(result, target)
    else:
        outcome.print_quantization(result)


def _sensitivity(model: str, options: dict[str, Any], refused: dict[str, Any], json: bool) -> None:
    """Measure, and print the ranking; options of a result that is not made are refused."""
    from bitfold.pipeline.sensitivity import sensitivity as run

    given = [name for name, value in refused.items() if value is not None]
    if given:
        raise USAGE_ERROR(f"--sensitivity only measures: leave {' and '.join(given)} out")
    with _progress("measuring") as progress:
        result = run(model, progress=progress, **options)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_sensitivity(result)


@app.command(
    epilog="Example: bitfold eval ./llama-w4 --text wiki.test.txt --tasks arc_easy,mine.jsonl --against ./llama-3.2-1b"
)
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
    with _progress("evaluating") as progress:
        found = measure(model, measures, device, dtype, progress)
    print_measures(found, json)


@app.command(epilog="Example: bitfold verify ./llama-w4")
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


@app.command(epilog="Example: bitfold export ./llama-w4 --to gguf -o llama-w4.gguf")
def export(
    artifact: Annotated[
        Path,
        typer.Argument(metavar="ARTIFACT", help="What `bitfold quantize` wrote, or a checkpoint."),
    ],
    to: Annotated[str, typer.Option(help="gguf (llama.cpp), onnx (ONNX Runtime), gptq or awq.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="The exact path: a file for gguf, else a directory.")
    ],
    form: Annotated[str | None, typer.Option(help="Of onnx: fast, compact or tensorrt.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """An artifact in the format of another engine: its integers, scales and zero-points as they are."""
    from bitfold.export.exporting import export_to

    with _progress("exporting") as progress:
        result = export_to(artifact, to, out, form=form, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_exported(result)


@app.command("import", epilog="Example: bitfold import ./llama-gptq -o ./llama-w4")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Quantized by others: gptq, awq, compressed-tensors."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Directory of the result.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """What others quantized, with the same integers, as a checkpoint that bitfold evaluates and exports."""
    from bitfold.export.importing import import_checkpoint

    with _progress("importing") as progress:
        result = import_checkpoint(source, out, overwrite=overwrite, progress=progress)
    if json:
        terminal.print_json(result.to_json())
    else:
        outcome.print_exported(result)


@app.command(epilog="Example: bitfold inspect ./llama-w4")
def inspect(model: Model, json: Json = False) -> None:
    """What a model is: family, blocks, sites, sizes, schemes, recipe, provenance."""
    from bitfold.report.describe import describe

    content = describe(model)
    if json:
        terminal.print_json(content)
        return
    console = terminal.console()
    for one in terminal.description_tables(content):
        console.print(one)
    if "recipe" in content:
        console.print(f"\n[bold]recipe.yaml[/]\n{escape(content['recipe'])}")


@app.command(epilog="Example: bitfold recipes awq")
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


@app.command(
    epilog='Example: bitfold generate ./llama-w4 --prompt "Once upon a time" --max-new-tokens 40'
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
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Continue a prompt greedily, and say how fast."""
    from bitfold.evaluate.generation import generate as run

    result = run(
        model, prompt, max_new_tokens=max_new_tokens, device=device, dtype=dtype, kv_bits=kv_bits
    )
    if json:
        terminal.print_json(result.to_json())
        return
    outcome.print_generation(result, prompt)


@app.command(epilog="Example: bitfold demo")
def demo(
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Directory for the demo's artifacts.")
    ] = Path("out/demo"),
    json: Json = False,
) -> None:
    """Quantize the embedded model, measure it before and after, and let each write a sentence."""
    from bitfold.report.demo import print_demo, run_demo

    with _progress("demo") as progress:
        rows = run_demo(out, progress)
    if json:
        terminal.print_json({"rows": rows})
    else:
        print_demo(rows)


def main() -> None:
    """Entry point: errors that are the input's or the machine's become one sentence and exit code 1."""
    ending(lambda: app(standalone_mode=False, prog_name="bitfold"))
