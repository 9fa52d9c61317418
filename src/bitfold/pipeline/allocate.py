"""Mixed precision: the bits of every layer that cost least within a budget, as rules of the recipe."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitfold.allocation import (
    Budget,
    Candidate,
    LayerGroup,
    Limit,
    Measured,
    Mixed,
    choose,
    pareto_curve,
    read_latencies,
    smallest,
)
from bitfold.allocation.candidates import weight_bits
from bitfold.allocation.latency import Latencies
from bitfold.allocation.programme import total
from bitfold.errors import RecipeError
from bitfold.export import Choice, Layout, choose_format
from bitfold.export.layout import LayerEntry, WeightFormat
from bitfold.numerics import Scheme, TensorScheme
from bitfold.pipeline.disk import TEXT_OF_A_TENSOR, artifact_bytes, weight_bytes
from bitfold.pipeline.job import Job, with_allocation
from bitfold.pipeline.sensitivity import Search, Store, make_search, measure, text_json
from bitfold.recipe import LayerRule, Recipe
from bitfold.runtime.device import quick_float32

__all__ = ["allocate"]

# How often a choice is made again because the text beside the weights took more than was thought.
_CORRECTIONS = 8


@dataclass(frozen=True)
class _Option:
    """A candidate of a group: KL in nats per token, and what it takes."""

    candidate: Candidate
    kl: float
    bits: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class _Programme:
    """groups: what is chosen for; options: [groups][candidates]. weights: how many the mean of the bits is over, of
    which fixed_bits are taken by layers that rules decide; fixed_bytes: of all of the artifact but the groups' weights.
    """

    search: Search
    measured: Measured
    groups: tuple[LayerGroup, ...]
    options: tuple[tuple[_Option, ...], ...]
    weights: int
    fixed_bits: int
    fixed_bytes: int

    def amounts(self, what: str) -> list[list[float]]:
        """[groups][candidates] of `kl`, `bits`, `bytes` or `seconds`."""
        return [[getattr(option, what) for option in row] for row in self.options]

    def taken(self, what: str, chosen: Sequence[int]) -> float:
        """By a choice, of all groups together."""
        return total(self.amounts(what), chosen)

    def picked(self, chosen: Sequence[int]) -> list[_Option]:
        """The chosen option of every group."""
        return [row[index] for row, index in zip(self.options, chosen, strict=True)]

    def mean_bits(self, chosen: Sequence[int]) -> float:
        """Bits per weight of the quantized matrices, and of those that are left alone by choice."""
        return (self.fixed_bits + self.taken("bits", chosen)) / self.weights


@quick_float32()
def allocate(
    job: Job,
    budget: Budget,
    mixed: Mixed,
    calibration: Sequence[Path],
    *,
    keep: bool,
    report: Callable[[float, int, str], None],
) -> Job:
    """The job with a recipe in which every layer has the bits that cost least within the budget.

    keep: whether sensitivities are stored as they are measured.

    Raises RecipeError where no choice is within the budget, naming the smallest there is, and where the whole model is.
    """
    if (budget.seconds is None) != (mixed.table is None):
        raise RecipeError(
            "A budget of latency and a table of latencies go together: give --latency and --latency-table."
        )
    plan = job.plan
    if any(plan.stored_weight(name) != scheme.weight for name, scheme in plan.schemes.items()):
        raise RecipeError(
            f"Bits are found for integers, and {plan.recipe.method} stores something else: find them with another "
            "--method, then give the recipe.yaml that comes out to this one by --recipe."
        )
    table = None if mixed.table is None else read_latencies(mixed.table)
    search = make_search(job.skeleton, job.plan, job.dtype, mixed, calibration)
    store = Store(job.out)
    measured = measure(search, report, store, keep=keep)
    programme = _programme(job, search, measured, table)
    curve = _curve(programme, budget)
    # The recipe's rules and the report say the choice, and are part of the size: their length is known with the choice.
    for _ in range(_CORRECTIONS):
        chosen = choose(programme.amounts("kl"), _limits(programme, budget))
        if chosen is None:
            break
        found = _with_choice(job, programme, budget, mixed, chosen, curve)
        size = artifact_bytes(found)
        if budget.bytes is None or size <= budget.bytes:
            return found
        fixed = size - int(programme.taken("bytes", chosen))
        programme = replace(programme, fixed_bytes=max(fixed, programme.fixed_bytes + 1))
    smaller = _smallest(job, programme, budget, mixed, curve)
    if smaller is not None and budget.bytes is not None and artifact_bytes(smaller) <= budget.bytes:
        return smaller
    raise RecipeError(_impossible(programme, budget, smaller))


def _programme(job: Job, search: Search, measured: Measured, table: Latencies | None) -> _Programme:
    """What is chosen among: candidates that were measured, and have a latency where latencies count."""
    forms = _forms(job, search)
    storage = job.plan.storage
    stored_bytes = _Stored(job)
    rows = []
    for group, offered in search.choices.items():
        row: list[_Option] = []
        shapes = [search.shape(layer) for layer in group.layers]
        for candidate in offered:
            scheme, name = candidate.scheme, candidate.name
            if name not in measured[group.name]:
                continue
            if table is not None and any(
                (shape[0], shape[1], name) not in table for shape in shapes
            ):
                continue
            stored = [
                stored_bytes(shape, scheme, forms.get((search.full_name(layer), name)))
                for shape, layer in zip(shapes, group.layers, strict=True)
            ]
            row.append(
                _Option(
                    candidate,
                    measured[group.name][name],
                    sum(weight_bits(shape, scheme, storage) for shape in shapes),
                    sum(stored),
                    0.0
                    if table is None
                    else sum(table[outputs, inputs, name] for outputs, inputs in shapes),
                )
            )
        if not row:
            weights = sorted({str(list(shape)) for shape in shapes})
            raise RecipeError(
                f"No candidate of {group.name} can be had: add entries for weights of {' and '.join(weights)} to the "
                "table of latencies, or take a wider --dtype where logits are not finite."
            )
        rows.append(tuple(row))
    chosen_for = {search.full_name(layer) for group in search.choices for layer in group.layers}
    ruled = {
        name: scheme.weight
        for name, scheme in job.plan.schemes.items()
        if name.startswith(f"{job.skeleton.family.blocks}.")
        and name not in chosen_for
        and scheme.weight is not None
    }
    tensors, sources = job.skeleton.checkpoint.tensors, job.skeleton.sources
    shapes_of = {name: tensors[sources[f"{name}.weight"]].shape for name in {*chosen_for, *ruled}}
    own = job.plan.recipe.scheme.weight
    return _Programme(
        search=search,
        measured=measured,
        groups=tuple(search.choices),
        options=tuple(rows),
        weights=sum(outputs * inputs for outputs, inputs in shapes_of.values()),
        fixed_bits=sum(weight_bits(shapes_of[n], scheme, storage) for n, scheme in ruled.items()),
        fixed_bytes=artifact_bytes(job)
        - sum(stored_bytes(shapes_of[n], own, job.plan.choice.formats[n]) for n in chosen_for),
    )


def _forms(job: Job, search: Search) -> dict[tuple[str, str], WeightFormat]:
    """How each layer's weight lies on disk for each candidate, by full name and the candidate's: as in a model in
    which they all stand, since a format may say a single scheme more briefly than several."""
    plan = job.plan
    entries = {
        f"{search.full_name(layer)}|{candidate.name}": LayerEntry(
            plan.recipe.scheme.model_copy(update={"weight": candidate.scheme}),
            search.shape(layer)[1],
        )
        for group, offered in search.choices.items()
        for candidate in offered
        if candidate.scheme is not None
        for layer in group.layers
    }
    layout = Layout(
        linears=dict(plan.layout.linears) | entries,
        attention=plan.layout.attention,
        online=plan.layout.online,
    )
    choice: Choice = choose_format(layout)[1]
    return {
        (name.partition("|")[0], name.partition("|")[2]): choice.formats[name] for name in entries
    }


class _Stored:
    """Bytes of a layer's weight, and of what is said of its tensors beside them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._known: dict[tuple[tuple[int, ...], TensorScheme, WeightFormat], int] = {}

    def __call__(
        self, shape: tuple[int, ...], scheme: TensorScheme | None, form: WeightFormat | None
    ) -> int:
        if scheme is None or form is None:
            return shape[0] * shape[1] * self._job.plan.storage.itemsize + TEXT_OF_A_TENSOR
        key = (shape, scheme, form)
        if key not in self._known:
            size, count = weight_bytes(self._job, *key)
            self._known[key] = size + count * TEXT_OF_A_TENSOR
        return self._known[key]


def _limits(programme: _Programme, budget: Budget) -> list[Limit]:
    limits = []
    if budget.bits is not None:
        bits = budget.bits * programme.weights - programme.fixed_bits
        limits.append(Limit(programme.amounts("bits"), bits))
    if budget.bytes is not None:
        room = budget.bytes - programme.fixed_bytes
        limits.append(Limit(programme.amounts("bytes"), room))
    if budget.seconds is not None:
        limits.append(Limit(programme.amounts("seconds"), budget.seconds))
    return limits


def _curve(programme: _Programme, budget: Budget) -> list[dict[str, Any]]:
    """The Pareto curve of what the first budget counts, as it is reported."""
    counted = "bits" if budget.bits else "bytes" if budget.bytes else "seconds"
    points = pareto_curve(programme.amounts("kl"), programme.amounts(counted))
    return [_point(programme, point.chosen) for point in points]


def _point(programme: _Programme, chosen: Sequence[int]) -> dict[str, Any]:
    counts = Counter[str]()
    for group, option in zip(programme.groups, programme.picked(chosen), strict=True):
        counts[option.candidate.name] += len(group.layers)
    seconds = programme.taken("seconds", chosen)
    return {
        "bits_per_weight": programme.mean_bits(chosen),
        "weight_bytes": int(programme.taken("bytes", chosen)),
        **({"seconds": seconds} if seconds else {}),
        "kl": programme.taken("kl", chosen),
        "layers": dict(sorted(counts.items())),
    }


def _with_choice(
    job: Job,
    programme: _Programme,
    budget: Budget,
    mixed: Mixed,
    chosen: Sequence[int],
    curve: list[dict[str, Any]],
) -> Job:
    """The job by the chosen bits, with all that its report says of them."""
    point = _point(programme, chosen)
    picked = programme.picked(chosen)
    search = programme.search
    if all(option.candidate.scheme is None for option in picked) and not programme.fixed_bits:
        raise RecipeError(
            "The model is within the budget as it is, so that nothing has to be quantized: give a smaller budget, or "
            "leave 16 out of the candidates."
        )
    mean = ", ".join(f"{count} at {name}" for name, count in point["layers"].items())
    allocation = {
        "budget": {name: value for name, value in vars(budget).items() if value is not None},
        "per": mixed.per,
        "fuse": mixed.fuse,
        "calibration": text_json(search.text),
        "chosen": point,
        "groups": [
            {
                "name": group.name,
                "layers": [search.full_name(layer) for layer in group.layers],
                "chosen": option.candidate.name,
                "kl": programme.measured[group.name],
            }
            for group, option in zip(programme.groups, picked, strict=True)
        ],
        "pareto": curve,
        "key": search.key,
        "notes": [
            *search.text.notes,
            f"mixed precision: layers {mean}; the sum of their measured sensitivities, each rounded alone, "
            f"is a KL of {point['kl']:.4f} nats",
        ],
    }
    bits = {
        search.full_name(layer): option.candidate
        for group, option in zip(programme.groups, picked, strict=True)
        for layer in group.layers
    }
    return with_allocation(job, _mixed_recipe(job.plan.recipe, bits), allocation)


def _mixed_recipe(recipe: Recipe, bits: Mapping[str, Candidate]) -> Recipe:
    """The recipe with a rule for every layer (by full name) whose bits are not the most frequent ones, which become the
    scheme's. Rules of the recipe come last: they win."""
    most = Counter(bits.values()).most_common(1)[0][0]

    def scheme(candidate: Candidate) -> Scheme:
        return recipe.scheme.model_copy(update={"weight": candidate.scheme})

    rules = [
        LayerRule(match=name, scheme=scheme(candidate))
        for name, candidate in bits.items()
        if candidate != most
    ]
    return recipe.model_copy(
        update={"scheme": scheme(most), "layers": (*rules, *recipe.layers)},
    )


def _smallest(
    job: Job, programme: _Programme, budget: Budget, mixed: Mixed, curve: list[dict[str, Any]]
) -> Job | None:
    """The job by the fewest bytes that other budgets allow; None where they allow nothing.

    A uniform choice needs no rules: in a tiny model, whose weights are no larger than the text that says their choice,
    it may fit where a mixed one that takes a little less for its weights does not.
    """
    limits = _limits(programme, replace(budget, bytes=None))
    chosen = choose(programme.amounts("bytes"), limits)
    return None if chosen is None else _with_choice(job, programme, budget, mixed, chosen, curve)


def _impossible(programme: _Programme, budget: Budget, smaller: Job | None) -> str:
    """Which budget is too small, and what the smallest is that can be had."""
    mend = "give a larger budget, or candidates of fewer bits"
    if budget.bits is not None:
        least = smallest(programme.amounts("bits")) + programme.fixed_bits
        if least > budget.bits * programme.weights:
            return (
                f"No choice of bits has a mean of {budget.bits:g} bits per weight, scales and zero-points counted: the "
                f"smallest possible is {least / programme.weights:.4f}; {mend}."
            )
    if budget.seconds is not None:
        fastest = smallest(programme.amounts("seconds"))
        if fastest > budget.seconds:
            return (
                f"No choice of bits takes {budget.seconds:g} s by the table of latencies: the smallest possible is "
                f"{fastest:g} s; {mend}."
            )
    if budget.bytes is not None and smaller is not None:
        least = artifact_bytes(smaller)
        return (
            f"No choice of bits makes the whole artifact fit into {budget.bytes / 1e6:.3f} MB: the smallest possible "
            f"is {least / 1e6:.3f} MB, embeddings and head included; {mend}."
        )
    return f"Each budget can be kept, but not all of them together: {mend}."
