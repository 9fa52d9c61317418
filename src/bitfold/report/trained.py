"""What the command line says of a training."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from bitfold.report import terminal

__all__ = ["adapter_table", "print_adapter", "print_trained"]

_NAMES = {"lora": "LoRA", "bitfit": "biases"}


def print_adapter(result: Any) -> None:
    """What was trained, what it cost, what came of it, and how to use it."""
    console = terminal.console()
    kinds = " and ".join(_NAMES[kind] for kind in result.kinds)
    resumed = f", resumed after {result.resumed} steps" if result.resumed else ""
    console.print(
        f"[green]{escape(str(result.out))}[/]: {kinds} on {escape(result.base)}, "
        f"{terminal.human_bytes(result.size_bytes)}\n"
        f"  trained {result.trained:,} parameters, {result.share:.3%} of the model's\n"
        f"  {result.steps} steps in {terminal.human_seconds(result.seconds)}{resumed}, "
        f"the state of step {result.kept} kept\n"
        f"  memory  {result.peak_rss_mb:.0f} MB at the peak, the packed base {terminal.human_bytes(result.base_bytes)}"
    )
    if result.held_back_before is not None and result.held_back_after is not None:
        console.print(
            f"  loss on held-back text {result.held_back_before:.4f} → {result.held_back_after:.4f} nats per token"
        )
    if result.perplexity_before and result.perplexity_after:
        ratio = result.perplexity_after / result.perplexity_before
        console.print(
            f"  perplexity {result.perplexity_before:,.2f} → {result.perplexity_after:,.2f} "
            f"({ratio:.3f} of before)"
        )
    for note in result.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    place = escape(str(result.out))
    console.print(f"\n[bold]Use it[/]\n  bitfold eval {place} --text FILE")
    console.print(f'  bitfold generate {place} --prompt "Once upon a time"')


def print_trained(result: Any) -> None:
    """What training through rounding did, and how to use the artifact."""
    console = terminal.console()
    artifact = result.artifact
    resumed = f", resumed after {result.resumed} steps" if result.resumed else ""
    console.print(
        f"[green]{escape(str(artifact.out))}[/]: {escape(artifact.scheme)} by {escape(result.method)}, "
        f"{terminal.human_bytes(artifact.size_bytes)}, {artifact.bits_per_weight:.3f} bits per quantized weight\n"
        f"  trained {result.trained:,} parameters through their rounding\n"
        f"  {result.steps} steps in {terminal.human_seconds(result.seconds)}{resumed}, "
        f"the state of step {result.kept} kept\n"
        f"  memory  {result.peak_rss_mb:.0f} MB at the peak"
    )
    if result.held_back_before is not None and result.held_back_after is not None:
        what = "KL to the teacher" if result.guided else "loss"
        console.print(
            f"  {what} on held-back text {result.held_back_before:.4f} → {result.held_back_after:.4f} nats per token"
        )
    if result.perplexity is not None:
        kl = "" if result.kl is None else f", KL to the teacher {result.kl:.4f}"
        console.print(f"  perplexity {result.perplexity:,.2f}{kl}")
    for note in result.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    place = escape(str(artifact.out))
    console.print(f"\n[bold]Use it[/]\n  bitfold eval {place} --text FILE")
    console.print(f'  bitfold generate {place} --prompt "Once upon a time"')


def adapter_table(adapter: dict[str, Any]) -> Table:
    """The lines of `bitfold inspect` about an adapter."""
    figures = adapter["figures"]
    facts = [
        ("adapter", " and ".join(_NAMES[kind] for kind in adapter["kinds"])),
        ("base", adapter["base"]),
    ]
    if adapter["scheme"]:
        nested = ", scales quantized too" if adapter["double"] else ""
        facts.append(("base as loaded", f"{adapter['scheme']}{nested}"))
    if "rank" in adapter:
        layers = ", ".join(adapter["targets"])
        facts.append(("LoRA", f"rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {layers}"))
    if figures:
        facts.append(("trained", f"{figures['trained']:,} parameters, {figures['share']:.3%}"))
        facts.append(("steps", f"{figures['steps']}, that of {figures['kept']} kept"))
        before, after = figures.get("perplexity_before"), figures.get("perplexity_after")
        if before and after:
            facts.append(("perplexity", f"{before:,.2f} → {after:,.2f}"))
    result = Table(show_header=False, title="on its base, which follows", title_justify="left")
    for name, value in facts:
        result.add_row(name, escape(value))
    return result
