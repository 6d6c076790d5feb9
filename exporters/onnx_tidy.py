"""A translated graph, made smaller: what is constant is computed, what is written twice is kept once.

The general rewriter of onnxscript is left out: some of its patterns are looked for at every node among all nodes, so
that its time grows with the square of the graph, and runtimes do the same rewrites when they load the file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def tidy(model: ir.Model) -> None:
    """Inline functions, fold constants, drop what nothing uses, join equal constants and equal nodes; in place."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    passes.InlinePass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    optimizer.remove_unused_nodes(model)
    for step in (
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)
