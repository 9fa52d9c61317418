"""Engines that run what was exported: each loads a file as its users do, and gives logits."""
