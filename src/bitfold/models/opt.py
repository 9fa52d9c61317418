"""OPT: LayerNorm before (or, in OPT-350m, after) each half, biases everywhere, learned positions, ReLU."""

from transformers import PretrainedConfig

from bitfold.models.family import Family, FcPair, NormSite, QueryKey, Site, ValueOutput

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


OPT = Family(
    name="opt",
    blocks="model.decoder.layers",
    attention="self_attn",
    sites=_sites,
    inputs=(_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    flattened_inputs=("fc1", "fc2"),
)
