"""Which forms a body holds, each up to some number of tokens: as text, and as what was chosen for a node.

The text of a form is a name, or several as "few+many" or "few+some+many". Each but the last may say up to how many
tokens it is taken, "few:4+many"; where it does not, what the forms cost decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from latentize.errors import LatentizeError
from latentize.exporters.onnx_costs import MOST, Priced, last_tokens
from latentize.exporters.onnx_forms import NodeConfig

#: How a form came about: given, by what forms cost elsewhere, or by what they took here.
How = Literal["asked", "priced", "measured"]

#: Requests that leave the form to us, and how it comes about then.
REQUESTS: Mapping[str, How] = MappingProxyType({"auto": "priced", "measured": "measured"})


def check_text(form: str, known: Iterable[str]) -> None:
    """Refuse a text that is neither one of `REQUESTS` nor a form, its names being `known`.

    Raises:
        LatentizeError: naming the forms there are, or what is wrong with the numbers of tokens.
    """
    if form in REQUESTS:
        return
    parts = form.split("+")
    match = [re.fullmatch(r"(\w+)(?::(\d{1,9}))?", part) for part in parts]
    if len(parts) > MOST or not all(found and found[1] in known for found in match):
        raise LatentizeError(
            f"ONNX form {form!r} is not known: expected {', '.join((*REQUESTS, *known))}, or several of them as "
            "few+many or few+some+many, where few:4+many takes the first for up to 4 tokens"
        )
    said = [int(found[2]) for found in match if found and found[2]]
    if ":" in parts[-1] or 0 in said or any(many <= few for few, many in pairwise(said)):
        raise LatentizeError(
            f"ONNX form {form!r}: each form but the last may name a largest number of tokens, and more than the one "
            "before it, as in gather:1+dense:16+batched"
        )


def spell(names: Sequence[str], limits: Sequence[int]) -> str:
    """The text of forms of which each but the last is taken up to so many tokens."""
    return "+".join([*(f"{name}:{limit}" for name, limit in zip(names, limits, strict=False)), names[-1]])


def names_of(form: str) -> tuple[str, ...]:
    """The names in the text of a form."""
    return tuple(part.partition(":")[0] for part in form.split("+"))


def limits_of(form: str, config: NodeConfig) -> tuple[int | None, ...]:
    """Up to how many tokens each form but the last is taken; None where that is always."""
    said = [part.partition(":")[2] for part in form.split("+")]
    return tuple(
        int(limit) if limit else last_tokens(Priced(config), few, many)
        for limit, (few, many) in zip(said, pairwise(names_of(form)), strict=False)
    )


@dataclass(frozen=True)
class FormChoice:
    """The body form of the node in module `block`, as text.

    `limits` has up to how many tokens each of its forms but the last is taken; None where that is always. `tokens` are
    the numbers of tokens in flight that the form was chosen for: none where it was given.
    """

    block: str
    form: str
    limits: tuple[int | None, ...]
    tokens: tuple[int, ...]
    how: Literal["asked", "priced", "measured"] = "priced"

    @classmethod
    def of(cls, block: str, form: str, config: NodeConfig, tokens: tuple[int, ...], how: How = "priced") -> FormChoice:
        """What a body of this form does for a node with this config."""
        return cls(block, form, limits_of(form, config), tokens, how)

    def describe(self) -> str:
        """In words, without the block, e.g. "gather up to 3 tokens, then moe; chosen for 1 to 4 tokens in flight"."""
        *earlier, last = names_of(self.form)
        limits = ["at any number" if limit is None else f"up to {_tokens(limit)}" for limit in self.limits]
        parts = [f"{form} {limit}" for form, limit in zip(earlier, limits, strict=True)]
        taken = ", ".join([*parts, f"then {last}" if parts else last])
        if not self.tokens:
            return f"{taken}; as asked for"
        chosen = "fastest of those timed on the exporting machine" if self.how == "measured" else "chosen"
        return f"{taken}; {chosen} for {_spelt(self.tokens)} in flight"


def _spelt(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return _tokens(low) if low == high else f"{low:,} to {_tokens(high)}"


def _tokens(count: int) -> str:
    return f"{count:,} token{'s'[: count != 1]}"
