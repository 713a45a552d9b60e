"""Ends every writer at random moments, fills its disk, and looks at what is left.

    python -m tests.attack.chaos --kills 1000 --seed 0
    python -m tests.attack.chaos --writers add-task,batch --seconds 60
    python -m tests.attack.chaos --writers add-task --case 17

After each case the output must be the old one, the new one or nothing, whole. The same command again must then give
what an undisturbed one gives, and leave nothing else. Case n of a seed is the same in every run, but for those that are
ended at a moment of time. Exit code 1 says that there are faults.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from edgecompose.errors import EdgeComposeError
from tests.attack.chaos_writers import WRITERS, Writer, make_parts, names, outcome
from tests.attack.disturbance import MODES, Disturbance, End, run_disturbed

#: Seconds after which a run hangs.
_LONGEST = 120.0
#: Of quick writers, in seconds; slower ones get fewer cases, but so many at least.
_QUICK, _FEWEST = 0.1, 5


@dataclass(slots=True)
class Summary:
    """What came of a writer: cases by how its process ended and by what was there then, and the faults."""

    writer: str
    ends: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        counts = {"ends": dict(self.ends), "states": dict(self.states)}
        return {"writer": self.writer, **counts, "faults": self.faults, "seconds": round(self.seconds, 1)}


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run from beginning to end: its steps and seconds, what was there before and after, and all names."""

    steps: int
    seconds: float
    old: Any
    new: Any
    names: list[str]
    bytes: int


class Chaos:
    """The cases of one writer in a folder of its own."""

    def __init__(self, writer: Writer, parts: Path, root: Path, seed: int) -> None:
        self._writer, self._parts, self._root, self._seed = writer, parts, root, seed
        self._start = root / "start"
        self._start.mkdir(parents=True)
        writer.prepare(self._start, parts)
        self.summary = Summary(writer.name)
        self._whole = self._undisturbed()

    def run(self, case: int) -> None:
        """Disturb a run, look at what it left, and run it again."""
        began, folder = time.monotonic(), self._root / f"case-{case}"
        rng = random.Random(f"{self._seed}:{self._writer.name}:{case}")
        disturbance = self._choose(rng, case)
        shutil.copytree(self._start, folder, symlinks=True)
        try:
            end = self._attempt(folder, disturbance)
            self.summary.ends[end.how] += 1
            self._check(folder, disturbance, end)
        except (AssertionError, EdgeComposeError, OSError, ValueError) as problem:
            self.summary.faults.append(f"case {case} of seed {self._seed}, {disturbance}: {problem!s:.600}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self.summary.seconds += time.monotonic() - began

    def _undisturbed(self) -> Undisturbed:
        folder = self._root / "undisturbed"
        shutil.copytree(self._start, folder, symlinks=True)
        old = outcome(folder, self._writer)
        end = self._attempt(folder, Disturbance("none"))
        if end.how != "done":
            raise RuntimeError(f"'{self._writer.name}' fails by itself: {end.log}")
        new = outcome(folder, self._writer)
        path = folder / self._writer.output
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        size = max(p.stat().st_size for p in files)
        return Undisturbed(end.steps, end.seconds, old=old, new=new, names=names(folder), bytes=size)

    def _choose(self, rng: random.Random, case: int) -> Disturbance:
        whole, mode = self._whole, MODES[case % len(MODES)]
        return Disturbance(
            mode,
            step=rng.randint(1, whole.steps),
            seconds=rng.uniform(0, 1.1 * whole.seconds),
            bytes=rng.randint(0, whole.bytes),
        )

    def _attempt(self, folder: Path, disturbance: Disturbance) -> End:
        writer, parts = self._writer, self._parts
        return run_disturbed(lambda: writer.run(folder, parts), folder, disturbance, longest=_LONGEST)

    def _check(self, folder: Path, disturbance: Disturbance, end: End) -> None:
        writer, whole = self._writer, self._whole
        assert end.how in ("killed", "done", "refused"), f"it {end.how}: {end.log}"
        state = self._state(folder)
        self.summary.states[state] += 1
        if end.how == "done":
            assert state == "new", f"it succeeded, and the output is {state}"
        if disturbance.mode == "full" and state != "part":  # a full disk is no reason to leave anything
            left = sorted(set(names(folder)) - set(whole.names) - set(names(self._start)))
            assert not left, f"a full disk left {left}"
        again = self._attempt(folder, Disturbance("none"))
        expected = {"done"} if writer.again or state != "new" else {"refused"}
        if isinstance(whole.old, dict):  # what was placed but not confirmed is taken back, and written again
            expected |= {"done"}
        assert again.how in expected, f"the output was {state}, and running it again {again.how}: {again.log}"
        result = outcome(folder, writer)
        assert result == whole.new, f"running it again gives {result!s:.300}, expected {whole.new!s:.300}"
        left = sorted(set(names(folder)) ^ set(whole.names))
        assert not left, f"running it again leaves or lacks {left}"

    def _state(self, folder: Path) -> str:
        writer, whole = self._writer, self._whole
        now = outcome(folder, writer)
        if now is None or now == whole.old or now == whole.new:
            return "new" if now == whole.new else "old" if now == whole.old else "nothing"
        if writer.kind == "lines":
            assert now == whole.new[: len(now)], "lines are not a beginning of the undisturbed ones"
            return "part"
        if writer.kind == "resumable" and "adapter_config.json" not in now:
            return "part"
        if isinstance(now, dict) and isinstance(whole.old, dict) and now.items() <= (whole.new | whole.old).items():
            described = set(whole.new) - set(whole.old)  # placed one after another, what describes them at the end
            assert not {"adapter_config.json", "examples.json"} & set(now) & described, f"described but half: {now}"
            return "nothing"
        raise AssertionError(f"the output is half: {now!s:.300}")


def wreak(
    writers: Iterable[Writer],
    parts: Path,
    *,
    seed: int,
    cases: Iterable[int] | None = None,
    kills: int = 0,
    seconds: float = 0.0,
) -> Iterator[Summary]:
    """Disturb each writer in these cases, or else share so many cases or seconds among them."""
    chosen = list(writers)
    weights = {w.name: min(1.0, _QUICK / w.cost) for w in chosen}
    total = sum(weights.values())
    for writer in chosen:
        for module in writer.modules:
            importlib.import_module(module)
        root = Path(tempfile.mkdtemp(prefix="chaos-", dir=_scratch()))
        share = weights[writer.name] / total
        try:
            chaos, end = Chaos(writer, parts, root, seed), time.monotonic() + share * seconds
            for case in cases if cases is not None else range(10**9):
                if cases is None and (case >= max(_FEWEST, kills * share) if kills else time.monotonic() > end):
                    break
                chaos.run(case)
            yield chaos.summary
        finally:
            shutil.rmtree(root, ignore_errors=True)


def _scratch() -> str | None:
    """A folder in memory where there is one: a process that is killed loses nothing that a disk would keep."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def table(summaries: Iterable[Summary]) -> str:
    """What came of each writer, one a line, and the faults."""
    ends, states = ("killed", "refused", "done"), ("old", "new", "nothing", "part")
    head = "".join(f"{name:>9}" for name in ("cases", *ends, *states, "faults", "a minute"))
    lines = [f"{'writer':<26}{head}"]
    for one in summaries:
        count = sum(one.ends.values())
        numbers = [count, *(one.ends[e] for e in ends), *(one.states[s] for s in states), len(one.faults)]
        rate = 60 * count / one.seconds if one.seconds else 0.0
        lines.append(f"{one.writer:<26}" + "".join(f"{n:>9}" for n in numbers) + f"{rate:>9.0f}")
        lines += [f"  {fault}" for fault in one.faults[:20]]
    return "\n".join(lines)


def _chosen(listed: str | None) -> list[Writer]:
    known = {writer.name: writer for writer in WRITERS}
    if listed is None:
        return list(known.values())
    unknown = [name for name in listed.split(",") if name not in known]
    if unknown:
        raise click.BadParameter(f"no writer {', '.join(unknown)}; there are: {', '.join(known)}")
    return [known[name] for name in listed.split(",")]


def _make_parts(folder: Path) -> None:
    """Make the parts in a process of its own: threads of libraries that have run do not survive a fork."""
    end = run_disturbed(lambda: make_parts(folder), folder, Disturbance("none"), longest=600)
    if end.how != "done":
        raise click.ClickException(f"the tiny models cannot be made: {end.log}")


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--kills", type=int, default=0, help="Cases of all writers together, instead of seconds.")
@click.option("--seconds", type=float, default=60.0, show_default=True, help="All writers together.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--writers", "listed", help=f"Of: {', '.join(writer.name for writer in WRITERS)}.")
@click.option("--case", type=int, help="This case of each writer alone.")
@click.option("--parts", type=click.Path(path_type=Path), help="Keeps the tiny models for the next run.")
@click.option("--json", "as_json", is_flag=True, help="The summary for programs.")
def main(
    kills: int, seconds: float, seed: int, listed: str | None, case: int | None, parts: Path | None, as_json: bool
) -> None:
    warnings.simplefilter("ignore")  # of models so small
    chosen = _chosen(listed)
    scratch = Path(tempfile.mkdtemp(prefix="chaos-parts-"))
    try:
        folder = parts or scratch
        folder.mkdir(parents=True, exist_ok=True)
        _make_parts(folder)
        cases = None if case is None else [case]
        summaries = []
        for summary in wreak(chosen, folder.resolve(), seed=seed, cases=cases, kills=kills, seconds=seconds):
            summaries.append(summary)
            click.echo(f"{summary.writer}: {sum(summary.ends.values())} cases, {len(summary.faults)} faults", err=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    click.echo(json.dumps([one.as_json() for one in summaries]) if as_json else table(summaries))
    sys.exit(int(any(one.faults for one in summaries)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
