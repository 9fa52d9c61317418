"""The papers' notation, its defaults, and what cannot be."""

import pytest
from pydantic import ValidationError

from bitfold.errors import RecipeError
from bitfold.numerics import Scheme, TensorScheme

# notation: what weight, activation, query, key, value are in words
PARSED = {
    "w4a16g128": ("int4 asymmetric, group 128", None, None, None),
    "w4a16": ("int4 asymmetric, channel", None, None, None),
    "w2a16g64": ("int2 asymmetric, group 64", None, None, None),
    "w8a8": ("int8 asymmetric, channel", "int8 symmetric, token", None, None),
    "w4a8": ("int4 asymmetric, channel", "int8 symmetric, token", None, None),
    "w4a4": ("int4 asymmetric, channel", "int4 asymmetric, token", None, None),
    "w6a7": ("int6 asymmetric, channel", "int7 asymmetric, token", None, None),
    "w4a4q4kv4": (
        "int4 asymmetric, channel",
        "int4 asymmetric, token",
        "int4 asymmetric, token",
        "int4 asymmetric, token",
    ),
    "w16a16kv8": (None, None, None, "int8 asymmetric, token"),
    "w16a16q8": (None, None, "int8 asymmetric, token", None),
    "w4a16kv4g32": ("int4 asymmetric, group 32", None, None, "int4 asymmetric, token"),
    "wfp8afp8": ("fp8_e4m3 symmetric, channel", "fp8_e4m3 symmetric, token", None, None),
    "wnf4a16g64": ("nf4 symmetric, group 64", None, None, None),
    "wfp8a16kvfp8": ("fp8_e4m3 symmetric, channel", None, None, "fp8_e4m3 symmetric, token"),
    "wmxfp4a16": ("mxfp4 symmetric, group 32", None, None, None),
    "wnvfp4anvfp4": ("nvfp4 symmetric, group 16", "nvfp4 symmetric, group 16", None, None),
    "wmxfp4amxfp4kvmxfp4": (
        "mxfp4 symmetric, group 32",
        "mxfp4 symmetric, group 32",
        None,
        "mxfp4 symmetric, group 32",
    ),
    "w4anvfp4g128": ("int4 asymmetric, group 128", "nvfp4 symmetric, group 16", None, None),
    "w16a16": (None, None, None, None),
}


def words(scheme: TensorScheme | None) -> str | None:
    return None if scheme is None else scheme.describe()


@pytest.mark.parametrize("notation", PARSED)
def test_parse(notation: str) -> None:
    scheme = Scheme.parse(notation)
    weight, activation, query, kv = PARSED[notation]
    found = (scheme.weight, scheme.activation, scheme.query, scheme.key, scheme.value)
    assert tuple(map(words, found)) == (weight, activation, query, kv, kv)
    assert not any(part.static or part.narrow for part in found if part is not None)
    assert scheme.quantizes_attention == (query is not None or kv is not None)


@pytest.mark.parametrize("notation", PARSED)
def test_notation_round_trip(notation: str) -> None:
    scheme = Scheme.parse(notation)
    assert scheme.notation == notation
    assert Scheme.parse(scheme.notation) == scheme


def test_notation_of_keys_left_alone() -> None:
    """What the notation cannot say is left out, but never the bits that there are."""
    value = Scheme(value=TensorScheme(bits=4, granularity="token"))
    assert value.notation == "w16a16kv4"


def test_a_group_that_the_grid_has_anyway_may_be_written() -> None:
    assert Scheme.parse("wmxfp4a16g32") == Scheme.parse("wmxfp4a16")
    assert Scheme.parse("wnvfp4a8g16").notation == "wnvfp4a8"


@pytest.mark.parametrize(
    ("notation", "message"),
    [
        ("wmxfp4a16g128", "grid mxfp4 has one scale for every 32 inputs"),
        ("wnvfp4a16g32", "grid nvfp4 has one scale for every 16 inputs"),
        ("wnvfp4a16kvnvfp4", "the key has no global scale"),
        ("w4a16qnvfp4kv4", "the query has no global scale"),
    ],
)
def test_what_4_bit_floating_point_cannot_be(notation: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"'{notation}' is impossible: {message}"):
        Scheme.parse(notation)


@pytest.mark.parametrize("written", ["W4A16G128", " w4a16g128 ", "w4A16g128"])
def test_case_and_space_do_not_matter(written: str) -> None:
    assert Scheme.parse(written) == Scheme.parse("w4a16g128")


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_grid(bits: int) -> None:
    whole, narrow = TensorScheme(bits=bits), TensorScheme(bits=bits, narrow=True)
    assert whole.qmax - whole.qmin + 1 == 2**bits
    assert (narrow.qmin, narrow.qmax) == (-whole.qmax, whole.qmax)


@pytest.mark.parametrize(
    "notation",
    ["", "w4", "a4w4", "w4a16g", "w4a16g128x", "w4a16kv", "4a16", "w4a16 g128", "w-4a16", "int4"],
)
def test_what_cannot_be_read(notation: str) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read.*w4a16g128"):
        Scheme.parse(notation)


@pytest.mark.parametrize(
    "notation",
    [
        "w1a16",
        "w9a16",
        "w0a16",
        "w32a32",
        "w4a1",
        "w4a9",
        "w4a4q1",
        "w4a4kv12",
        "w4a16g1",
        "w4a16g0",
        "w16a8g128",
    ],
)
def test_what_is_impossible(notation: str) -> None:
    with pytest.raises(RecipeError, match=f"'{notation}' is impossible"):
        Scheme.parse(notation)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": "nf4", "bits": 8}, "nf4 has 4 bits"),
        ({"grid": "fp8_e4m3", "bits": 4}, "fp8_e4m3 has 8 bits"),
        ({"grid": "fp8_e4m3", "symmetric": False}, "no zero-point"),
        ({"narrow": True, "symmetric": False}, "narrow"),
        ({"grid": "mxfp4"}, "mxfp4 has 4 bits"),
        ({"grid": "mxfp4", "bits": 4}, "set granularity=group and group_size=32"),
        ({"grid": "nvfp4", "bits": 4, "symmetric": False}, "no zero-point"),
        (
            {"grid": "mxfp4", "bits": 4, "granularity": "tensor", "static": True},
            "finds a group's scale as it runs: leave out static",
        ),
        ({"granularity": "group"}, "group_size"),
        ({"granularity": "token", "group_size": 32}, "group_size"),
        ({"granularity": "token", "static": True}, "dynamic"),
        ({"bits": 16}, "less than or equal to 8"),
        ({"bit": 4}, "Extra inputs"),
    ],
)
def test_a_tensor_scheme_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TensorScheme.model_validate(fields)
