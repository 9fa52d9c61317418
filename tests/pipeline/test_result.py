"""What is shown of how to use an artifact."""

import pytest

from bitfold.export import choose_format
from bitfold.export.layout import AttentionEntry, LayerEntry, Layout
from bitfold.numerics import Scheme
from bitfold.pipeline.result import usage_lines

SYMMETRIC = {"symmetric": True}
SERVED = {
    "w4a16g128": {},
    "w4a16": SYMMETRIC,
    "w8a16": {},
    "w8a8": SYMMETRIC,
    "wfp8afp8": {},
}
NOT_SERVED = {
    "w3a16g64": {},
    "w4a16 per tensor": {"granularity": "tensor"},
    "w8a8": {},
    "w4a8": SYMMETRIC,
    "w4a8g64": {},
    "wfp8a16": {},
    "wfp8a8": {},
    "wmxfp4a16": {},
    "w16a8": {},
    "w8a16kv8": {},
}


def shown(notation: str, weight: dict[str, object]) -> tuple[str, ...]:
    scheme = Scheme.parse(notation.split()[0])
    if scheme.weight is not None:
        changed = scheme.weight.model_dump() | weight
        scheme = scheme.model_copy(update={"weight": type(scheme.weight)(**changed)})
    layout = Layout(
        {"model.layers.0.mlp.up_proj": LayerEntry(scheme, 128)},
        {"model.layers.0.self_attn": AttentionEntry(scheme, 64, "LlamaAttention")},
    )
    format, choice, _ = choose_format(layout)
    return usage_lines("OUT", format.config(layout, choice))


@pytest.mark.parametrize("notation", SERVED)
def test_vllm_is_shown_where_it_serves_the_scheme(notation: str) -> None:
    assert "vllm serve OUT" in shown(notation, SERVED[notation])


@pytest.mark.parametrize("notation", NOT_SERVED)
def test_vllm_is_not_shown_elsewhere(notation: str) -> None:
    lines = shown(notation, NOT_SERVED[notation])
    assert len(lines) == 2
    assert not any("vllm" in line for line in lines)
