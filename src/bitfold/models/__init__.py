"""The model families bitfold knows, as data, and how their checkpoints are read and run block by block."""

from bitfold.errors import FamilyError, did_you_mean
from bitfold.models.family import Family
from bitfold.models.gemma import GEMMA, GEMMA3
from bitfold.models.llama import LLAMA
from bitfold.models.mistral import MISTRAL
from bitfold.models.opt import OPT
from bitfold.models.qwen2 import QWEN2
from bitfold.models.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, OPT, GEMMA, GEMMA3)
}


def family_of(model_type: str) -> Family:
    """The family of config.json's `model_type`.

    Raises FamilyError, saying how to add one, where there is none.
    """
    if model_type not in FAMILIES:
        raise FamilyError(
            f"No family is known for model_type '{model_type}' ({did_you_mean(model_type, FAMILIES)}): "
            "to add one, write its blocks and sites as data in src/bitfold/models/, as llama.py does, "
            "and list it in src/bitfold/models/__init__.py."
        )
    return FAMILIES[model_type]
