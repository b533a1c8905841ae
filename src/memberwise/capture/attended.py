"""Attention with dropout, which torch computes in ten single operations, as one of ours: its scores stay in the cache.

It is looked for around a softmax, as `scaled_dot_product_attention` is recorded: `bmm`, perhaps the addition of what
hides later keys, `_safe_softmax`, a product with what was drawn, `bmm`; and the four products of the gradients. A step
of five GPTs (128 tokens, four layers of eight heads of 32 numbers) takes 0.94 of the time.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from memberwise._torch.graphmodule import graph_module
from memberwise.capture.ours import LONGEST, Operand, is_faster, operands_of, timed
from memberwise.capture.record import is_write
from memberwise.kernels.attention import attention_dropout, attention_dropout_backward
from memberwise.kernels.library import available
from memberwise.kernels.product import product

_aten = torch.ops.aten
SOFTMAX, _ITS_GRADIENT = _aten._safe_softmax.default, _aten._softmax_backward_data.default
_BMM, _TIMES, _PLUS, _TURN = _aten.bmm.default, _aten.mul.Tensor, _aten.add.Tensor, _aten.transpose.int
_IN_ORDER = {
    _aten.reshape.default,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.flatten.using_ints,
    _aten.expand.default,
    _aten.unsqueeze.default,
    _aten.clone.default,
    _aten.detach.default,
}
"""Operations whose result is the same matrices in the same order, if it has as many of the same size."""
_LAID = {*_IN_ORDER, _TURN}

TRIAL = 1 << 21
"""Scores of a trial, of however many heads the recording has: what each takes is asked, not what a call does."""


class Gradients(NamedTuple):
    """The products of the backward: those that make the gradients of q, k and v, and that of the result's with v."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    scores: fx.Node


class Attention(NamedTuple):
    """Where a recording attends: operands of products, `(B, T, D)`, `(B, D, S)`, `(B, S, E)`; what is drawn, the part
    of it that is kept, and the writes that make a mask of it."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    drawn: fx.Node
    keep: float
    writes: tuple[fx.Node, fx.Node]
    is_causal: bool
    out: fx.Node
    gradients: Gradients | None


def attended(module: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
    """A recording that computes the same, within rounding, with our attention where it is faster."""
    known = [node for node in module.graph.nodes if node.target is SOFTMAX]
    if not known or any(value.device.type != "cpu" for value in inputs) or not available("attention"):
        return module
    search = Search(operands_of(module.graph, inputs))
    found = [one for node in known if (one := search.attention(node)) and _is_faster(one, search.operands)]
    return _rewritten(module, found, search.operands) if found else module


class Search:
    """For the operations around a softmax."""

    def __init__(self, operands: dict[fx.Node, Operand]) -> None:
        self.operands = operands

    def attention(self, softmax: fx.Node) -> Attention | None:
        """That of this softmax, unless somebody else looks into it."""
        try:
            return self._attention(softmax)
        except _Unlike:
            return None

    def _attention(self, softmax: fx.Node) -> Attention:
        scores, is_causal = self._scores(softmax)
        q, k = scores.args
        (kept,) = _only([user for user in softmax.users if user.target is _TIMES])
        mask = kept.args[1]
        drawn, keep, writes = _drawn(mask)
        products = [user for user in self._readers(kept) if user.target is _BMM]
        (out,) = _only([one for one in products if self._is(one.args[0], kept)])
        v = out.args[1]
        readers = {user for user in self._readers(softmax) if user.target is not _aten.empty_like.default} - {kept}
        gradients = None
        if readers:
            gradients = self._gradients(*_only(list(readers)), softmax, q, k, v, mask, kept)
        whole = 1 + bool(gradients)  # readers of what is kept and of the mask
        _check(len(set(self._readers(kept))) == whole and len(mask.users) == whole)
        wide = {self.operands[one].dtype for one in (softmax, q, k, v, drawn)} == {torch.float32}
        _check(wide and self.operands[softmax].shape == self.operands[drawn].shape)
        _check(0 not in self.operands[softmax].shape and self.operands[k].shape[-1] <= LONGEST)
        return Attention(q, k, v, drawn, keep, writes, is_causal, out, gradients)

    def _scores(self, softmax: fx.Node) -> tuple[fx.Node, bool]:
        """The product that it is of, and whether later keys are hidden."""
        _check(softmax.args[1] in (-1, len(self.operands[softmax].shape) - 1) and not softmax.kwargs)
        before = self._upright(softmax.args[0])
        is_causal = before.target is _PLUS and not before.kwargs and _hides_later(before.args[1])
        if is_causal:
            before = self._upright(before.args[0])
        _check(before.target is _BMM)
        return before, is_causal

    def _gradients(
        self, node: fx.Node, softmax: fx.Node, q: Any, k: Any, v: Any, mask: Any, kept: fx.Node
    ) -> Gradients:
        _check(node.target is _ITS_GRADIENT and self._is(node.args[1], softmax))
        masked = self._upright(node.args[0])
        _check(masked.target is _TIMES and masked.args[1] is mask)
        scores = self._upright(masked.args[0])
        _check(scores.target is _BMM and self._is(scores.args[1], v, turned=True))
        users = list(self._readers(node))
        _check(len(users) == 2 and all(user.target is _BMM for user in users))
        (of_q,) = _only([one for one in users if self._is(one.args[0], node) and self._is(one.args[1], k, turned=True)])
        (of_k,) = _only([one for one in users if self._is(one.args[1], node) and self._is(one.args[0], q, turned=True)])
        (of_v,) = _only([one for one in self._readers(kept) if self._is(one.args[0], kept, turned=True)])
        _check(of_v.target is _BMM and self._is(of_v.args[1], scores.args[0]))
        return Gradients(of_q, of_k, of_v, scores)

    def _matrices(self, node: Any) -> tuple[fx.Node, bool]:
        """The node whose matrices, in order, these are; and whether they are turned."""
        turned = False
        while isinstance(node, fx.Node) and (source := self._source(node)) is not None:
            turned ^= node.target is _TURN
            node = source
        _check(isinstance(node, fx.Node) and node in self.operands)
        return node, turned

    def _upright(self, node: Any) -> fx.Node:
        found, turned = self._matrices(node)
        _check(not turned)
        return found

    def _source(self, node: fx.Node) -> Any:
        """What such an operation is of, or None if it is another."""
        if node.target not in _LAID or not {node, node.args[0]} <= self.operands.keys():
            return None
        own, its = self.operands[node].shape, self.operands[node.args[0]].shape
        if node.target is _TURN:
            alike = {dim % len(own) for dim in node.args[1:]} == {len(own) - 2, len(own) - 1}
        else:
            alike = own[-2:] == its[-2:] and math.prod(own) == math.prod(its)
        return node.args[0] if alike else None

    def _is(self, node: Any, other: Any, turned: bool = False) -> bool:
        """Whether both are the same matrices; with `turned`, one of them turned."""
        (one, own), (two, its) = self._matrices(node), self._matrices(other)
        return one is two and (own != its) == turned

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        """Whoever does more with it than give it another shape."""
        for user in node.users:
            if user.args and user.args[0] is node and self._source(user) is node:
                yield from self._readers(user)
            else:
                yield user


class _Unlike(Exception):
    """No attention that ours computes."""


def _check(holds: bool) -> None:
    if not holds:
        raise _Unlike


def _only(found: list[fx.Node]) -> list[fx.Node]:
    _check(len(found) == 1)
    return found


def _drawn(mask: Any) -> tuple[fx.Node, float, tuple[fx.Node, fx.Node]]:
    """What the softmax is multiplied by, as dropout makes it: a draw, divided by the part that it keeps."""
    _check(isinstance(mask, fx.Node) and mask.target is _aten.div_.Scalar)
    filled, keep = mask.args
    empty = filled.args[0] if filled.target is _aten.copy_.default else filled
    (copy,) = _only([user for user in empty.users if user is not mask])
    _check(empty.target is _aten.empty_like.default and copy.target is _aten.copy_.default and keep != 0)
    _check(copy.args[0] is empty and len(copy.args) == 2 and not set(copy.users) - {mask})
    return copy.args[1], keep, (copy, mask)


def _hides_later(node: Any) -> bool:
    """Whether it is -inf for keys after a row's own, and 0 else."""
    if not isinstance(node, fx.Node) or node.target is not _aten.where.self:
        return False
    seen, *values = node.args
    numbers = [one.args[0] for one in values if one.target is _aten.scalar_tensor.default]
    lower = seen.target is _aten.tril.default and seen.args[1:] in ((), (0,))
    return numbers == [0, -math.inf] and lower and seen.args[0].target is _aten.ones.default


def _rewritten(module: fx.GraphModule, found: list[Attention], operands: dict[fx.Node, Operand]) -> fx.GraphModule:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    given: dict[Attention, list[fx.Node]] = {}
    outs = {one.out: one for one in found}
    grads = {node: one for one in found if one.gradients for node in one.gradients[:3]}
    for node in module.graph.nodes:
        if node in outs:
            new[node], given[outs[node]] = _forward(graph, outs[node], new, operands)
        elif node in grads and node not in new:
            new |= _backward(graph, node, grads[node], new, given[grads[node]])
        elif node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
    spent = {new[write] for one in found for write in one.writes}
    graph.eliminate_dead_code(lambda node: is_write(node) and node not in spent)
    return graph_module(module, graph)


def _forward(
    graph: fx.Graph, one: Attention, new: dict[fx.Node, fx.Node], operands: dict[fx.Node, Operand]
) -> tuple[fx.Node, list[fx.Node]]:
    """What stands for the result, and the arguments of the gradient's operation but for the result's gradient."""
    shape = [1, *operands[one.q].shape[:-1], operands[one.k].shape[-1]]
    heads = [graph.call_function(_aten.unsqueeze.default, (new[each], 0)) for each in (one.q, one.k, one.v)]
    heads.append(graph.call_function(_aten.reshape.default, (new[one.drawn], shape)))
    made = graph.call_function(attention_dropout, (*heads, 1 / one.keep, one.is_causal))
    out, sums = (graph.call_function(operator.getitem, (made, k)) for k in range(2))
    return _alone(graph, out, one.out), [*heads, sums]


def _backward(
    graph: fx.Graph, first: fx.Node, one: Attention, new: dict[fx.Node, fx.Node], given: list[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """What stands for each of the three gradients, at the place of the first."""
    assert one.gradients is not None
    grad = first.args[1] if first is one.gradients.v else one.gradients.scores.args[0]
    own = graph.call_function(_aten.unsqueeze.default, (new[grad], 0))
    made = graph.call_function(attention_dropout_backward, (own, *given, 1 / one.keep, one.is_causal))
    parts = [graph.call_function(operator.getitem, (made, k)) for k in range(3)]
    return {node: _alone(graph, part, node) for node, part in zip(one.gradients[:3], parts, strict=True)}


def _alone(graph: fx.Graph, heads: fx.Node, like: fx.Node) -> fx.Node:
    """Of a batch of one, that."""
    made = graph.call_function(_aten.squeeze.dim, (heads, 0))
    made.meta = dict(like.meta)
    return made


def _is_faster(one: Attention, operands: dict[fx.Node, Operand]) -> bool:
    """Whether ours is faster than single operations, of as many heads as fill a trial."""
    (rows, width), (_, keys), (_, wide) = (operands[each].shape[1:] for each in (one.q, one.k, one.v))
    heads = max(1, TRIAL // max(rows * keys, rows * width, keys * width, keys * wide))
    sizes = [(rows, width), (width, keys), (keys, wide), (rows, keys), *([(rows, wide)] if one.gradients else [])]

    def seconds() -> list[float]:
        trial = [torch.ones(heads, *size) for size in sizes]
        return timed(*(functools.partial(each, one.is_causal, *trial) for each in (_apart, _together)))

    return is_faster(("attention with dropout", sizes, one.is_causal), seconds)


def _together(is_causal: bool, *trial: Any) -> None:
    q, k, v, drawn, *grads = (each.unsqueeze(0) for each in trial)
    _, sums = attention_dropout(q, k, v, drawn, 1.0, is_causal)
    for grad in grads:
        attention_dropout_backward(grad, q, k, v, drawn, sums, 1.0, is_causal)


def _apart(is_causal: bool, q: Any, k: Any, v: Any, mask: Any, *grads: Any) -> None:
    """The single operations, each by the faster kernel."""
    scores = product(q, k)
    if is_causal:
        scores += torch.full(scores.shape[1:], -math.inf).triu(1)
    weights = SOFTMAX(scores, -1)
    kept = weights * mask
    product(kept, v)
    for grad in grads:
        product(kept.mT, grad)
        of_scores = _ITS_GRADIENT(product(grad, v.mT) * mask, weights, -1, torch.float32)
        product(of_scores, k.mT), product(q.mT, of_scores)
