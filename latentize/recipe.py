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

AUTO: Literal["auto"] = "auto"


class Budget(BaseModel):
    """What `compression: auto` may spend over all blocks: one of three.

    `bytes` and `flops` are shares, above 0 and at most 1, of what the original's routed path takes for one token: bytes
    of the selected experts' weights, or FLOPs (projections included, once there are any). `max_loss` is how much the
    model's loss may be predicted to rise, before any healing: nats per position between the predictions of both models,
    or the relative squared error of the output of a model that gives no class scores.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[float, Field(gt=0, le=1)] | None = None
    flops: Annotated[float, Field(gt=0, le=1)] | None = None
    max_loss: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise ValueError("give one of bytes, flops and max_loss")
        return self

    @property
    def limit(self) -> tuple[str, float]:
        """The field that is set, and its value."""
        return next(iter(self.model_dump(exclude_none=True).items()))


def _three(value: Any) -> Any:
    """One size as smallest, usual and largest."""
    return (value, value, value) if isinstance(value, int) else value


Sizes = Annotated[tuple[int, int, int], BeforeValidator(_three)]


class EngineProfile(BaseModel):
    """What a graph or an engine is used for: smallest, usual and largest batch and tokens; one number is all three."""

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

    `compression` α or `latent_dim` ℓ sets the width; `compression` "auto" gives every block its own, within `budget`,
    and keeps N and k (variant "fixed") unless told otherwise. `variant` says what the saving buys: "acc" αN experts
    and αk active, "eff" αN experts and k active, "fixed" neither; `experts_factor` and `topk_factor` override it.
    `init` "activation" uses calibration data, "weights" the weights alone. `heal_steps` None chooses, 0 does not heal.
    `heal_train` "latent" trains the rewritten blocks; "all" also everything outside them end to end, except what
    requires no gradient. `refit_shared` lets the last layer of a shared expert, which nothing else touches, absorb what
    the routed path lost; healing leaves it at that, so that it does not go with `heal_train` "all". `bypass`
    r > 0 adds a linear map of rank r around the routed experts of each block, which leaves the plain LatentMoE form.
    `include` and `exclude` are shell patterns of block names. `dtype` is the dtype of the rewritten blocks; None keeps
    the original's. `profiles` are what exported graphs are made fast for, and what TensorRT engines take; none for the
    usual ones.

    Raises:
        LatentizeError: a field is unknown (the nearest known one is named) or out of range.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    compression: Annotated[float, Field(ge=1, allow_inf_nan=False)] | Literal["auto"] = 2.0
    latent_dim: Annotated[int, Field(ge=1)] | None = None
    budget: Budget | None = None
    variant: Literal["acc", "eff", "fixed"] = "acc"
    experts_factor: Annotated[int, Field(ge=1, le=64)] | None = None
    topk_factor: Annotated[int, Field(ge=1, le=64)] | None = None
    init: Literal["activation", "weights"] = "activation"
    heal_steps: Annotated[int, Field(ge=0)] | None = None
    bypass: Annotated[int, Field(ge=0)] = 0
    heal_train: Literal["latent", "all"] = "latent"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    profiles: tuple[EngineProfile, ...] = ()
    refit_shared: bool = False

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise LatentizeError(_explain(error)) from None

    @model_validator(mode="before")
    @classmethod
    def _auto_is_fixed(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("compression") == AUTO:
            return {"variant": "fixed", **values}
        return values

    @model_validator(mode="after")
    def _budget_fits(self) -> Self:
        if self.compression != AUTO:
            if self.budget is not None:
                raise ValueError("budget is what compression: auto spends; set that, or leave the budget out")
            return self
        if self.latent_dim is not None:
            raise ValueError("compression: auto and latent_dim both set the experts' width; give one of them")
        if self.budget is None:
            raise ValueError("compression: auto needs a budget: one of bytes, flops and max_loss")
        if self.budget.max_loss is not None and self.init == "weights":
            raise ValueError("budget.max_loss is measured on calibration data, which init: weights does not look at")
        if self.variant == "acc" and self.topk_factor is None:
            raise ValueError(
                'compression: auto saves bytes, and variant acc spends them on more experts; use "fixed" or "eff"'
            )
        return self

    @model_validator(mode="after")
    def _bypass_has_data(self) -> Self:
        if self.bypass and self.init == "weights":
            raise ValueError("bypass is fitted to calibration data, which init: weights does not look at")
        return self

    @model_validator(mode="after")
    def _shared_experts_once(self) -> Self:
        if self.refit_shared and self.heal_train == "all" and self.heal_steps != 0:
            raise ValueError(
                "heal_train: all trains the shared experts too, which refit_shared would refit and then leave; give "
                "one of them"
            )
        return self

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

    @property
    def auto(self) -> bool:
        """Whether every block gets a width of its own."""
        return self.compression == AUTO

    def latent_dim_for(self, hidden_size: int) -> int:
        """Latent width ℓ for a block of width d: d/α rounded up to 128 (d ≥ 1024), 8 (d ≥ 64) or 1."""
        if self.latent_dim is not None:
            return self.latent_dim
        if self.compression == AUTO:
            raise LatentizeError("compression: auto has no one width; it is chosen for each block by the plan")
        return round_width(hidden_size, hidden_size / self.compression)

    def factors_for(self, hidden_size: int, latent_dim: int | None = None) -> tuple[int, int]:
        """(experts factor, top-k factor) for a block of width d, from the α asked for; auto goes by `latent_dim`."""
        given = latent_dim if self.compression == AUTO else self.latent_dim
        asked = float(self.compression) if given is None else hidden_size / given
        whole = max(1, math.floor(asked + 1e-9))
        grows, selects_more = _VARIANTS[self.variant]
        experts = self.experts_factor if self.experts_factor is not None else whole if grows else 1
        topk = self.topk_factor if self.topk_factor is not None else whole if selects_more else 1
        return experts, topk


def width_step(hidden_size: int) -> int:
    """What latent widths of a block of width d are multiples of, where latentize chooses them."""
    return 128 if hidden_size >= 1024 else 8 if hidden_size >= 64 else 1


def round_width(hidden_size: int, width: float) -> int:
    """`width` rounded up to a multiple of the block's step, and at most d."""
    step = width_step(hidden_size)
    return min(hidden_size, math.ceil(width / step) * step)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        LatentizeError: the file is missing, is not YAML, gives a field twice, or does not hold a mapping.
    """
    try:
        values = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506  a SafeLoader
    except OSError as error:
        message = f"recipe {path}: cannot be read ({error.strerror}); give the path of a YAML file"
        raise LatentizeError(message) from None
    except _GivenTwiceError as error:
        raise LatentizeError(f"recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise LatentizeError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise LatentizeError(f"recipe {path}: expected lines of `field: value`, found {type(values).__name__}")
    return values


class _GivenTwiceError(Exception):
    """A mapping has two values for one key."""


class _UniqueKeys(yaml.SafeLoader):
    """Refuses mappings that give a key twice, of which YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            name, line = key.value, key.start_mark.line + 1
            if not isinstance(name, str) or name == "<<":
                continue
            if name in lines:
                raise _GivenTwiceError(f"{name!r} is given twice, on lines {lines[name]} and {line}; keep one of them")
            lines[name] = line
        return super().construct_mapping(node, deep)


#: Fields of a recipe that have fields themselves.
_INNER: dict[str, type[BaseModel]] = {"budget": Budget, "profiles": EngineProfile}


def _explain(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        inner = _INNER.get(location[0]) if len(location) > 1 else None
        fields, name = list((inner or Recipe).model_fields), location[-1]
        close = difflib.get_close_matches(name, fields, n=1, cutoff=0.0)
        what = f"field {name!r} of {location[0]}" if inner else f"field {name!r}"
        return f"recipe: unknown {what}; did you mean {close[0]!r}? Fields: {', '.join(fields)}"
    name = ".".join(location)
    message = problem["msg"].removeprefix("Value error, ")
    if location[:1] == ["compression"]:
        name, message = "compression", 'Input should be a number of at least 1, or "auto"'
    if not name or problem["type"] == "value_error":
        return f"recipe: {f'{name}: ' if name else ''}{message}"
    return f"recipe: {name} = {problem['input']!r} is not accepted: {message[0].lower()}{message[1:]}"
