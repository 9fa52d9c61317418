"""Looking into a running block, and quantizing what its layers are given: forward hooks, removed when done."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor, nn

from bitfold.numerics import Scheme, TensorScheme, fake_quantize_dynamic
from bitfold.numerics.activation import quantize_input
from bitfold.runtime.attention import HeadName, HeadQuantizers, set_head_quantizers

__all__ = [
    "InputQuantizer",
    "capturing_heads",
    "capturing_inputs",
    "capturing_outputs",
    "quantizing",
    "run_for_inputs",
]


@dataclass(frozen=True)
class InputQuantizer:
    """How a linear layer's input is quantized; scale and zero are [1] tensors for static activations, or [clusters];
    scale the global scale of nvfp4 ones; clusters [in] the cluster of each channel, where there are any."""

    scheme: TensorScheme
    scale: Tensor | None = None
    zero: Tensor | None = None
    clusters: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return quantize_input(x, self.scheme, self.scale, self.zero, self.clusters)


class _Enough(Exception):  # noqa: N818 - not an error
    """All inputs that were asked for are there."""


@contextmanager
def capturing_inputs(
    block: nn.Module, names: Mapping[str, Callable[[Tensor], None]]
) -> Iterator[None]:
    """Within this context each named linear layer hands its input to a function."""

    def hook_for(receive: Callable[[Tensor], None]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            receive(args[0])

        return hook

    with ExitStack() as stack:
        for name, receive in names.items():
            handle = block.get_submodule(name).register_forward_pre_hook(hook_for(receive))
            stack.callback(handle.remove)
        yield


def run_for_inputs(
    block: nn.Module, names: Mapping[str, Callable[[Tensor], None]], run: Callable[[], object]
) -> None:
    """Call `run`, which runs the block, until each named linear layer has handed its input to a function."""
    missing = set(names)

    def receiver(name: str) -> Callable[[Tensor], None]:
        def receive(x: Tensor) -> None:
            names[name](x)
            missing.discard(name)
            if not missing:
                raise _Enough

        return receive

    with suppress(_Enough), capturing_inputs(block, {name: receiver(name) for name in names}):
        run()


@contextmanager
def capturing_outputs(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Within this context each named linear layer leaves its output in the mapping, under its name."""
    outputs: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return hook

    with ExitStack() as stack:
        for name in names:
            handle = block.get_submodule(name).register_forward_hook(hook_for(name))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def capturing_heads(
    block: nn.Module, attention: str, receive: Callable[[HeadName, Tensor], None]
) -> Iterator[None]:
    """Within this context a block's attention quantizes nothing, and hands its queries, keys and values
    [batch, heads, tokens, head_dim] to a function."""

    class Captured(HeadQuantizers):
        def on(self, name: HeadName, x: Tensor, module: nn.Module) -> Tensor:
            receive(name, x)
            return x

    module = block.get_submodule(attention)
    set_head_quantizers(module, Captured(None, None, None))
    try:
        yield
    finally:
        set_head_quantizers(module, None)


@contextmanager
def quantizing(
    block: nn.Module,
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
    attention: str,
    heads: Scheme,
    on_heads: Callable[[Tensor, TensorScheme], Tensor] = fake_quantize_dynamic,
    calibrated: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Within this context the block runs with quantized inputs, and queries, keys and values by `on_heads`.

    calibrated: their static scales and codebooks; None: not found yet, and what is to have some is left alone.
    """

    def hook_for(quantizer: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (quantizer(args[0]), *args[1:])

        return hook

    module = block.get_submodule(attention)
    if calibrated is None:
        heads = _without_calibrated(heads)
    with ExitStack() as stack:
        for name, quantizer in inputs.items():
            handle = block.get_submodule(name).register_forward_pre_hook(hook_for(quantizer))
            stack.callback(handle.remove)
        set_head_quantizers(module, HeadQuantizers.of(heads, on_heads, calibrated))
        stack.callback(set_head_quantizers, module, None)
        yield


def _without_calibrated(heads: Scheme) -> Scheme:
    """The scheme of an attention, with what needs calibration left alone."""

    def dynamic(part: TensorScheme | None) -> TensorScheme | None:
        return None if part is None or part.static or part.grid == "codebook" else part

    return Scheme(query=dynamic(heads.query), key=dynamic(heads.key), value=dynamic(heads.value))
