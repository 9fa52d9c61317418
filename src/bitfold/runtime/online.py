"""What nothing absorbs, and therefore runs: a map at a module, as its child `online`.

Behind a norm, before a linear layer, or on the queries and keys of an attention, behind the rotary embedding. The same
map in the simulation (`running_online`) and in a loaded artifact (`attach`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bitfold.models.family import ONLINE
from bitfold.numerics import MapShape, aligned, apply_map, for_queries, turn_heads
from bitfold.runtime.attention import HeadMap, HeadName, set_head_map

__all__ = ["OnlineMap", "attach", "running_online", "runs_on_heads"]

_MARK = f".{ONLINE}."


class OnlineMap(nn.Module):
    """A linear map on rows x [..., n], as `apply_map` takes it; or on queries and keys, as `turn_heads` does."""

    _for_queries: tuple[object, Tensor] | None = None

    def __init__(
        self,
        shape: MapShape,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, size in shape.tensors.items():
            empty = torch.zeros(size, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """[..., n], the same shape as x."""
        return apply_map(x, self._tensors())

    def align(self) -> None:
        """Put tensors that were read from a file where `apply_map` need not copy them at every call."""
        for value in self.parameters():
            value.data = aligned(value.data)

    def turn_heads(self, name: HeadName, x: Tensor) -> Tensor:
        """Queries or keys [batch, heads, tokens, head_dim], the same shape as x."""
        tensors = self._tensors()
        if name != "query" or "keys" not in tensors:
            return turn_heads(name, x, tensors)
        # An inverse takes longer than a token: it is made anew only where the matrix is another.
        keys = tensors["keys"]
        version = -1 if keys.is_inference() else keys._version
        state = (keys.data_ptr(), version, keys.dtype, keys.device, x.dtype)
        if self._for_queries is None or self._for_queries[0] != state:
            self._for_queries = (state, for_queries(keys).to(x.dtype))
        return turn_heads(name, x, tensors, self._for_queries[1])

    def _tensors(self) -> dict[str, Tensor]:
        """Detached: what PyTorch makes of a product, to the last bit, depends on whether it keeps a graph."""
        return {name: value.detach() for name, value in self.named_parameters()}


def attach(module: nn.Module, online: nn.Module) -> None:
    """Make a module use the map `online`, which becomes its child of that name."""
    module.add_module(ONLINE, online)
    if _is_linear(module):
        module.register_forward_pre_hook(_through_child_before, prepend=True)
    elif _is_norm(module):
        module.register_forward_hook(_through_child)
    else:
        set_head_map(module, _turns_heads)


@contextmanager
def running_online(block: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Within this context the modules `NAME` of a block run the maps of the tensors `NAME.online.…` among its weights;
    gives the other weights."""
    others: dict[str, Tensor] = {}
    maps: dict[str, dict[str, Tensor]] = {}
    for name, value in weights.items():
        place, mark, part = name.rpartition(_MARK)
        if mark:
            maps.setdefault(place, {})[part] = value
        else:
            others[name] = value
    with ExitStack() as stack:
        for name, tensors in maps.items():
            module = block.get_submodule(name)
            if _is_linear(module):
                # Before any hook that looks at the input, or quantizes it.
                handle = module.register_forward_pre_hook(_before(tensors), prepend=True)
                stack.callback(handle.remove)
            elif _is_norm(module):
                stack.callback(module.register_forward_hook(_behind(tensors)).remove)
            else:
                set_head_map(module, _on_heads(tensors))
                stack.callback(set_head_map, module, None)
        yield others


def runs_on_heads(module: nn.Module) -> bool:
    """Whether a map at this module is one of queries and keys: it is an attention, not a linear layer or norm."""
    return not _is_linear(module) and not _is_norm(module)


def _is_linear(module: nn.Module) -> bool:
    """Of any kind: those of an artifact hold packed weights."""
    return hasattr(module, "in_features")


def _is_norm(module: nn.Module) -> bool:
    """Whether it has a gain: what is left is an attention."""
    return getattr(module, "weight", None) is not None


# Functions of the module they are given, so that copies of a model run their own maps.
def _child(module: nn.Module) -> nn.Module:
    return module.get_submodule(ONLINE)


def _turns_heads(module: nn.Module) -> HeadMap:
    child = _child(module)
    assert isinstance(child, OnlineMap)
    return child.turn_heads


def _through_child(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    result: Tensor = _child(module)(output)
    return result


def _through_child_before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (_child(module)(args[0]), *args[1:])


def _on_heads(tensors: Mapping[str, Tensor]) -> Callable[[nn.Module], HeadMap]:
    return lambda attention: lambda name, x: turn_heads(name, x, tensors)


def _behind(tensors: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return apply_map(output, tensors)

    return hook


def _before(tensors: Mapping[str, Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (apply_map(args[0], tensors), *args[1:])

    return hook
