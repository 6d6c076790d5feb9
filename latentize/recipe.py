"""`Recipe`: what the user asks for, validated where it enters."""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from latentize.errors import LatentizeError

#: (experts factor, top-k factor) of a variant at an integer compression a.
_VARIANTS = {"acc": (True, True), "eff": (True, False), "fixed": (False, False)}


def _three(value: Any) -> Any:
    """One size as smallest, usual and largest."""
    return (value, value, value) if isinstance(value, int) else value


Sizes = Annotated[tuple[int, int, int], BeforeValidator(_three)]


class EngineProfile(BaseModel):
    """What an engine takes: smallest, usual and largest batch and number of tokens; one number is all three."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: Sizes = (1, 1, 1)
    tokens: Sizes

    @field_validator("batch", "tokens")
    @classmethod
    def _in_order(cls, value: tuple[int, int, int]) -> tuple[int, int, int]:
        low, usual, high = value
        if not 1 <= low <= usual <= high:
            raise ValueError(f"{low}, {usual}, {high} is not in order: expected 1 <= smallest <= usual <= largest")
        return value


class Recipe(BaseModel):
    """How to convert a model.

    `compression` α or `latent_dim` ℓ sets the width. `variant` says what the saving buys: "acc" αN experts and αk
    active, "eff" αN experts and k active, "fixed" neither; `experts_factor` and `topk_factor` override it.
    `init` "activation" uses calibration data, "weights" the weights alone. `heal_steps` None chooses, 0 does not heal.
    `include` and `exclude` are shell patterns of block names. `dtype` is the dtype of the rewritten blocks; None keeps
    the original's. `profiles` are what TensorRT engines take; none for the usual one.

    Raises:
        LatentizeError: a field is unknown (the nearest known one is named) or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    compression: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    latent_dim: Annotated[int, Field(ge=1)] | None = None
    variant: Literal["acc", "eff", "fixed"] = "acc"
    experts_factor: Annotated[int, Field(ge=1, le=64)] | None = None
    topk_factor: Annotated[int, Field(ge=1, le=64)] | None = None
    init: Literal["activation", "weights"] = "activation"
    heal_steps: Annotated[int, Field(ge=0)] | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    profiles: tuple[EngineProfile, ...] = ()

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LatentizeError(_explain(error)) from None

    @model_validator(mode="after")
    def _factors_fit(self) -> Self:
        if self.topk_factor is not None and self.experts_factor is not None and self.topk_factor > self.experts_factor:
            raise ValueError(
                f"topk_factor {self.topk_factor} is larger than experts_factor {self.experts_factor}: "
                "a token cannot select more than its share of every expert's copies; lower topk_factor"
            )
        return self

    @classmethod
    def from_yaml(cls, path: Path) -> Recipe:
        """The recipe in a YAML file of `field: value` lines."""
        return cls(**read_yaml(path))

    def latent_dim_for(self, hidden_size: int) -> int:
        """Latent width ℓ for a block of width d: d/α rounded up to 128 (d ≥ 1024), 8 (d ≥ 64) or 1."""
        if self.latent_dim is not None:
            return self.latent_dim
        step = 128 if hidden_size >= 1024 else 8 if hidden_size >= 64 else 1
        return min(hidden_size, math.ceil(hidden_size / self.compression / step) * step)

    def factors_for(self, hidden_size: int) -> tuple[int, int]:
        """(experts factor, top-k factor) for a block of width d, from the α asked for."""
        asked = self.compression if self.latent_dim is None else hidden_size / self.latent_dim
        whole = max(1, math.floor(asked + 1e-9))
        grows, selects_more = _VARIANTS[self.variant]
        experts = self.experts_factor if self.experts_factor is not None else whole if grows else 1
        topk = self.topk_factor if self.topk_factor is not None else whole if selects_more else 1
        return experts, topk


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        LatentizeError: the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        message = f"recipe {path}: cannot be read ({error.strerror}); give the path of a YAML file"
        raise LatentizeError(message) from None
    except yaml.YAMLError as error:
        raise LatentizeError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise LatentizeError(f"recipe {path}: expected lines of `field: value`, found {type(values).__name__}")
    return values


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, Recipe.model_fields, n=1, cutoff=0.0)
        return f"recipe: unknown field {name!r}; did you mean {close[0]!r}? Fields: {', '.join(Recipe.model_fields)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return f"recipe: {message}"
    return f"recipe: {name} = {problem['input']!r} is not accepted: {message[0].lower()}{message[1:]}"
