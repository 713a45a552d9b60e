"""Bases in places that cannot be read or written, and work that fails or is interrupted."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import BundleError
from edgecompose_export.cli import main
from tests.export.refusals import listed, one_line
from tests.gguf_models import MODELS, write_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].write(tmp_path_factory.mktemp("refused") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return write_gguf(folder.parent / "whole.gguf", folder)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Runs the command on a base; returns what it says, having seen that it refuses it by the headers alone."""

    def at_last(*args: Any, **named: Any) -> Any:
        raise AssertionError("the long work has begun")

    def run(source: Path) -> str:
        before = listed(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("edgecompose_export.base.export.float_states", at_last)
            result = CliRunner().invoke(main, ["base", str(source), "-o", str(tmp_path / "out")])
        assert listed(tmp_path) == before
        return one_line(result, source)

    return run


def test_shards_that_do_not_belong_together(folder: Path, tmp_path: Path, refused: Callable[[Path], str]) -> None:
    write_gguf(tmp_path / "split.gguf", folder, shard_tensors=5)
    first, second, *_ = sorted(tmp_path.glob("*.gguf"))
    content = second.read_bytes()
    second.unlink()
    for path in (first, tmp_path):
        assert f"{second.name} is missing; put all shards into one folder" in refused(path)
    second.write_bytes(content[: len(content) // 2])
    assert second.name in refused(first)
    second.write_bytes(first.read_bytes())
    assert f"{second.name}' does not say that it is shard 2" in refused(first)
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "split.gguf", MODELS["qwen2"].write(other / "model"), shard_tensors=5)
    shutil.copy(sorted(other.glob("*-00002-of-*.gguf"))[0], second)
    assert "split-0000" in refused(first)


def test_what_has_the_name_of_a_file_and_is_none(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    directory, loop, gone = tmp_path / "folder.gguf", tmp_path / "loop.gguf", tmp_path / "gone.gguf"
    directory.mkdir()
    loop.symlink_to(loop)
    gone.symlink_to(tmp_path / "nowhere")
    for path in (directory, loop, gone, tmp_path / "absent.gguf", tmp_path):
        refused(path)
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    refused(pipe)


def test_a_loop_of_links_in_a_folder(model: Path, refused: Callable[[Path], str]) -> None:
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (model / name).unlink()
        (model / name).symlink_to(model / name)
        assert name.split(".")[0] in refused(model)


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A folder that everybody may enter, for a user to whom permissions apply."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.chown(root, 65534, -1)
        os.seteuid(65534)
    try:
        yield root
    finally:
        os.seteuid(user)
        shutil.rmtree(root)


def test_a_file_that_may_not_be_read(whole: Path, folder: Path) -> None:
    content, files = whole.read_bytes(), {path.name: path.read_bytes() for path in folder.iterdir()}
    with as_nobody() as root:
        (root / "whole.gguf").write_bytes(content)
        (root / "whole.gguf").chmod(0)
        (root / "model").mkdir()
        for name, raw in files.items():
            (root / "model" / name).write_bytes(raw)
        result = CliRunner().invoke(main, ["base", str(root / "whole.gguf"), "-o", str(root / "out")])
        assert "Permission denied" in one_line(result, root / "whole.gguf")
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            (root / "model" / name).chmod(0)
            result = CliRunner().invoke(main, ["base", str(root / "model"), "-o", str(root / "out")])
            assert name in one_line(result, root / "model")
            (root / "model" / name).chmod(0o644)
        (root / "model").chmod(0)
        result = CliRunner().invoke(main, ["base", str(root / "model"), "-o", str(root / "out")])
        assert "Permission denied" in one_line(result, root / "model")
        (root / "model").chmod(0o755)
        assert not (root / "out").exists()


def test_a_folder_that_may_not_be_written(whole: Path) -> None:
    content = whole.read_bytes()
    with as_nobody() as root:
        (root / "whole.gguf").write_bytes(content)
        root.chmod(0o555)
        result = CliRunner().invoke(main, ["base", str(root / "whole.gguf"), "-o", str(root / "out")])
        root.chmod(0o755)
        assert "out' cannot be written: Permission denied" in one_line(result, root / "out")
        assert listed(root) == ["whole.gguf"]


@pytest.mark.parametrize("limit", [0, 1000, 20_000, 60_000])
@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_files_that_may_not_grow(limit: int, precision: str, whole: Path, tmp_path: Path) -> None:
    """Each writer meets the end of the disk, as a limit of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["base", str(whole), "-o", str(tmp_path / "out"), "--precision", precision, "--accept-distance"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = CliRunner().invoke(main, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written: File too large; make room" in one_line(result, tmp_path / "out")
    assert listed(tmp_path) == []
    assert CliRunner().invoke(main, arguments).exit_code == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error", "BASE"), "whole.gguf' cannot be read: Input/output error; check it"),
        (MemoryError(), "whole.gguf' needs more memory than is free; close other programs"),
        (BundleError("the graph is refused"), "whole.gguf': the graph is refused"),
    ],
    ids=["disk", "memory", "graph"],
)
def test_what_fails_in_the_long_work(
    error: Exception, message: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: Any, **named: Any) -> Any:
        if isinstance(error, OSError):
            error.filename = str(whole)
        raise error

    monkeypatch.setattr("edgecompose_export.base.export.float_states", failing)
    result = CliRunner().invoke(main, ["base", str(whole), "-o", str(tmp_path / "out")])
    assert message in one_line(result, whole)
    assert listed(tmp_path) == []


def test_an_interrupt_of_the_command(whole: Path, tmp_path: Path) -> None:
    """By the signal, in a process of its own, as the weights are written."""
    program = (
        "import os, signal; from edgecompose_export import cli; from edgecompose_export.graphs import writer as g\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
        "g.DataFile.write = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        f"cli.main(['base', {str(whole)!r}, '-o', {str(tmp_path / 'out')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert "Traceback" not in done.stderr
    assert listed(tmp_path) == []
