"""Where to remember what is expensive to find out: beside what Inductor keeps, under names made of what it depends on.

Missing is a public way to ask for that folder; the private one takes a second, as it imports Inductor.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import hashlib
import itertools
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


def kept_at(what: Any) -> Path:
    """Where to keep something of `what`, as its `repr` tells it, on such a machine, by this version of the code."""
    return cache_folder() / "memberwise" / hashlib.sha256(repr((what, _machine())).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """Where Inductor keeps what it has compiled: `$TORCHINDUCTOR_CACHE_DIR`, or a folder of the user's for such."""
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if named:
        return Path(named)
    return Path(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser()))


def put(path: Path, known: Any) -> None:
    """Keep it as JSON; another process sees the whole file, or none. A file that cannot be written is none."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file)
        Path(name).replace(path)


def get(path: Path, made_of: Callable[[Any], Made]) -> Made | None:
    """What `made_of` makes of what was put there; None if that is nothing of which it can be made."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
        return made_of(json.loads(path.read_text()))
    return None


@functools.cache
def _machine() -> Any:
    cards = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    return processor(), os.cpu_count(), cards, torch.__version__, torch.version.git_version, _code()


def processor() -> tuple[str, ...]:
    """Which one this is, with what it can do: code is built for all of that, and a folder may be several machines'."""
    known = platform.machine(), torch.backends.cpu.get_cpu_capability()
    try:
        with Path("/proc/cpuinfo").open() as lines:
            first = "".join(itertools.takewhile(str.strip, lines))
    except OSError:  # another system than Linux
        return *known, platform.processor()
    told = re.findall(r"^(?:vendor_id|cpu family|model|model name|flags|Features)\s*: *(.*)$", first, re.MULTILINE)
    return *known, *told


def _code() -> str:
    """What makes programs and plans, as text: another version of it may make others."""
    package = Path(__file__).parent.parent
    files = sorted(
        file for folder in ("_torch", "capture", "kernels") for file in (package / folder).iterdir() if file.is_file()
    )
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
