"""What every test runs under: one thread, one compiler process, hypothesis without deadlines, the seed printed; and
strict, so that an error in a rule is no slow path."""

from __future__ import annotations

import gc
import os

# Read when torch and memberwise are first imported. Pools of compiler processes would cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MEMBERWISE_STRICT", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from tests import elsewhere, plans

PLAN = os.environ.get("MEMBERWISE_PLAN", "")
DEVICE = os.environ.get("MEMBERWISE_DEVICE", "cpu")
SEED = int(os.environ.get("MEMBERWISE_SEED", "0"))

# In CI the examples are the same each time; at a desk they are new, and a failure prints how to run it again.
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile("desk", deadline=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")


def pytest_report_header() -> str:
    """The line at the top of a run that tells how to repeat it."""
    profile = "ci" if os.environ.get("CI") else "desk"
    return f"torch {torch.__version__}, MEMBERWISE_SEED={SEED}, hypothesis profile {profile}"


def pytest_configure() -> None:
    """One thread a worker: small tensors run fastest so, and the workers share the cores."""
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        elsewhere.use(DEVICE)
    elif not torch.accelerator.is_available():
        torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = _no_device_to_seed
    if PLAN:
        plans.force(PLAN)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Torch may use two cores, as when nothing was said."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _no_device_to_seed(seed: int) -> None:
    """Torch's own write the whole stack down at each `torch.manual_seed`, for a device that may yet come: 2 ms."""


def pytest_collection_finish() -> None:
    """What thousands of collected tests hold need not be looked through at each collection of garbage, and one for
    each 700 objects takes a sixth of the time: tests of what goes with what collect by themselves."""
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test draws from the same state of the global generators, whatever ran before it."""
    random.seed(SEED)
    torch.manual_seed(SEED)
    yield
