"""Modules that are not plain Python any more, or not on their own: compiled, scripted, traced, quantised, parallel."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import distributed, fx, nn
from torch.ao.quantization import quantize_dynamic
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from tests.parity.tools_table import BY_MEMBERS, WORKS, Section, Using

TABLE = row = Section("Modules of other kinds")
F32 = torch.float32


def first_as(change: Any) -> Any:
    """Put the first layer, changed, in its own place."""
    return lambda model: setattr(model, "first", change(model.first))


row.add("a submodule in `torch.compile`", WORKS, make=first_as(lambda m: torch.compile(m, backend="eager")))
row.add("`submodule.compile()`", WORKS, make=lambda model: model.first.compile(backend="eager"))
row.add("`model.compile()`", WORKS, make=lambda model: model.compile(backend="eager"))
_compiled = torch.compile(lambda t: t.sin() * 2, backend="eager")
row.add("a function in `torch.compile`", WORKS, lambda self, x: self.last(_compiled(self.hidden(x))))
row.add(
    "`torch.compiler.disable`",
    WORKS,
    lambda self, x: self.last(torch.compiler.disable(lambda t: t.sin())(self.hidden(x))),
)

row.add("a scripted submodule", "MW113", make=first_as(torch.jit.script))
row.add(
    "a traced submodule",
    "MW113",
    make=first_as(lambda m: torch.jit.trace(m, torch.ones(5, 4), check_trace=False)),
    dtype=F32,
)
row.add("a frozen submodule", "MW113", make=first_as(lambda m: torch.jit.freeze(torch.jit.script(m.eval()))))
_scripted = torch.jit.trace(lambda t: t.sin() * 2, torch.ones(2))
row.add("a traced or scripted function", WORKS, lambda self, x: self.last(_scripted(self.hidden(x))))

row.add("`fx.symbolic_trace`", WORKS, make=first_as(fx.symbolic_trace))
row.add("`torch.export` modules", BY_MEMBERS, make=first_as(lambda m: torch.export.export(m, (_x(m),)).module()))
row.add(
    "`torch.export.unflatten`",
    "MW301",
    make=first_as(lambda m: torch.export.unflatten(torch.export.export(m, (_x(m),)))),
    note="torch's own class cannot be copied",
)


def _x(module: nn.Module) -> torch.Tensor:
    return torch.ones(5, 4, dtype=next(module.parameters()).dtype)


def quantised(kind: type, module: nn.Module) -> nn.Module:
    return quantize_dynamic(nn.Sequential(module), {kind})


row.add("a layer quantised by `torch.ao`", "MW113", make=first_as(partial(quantised, nn.Linear)), dtype=F32)
row.add(
    "a recurrent layer quantised by `torch.ao`",
    "MW113",
    lambda self, x: self.last(self.recurrent(x[None])[0][0]),
    make=lambda model: setattr(model, "recurrent", quantised(nn.LSTM, nn.LSTM(4, 4))[0]),
    dtype=F32,
)

row.add("`DataParallel` on the CPU", WORKS, make=first_as(nn.DataParallel))


def alone_in_its_group() -> None:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)


def exchanging(module: nn.Module) -> nn.Module:
    alone_in_its_group()
    return nn.parallel.DistributedDataParallel(module)


def spread(model: Using) -> None:
    alone_in_its_group()
    fully_shard(model.first, mesh=init_device_mesh("cpu", (1,)))


row.add("`DistributedDataParallel`", "MW113", make=first_as(exchanging), note="wrap the stack")
row.add("parameters that are DTensors (`fully_shard`)", "MW113", make=spread)

row.add("`parametrizations.weight_norm`", WORKS, make=first_as(parametrizations.weight_norm))
row.add("`parametrizations.spectral_norm`", BY_MEMBERS, make=first_as(parametrizations.spectral_norm))
row.add("`parametrizations.orthogonal`", WORKS, make=first_as(parametrizations.orthogonal))


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.triu() + weight.triu(1).T


@row(
    "`parametrize.register_parametrization`, `cached`",
    WORKS,
    make=lambda model: parametrize.register_parametrization(model.first, "weight", Symmetric()),
)
def _(self: Using, x: torch.Tensor) -> torch.Tensor:
    with parametrize.cached():
        return self.last(self.first(self.hidden(x)))


row.add("`nn.utils.prune`", WORKS, make=lambda model: prune.l1_unstructured(model.first, "weight", 0.5))
