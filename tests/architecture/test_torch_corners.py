"""What each private corner of torch that we stand on must keep doing; a red test here names what breaks."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

from memberwise._torch import dispatch, functions, functorch, pytree, versions


class _Recorder(dispatch.DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_pushed_mode_sees_operations_until_it_is_popped() -> None:
    """Breaks: every region; factories and plain tensors inside a call would not be seen."""
    mode = _Recorder()
    dispatch.push_mode(mode)
    try:
        torch.zeros(2)
        assert dispatch.top_mode() is mode
        assert dispatch.mode_depth() == 1
    finally:
        assert dispatch.pop_mode() is mode
    torch.zeros(2)
    assert mode.seen == ["aten.zeros.default"]
    assert dispatch.top_mode() is None


def test_suspended_takes_off_the_innermost_mode_alone() -> None:
    """Breaks: modules that run member by member inside a call."""
    outer, inner = _Recorder(), _Recorder()
    with outer, inner:
        with dispatch.suspended(outer):
            torch.zeros(2)
        with dispatch.suspended(inner):
            torch.ones(2)
    assert inner.seen == ["aten.zeros.default"]
    assert outer.seen == ["aten.zeros.default", "aten.ones.default"]


def test_a_wrapper_shows_sizes_strides_and_offset() -> None:
    """Breaks: member tensors, at their root."""

    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return NotImplemented

    shown = dispatch.make_wrapper(Wrapper, (2, 3), (1, 2), 5, None, torch.float64, torch.strided, torch.device("cpu"))
    assert (tuple(shown.shape), shown.stride(), shown.storage_offset()) == ((2, 3), (1, 2), 5)
    assert shown.dtype is torch.float64
    with dispatch.without_dispatch():
        torch.ops.aten.t_.default(shown)
    assert tuple(shown.shape) == (3, 2)


def test_applier_is_apply() -> None:
    """Breaks: composite rules and the boundary's two nodes."""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.ones(3, requires_grad=True)
    out = dispatch.applier(Double)(x)
    assert out.requires_grad
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_composites_stand_aside_for_what_looks_between() -> None:
    """Breaks: autocast dtypes, checkpoint, jacrev and dual numbers, silently."""
    assert not dispatch.composites_must_stand_aside()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert dispatch.composites_must_stand_aside()
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        assert dispatch.composites_must_stand_aside()
    with forward_ad.dual_level():
        assert dispatch.composites_must_stand_aside()
    answers = []
    torch.vmap(lambda x: answers.append(dispatch.composites_must_stand_aside()) or x)(torch.ones(2))
    assert answers == [True]


def test_one_operation_is_batched_from_below_dispatch() -> None:
    """Breaks: the second rung. In a handler functorch's keys are excluded; they must come back, and go again."""
    found = []

    class Below(dispatch.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.cumsum.default:
                found.append(functorch.batch(func, [0, None], args, {}, args[0].shape[0], "error"))
            return func(*args, **(kwargs or {}))

    x = torch.arange(6.0).view(2, 3)
    with Below():
        x.cumsum(0)
    assert torch.equal(found[0], x.cumsum(1))
    assert torch.equal(torch.vmap(torch.sin)(x), x.sin())


def test_no_batching_rule_is_an_error_we_see_and_not_a_silent_loop() -> None:
    """Breaks: the third rung would be reached without `explain` knowing."""

    @torch.library.custom_op("memberwise_corner::nameless", mutates_args=())
    def nameless(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(functorch.Unbatchable):
        functorch.batch(torch.ops.memberwise_corner.nameless.default, [0], [torch.ones(2, 3)], {}, 2, "error")


def test_a_users_backward_runs_inside_what_its_forward_ran_in() -> None:
    """Breaks: Functions whose backward makes tensors and writes members' values into them."""
    events: list[str] = []

    class Inside:
        def __enter__(self) -> None:
            events.append("in")

        def __exit__(self, *exc: object) -> None:
            events.append("out")

    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, grad):
            events.append("backward")
            return grad * 3

    before = torch.autograd.Function.__dict__["apply"]
    functions.enter_functions(lambda modules: events.append(f"modules: {modules}") or Inside, tuple)
    try:
        x = torch.ones(2, requires_grad=True)
        out = Triple.apply(x)
        Plain.apply(x, 2.0, (3, "how"))
        Plain.apply(x, torch.relu)
    finally:
        functions.leave_functions()
    assert torch.autograd.Function.__dict__["apply"] is before, "the replacement outlived the call"
    out.sum().backward()
    told = ["modules: True", "modules: False", "modules: True"]  # a local class may see modules
    assert events == [*told, "in", "backward", "out"]


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *_):
        return x.clone()


def test_in_dims_broadcast_as_torch_vmap_does() -> None:
    """Breaks: nested in_dims."""
    _, spec = pytree.tree_flatten(({"a": 1, "b": 2}, 3))
    assert pytree.broadcast_to_and_flatten((0, None), spec) == [0, 0, None]
    assert pytree.broadcast_to_and_flatten((0,), spec) is None


def test_a_shortened_backward_is_still_the_backward() -> None:
    """Breaks: the gradients of every composite rule, and of what enters and leaves a call."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0]

    dispatch.shorten_backward(Square)
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    (grad,) = torch.autograd.grad(Square.apply(x).sum(), x, create_graph=True)
    assert grad.tolist() == [2.0, 6.0]
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.tolist() == [2.0, 2.0]


def test_the_question_before_nested_tensors_is_found_where_its_override_is_given() -> None:
    """Breaks: `nn.TransformerEncoder` with a padding mask in evaluation, whose padding would not be zeros as alone."""
    from memberwise._torch.nested import is_left_aligned

    rows, seen = torch.ones(2, 3, 4), []
    assert is_left_aligned(rows, torch.tensor([[True, True, True], [True, False, False]])) is True
    assert is_left_aligned(rows, torch.tensor([[True, True, True], [False, True, True]])) is False

    class Overriding(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1).eval()
    encoder(rows.as_subclass(Overriding), src_key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))
    assert is_left_aligned in seen


def test_packing_is_found_where_its_override_is_given() -> None:
    """Breaks: packed sequences inside a call, which are gathered by a function of ours in its place."""
    from memberwise._torch.packing import pack_padded_sequence

    steps, sizes = pack_padded_sequence(torch.arange(6).view(3, 2), torch.tensor([3, 1]), False)
    assert (steps.tolist(), sizes.tolist()) == ([0, 1, 2, 4], [2, 1, 1])
    seen = []

    class Overriding(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    torch.nn.utils.rnn.pack_padded_sequence(torch.ones(3, 2).as_subclass(Overriding), torch.tensor([3, 1]))
    assert pack_padded_sequence in seen


def test_a_count_of_writes_can_be_set_back() -> None:
    """Breaks: where members run one by one, a backward would take one's write for a change of what another saved."""
    x = torch.zeros(2, 3)
    row = x[0]
    row.add_(1)
    assert versions.version(x) == versions.version(row) == 1
    versions.set_versions([x], [0])
    assert versions.version(row) == 0
    with torch.inference_mode():
        y = torch.zeros(2)
    versions.set_versions([y], [3])
    assert versions.version(y) == 0


def test_an_operation_runs_as_the_operations_it_calls() -> None:
    """Breaks: inference mode hands such an operation over whole, with writes that its schema keeps quiet."""
    aten = torch.ops.aten
    assert not dispatch.is_made_of_others(aten.mul.Tensor)
    assert not dispatch.is_made_of_others(torch.ops.prim.layout.default)
    assert all(
        map(
            dispatch.is_made_of_others,
            (aten.dropout.default, aten.batch_norm.default, aten._batch_norm_impl_index.default),
        )
    )
    x, mean = torch.randn(4, 2), torch.zeros(2)
    with torch.inference_mode(), _Recorder() as mode:
        assert dispatch.run_as_others(aten.dropout.default, (x, 0.5, False), {}) is x
        dispatch.run_as_others(aten.batch_norm.default, (x, None, None, mean, mean + 1, True, 0.1, 1e-5, False), {})
    assert "aten._batch_norm_impl_index.default" in mode.seen and bool(mean.any())


def test_a_detached_row_shares_the_count_of_writes_and_is_no_view() -> None:
    """What `engine/rows.py` is built on."""
    whole = torch.zeros(3, 2, requires_grad=True) * 1
    row = whole.select(0, 1).detach()
    row.add_(1)
    assert not row._is_view() and versions.version(whole) == versions.version(row) == 1


@pytest.mark.long
def test_users_functions_are_noted() -> None:
    """Breaks: backward code of a user's Function would run outside of the call that made its node."""
    code = """
import torch, memberwise
from memberwise._torch import functions
assert not functions.users_functions()
memberwise.vmap(torch.sin)(torch.ones(2, requires_grad=True)).sum().backward()
assert not functions.users_functions()
def compiled():
    class Compiled(torch.autograd.Function):  # as torch.compile makes it: its backward names itself
        __module__ = "torch._functorch.compiled"
        @staticmethod
        def backward(ctx, grad):
            return Compiled
compiled()
class Double(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * 2)
assert functions.users_functions()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.long
def test_functions_of_custom_operations_are_noted() -> None:
    """Breaks: the same, for `torch.library`: the class is torch's, its backward somebody else's code."""
    code = """
import torch
@torch.library.custom_op("corner::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2
double.register_autograd(lambda ctx, grad: grad * 2)
double(torch.ones(2, requires_grad=True))
from memberwise._torch import functions
assert functions.users_functions()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
