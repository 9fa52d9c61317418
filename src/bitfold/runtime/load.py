"""Load a checkpoint, original or quantized, through transformers: quietly, and all of it."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bitfold.errors import BitfoldError, CheckpointError
from bitfold.models.headers import read_json
from bitfold.runtime.adapted import base_of, is_adapter, load_adapted, read_adapter
from bitfold.runtime.checkpoint import check_checkpoint, find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype
from bitfold.runtime.loading import cannot_load, check_report, quiet

__all__ = ["load", "load_tokenizer"]

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)


def load(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, from a local directory or a name on the hub.

    device   "auto" (CUDA if there is one, else the CPU), "cpu", "cuda", "cuda:1"
    dtype    "auto" (float32 on the CPU, else the checkpoint's own), "float32", "bfloat16", …
    Artifacts of bitfold in the compressed-tensors format load in the same way; so do the adapters of `bitfold train`,
    on their base, which stays packed.

    Raises CheckpointError for whatever is wrong with the checkpoint, weights that are missing or
    that the model has no place for included: transformers would make up the former and drop the
    latter. RecipeError for a device or dtype that cannot be.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    with quiet():
        directory = find_checkpoint(model, with_code=trust_remote_code)
        if is_adapter(directory):
            return load_adapted(
                directory, device=device, dtype=dtype, trust_remote_code=trust_remote_code
            )
        check_checkpoint(directory)
        try:
            loaded, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                device_map={"": device},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they come back in the report instead
            )
            check_report(directory, report, loaded.state_dict().keys())
            _decompress(loaded)
        except BitfoldError:
            raise
        except Exception as error:  # whatever transformers raises is about this checkpoint
            raise cannot_load(directory, error) from error
    return loaded.eval()


def load_tokenizer(
    model: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; CheckpointError if its files are missing or broken."""
    with quiet():
        directory = find_checkpoint(model, with_code=trust_remote_code)
        if is_adapter(directory):  # which brings none of its own
            directory = base_of(directory, read_adapter(directory))
        if not any(found for name in VOCABULARIES for found in directory.glob(name)):
            raise CheckpointError(
                f"{directory} has no tokenizer (neither tokenizer.json nor tokenizer.model): "
                "copy the tokenizer files of the original model into it."
            )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (directory / name).exists():
                read_json(directory / name)
        try:
            return AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # whatever transformers raises is about these files
            raise cannot_load(directory, error, "the tokenizer of ") from error


def _decompress(model: PreTrainedModel) -> None:
    """Unpack compressed-tensors weights here rather than in the first forward pass.

    There it would print progress bars, count as prefill time, and make parameters in a caller's
    inference mode. Input activations are still quantized.
    """
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is None or not hasattr(model, "ct_decompress_hook"):
        return
    from compressed_tensors.offload import remove_dispatch  # slow to import, and rarely needed

    compressor.decompress_model(model)
    for module in model.modules():
        if hasattr(module, "quantization_scheme") and isinstance(module, torch.nn.Linear):
            # mxfp4 and nvfp4 weights come out in bfloat16 whatever the model runs in; they are exact in it.
            module.weight.data = module.weight.data.to(model.dtype)
    # It leaves every parameter behind an offloading cache, which costs a third of decoding speed.
    remove_dispatch(model, onload_tensors=True)
