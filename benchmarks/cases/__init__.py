"""The workloads, one file each; `CASES` is the table of them all, in the order they are printed."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases import cnn, critics, lstm, mlp, transformer

CASES: dict[str, Case] = {case.name: case for module in (mlp, critics, transformer, cnn, lstm) for case in module.CASES}
