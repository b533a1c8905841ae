"""Which random stream a generator is, and which memory a tensor lies in, as numbers; and who handles its operations.

Inside a dispatch handler torch hands out a new Python object for the same generator each time, and for the same
storage always, so `is` does not tell. `data_ptr()` does not either: empty storages have none, and a view its own.
Missing is a public way to ask whether two such objects are one thing, and how many there are of one storage.
"""

from __future__ import annotations

import torch

_OWN_DISPATCH = torch._C._disabled_torch_dispatch_impl


def stream_key(generator: torch.Generator) -> int:
    """A number that is equal for all Python objects of one generator, while one of them lives."""
    return generator._cdata  # type: ignore[attr-defined] # in no stub


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether operations on the tensor are torch's own: its class has no `__torch_dispatch__` of its own."""
    return type(tensor).__torch_dispatch__ is _OWN_DISPATCH  # type: ignore[attr-defined] # the stubs bind it wrongly


def holders(tensor: torch.Tensor) -> int:
    """A number that grows by one for each further tensor on its storage, wherever it is held."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[no-any-return] # an int


def memory_key(tensor: torch.Tensor) -> int:
    """A number that is equal for all tensors on one storage, while one of them lives."""
    return tensor.untyped_storage()._cdata
