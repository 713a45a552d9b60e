"""Damages files and requests, and looks for crashes, hangs, memory, tracebacks and wrong answers.

    python -m tests.attack.fuzz --seconds 60 --seed 0
    python -m tests.attack.fuzz --targets manifest,index --cases 1000
    python -m tests.attack.fuzz --replay build/findings/manifest-0-17

Case n of a seed is the same in every run. Exit code 1 says that there are findings.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click

from tests.attack.runner import FINDING_FILE, KINDS, Runner, Summary, scratch
from tests.attack.target import Target

#: Modules with `TARGETS`; one that is missing is an error.
_MODULES = tuple(f"tests.attack.{name}_targets" for name in ("bundle", "full", "formats", "texts", "requests"))
_FINDINGS = Path("build/findings")


def all_targets() -> dict[str, Target]:
    """Every target by name."""
    rows = [target for module in _MODULES for target in importlib.import_module(module).TARGETS]
    targets = {target.name: target for target in rows}
    if len(targets) != len(rows):
        raise ValueError("two targets have one name")
    return targets


def chosen_targets(names: str | None) -> list[Target]:
    """Targets by a list of names; 'cheap' and 'full' name all of that cost."""
    known = all_targets()
    if names is None:
        return list(known.values())
    chosen: dict[str, Target] = {}
    for name in names.split(","):
        matches = {n: t for n, t in known.items() if name in (n, t.cost)}
        if not matches:
            raise click.BadParameter(f"no target '{name}'; there are: {', '.join(known)}")
        chosen |= matches
    return list(chosen.values())


def attack(
    targets: Iterable[Target],
    *,
    seed: int,
    findings: Path,
    cases: int | None = None,
    seconds: float | None = None,
    prepared: Path | None = None,
) -> list[Summary]:
    """Attack each target with so many cases, or for so many seconds.

    Args:
        prepared: a folder that keeps the unmutated files of each target for the next run.
    """
    summaries = []
    for target in targets:
        root = scratch()
        try:
            place = None if prepared is None else prepared / target.name
            runner = Runner(target, seed=seed, root=root, findings=findings, prepared=place)
            summaries.append(runner.run(cases=cases, seconds=seconds))
        finally:
            shutil.rmtree(root, ignore_errors=True)
    return summaries


def replay(folder: Path) -> int:
    """Attempt the files of a finding again; 1 while they still end in a finding."""
    record = json.loads((folder / FINDING_FILE).read_text(encoding="utf-8"))
    root = scratch()
    try:
        runner = Runner(all_targets()[record["target"]], seed=record["seed"], root=root, findings=root / "none")
        outcome = runner.attempt(folder)
        click.echo(f"{folder.name}: {outcome}\n{runner.log}".rstrip())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return int(outcome in KINDS)


def table(summaries: Iterable[Summary]) -> str:
    """What came of each target, one a line."""
    lines = [
        f"{'target':<18}{'tried':>9}{'refused':>9}{'accepted':>9}" + "".join(f"{k:>10}" for k in KINDS) + "  a second"
    ]
    for one in summaries:
        counts = "".join(f"{one.findings[kind]:>10}" for kind in KINDS)
        speed = one.tried / one.seconds if one.seconds else 0.0
        lines.append(f"{one.target:<18}{one.tried:>9}{one.refused:>9}{one.accepted:>9}{counts}{speed:>10.1f}")
        lines += [f"  {place}" for place in one.places[:10]]
    return "\n".join(lines)


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--seconds", type=float, default=60.0, show_default=True, help="All targets together.")
@click.option("--cases", type=int, help="Of each target, instead of seconds.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--targets", "names", help="Names with commas between; 'cheap' and 'full' stand for all of that cost.")
@click.option("--findings", type=click.Path(path_type=Path), default=_FINDINGS, show_default=True)
@click.option("--prepared", type=click.Path(path_type=Path), help="Keeps the unmutated files for the next run.")
@click.option("--replay", "finding", type=click.Path(path_type=Path, exists=True), help="A finding to attempt again.")
@click.option("--json", "as_json", is_flag=True, help="The summary for programs.")
def main(
    seconds: float,
    cases: int | None,
    seed: int,
    names: str | None,
    findings: Path,
    prepared: Path | None,
    finding: Path | None,
    as_json: bool,
) -> None:
    if finding is not None:
        sys.exit(replay(finding))
    targets = chosen_targets(names)
    share = None if cases is not None else seconds / len(targets)
    begin = time.monotonic()
    summaries = attack(targets, seed=seed, findings=findings, cases=cases, seconds=share, prepared=prepared)
    if as_json:
        click.echo(json.dumps([vars(one) for one in summaries], indent=1))
    else:
        click.echo(table(summaries))
        tried = sum(one.tried for one in summaries)
        click.echo(f"{tried} cases of {len(targets)} targets in {time.monotonic() - begin:.0f} s, seed {seed}")
    sys.exit(int(any(+one.findings for one in summaries)))


if __name__ == "__main__":
    main()
