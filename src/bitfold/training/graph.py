"""What follows what in a plain PyTorch model: which layer's output is, through which functions, another one's input."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from bitfold.errors import FamilyError

__all__ = ["Pair", "pairs"]

# f(s·x) = s·f(x) for s > 0, channel by channel.
_HOMOGENEOUS = (
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Dropout,
    nn.Identity,
)
_HOMOGENEOUS_FUNCTIONS = {
    torch.relu,
    F.relu,
    F.max_pool2d,
    F.avg_pool2d,
    F.adaptive_avg_pool2d,
    F.dropout,
}
_FLATTENS = {torch.flatten, "flatten"}


@dataclass(frozen=True)
class Pair:
    """Two layers by name, of which the second reads what only the first gives; flattened: behind a flattening, where a
    channel of the first is several adjacent inputs of the second."""

    first: str
    second: str
    flattened: bool


def pairs(
    model: nn.Module,
    first: tuple[type[nn.Module], ...],
    second: tuple[type[nn.Module], ...],
    *,
    direct: bool,
) -> list[Pair]:
    """Pairs of layers of these types. direct: nothing stands between; else what a positive factor for each channel
    passes through (ReLU, pooling, dropout, flattening).

    Raises FamilyError where PyTorch's tracer cannot follow the model.
    """
    try:
        graph = _Tracer(first).trace(model)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise FamilyError(
            f"{type(model).__name__} cannot be traced by torch.fx ({reason}): what follows what in it is not known."
        ) from error
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    return [
        Pair(str(node.target), name, flattened)
        for node in graph.nodes
        if node.op == "call_module" and isinstance(modules[str(node.target)], first)
        for name, flattened in _next(node, modules, direct)
        if isinstance(modules[name], second) and calls.count(name) == calls.count(node.target) == 1
    ]


class _Tracer(fx.Tracer):
    """Looks into no layer of the types that are asked for."""

    def __init__(self, whole: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self._whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._whole) or super().is_leaf_module(m, module_qualified_name)


def _next(node: fx.Node, modules: dict[str, nn.Module], direct: bool) -> Iterator[tuple[str, bool]]:
    """The layer that alone reads what a node gives, if there is one."""
    flattened = False
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "call_module":
            module = modules[str(node.target)]
            flattens = isinstance(module, nn.Flatten) and module.start_dim == 1
            if direct or not (isinstance(module, _HOMOGENEOUS) or flattens):
                yield str(node.target), flattened
                return
            flattened |= flattens
            continue
        flattens = node.target in _FLATTENS and node.args[1:2] == (1,)
        if direct or not (
            flattens or node.target in _HOMOGENEOUS_FUNCTIONS or node.target == "relu"
        ):
            return
        flattened |= flattens
