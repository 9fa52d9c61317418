"""Training in low precision, and quantization of any PyTorch model: fake quantization in, codes out."""

from bitfold.training.batch_norm import estimate_batch_norms, fold_batch_norms
from bitfold.training.convert import convert, quantized_weights
from bitfold.training.equalize import equalize
from bitfold.training.preparation import METHODS, Preparation
from bitfold.training.prepare import calibrate, penalty, prepare, prepared_layers
from bitfold.training.saving import load_converted, save_converted
from bitfold.training.zeroq import bits_within, distilled_inputs, sensitivities

__all__ = [
    "METHODS",
    "Preparation",
    "bits_within",
    "calibrate",
    "convert",
    "distilled_inputs",
    "equalize",
    "estimate_batch_norms",
    "fold_batch_norms",
    "load_converted",
    "penalty",
    "prepare",
    "prepared_layers",
    "quantized_weights",
    "save_converted",
    "sensitivities",
]
