"""What goes on around operations: modes, contexts, threads, copies, the host."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.nn.attention.flex_attention import flex_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from tests.parity.tools_table import BY_MEMBERS, WORKS, Section, Using

TABLE = row = Section("Modes, contexts, copies and the host")


def under(context: Any) -> Any:
    """A forward whose first layer runs under a context."""

    def body(self: Using, x: torch.Tensor) -> torch.Tensor:
        with context():
            hidden = self.hidden(x)
        return self.last(x + hidden.to(x.dtype))

    return body


class Sines(TorchFunctionMode):
    """Answers `tanh` by `sin`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.sin(*args) if func is torch.Tensor.tanh else func(*args, **(kwargs or {}))


class Sined(TorchDispatchMode):
    """The same below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.sin(*args) if func is torch.ops.aten.tanh.default else func(*args, **(kwargs or {}))


CONTEXTS: dict[str, Any] = {
    "`torch.profiler`": torch.profiler.profile,
    "`record_function`": lambda: torch.profiler.record_function("a"),
    "`detect_anomaly`": torch.autograd.detect_anomaly,
    "`no_grad`": torch.no_grad,
    "`torch.device` as a context": lambda: torch.device("cpu"),
    "a `TorchFunctionMode`": Sines,
    "a `TorchDispatchMode`": Sined,
    "`FlopCounterMode`": lambda: FlopCounterMode(display=False),
}
for _name, _context in CONTEXTS.items():
    row.add(_name, WORKS, under(_context))
row.add("`autocast`", WORKS, under(lambda: torch.autocast("cpu", torch.bfloat16)), dtype=torch.float32)


@row("`inference_mode`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        hidden = self.hidden(x)
    return self.last(x + hidden.clone())


@row("`set_default_dtype`, `set_default_device`, `use_deterministic_algorithms`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("cpu")
    torch.use_deterministic_algorithms(True)
    try:
        return self.last(self.hidden(x).index_add(0, torch.tensor([0, 1]), torch.ones(2, 4)))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


@row("`GradScaler`", WORKS, dtype=torch.float32)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return torch.amp.GradScaler("cpu", init_scale=4.0).scale(self.last(self.hidden(x)))


@row("`torch.distributions`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    normal = torch.distributions.Normal(hidden, 1.0)
    picked = torch.distributions.Categorical(logits=hidden).log_prob(torch.arange(5) % 4)
    return self.last(normal.rsample() * picked.unsqueeze(-1))


@row("threads, thread pools, `torch.jit.fork`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    outs: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: outs.append(self.hidden(x)))
    thread.start()
    thread.join()
    with ThreadPoolExecutor(2) as pool:
        outs += pool.map(self.hidden, [x, 2 * x])
    return self.last(sum(outs) + torch.jit.wait(torch.jit.fork(self.hidden, x)))


@row("`torch.utils.data`", BY_MEMBERS, note="it draws a seed of its own from the global stream")
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(torch.cat([self.hidden(part) for (part,) in DataLoader(TensorDataset(x), batch_size=2)]))


@row("`x.tolist()`, `x.item()`, `float(x)`, f-strings, of members' own values", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * float(self.hidden(x).sum()) * len(f"{x.sum():.3f}"))


@row("`if` and `assert` in which the members agree", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    hidden = self.hidden(x)
    assert (hidden.abs() <= 1).all()
    torch._assert((hidden.abs() <= 1).all(), "a hyperbolic tangent")
    return self.last(hidden * 2 if hidden.abs().sum() > 0 else hidden)


@row("`if` in which they differ", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x) * 2 if self.first.weight.sum() > 0 else self.hidden(x))


def branch(self: Using, x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, lambda t: self.first(t), lambda t: t.cos(), (x,))


def halved(x: torch.Tensor) -> torch.Tensor:
    """Until it is small."""
    loop: Any = while_loop(lambda t: t.abs().max() > 0.1, lambda t: (t / 2,), (x.detach(),))
    return loop[0]


row.add("`torch.cond`", BY_MEMBERS, lambda self, x: self.last(branch(self, self.hidden(x))))
row.add("`while_loop`", BY_MEMBERS, lambda self, x: self.last(self.hidden(x) + halved(self.hidden(x))))
row.add("`scan`", BY_MEMBERS, lambda self, x: self.last(scan(lambda c, t: (c + t, c * t), x[0] * 0, self.hidden(x))[1]))
row.add("`map`", BY_MEMBERS, lambda self, x: self.last(torch_map(lambda t: t.sin(), self.hidden(x))))


@row("`flex_attention` on the CPU", BY_MEMBERS, grad=False, dtype=torch.float32, note="there without a gradient")
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    heads = self.hidden(x).tile(1, 4)[None, None]
    return self.last(flex_attention(heads, heads, heads, lambda score, b, h, q, k: score + q - k)[0, 0, :, :4])


@row("`print(x)`, `repr(x)`", WORKS, note="shows what a member tensor is, and no values")
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    return self.last(self.hidden(x)) * bool(repr(self.hidden(x)))


@row("`fork_rng`, `manual_seed`", BY_MEMBERS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        noise = torch.rand(4, dtype=x.dtype)
    return self.last(self.hidden(x) + noise)


@row("`state_dict`, `load_state_dict`", WORKS)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    self.first.load_state_dict(self.first.state_dict())
    return self.last(self.hidden(x)) + self.state_dict()["last.bias"]
