"""The model card: README.md of a converted model, with the recipe that made it and the numbers it reached."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from latentize import __version__

if TYPE_CHECKING:
    from latentize.api import Result
    from latentize.artefact import Origin
    from latentize.remote_code import Support


def model_card(result: Result, origin: Origin, support: Support) -> str:
    """Markdown that says what was converted, how, what it cost, and (`support`) what opens it."""
    recipe = yaml.safe_dump(result.recipe.model_dump(mode="json"), sort_keys=False).strip()
    parts = [
        f"# {origin.class_name}, converted to LatentMoE",
        _summary(result),
        "## Use",
        f"```python\n{_usage(origin, support)}\n```",
        "## Recipe",
        f"```yaml\n{recipe}\n```",
        "## Blocks",
        _blocks(result),
    ]
    healing = result.healing
    if healing is not None:
        parts.append(
            f"Healed for {healing.block_steps} block-wise and {healing.model_steps} end-to-end steps; distance to the "
            f"original's output on held-out batches ({healing.loss_kind}): {healing.loss_before:.4g} before, "
            f"{healing.loss_after:.4g} after."
        )
    if result.warnings:
        parts += ["## Notes", "\n".join(f"- {line}" for line in result.warnings)]
    return "\n\n".join(parts) + "\n"


def _summary(result: Result) -> str:
    ranks = sorted({plan.bypass_rank for plan in result.plan.values() if plan.bypass_rank})
    bypass = f" A linear map of rank {ranks[0]} goes around the experts of each of them." if ranks else ""
    outside = 0 if result.healing is None else result.healing.outside
    rest = "everything outside those blocks is as it was"
    if outside:
        rest = f"healing also trained {outside:,} parameters outside those blocks"
    return (
        f"Made by latentize {__version__}. The routed experts of {len(result.rewritten)} blocks work at a latent "
        f"width; {rest}{_but_refitted(result)}.{bypass}"
    )


def _but_refitted(result: Result) -> str:
    names = [f"`{name}`" for refit in result.refits.values() for name in refit.tensors]
    return f", save shared experts that were refitted: {', '.join(names)}" if names else ""


def _usage(origin: Origin, support: Support) -> str:
    if origin.config is None and origin.form == "module":
        return 'import latentize\n\nmodel = latentize.load(".", model=build_the_original())'
    usage = 'import latentize\n\nmodel = latentize.load(".")'
    if support.auto:
        name = support.auto[0]
        usage += (
            f"\n\n# or, where latentize is not installed:\nfrom transformers import {name}\n\n"
            f'model = {name}.from_pretrained(".", trust_remote_code=True)'
        )
    elif support.reason:
        usage += f"\n# transformers alone cannot rebuild it: {support.reason}"
    return usage


def _blocks(result: Result) -> str:
    rows = [
        "| block | status | d → ℓ | N → N' | k → k' | error, initialised | error, healed |",
        "|---|---|---|---|---|---|---|",
    ]
    for block in result.blocks:
        plan, errors = result.plan.get(block.name), result.errors.get(block.name)
        if plan is None or errors is None:
            why = block.reason or result.left.get(block.name, "")
            rows.append(f"| {block.name} | {block.status}: left as it is{f' ({why})' if why else ''} | | | | | |")
            continue
        healed = errors.healed_end_to_end
        rows.append(
            f"| {block.name} | rewritten | {plan.hidden_size} → {plan.latent_dim} | {plan.num_experts} → "
            f"{plan.new_num_experts} | {plan.top_k} → {plan.new_top_k} | {errors.initialised:.4f} | "
            f"{'' if healed is None else f'{healed:.4f}'} |"
        )
    return "\n".join(rows)
