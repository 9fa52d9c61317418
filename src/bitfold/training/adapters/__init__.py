"""What is trained beside a base in few bits: LoRA's matrices (QLoRA) and biases (BitFit)."""

from bitfold.training.adapters.adapter_merging import merge_adapter
from bitfold.training.adapters.adapter_options import AdapterOptions, AdapterResult
from bitfold.training.adapters.bitfit import train_bitfit
from bitfold.training.adapters.qlora import train_qlora

__all__ = ["AdapterOptions", "AdapterResult", "merge_adapter", "train_bitfit", "train_qlora"]
