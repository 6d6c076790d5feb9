"""Fewer launches and passes over memory in the exported graph of a converted model.

Each pass is exact up to the order of sums and leaves what it is not sure of. They work on the `GraphModule` of
`torch.export.export(model, ...).module()`, whose parameters they replace: fuse what is to be run, not what is saved.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from latentize.passes.linears import VIEWS, Linear, behind, cleaned, linear_of, new_parameter, value, writes_between

_ADD = torch.ops.aten.add.Tensor
_MULTIPLY = torch.ops.aten.mul.Tensor
_EXPERTS = torch.ops.latentize.latent_experts.default


class FoldScale(PassBase):
    """A number that multiplies the up-projection's output goes into the up-projection.

    latent_up [d, l] is replaced by its multiple; s (U z) = (s U) z. In 16 bits only powers of two are folded: another
    number would round every weight once more.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fold every scale that stands alone behind an up-projection."""
        replaced: list[str] = []
        for up in _ups(graph_module):
            scaled = _only_user(up.node)
            if scaled is None or scaled.target is not _MULTIPLY or not isinstance(scaled.args[1], (int, float)):
                continue
            if up.weight.element_size() < 4 and abs(math.frexp(scaled.args[1])[0]) != 0.5:
                continue
            multiple, learns = up.weight * scaled.args[1], up.weight.requires_grad
            weight = new_parameter(graph_module, "latent_up_scaled", multiple, up.node, learns=learns)
            up.node.args = (up.node.args[0], weight)
            scaled.replace_all_uses_with(up.node)
            replaced.append(up.target)
        return _finished(graph_module, replaced)


class FuseProjections(PassBase):
    """The router's logits and the down-projection as one product, with whatever else multiplies the same tokens.

    Takes products without bias whose parameters have one dtype, and learn or do not: in 16 bits the router stays apart,
    as its logits are computed in fp32.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Merge the products of each tensor of tokens that a down-projection reads."""
        sources = {down.source for down in _downs(graph_module)}
        beside: dict[object, list[Linear]] = defaultdict(list)
        for node in graph_module.graph.nodes:
            found = linear_of(graph_module, node)
            if found is not None and found.source in sources:
                beside[found.source, found.weight.dtype, found.weight.requires_grad].append(found)
        replaced: list[str] = []
        for group in beside.values():
            source = group[0].source
            if len(group) > 1 and not writes_between(graph_module, [source, *(linear.node for linear in group)]):
                _merge(graph_module, source, group)
                replaced += [linear.target for linear in group]
        return _finished(graph_module, replaced)


class FuseUp(PassBase):
    """The up-projection's product and the sum that it goes into (shared expert, residual) as one `addmm`."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Fuse every sum of an up-projection, seen in another shape or not, with a tensor of the sum's own shape."""
        modified = False
        for up in _ups(graph_module):
            shaped, user = up.node, _only_user(up.node)
            while user is not None and user.target in VIEWS:
                shaped, user = user, _only_user(user)
            if user is None or not _adds(user, shaped):
                continue
            other = user.args[1] if user.args[0] is shaped else user.args[0]
            if not isinstance(other, fx.Node) or not _alike(other, user, shaped) or not _same_rows(up.node, shaped):
                continue
            if writes_between(graph_module, [up.node, user]):
                continue
            self._replace(graph_module, up, shaped, other, user)
            modified = True
        if modified:
            cleaned(graph_module, [])
        return PassResult(graph_module, modified)

    def _replace(
        self, graph_module: fx.GraphModule, up: Linear, shaped: fx.Node, other: fx.Node, total: fx.Node
    ) -> None:
        graph, aten = graph_module.graph, torch.ops.aten
        combined, weight = up.node.args[:2]
        with graph.inserting_before(total):
            flat = other
            if shaped is not up.node:
                flat = graph.call_function(aten.reshape.default, (other, [-1, len(up.weight)]))
            turned = graph.call_function(aten.t.default, (weight,))
            result = graph.call_function(aten.addmm.default, (flat, combined, turned))
            result.meta["val"] = up.node.meta["val"]
            if shaped is not up.node:
                result = graph.call_function(aten.reshape.default, (result, shaped.args[1]))
                result.meta["val"] = total.meta["val"]
        total.replace_all_uses_with(result)


def fuse(graph_module: fx.GraphModule) -> PassResult:
    """All passes of this file, in the order in which each makes room for the next."""
    modified = False
    for each in (FoldScale(), FuseProjections(), FuseUp()):
        result = each(graph_module)
        modified |= result is not None and result.modified
    return PassResult(graph_module, modified)


def _downs(graph_module: fx.GraphModule) -> list[Linear]:
    """The down-projections: products that the routed experts read."""
    found = (linear_of(graph_module, behind(node.args[0])) for node in _experts(graph_module))
    return [linear for linear in found if linear is not None]


def _ups(graph_module: fx.GraphModule) -> list[Linear]:
    """The up-projections: products with what the routed experts give."""
    found = []
    for node in _experts(graph_module):
        user = _only_user(node)
        up = linear_of(graph_module, user)
        if up is not None and up.source is node:
            found.append(up)
    return found


def _experts(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.target is _EXPERTS]


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads this one, if it is one; checks of what it is do not count."""
    users = [user for user in node.users if user.target is not torch.ops.aten._assert_tensor_metadata.default]
    return users[0] if len(users) == 1 else None


def _adds(node: fx.Node, term: fx.Node) -> bool:
    """Whether a node is the plain sum of two tensors, one of them `term`, the other not."""
    terms = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return node.target is _ADD and not node.kwargs and len(terms) == 2 and terms.count(term) == 1


def _alike(*nodes: fx.Node) -> bool:
    """Whether all have one shape and dtype, so that in their sum nothing is broadcast or converted."""
    tensors = [value(node) for node in nodes]
    first = tensors[0]
    return first is not None and all(
        tensor is not None and tuple(tensor.shape) == tuple(first.shape) and tensor.dtype == first.dtype
        for tensor in tensors
    )


def _same_rows(product: fx.Node, shaped: fx.Node) -> bool:
    """Whether a view of a product has the product's rows as its last axis."""
    before, after = value(product), value(shaped)
    return before is not None and after is not None and bool(before.shape[-1] == after.shape[-1])


def _merge(graph_module: fx.GraphModule, source: fx.Node, group: list[Linear]) -> None:
    """One product with all matrices of a group, in the graph's order, and parts of its columns for each product."""
    graph, first = graph_module.graph, group[0]
    matrices, learns = torch.cat([each.weight for each in group]), first.weight.requires_grad
    weight = new_parameter(graph_module, "fused_projections", matrices, first.node, learns=learns)
    with graph.inserting_before(first.node):
        together = graph.call_function(torch.ops.aten.linear.default, (source, weight))
        at = 0
        for each in group:
            part = graph.call_function(torch.ops.aten.narrow.default, (together, -1, at, len(each.weight)))
            part.meta["val"] = each.node.meta.get("val")
            each.node.replace_all_uses_with(part)
            _let_reshape(part)
            at += len(each.weight)


def _let_reshape(part: fx.Node) -> None:
    """Views of columns of a product need not exist: where one is asked for, a copy will do."""
    for user in list(part.users):
        if user.target is torch.ops.aten.view.default:
            user.target = torch.ops.aten.reshape.default
            _let_reshape(user)


def _finished(graph_module: fx.GraphModule, replaced: list[str]) -> PassResult:
    if replaced:
        cleaned(graph_module, replaced)
    return PassResult(graph_module, bool(replaced))
