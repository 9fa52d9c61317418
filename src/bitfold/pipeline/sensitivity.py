"""Sensitivities of a model's layers: what is chosen for, on which text it is measured, and where it is kept."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitfold.allocation import Candidate, LayerGroup, Measured, Mixed, candidates, layer_groups
from bitfold.allocation import measure as measure_groups
from bitfold.data import Calibration
from bitfold.errors import RecipeError
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.skeleton import Skeleton
from bitfold.pipeline.asked import resolve_recipe, several
from bitfold.pipeline.job import read_calibration
from bitfold.pipeline.plan import Plan, make_plan
from bitfold.pipeline.trial import trial_rounder, trial_rounding
from bitfold.pipeline.turned import settled, skeleton_for
from bitfold.pipeline.workdir import writing
from bitfold.recipe import Recipe
from bitfold.runtime.checkpoint import find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.version import VERSION

__all__ = ["Search", "Sensitivity", "Store", "make_search", "measure", "sensitivity", "text_json"]

Report = Callable[[float, int, str], None]


@dataclass(frozen=True)
class Search:
    """What bits are looked for in: every group of layers and its candidates, and the text to measure on.

    key: all that the sensitivities depend on, hashed.
    """

    skeleton: Skeleton
    plan: Plan
    choices: dict[LayerGroup, tuple[Candidate, ...]]
    text: Calibration
    dtype: torch.dtype
    key: str

    def shape(self, layer: tuple[int, str]) -> tuple[int, ...]:
        """[out, in] of a layer's weight."""
        source = self.skeleton.sources[f"{self.full_name(layer)}.weight"]
        return self.skeleton.checkpoint.tensors[source].shape

    def full_name(self, layer: tuple[int, str]) -> str:
        """Of a layer by the index of its block and its relative name."""
        return f"{self.skeleton.block_name(layer[0])}.{layer[1]}"


@dataclass(frozen=True)
class Sensitivity:
    """How much each candidate hurts, most sensitive group first.

    groups: name, layers, and by the candidate's name the mean KL to the original in nats per token. ranked_by: the
    candidate by which they are ranked.
    """

    groups: tuple[dict[str, Any], ...]
    ranked_by: str
    calibration: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return vars(self) | {"groups": list(self.groups)}


class Store:
    """Where sensitivities are kept: in the artifact's report once it is finished, before that in a hidden file beside
    it, so that a killed run goes on."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.file = out.parent / f".{out.name}.sensitivity.json"

    def read(self, key: str) -> Measured:
        """What was measured for this key; nothing where that is missing, damaged or of another key."""
        try:
            report = json.loads((self.out / "report.json").read_text(encoding="utf-8"))
            if report["allocation"]["key"] == key:
                return {group["name"]: group["kl"] for group in report["allocation"]["groups"]}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            measured: Measured = kept["measured"] if kept["key"] == key else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return measured

    def write(self, key: str, measured: Measured) -> None:
        """Keep what is measured so far, whole or not at all."""
        temporary = self.file.with_name(f"{self.file.name}.writing")
        with writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"key": key, "measured": measured}), encoding="utf-8")
            temporary.replace(self.file)

    def discard(self) -> None:
        """Remove the file beside the artifact, which now holds what it said."""
        self.file.unlink(missing_ok=True)


def sensitivity(
    model: str | Path,
    *,
    method: str | None = None,
    effort: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | str | Path | None = None,
    set: str | Sequence[str] = (),
    ignore: str | Sequence[str] = (),
    seed: int | None = None,
    mixed: Mixed | None = None,
    calibration: str | Path | Sequence[str | Path] = (),
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    progress: Report | None = None,
) -> Sensitivity:
    """Measure how much each candidate hurts each group of layers, by the KL of the model's logits to the original's.

    method, effort, scheme, recipe, set, ignore, seed: as of `quantize`; candidates are derived from the scheme, and
    layers that a rule or `ignore` names are left out. mixed: candidates, groups and text. Nothing is written.

    Raises a BitfoldError, one clear sentence, for anything wrong with input, recipe or machine.
    """
    start = time.perf_counter()
    mixed = mixed or Mixed()
    recipe = resolve_recipe(recipe, method, scheme, set, ignore, seed, effort)
    place = resolve_device(device)
    skeleton = skeleton_for(Checkpoint(find_checkpoint(model)), recipe, place)
    plan = make_plan(skeleton, settled(recipe, skeleton)[0])
    resolved = resolve_dtype(dtype, place)
    search = make_search(
        skeleton,
        plan,
        plan.storage if resolved == "auto" else resolved,
        mixed,
        [Path(file) for file in several(calibration)],
    )
    measured = measure(search, progress or (lambda done, total, what: None))
    return _ranked(search, measured, time.perf_counter() - start)


def make_search(
    skeleton: Skeleton, plan: Plan, dtype: torch.dtype, mixed: Mixed, files: Sequence[Path]
) -> Search:
    """Settle what is chosen for, and read the text.

    Raises RecipeError where nothing is left to choose.
    """
    recipe = plan.recipe
    template = recipe.scheme.weight
    if template is None:
        raise RecipeError(
            f"The scheme {recipe.scheme.notation} leaves the weights alone, so that there are no bits to find: "
            "choose one such as w4a16g128."
        )
    offered = candidates(template, mixed.bits, mixed.group_sizes)
    groups = layer_groups(
        skeleton.family,
        len(skeleton.blocks),
        per=mixed.per,
        fuse=mixed.fuse,
        takes=lambda index, name: not recipe.pins(f"{skeleton.block_name(index)}.{name}"),
    )
    if not groups:
        raise RecipeError(
            "The recipe has a rule for every layer, so that there are no bits to find: leave some of them out."
        )
    positions = getattr(skeleton.config, "max_position_embeddings", mixed.length)
    length = min(mixed.length, positions)
    text = read_calibration(skeleton, files, mixed.windows, length, recipe.seed, dtype)
    search = Search(skeleton, plan, {}, text, dtype, "")
    choices = {group: _fitting(search, group, offered) for group in groups}
    return Search(skeleton, plan, choices, text, dtype, _key(search, choices))


def measure(
    search: Search, report: Report, store: Store | None = None, *, keep: bool = True
) -> Measured:
    """The sensitivities of a search; with a store they are taken from it, and kept in it if `keep`."""

    def save(measured: Measured) -> None:
        if store is not None and keep:
            store.write(search.key, measured)

    return measure_groups(
        search.skeleton,
        search.choices,
        search.text.tokens,
        dtype=search.dtype,
        rounder=trial_rounder(search.skeleton, search.plan),
        known=store.read(search.key) if store else None,
        save=save,
        report=report,
    )


def _fitting(
    search: Search, group: LayerGroup, offered: Sequence[Candidate]
) -> tuple[Candidate, ...]:
    """The candidates whose groups divide the inputs of all layers of a group."""
    inputs = [search.shape(layer)[1] for layer in group.layers]
    fitting = tuple(
        candidate
        for candidate in offered
        if candidate.scheme is None
        or all(size % (candidate.scheme.group_size or 1) == 0 for size in inputs)
    )
    if not fitting:
        raise RecipeError(
            f"No candidate's group size divides the {inputs[0]} inputs of {group.name}: "
            "give smaller group sizes, or leave 16 bits among the candidates."
        )
    return fitting


def _key(search: Search, choices: dict[LayerGroup, tuple[Candidate, ...]]) -> str:
    """All that the sensitivities depend on, hashed."""
    recipe = search.plan.recipe
    turned = recipe.stream_transform
    parts = {
        "bitfold": VERSION,
        "source": search.skeleton.checkpoint.fingerprint(),
        "choices": [
            [group.layers, [c.scheme.model_dump() if c.scheme else None for c in offered]]
            for group, offered in choices.items()
        ],
        "text": search.text.sha256,
        "turned": turned and [type(turned).__name__, turned.model_dump(mode="json"), recipe.seed],
        "rounding": [
            type(trial_rounding(recipe)).__name__,
            recipe.model_dump(mode="json")["weight_range"],
        ],
        "dtypes": [str(search.dtype), str(search.plan.storage)],
        "device": search.skeleton.device.type,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _ranked(search: Search, measured: Measured, seconds: float) -> Sensitivity:
    """Ranked by the scheme's own bits where they are a candidate, else by the fewest there are."""
    own = Candidate(search.plan.recipe.scheme.weight).name
    names = {candidate.name for offered in search.choices.values() for candidate in offered}
    fewest = next(offered[-1].name for offered in search.choices.values())
    by = own if own in names else fewest
    groups = [
        {
            "name": group.name,
            "layers": [search.full_name(layer) for layer in group.layers],
            "kl": measured[group.name],
        }
        for group in search.choices
    ]
    ranked = sorted(groups, key=lambda group: -group["kl"].get(by, float("inf")))  # type: ignore[attr-defined]
    return Sensitivity(tuple(ranked), by, text_json(search.text), seconds)


def text_json(text: Calibration) -> dict[str, Any]:
    """What a report says of the text that was measured on."""
    windows, length = text.tokens.shape
    return {
        "source": text.source,
        "sha256": text.sha256,
        "windows": windows,
        "sequence_length": length,
    }
