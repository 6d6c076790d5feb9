"""What a run found, put into the report: records of blocks, model, stages and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor, nn

from latentize import __version__, api, conversion, report, store, terminal
from latentize.blocks import Block
from latentize.conversion import Prepared
from latentize.errors import MissingExtraError
from latentize.outlook import Outlook
from latentize.plan import BlockPlan
from latentize.recipe import Recipe
from latentize.refit import Refit
from latentize.report import BlockRecord, Calibration, Environment, File, Model, Plan, Report, SharedExpert, Stage
from latentize.run_build import describe
from latentize.run_onnx import ORIGINAL, REWRITTEN
from latentize.spec import MoESpec

if TYPE_CHECKING:
    from latentize.api import Result
    from latentize.run import Job, Measured, Options

_FORMS = {"file": "model.py", "hf": "huggingface", "pt2": "pt2", "module": "python"}
_FILES = {
    "latentize.json": "what rebuilds the model", "README.md": "model card",
    "modeling_latent.py": "rebuilds the model in transformers alone", report.JSON_NAME: "this run, as data",
    report.HTML_NAME: "this run, as a page", REWRITTEN: "the rewritten model as an ONNX graph",
    "nemotron_h/": "checkpoint that NemotronH loads unchanged",
    "nemotron_h-hub/": "the same with its weights named as on the hub",
    ORIGINAL: "the original as an ONNX graph, to compare with", "config.json": "transformers configuration",
}  # fmt: skip
#: What other files are, by their ending.
_KINDS = {".safetensors": "weights", ".engine": "TensorRT engine of the rewritten model", ".data": "weights of a graph"}

#: How often the checkpoints of healing hold what it trains: weights, the best ones, and the optimiser's state.
_HEALED = 5


def plans(prepared: Prepared, specs: Mapping[str, MoESpec] | None = None) -> dict[str, Plan]:
    """The plan of every block as the report has it; stored bytes are exact where the new `specs` are known."""
    found = {}
    for name, plan in prepared.plans.items():
        before = _bytes(prepared.teacher.blocks[name].spec)
        after = _bytes(specs[name]) if specs is not None else _stored_after(plan)
        found[name] = _plan(plan, before, after)
    return found


def spent(prepared: Prepared, recipe: Recipe) -> str:
    """What the budget of `compression: auto` bought, in one line; empty without one."""
    if recipe.budget is None:
        return ""
    plans = prepared.plans.values()
    expert_bytes = sum(p.expert_bytes_after for p in plans) / sum(p.expert_bytes_before for p in plans)
    flops = sum(p.flops_after for p in plans) / sum(p.flops_before for p in plans)
    losses = [plan.predicted_loss for plan in plans]
    known = [loss for loss in losses if loss is not None]
    loss = f"{sum(known):.4g}" if len(known) == len(losses) else "unknown"
    what, limit = recipe.budget.limit
    return (
        f"Budget {what} {limit:g}: {100 * expert_bytes:.1f} % of the original's expert bytes for one token and "
        f"{100 * flops:.1f} % of its routed FLOPs, predicted loss {loss}"
    )


def shared_experts(prepared: Prepared, recipe: Recipe) -> Iterator[str]:
    """What the recipe will have refitted beside the blocks, and what that costs; or why nothing, a line for each."""
    for name, found in conversion.shared_experts(prepared, recipe).items():
        if isinstance(found, str):
            yield f"{name}: {found}"
        else:
            names = " and ".join(filter(None, (found.weight, found.bias)))
            yield f"{name}: would refit {names} where held-out tokens gain, 0 bytes added"


def estimated_bytes(model: nn.Module, prepared: Prepared, options: Options) -> int:
    """Bytes that a run will write, about: the model, its graphs, and the checkpoints on the way."""
    whole = _state_bytes(model)
    blocks = sum(_bytes(block.spec) for block in prepared.teacher.blocks.values())
    new = sum(_stored_after(plan) for plan in prepared.plans.values())
    after = whole - blocks + new
    graphs = (whole + after) if options.graphs else 0
    outside = _HEALED * (whole - blocks) if options.recipe.heal_train == "all" and options.recipe.heal_steps != 0 else 0
    return (1 + len(options.checkpoints)) * after + graphs + 4 * new + outside + 2**20


def write(job: Job, result: Result, prepared: Prepared, measured: Measured, folder: Path) -> Report:
    """Assemble the report of a run and write it into `folder`; without the packages for the page only its data."""
    options = job.options
    warnings = [*job.warnings, *(line for plan in prepared.plans.values() for line in plan.warnings), *result.warnings]
    made = Report(
        tool_version=__version__,
        model=_model(job, result),
        environment=Environment.here(),
        recipe=options.recipe.model_dump(mode="json"),
        blocks=tuple(_records(result, prepared, measured)),
        calibration=_calibration(job, prepared, result),
        evaluation=measured.evaluation,
        outputs=measured.outputs,
        latency=measured.latency,
        onnx=measured.onnx,
        gates=measured.gates,
        stages=tuple(Stage(step.name, step.seconds, step.peak_bytes) for step in job.steps.records),
        warnings=tuple(dict.fromkeys(warnings)),
        files=tuple(_files(folder)),
        engines=tuple(job.engines),
        forms=tuple(job.forms),
    )
    try:
        report.write(made, folder)
    except MissingExtraError as error:
        files = tuple(file for file in made.files if file.path != report.HTML_NAME)
        made = replace(made, warnings=(*made.warnings, str(error)), files=files)
        report.write_data(made, folder)
    return made


def show(console: Console, made: Report, out: Path) -> None:
    """Print a report's findings; the plan was printed before."""
    terminal.print_errors(console, made.blocks)
    terminal.print_shared_experts(console, made.blocks)
    terminal.print_evaluation(console, made.evaluation, made.outputs)
    if made.latency:
        terminal.print_latency(console, made.latency)
    terminal.print_forms(console, made.forms)
    for engine in made.engines:
        console.print(terminal.plain(describe(engine)))
    if made.onnx:
        terminal.print_onnx(console, made.onnx)
    terminal.print_end(console, made.gates, made.warnings, made.files, str(out))


def block_json(block: Block, outlook: Outlook | None = None) -> dict[str, Any]:
    """A block as JSON: sizes and evidence, without its tensors; and what widths are predicted to cost it."""
    record = store.encode(BlockRecord.of(block), lambda _path, tensor: list(tensor.shape))
    names = ("name", "status", "reason", "computes", "sizes", "max_error", "evidence")
    found = {name: record[name] for name in names}
    for row in outlook.rows if outlook is not None else ():
        if row.name == block.name and outlook is not None:
            curve = row.curve
            found["predicted"] = {
                "effective_rank": row.effective_rank, "latent_dims": curve.latent_dims, "errors": curve.errors,
                "losses": curve.losses, "loss": outlook.loss, "knee": outlook.knee,
            }  # fmt: skip
    return found


def _plan(plan: BlockPlan, stored_before: int, stored_after: int) -> Plan:
    return Plan(
        hidden_size=plan.hidden_size,
        latent_dim=plan.latent_dim,
        num_experts_before=plan.num_experts,
        num_experts_after=plan.new_num_experts,
        top_k_before=plan.top_k,
        top_k_after=plan.new_top_k,
        weight_bytes_before=plan.expert_bytes_before,
        weight_bytes_after=plan.expert_bytes_after + plan.projection_bytes + plan.bypass_bytes,
        dispatch_bytes_before=plan.dispatched_bytes_before,
        dispatch_bytes_after=plan.dispatched_bytes_after,
        stored_bytes_before=stored_before,
        stored_bytes_after=stored_after,
        flops_before=plan.flops_before,
        flops_after=plan.flops_after,
        predicted_error=plan.predicted_error,
        predicted_loss=plan.predicted_loss,
        spectrum=plan.spectrum,
        projection_bytes=plan.projection_bytes,
        bypass_rank=plan.bypass_rank,
        bypass_bytes=plan.bypass_bytes,
        error_without_bypass=plan.error_without_bypass,
    )


def _records(result: Result, prepared: Prepared, measured: Measured) -> Iterator[BlockRecord]:
    made = plans(prepared, {name: block.spec for name, block in result.rewritten.items()})
    for block in result.blocks:
        if block.name not in made:
            reason = {"reason": result.left[block.name]} if block.name in result.left else {}
            yield BlockRecord.of(block, **reason)
            continue
        before, after = measured.loads.get(block.name, (None, None))
        refit = result.refits.get(block.name)
        yield BlockRecord.of(
            block, plan=made[block.name], errors=result.errors[block.name], load_before=before, load_after=after,
            shared_expert=None if refit is None else _shared_expert(refit),
        )  # fmt: skip


def _shared_expert(refit: Refit) -> SharedExpert:
    return SharedExpert(
        tuple(refit.tensors), refit.reason, refit.gated, refit.held_out, refit.error_before, refit.error_after,
        refit.bytes_added,
    )  # fmt: skip


def _model(job: Job, result: Result) -> Model:
    source = job.source
    return Model(
        form=_FORMS[source.form],
        name=job.options.model,
        class_name=type(source.model).__name__,
        parameters_before=sum(p.numel() for p in source.model.parameters()),
        parameters_after=sum(p.numel() for p in result.model.parameters()),
        bytes_before=_state_bytes(source.model),
        bytes_after=_state_bytes(result.model),
    )


def _calibration(job: Job, prepared: Prepared, result: Result) -> Calibration | None:
    if not job.batches:
        return None
    steps = api.heal_plan(job.options.recipe, result.refits).steps
    outside = 0 if result.healing is None else result.healing.outside
    return Calibration(len(job.batches), prepared.tokens, steps, outside)


def _files(folder: Path) -> Iterator[File]:
    present = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    for inner in (entry for entry in folder.iterdir() if entry.is_dir()):
        present[f"{inner.name}/"] = sum(file.stat().st_size for file in inner.rglob("*") if file.is_file())
    for name in (report.JSON_NAME, report.HTML_NAME):
        present.setdefault(name, 0)
    for name, size in sorted(present.items()):
        what = _FILES.get(name) or _KINDS.get(Path(name).suffix, "part of the model")
        yield File(name, what, size or None)


def _bytes(spec: MoESpec) -> int:
    return sum(tensor.nbytes for tensor in spec.tensors().values())


def _stored_after(plan: BlockPlan) -> int:
    """Bytes of a block's experts, projections and bypass once it is rewritten."""
    experts = plan.new_num_experts * plan.expert_bytes_after // plan.new_top_k
    return experts + plan.projection_bytes + plan.bypass_bytes


def _state_bytes(model: nn.Module) -> int:
    seen: dict[int, int] = {}
    for tensor in model.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            seen[tensor.untyped_storage().data_ptr()] = tensor.nbytes
    return sum(seen.values())
