"""A transformers model that puts latent blocks in place as its configuration says: `modeling_latent.py` in OUT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentize.moe import LatentMoE
from latentize.passes.boundaries import put_parts, put_whole
from latentize.passes.sites import PartsSite, WholeSite, from_json
from latentize.spec import MoESpec
from latentize.store import decode


class LatentModel:
    """Comes before a transformers model class among the bases of a converted model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # of the transformers class
        for block in config.latentize.values():
            moe = LatentMoE(decode(MoESpec, block["spec"], _placeholder))
            site = from_json(block["site"])
            if isinstance(site, PartsSite):
                put_parts(self, site, moe, None)  # type: ignore[arg-type]
            elif isinstance(site, WholeSite):
                put_whole(self, site, moe)  # type: ignore[arg-type]


def _placeholder(outline: Mapping[str, Any]) -> Tensor:
    return torch.empty(outline["shape"], dtype=getattr(torch, outline["dtype"]))
