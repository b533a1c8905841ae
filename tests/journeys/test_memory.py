"""What a stacked step asks of the system's memory."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

STEPS = """
import gc, resource
import torch, memberwise
torch.set_num_threads(1)
gc.disable()  # what is collected once in a while may move the heap's end, once
x = torch.randn(8, COUNT)
def step():  # temporaries, alive together
    memberwise.vmap(lambda own: sum([own + 1 for _ in range(ALIVE)]))(x)
for _ in range(TIMES):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(TIMES):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / TIMES)
"""


@functools.cache
def faults_of_a_step(mb: int, before: str = "", **environment: str) -> float:
    """Fresh pages that a step of a stack of 8 asks for whose results have so many MB, when it has run for a while."""
    alive, times = (8, 20) if mb < 10 else (2, 8)  # on some machines a gigabyte of fresh pages takes seconds
    program = STEPS.replace("COUNT", str(mb << 15)).replace("ALIVE", str(alive)).replace("TIMES", str(times))
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", before + program]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100, env=environment)
    return float(run.stdout)


AS_IT_WAS = "import memberwise.engine.memory as memory\nmemory._done = True\n"
AS_GLIBC_CAN_BY_ITSELF = "import memberwise.engine.memory as memory\nmemory._raised = lambda: False\n"
LIBC, VERSION = platform.libc_ver()
on_glibc = pytest.mark.skipif(LIBC != "glibc", reason="other allocators decide otherwise what they give back")
raised = pytest.mark.skipif(
    LIBC != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 35), reason="glibc takes no higher threshold"
)


@on_glibc
@pytest.mark.parametrize("how", ["", AS_GLIBC_CAN_BY_ITSELF], ids=["raised", "by itself"])
def test_a_step_finds_the_memory_of_the_last(how: str) -> None:
    given_back = faults_of_a_step(1, AS_IT_WAS)
    assert given_back > 100, "the system keeps it by itself: engine/memory.py has no use"
    assert faults_of_a_step(1, how) < given_back / 10


@raised
def test_blocks_larger_than_glibc_keeps_by_itself_stay_too() -> None:
    given_back = faults_of_a_step(40, AS_GLIBC_CAN_BY_ITSELF)
    assert given_back > 1000, "the system keeps it by itself: mallopt has no use"
    assert faults_of_a_step(40) < given_back / 10


@raised
def test_a_threshold_that_was_set_from_outside_stays() -> None:
    assert faults_of_a_step(40, MALLOC_MMAP_THRESHOLD_="1048576") > 1000
    assert faults_of_a_step(40, GLIBC_TUNABLES="glibc.malloc.mmap_threshold=1048576") > 1000
