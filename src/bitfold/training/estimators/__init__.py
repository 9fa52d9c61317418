"""Estimators, one file for each idea: what stands in for rounding while a model is trained.

A `WeightEstimator` or `InputEstimator` is a module; `bitfold.training.preparation` says which names make which.
"""

from bitfold.training.estimators.binary import (
    BinaryConnectWeight,
    SignInput,
    XnorWeight,
    binary_scheme,
)
from bitfold.training.estimators.dorefa import DorefaWeight, dorefa_scheme
from bitfold.training.estimators.estimator import InputEstimator, WeightEstimator
from bitfold.training.estimators.lsq import LsqInput, LsqWeight
from bitfold.training.estimators.minmax import MinMaxWeight
from bitfold.training.estimators.pact import PactInput
from bitfold.training.estimators.ranges_of_inputs import (
    DynamicInput,
    MovingAverageInput,
    ObservedInput,
)
from bitfold.training.estimators.ternary import LearnedTernaryWeight, TwnWeight, ternary_scheme

__all__ = [
    "BinaryConnectWeight",
    "DorefaWeight",
    "DynamicInput",
    "InputEstimator",
    "LearnedTernaryWeight",
    "LsqInput",
    "LsqWeight",
    "MinMaxWeight",
    "MovingAverageInput",
    "ObservedInput",
    "PactInput",
    "SignInput",
    "TwnWeight",
    "WeightEstimator",
    "XnorWeight",
    "binary_scheme",
    "dorefa_scheme",
    "ternary_scheme",
]
