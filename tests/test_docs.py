"""Command lines and Python blocks of README.md and docs/ run, and show what is shown.

Each page is followed in its own directory, where `models/demo` and `my-bundle` are tiny bundles with the demo's task
names (`Page._furnish`). Blocks of a page share that directory, and Python blocks their names. A block whose first line
names a file (```json calls.jsonl) is written to it. Shown output is compared with that of the real demo bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from docs import generate
from edgecompose.cli.main import main as runtime
from edgecompose.server.config import CallLimits, ServerSettings
from edgecompose_export.bundles import build_bundle
from tests import tiny
from tests.doc_pages import FENCE, PAGES, PROGRAMS, README, ROOT, name_of, parse
from tests.fixtures_tiny import ADAPTERS, TASKS, TinyZoo, ignore_tracer_warnings
from tests.server.served import serving

pytestmark = pytest.mark.slow

#: First words of a line that make it a command line, in whatever block it stands.
COMMANDS = frozenset(
    (
        *PROGRAMS,
        "make",
        "pip",
        "curl",
        "python",
        "python3",
        "sh",
        "taskset",
        "tar",
        "sha256sum",
        "git",
        "cd",
        "printf",
        "echo",
        "export",
        "llama-cli",
        "llama-server",
        "llama-completion",
        "vllm",
        "huggingface-cli",
    )
)
#: What a page may have a shell run; whatever is not ours, not here and not in NOT_RUN fails.
SHELL = frozenset(("curl", "python", "printf", "echo", "cp", "mv"))
_BUILDS = "builds for minutes; tests check what it made"
_DOWNLOADS = "fetches packages"
_AIRGAP = "tests/test_airgap.py does the same with the installer"
_NOT_HERE = "needs a program that is not installed with ours"
#: Command lines that no test of this file runs, and why.
NOT_RUN: dict[str, str] = {
    **dict.fromkeys(("make check", "make test"), "runs tests"),
    "make fuzz SECONDS=600 SEED=1": "takes ten minutes; tests/attack runs shorter ones",
    **dict.fromkeys(("make demo", "make airgap", "make binary", "make airgap BUNDLE_DIR=my-bundle"), _BUILDS),
    "edgecompose-export fetch qwen2.5-coder-0.5b-instruct -o build/models": "downloads; see tests/export/test_fetch.py",
    "pip install 'edgecompose[cpu]'": _DOWNLOADS,
    "pip install 'edgecompose[gpu]'": _DOWNLOADS,
    "pip install 'edgecompose[cpu,server]'": _DOWNLOADS,
    "pip install 'edgecompose[cpu,gguf]'": _DOWNLOADS,
    **dict.fromkeys(
        (
            "sha256sum -c edgecompose-0.1.0-airgap-linux-x86_64.tar.gz.sha256",
            "tar xzf edgecompose-0.1.0-airgap-linux-x86_64.tar.gz",
            "sh edgecompose-0.1.0-airgap-linux-x86_64/install.sh",
            "~/.local/bin/edgecompose run ~/.local/share/edgecompose/bundle"
            " 'Customer review: Great soup. Positive or negative? Answer:'",
            "sh install.sh",
            "sh install.sh --prefix /opt/edgecompose",
            "sh install.sh --python",
            "sh install.sh --python /usr/bin/python3.11",
            "sh install.sh --force",
            "sh ~/.local/share/edgecompose/install.sh --uninstall",
            "sh install.sh --uninstall --prefix /opt/edgecompose",
            "~/.local/bin/edgecompose doctor",
            "~/.local/bin/edgecompose verify ~/.local/share/edgecompose/bundle",
        ),
        _AIRGAP,
    ),
    ". .venv/bin/activate": "tests run in an environment of their own",
    "python benchmarks/cuda.py": "needs a GPU; tests/benchmarks/test_cuda.py runs it on the CPU",
    "taskset -c 0,1 edgecompose serve models/demo": "not every system has taskset and two cores",
    "llama-cli -m SmolLM2-135M-Instruct.Q4_1.gguf --lora blend.gguf": f"{_NOT_HERE}; see test_llama_cpp.py",
    "vllm serve SmolLM2-135M-Instruct --enable-lora --max-lora-rank 16 --lora-modules blend=small": _NOT_HERE,
}
#: Tasks of the tiny bundle, and those of the demo that stand for them.
DEMO_TASKS = {"animals": "snli", "numbers": "cb", "colours": "yelp"}
_ADDRESS = "http://127.0.0.1:8080"


def is_command(line: str) -> bool:
    words = line.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return bool(words) and (words[0] in COMMANDS or words[0].startswith("~/.local/bin/"))


@dataclass(frozen=True)
class Block:
    """A block of a page: what it is, the file that it names, and its text."""

    kind: str
    file: str
    text: str

    def commands(self) -> list[tuple[str, str]]:
        """Command lines, each with the output that is shown of it."""
        if self.kind == "console":
            parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
            assert not parts[0], "a console block begins with '$ '"
            return [_split_output(part) for part in parts[1:]]
        lines = re.sub(r" *\\\n\s*", " ", self.text).splitlines()
        if self.kind not in ("sh", "", "indented"):
            return []
        lines = [re.sub(r"\s+# .*", "", line) for line in lines]
        return [(line, "") for line in lines if line and (self.kind == "sh" or is_command(line))]


def _split_output(part: str) -> tuple[str, str]:
    """A command, which goes on to the next line within quotes, and what follows it."""
    lines = part.splitlines()
    for count in range(1, len(lines) + 1):
        with contextlib.suppress(ValueError):
            shlex.split("\n".join(lines[:count]))
            return "\n".join(lines[:count]), "\n".join(lines[count:])
    raise AssertionError(f"a quote is not closed: {part}")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    result = [(m.start(), Block(m[1], m[2], m[3])) for m in FENCE.finditer(text)]
    bare = FENCE.sub(lambda m: "\n" * m[0].count("\n"), text)
    assert "```" not in bare, f"{page}: a fence is not closed"
    place = 0
    for part in bare.split("\n\n"):
        lines = part.strip("\n").splitlines()
        if lines and all(line.startswith("    ") for line in lines):
            where = text.index(part.strip("\n"))
            result.append((where, Block("indented", "", "".join(f"{line[4:]}\n" for line in lines))))
        place += len(part) + 2
    return [block for _, block in sorted(result, key=lambda one: one[0])]


class Page:
    """A page that is followed in a directory of its own."""

    def __init__(
        self, folder: Path, bundle: Path, zoo: TinyZoo, stack: contextlib.ExitStack, *, makes_bundle: bool
    ) -> None:
        self.folder, self._bundle, self._zoo, self._stack = folder, bundle, zoo, stack
        self._makes_bundle = makes_bundle
        self.address = _ADDRESS
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self._furnish()

    def _furnish(self) -> None:
        """What pages take for granted: bundles, a base, an encoder, an adapter in each form, examples."""
        shutil.copytree(self._bundle, self.folder / "models/demo")
        if not self._makes_bundle:
            shutil.copytree(self._bundle, self.folder / "my-bundle")
        for name, source in (
            ("SmolLM2-135M-Instruct", self._zoo.model("llama")),
            ("all-MiniLM-L6-v2", self._zoo.encoder()),
            ("SmolLM2-135M-Instruct.Q4_1.gguf", self._bundle.with_suffix(".gguf")),
            ("lora/snli", self._zoo.lora("animals", **ADAPTERS["animals"])),
            ("lora/boolq", self._zoo.lora("colours", **ADAPTERS["colours"])),
            ("lora/wic", self._zoo.lora("numbers", **ADAPTERS["numbers"])),
        ):
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).symlink_to(source)
        self._write_recipe()
        bin_folder = self.folder / "bin"
        bin_folder.mkdir()
        for program, module in (("edgecompose", "edgecompose"), ("edgecompose-export", "edgecompose_export")):
            script = bin_folder / program
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        for name, task in (("snli", "animals"), ("boolq", "colours"), ("wic", "numbers")):  # what guides add
            tiny.write_task(self.folder / f"{name}.jsonl", TASKS[task])
            tiny.write_task(self.folder / f"{name}.valid.jsonl", TASKS[task])
        for task, name in DEMO_TASKS.items():
            tiny.write_task(self.folder / f"{name}.valid.jsonl", TASKS[task])

    def _write_recipe(self) -> None:
        """The demo's recipe, with a task of the tiny adapters."""
        task = '[tasks.snli]\nadapter = "../lora/snli"\nexamples = "../snli.jsonl"'
        paths = 'name = "demo"\nbase = "../build/base"\nembedder = "../build/embedder"'
        (self.folder / "models/demo.toml").write_text(f"{paths}\n{task}\n", encoding="utf-8")

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        if block.file:
            (self.folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / block.file).write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            code = compile(block.text.replace(_ADDRESS, self.address), "<docs>", "exec")
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, self.names)
        for line, _ in block.commands():
            if line in NOT_RUN:
                parse(line)
            else:
                self.run(line)

    def run(self, line: str) -> None:
        """Run a command line: our programs in this process, others in a shell."""
        first, _, rest = line.rpartition(" | ")
        stdin = self._shell(first) if first else None
        words = shlex.split(rest, comments=True)
        environment: dict[str, str] = {}
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):
            environment |= dict([words.pop(0).split("=", 1)])
        if words[0] not in PROGRAMS:
            assert words[0] in SHELL, f"'{line}' is neither run nor in NOT_RUN, with a reason"
            self._shell(line)
            return
        output = None
        if len(words) > 2 and words[-2] == ">":
            output, words = self.folder / words[-1], words[:-2]
        program, *arguments = [one for word in words for one in _expanded(word)]
        if arguments[0] == "serve" and "--stdio" not in arguments:
            self._serve(arguments, environment)
            return
        with warnings.catch_warnings():
            ignore_tracer_warnings()
            done = CliRunner(env=environment).invoke(PROGRAMS[program], arguments, input=stdin or b"")
        assert done.exit_code == 0, f"{line}\n{done.output}{done.exception!r}"
        if output is not None:
            output.write_text(done.stdout, encoding="utf-8")

    def _serve(self, arguments: list[str], environment: dict[str, str]) -> None:
        """A server with the settings that the command gives it, at a free port, until the page ends."""
        value: list[ServerSettings] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("edgecompose.cli.serve.run_server", lambda _, settings, **others: value.append(settings))
            done = CliRunner(env=environment).invoke(runtime, arguments)
        assert done.exit_code == 0 and value, done.output
        settings = dataclasses.replace(value[0], calls=CallLimits(max_tokens=value[0].calls.max_tokens or 256))
        self.address = self._stack.enter_context(serving(self.folder / arguments[1], settings)).url

    def _shell(self, line: str) -> bytes:
        command = line.replace(_ADDRESS, self.address).replace("curl ", "curl --fail ")
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'export'}",
            "PYTHONWARNINGS": "ignore",
            "PATH": os.pathsep.join((str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"])),
        }
        done = subprocess.run(["sh", "-c", command], capture_output=True, env=environment, timeout=60, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout.decode()}{done.stderr.decode()}"
        return done.stdout


def _expanded(word: str) -> list[str]:
    """The files that a pattern names, or else the word."""
    return (sorted(str(path) for path in Path().glob(word)) if word.startswith("*") else []) or [word]


@pytest.fixture(scope="module")
def demo(zoo: TinyZoo) -> Path:
    """A tiny bundle whose tasks have names of the demo's, and its base as a GGUF file beside it."""
    lines = [line for line in zoo.recipe().read_text(encoding="utf-8").splitlines() if line != "keep_text = true"]
    text = "\n".join(lines)
    for task, name in DEMO_TASKS.items():
        text = text.replace(f"[tasks.{task}]", f"[tasks.{name}]")
    recipe, bundle = zoo.root / "demo.toml", zoo.root / "demo"
    recipe.write_text(text, encoding="utf-8")
    build_bundle(recipe, bundle)
    tiny.write_gguf(bundle.with_suffix(".gguf"), zoo.model("llama"))
    return bundle


def does_something(page: Path) -> bool:
    """Whether a page is to be followed; examples of the reference are those of `--help`, which other tests run."""
    return page.parent != generate.FOLDER and any(block.kind == "python" or block.commands() for block in blocks(page))


@pytest.mark.parametrize("path", [path for path in PAGES if does_something(path)], ids=name_of)
def test_a_page_can_be_followed(
    path: Path, zoo: TinyZoo, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    makes_bundle = " -o my-bundle" in path.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        page = Page(tmp_path, demo, zoo, stack, makes_bundle=makes_bundle)
        for block in blocks(path):
            page.follow(block)


def test_what_is_not_run_is_there_and_has_a_reason() -> None:
    lines = {line for path in PAGES for block in blocks(path) for line, _ in block.commands()}
    assert set(NOT_RUN) <= lines
    assert all(NOT_RUN.values())


SHOWN = [(p, line, out) for p in PAGES for b in blocks(p) for line, out in b.commands() if out]


def _without_numbers(text: str) -> list[str]:
    """Lines without what differs from machine to machine."""
    messages = [line for line in text.splitlines() if not line.startswith(("...", "device", "tokens", "time"))]
    return [re.sub(r"[\d.]+", "0", re.sub(r"composition \w+|█", "", line)).rstrip() for line in messages]


@pytest.mark.parametrize(("path", "line", "output"), SHOWN, ids=[f"{p.stem}: {s:.40}" for p, s, _ in SHOWN])
def test_output_that_is_shown_comes_out(
    path: Path, line: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (ROOT / "models" / "demo" / "manifest.json").is_file():
        pytest.skip("models/demo is not built; run 'make bundle'")
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("models/demo").symlink_to(ROOT / "models" / "demo")
    program, *arguments = shlex.split(line)
    done = CliRunner().invoke(PROGRAMS[program], arguments)
    assert done.exit_code == 0, done.output
    printed = set(_without_numbers(done.output))
    assert [text for text in _without_numbers(output) if text not in printed] == [], done.output


def test_the_first_python_example_is_under_ten_lines_and_runs_on_the_demo() -> None:
    first = next(block.text for block in blocks(README) if block.kind == "python")
    assert len(first.splitlines()) < 10
    if not (ROOT / "models" / "demo" / "manifest.json").is_file():
        pytest.skip("models/demo is not built; run 'make bundle'")
    finished = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "yelp" in finished.stdout
