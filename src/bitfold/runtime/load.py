"""Load a checkpoint, original or quantized, through transformers: quietly, and all of it."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from bitfold.errors import BitfoldError, CheckpointError
from bitfold.models.headers import read_json
from bitfold.runtime.checkpoint import check_checkpoint, find_checkpoint
from bitfold.runtime.device import resolve_device, resolve_dtype

__all__ = ["cannot_load", "check_report", "load", "load_tokenizer", "quiet"]

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
LAYER = re.compile(r"^(.*?)\.\d+\.")


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
    Artifacts of bitfold in the compressed-tensors format load in the same way.

    Raises CheckpointError for whatever is wrong with the checkpoint, weights that are missing or
    that the model has no place for included: transformers would make up the former and drop the
    latter. RecipeError for a device or dtype that cannot be.
    """
    device = resolve_device(device)
    dtype = resolve_dtype(dtype, device)
    with quiet():
        directory = find_checkpoint(model, with_code=trust_remote_code)
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


def check_report(directory: Path, report: dict[str, Any], names: Collection[str]) -> None:
    """Every weight of the model came from the checkpoint, and none of its layers was left over."""
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise CheckpointError(
            f"{directory}: {name} has shape {list(found)}, but config.json makes it {list(expected)} "
            f"({len(mismatched)} of other shapes): weights and config.json are of different models; "
            "copy or download them again."
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{directory} has no weights for {missing[0]}, which config.json asks for ({len(missing)} missing): "
            "the checkpoint is incomplete or config.json is of another model; copy or download them again."
        )
    # Leftovers of other parts (a vision tower, say) are no harm; a layer's own weights, or a layer
    # that config.json does not count, would give another function than the one that was trained.
    layers = {found[1] for name in names if (found := LAYER.match(name))}
    left_over = sorted(
        name
        for name in report["unexpected_keys"]
        if (found := LAYER.match(name)) and found[1] in layers
    )
    if left_over:
        raise CheckpointError(
            f"{directory}: config.json has no place for {left_over[0]} ({len(left_over)} left over): "
            "weights and config.json are of different models; copy or download them again."
        )


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


def cannot_load(directory: Path, error: Exception, what: str = "") -> CheckpointError:
    """The error for whatever transformers raised over a checkpoint."""
    # Without a sentence of its own (KeyError: 'added_tokens') an error needs its name to be read.
    said = str(error) if " " in str(error) else f"{type(error).__name__} {error}"
    reason = textwrap.shorten(said, width=200, placeholder=" …")
    return CheckpointError(
        f"It is not possible to load {what}{directory} ({reason.rstrip('.')}): "
        "copy or download it again, all files of one model."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of the libraries below; everything as it was, afterwards.

    Errors are exceptions, so nothing that matters is lost with stderr, which is the only way to
    silence the bars of compressed-tensors.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
