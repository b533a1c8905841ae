"""From an iterator no more is held than the stack and one member: counted tensor by tensor, then by the page."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from memberwise import columns
from memberwise.errors import ArgumentError, StateError
from memberwise.gathering import gather
from memberwise.state import stack_module_state, unstack_module_state


class Counted:
    """Makes members one by one, and counts those alive when the next is asked for."""

    def __init__(self, count: int, make=lambda: nn.Linear(4, 3)) -> None:
        self.count, self.make = count, make
        self.alive: list[weakref.ref[nn.Module]] = []
        self.most = 0
        self.values: list[dict[str, torch.Tensor]] = []

    def __iter__(self) -> Iterator[nn.Module]:
        for _ in range(self.count):
            yield self._next()

    def _next(self) -> nn.Module:
        self.most = max(self.most, sum(ref() is not None for ref in self.alive))
        model = self.make()
        self.alive += [weakref.ref(model), *map(weakref.ref, model.parameters())]
        self.values.append({name: tensor.detach().clone() for name, tensor in model.named_parameters()})
        return model


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_each_member_is_gone_before_the_next_is_made(count: int) -> None:
    gc.disable()  # what is freed late, by the collector, does not count
    try:
        members = Counted(count)
        params, _ = stack_module_state(iter(members))
    finally:
        gc.enable()
    assert members.most == 0
    assert not any(ref() is not None for ref in members.alive)
    for name in ("weight", "bias"):
        assert torch.equal(params[name], torch.stack([values[name] for values in members.values]))


def test_members_are_gone_too_while_differences_are_collected() -> None:
    sizes = iter([3, 3, 4, 3, 5])
    members = Counted(5, lambda: nn.Linear(2, next(sizes)))
    with pytest.raises(StateError) as error:
        stack_module_state(iter(members))
    assert members.most == 0
    assert "member 2: parameter 'weight' has shape (4, 2)" in str(error.value)
    assert "member 4: parameter 'weight' has shape (5, 2)" in str(error.value)


def test_a_known_number_of_members_is_filled_in_place() -> None:
    members = Counted(5)
    gathered = gather(iter(members), count=5)
    assert members.most == 0
    assert gathered.count == 5
    assert torch.equal(gathered.params["weight"], torch.stack([values["weight"] for values in members.values]))


def resident(key: str) -> int:
    """Bytes of this process that lie in memory now (VmRSS), or did at most (VmHWM)."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("this system does not tell a process its memory")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))


class Peak:
    """The most resident memory within the block, beyond what there was before it."""

    def __enter__(self) -> Peak:
        gc.collect()
        self._before = resident("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pytest.skip("this system does not let a process reset its peak memory")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bytes = resident("VmHWM") - self._before


def test_peak_memory_is_the_stack_and_one_member() -> None:
    """With one tensor that is nearly all of the stack, so that no stacking name by name would do."""
    count, width = 24, 1024
    member = 4 * width * width
    stack_module_state(nn.Linear(width, width) for _ in range(2))  # whatever a first call sets up
    with Peak() as peak:
        params, _ = stack_module_state(nn.Linear(width, width) for _ in range(count))
    assert params["weight"].numel() * 4 == count * member
    kept_by_malloc = 5 * member  # freed, but not given back to the system at once
    held = peak.bytes - kept_by_malloc
    assert held < (count + 1) * member, f"{peak.bytes / member:.1f} members for a stack of {count}"


def test_the_memory_lives_as_long_as_the_last_view() -> None:
    width, count = 1024, 8
    params, _ = stack_module_state(nn.Linear(width, width) for _ in range(count))
    view = params["weight"][1]
    expected = view.detach().clone()
    gc.collect()
    held = resident("VmRSS")
    del params
    assert torch.equal(view, expected)
    del view
    gc.collect()
    assert held - resident("VmRSS") > (count - 1) * 4 * width * width


def test_growing_memory_moves_its_tensors_unharmed() -> None:
    column = columns.Growing(torch.zeros(1000))
    rows = [torch.full((1000,), float(index)) for index in range(200)]
    for row in rows:
        column.append(row)
    assert torch.equal(column.finish(), torch.stack(rows))


def test_growing_without_mremap_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(columns.mmap.mmap):
        def resize(self, size: int) -> None:
            raise SystemError("mmap: resizing not available--no mremap()")

    monkeypatch.setattr(columns.mmap, "mmap", Fixed)
    column = columns.Growing(torch.zeros(3))
    for index in range(50):
        column.append(torch.full((3,), float(index)))
    assert torch.equal(column.finish(), torch.arange(50.0)[:, None].expand(50, 3))


def test_tensors_from_an_iterator_are_ordinary_ones() -> None:
    params, _ = stack_module_state(nn.Linear(4, 3) for _ in range(3))
    weight = params["weight"]
    assert weight.is_leaf
    assert not weight._is_view()
    assert weight.is_contiguous()
    assert weight.data_ptr() % 64 == 0, "aligned as torch aligns, or kernels may round differently"
    assert weight.untyped_storage().nbytes() == weight.numel() * 4, "torch.save writes whole storages"
    torch.optim.SGD(params.values(), lr=1.0)
    buffer = io.BytesIO()
    torch.save(params, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["weight"], weight)


class Lengthy:
    """A container that makes its models on the way, and says how many."""

    def __init__(self, says: int, makes: int) -> None:
        self.says, self.makes = says, makes

    def __len__(self) -> int:
        return self.says

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(Counted(self.makes))


def test_a_container_that_makes_its_models_on_the_way() -> None:
    assert stack_module_state(Lengthy(4, 4))[0]["weight"].shape == (4, 3, 4)


@pytest.mark.parametrize(("makes", "found"), [(3, "3"), (5, "more")])
def test_a_container_that_miscounts_is_refused(makes: int, found: str) -> None:
    with pytest.raises(ArgumentError, match=rf"expected 4 models, got {found}\. \[MW112\]"):
        stack_module_state(Lengthy(4, makes))


def test_an_iterator_that_fails_raises_its_own_error() -> None:
    def failing() -> Iterator[nn.Module]:
        yield nn.Linear(2, 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stack_module_state(failing())


def test_subclasses_and_sparse_tensors_go_through_torch_stack() -> None:
    class Marked(torch.Tensor):
        pass

    def make() -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_buffer("marked", torch.randn(3).as_subclass(Marked))
        model.register_buffer("sparse", torch.eye(3).to_sparse())
        return model

    models = [make() for _ in range(3)]
    _, theirs = torch.func.stack_module_state(models)
    for kind in (list, iter):
        _, ours = stack_module_state(kind(models))
        assert type(ours["marked"]) is type(theirs["marked"]) is Marked
        assert torch.equal(ours["marked"], theirs["marked"])
        assert ours["sparse"].layout is torch.sparse_coo
        assert torch.equal(ours["sparse"].to_dense(), theirs["sparse"].to_dense())


def test_an_iterator_s_stack_comes_apart_again() -> None:
    members = Counted(6)
    dicts = unstack_module_state(*stack_module_state(iter(members)))
    for state, values in zip(dicts, members.values, strict=True):
        assert all(torch.equal(state[name], value) for name, value in values.items())
