"""Runs the cases of one target in children that may die, hang or swell, and keeps what reproduces a finding.

A child takes many cases in a row. It writes the number of a case into shared memory before it begins, so that the
parent knows which one it was when the child is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import mmap
import os
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click

from edgecompose.errors import EdgeComposeError
from tests.attack.target import Target

KINDS = ("crash", "hang", "memory", "traceback", "wrong")
FINDING_FILE = "finding.json"
#: Resident memory of a child that is a finding; its address space may be larger, since files are mapped.
MEMORY_BYTES, ADDRESS_BYTES = 2 << 30, 24 << 30
_CASES_A_CHILD, _MOST_KEPT, _PATIENCE = 20_000, 25, 4.0
_LAYOUT = ("stop", "case", "started", "tried", "refused", "accepted", "memory", "traceback", "wrong", "kept")
_CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}


@dataclass
class Summary:
    """What came of a target: `findings` by kind, and where those that were kept lie."""

    target: str
    tried: int = 0
    refused: int = 0
    accepted: int = 0
    seconds: float = 0.0
    findings: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)


class _Shared:
    """Numbers that parent and child see."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * _LAYOUT.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * _LAYOUT.index(name), value)


class Runner:
    """The cases of one target under one seed.

    Args:
        root: an empty folder for the cases.
        findings: where findings are kept, each in a folder of its own.
        prepared: the unmutated files, made there if the folder is missing; by default below `root`.
    """

    def __init__(
        self,
        target: Target,
        *,
        seed: int,
        root: Path,
        findings: Path,
        prepared: Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self.target, self.seed, self._findings, self._memory_bytes = target, seed, findings, memory_bytes
        self._work, self._log = root / "case", root / "log"
        self._prepared = prepared or root / "prepared"
        self._shared = _Shared()
        self.summary = Summary(target.name)

    def run(self, *, cases: int | None = None, seconds: float | None = None) -> Summary:
        """Attempt so many cases, or as many as the seconds allow.

        Raises:
            RuntimeError: the unmutated files cannot be made, or are not accepted.
        """
        self._prepare()
        begin = time.monotonic()
        deadline = None if seconds is None else begin + seconds
        number = 0
        while (cases is None or number < cases) and (deadline is None or time.monotonic() < deadline):
            last = number + _CASES_A_CHILD if cases is None else min(cases, number + _CASES_A_CHILD)
            ended = self._child(number, last, deadline=deadline, limit=self.target.seconds)
            if ended is not None:
                self._confirm(self._shared["case"], ended)
            number = self._shared["case"] + 1
        self.summary.seconds = time.monotonic() - begin
        for name in ("tried", "refused", "accepted"):
            setattr(self.summary, name, self._shared[name])
        self.summary.findings.update({name: self._shared[name] for name in ("memory", "traceback", "wrong")})
        self.summary.places = sorted(map(str, self._findings.glob(f"{self.target.name}-{self.seed}-*")))
        return self.summary

    def attempt(self, folder: Path) -> str:
        """What comes of the files of one folder, in a child: 'accepted', 'refused', or a kind of finding."""
        copy_tree(folder, self._work, skip=FINDING_FILE)
        before = {name: self._shared[name] for name in _LAYOUT}
        ended = self._fork(lambda: self._judge(lambda: None, keep=False), None, self.target.seconds * _PATIENCE)
        if ended is not None:
            return ended
        return next(name for name in _LAYOUT[4:9] if self._shared[name] > before[name])

    @property
    def log(self) -> str:
        """The end of what the last child said."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-4000:] if self._log.exists() else ""

    def _prepare(self) -> None:
        if not self._prepared.exists():
            self._prepared.mkdir(parents=True)
            if self._fork(lambda: self.target.prepare(self._prepared), None, 600) is not None:
                shutil.rmtree(self._prepared)
                raise RuntimeError(f"target {self.target.name} cannot be prepared:\n{self.log}")
        outcome = self.attempt(self._prepared)
        if outcome != "accepted":
            raise RuntimeError(f"target {self.target.name}: the unmutated files end in '{outcome}'\n{self.log}")
        for name in _LAYOUT:
            self._shared[name] = 0

    def _confirm(self, number: int, kind: str) -> None:
        """Count a crash; a hang and a swelling must come again in a child of their own, where there is time."""
        if kind != "crash":
            again = self._child(number, number + 1, deadline=None, limit=self.target.seconds * _PATIENCE)
            if again is None:
                return
            kind = again
        self._shared["tried"] += 1
        self.summary.findings[kind] += 1
        log = self.log
        if self._shared["kept"] < _MOST_KEPT:
            self._fork(lambda: self._fresh(number), None, 60)
            self._keep(number, kind, log)

    def _child(self, first: int, last: int, *, deadline: float | None, limit: float) -> str | None:
        """Attempt cases in a child; None, or the kind of finding that ended it."""

        def work() -> None:
            for number in range(first, last):
                if self._shared["stop"]:
                    return
                self._shared["case"], self._shared["started"] = number, time.monotonic_ns()
                if number % 1000 == 0:
                    os.ftruncate(2, 0)
                self._judge(lambda number=number: self._fresh(number), keep=True)  # type: ignore[misc]

        return self._fork(work, deadline, limit)

    def _fresh(self, number: int) -> None:
        copy_tree(self._prepared, self._work)
        self.target.mutate(random.Random(f"{self.seed}:{self.target.name}:{number}"), self._work)

    def _judge(self, make: Callable[[], None], *, keep: bool) -> None:
        """Run one case in this process and count what comes of it."""
        try:
            make()
            self.target.attempt(self._work)
            outcome = "accepted"
        except BaseException as reason:  # of extensions too, such as a panic of Rust
            outcome = _outcome_of(reason)
            if outcome == "refused" and not keep:
                print(f"{type(reason).__name__}: {reason!s:.500}".encode("utf-8", "replace").decode(), file=sys.stderr)
            elif outcome != "refused":
                traceback.print_exc()
                if keep and self._shared["kept"] < _MOST_KEPT:
                    self._keep_again(self._shared["case"], outcome, traceback.format_exc())
        self._shared["tried"] += 1
        self._shared[outcome] += 1

    def _keep_again(self, number: int, kind: str, text: str) -> None:
        """Keep a case from its own files: the attempt may have changed them."""
        with contextlib.suppress(Exception):  # where it was the damage itself that failed
            self._fresh(number)
        self._keep(number, kind, text)

    def _keep(self, number: int, kind: str, text: str) -> None:
        self._shared["kept"] += 1
        folder = self._findings / f"{self.target.name}-{self.seed}-{number}"
        copy_tree(self._work, folder)
        record = {"target": self.target.name, "seed": self.seed, "case": number, "kind": kind}
        lines = text.splitlines()[-30:]
        (folder / FINDING_FILE).write_text(json.dumps({**record, "lines": lines}, indent=1), encoding="utf-8")

    def _fork(self, work: Callable[[], object], deadline: float | None, limit: float) -> str | None:
        """Do something in a child; None when it ended well, else the kind of finding."""
        self._shared["started"] = time.monotonic_ns()
        child = os.fork()
        if child == 0:
            self._be_child(work)
        try:
            return self._watch(child, deadline, limit)
        except BaseException:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise

    def _be_child(self, work: Callable[[], object]) -> None:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            faulthandler.enable(2)
            faulthandler.register(signal.SIGUSR1, file=2)
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            gc.freeze()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _watch(self, child: int, deadline: float | None, limit: float) -> str | None:
        self._shared["stop"] = 0
        pause = 0.002
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return None if status == 0 else "crash"
            time.sleep(pause)
            pause = min(0.05, 1.5 * pause)
            if deadline is not None and time.monotonic() > deadline:
                self._shared["stop"] = 1
            kind = None
            if time.monotonic_ns() - self._shared["started"] > limit * 1e9:
                kind = "hang"
                os.kill(child, signal.SIGUSR1)
                time.sleep(0.2)
            elif resident_bytes(child) > self._memory_bytes:
                kind = "memory"
            if kind is not None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return kind


def _outcome_of(reason: BaseException) -> str:
    if isinstance(reason, (EdgeComposeError, OSError, click.ClickException)):
        return "refused"
    if isinstance(reason, MemoryError):
        return "memory"
    return "wrong" if isinstance(reason, AssertionError) else "traceback"


def resident_bytes(pid: int) -> int:
    """Private memory of a process that is in RAM: without what files are mapped, 0 when the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 0
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE if len(fields) > 2 else 0


def copy_tree(source: Path, target: Path, *, skip: str = "") -> None:
    """Copy a folder with its links and pipes as they are, in place of what is at `target`."""
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        _make_removable(target)
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for entry in source.iterdir():
        place = target / entry.name
        if entry.name == skip:
            continue
        if entry.is_symlink():
            place.symlink_to(entry.readlink())
        elif entry.is_dir():
            copy_tree(entry, place)
        elif stat.S_ISFIFO(entry.stat().st_mode):
            os.mkfifo(place)
        else:
            place.write_bytes(entry.read_bytes())


def _make_removable(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        Path(parent).chmod(0o700)


def scratch() -> Path:
    """An empty folder in memory where the system has one, else in the temporary folder."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="attack-", dir=memory if memory.is_dir() else None))
