"""Stacks from live models, and from a factory and seeds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn

from memberwise.attributes import Attributes
from memberwise.differences import kind_of, listed, warn_of_settings
from memberwise.differing import settle
from memberwise.errors import ArgumentError, StackWarning, StateError, fail, text
from memberwise.form import form_of, state
from memberwise.gathering import Gathered, checked, gather, modules
from memberwise.generators import make_generators
from memberwise.grouped import Group
from memberwise.lazy import Examples
from memberwise.module import Stack
from memberwise.names import tied
from memberwise.strangers import strangers


def stack(
    models: Iterable[nn.Module],
    shared: Sequence[str] = (),
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Stack:
    """Stack M live models of one class into one module; the models stay as they are.

    Shapes: a parameter or buffer `(*s)` becomes `(M, *s)`, a copy; dtypes and devices stay. State that is one object
    in all models must be named in `shared`; the stack then holds that very object, in its own shape, once.

    Args:
        models: a sequence, `nn.ModuleList` or iterator of modules.
        shared: names of shared state, or patterns of them: `"trunk.*"`.
        example_inputs: a tuple of arguments, for lazy models (`nn.LazyLinear` and the like): each that has tensors
            without values is called on them once, in its own mode, as it comes; `each(x)` marks what has an entry a
            member. Parameters get the values, and the random stream ends, as after that call alone. All else that the
            call does to a model is undone: its first batch does not count in running statistics, for example.
        example_kwargs: keyword arguments of that call.

    Raises:
        StateError: (a RuntimeError) as `stack_module_state` [MW101 to MW104]; a lazy model fails on the example
            inputs [MW104]; state is one object in all models and not named in `shared`, or the other way around
            [MW105]; a model cannot be copied [MW301].

    Warns:
        StackWarning: models differ outside their tensors in what no rule takes [MW106], as in an activation: the
            modules that hold it run member by member. (Rates, eps and the like run as one, each member with its own.)

    >>> import torch
    >>> stacked = stack([nn.Linear(3, 2) for _ in range(4)])
    >>> stacked(torch.zeros(5, 3)).shape
    torch.Size([4, 5, 2])
    >>> stack([nn.LazyLinear(2) for _ in range(4)], example_inputs=(torch.zeros(5, 3),)).weight.shape
    torch.Size([4, 2, 3])
    """
    shared = (shared,) if isinstance(shared, str) else tuple(shared)
    attributes = Attributes()
    checked(models)
    count = len(models) if isinstance(models, Sized) else None
    models = Examples(example_inputs, example_kwargs).materialised(models)
    noted = _noted(models, attributes, shared)
    gathered = gather(noted, shared=shared, for_stack=True, count=count, caller="stack", stacklevel=2)
    return _made(gathered, attributes, stacklevel=2)


def group(
    models: Iterable[nn.Module],
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Group:
    """Group M live models of any architectures into one module, of as few stacks as can run as one.

    Models are in one stack if they have one class, and in it the same classes of submodules, names, shapes, dtypes,
    ties and flags; numbers (dropout rates, eps) and modes may differ. The models stay as they are.

    Args:
        models: a sequence, `nn.ModuleList` or iterator of modules.
        example_inputs, example_kwargs: for lazy models, as in `stack`.

    Raises:
        StateError: (a RuntimeError) there is no model [MW101], a lazy module has no values yet [MW104], state is one
            object in several models [MW105], a model cannot be copied [MW301].
        KindError: (a TypeError) something is not a module [MW108].

    >>> import torch
    >>> grouped = group([nn.Linear(3, 2), nn.Linear(3, 1), nn.Linear(3, 2)])
    >>> [tuple(out.shape) for out in grouped(torch.zeros(5, 3))], len(grouped.stacks)
    ([(5, 2), (5, 1), (5, 2)], 2)
    """
    kinds: dict[Any, list[int]] = {}
    found: list[nn.Module] = []
    for model in modules(Examples(example_inputs, example_kwargs).materialised(checked(models)), None):
        kinds.setdefault(kind_of(form_of(model)), []).append(len(found))
        found.append(model)
    if not found:
        fail(StateError, "MW101", "group: expected at least one model, got 0")
    _check_apart(found, [*kinds.values()])
    return Group([stack([found[member] for member in members]) for members in kinds.values()], kinds.values())


def _check_apart(models: Sequence[nn.Module], kinds: Sequence[Sequence[int]]) -> None:
    """No stack holds what another holds too: it would be two copies."""
    owners: dict[int, tuple[int, int]] = {}
    lines = []
    for kind, members in enumerate(kinds):
        for member in members:
            for name, tensor in state(models[member]).items():
                other, of = owners.setdefault(id(tensor), (kind, member))
                if other != kind:
                    lines.append(f"'{name}' of member {member} is one object with a tensor of member {of}")
    if lines:
        what = f"expected models of different architectures to have nothing in common:\n{listed(lines)}"
        fail(StateError, "MW105", what, do="Give each its own copy (copy.deepcopy)")


def build(
    factory: Callable[[], nn.Module],
    *,
    seeds: Iterable[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> Stack:
    """Stack the models that `factory()` makes, one a seed: member i is `torch.manual_seed(seeds[i]); factory()`.

    The factory runs on the CPU, the global random stream is left as it was, and each member goes into the stack as
    it comes: no more is held than the stack and two members. Member i keeps the stream of its seed, from where the
    factory left it (`stack.generators`): its later draws are those of the lone script. On another device that stream
    starts at the seed.

    Args:
        factory: makes one model.
        seeds: M ints.
        device: where to put the stack; the factory's models are moved there one by one.
        dtype: of floating and complex tensors.
        example_inputs, example_kwargs: for lazy models, as in `stack`: each is called on them after it was made, under
            its seed, and before it is moved.

    Raises:
        ArgumentError: (a ValueError) seeds are no ints, or there are none [MW302].
        StateError: (a RuntimeError) as `stack`.

    >>> import torch
    >>> stacked = build(lambda: nn.Linear(3, 2), seeds=range(4))
    >>> lone = torch.manual_seed(2) and nn.Linear(3, 2)
    >>> torch.equal(stacked[2].weight, lone.weight)
    True
    """
    numbers = _checked(seeds)
    streams: list[torch.Generator] = []
    attributes = Attributes()
    examples = Examples(example_inputs, example_kwargs)
    gathered = gather(
        _noted(_seeded(factory, numbers, streams, examples), attributes),
        for_stack=True,
        count=len(numbers),
        device=device,
        dtype=dtype,
        caller="build",
        stacklevel=2,
    )
    out = _made(gathered, attributes, stacklevel=2)
    place = next(out.parameters(), next(out.buffers(), torch.empty(0))).device
    out.generators = streams if place.type in ("cpu", "meta") else make_generators(numbers, place)
    return out


def _checked(seeds: Iterable[int]) -> list[int]:
    numbers = list(seeds)
    strangers = [seed for seed in numbers if isinstance(seed, bool) or not hasattr(seed, "__index__")]
    if strangers or not numbers:
        fail(ArgumentError, "MW302", f"seeds: expected ints, at least one, got {strangers or numbers}")
    return [seed.__index__() for seed in numbers]


def _seeded(
    factory: Callable[[], nn.Module], seeds: Sequence[int], streams: list[torch.Generator], examples: Examples
) -> Iterator[nn.Module]:
    """One model a seed, made under that seed; and, in `streams`, where each model's stream stands afterwards."""
    for member, seed in enumerate(seeds):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = factory()
            examples.materialise(model, member)
            streams.append(torch.Generator().set_state(torch.default_generator.get_state()))
        yield model
        del model


def _noted(models: Iterable[nn.Module], attributes: Attributes, shared: Sequence[str] = ()) -> Iterator[nn.Module]:
    """The models, their attributes noted; if one has what no stack can hold, all of it is listed, in all models."""
    lines: list[str] = []
    member = 0
    for model in models:
        if isinstance(model, nn.Module):
            lines += [f"member {member}: {line}" for line in strangers(model, shared)]
            if not lines:
                attributes.take(model)
        if not lines:
            yield model
        del model
        member += 1  # noqa: SIM113 `enumerate` would hold a model while the next one is made
    if lines:
        what = f"expected plain modules and tensors, which a stack can hold:\n{listed(lines)}"
        fail(StateError, "MW113", what, do="docs/tools.md lists what works instead")


def _made(gathered: Gathered, attributes: Attributes, stacklevel: int) -> Stack:
    if attributes.overlaps:
        what = f"tensors of one member share memory, which their stack does not:\n{listed(attributes.overlaps)}"
        do = "What is written to one of them no longer shows in the other; make the view where it is used"
        warnings.warn(text("MW107", what, do=do), StackWarning, stacklevel=stacklevel + 1)
    tensors = {**gathered.params, **gathered.buffers}
    named = {str(name): _as_parameter(tensor, name in gathered.params) for name, tensor in tensors.items()}
    template, carried = attributes.template(named)
    keys = {key for name in gathered.shared for key in (name, *tied(gathered.form.key(name)))}
    out = Stack(template, gathered.count, shared=keys, attributes=attributes)
    slots = out.__memberwise_slots__()
    slots.carried = carried
    slots.apart = {member: tuple(modes.values()) for member, modes in gathered.modes.items()}
    slow = settle(slots, attributes, gathered.settings)
    if slow:
        do = "Each runs with its own, and the modules that hold these run member by member, as slow as a loop"
        warn_of_settings(slow, do, stacklevel + 1)
    return out


def _as_parameter(tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
    if not is_parameter or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), tensor.requires_grad)
