"""The steps from a model to its rewritten form, each a function: `latentize.convert` and the command line join them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentize import passes
from latentize.compare import block_errors, main_output
from latentize.errors import LatentizeError, first_line
from latentize.forecast import Forecast
from latentize.initialise import initialise, token_weights
from latentize.inputs import Batch, Inputs, observing
from latentize.memory import trim
from latentize.moe import LatentMoE
from latentize.passes.find_shared import find_shared
from latentize.passes.shared_expert import SharedExpert
from latentize.plan import BlockPlan, check_bypass, check_plan, make_plan
from latentize.predict import predict
from latentize.progress import Progress, silent
from latentize.recipe import Recipe
from latentize.refit import Refit, apply, changes, refit
from latentize.reread import Reading, reread
from latentize.sources import out_of_memory
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics, collect
from latentize.taps import BlockCall, tapped

if TYPE_CHECKING:
    from latentize.passes import Found

_log = logging.getLogger(__name__)

#: Calibration tokens of a block that moments are taken over, tokens that are kept, batches that errors are measured on.
MOMENT_TOKENS = 131072
SAMPLE_TOKENS = 32768
ERROR_BATCHES = 4

#: Groups of blocks that are initialised one after the other, each on what the ones before it make it read.
STAGES = 8


@dataclass(frozen=True)
class Survey:
    """What a model holds: every place that looks like an MoE, those to rewrite, and why other MoEs are left alone.

    `warnings` is what the rewritten model will not do any more, beside computing.
    """

    found: tuple[Found, ...]
    selected: tuple[Found, ...]
    left: Mapping[str, str]
    warnings: tuple[str, ...] = ()

    @property
    def selected_specs(self) -> dict[str, MoESpec]:
        """What the blocks to rewrite compute."""
        return {item.block.name: spec_of(item) for item in self.selected}


@dataclass(frozen=True)
class Rewritten:
    """A model and the `LatentMoE` blocks inside it, by the names of the original ones; and refitted shared experts.

    `copies` are parameters outside the blocks that were copied, each with its copy: all of them, or none where the
    model shares them with the original (`latentize.apart`).
    """

    model: nn.Module
    blocks: Mapping[str, LatentMoE]
    refits: Mapping[str, Refit] = field(default_factory=dict)
    copies: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def specs(self) -> dict[str, MoESpec]:
        """The blocks' specs, with their tensors as they are now."""
        return {name: block.spec for name, block in self.blocks.items()}


def survey(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], recipe: Recipe) -> Survey:
    """Find every block, and select the proved ones that the recipe's patterns name.

    Raises:
        LatentizeError: a selected block could not be proved because its weights are not there, or the model's own
            output depends on how many experts there are, and that is to change.
    """
    found = find(model, args, kwargs)
    selected, left = [], {}
    for item in found:
        block = item.block
        if block.status != "moe":
            continue
        if not any(fnmatchcase(block.name, pattern) for pattern in recipe.include):
            left[block.name] = f"no include pattern of the recipe names it ({', '.join(recipe.include)})"
        elif any(fnmatchcase(block.name, pattern) for pattern in recipe.exclude):
            left[block.name] = "an exclude pattern of the recipe names it"
        elif block.max_error is None:
            raise LatentizeError(
                f"block {block.name!r}: only its structure was looked at, since its weights are on the meta device, "
                "so nothing is proved; load the weights, then convert"
            )
        else:
            selected.append(item)
    return Survey(tuple(found), tuple(selected), left, _lost(model, args, kwargs, selected, recipe))


def _lost(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], selected: Sequence[Found], recipe: Recipe
) -> tuple[str, ...]:
    """What the code in and around the selected blocks does that it will not do any more, or not in the same sense.

    Raises:
        LatentizeError: the model's output depends on how many experts there are, and that is to change.
    """
    if not selected:
        return ()
    try:
        with workspace(), observing(model):
            lines, wrong = passes.find_lost(model, args, kwargs, selected, grows=_grows(selected, recipe))
    except LatentizeError:
        raise
    except Exception as error:  # it looks at whatever objects a model holds; the blocks are proved without it
        _log.debug("looking at what is around the blocks failed", exc_info=True)
        return (f"what the code around the blocks counts, or does in training mode, was not seen: {first_line(error)}",)
    if wrong:
        raise LatentizeError(
            f"{wrong} depends on how many experts there are, by code around the blocks, and the recipe changes that: "
            "try variant: fixed, or exclude the blocks"
        )
    return tuple(lines)


def _grows(selected: Sequence[Found], recipe: Recipe) -> bool:
    """Whether some block will have more experts, or select more."""
    if recipe.auto:
        given = recipe.experts_factor or 1, recipe.topk_factor or 1
        return recipe.variant != "fixed" or given != (1, 1)
    return any(recipe.factors_for(spec_of(item).hidden_size) != (1, 1) for item in selected)


def find(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Found]:
    """Every place of a model that looks like an MoE; the model, its modes and the random states are left as found."""
    with workspace(), observing(model):
        return list(passes.find_blocks(model, args, kwargs))


def canonical(model: nn.Module, selected: Sequence[Found]) -> Rewritten:
    """The model with the selected blocks in canonical form: exact, and sharing every weight with the original."""
    blocks = {item.block.name: LatentMoE(spec_of(item)) for item in selected}
    return Rewritten(passes.replace_blocks(model, selected, blocks), blocks)


def rewrite(
    model: nn.Module, selected: Sequence[Found], specs: Mapping[str, MoESpec], refits: Mapping[str, Refit] | None = None
) -> Rewritten:
    """The model with each selected block replaced by `specs` of its name, and with its shared experts as refitted.

    What the model and the specs share is copied, so that training the new blocks leaves the model as it is.
    """
    taken = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if tensor.untyped_storage().data_ptr() in taken else tensor.detach()

    blocks = {}
    for item in selected:
        blocks[item.block.name] = LatentMoE(specs[item.block.name].map_tensors(own))
    student = passes.replace_blocks(model, selected, blocks)
    apply(student, changes(model, refits or {}))
    return Rewritten(student, blocks, refits or {})


def check_comparable(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the model once on the example inputs: what it returns must be something that two models can be compared by.

    Raises:
        LatentizeError: its output holds no floating-point tensor.
    """
    with observing(model):
        output = Inputs(args, kwargs).call(model)
    try:
        main_output(output)
    except LatentizeError:
        what = f"a {output.dtype} tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise LatentizeError(
            f"the model returns {what.replace('torch.', '')}, in which there is no floating-point tensor with an axis: "
            "the rewritten model could not be healed or compared with it; return hidden states or logits"
        ) from None


def check_rewritten(student: Rewritten, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run the rewritten model once on the example inputs: code around its blocks may count on their numbers.

    Raises:
        LatentizeError: it fails.
    """
    try:
        with observing(student.model):
            Inputs(args, kwargs).call(student.model)
    except Exception as error:
        if isinstance(error, LatentizeError) or out_of_memory(error):
            raise
        raise LatentizeError(
            f"rewritten, the model does not run on its example inputs: {first_line(error)}; the code around a block "
            "seems to count on its number of experts or their width: try variant: fixed, or exclude the block"
        ) from error


def spec_of(found: Found) -> MoESpec:
    """The spec of a block that was lifted."""
    assert found.block.spec is not None
    return found.block.spec


@contextmanager
def workspace() -> Iterator[None]:
    """No gradients and no inference mode, whatever the caller's: tensors made here can be trained later."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@dataclass(frozen=True)
class Prepared:
    """What is known before the first latent weight exists: the exact teacher, what data says of it, and the plan.

    `model`, `selected` and `batches` are what it was prepared from; `warnings` is what the data left open,
    and `tokens` how many calibration tokens the statistics of a block are over at most.
    """

    model: nn.Module
    selected: Sequence[Found]
    batches: Sequence[Batch]
    teacher: Rewritten
    statistics: Mapping[str, BlockStatistics] | None
    plans: Mapping[str, BlockPlan]
    forecast: Forecast = field(default_factory=lambda: Forecast({}))
    warnings: tuple[str, ...] = ()
    tokens: int = 0

    def after_start(self) -> Prepared:
        """The same without the statistics, which take memory and which nothing asks for once the blocks are started."""
        return replace(self, statistics=None)


def prepare(
    model: nn.Module,
    selected: Sequence[Found],
    recipe: Recipe,
    batches: Sequence[Batch],
    *,
    statistics: Mapping[str, BlockStatistics] | None = None,
    sweep: bool = False,
    progress: Progress = silent,
) -> Prepared:
    """Collect the statistics that the recipe asks for, unless they are given, try the widths, and make the plan.

    With `sweep` predictions cover all widths, not just what the recipe asks for.

    Raises:
        LatentizeError: the model rejects a batch, or the recipe does not fit a block.
    """
    teacher = canonical(model, selected)
    specs = teacher.specs
    check_plan(specs, recipe)
    if statistics is None and batches and recipe.init == "activation":
        statistics = measure(teacher, recipe, batches, progress)
    said = (statistics or {}).values()
    bare = Prepared(
        model, selected, batches, teacher, statistics, {},
        warnings=tuple(line for block in said for line in block.warnings),
        tokens=max((block.tokens for block in said), default=0),
    )  # fmt: skip
    seen = predict(bare, recipe, sweep=sweep, progress=progress)
    plans = make_plan(specs, recipe, statistics, seen)
    for name, plan in plans.items():
        check_bypass(specs[name], plan, (statistics or {}).get(name))
    return replace(bare, plans=plans, forecast=seen)


def measure(
    teacher: Rewritten, recipe: Recipe, batches: Sequence[Batch], progress: Progress = silent
) -> dict[str, BlockStatistics]:
    """What the batches say about every block; of many batches, evenly spaced ones that add up to `MOMENT_TOKENS`.

    Raises:
        LatentizeError: the model rejects a batch, or its activations are never finite.
    """
    used = _measured(teacher, batches)
    trim()  # what proving blocks left behind
    return collect(teacher.model, teacher.blocks, used, max_tokens=SAMPLE_TOKENS, seed=recipe.seed, progress=progress)


def _measured(teacher: Rewritten, batches: Sequence[Batch]) -> Sequence[Batch]:
    """Evenly spaced batches that add up to about `MOMENT_TOKENS`."""
    counts: Counter[str] = Counter()

    def count(name: str, call: BlockCall) -> None:
        counts[name] += len(call.inputs[0])

    with observing(teacher.model), tapped(teacher.blocks, count):
        Inputs.of(batches[0]).call(teacher.model)
    tokens = max(counts.values(), default=1)
    return batches[:: max(1, len(batches) * tokens // MOMENT_TOKENS)]


@dataclass(frozen=True)
class Start:
    """The latent spec of every block to start from, and what became of its shared expert, by name."""

    specs: Mapping[str, MoESpec]
    refits: Mapping[str, Refit] = field(default_factory=dict)


def start(prepared: Prepared, recipe: Recipe, progress: Progress = silent) -> dict[str, MoESpec]:
    """The latent specs of `begin`."""
    return dict(begin(prepared, recipe, progress).specs)


def begin(prepared: Prepared, recipe: Recipe, progress: Progress = silent) -> Start:
    """The latent spec of every block, computed from the original's weights and the statistics.

    Blocks are computed in the order in which the model runs them, up to `STAGES` groups of them one after the other:
    what a group reads is measured with all earlier groups latent, so that it can make up for what they lose; and where
    the recipe says so, with their shared experts refitted, which is done for each group once it is latent. Where
    healing follows and nothing is refitted, all are computed at once, on what the original reads: measured, that heals
    better.
    The recipe's dtype is that of experts and projections; routers keep theirs, since rounding changes who is chosen.
    """
    specs: dict[str, MoESpec] = {}
    refits: dict[str, Refit] = {}
    found = shared_experts(prepared, recipe)
    for stage in _stages(prepared, at_once=recipe.heal_steps != 0 and not found):
        readings = _readings(prepared, specs, refits, stage)
        for name in stage:
            progress(len(specs), len(prepared.plans), name)
            statistics = None if prepared.statistics is None else prepared.statistics[name]
            trim()
            spec = initialise(
                prepared.teacher.blocks[name].spec, prepared.plans[name], statistics,
                reading=readings.get(name), seed=recipe.seed,
            )  # fmt: skip
            specs[name] = in_dtype(spec, recipe)
        refits |= _refit(prepared, specs, refits, {name: found[name] for name in stage if name in found})
    trim()
    progress(len(prepared.plans), len(prepared.plans))
    names = list(prepared.plans)
    return Start({n: specs[n] for n in names}, {n: refits[n] for n in names if n in refits})


def shared_experts(prepared: Prepared, recipe: Recipe) -> dict[str, SharedExpert | str]:
    """The shared experts that the recipe wants refitted, or why one is not, by block; nothing where it wants none."""
    if not recipe.refit_shared:
        return {}
    if prepared.statistics is None:
        why = "its shared expert is not refitted: that takes calibration data" + (
            " and init: activation" if prepared.batches else ""
        )
        return dict.fromkeys(prepared.plans, why)
    found = find_shared(prepared.model, prepared.teacher.model, prepared.teacher.blocks, prepared.batches)
    same = "its shared expert is not refitted: its experts keep their width, so that nothing was lost"
    return {
        name: same if prepared.plans[name].latent_dim == prepared.plans[name].hidden_size else expert
        for name, expert in found.items()
    }


def _refit(
    prepared: Prepared, specs: Mapping[str, MoESpec], refits: Mapping[str, Refit],
    found: Mapping[str, SharedExpert | str],
) -> dict[str, Refit]:  # fmt: skip
    """The shared experts of some blocks refitted, in the model in which these and those before them are latent."""
    made = {name: Refit(reason=why) for name, why in found.items() if isinstance(why, str)}
    experts = {name: expert for name, expert in found.items() if isinstance(expert, SharedExpert)}
    if not experts or prepared.statistics is None:
        return made
    samples = {name: prepared.statistics[name].sample for name in experts}
    return made | refit(
        prepared.model, prepared.teacher.model, _latent_so_far(prepared, specs, refits)[0], experts,
        _measured(prepared.teacher, prepared.batches), samples,
        {name: token_weights(sample) for name, sample in samples.items()},
    )  # fmt: skip


def _stages(prepared: Prepared, *, at_once: bool) -> list[list[str]]:
    """The blocks' names in the order in which the model runs them, in at most `STAGES` groups of about equal size."""
    names = list(prepared.plans)
    if prepared.statistics is None or at_once:
        return [names]
    order: dict[str, None] = {}
    with observing(prepared.teacher.model), tapped(prepared.teacher.blocks, lambda name, _: order.setdefault(name)):
        Inputs.of(prepared.batches[0]).call(prepared.teacher.model)
    names = [*order, *(name for name in names if name not in order)]
    count = min(STAGES, len(names))
    return [names[len(names) * i // count : len(names) * (i + 1) // count] for i in range(count)]


def _readings(
    prepared: Prepared, specs: Mapping[str, MoESpec], refits: Mapping[str, Refit], names: Sequence[str]
) -> dict[str, Reading]:
    """What the blocks `names` read once those of `specs` are latent; nothing where none is."""
    if not specs or prepared.statistics is None:
        return {}
    model, blocks = _latent_so_far(prepared, specs, refits)
    samples = {name: statistics.sample for name, statistics in prepared.statistics.items()}
    return reread(model, {name: blocks[name] for name in names}, _measured(prepared.teacher, prepared.batches), samples)


def _latent_so_far(
    prepared: Prepared, specs: Mapping[str, MoESpec], refits: Mapping[str, Refit]
) -> tuple[nn.Module, dict[str, LatentMoE]]:
    """The model in which the blocks of `specs` are latent, and all of its blocks."""
    blocks = {name: LatentMoE(specs.get(name, block.spec)) for name, block in prepared.teacher.blocks.items()}
    model = passes.replace_blocks(prepared.model, prepared.selected, blocks)
    apply(model, changes(prepared.model, refits))
    return model, blocks


def in_dtype(spec: MoESpec, recipe: Recipe) -> MoESpec:
    """The spec with experts and projections in the recipe's dtype, where it names one."""
    return spec if recipe.dtype is None else replace(spec.to(getattr(torch, recipe.dtype)), router=spec.router)


def measure_errors(teacher: Rewritten, student: Rewritten, batches: Sequence[Batch]) -> dict[str, float]:
    """Relative error of each new block on the original's own inputs, over some of the batches."""
    trim()  # the statistics that the start needed
    return block_errors(teacher.blocks, student.blocks, teacher.model, batches[:ERROR_BATCHES])
