"""Inputs in static clusters: each channel with the scale and zero-point of its cluster."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bitfold.errors import RecipeError
from bitfold.export.layout import LayerEntry, input_tensors
from bitfold.numerics import Scheme, TensorScheme
from bitfold.numerics.activation import quantize_input
from bitfold.runtime.quantized_linear import QuantizedLinear

STATIC = TensorScheme(bits=4, symmetric=False, granularity="cluster", clusters=3, static=True)
CLUSTERS = torch.tensor([0, 2, 1, 1, 0, 2, 2], dtype=torch.uint8)
SCALE = torch.tensor([0.03, 0.4, 5.0])
ZERO = torch.tensor([-8, 3, 0], dtype=torch.int8)
X = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)) * 3


def expected(x: np.ndarray, *, symmetric: bool) -> np.ndarray:
    result = np.empty(x.shape)
    for place, value in np.ndenumerate(x):
        cluster = int(CLUSTERS[place[-1]])
        scale, zero = float(SCALE[cluster]), 0 if symmetric else int(ZERO[cluster])
        result[place] = scale * (min(max(round(value / scale + zero), -8), 7) - zero)
    return result


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_channel_is_rounded_by_its_cluster(symmetric: bool) -> None:
    scheme = STATIC.model_copy(update={"symmetric": symmetric})
    found = quantize_input(X.double(), scheme, SCALE, None if symmetric else ZERO, CLUSTERS)
    wanted = expected(X.double().numpy(), symmetric=symmetric)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("static", [True, False])
def test_a_layer_keeps_them(dtype: torch.dtype, static: bool) -> None:
    activation = STATIC.model_copy(update={"static": static})
    entry = LayerEntry(
        Scheme(activation=activation),
        7,
        input_scale=SCALE.to(dtype) if static else None,
        input_zero=ZERO if static else None,
        input_clusters=CLUSTERS,
    )
    inputs = {k.removeprefix("layer."): v for k, v in input_tensors("layer", entry).items()}
    in_files = {"input_scale", "input_zero_point", "input_clusters"}
    assert set(inputs) == (in_files if static else {"input_clusters"})
    layer = QuantizedLinear(7, 4, entry.scheme, bias=False, dtype=dtype)
    weight = torch.randn(4, 7).to(dtype)
    layer.load_state_dict({"weight": weight} | inputs)
    x = X.to(dtype)
    seen = quantize_input(x, activation, entry.input_scale, entry.input_zero, CLUSTERS)
    assert torch.equal(layer(x), F.linear(seen, weight))
    assert not torch.equal(seen, x)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(RecipeError, match="Clusters of channels come from calibration"):
        quantize_input(X, STATIC, SCALE, ZERO)
    with pytest.raises(RecipeError, match="scale and zero-point"):
        quantize_input(X, STATIC, SCALE, None, CLUSTERS)
    entry = LayerEntry(Scheme(activation=STATIC), 7, input_scale=SCALE, input_zero=ZERO)
    with pytest.raises(RecipeError, match="layer has activations that take a range"):
        input_tensors("layer", entry)
