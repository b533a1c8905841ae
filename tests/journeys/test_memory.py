"""What a stacked step asks of the system's memory."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch, memberwise
torch.set_num_threads(1)
x = torch.randn(8, 1 << 15)
def step():  # eight temporaries of a megabyte, alive together
    memberwise.vmap(lambda own: sum([own + 1 for _ in range(8)]))(x)
for _ in range(20):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20)
"""


def faults_of_a_step(before: str = "") -> float:
    """Fresh pages that a step of a stack of 8 asks for, when it has run for a while."""
    run = subprocess.run(
        [sys.executable, "-c", before + STEPS], capture_output=True, text=True, check=True, timeout=100
    )
    return float(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators decide otherwise what they give back")
def test_a_step_finds_the_memory_of_the_last() -> None:
    given_back = faults_of_a_step("import memberwise.engine.memory as memory\nmemory._done = True\n")
    assert given_back > 100, "the system keeps it by itself: engine/memory.py has no use"
    assert faults_of_a_step() < given_back / 10
