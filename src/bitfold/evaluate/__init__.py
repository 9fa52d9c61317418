"""What a quantized model is worth: perplexity, distance from the original, speed and memory."""

from bitfold.evaluate.generation import Generation, generate
from bitfold.evaluate.kl_base import (
    KlBaseEvaluation,
    KlBaseFile,
    evaluate_kl_base,
    write_kl_base,
)
from bitfold.evaluate.memory import peak_rss_mb
from bitfold.evaluate.perplexity import Evaluation, TextEvaluation, evaluate
from bitfold.evaluate.scores import Figure, TaskEvaluation, TaskScore, TasksEvaluation
from bitfold.evaluate.statistics import TokenStatistics, token_statistics
from bitfold.evaluate.tasks import evaluate_tasks

__all__ = [
    "Evaluation",
    "Figure",
    "Generation",
    "KlBaseEvaluation",
    "KlBaseFile",
    "TaskEvaluation",
    "TaskScore",
    "TasksEvaluation",
    "TextEvaluation",
    "TokenStatistics",
    "evaluate",
    "evaluate_kl_base",
    "evaluate_tasks",
    "generate",
    "peak_rss_mb",
    "token_statistics",
    "write_kl_base",
]
