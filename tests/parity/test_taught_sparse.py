"""Lesson: what is not strided is refused, or run by members, before it is wrapped: else autograd ends the process."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

EXPRESSIONS = {
    "csr": "own.to_sparse_csr() @ own",
    "csc": "own.to_sparse_csc() @ own",
    "coo": "torch.sparse.mm(own.to_sparse(), own)",
    "bsr": "own.detach().to_sparse_bsr((2, 2)).to_dense() * own",
    "fresh csr": "torch.eye(4, dtype=own.dtype).to_sparse_csr() @ own",
    "fresh coo": "torch.sparse.mm(torch.eye(4, dtype=own.dtype).to_sparse(), own)",
    "closure csr": "csr @ own",
    "closure coo": "torch.sparse.mm(coo, own)",
    "coo constructor": "torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 2]]), own[0, :2], (4, 4)).to_dense() * own",
    "csr constructor": "torch.sparse_csr_tensor([0, 1, 2], [0, 1], own[0, :2], (2, 4)) @ own",
    "csr reduced": "torch.sparse.mm(own.detach().to_sparse_csr(), own, 'sum')",
    "closure csr reduced": "torch.sparse.mm(csr, own, 'mean')",
    "closure csr largest": "torch.sparse.mm(csr, own, 'amax')",
    "sampled": "torch.sparse.sampled_addmm(csr, own, own).to_dense()",
    "sparse gradient": "F.embedding(torch.tensor([0, 2]), own, sparse=True)",
    "nested": "torch.nested.nested_tensor([own[0], own[1, :2]]).to_padded_tensor(0.0) * own[:2]",
    "quantized": "torch.quantize_per_tensor(own.detach().float(), 0.1, 0, torch.qint8).dequantize() * own",
    "mkldnn": "own.detach().float().to_mkldnn().to_dense() * own",
}
"""One member's function, as text: each runs in another process, which some of them have ended."""

CODE = """
import warnings
import torch, memberwise
from torch.nn import functional as F

warnings.simplefilter("ignore")
torch.manual_seed(0)
x = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
csr, coo = torch.eye(4).double().to_sparse_csr(), torch.eye(4).double().to_sparse()

def dense(grad):
    return None if grad is None else grad.to_dense()

for name, expression in EXPRESSIONS.items():
    func = eval("lambda own: " + expression)
    lone = torch.stack([func(row) for row in x])
    lone_grads = [torch.autograd.grad(func(row).sum(), row, allow_unused=True)[0] for row in x.unbind()]
    print(f"{name}: ...", flush=True)
    try:
        out = memberwise.vmap(func)(x)
        torch.testing.assert_close(out, lone)
        (grad,) = torch.autograd.grad(out.sum(), x, allow_unused=True)
        for k, expected in enumerate(lone_grads):
            torch.testing.assert_close(None if grad is None else grad.to_dense()[k], dense(expected))
        print(f"{name}: right", flush=True)
    except memberwise.errors.MemberwiseError as error:
        print(f"{name}: refused" if error.code else f"{name}: refused without a code: {error}", flush=True)
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
"""


@functools.cache
def answers() -> dict[str, str]:
    """What came of each expression; one that ends the process is left out of the next."""
    left, found = dict(EXPRESSIONS), dict[str, str]()
    while left:
        code = f"EXPRESSIONS = {left!r}\n{CODE}"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
        for line in run.stdout.splitlines():
            name, _, answer = line.partition(": ")
            found[name] = answer
        started = [name for name in left if name in found]
        if not started:
            raise AssertionError(run.stderr)
        for name in started:
            del left[name]
            if found[name] == "...":
                found[name] = f"ended the process with {run.returncode}: {run.stderr[-300:]}"
    return found


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_right_or_refused_by_code(name: str) -> None:
    assert answers()[name] in ("right", "refused")
