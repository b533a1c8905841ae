"""What a figure was measured on and with: enough to compare, nothing that tells one machine's owner."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("memberwise", "torch")
ROOT = Path(__file__).parent.parent


def machine(device: str = "cpu") -> dict[str, object]:
    return {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
        "accelerator": accelerator(device),
    }


def processor() -> str:
    """The processor's name, from the kernel where it tells, and its kind: on rented machines all have one name."""
    try:
        told = dict(re.findall(r"^(.+?)\s*: *(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    except OSError:
        told = {}
    family = f"family {told['cpu family']}, " if "cpu family" in told else ""
    return f"{told.get('model name', platform.machine())} ({family}{torch.backends.cpu.get_cpu_capability()})"


def accelerator(device: str) -> str | None:
    """The device's name, where it is not the processor."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None


def versions(more: tuple[str, ...] = ()) -> dict[str, str]:
    """Of Python, this checkout, the packages that every figure depends on, and of `more`."""
    found = {"python": platform.python_version(), "commit": commit()}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The checkout's commit, with a `+` if the sources differ from it."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        return head + "+" * bool(_git("status", "--porcelain", "--", "src", "benchmarks"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
