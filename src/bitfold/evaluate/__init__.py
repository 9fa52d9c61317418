"""What a quantized model is worth: perplexity, distance from the original, speed and memory."""

from bitfold.evaluate.generation import Generation, generate
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.evaluate.perplexity import Evaluation, TextEvaluation, evaluate
from bitfold.evaluate.statistics import TokenStatistics, token_statistics

__all__ = [
    "Evaluation",
    "Generation",
    "TextEvaluation",
    "TokenStatistics",
    "evaluate",
    "generate",
    "peak_rss_mb",
    "token_statistics",
]
