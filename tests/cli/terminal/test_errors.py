"""Errors of commands: one line and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from edgecompose.cli.main import main
from edgecompose.errors import BundleError
from tests.cli.calls import PROMPT, call, fault_of
from tests.cli.processes import environment

FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no bundle": (("run", "{bundle}/absent", PROMPT), "is not a directory"),
    "no manifest": (("inspect", "{bundle}/base"), "has no manifest.json"),
    "no manifest to verify": (("verify", "{bundle}/base"), "has no manifest.json"),
    "empty prompt": (("run", "{bundle}", " "), "an empty prompt"),
    "empty prompt by hand": (("run", "{bundle}", "", "--adapter", "animals=1", "--raw"), "the prompt is empty"),
    "not Unicode": (("run", "{bundle}", "a\udcff"), "not valid Unicode"),
    "unknown task": (("retrieve", "{bundle}", PROMPT, "--exclude", "birds"), "no task 'birds'"),
    "unknown adapter": (("run", "{bundle}", PROMPT, "--adapter", "birds=1"), "'birds' is not in the bundle"),
    "adapter twice": (
        ("run", "{bundle}", PROMPT, "--adapter", "animals=1", "--adapter", "animals=2"),
        "'animals' is named twice",
    ),
    "infinite weight": (("run", "{bundle}", PROMPT, "--adapter", "animals=inf"), "not finite"),
    "too long": (("run", "{bundle}", PROMPT * 60), "the base has a context of 512"),
    "unlike ranks": (
        ("run", "{bundle}", PROMPT, "--method", "linear", "--adapter", "animals=1", "--adapter", "numbers=1"),
        "ranks [2, 4]",
    ),
    "choice twice": (("run", "{bundle}", PROMPT, "--choices", "a,a"), "appears twice"),
    "nothing left": (
        ("retrieve", "{bundle}", PROMPT, "--exclude", "animals", "--exclude", "numbers", "--exclude", "colours"),
        "no example is left",
    ),
    "nothing to compose": (("compose", "{bundle}", PROMPT, "-o", "out", "--exclude", "birds"), "no task 'birds'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line_and_exit_code_1(bundle: Path, case: str) -> None:
    arguments, message = FAULTS[case]
    assert message in fault_of(*(a.format(bundle=bundle) for a in arguments))


def test_a_damaged_bundle_is_one_line_and_exit_code_1(bundle_copy: Path) -> None:
    path = bundle_copy / "base/decoder.onnx.data"
    path.write_bytes(bytes(path.stat().st_size))
    assert "base/decoder.onnx.data' has sha256" in fault_of("run", bundle_copy, PROMPT)
    assert "base/decoder.onnx.data' has sha256" in fault_of("run", bundle_copy, PROMPT, "--json")
    (bundle_copy / "manifest.json").write_text("{", encoding="utf-8")
    for command in (("run", bundle_copy, PROMPT), ("inspect", bundle_copy), ("verify", bundle_copy)):
        assert "is not JSON" in fault_of(*command)


def test_a_folder_that_cannot_be_made_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert str(tmp_path / "file") in fault_of("compose", bundle, PROMPT, "-o", tmp_path / "file" / "blend")


@pytest.fixture
def failing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], Result]:
    """Calls `inspect` of a bundle that cannot be read for some reason."""

    def call_failing(error: BaseException) -> Result:
        def fail(path: Path) -> None:
            raise error

        monkeypatch.setattr("edgecompose.bundle.files.read_manifest", fail)
        return call("inspect", bundle)

    return call_failing


@pytest.mark.parametrize(
    "number",
    ["ENOSPC", "EACCES", "EISDIR", "ENAMETOOLONG", "ELOOP", "EMFILE", "ENOMEM", "EROFS", "EIO", "EDQUOT", "ENXIO"],
)
def test_an_error_of_the_system_names_the_place_and_what_to_do(
    failing: Callable[[BaseException], Result], number: str
) -> None:
    code = getattr(errno, number)
    done = failing(OSError(code, os.strerror(code), "a\nfile"))
    (line,) = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (1, "")
    assert line.startswith(f"edgecompose: 'a file': {os.strerror(code)}")
    assert (";" in line) == (number != "ENXIO")


def test_both_names_of_a_renaming_are_shown(failing: Callable[[BaseException], Result]) -> None:
    error = OSError(errno.EXDEV, "Invalid cross-device link", "one", None, "two")
    assert failing(error).stderr == "edgecompose: 'one' -> 'two': Invalid cross-device link\n"


class Panic(BaseException):
    """As extensions in Rust raise it."""


@pytest.mark.parametrize(
    "error",
    [TypeError("a\nb"), RecursionError("deep"), Panic("called `Option::unwrap()`"), AssertionError(), OSError()],
)
def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(
    failing: Callable[[BaseException], Result], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EDGECOMPOSE_TRACEBACK", raising=False)
    done = failing(error)
    (line,) = done.stderr.splitlines()
    assert (done.exit_code, done.stdout) == (1, "")
    assert line.startswith("edgecompose: ") and len(line) > len("edgecompose: ")
    if not isinstance(error, OSError):
        assert line.startswith(f"edgecompose: internal error: {type(error).__name__}")
        assert line.endswith("please report it (EDGECOMPOSE_TRACEBACK=1 shows where it happened)")
    monkeypatch.setenv("EDGECOMPOSE_TRACEBACK", "1")
    traced = failing(error)
    assert traced.exit_code == 1
    assert "Traceback" in traced.stderr and traced.stderr.splitlines()[-1] == line


def test_memory_that_does_not_suffice_is_one_line(failing: Callable[[BaseException], Result]) -> None:
    done = failing(MemoryError())
    assert done.exit_code == 1
    assert done.stderr == "edgecompose: out of memory; close other programs, or use a machine with more memory\n"


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (BrokenPipeError(), 141)]
)
def test_what_a_signal_raises_is_its_exit_code(
    failing: Callable[[BaseException], Result], error: BaseException, code: int
) -> None:
    done = failing(error)
    assert (done.exit_code, done.stdout, done.stderr.strip()) == (code, "", "")


def test_a_missing_library_is_named(failing: Callable[[BaseException], Result]) -> None:
    done = failing(ModuleNotFoundError("No module named 'safetensors'"))
    assert (done.exit_code, done.stderr) == (
        1,
        "edgecompose: No module named 'safetensors'; install edgecompose again\n",
    )


def test_a_warning_is_a_line_of_the_program(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(path: Path) -> None:
        warnings.warn("mind\nthis", UserWarning, stacklevel=1)
        raise BundleError("done")

    monkeypatch.setattr("edgecompose.bundle.files.read_manifest", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = call("inspect", bundle)
    assert done.stderr == "edgecompose: warning: mind this\nedgecompose: done\n"


def test_errors_of_programs_that_call_the_commands_are_theirs(bundle: Path) -> None:
    with pytest.raises(BundleError):
        main(["inspect", str(bundle / "base")], standalone_mode=False)


def test_a_bundle_is_verified_where_onnxruntime_does_not_work(bundle: Path) -> None:
    code = "import sys; sys.modules['onnxruntime'] = None; from edgecompose.cli.main import main; main(sys.argv[1:])"
    line = [sys.executable, "-c", code, "verify", str(bundle)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")
    doctor = subprocess.run([*line[:3], "doctor"], capture_output=True, text=True, env=environment(), check=False)
    assert (doctor.returncode, doctor.stdout) == (1, "")
    assert doctor.stderr.startswith("edgecompose: onnxruntime is not installed; install one of the extras")
