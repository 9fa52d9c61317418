"""Tables and lines for the terminal. Everything goes to stderr or through `print_json`, so that --json stays pure."""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = [
    "console",
    "description_tables",
    "human_bytes",
    "human_seconds",
    "layer_table",
    "print_json",
    "table",
]


def console(*, stderr: bool = False) -> Console:
    """A console that does not break words in paths."""
    return Console(stderr=stderr, soft_wrap=True, highlight=False)


def print_json(content: Mapping[str, Any]) -> None:
    """One JSON object on stdout and nothing else."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def human_bytes(count: float) -> str:
    """Bytes for people.

    >>> human_bytes(11547040)
    '11.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration for people.

    >>> human_seconds(3725)
    '1 h 2 min'
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    *,
    left: bool = False,
) -> Table:
    """A plain table; every column but the first is right-aligned unless `left`."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(
            column, justify="left" if left or index == 0 else "right", overflow="fold"
        )
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """The layers by kind of operator: scheme, and the relative error of their outputs."""
    by_kind: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        by_kind[layer["name"].rpartition(".")[2], layer["scheme"]].append(layer)
    rows = []
    for (kind, scheme), members in by_kind.items():
        errors = [member["relative_error"] for member in members]
        worst = max(members, key=lambda member: member["relative_error"])
        block = next(part for part in worst["name"].split(".") if part.isdigit())
        mean = f"{sum(errors) / len(errors):.2%}"
        rows.append([kind, scheme, str(len(members)), mean, f"{max(errors):.2%} in block {block}"])
    return table(["layer", "scheme", "count", "output error", "worst"], rows)


def description_tables(content: Mapping[str, Any]) -> list[Table]:
    """What `describe` found."""
    facts = [
        ("kind", content["kind"]),
        ("family", content["family"] or f"none for model_type '{content['model_type']}'"),
        ("blocks", f"{content['blocks']} of width {content['hidden_size']}"),
        ("heads", f"{content['heads']} ({content['kv_heads']} KV) of {content['head_dim']}"),
        ("vocabulary", f"{content['vocabulary']:,}{', head tied' if content['tied_head'] else ''}"),
        ("size", f"{human_bytes(content['size_bytes'])} in {content['tensors']} tensors"),
    ]
    if dtypes := content["bytes_by_dtype"]:
        facts.append(("dtypes", ", ".join(f"{k} {human_bytes(v)}" for k, v in dtypes.items())))
    if "tokenizer" in content:
        facts += _of_gguf(content)
    for key in ("format", "form", "method", "scheme"):
        if key in content:
            facts.append((key, str(content[key])))
    if content.get("recorded"):
        facts.append(("verify", f"bitfold verify {content['path']}"))
    if "bits_per_weight" in content:
        probe, source = content["probe"], content["provenance"]["source"]["model"]
        facts += [
            (
                "bits per weight",
                f"{content['bits_per_weight']:.3f} (scales, zero-points, codebooks counted)",
            ),
            *(
                (key, content[key]["note"])
                for key in ("online", "rotation", "distillation")
                if key in content
            ),
            ("KL on the probe", f"{probe['kl_mean']:.4f} over {probe['tokens']} tokens"),
            ("made from", f"{source}, bitfold {content['provenance']['bitfold']['version']}"),
        ]
    first = Table(show_header=False, title=escape(content["path"]), title_justify="left")
    first.add_column(style="bold")
    first.add_column()
    for name, value in facts:
        first.add_row(name, escape(value))
    tables = [first]
    if content["sites"]:
        sites = Table(title="sites of a block", title_justify="left")
        sites.add_column("kind")
        sites.add_column("modules")
        for site in content["sites"]:
            modules = "; ".join(f"{k}: {_names(v)}" for k, v in site.items() if k != "kind")
            sites.add_row(site["kind"], escape(modules))
        tables.append(sites)
    if "layers" in content:
        tables.append(layer_table(content["layers"]))
    return tables


def _of_gguf(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What only a GGUF file says."""
    words = content["tokenizer"]
    special = ", ".join(f"{name} {token}" for name, token in words["special"].items())
    cut = f", cut as {words['cut']}" if words["cut"] else ""
    template = ", chat template" if words["chat_template"] else ""
    weights = ", ".join(
        f"{count:,} in {kind}" for kind, count in content["weights_by_type"].items()
    )
    mend = "bitfold import" if content["importable"] else "not of a family that bitfold imports"
    return [
        ("weights", weights),
        ("head", str(content["head"])),
        ("tokenizer", f"{words['kind']}{cut}, {words['tokens']:,} tokens; {special}{template}"),
        ("to be evaluated", mend),
    ]


def _names(value: Any) -> str:
    return ", ".join(value) if isinstance(value, (tuple, list)) else str(value)
