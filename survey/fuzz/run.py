"""A recorded run of random cases, stack against loop: `make check-fuzz ARGS="--programs 100000 --sequences 5000"`.

Cases run in chunks, each in a process of its own: one that ends the process, or does not come back, is recorded like
one that is wrong, and the rest of its chunk goes on after it. Case k of a seed is always the same one. Results are
written chunk by chunk; `--resume` goes on where runs of the same seed stopped, and runs chunks with failures again.
`--part 0/2` and `--part 1/2`, side by side with `--resume`, take every second chunk each, and write to one file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED as FIRST
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from survey.fuzz import results
from survey.fuzz.results import CRASHED, SILENT
from survey.fuzz.worker import KINDS, PROGRAMS, SEQUENCES, case
from survey.records import RESULTS

WORKER = [sys.executable, "-m", "survey.fuzz.worker"]
CHUNK = {PROGRAMS: 500, SEQUENCES: 100}
PATIENCE_S = 300
"""A chunk whose case says nothing for so long is ended; to shrink a failure takes a while."""


def lines(kind: str, seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """What became of each case of a chunk, whatever becomes of the processes that run it."""
    while first < last:
        for line in _of_one_process(kind, seed, first, last):
            first += 1
            yield line


def _of_one_process(kind: str, seed: int, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Lines up to the end of the process; the last one says so, if it is not the end of the chunk."""
    command = [*WORKER, kind, f"--seed={seed}", f"--first={first}", f"--last={last}"]
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
            if not text.endswith("\n"):  # the process is gone, in the middle of a line perhaps
                ended = SILENT if silent.is_set() else CRASHED
                drawn = case(kind, seed, index).to_json()
                yield {"kind": ended, "steps": 0, "what": f"exit status {run.wait()}", "case": drawn}
                return
            yield json.loads(text)


def recorded(
    kind: str, seed: int, cases: int, workers: int, path: Path, part: tuple[int, int] = (0, 1)
) -> dict[str, Any]:
    """Run what of the cases has not run, or has failed, and write it down chunk by chunk; what there is in the end."""
    size, (own, parts) = CHUNK[kind], part
    sizes = {number: min(size, cases - number * size) for number in range(own, -(-cases // size), parts)}
    done = results.known(path, kind)
    wanted = [number for number, wants in sizes.items() if done.get(number, 0) < wants]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as bar, ThreadPoolExecutor(workers) as pool:
        task = bar.add_task(kind, total=sum(sizes[number] for number in wanted))

        def run(number: int) -> tuple[int, list[dict[str, Any]]]:
            found = []
            for line in lines(kind, seed, number * size, number * size + sizes[number]):
                found.append(line)
                bar.advance(task)
            return number, found

        waiting: set[Future[Any]] = {pool.submit(run, number) for number in wanted}
        try:
            while waiting:
                done_now, waiting = wait(waiting, return_when=FIRST)
                for future in done_now:
                    number, found = future.result()
                    now = results.add(path, seed, kind, number, results.chunk_of(number * size, found))
                    bar.update(task, description=f"{kind}, {len(now['failures'])} failed")
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
    return results.of(path, kind)


def told(kind: str, now: dict[str, Any]) -> int:
    """Print what a run came to; how many cases failed."""
    for failure in now["failures"]:
        print(f"{kind} {failure['index']} {failure['kind']}: {failure['what']}\n  {failure['case']}")
    print(f"{now['cases']} {kind}, {now['steps']} steps: {now['counts']}")
    return len(now["failures"])


def _part(text: str) -> tuple[int, int]:
    own, parts = map(int, text.split("/"))
    if not 0 <= own < parts:
        raise ValueError(text)
    return own, parts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=2000, help="how many; 100000 take half an hour of one core")
    parser.add_argument("--sequences", type=int, default=200, help="how many; 5000 take seven minutes of one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--part", type=_part, default=(0, 1), metavar="K/N", help="every N-th chunk, from the K-th on")
    parser.add_argument("--resume", action="store_true", help="go on with the run that the results are of")
    parser.add_argument("--results", type=Path, default=RESULTS / "fuzz.json")
    chosen = parser.parse_args()
    results.begin(chosen.results, chosen.seed, resume=chosen.resume)
    failed = 0
    for kind in KINDS:
        cases = getattr(chosen, kind)
        now = recorded(kind, chosen.seed, cases, chosen.workers, chosen.results, chosen.part)
        failed += told(kind, now)
    print(chosen.results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
