"""OPT: LayerNorm before (or, in OPT-350m, after) each half, biases everywhere, learned positions, ReLU."""

from transformers import PretrainedConfig

from bitfold.models.family import Family, FcPair, NormSite, QueryKey, Site, Stream, ValueOutput

__all__ = ["OPT"]

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _sites(config: PretrainedConfig) -> tuple[Site, ...]:
    inner: tuple[Site, ...] = (
        QueryKey("self_attn.q_proj", "self_attn.k_proj", "none"),
        ValueOutput("self_attn.v_proj", "self_attn.out_proj"),
        FcPair("fc1", "fc2", homogeneous=config.activation_function == "relu"),
    )
    # A norm after the half (OPT-350m) also writes the residual stream, and one without gain has nowhere to
    # put an inverse: neither can take a site's other side.
    if not (config.do_layer_norm_before and config.layer_norm_elementwise_affine):
        return inner
    return (
        NormSite("self_attn_layer_norm", _QKV),
        *inner,
        NormSite("final_layer_norm", ("fc1",)),
    )


def _stream(config: PretrainedConfig) -> Stream | None:
    if not (config.do_layer_norm_before and config.layer_norm_elementwise_affine):
        return None
    projected = config.word_embed_proj_dim != config.hidden_size
    prefix = "model.decoder"
    positions = f"{prefix}.embed_positions"
    return Stream(
        embeddings=(positions,) if projected else (f"{prefix}.embed_tokens", positions),
        block_writers=("self_attn.out_proj", "fc2"),
        final_norm=f"{prefix}.final_layer_norm",
        reader=f"{prefix}.project_out" if projected else "lm_head",
        writers=(f"{prefix}.project_in",) if projected else (),
        reads_mean=True,
    )


OPT = Family(
    name="opt",
    blocks="model.decoder.layers",
    attention="self_attn",
    sites=_sites,
    inputs=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    stream=_stream,
    flattened_inputs=("fc1", "fc2"),
)
