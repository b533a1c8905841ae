"""The workloads, one file each; `CASES` is the table of them all, in the order they are printed."""

from __future__ import annotations

from benchmarks.case import Case
from benchmarks.cases import (
    adapters,
    cnn,
    critics,
    gpt,
    graphs,
    images,
    lstm,
    mlp,
    perceptrons,
    sequences,
    tables,
    transformer,
)

FIRST: tuple[Case, ...] = tuple(case for module in (mlp, critics, transformer, cnn, lstm) for case in module.CASES)
"""The first table: small models, one Adam."""

WORKLOADS: tuple[Case, ...] = (
    *(case for module in (perceptrons, images, gpt) for case in module.CASES),
    *transformer.CASES,
    *(case for module in (sequences, adapters, graphs, tables) for case in module.CASES),
)
"""The table of workloads, W1 to W12."""

CASES: dict[str, Case] = {case.name: case for case in (*FIRST, *WORKLOADS)}
