"""What users wrote, made into a checked object, or answered with one sentence."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from bitfold.errors import RecipeError, did_you_mean

__all__ = ["make"]


def make(model: type[BaseModel], what: str, options: object) -> Any:
    """Build a pydantic model, called `what` in a message.

    Raises RecipeError for the first thing that is wrong with it.
    """
    if not isinstance(options, Mapping):
        raise RecipeError(f"{what} takes its options as `key: value` pairs, not {options!r}.")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"{what} has no option '{key}': {did_you_mean(key, model.model_fields)}."
            ) from error
        message = first["msg"].removeprefix("Value error, ")
        if not key:
            raise RecipeError(f"{what} is impossible: {message}.") from error
        message = message[0].lower() + message[1:]
        raise RecipeError(f"{what} cannot have {key}={first['input']!r}: {message}.") from error
