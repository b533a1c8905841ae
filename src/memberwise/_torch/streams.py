"""Which random stream a generator is.

Inside a dispatch handler torch hands out a new Python object for the same generator each time, so `is` does not tell.
Missing is a public way to ask whether two generator objects are one stream.
"""

from __future__ import annotations

import torch


def stream_key(generator: torch.Generator) -> int:
    """A number that is equal for all Python objects of one generator, while one of them lives."""
    return generator._cdata  # type: ignore[attr-defined] # in no stub
