"""Conversion as one pass of your own pipeline: `LatentizePass` in a torch.fx pass list on an exported program.

    python samples/pass_pipeline.py

Exports the model of plain_moe.py, runs three passes over its graph and compares the graph before and after.
"""

from __future__ import annotations

import time

import plain_moe
import torch
from torch.export import Dim
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import latentize
from latentize.passes import LatentizePass


class DropAssertions(PassBase):
    """Removes the run-time assertions that torch.export writes into a graph."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """`graph_module` without its assertions."""
        assertions = [node for node in graph_module.graph.nodes if "_assert_" in str(node.target) and not node.users]
        for node in assertions:
            graph_module.graph.erase_node(node)
        return PassResult(graph_module, bool(assertions))


class EliminateDeadCode(PassBase):
    """Removes what no output depends on."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """`graph_module` without its dead nodes."""
        return PassResult(graph_module, graph_module.graph.eliminate_dead_code())


def export() -> GraphModule:
    """The sample model as a flat graph that takes any number of rows."""
    model = plain_moe.build_model()
    program = torch.export.export(model, plain_moe.example_inputs(), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    return program.module()


def main() -> None:
    """Convert the exported program and print what changed."""
    graph_module = export()
    before = plain_moe.evaluate(graph_module)
    nodes = len(graph_module.graph.nodes)

    latentize_pass = LatentizePass(
        latentize.Recipe(compression=2, heal_steps=50),
        args=plain_moe.example_inputs(),
        calibration=plain_moe.calibration_data(),
    )
    passes = PassManager([DropAssertions(), latentize_pass, EliminateDeadCode()])
    start = time.perf_counter()
    result = passes(graph_module)

    print(f"modified: {result.modified}, in {time.perf_counter() - start:.0f} s")
    for block in latentize_pass.blocks:
        print(f"  {block.name}: {block.status} {block.reason or block.spec.describe()}")
    print(f"graph: {nodes} -> {len(result.graph_module.graph.nodes)} nodes")
    after = plain_moe.evaluate(result.graph_module)
    for name, value in before.items():
        print(f"{name}: {value:.4f} -> {after[name]:.4f}")


if __name__ == "__main__":
    main()
