"""Whole models as exported programs: what is exported further, or run as one graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from latentize.errors import LatentizeError, one_line
from latentize.inputs import Inputs, observing, with_tokens

#: Tokens of the longer example: several chunks of the sizes in use, and not a whole number of them.
_LONGER = 257


def capture(model: nn.Module, inputs: Inputs, feature: str) -> torch.export.ExportedProgram:
    """The program of a model within `exporting`, with every axis of its inputs dynamic that the model leaves free.

    Raises:
        LatentizeError: torch.export cannot follow it; the message begins with `feature`.
    """
    shapes: Any = torch.export.ShapesCollection()
    for tensor in inputs.tensors():
        shapes[tensor] = dict.fromkeys(range(tensor.ndim), torch.export.Dim.AUTO)
    try:
        with quiet():
            return torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise LatentizeError(
            f"{feature}: torch.export cannot capture {type(model).__name__}: {one_line(error)}; "
            "that part of its forward depends on data in Python"
        ) from error


def capture_any_length(model: nn.Module, inputs: Inputs, feature: str) -> torch.export.ExportedProgram:
    """`capture`, of longer sequences where that of the example would hold for short ones alone.

    A model that works through its tokens chunk by chunk is captured with the number of its chunks: of a single one,
    whose axis is then taken for one that broadcasts, nothing can be made that runs on several.

    Raises:
        LatentizeError: as `capture`.
    """
    captured = capture(model, inputs, feature)
    longer = with_tokens(inputs.args, inputs.kwargs, _LONGER)
    beyond = with_tokens(inputs.args, inputs.kwargs, 2 * _LONGER)
    if longer is None or beyond is None or not _refused(captured, longer):
        return captured
    longer = example_for_export(model, longer.args, longer.kwargs)
    if [tensor.shape[:1] != (1,) for tensor in inputs.tensors()] != [t.shape[:1] != (1,) for t in longer.tensors()]:
        return captured  # it takes so many tokens of one sequence only
    try:
        longer.call(model)
        again = capture(model, longer, feature)
    except Exception:  # the user's model may take short sequences only
        return captured
    return captured if _refused(again, beyond) else again


def _refused(captured: torch.export.ExportedProgram, inputs: Inputs) -> bool:
    """Whether the sizes of a call are others than those that a program was captured for; nothing is computed."""
    guards = getattr(captured.module(), "_guards_fn", None)
    if guards is None:
        return False
    try:
        guards(*pytree.tree_leaves((inputs.args, dict(inputs.kwargs))))
    except AssertionError:
        return True
    return False


def captured_graph(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    """A model as a graph that runs at any number of tokens and shares its parameters.

    Args:
        model: run in eval mode, without gradients and key-value cache; left as it was found.
        inputs: example arguments.

    Raises:
        LatentizeError: torch.export cannot capture the model.
    """
    example = example_for_export(model, inputs.args, inputs.kwargs)
    with exporting(model):
        graph = capture(model, example, "a graph to run").module()
    assert isinstance(graph, fx.GraphModule)
    return graph


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no key-value cache among the outputs of a transformers model."""
    seen: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in seen if getattr(config, "use_cache", False) is True}
    with observing(model):
        try:
            for config in configs.values():
                config.use_cache = False
            yield
        finally:
            for config in configs.values():
                config.use_cache = True


def example_for_export(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Inputs:
    """The example arguments with two sequences of at least two tokens, where the model takes that.

    An axis of length 1 would be taken for fixed.
    """
    given = Inputs(args, kwargs)
    tensors = given.tensors()
    roomy = given
    if tensors and tensors[0].ndim > 1 and 1 in tensors[0].shape[:2]:
        short = tensors[0].shape[1] == 1 or (tensors[0].ndim == 2 and tensors[0].is_floating_point())
        longer = with_tokens(args, kwargs, 8) if short else None
        roomy = _doubled(given if longer is None else longer)
    with exporting(model):
        try:
            roomy.call(model)
        except Exception:  # the user's model may insist on its example's sizes
            return given
    return roomy


def _doubled(inputs: Inputs) -> Inputs:
    """Two copies of the batch, where every tensor's leading axis has length 1."""
    if any(t.ndim == 0 or t.shape[0] != 1 for t in inputs.tensors() if t.ndim > 1):
        return inputs

    def twice(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.ndim > 1 else leaf

    return Inputs(*pytree.tree_map(twice, (inputs.args, dict(inputs.kwargs))))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's advice to its own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
