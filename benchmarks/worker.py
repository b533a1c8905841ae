"""A row in a process of its own: its thread count, compiler caches and crashes do not reach another row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import row, timing
from benchmarks.machine import ROOT


def measure(request: row.Request) -> dict[str, Any]:
    """`row.measure` there, with as many threads as asked for from the first moment. Raises `row.Red`."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "row.json")
        command = (sys.executable, "-W", "ignore", "-m", "benchmarks.worker", json.dumps(asdict(request)), str(answer))
        environment = {**os.environ, **limited_to(request.threads)}
        if request.costs:
            environment |= {"TORCHINDUCTOR_CACHE_DIR": request.cache or folder}
            environment |= {"TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE": "1"}
            environment |= {"KINETO_LOG_LEVEL": "99"}  # the profiler says when it starts
        where = f"{request.name}, {request.threads} threads"
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=request.longest_s)
        except subprocess.TimeoutExpired:
            raise row.Red(f"{where}: its process hung for {request.longest_s:g} s") from None
        if not answer.exists():
            raise row.Red(f"{where}: its process ended with code {done.returncode}")
        told = json.loads(answer.read_text())
    if "red" in told:
        raise row.Red(told["red"])
    return told


def limited_to(threads: int) -> dict[str, str]:
    """The environment in which each library uses so many: JAX knows only one or all that there are."""
    found = {"OMP_NUM_THREADS": str(threads), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # others use the GPU, too
    if threads == 1:
        found["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    return found


def main(asked: str, answer: str) -> None:
    """The other end: the request as JSON, and the file that takes the row."""
    told = json.loads(asked)
    request = row.Request(**{**told, "pace": timing.Pace(**told["pace"]), "rivals": tuple(told["rivals"])})
    try:
        measured = row.measure(request)
    except row.Red as red:
        measured = {"red": str(red)}
    Path(answer).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
