"""Which layers get how many bits: candidates, measured sensitivities, and an exact integer programme."""

from bitfold.allocation.candidates import Candidate, LayerGroup, candidates, layer_groups
from bitfold.allocation.latency import read_latencies
from bitfold.allocation.options import Budget, Mixed
from bitfold.allocation.pareto import Point, pareto_curve
from bitfold.allocation.programme import Limit, choose, smallest
from bitfold.allocation.sensitivity import Measured, RoundedLayers, Rounder, measure

__all__ = [
    "Budget",
    "Candidate",
    "LayerGroup",
    "Limit",
    "Measured",
    "Mixed",
    "Point",
    "RoundedLayers",
    "Rounder",
    "candidates",
    "choose",
    "layer_groups",
    "measure",
    "pareto_curve",
    "read_latencies",
    "smallest",
]
