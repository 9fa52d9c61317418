"""bitfold makes language models small enough for the machine in front of you.

    import bitfold
    bitfold.quantize("path/to/model", "path/to/artifact", method="awq", scheme="w4a16g128")
    bitfold.evaluate("path/to/artifact", "text.txt", against="path/to/model")

Importing bitfold also teaches transformers to load artifacts in bitfold's own format.
"""

from bitfold.allocation import Mixed
from bitfold.errors import BitfoldError
from bitfold.evaluate import evaluate, evaluate_kl_base, evaluate_tasks, generate, write_kl_base
from bitfold.export.exporting import export_to
from bitfold.export.importing import import_checkpoint
from bitfold.numerics import QuantizedTensor, Scheme
from bitfold.pipeline.quantize import Quantization, quantize
from bitfold.pipeline.sensitivity import Sensitivity, sensitivity
from bitfold.pipeline.verify import verify
from bitfold.recipe import Recipe
from bitfold.runtime import hf_quantizer as _hf_quantizer  # noqa: F401 - registers the format
from bitfold.runtime.kv_cache import quantized_cache
from bitfold.runtime.load import load, load_tokenizer
from bitfold.runtime.quick_loading import load_quick
from bitfold.runtime.quicken import quicken
from bitfold.training import calibrate, convert, penalty, prepare
from bitfold.training.adapters import (
    AdapterOptions,
    merge_adapter,
    train_bitfit,
    train_qlora,
)
from bitfold.training.qat import QatOptions, train_qat
from bitfold.version import VERSION as __version__  # noqa: N811

__all__ = [
    "AdapterOptions",
    "BitfoldError",
    "Mixed",
    "QatOptions",
    "Quantization",
    "QuantizedTensor",
    "Recipe",
    "Scheme",
    "Sensitivity",
    "__version__",
    "calibrate",
    "convert",
    "evaluate",
    "evaluate_kl_base",
    "evaluate_tasks",
    "export_to",
    "generate",
    "import_checkpoint",
    "load",
    "load_quick",
    "load_tokenizer",
    "merge_adapter",
    "penalty",
    "prepare",
    "quantize",
    "quantized_cache",
    "quicken",
    "sensitivity",
    "train_bitfit",
    "train_qat",
    "train_qlora",
    "verify",
    "write_kl_base",
]
