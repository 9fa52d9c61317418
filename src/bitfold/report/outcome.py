"""What the command line says at the end of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from bitfold.report import terminal

__all__ = [
    "pareto_table",
    "print_engine_verification",
    "print_estimate",
    "print_exported",
    "print_generation",
    "print_quantization",
    "print_sensitivity",
]


def print_estimate(result: Any, out: Path) -> None:
    """What a run would take."""
    human = terminal.human_bytes
    terminal.console().print(
        f"Would quantize {result.quantized_layers} layers in {result.blocks} blocks to {escape(str(out))} "
        f"({result.format}):\n"
        f"  time    about {terminal.human_seconds(result.seconds)} on this machine (measured on the first block)\n"
        f"  memory  about {result.peak_rss_mb:.0f} MB at the peak\n"
        f"  disk    {human(result.size_bytes)} for the artifact, {human(result.disk_bytes)} while it grows\n"
        "Nothing was written."
    )
    for note in result.notes:
        terminal.console().print(f"[yellow]note:[/] {escape(note)}")


def print_quantization(result: Any) -> None:
    """What a run made, what it cost, and how to use it."""
    console = terminal.console()
    if result.finished_before:
        console.print(f"{escape(str(result.out))} is finished already: nothing was done.")
    else:
        console.print(terminal.layer_table(result.layers))
    smaller = result.original_bytes / result.size_bytes
    console.print(
        f"[green]{escape(str(result.out))}[/]: {result.scheme} by {result.method}, {result.bits_per_weight:.3f} bits "
        f"per weight, {terminal.human_bytes(result.size_bytes)} ({smaller:.1f} times smaller), "
        f"{terminal.human_seconds(result.seconds)}, peak memory {result.peak_rss_mb:.0f} MB"
        f"{f', resumed after {result.resumed_blocks} blocks' if result.resumed_blocks else ''}"
    )
    console.print(
        f"KL to the original on {result.probe['tokens']} probe tokens: {result.probe['kl_mean']:.4f} nats "
        f"(measure your own text: bitfold eval {escape(str(result.out))} --text FILE --against MODEL)"
    )
    if result.online is not None:
        console.print(f"[yellow]online[/] {escape(result.online['note'])}")
    if result.allocation is not None:
        console.print(pareto_table(result.allocation))
    for note in result.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print("\n[bold]Use it[/]")
    for line in result.usage:
        console.print(f"  {escape(line)}")


def print_generation(result: Any, prompt: str) -> None:
    """What was written, how fast, and in what memory."""
    console = terminal.console()
    console.print(f"[dim]{escape(prompt)}[/]{escape(result.text)}")
    speed = result.decode_tokens_per_second
    console.print(
        f"[dim]{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s, {result.new_tokens} new ones"
        f"{f' at {speed:.1f} a second' if speed else ''}, peak memory {result.peak_rss_mb:.0f} MB\n"
        f"cache {result.cache_bytes:,} bytes, {result.cache_bytes_per_token:,.0f} a token "
        f"(in bfloat16 {result.cache_bytes_bf16:,})[/]"
    )
    if result.forms:
        layers = ", ".join(f"{count} {form}" for form, count in result.forms.items())
        console.print(f"[dim]layers in quick forms: {layers}[/]")
    for note in (*result.cache_notes, *result.form_notes):
        console.print(f"[dim]{escape(note)}[/]")


def pareto_table(allocation: Mapping[str, Any]) -> Table:
    """The Pareto curve of mixed precision, and the chosen point in it."""
    chosen = allocation["chosen"]
    points = [(point, "") for point in allocation["pareto"] if point != chosen]
    points = sorted([*points, (chosen, "chosen")], key=lambda pair: pair[0]["bits_per_weight"])
    rows = [
        [
            f"{point['bits_per_weight']:.3f}",
            terminal.human_bytes(point["weight_bytes"]),
            *([f"{point['seconds']:.3g}"] if "seconds" in chosen else []),
            f"{point['kl']:.3g}",
            ", ".join(f"{count} at {name}" for name, count in point["layers"].items()),
            mark,
        ]
        for point, mark in points
    ]
    timed = ["seconds"] if "seconds" in chosen else []
    return terminal.table(
        ["bits per weight", "weights", *timed, "sum of sensitivities", "layers", ""],
        rows,
        title="mixed precision: what less costs",
    )


def print_sensitivity(result: Any) -> None:
    """The ranking of layers: KL by candidate, of each width the one with the largest groups."""
    every = list(dict.fromkeys(name for group in result.groups for name in group["kl"]))
    widest = {name.partition("g")[0]: name for name in reversed(every)}
    names = list(reversed(widest.values()))
    rows = [
        [group["name"], *(_figure(group["kl"].get(name)) for name in names)]
        for group in result.groups
    ]
    finer = len(every) - len(names)
    console = terminal.console()
    console.print(terminal.table(["layers", *names], rows))
    text = result.calibration
    console.print(
        f"KL to the original in nats per token where these layers alone are rounded to nearest, by bits and group; "
        f"ranked by {result.ranked_by}, measured on {text['windows']} windows of {text['sequence_length']} tokens "
        f"({escape(text['source'])}) in {terminal.human_seconds(result.seconds)}"
        f"{f'; {finer} candidates of finer groups are in --json' if finer else ''}"
    )


def _figure(kl: float | None) -> str:
    return "not finite" if kl is None else f"{kl:.3g}"


def print_engine_verification(result: Any) -> None:
    """That an artifact computes in an engine what was simulated, and how far apart they are."""
    heads = ["", "tokens", f"perplexity in {result.engine}", "in PyTorch"]
    heads += ["mean difference", "up to", "largest", "up to"]
    rows = [
        [
            name,
            f"{text.tokens:,}",
            f"{text.perplexity:,.2f}",
            f"{text.simulation_perplexity:,.2f}",
            *(f"{value:.4f}" for value in (text.mean_difference, text.mean_tolerance)),
            *(f"{value:.3f}" for value in (text.max_difference, text.max_tolerance)),
        ]
        for name, text in result.texts.items()
    ]
    console = terminal.console()
    console.print(terminal.table(heads, rows))
    console.print(
        f"[green]verified[/] in {result.engine} {result.version}, {result.dtype}: log-probabilities differ from the "
        "simulation's (in nats) by no more than rounding may"
    )


def print_exported(result: Any) -> None:
    """What was written for another engine, and what is different there."""
    console = terminal.console()
    types = ", ".join(f"{count:,} weights in {name}" for name, count in result.types.items())
    console.print(
        f"[green]{escape(str(result.path))}[/]: {result.format}, {result.bytes / 1e6:,.1f} MB"
        + (f"; {types}" if types else "")
    )
    for note in result.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    if result.format == "gguf":
        console.print(f"  bitfold verify {escape(str(result.path))}")
        console.print(f'  llama-cli -m {escape(str(result.path))} -p "Once upon a time"')
