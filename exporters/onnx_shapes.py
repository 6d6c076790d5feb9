"""Sizes read one by one and joined to a shape again: in an ONNX graph, one node that reads the shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def join_shapes(model: ir.Model) -> int:
    """Replace every Concat of all of a value's sizes, in their order, by a Shape of that value; how many there were.

    A size counts where it is read by `Shape`, or is a constant equal to the value's fixed size. That is what flattening
    hidden states before a layer and restoring their shape after it leaves behind, once for every layer.
    """
    import onnx_ir as ir

    done = 0
    for graph in model.graphs():
        for node in list(graph):
            whole = _whole(node)
            if whole is None:
                continue
            parts = [part for part in dict.fromkeys(node.inputs) if part is not None]
            shape = ir.node("Shape", [whole])
            old, new = node.outputs[0], shape.outputs[0]
            new.shape, new.type, new.name = old.shape, ir.TensorType(ir.DataType.INT64), old.name
            graph.insert_before(node, shape)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            for part in parts:
                _drop_unused(part)
            done += 1
    return done


def _drop_unused(part: ir.Value) -> None:
    """Take a size that nothing reads any more out of its graph."""
    maker, home = part.producer(), part.graph
    if home is None or part.uses() or part.is_graph_output():
        return
    if part.is_initializer():
        home.initializers.pop(part.name or "")
    elif maker is not None and len(maker.outputs) == 1:
        home.remove(maker, safe=True)


def _whole(node: ir.Node) -> ir.Value | None:
    """The value whose sizes a Concat joins; None where it joins anything else."""
    if node.op_type != "Concat" or node.domain or len(node.inputs) < 2:
        return None
    read = [_read(part) for part in node.inputs]
    whole = next((found[0] for found in read if found is not None), None)
    if whole is None or whole.shape is None or len(whole.shape) != len(read):
        return None
    for axis, (part, found) in enumerate(zip(node.inputs, read, strict=True)):
        if found is not None:
            if found[0] is not whole or found[1] != axis:
                return None
        elif _constant(part) is None or _constant(part) != whole.shape[axis]:
            return None
    return whole


def _read(part: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The value and the axis whose size this is, where a Shape reads one."""
    node = None if part is None else part.producer()
    if node is None or node.op_type != "Shape" or node.domain or node.inputs[0] is None:
        return None
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    if start is None or end is None or end.value != start.value + 1 or start.value < 0:
        return None
    return node.inputs[0], start.value


def _constant(part: ir.Value | None) -> int | None:
    """The number that a constant vector of one element holds."""
    import onnx_ir as ir

    value = None if part is None else ir.convenience.get_const_tensor(part)
    return None if value is None or value.size != 1 else int(value.numpy().reshape(-1)[0])
