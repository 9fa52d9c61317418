"""The way back from the compressed-tensors format: which scheme a config.json gives each layer, whoever wrote it."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from bitfold.errors import CheckpointError
from bitfold.export.compressed_tensors import DENSE
from bitfold.export.layout import WeightFormat
from bitfold.numerics import Scheme, TensorScheme

__all__ = ["quantizes_heads", "read_config"]


def read_config(
    settings: Mapping[str, Any], widths: Mapping[str, int]
) -> dict[str, tuple[Scheme, WeightFormat]]:
    """The scheme and the weight's format of every linear layer that a `quantization_config` quantizes.

    widths: the inputs of each linear layer, by module name.
    Raises CheckpointError for what bitfold has no scheme for, naming the layer.
    """
    found: dict[str, tuple[Scheme, WeightFormat]] = {}
    for name, width in widths.items():
        with _understood(name):
            group = _group_of(name, settings)
            if group is None:
                continue
            weights, inputs = group.get("weights"), group.get("input_activations")
            weight = None if weights is None else _scheme(weights, width)
            activation = None if inputs is None else _scheme(inputs, width, of_input=True)
            format = DENSE if weight is None else group.get("format") or settings["format"]
            strategy = "" if weights is None else weights["strategy"]
            found[name] = (
                Scheme(weight=weight, activation=activation),
                WeightFormat(format, strategy),
            )
    return found


def quantizes_heads(settings: Mapping[str, Any], layers: Collection[str]) -> bool:
    """Whether queries, keys or values are quantized: by a scheme of the cache, or a group that is of none of the
    linear layers."""
    groups = settings.get("config_groups", {}).values()
    others = [g for g in groups if not any(_matches(name, g["targets"]) for name in layers)]
    return bool(settings.get("kv_cache_scheme") or others)


def _group_of(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first group whose targets a layer is among, unless it is ignored."""
    if _matches(name, settings.get("ignore") or ()):
        return None
    groups = settings["config_groups"].values()
    return next((group for group in groups if _matches(name, group["targets"])), None)


def _matches(name: str, targets: Collection[str]) -> bool:
    """As compressed-tensors matches: a module's name, its class, or a regular expression from the name's start."""
    return any(
        bool(re.match(target.removeprefix("re:"), name))
        if target.startswith("re:")
        else target in (name, "Linear")
        for target in targets
    )


def _scheme(args: Mapping[str, Any], width: int, *, of_input: bool = False) -> TensorScheme:
    """width: the inputs of the layer. Raises ValueError, or what pydantic makes of it, for what is no scheme here."""
    if args.get("actorder") in ("group", True):
        raise ValueError("groups in the order of activations lie scattered over the columns")
    strategy, size = args["strategy"], args.get("group_size")
    if strategy == "block":
        rows, size = args["block_structure"]
        if rows != 1:
            raise ValueError(f"blocks of {rows} rows share a scale")
        strategy = "group"
    if strategy == "group" and size == width:
        strategy = "token" if of_input else "channel"
    grouped = strategy in ("group", "tensor_group")
    return TensorScheme(
        grid=_grid(args),
        bits=args["num_bits"],
        symmetric=args["symmetric"],
        granularity="group" if grouped else strategy,
        group_size=size if grouped else None,
        static=of_input and not args.get("dynamic"),
    )


def _grid(args: Mapping[str, Any]) -> Literal["int", "fp8_e4m3", "mxfp4", "nvfp4"]:
    if args["type"] == "int":
        return "int"
    if args["num_bits"] == 8:
        return "fp8_e4m3"
    return "nvfp4" if args["strategy"] == "tensor_group" else "mxfp4"


@contextmanager
def _understood(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"The quantization_config of config.json says of {name} what bitfold cannot read ({reason}): it is "
            "damaged, or of a scheme that bitfold does not have."
        ) from error
