"""A recorded run of random programs, stack against loop: `make check-fuzz ARGS="--programs 100000"`.

Programs run in chunks, each in a process of its own: one that ends the process, or does not come back, is recorded
like one that is wrong, and the rest of its chunk goes on after it. Program k of a seed is always the same one. Results
are written as they come; `--resume` goes on where a run of the same seed stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED as FIRST
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import machine
from survey.fuzz.compare import MEMBERS, REFUSED, WRONG
from survey.fuzz.worker import case
from survey.records import RESULTS

CHUNK = 500
PATIENCE_S = 300
"""A chunk whose program says nothing for so long is ended; to shrink a failure takes a while."""
CRASHED, SILENT = "crashed", "silent"
FAULTS = (WRONG, CRASHED, SILENT)


def lines(seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What became of each program of a chunk, whatever becomes of the processes that run it."""
    while first < last:
        found = _of_one_process(seed, first, last)
        for line in found:
            first += 1
            yield line
        if first < last:
            first += 1


def _of_one_process(seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Lines up to the end of the process; the last one says so, if it is not the end of the chunk."""
    command = [sys.executable, "-m", "survey.fuzz.worker", f"--seed={seed}", f"--first={first}", f"--last={last}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as run:
        assert run.stdout is not None
        silent = threading.Event()
        for index in range(first, last):
            clock = threading.Timer(PATIENCE_S, lambda: (silent.set(), run.kill()))
            clock.start()
            text = run.stdout.readline()
            clock.cancel()
            if not text:
                kind = SILENT if silent.is_set() else CRASHED
                yield {
                    "kind": kind,
                    "steps": 0,
                    "what": f"exit status {run.wait()}",
                    "program": case(seed, index).to_json(),
                }
                return
            yield json.loads(text)


class Tally:
    """What is known of a run, and is written down."""

    def __init__(self, seed: int, path: Path, before: dict[str, Any] | None) -> None:
        before = before or {}
        self.path, self.seed = path, seed
        self.chunks: list[int] = before.get("chunks", [])
        self.counts = Counter[str](before.get("counts", {}))
        self.codes = Counter[str](before.get("refusals", {}))
        self.steps: int = before.get("steps", 0)
        self.failures: list[dict[str, Any]] = before.get("failures", [])

    def add(self, chunk: int, found: list[dict[str, Any]]) -> None:
        self.chunks.append(chunk)
        for index, line in enumerate(found, chunk * CHUNK):
            self.counts[line["kind"]] += 1
            self.steps += line["steps"]
            if line["kind"] == REFUSED:
                self.codes[line["code"]] += 1
            elif line["kind"] in FAULTS:
                self.failures.append({"index": index, **line})

    def write(self) -> None:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "seed": self.seed,
            "members": MEMBERS,
            "programs": sum(self.counts.values()),
            "steps": self.steps,
            "counts": dict(self.counts),
            "refusals": dict(self.codes),
            "chunks": sorted(self.chunks),
            "failures": self.failures,
        }
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(json.dumps(document, indent=1) + "\n")


def recorded(seed: int, programs: int, workers: int, path: Path, *, resume: bool = False) -> Tally:
    """Run what of the programs has not run, and write it down chunk by chunk."""
    before = json.loads(path.read_text()) if resume and path.exists() else None
    tally = Tally(seed, path, before if before is not None and before["seed"] == seed else None)
    wanted = [chunk for chunk in range(-(-programs // CHUNK)) if chunk not in tally.chunks]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task("programs", total=programs, completed=sum(tally.counts.values()))

        def run(chunk: int) -> tuple[int, list[dict[str, Any]]]:
            found = []
            for line in lines(seed, chunk * CHUNK, min((chunk + 1) * CHUNK, programs)):
                found.append(line)
                bar.advance(task)
            return chunk, found

        waiting: set[Future[Any]] = {pool.submit(run, chunk) for chunk in wanted}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST)
                for future in done:
                    tally.add(*future.result())
                tally.write()
                bar.update(task, description=f"programs, {len(tally.failures)} failed")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000, help="how many; 100000 take half an hour of one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--resume", action="store_true", help="go on with the run that the results are of")
    parser.add_argument("--results", type=Path, default=RESULTS / "fuzz.json")
    chosen = parser.parse_args()
    tally = recorded(chosen.seed, chosen.programs, chosen.workers, chosen.results, resume=chosen.resume)
    for failure in tally.failures:
        print(f"program {failure['index']} {failure['kind']}: {failure['what']}\n  {failure['program']}")
    print(f"{sum(tally.counts.values())} programs, {tally.steps} steps: {dict(tally.counts)}; {chosen.results}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
