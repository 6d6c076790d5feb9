"""`save_pretrained` of a converted transformers model, which writes the folder that `Result.save` does.

transformers' own knows nothing of latent blocks: its folder opens, with random experts in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentize import artefact
from latentize.artefact import Origin, SavedBlock
from latentize.errors import LatentizeError
from latentize.moe import LatentExperts, LatentMoE
from latentize.staging import MANIFEST, replaced

#: Values of transformers' options that change nothing here.
_IDLE = {"push_to_hub": (False, None), "safe_serialization": (True, None), "token": (None,), "variant": (None,)}
#: Weights of an earlier save, which may have come in more pieces.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


@dataclass
class SavePretrained:
    """What a converted model has in place of its class's `save_pretrained`.

    It is an attribute of the model like any other: copies and pickles of the model hold one that saves the copy.
    """

    model: nn.Module
    origin: Origin
    sites: Mapping[str, Mapping[str, Any]]
    blocks: Mapping[str, LatentMoE]
    recipe: Mapping[str, Any]

    def __call__(
        self, save_directory: str | Path, is_main_process: bool = True, state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        """Write the model into a folder, which may hold other files; `latentize.load(save_directory)` reads it.

        Args:
            save_directory: the folder, made where it is missing. Files of an earlier save are replaced.
            is_main_process: False writes nothing.
            state_dict: None, or the model's own.
            options: those of transformers at values that ask for nothing else.

        Raises:
            LatentizeError: an option asks for what is not done here, or a tensor is missing, unexpected or not finite.
            ResourceError: the disk is full.
        """
        for name, value in options.items():
            if value not in _IDLE.get(name, ()):
                raise LatentizeError(
                    f"save_pretrained: {name}={value!r} is not known for a converted model; leave it out"
                )
        if state_dict is not None:
            _check_own(self.model, state_dict)
        if not is_main_process:
            return
        blocks = {name: SavedBlock(self.sites[name], block.spec) for name, block in self.blocks.items()}
        with replaced(Path(save_directory), MANIFEST, old=_WEIGHTS) as work:
            artefact.write(work, self.model, self.origin, blocks, self.recipe)


@dataclass
class PartOfConverted:
    """`save_pretrained` of a transformers model inside a converted one: its blocks are described with the whole."""

    name: str

    def __call__(self, *_args: Any, **_options: Any) -> None:
        """Refuse.

        Raises:
            LatentizeError: always.
        """
        raise LatentizeError(
            f"{self.name or 'this model'}: holds converted blocks, which are saved with the whole model only; "
            "call save on the result of latentize.convert"
        )


def attach(
    model: nn.Module, origin: Origin, sites: Mapping[str, Mapping[str, Any]], blocks: Mapping[str, LatentMoE],
    recipe: Mapping[str, Any],
) -> None:  # fmt: skip
    """Give a converted model, and models of transformers inside it, a `save_pretrained` that knows its blocks.

    Args:
        model: the converted model.
        origin: where it came from.
        sites: where each block sits (`passes.site_to_json`), by block name.
        blocks: the blocks in the model, by name.
        recipe: what was asked for, as JSON values.
    """
    for name, module in model.named_modules():
        if not hasattr(type(module), "save_pretrained") or not _holds_blocks(module):
            continue
        whole = not name and origin.config is not None
        saving = SavePretrained(model, origin, sites, blocks, recipe) if whole else PartOfConverted(name)
        module.save_pretrained = saving


def _holds_blocks(module: nn.Module) -> bool:
    return any(isinstance(inner, LatentExperts) for inner in module.modules())


def _check_own(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    odd = next((name for name, tensor in state.items() if not _same(own.get(name), tensor)), None)
    odd = odd or next((name for name in own if name not in state), None)
    if odd is not None:
        raise LatentizeError(
            f"save_pretrained: state_dict[{odd!r}] is not the model's own tensor; load it into the model first, "
            "and leave state_dict out"
        )


def _same(own: Tensor | None, given: Tensor) -> bool:
    return own is not None and own.shape == given.shape and own.data_ptr() == given.data_ptr()
