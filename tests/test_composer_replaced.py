"""A program that runs for long goes on with the bundle that it opened, whatever becomes of the directory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edgecompose import Request, open_bundle
from edgecompose.bundle.atomic import new_folder
from edgecompose.errors import FileDamaged
from edgecompose.settings import RetrievalSettings
from tests.fixtures_tiny import TASKS

pytestmark = pytest.mark.slow

NEAREST = Request(retrieval=RetrievalSettings(neighbours=1))
#: Answers a prompt, empties every file of the bundle in place, as `cp` does before it writes, and answers others: one
#: under the same adapter, one under an adapter that was not loaded.
OVERWRITTEN = f"""
import os, sys
from pathlib import Path
from edgecompose import Request, open_bundle
from edgecompose.errors import FileDamaged
from edgecompose.settings import RetrievalSettings
nearest = Request(retrieval=RetrievalSettings(neighbours=1))
with open_bundle(sys.argv[1], device="cpu", in_memory=True) as composer:
    composer.warm_up()
    composer.run({TASKS["animals"][0]!r}, nearest)
    for path in Path(sys.argv[1]).rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    assert composer.bundle.changed
    answer = composer.run({TASKS["animals"][1]!r}, nearest)
    assert answer.retrieval.weights == {{"animals": 1.0}}, answer.retrieval
    try:
        composer.run({TASKS["colours"][0]!r}, nearest)
    except FileDamaged as error:
        print(error)
"""


def exchange(root: Path) -> None:
    """As `bundle --force` does, with a bundle of the same files whose adapters have changed places."""
    with new_folder(root, replace=True) as work:
        shutil.copytree(root, work, dirs_exist_ok=True)
        shutil.copyfile(root / "adapters/animals.safetensors", work / "adapters/colours.safetensors")


@pytest.mark.parametrize("change", [exchange, shutil.rmtree, lambda root: root.rename(root.with_name("away"))])
def test_answers_are_those_of_the_bundle_that_was_opened(bundle_copy: Path, change: Callable[[Path], object]) -> None:
    prompts = [TASKS[task][0] for task in ("animals", "colours", "numbers")]
    with open_bundle(bundle_copy, device="cpu") as composer:
        expected = [composer.run(prompt, NEAREST) for prompt in prompts]
    with open_bundle(bundle_copy, device="cpu") as composer:
        composer.warm_up()
        change(bundle_copy)
        assert composer.bundle.changed
        for prompt, answer in zip(prompts, expected, strict=True):
            again = composer.run(prompt, NEAREST)
            assert (again.text, again.retrieval) == (answer.text, answer.retrieval)


def test_a_bundle_that_is_written_over_ends_no_process_and_is_not_mixed(bundle_copy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", OVERWRITTEN, str(bundle_copy)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "'adapters/colours.safetensors' has 0 bytes, the manifest says" in done.stdout


def test_the_answers_of_a_bundle_in_memory_are_the_same(bundle_copy: Path) -> None:
    with open_bundle(bundle_copy, device="cpu") as composer:
        expected = composer.run(TASKS["animals"][0])
    with open_bundle(bundle_copy, device="cpu", in_memory=True) as composer:
        answer = composer.run(TASKS["animals"][0])
    assert (answer.text, answer.retrieval) == (expected.text, expected.retrieval)
    content = (bundle_copy / "base/decoder.onnx.data").read_bytes()
    (bundle_copy / "base/decoder.onnx.data").write_bytes(bytes(len(content)))
    with open_bundle(bundle_copy, device="cpu", in_memory=True) as composer, pytest.raises(FileDamaged):
        composer.run(TASKS["animals"][0])
