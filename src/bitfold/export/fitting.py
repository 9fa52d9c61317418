"""What the formats and engines ask of a model, held against one before it is quantized: `--for FORMAT`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from bitfold.errors import ExportError, did_you_mean
from bitfold.export import compressed_tensors
from bitfold.export.ggml_blocks import expected
from bitfold.export.gguf_model import dialect_of, settings
from bitfold.export.gguf_tokenizer import check_tokenizer
from bitfold.export.gptq import unsayable_scheme
from bitfold.export.layout import Layout, Refusal
from bitfold.export.litert_decoder import check_litert
from bitfold.export.phone_rules import unsuitable_input, unsuitable_weight
from bitfold.models.checkpoint import Checkpoint
from bitfold.models.config import read_config
from bitfold.numerics import Scheme, TensorScheme
from bitfold.numerics.scheme import GridName
from bitfold.numerics.stored_scale import could_be_in_blocks

__all__ = [
    "ENGINES",
    "Misfit",
    "Planned",
    "check_engines",
    "for_engines",
    "misfits",
    "usual_scheme",
]


@dataclass(frozen=True)
class Planned:
    """A model as it will be.

    checkpoint: the original. shapes: [out, in] of every linear layer. fused: full names of layers that engines compute
    as one.
    """

    checkpoint: Checkpoint
    layout: Layout
    shapes: Mapping[str, tuple[int, int]]
    fused: Sequence[Sequence[str]]

    @property
    def weights(self) -> dict[str, TensorScheme]:
        """The weight's scheme of every linear layer that has one."""
        schemes = {name: entry.scheme.weight for name, entry in self.layout.linears.items()}
        return {name: scheme for name, scheme in schemes.items() if scheme is not None}


@dataclass(frozen=True)
class Misfit:
    """What does not fit an engine, as a clause with its mend. stops: it cannot go there at all; otherwise it goes, and
    the clause says what it costs. of_weights: the bits and groups of weights decide it, so that it cannot be said
    before they are found."""

    clause: str
    stops: bool = True
    of_weights: bool = True


Rule = Callable[[Planned], Iterator[Misfit]]


def misfits(planned: Planned, engine: str) -> tuple[Misfit, ...]:
    """All that does not fit one of `ENGINES`."""
    return tuple(ENGINES[engine](planned))


def check_engines(names: Sequence[str]) -> None:
    """Raises ExportError for a name that is not in `ENGINES`."""
    for name in names:
        if name not in ENGINES:
            raise ExportError(
                f"There is no engine or format '{name}': {did_you_mean(name, ENGINES)}"
            )


def for_engines(scheme: Scheme, names: Collection[str]) -> Scheme:
    """The scheme with its weights' scales in the precision that the formats have: in what they store they are rounded
    as weights are quantized, and not again when they are exported."""
    weight = scheme.weight
    if weight is None or weight.fp4 or weight.scales != "storage" or not {*names} & _HALF:
        return scheme
    precision = "blocks" if "gguf" in names and could_be_in_blocks(weight) else "half"
    return scheme.model_copy(update={"weight": weight.model_copy(update={"scales": precision})})


def usual_scheme(names: Collection[str]) -> tuple[str, tuple[str, ...]] | None:
    """The scheme of weights, and what to set in it, for those who ask for none; None: the usual one."""
    if "gguf" in names:
        return "w4a16g32", ("weight.symmetric=true",)
    if {"executorch", "litert"} & {*names}:
        return "w4a8g32", ("weight.symmetric=true", "activation.symmetric=false")
    return None


# Formats whose scales are in half precision.
_HALF = {"gguf", "gptq", "awq", "litert"}


def _transformers(planned: Planned) -> Iterator[Misfit]:
    choice = compressed_tensors.choose(planned.layout)
    if isinstance(choice, Refusal):
        yield Misfit(
            "it will be in bitfold's own format, which loads only after `import bitfold`, for compressed-tensors "
            f"cannot say it: {choice.reason}",
            of_weights=not planned.layout.online,
        )


def _vllm(planned: Planned) -> Iterator[Misfit]:
    yield from _transformers(planned)
    weights = planned.weights
    for names in planned.fused:
        schemes = {planned.layout.linears[n].scheme for n in names if n in planned.layout.linears}
        if len(schemes) > 1:
            yield Misfit(
                f"{', '.join(names)} have different schemes, and vLLM computes them as one: give them one"
            )
    both = [
        name
        for name, scheme in weights.items()
        if not scheme.symmetric and planned.layout.linears[name].scheme.activation is not None
    ]
    if both:
        yield Misfit(
            f"{_several(both)} asymmetric weights with quantized inputs, for which vLLM has no scheme: set "
            "weight.symmetric=true"
        )
    if any(entry.scheme.quantizes_attention for entry in planned.layout.attention.values()):
        yield Misfit(
            "vLLM leaves queries, keys and values as they are, or stops: leave q and kv out of the scheme",
            of_weights=False,
        )
    few = [n for n, s in weights.items() if s.grid == "int" and s.bits not in (4, 8)]
    if few:
        yield Misfit(
            f"{_several(few)} weights in {weights[few[0]].bits} bits, for which vLLM has no kernel on CPUs, only on "
            "some GPUs",
            stops=False,
        )
    inputs = [
        name
        for name, entry in planned.layout.linears.items()
        if entry.scheme.activation is not None
        and entry.scheme.weight is not None
        and entry.scheme.activation.grid == "int"
        and min(entry.scheme.weight.bits, entry.scheme.activation.bits) < 8
    ]
    if inputs:
        yield Misfit(
            f"{_several(inputs)} inputs that vLLM 0.32 leaves unquantized on CPUs, without a word: `bitfold verify "
            "--engine vllm` says what yours does",
            stops=False,
        )


def _gguf(planned: Planned) -> Iterator[Misfit]:
    yield from _folded(planned)
    checkpoint = planned.checkpoint
    for check in (
        lambda: settings(read_config(checkpoint), dialect_of(checkpoint.config["model_type"])),
        lambda: check_tokenizer(checkpoint.path),
    ):
        yield from _refused(check)
    yield from _inputs_left_out(planned, "llama.cpp rounds inputs to 8 bits by itself")
    for names, scheme in _alike(planned):
        columns = planned.shapes[names[0]][1]
        kind = expected(scheme, columns)
        if kind is None:
            yield Misfit(
                f"{_several(names)} {scheme.describe()} weights, which no block of llama.cpp holds: they would take 16 "
                f"bits there; {_better(scheme, columns)}"
            )
        elif kind.bits > scheme.bits + 1.2:
            yield Misfit(
                f"{_several(names)} {scheme.describe()} weights, which llama.cpp holds as {kind.name} in "
                f"{kind.bits:.1f} bits; {_better(scheme, columns)}",
                stops=False,
            )


def _better(scheme: TensorScheme, columns: int) -> str:
    """The scheme of as many bits that llama.cpp holds in the fewest."""
    if could_be_in_blocks(scheme.model_copy(update=_SIXTEEN)) and columns % 256 == 0:
        bits = {2: 2.6, 3: 3.4, 6: 6.6}[scheme.bits]
        return f"with weight.symmetric=true and weight.group_size=16 they take {bits} there"
    bits = 4.5 if scheme.bits <= 4 else 5.5 if scheme.bits == 5 else 8.5
    if scheme.grid != "int":
        return "choose integers such as w4a16g32 with weight.symmetric=true"
    return f"with weight.symmetric=true and weight.group_size=32 they take {bits} there"


_SIXTEEN = {"symmetric": True, "granularity": "group", "group_size": 16}


def _packed(method: str) -> Rule:
    def rule(planned: Planned) -> Iterator[Misfit]:
        yield from _folded(planned)
        alike = list(_alike(planned))
        if len(alike) > 1:
            several = ", ".join(scheme.describe() for _, scheme in alike)
            yield Misfit(f"{method} has one scheme for all layers, and here are {several}")
        for names, scheme in alike:
            reasons = {n: unsayable_scheme(scheme, planned.shapes[n], method) for n in names}
            for reason in dict.fromkeys(reasons.values()):
                if reason is not None:
                    those = [name for name, other in reasons.items() if other == reason]
                    yield Misfit(
                        f"{_several(those)} weights that cannot be said in {method}: {reason}"
                    )
        if method == "gptq" and not all(scheme.symmetric for _, scheme in alike):
            yield Misfit(
                "vLLM loads GPTQ's format with symmetric weights only: set weight.symmetric=true if it is to go there",
                stops=False,
            )
        yield from _inputs_left_out(planned, f"{method} has weights alone")

    return rule


def _graph(name: str, grids: Collection[str]) -> Rule:
    """Of formats that are a graph. grids: of weights, which it has a place for."""

    def rule(planned: Planned) -> Iterator[Misfit]:
        yield from _folded(planned)
        if any(entry.scheme.quantizes_attention for entry in planned.layout.attention.values()):
            yield Misfit(
                f"{name} is written without quantized queries, keys and values: leave q and kv out of the scheme",
                of_weights=False,
            )
        for names, scheme in _alike(planned):
            if scheme.grid not in grids:
                yield Misfit(
                    f"{_several(names)} {scheme.describe()} weights, which would take 16 or 32 bits in {name}: choose "
                    "integers such as w4a16g32"
                )

    return rule


def _phone(name: str, check: Callable[[Any], None] | None = None) -> Rule:
    """Of the engines that run on XNNPACK. check: of the model's config; raises ExportError."""

    def rule(planned: Planned) -> Iterator[Misfit]:
        yield from _folded(planned)
        if check is not None:
            yield from _refused(lambda: check(read_config(planned.checkpoint)))
        if any(entry.scheme.quantizes_attention for entry in planned.layout.attention.values()):
            yield Misfit(
                f"{name} is written without quantized queries, keys and values: leave q and kv out of the scheme"
            )
        for names, scheme in _alike(planned):
            why = unsuitable_weight(scheme)
            if why is not None:
                yield Misfit(
                    f"{_several(names)} {scheme.describe()} weights, for which {name} has no kernel: {why}"
                )
        inputs: dict[TensorScheme | None, list[str]] = {}
        for layer, entry in planned.layout.linears.items():
            inputs.setdefault(entry.scheme.activation, []).append(layer)
        for kind, layers in inputs.items():
            why = unsuitable_input(kind)
            if kind is None:
                yield Misfit(
                    f"{_several(layers)} inputs that are left as they are, which {name} rounds to 8 bits",
                    stops=False,
                )
            elif why is not None:
                yield Misfit(
                    f"{_several(layers)} {kind.describe()} inputs, which {name} rounds otherwise: {why}"
                )
            elif kind.symmetric:
                yield Misfit(
                    f"{_several(layers)} inputs without zero-points, which {name} rounds with them: with "
                    "activation.symmetric=false it computes what was simulated",
                    stops=False,
                )

    return rule


_EVERY_GRID = get_args(GridName)
ENGINES: dict[str, Rule] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "gguf": _gguf,
    "onnx": _graph("ONNX", ("int",)),
    "openvino": _graph("OpenVINO", [grid for grid in _EVERY_GRID if grid != "codebook"]),
    "torch": _graph("torch.export's graph", _EVERY_GRID),
    "executorch": _phone("ExecuTorch"),
    "litert": _phone("LiteRT", check_litert),
    "gptq": _packed("gptq"),
    "awq": _packed("awq"),
}


def _folded(planned: Planned) -> Iterator[Misfit]:
    if planned.layout.online:
        yield Misfit(
            f"maps run at inference ({next(iter(planned.layout.online))}), which only bitfold runs: choose a method "
            "that folds all of them (`bitfold recipes` says which)",
            of_weights=False,
        )


def _inputs_left_out(planned: Planned, instead: str) -> Iterator[Misfit]:
    """A scheme of inputs, queries, keys and values that the format has no word for."""
    linears = any(e.scheme.activation is not None for e in planned.layout.linears.values())
    heads = any(e.scheme.quantizes_attention for e in planned.layout.attention.values())
    what = " and ".join(["inputs"] * linears + ["queries, keys and values"] * heads)
    if what:
        yield Misfit(f"the scheme's {what} are left out there: {instead}", stops=False)


def _refused(check: Callable[[], Any]) -> Iterator[Misfit]:
    """What a check says that raises ExportError."""
    try:
        check()
    except ExportError as error:
        yield Misfit(str(error).rstrip("."), of_weights=False)


def _alike(planned: Planned) -> Iterator[tuple[list[str], TensorScheme]]:
    """Layers by the scheme of their weights."""
    weights = planned.weights
    for scheme in dict.fromkeys(weights.values()):
        yield [name for name, other in weights.items() if other == scheme], scheme


def _several(names: Sequence[str]) -> str:
    """The beginning of a clause about layers that goes on with what they have."""
    if len(names) == 1:
        return f"{names[0]} has"
    return f"{len(names)} layers ({names[0]} …) have"
