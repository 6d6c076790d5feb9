"""A model as one captured graph with the fusions of `latentize.passes.fuse`: for running, not for saving."""

from __future__ import annotations

from torch import fx, nn

from latentize.exporters.captured import capture, example_for_export, exporting
from latentize.inputs import Inputs
from latentize.passes.fuse import fuse


def captured_graph(model: nn.Module, inputs: Inputs, *, fusions: bool) -> fx.GraphModule:
    """The graph of a model at any number of tokens, sharing its parameters but for those that a fusion replaces.

    Args:
        model: run in eval mode, without gradients and key-value cache; left as it was found.
        inputs: example arguments.
        fusions: whether to fuse.

    Raises:
        LatentizeError: torch.export cannot capture the model.
    """
    example = example_for_export(model, inputs.args, inputs.kwargs)
    with exporting(model):
        graph = capture(model, example, "a graph to run").module()
    assert isinstance(graph, fx.GraphModule)
    if fusions:
        fuse(graph)
    return graph
