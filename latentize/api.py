"""The Python interface: `inspect` says what a model holds, `convert` rewrites it, `Result.save` keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from latentize import artefact, card, conversion, passes, pretrained, refit
from latentize.apart import apart, write_back
from latentize.artefact import Origin, SavedBlock
from latentize.blocks import Block
from latentize.calibration import Taken, batches_of, example_batch
from latentize.conversion import Prepared, Rewritten, Survey
from latentize.errors import LatentizeError
from latentize.heal import HealPlan, HealReport, heal
from latentize.inputs import Batch, buffers_kept
from latentize.moe import LatentMoE
from latentize.plan import BlockPlan
from latentize.recipe import Recipe
from latentize.refit import Refit
from latentize.report import Errors
from latentize.sources import check_finite
from latentize.staging import staged

if TYPE_CHECKING:
    from latentize.passes import Found


@dataclass
class Result:
    """What `convert` gives.

    `model` is the rewritten model (the model as it was when nothing was rewritten); `blocks` describes the model as it
    came in. `plan`, `errors` and `rewritten` are by block name, for the blocks that were rewritten; `healing` is None
    when nothing was healed; `left` says why proved blocks were left alone; `warnings` says what else to know. `refits`,
    by block name, says what became of shared experts where the recipe wants them refitted: besides the blocks, the
    parameters that `Refit.tensors` names are all that differs from the original.
    """

    model: nn.Module
    blocks: list[Block]
    recipe: Recipe
    plan: Mapping[str, BlockPlan] = field(default_factory=dict)
    errors: Mapping[str, Errors] = field(default_factory=dict)
    healing: HealReport | None = None
    left: Mapping[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rewritten: Mapping[str, LatentMoE] = field(default_factory=dict, repr=False)
    refits: Mapping[str, Refit] = field(default_factory=dict, repr=False)
    _found: Sequence[Found] = field(default=(), repr=False)
    _origin: Origin | None = field(default=None, repr=False)

    def save(self, out: str | Path) -> None:
        """Write the converted model to the folder `out`, whole or not at all; `latentize.load(out)` reads it.

        Raises:
            LatentizeError: `out` holds something else, or a tensor is missing, unexpected or not finite.
            ResourceError: the disk is full.
        """
        with staged(Path(out)) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the converted model and its model card into `folder`, which exists.

        Raises:
            LatentizeError: a tensor is missing, unexpected or not finite.
        """
        origin = self._origin if self._origin is not None else Origin.of(self.model)
        sites = _sites(self._found)
        blocks = {name: SavedBlock(sites[name], module.spec) for name, module in self.rewritten.items()}
        support = artefact.write(folder, self.model, origin, blocks, self.recipe.model_dump(mode="json"))
        (folder / "README.md").write_text(card.model_card(self, origin, support), encoding="utf-8")


def inspect(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> list[Block]:
    """Every place of a model that is, or nearly is, a Mixture of Experts, in the model's order.

    Nothing changes: weights, buffers, modes, hooks and random states stay as they are.

    Args:
        model: any module.
        args, kwargs: example inputs of its forward.

    Returns:
        Blocks with status "moe" (proved, with the largest relative error over all probes), "latent" or "refused" (with
        the reason). A model without any gives an empty list.
    """
    return [found.block for found in conversion.find(model, _tuple(args), dict(kwargs or {}))]


def convert(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    inplace: bool = False,
) -> Result:
    """Rewrite every proved MoE block of a model into LatentMoE.

    Args:
        model: any module. It is left unchanged, and the result shares what is not rewritten with it; nothing where
            healing trains everything (`heal_train` "all").
        args, kwargs: example inputs of its forward.
        recipe: what to do; `Recipe()` when None.
        calibration: an iterable, possibly one-shot, of inputs: tuples (args) or dicts (kwargs). Without it the weights
            decide alone and nothing is healed. Of a generator no more is taken than there is use for, and a warning
            says how much.
        inplace: replace the blocks in the model itself. Where healing trains everything, the model's own parameters get
            the trained values in the end, once nothing can fail any more.

    Raises:
        LatentizeError: the recipe does not fit a block, a block is on the meta device, weights are not finite, the
            model rejects the calibration data, its output cannot be compared though it is to be healed, or depends on
            how many experts there are and that is to change.
        ResourceError: out of memory.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise LatentizeError(f"recipe: expected a latentize.Recipe, found a {type(recipe).__name__}; give Recipe(...)")
    args, kwargs = _tuple(args), dict(kwargs or {})
    origin = Origin.of(model)
    survey = conversion.survey(model, args, kwargs, recipe)
    check_finite(model)
    if not survey.selected:
        return unchanged(model, survey, recipe, origin)
    if calibration is not None and recipe.heal_steps != 0:
        conversion.check_comparable(model, args, kwargs)
    with conversion.workspace(), buffers_kept(model):
        batches = batches_of(calibration, model, recipe.heal_steps)
        prepared = conversion.prepare(model, survey.selected, recipe, batches)
        started = conversion.begin(prepared, recipe)
        student = conversion.rewrite(model, survey.selected, started.specs, started.refits)
        conversion.check_rewritten(student, args, kwargs)
        student = separate(student, batches, recipe)
        prepared = prepared.after_start()
        initialised = conversion.measure_errors(
            prepared.teacher, student, batches or [example_batch(model, args, kwargs)]
        )
        healing = heal_student(student, prepared.teacher, batches, recipe)
        return finish(model, survey, prepared, student, initialised, healing, recipe, origin, inplace=inplace)


def _tuple(args: Any) -> tuple[Any, ...]:
    """Positional arguments as given, where they are a tuple or list.

    Raises:
        LatentizeError: they are something else, such as a tensor by itself.
    """
    if not isinstance(args, (tuple, list)):
        raise LatentizeError(f"args: expected a tuple of arguments, found a {type(args).__name__}; give (x,)")
    return tuple(args)


def load(out: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The converted model in a folder that latentize wrote, in evaluation mode.

    Where it is a transformers model, its `save_pretrained` writes such a folder again.

    Args:
        out: the folder.
        model: a freshly built original, for models that cannot be rebuilt from the folder; it is used up.

    Raises:
        LatentizeError: the folder is not ours or is damaged, or the original's structure is needed and not given.
    """
    manifest = artefact.read_manifest(Path(out))
    converted, blocks = artefact.load_blocks(manifest, model)
    sites = {name: block.site for name, block in manifest.blocks.items()}
    pretrained.attach(converted, manifest.origin, sites, blocks, manifest.recipe)
    return converted


def separate(student: Rewritten, batches: Sequence[Batch], recipe: Recipe) -> Rewritten:
    """The student, apart from its original where healing will train everything.

    Raises:
        ResourceError: out of memory.
    """
    if recipe.heal_train == "latent" or not batches or recipe.heal_steps == 0:
        return student
    return apart(student)


def heal_student(
    student: Rewritten, teacher: Rewritten, batches: Sequence[Batch], recipe: Recipe, **options: Any
) -> HealReport | None:
    """Heal the student in place; None where there is no data or the recipe asks for no steps.

    Args:
        student, teacher: the rewritten model, as `separate` gives it, and the exact original.
        batches: calibration data.
        recipe: says how many steps.
        options: `progress` and `checkpoint` of `latentize.heal.heal`.
    """
    if not batches or recipe.heal_steps == 0:
        return None
    steps = heal_plan(recipe, student.refits)
    return heal(
        student.model, teacher.model, student.blocks, teacher.blocks, batches, steps=steps, seed=recipe.seed, **options
    )


def heal_plan(recipe: Recipe, refits: Mapping[str, Refit]) -> HealPlan:
    """How long to heal. Beside a refitted shared expert a block's routed output is no goal by itself any more."""
    steps = HealPlan.chosen(recipe.heal_steps, recipe.heal_train)
    return replace(steps, block_steps=0) if any(made.kept for made in refits.values()) else steps


def finish(
    model: nn.Module,
    survey: Survey,
    prepared: Prepared,
    student: Rewritten,
    initialised: Mapping[str, float],
    healing: HealReport | None,
    recipe: Recipe,
    origin: Origin,
    *,
    inplace: bool = False,
) -> Result:
    """Put the result together; with `inplace` the blocks move into `model` itself, now that nothing can fail."""
    final = student.model
    if inplace:
        changed = refit.changes(model, student.refits)
        final = passes.replace_blocks(model, survey.selected, student.blocks, inplace=True)
        refit.apply(final, changed)
        write_back(student.copies)
    for block in student.blocks.values():
        block.train(model.training)
    pretrained.attach(final, origin, _sites(survey.selected), student.blocks, recipe.model_dump(mode="json"))
    errors = {}
    for name, error in initialised.items():
        if healing is None:
            errors[name] = Errors(error)
        else:
            healed = healing.blocks[name]
            errors[name] = Errors(healed.error_before, healed.error_after_blocks, healed.error_after)
    return Result(
        model=final,
        blocks=[found.block for found in survey.found],
        recipe=recipe,
        plan=prepared.plans,
        errors=errors,
        healing=healing,
        left=survey.left,
        warnings=[
            *_training(model), *survey.warnings, *prepared.warnings, *_unhealed(prepared, healing, recipe),
            *(f"{name}: {made.describe()}" for name, made in student.refits.items() if not made.kept),
        ],
        rewritten=student.blocks,
        refits=student.refits,
        _found=survey.selected,
        _origin=origin,
    )


def unchanged(model: nn.Module, survey: Survey, recipe: Recipe, origin: Origin) -> Result:
    """The result of a conversion that found nothing to rewrite."""
    blocks = [found.block for found in survey.found]
    return Result(model, blocks, recipe, left=survey.left, warnings=["nothing was rewritten"], _origin=origin)


def _sites(found: Sequence[Found]) -> dict[str, Mapping[str, Any]]:
    return {each.block.name: passes.site_to_json(each) for each in found}


def _training(model: nn.Module) -> list[str]:
    if not any(module.training for module in model.modules()):
        return []
    return ["the model is in training mode: it was read, measured and healed in evaluation mode, and left as it was"]


def _unhealed(prepared: Prepared, healing: HealReport | None, recipe: Recipe) -> list[str]:
    notes = [prepared.batches.note] if isinstance(prepared.batches, Taken) else []
    if not prepared.batches and recipe.init == "activation":
        notes.append("no calibration data: the start was computed from the weights alone")
    if healing is not None:
        notes.extend(healing.notes)
        if healing.outside:
            notes.append(
                f"healing trained {healing.outside:,} parameters outside the rewritten blocks too (heal_train: all): "
                "they are no longer the original's"
            )
        elif recipe.heal_train == "all":
            notes.append("heal_train: all changed nothing outside the rewritten blocks")
    elif recipe.heal_steps != 0:
        notes.append("no calibration data: nothing was healed")
    return notes
