"""The suite on another device: what a test makes without naming a device is made there.

    MEMBERWISE_DEVICE=cuda python -m pytest ...

The names that make tensors and random streams are replaced for the whole test process. A mode
(`torch.set_default_device`) would not do: it stands between the user and every operation, and the runs would take
another path than a user's do. Numbers drawn from a seeded stream differ from the CPU's; the tests compare with
lone runs on the same device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FACTORIES = [
    *("tensor", "as_tensor", "from_numpy", "scalar_tensor", "sparse_coo_tensor"),
    *("zeros", "ones", "empty", "full", "eye", "arange", "linspace", "logspace", "empty_strided"),
    *("rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "hann_window"),
]


def use(name: str) -> None:
    """Make `name` the device of everything that names none."""
    import memberwise  # noqa: F401 - its tables name torch's functions, and have to name the true ones

    device = torch.device(name)
    torch.backends.cudnn.allow_tf32 = False  # float32 is compared as float32
    for factory in FACTORIES:
        made = getattr(torch, factory)
        setattr(torch, factory, _made_on(device, made))
    torch.Generator = _generators_on(device)
    streams = getattr(torch, device.type)
    torch.get_rng_state, torch.set_rng_state = streams.get_rng_state, streams.set_rng_state
    torch.random.fork_rng = _forked(device, torch.random.fork_rng)


def _made_on(device: torch.device, factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("device") is not None or kwargs.get("out") is not None
        if named or factory.__name__ in ("from_numpy", "as_tensor"):
            found = factory(*args, **kwargs)
            return found.to(device) if not named and not isinstance(args[0], torch.Tensor) else found
        return factory(*args, **{**kwargs, "device": device})

    return made


def _generators_on(device: torch.device) -> type:
    original = torch.Generator

    class OfAnyKind(type(original)):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, original)

        def __call__(cls, device: Any = device) -> Any:
            return original(device=device)

    return OfAnyKind("Generator", (original,), {})


def _forked(device: torch.device, fork: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def forked(devices: Any = None, **options: Any) -> Iterator[None]:
        with fork(devices=[torch.cuda.current_device()], **{**options, "device_type": device.type}):
            yield

    return forked
