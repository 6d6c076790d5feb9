"""Profiles: which batches and numbers of tokens a graph or an engine is for, and which of them is usual."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from latentize.errors import LatentizeError

#: (smallest, usual, largest)
Range = tuple[int, int, int]
#: The longest axis that engines can have.
LONGEST = (1 << 31) - 1
_TEXT = re.compile(r"(\d+)(?::(\d+):(\d+))?x(\d+)(?::(\d+):(\d+))?")


@dataclass(frozen=True)
class Profile:
    """One profile: smallest, usual and largest batch and number of tokens."""

    batch: Range
    tokens: Range

    @classmethod
    def parse(cls, text: str) -> Profile:
        """A profile as the command line spells it: BATCHxTOKENS, each one number or smallest:usual:largest.

        Raises:
            LatentizeError: it is spelt otherwise, or not in order.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise LatentizeError(
                f"--profile {text!r}: expected BATCHxTOKENS, each one number or smallest:usual:largest, "
                "e.g. 1:1:4x1:16:256"
            )
        numbers = [None if part is None else int(part) for part in found.groups()]
        return cls(_range(numbers[:3]), _range(numbers[3:])).checked(f"--profile {text}")

    @classmethod
    def of(cls, values: Mapping[str, Sequence[int]]) -> Profile:
        """A profile of a recipe."""
        batch, tokens = values["batch"], values["tokens"]
        return cls((batch[0], batch[1], batch[2]), (tokens[0], tokens[1], tokens[2])).checked("recipe: profiles")

    def checked(self, where: str) -> Profile:
        """The same profile.

        Raises:
            LatentizeError: a range is not in order, begins below 1, or ends beyond `LONGEST`.
        """
        for name, (low, usual, high) in (("batch", self.batch), ("tokens", self.tokens)):
            if not 1 <= low <= usual <= high:
                raise LatentizeError(
                    f"{where}: {name} {low}:{usual}:{high} is not in order: expected 1 <= smallest <= usual <= largest"
                )
            if high > LONGEST:
                raise LatentizeError(f"{where}: {name} {low}:{usual}:{high} is too large: at most {LONGEST}")
        return self

    @property
    def in_flight(self) -> Range:
        """Smallest, usual and largest number of tokens of a whole batch."""
        low, usual, high = (batch * tokens for batch, tokens in zip(self.batch, self.tokens, strict=True))
        return low, usual, high

    def within(self, other: Profile) -> bool:
        """Whether everything that it takes is taken by the other one too."""
        pairs = ((self.batch, other.batch), (self.tokens, other.tokens))
        return all(theirs[0] <= mine[0] and mine[2] <= theirs[2] for mine, theirs in pairs)

    def __str__(self) -> str:
        return "x".join(_spell(values) for values in (self.batch, self.tokens))


#: What engines take where nothing else is asked for.
USUAL = (Profile((1, 1, 4), (1, 16, 256)),)


def choose(
    asked: Sequence[Profile], recipe: Iterable[Mapping[str, Sequence[int]]], longest: int | None
) -> tuple[Profile, ...]:
    """The profiles to build: those asked for, else the recipe's, else `USUAL` as far as the model goes.

    Args:
        asked: of the command line.
        recipe: of the recipe that the model was converted with.
        longest: the longest sequence that the model takes, where it says so.

    Raises:
        LatentizeError: a profile is not in order, leaves the recipe's, or is longer than the model takes.
    """
    planned = tuple(Profile.of(values) for values in recipe)
    for profile in asked:
        if planned and not any(profile.within(other) for other in planned):
            raise LatentizeError(
                f"--profile {profile} contradicts the recipe, whose profiles are {', '.join(map(str, planned))}: "
                "ask for something inside one of them, or convert with another recipe"
            )
    chosen = tuple(asked) or planned
    for profile in chosen:
        if longest is not None and profile.tokens[2] > longest:
            raise LatentizeError(
                f"profile {profile} asks for {profile.tokens[2]} tokens, and the model takes {longest} at most"
            )
    if chosen or longest is None:
        return chosen or USUAL
    low, usual, high = (min(size, longest) for size in USUAL[0].tokens)
    return (Profile(USUAL[0].batch, (low, usual, high)),)


def shapes(shape: Sequence[int], floating: bool, profile: Profile) -> list[list[int]]:
    """Smallest, usual and largest shape of an input whose free axes are -1.

    The first axis is the batch and every other free one counts tokens; floats [T, d] have no batch.
    """
    batched = not (floating and len(shape) == 2)
    found = []
    for batch, tokens in zip(profile.batch, profile.tokens, strict=True):
        free = [batch if axis == 0 and batched else tokens for axis in range(len(shape))]
        found.append([size if size >= 0 else free[axis] for axis, size in enumerate(shape)])
    return found


def fixed_problem(name: str, shape: Sequence[int], floating: bool, profile: Profile) -> str:
    """How an input's fixed axes contradict a profile; "" where they do not."""
    batched = not (floating and len(shape) == 2)
    axes = list(enumerate(shape))[: len(shape) - floating]  # the last axis of hidden states is no number of tokens
    for axis, size in axes:
        what, wanted = ("batch", profile.batch) if axis == 0 and batched else ("tokens", profile.tokens)
        if size >= 0 and {*wanted} != {size}:
            return (
                f"profile {profile} asks for {what} {_spell(wanted)}, and axis {axis} of input {name!r} is always "
                f"{size} in the graph: the model was captured with a size that it does not let vary"
            )
    return ""


def _range(numbers: Sequence[int | None]) -> Range:
    low, usual, high = numbers
    assert low is not None
    return low, low if usual is None else usual, low if high is None else high


def _spell(values: Range) -> str:
    return str(values[0]) if len(set(values)) == 1 else ":".join(map(str, values))
