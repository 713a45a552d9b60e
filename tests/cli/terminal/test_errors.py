"""Errors of commands: one line and an exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calls import PROMPT, fault_of

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
    "too long": (("run", "{bundle}", PROMPT, "--max-tokens", "512"), "the base has a context of 512"),
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
