"""QLoRA: low-rank adapters trained on a base that stays in few bits (Dettmers et al. 2023, arXiv 2305.14314)."""

from pathlib import Path
from typing import Any

from bitfold.training.adapters.adapter_options import AdapterOptions, AdapterResult
from bitfold.training.adapters.adapter_training import train_adapter

__all__ = ["train_qlora"]


def train_qlora(
    model: str | Path,
    text: str | Path,
    out: str | Path,
    *,
    options: AdapterOptions | None = None,
    **more: Any,
) -> AdapterResult:
    """Adapt a model to a text: y = W̃x + alpha/rank · BA · x, with W̃ the frozen weight in few bits, A and B trained.

    model: an artifact of bitfold, a checkpoint in bitsandbytes' format or another that bitfold reads, or an original,
    which is rounded to nf4 with nested scales (or `options.scheme`) as it is loaded. text: UTF-8, to train on. out: a
    directory in peft's format, which `load`, `evaluate` and `generate` take as they take a model; it holds no copy of
    the base, and says which one it is.

    more: evaluation, a text whose perplexity is measured before and after; teacher, a model whose logits are imitated
    beside the text; device, dtype; overwrite; resume (True: a killed run of the same request goes on); progress, called
    with (steps done, steps in all, what is being done); trust_remote_code.

    A loss that is not finite ends the training with the best state so far, and a note in the result.

        bitfold.train_qlora("llama-w4", "law.txt", "llama-law", evaluation="law-test.txt")

    Raises MissingExtraError without peft; DataError for texts that cannot be used; CheckpointError for a base that
    cannot be read or trained on; RecipeError for options that cannot be; OutputError for `out`.
    """
    options = options or AdapterOptions()
    kinds = ("lora", "bitfit") if options.bitfit else ("lora",)
    return train_adapter(kinds, model, text, out, options=options, **more)
