"""Llama (and everything built like it): RMSNorm, rotary embedding, grouped queries, gated MLP."""

from transformers import PretrainedConfig

from bitfold.models.family import Family, NormSite, QueryKey, Site, Stream, UpDown, ValueOutput

__all__ = ["GATED_INPUTS", "LLAMA", "gated_sites"]

GATED_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def gated_sites(
    *,
    norm_offset: float = 0.0,
    mlp_norm: str = "post_attention_layernorm",
    head_norms: bool = False,
) -> tuple[Site, ...]:
    """The sites of a pre-norm block with rotary embedding and a gated MLP."""
    return (
        NormSite("input_layernorm", GATED_INPUTS[0], norm_offset),
        QueryKey(
            "self_attn.q_proj",
            "self_attn.k_proj",
            "half-split",
            query_norm="self_attn.q_norm" if head_norms else None,
            key_norm="self_attn.k_norm" if head_norms else None,
            norm_offset=norm_offset,
        ),
        ValueOutput("self_attn.v_proj", "self_attn.o_proj"),
        NormSite(mlp_norm, GATED_INPUTS[2], norm_offset),
        UpDown("mlp.up_proj", "mlp.down_proj", gate="mlp.gate_proj"),
    )


def _sites(config: PretrainedConfig) -> tuple[Site, ...]:
    return gated_sites()


def _stream(config: PretrainedConfig) -> Stream:
    return Stream(
        embeddings=("model.embed_tokens",),
        block_writers=("self_attn.o_proj", "mlp.down_proj"),
        final_norm="model.norm",
        reader="lm_head",
    )


LLAMA = Family(
    name="llama",
    blocks="model.layers",
    attention="self_attn",
    sites=_sites,
    inputs=GATED_INPUTS,
    stream=_stream,
)
