"""Training in few bits: adapters and biases on frozen codes, and the loop that all training shares."""

from bitfold.training.loop import Loop, LoopOptions, LoopResult

__all__ = ["Loop", "LoopOptions", "LoopResult"]
