"""What the optimizers' private corners of torch must keep doing; a red test here names what breaks."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from memberwise._torch import fused, hooks, subclass, tracing


def test_fused_kernels_take_single_counts_that_are_counted_already() -> None:
    """Breaks: every step of Adam and AdamW."""
    for kernel, decayed in ((fused.adam_, 1.0), (fused.adamw_, 1.0 - 0.1 * 0.5)):
        param, grad, mean, square = torch.ones(3), torch.ones(3), torch.zeros(3), torch.zeros(3)
        steps = torch.ones(4)
        kernel(
            [param],
            [grad],
            [mean],
            [square],
            [],
            [steps[2]],
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.5,
            eps=0.0,
            amsgrad=False,
            maximize=False,
        )
        assert torch.allclose(param, torch.full((3,), decayed - 0.1))
        assert steps.tolist() == [1.0] * 4


def test_the_fused_kernel_of_sgd_starts_a_buffer_when_told() -> None:
    """Breaks: SGD with momentum and dampening."""
    options = dict(
        weight_decay=0.0, momentum=0.5, lr=1.0, dampening=0.5, nesterov=False, maximize=False, grad_scale=None
    )
    param, grad, buffer = torch.zeros(2), torch.ones(2), torch.full((2,), 7.0)
    fused.sgd_([param], [grad], [buffer], is_first_step=True, **options)
    assert buffer.tolist() == [1.0, 1.0]
    fused.sgd_([param], [grad], [buffer], is_first_step=False, **options)
    assert buffer.tolist() == [1.0, 1.0] and param.tolist() == [-2.0, -2.0]
    fused.sgd_([param], [grad], [], is_first_step=False, **{**options, "momentum": 0.0})
    assert param.tolist() == [-3.0, -3.0]


def test_counts_and_factors_over_lists() -> None:
    """Breaks: step counts, and clipping."""
    steps = [torch.zeros(3), torch.full((), 4.0)]
    fused.count_(steps)
    assert steps[0].tolist() == [1.0] * 3 and steps[1].item() == 5.0
    grads = [torch.ones(2, 3), torch.ones(2)]
    fused.mul_(grads, [torch.tensor([[2.0], [3.0]]), torch.tensor([2.0, 3.0])])
    assert grads[0].tolist() == [[2.0] * 3, [3.0] * 3] and grads[1].tolist() == [2.0, 3.0]


class _Mode(TorchDispatchMode):
    def __init__(self, records: bool) -> None:
        super().__init__()
        self.records = records

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_it_is_known_when_operators_are_watched_and_recorded() -> None:
    """Breaks: captured steps, which would read values on the host."""
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append((tracing.watched(), tracing.tracing()))
        return x + 1

    look(torch.zeros(1))
    make_fx(look)(torch.zeros(1))
    with _Mode(records=False):
        look(torch.zeros(1))
    with _Mode(records=True), _Mode(records=False):
        look(torch.zeros(1))
    assert seen == [(False, False), (True, True), (True, False), (True, True)]


def test_results_of_operators_on_the_subclass_are_plain() -> None:
    """Breaks: arithmetic of schedulers, that would spread our class."""

    class Values(torch.Tensor):
        __torch_function__ = subclass.plain_results

    values = torch.ones(3).as_subclass(Values)
    for result in (values * 2, values.clone(), values[0], torch.stack([values, values])):
        assert type(result) is torch.Tensor


def test_all_hooks_are_copied() -> None:
    """Breaks: hooks of an optimizer whose members were selected."""
    old, new = (torch.optim.SGD([torch.zeros(1, requires_grad=True)]) for _ in range(2))
    calls: list[str] = []
    old.register_step_pre_hook(lambda *_: calls.append("step pre"))
    old.register_step_post_hook(lambda *_: calls.append("step post"))
    old.register_state_dict_pre_hook(lambda *_: calls.append("save pre"))
    old.register_state_dict_post_hook(lambda *_: calls.append("save post"))
    old.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"))
    old.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    hooks.copy_hooks(old, new)
    new.step()
    new.load_state_dict(new.state_dict())
    assert calls == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_fused_kernels_pair_up_elements_by_their_place_in_memory() -> None:
    """If this fails, torch has mended it, and `_can_fuse` need not ask for contiguous tensors."""
    param, grad = torch.zeros(2, 2).t(), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    fused.sgd_(
        [param],
        [grad],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )
    assert param.tolist() == [[0.0, 0.0], [-1.0, 0.0]]  # the transpose of what it should be
