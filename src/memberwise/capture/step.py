"""A captured step: records on a first call, compiles on the second of its kind, replays from then on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from memberwise._torch.building import build_ahead
from memberwise._torch.dispatch import functorch_active, mode_depth
from memberwise._torch.inductor import compiler_missing
from memberwise._torch.pool import SOURCE as POOL
from memberwise._torch.pool import pool_of
from memberwise.capture.arguments import Arguments
from memberwise.capture.assembly import Assembly, Before, Refused
from memberwise.capture.cache import Compiled, build_ahead_for, structure
from memberwise.capture.chunker import Unfit
from memberwise.capture.chunks import Run, several
from memberwise.capture.draws import host_states
from memberwise.capture.excerpt import Stacked
from memberwise.capture.graphed import graphed
from memberwise.capture.plan import Planner
from memberwise.capture.program import Program
from memberwise.capture.progress import compiling
from memberwise.capture.reach import Reach, Unfollowed
from memberwise.capture.record import Recorder
from memberwise.capture.refusals import Refusal, warn
from memberwise.capture.remembered import Remembered
from memberwise.engine.choices import noted
from memberwise.trees import tree_map

KEPT = 8
"""How many recordings of one step are kept; the least recently used goes first."""

PATIENCE = 3
"""After so many refused recordings in a row, a step runs eagerly for good."""


class CapturedStep(Unfollowed):
    """A step and its recordings.

    Attributes:
        step: the user's function.
        programs: recordings, the last used first.
        refusals: why recordings were refused, in order.
        recorded, replayed: how many calls were recorded, and how many replayed.
        plans: for each program compiled, how many members run at once, and why.
        eager: whether it runs eagerly for good.
        in_parts: whether members come a part at a time. Then state lies elsewhere in each call, and what cannot be
            compiled runs as it was recorded, since the step as it is may know only all of them.
    """

    def __init__(
        self, step: Callable[..., Any], chunk: int | str = "auto", backend: str = "inductor", steps_per_call: int = 1
    ) -> None:
        self.step = step
        self.chunk = chunk
        self.steps_per_call = steps_per_call
        self.plans: list[str] = []
        self.programs: list[Program] = []
        self.refusals: list[Refusal] = []
        self.recorded = 0
        self.replayed = 0
        self._compiled = Compiled(KEPT, backend)
        self._refused_in_a_row = 0
        self._recorded_in_a_row = 0
        self.eager = False
        self.in_parts = False
        self._warned: set[str] = set()

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the step: by a recording that stands for this call, else eagerly."""
        if self.stands_aside():
            return self.step(*args, **kwargs)
        arguments = Arguments(args, kwargs)
        found = self._matching(arguments)
        if found is not None:
            return self._replay(*found, args, kwargs)
        self._note_missed(arguments)
        return self._record(arguments, args, kwargs)

    def of_a_part(self) -> CapturedStep:
        """The same step for a part of the members; what is compiled serves all parts."""
        own = CapturedStep(self.step, self.chunk, self._compiled.backend)
        own.in_parts = True
        own.plans, own.refusals, own._compiled, own._warned = self.plans, self.refusals, self._compiled, self._warned
        return own

    def several(self, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """As many calls, one after the other: by a recording that stands for all of them, else each by itself."""
        found = None if len(calls) < 2 or self.stands_aside() else self._matching(Arguments(*calls[0]))
        if found is None or found[0].run is None or not found[0].repeats:
            return [self(*call) for call in calls]
        program, values = found
        self.replayed += len(calls)
        self._recorded_in_a_row = 0
        return program.replay_several(
            [program.of_another_call(values, Arguments(*call).tensors) for call in calls], several
        )

    def _matching(self, arguments: Arguments) -> tuple[Program, list[torch.Tensor]] | None:
        """The recording that stands for a call, now the first, and its values."""
        for program in self.programs:
            values = program.match(arguments)
            if values is not None:
                if program is not self.programs[0]:
                    self.programs.remove(program)
                    self.programs.insert(0, program)
                return program, values
        return None

    def stands_aside(self) -> bool:
        """Whether the step runs as it is: given up, or inside of something that looks at its operations."""
        return self.eager or bool(mode_depth()) or functorch_active() or torch.compiler.is_compiling()

    def _replay(self, program: Program, values: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
        if program.run is None and not program.eager:
            with compiling():
                self._compile(program, values, args, kwargs)
        if program.eager or self.eager:
            return self.step(*args, **kwargs)
        self.replayed += 1
        self._recorded_in_a_row = 0
        return program.replay(values)

    def _compile(self, program: Program, values: list[torch.Tensor], args: Any, kwargs: Any) -> None:
        """Compile a recording, at its first use, and plan how its members run; or give it up."""
        try:
            if self._builds_for(values):
                build_ahead_for(program.graph)
                program.memory = pool_of(self)
            run = self._planned(program, values, args, kwargs)
            program.run = run if self.in_parts else graphed(run, values[: program.count])
        except Exception as error:  # whatever the compiler cannot do, the step can
            if self.in_parts:
                program.run = program.graph.forward
                return
            missing = compiler_missing() if self._compiled.backend == "inductor" else ""
            if missing:
                self.eager = True
                what = f"the step runs eagerly, as no C++ compiler was found to compile it with: {missing}"
                self.warn_once("MW502", what, "Install g++ or clang++, or name a compiler in the variable CXX")
                return
            program.eager = True
            lines = str(error).strip().splitlines()  # an assertion says nothing
            refusal = Refusal("not-compiled", ": ".join([type(error).__name__, *lines[:1]]))
            self.refusals.append(refusal)
            self.warn_once("MW501", f"the step runs eagerly: {refusal.sentence()}", refusal.advice())

    def _builds_for(self, values: Sequence[torch.Tensor]) -> bool:
        """Whether a C++ compiler is called for a step of such values."""
        return self._compiled.backend == "inductor" and all(value.device.type == "cpu" for value in values)

    def _planned(self, program: Program, values: list[torch.Tensor], args: Any, kwargs: Any) -> Run:
        """Choose how many members run at once, and compile it so."""
        arguments = Arguments(args, kwargs)
        marked = [Stacked(*entry) for entry in arguments.marked]
        begin, steps = self._compiled.begin, self.steps_per_call
        planner = Planner(program, values, lambda: self._recorded(args, kwargs), begin, marked, steps)
        if self.chunk == "auto" and self._compiled.backend == "inductor":
            kind = structure(program.graph, values[: program.count]), steps
            run, text = planner.plan(Remembered(kind))
            self.plans.append(text)
            return run
        if isinstance(self.chunk, int) and self.chunk < (program.members or self.chunk + 1):
            try:
                chunks = planner.chunks(self.chunk)
                self.plans.append(f"{self.chunk} at a time, as told")
                return chunks
            except Unfit as reason:
                self.plans.append(f"all at once: {reason}")
                self.warn_once("MW505", f"all members of the step run at once: in chunks, {reason}", "Leave chunk out")
        return planner.at_once()

    def _record(self, arguments: Arguments, args: Any, kwargs: Any) -> Any:
        """Run the step eagerly, watched; keep what was recorded if it can be replayed."""
        try:
            before = self.before(arguments)
        except Refused as refused:
            self._refuse(refused.refusal)
            return self.step(*args, **kwargs)
        self.recorded += 1
        if self._builds_for(arguments.tensors):
            build_ahead([POOL])  # while the step runs eagerly, on a machine where nothing is built yet
        program, out = self.watched(before, args, kwargs)
        if isinstance(program, Refusal):
            self._refuse(program)
            return out  # with its graph: the caller may need it
        self._keep(program)
        return tree_map(_detached, out)

    def watched(self, before: Before, args: Any, kwargs: Any) -> tuple[Program | Refusal, Any]:
        """Run the step once under a recorder; the program, or why there is none, and what the step returned."""
        reach = before.reach
        recorder = Recorder(reach.generators, (*reach.places, *map(id, before.arguments.tensors)))
        drawn = host_states(reach.streams)
        with noted() as choices:
            out = recorder.watch(lambda: self.step(*args, **kwargs))
        if host_states(reach.streams) != drawn:
            recorder.refuse(Refusal("random-state", "a random stream of Python or NumPy moved"))
        try:
            program = Assembly(before, recorder).program(out)
            program.choices = choices
            return program, out
        except Refused as refused:
            return refused.refusal, out
        except Exception as error:  # the step has run; it must not fail for being watched
            return Refusal("internal", repr(error)), out

    def before(self, arguments: Arguments) -> Before:
        """What there is to know before the step runs; raises `Refused`."""
        roots = [("step", self.step), *((type(x).__name__, x) for x in arguments.objects)]
        try:
            reach = Reach(roots)
            before = Before(reach, arguments)
        except Exception as error:  # objects of users may answer anything
            raise Refused("internal", repr(error)) from error
        if reach.refusal is not None:
            raise Refused(*reach.refusal)
        return before

    def _recorded(self, args: Any, kwargs: Any) -> Program:
        """A recording of the step as it is now; raises `Refused`."""
        program, _ = self.watched(self.before(Arguments(args, kwargs)), args, kwargs)
        if isinstance(program, Refusal):
            raise Refused(*program)
        return program

    def _keep(self, program: Program) -> None:
        self._refused_in_a_row = 0
        self._recorded_in_a_row += 1
        self.programs.insert(0, program)
        del self.programs[KEPT:]

    def _refuse(self, refusal: Refusal) -> None:
        """Note a refusal, and warn, once it is clear that it will not pass by itself."""
        self.refusals.append(refusal)
        self._refused_in_a_row += 1
        self.eager = self._refused_in_a_row >= PATIENCE
        if self.eager or refusal.reason != "python-state":  # state that is made in the first call only is common
            self.warn_once("MW501", f"the step runs eagerly: {refusal.sentence()}", refusal.advice())

    def _note_missed(self, arguments: Arguments) -> None:
        """Warn of a step whose recordings are never used again."""
        if self._recorded_in_a_row >= KEPT:
            self._recorded_in_a_row = 0
            what = f"the step was recorded {KEPT} times in a row; the last time because"
            self.warn_once("MW503", f"{what} {self.programs[0].mismatch(arguments)}", "Make what changes a tensor")

    def warn_once(self, code: str, what: str, do: str) -> None:
        """Warn, unless it was said before."""
        if what not in self._warned:
            self._warned.add(what)
            warn(code, what, do)


def _detached(leaf: Any) -> Any:
    """What a replay would return: the same values without a gradient graph."""
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None else leaf
