"""Groups of layers, their candidates, and the bits that a candidate takes, against tensors that were really rounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitfold.allocation import Candidate, candidates, layer_groups
from bitfold.allocation.candidates import weight_bits
from bitfold.errors import RecipeError
from bitfold.models.llama import LLAMA
from bitfold.models.opt import OPT
from bitfold.numerics import QuantizedTensor, Scheme, TensorScheme, to_groups


def weight_scheme(notation: str) -> TensorScheme:
    weight = Scheme.parse(notation).weight
    assert weight is not None
    return weight


def test_falling_bits_and_group_sizes() -> None:
    found = candidates(weight_scheme("w4a16g128"), (3, 16, 8, 3), (32, 64))
    assert [c.name for c in found] == ["16", "8g64", "8g32", "3g64", "3g32"]
    assert found[0].scheme is None
    assert found[1].scheme == weight_scheme("w8a16g64")


@pytest.mark.parametrize(
    ("notation", "names"),
    [
        ("w4a16g128", ["16", "8g128", "4g128", "4g64", "4g32", "2g128", "2g64", "2g32"]),
        ("w4a16g64", ["16", "8g64", "4g64", "4g32", "2g64", "2g32"]),
        ("w4a16g32", ["16", "8g32", "4g32", "2g32"]),
        ("w4a16", ["16", "8", "4", "2"]),
    ],
)
def test_few_bits_come_in_finer_groups_too(notation: str, names: list[str]) -> None:
    found = candidates(weight_scheme(notation), (16, 8, 4, 2), ())
    assert [candidate.name for candidate in found] == names


def test_what_bits_do_not_say_is_the_schemes() -> None:
    template = weight_scheme("w4a16").model_copy(update={"symmetric": True, "narrow": True})
    (found,) = candidates(template, (3,), ())
    assert found.scheme == template.model_copy(update={"bits": 3})
    assert found.name == "3"


def test_other_grids_have_no_bits_to_choose() -> None:
    with pytest.raises(RecipeError, match="the scheme's weights are nf4"):
        candidates(weight_scheme("wnf4a16g64"), (4, 3), ())
    with pytest.raises(RecipeError, match="the scheme's weights are mxfp4"):
        candidates(weight_scheme("wmxfp4a16"), (4, 3), ())


def test_groups_per_layer() -> None:
    groups = layer_groups(LLAMA, 2, per="layer", fuse=True)
    assert [group.name for group in groups[:4]] == [
        "model.layers.0: q_proj, k_proj, v_proj",
        "model.layers.0: o_proj",
        "model.layers.0: gate_proj, up_proj",
        "model.layers.0: down_proj",
    ]
    assert [group.first for group in groups] == [0, 0, 0, 0, 1, 1, 1, 1]
    apart = layer_groups(LLAMA, 2, per="layer", fuse=False)
    assert len(apart) == 14
    everything = {(index, name) for index in range(2) for name in LLAMA.linears}
    for found in (groups, apart):
        assert sorted(layer for g in found for layer in g.layers) == sorted(everything)


def test_groups_per_kind() -> None:
    groups = layer_groups(OPT, 3, per="kind", fuse=True)
    assert [group.name for group in groups] == ["q_proj, k_proj, v_proj", "out_proj", "fc1", "fc2"]
    assert groups[2].layers == ((0, "fc1"), (1, "fc1"), (2, "fc1"))
    assert groups[0].within(1) == OPT.inputs[0]


def test_layers_that_are_not_chosen_for() -> None:
    groups = layer_groups(
        LLAMA, 2, per="kind", fuse=True, takes=lambda index, name: index == 1 and "q_" not in name
    )
    assert groups[0].layers == ((1, "self_attn.k_proj"), (1, "self_attn.v_proj"))
    assert groups[0].first == 1
    assert not layer_groups(LLAMA, 2, per="layer", fuse=True, takes=lambda index, name: False)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([None, 4, 8]),
    granularity=st.sampled_from(["channel", "tensor"]),
    symmetric=st.booleans(),
    storage=st.sampled_from([torch.float32, torch.bfloat16]),
    outputs=st.integers(1, 5),
)
def test_bits_are_those_of_the_tensor(
    bits: int,
    group: int | None,
    granularity: str,
    symmetric: bool,
    storage: torch.dtype,
    outputs: int,
) -> None:
    scheme = TensorScheme(
        bits=bits,
        symmetric=symmetric,
        granularity="group" if group else granularity,
        group_size=group,
    )
    weight = torch.randn(outputs, 16)
    limits = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    tensor = QuantizedTensor.from_limits(weight, *limits, scheme, storage)
    assert weight_bits((outputs, 16), scheme, storage) == tensor.bits
    assert weight_bits((outputs, 16), None, storage) == outputs * 16 * storage.itemsize * 8


@pytest.mark.parametrize("notation", ["wmxfp4a16", "wnvfp4a16", "wnf4a16g16", "wfp8a16"])
def test_bits_on_the_other_grids(notation: str) -> None:
    scheme, weight = weight_scheme(notation), torch.randn(5, 64)
    limits = torch.aminmax(to_groups(weight, scheme), dim=-1, keepdim=True)
    tensor = QuantizedTensor.from_limits(weight, *limits, scheme, torch.bfloat16)
    assert weight_bits((5, 64), scheme, torch.bfloat16) == tensor.bits


def test_names() -> None:
    assert Candidate(None).name == "16"
    assert Candidate(weight_scheme("w5a16")).name == "5"
