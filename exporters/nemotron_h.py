"""A converted NemotronH model as a checkpoint of that architecture, as transformers and serving engines read it.

NemotronH has latent experts of its own (`moe_latent_size`, `fc1_latent_proj`, `fc2_latent_proj`); a standard one that
was converted is a NemotronH again, as long as its blocks agree in size and its routing stays within the family.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentize.artefact import copy_assets
from latentize.errors import LatentizeError
from latentize.exporters.onnx_check import TOLERANCES
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.plan import BlockPlan
from latentize.spec import MoESpec, RouterSpec
from latentize.staging import replaced

MODEL_TYPE = "nemotron_h"
#: Weights of an earlier checkpoint, which transformers would read beside the new ones or in their place.
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
#: The constant in the family's normalisation; anything near it is the same in every dtype that weights come in.
_EPS = 1e-15


@dataclass(frozen=True)
class Agreement:
    """Relative error of the checkpoint, loaded by transformers, against the converted model; what rounding allows."""

    error: float
    tolerance: float


def check(model: nn.Module, specs: Mapping[str, MoESpec], plans: Mapping[str, BlockPlan]) -> None:
    """Everything that would stop `write` later, from the original's specs and the plan.

    Args:
        model: the original.
        specs: original blocks by name.
        plans: what will be made of them.

    Raises:
        LatentizeError: naming the block and what the architecture has no room for.
    """
    config = _config(model)
    _check_layers(config, len(specs))
    sizes = {(p.latent_dim, p.new_num_experts, p.new_top_k): name for name, p in plans.items()}
    _one_size(sizes)
    for name, spec in specs.items():
        _expressible(name, spec)
        if plans[name].bypass_rank:
            raise LatentizeError(
                f"block {name!r}: it would have a bypass, which NemotronH cannot express; leave out this export, or "
                "set bypass to 0"
            )
        if plans[name].experts_factor != plans[name].topk_factor:
            raise LatentizeError(
                f"block {name!r}: {plans[name].experts_factor} times the experts with {plans[name].topk_factor} times "
                "the top-k needs banks of experts, which NemotronH's routing cannot express; use variant acc or fixed"
            )


def write(
    folder: Path, model: nn.Module, blocks: Mapping[str, LatentMoE], inputs: Inputs, *, per_expert: bool = False,
    assets: Path | None = None,
) -> Agreement:  # fmt: skip
    """Write config.json and safetensors of a converted model, load them with transformers alone, and compare.

    Args:
        folder: made where it is missing; it gets the checkpoint whole or not at all.
        model: the converted model; left as it is.
        blocks: its latent blocks, by the names of the blocks of the original.
        inputs: what both are compared on.
        per_expert: name the weights as on the hub (`backbone.`, one tensor for each expert); otherwise as transformers
            does, with stacked experts.
        assets: a folder whose tokenizer files the checkpoint gets too.

    Returns:
        How far the reloaded model's first output is from the converted one's.

    Raises:
        LatentizeError: the architecture has no room for something.
        ResourceError: the disk is full.
    """
    config = _native_config(model, {name: block.spec for name, block in blocks.items()})
    native = _native_model(model, config, blocks)
    with replaced(folder, "config.json", _WEIGHTS) as work:
        native.save_pretrained(work, save_original_format=per_expert)
        if assets is not None:
            copy_assets(assets, work)
    return _compare(folder, type(native), model, inputs)


def _config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", "") != MODEL_TYPE or not hasattr(model, "save_pretrained"):
        raise LatentizeError(
            f"--export {MODEL_TYPE}: the model is a {type(model).__name__}, not a NemotronH of transformers; "
            "OUT itself opens with trust_remote_code=True"
        )
    if config.mlp_bias:
        raise LatentizeError(f"--export {MODEL_TYPE}: mlp_bias is set, and the latent projections have no biases")
    return config


def _check_layers(config: Any, converted: int) -> None:
    layers = list(config.layers_block_type).count("moe")
    if layers != converted:
        raise LatentizeError(
            f"--export {MODEL_TYPE}: {layers} layers are MoE and {converted} of them are converted; the "
            "architecture has one latent size for all, so convert all"
        )


def _one_size(sizes: Mapping[tuple[Any, ...], str]) -> None:
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        raise LatentizeError(
            f"--export {MODEL_TYPE}: block {one!r} has {first} and block {other!r} {second}, where the architecture "
            "has one latent size, number of experts, top-k, grouping and scale for all blocks"
        )


def _expressible(name: str, spec: MoESpec) -> None:
    """Raise the LatentizeError that names what a block has and a NemotronH block has not."""
    for what in _beyond(spec):
        raise LatentizeError(f"block {name!r}: it has {what}, which NemotronH cannot express; leave out this export")


def _beyond(spec: MoESpec) -> Iterator[str]:
    r, e = spec.router, spec.experts
    if r.score != "sigmoid" or r.order != "score_first" or r.softcap is not None:
        yield f"a routing by {r.score}"
    if r.bias is not None or r.per_expert_scale is not None:
        yield "a router with biases or scales of its own for each expert"
    if r.selection_bias is not None and r.selection_bias_on != "score":
        yield "a selection bias on logits"
    if r.groups is not None and (r.groups.score, r.groups.fill) != ("top2", "-inf"):
        yield f"groups chosen by their {r.groups.score}"
    if r.normalize not in ("none", "sum") or r.eps > _EPS:
        yield "another normalisation of routing weights"
    if r.applies_to != "output":
        yield "routing weights on the experts' input"
    if e.gate is not None or e.activation.describe(gated=False) != "relu_squared":
        yield f"experts with {e.activation.describe(e.gate is not None)}"
    if any(bias is not None for bias in (e.up_bias, e.down_bias, spec.output_bias)):
        yield "biases in its experts"
    if e.num_identity:
        yield "identity experts"
    if spec.latent is not None and spec.latent.bypass_rank:
        yield "a bypass"


def _native_config(model: nn.Module, specs: Mapping[str, MoESpec]) -> Any:
    config = copy.deepcopy(_config(model))
    _check_layers(config, len(specs))
    for name, spec in specs.items():
        _expressible(name, spec)
    _one_size({(s.latent_dim, s.num_experts, s.top_k, *_rule(s.router)): name for name, s in specs.items()})
    spec = next(iter(specs.values()))
    groups, kept, scale, normalised = _rule(spec.router)
    for field in ("latentize", "auto_map", "latent_dim"):
        vars(config).pop(field, None)
    config.architectures = [_native_class(model).__name__]
    config.moe_latent_size = spec.latent_dim
    config.n_routed_experts, config.num_experts_per_tok = spec.num_experts, spec.top_k
    config.n_group, config.topk_group = groups, kept
    config.routed_scaling_factor, config.norm_topk_prob = scale, normalised
    return config


def _rule(router: RouterSpec) -> tuple[int, int, float, bool]:
    """Groups, groups kept, scale, and whether weights are normalised."""
    groups = router.groups
    return (
        1 if groups is None else groups.count, 1 if groups is None else groups.kept,
        router.scale, router.normalize == "sum",
    )  # fmt: skip


def _native_class(model: nn.Module) -> type:
    """The model's class in transformers, also where the model is a subclass of it."""
    import transformers

    found: type = next(cls for cls in type(model).__mro__ if cls.__module__.startswith(f"{transformers.__name__}."))
    return found


def _native_model(model: nn.Module, config: Any, blocks: Mapping[str, LatentMoE]) -> Any:
    from transformers.initialization import no_init_weights

    with no_init_weights():
        native: Any = _native_class(model)._from_config(config)  # type: ignore[attr-defined]
    places = _places(model, blocks)
    state = {
        name: tensor for name, tensor in model.state_dict().items()
        if not any(name.startswith((f"{place}.gate.", f"{place}.experts.")) for place in places.values())
    }  # fmt: skip
    for name, block in blocks.items():
        state.update(_block_state(places[name], block.spec))
    native.load_state_dict(state, strict=True, assign=True)
    return native.eval()


def _places(model: nn.Module, blocks: Mapping[str, LatentMoE]) -> dict[str, str]:
    """The path of the MoE module that holds each block."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = {name: paths.get(id(block.experts), "") for name, block in blocks.items()}
    for name, path in found.items():
        if not path.endswith(".experts.experts"):
            raise LatentizeError(
                f"--export {MODEL_TYPE}: block {name!r} is not where transformers keeps experts "
                f"({path or 'in a graph'}); leave out this export"
            )
    return {name: path.removesuffix(".experts.experts") for name, path in found.items()}


def _block_state(place: str, spec: MoESpec) -> dict[str, Tensor]:
    assert spec.latent is not None
    bias = spec.router.selection_bias
    state = {
        "gate.weight": spec.router.weight,
        "gate.e_score_correction_bias": spec.router.weight.new_zeros(spec.num_experts) if bias is None else bias,
        "experts.up_proj": spec.experts.up,
        "experts.down_proj": spec.experts.down,
        "fc1_latent_proj.weight": spec.latent.down,
        "fc2_latent_proj.weight": spec.latent.up * spec.output_scale,
    }
    return {f"{place}.{part}": tensor.detach().contiguous() for part, tensor in state.items()}


def _compare(folder: Path, model_class: Any, model: nn.Module, inputs: Inputs) -> Agreement:
    again = model_class.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted, found = inputs.call(model)[0], inputs.call(again)[0]
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    dtypes = {t.dtype for t in model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()}
    return Agreement(error, max(TOLERANCES.get(dtype, 1e-5) for dtype in {wanted.dtype, *dtypes}))  # the coarsest
