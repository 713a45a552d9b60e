"""The table of formats: a row a format, and readers that need no package of the exporter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the adapters are made with it")
pytest.importorskip("gguf", reason="the adapters are made with it")

from edgecompose.bundle.files import Bundle, verify
from edgecompose.errors import AdapterError
from edgecompose.formats.registry import FORMATS, READABLE, WRITABLE, detect_format, read_adapter
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import BASE, gguf_tensors, mlx_tensors, write_gguf, write_mlx

pytestmark = pytest.mark.slow

_ADD_TASK = """
import sys
for name in ("torch", "transformers", "peft", "optimum", "onnx", "edgecompose_export"):
    sys.modules[name] = None
from edgecompose.cli.main import main
main(sys.argv[1:])
"""


def write(zoo: TinyZoo, name: str, folder: Path) -> Path:
    """The same adapter in a format that can be read."""
    peft = zoo.lora("one")
    if name == "mlx":
        return write_mlx(folder / "mlx", mlx_tensors(peft))
    return write_gguf(folder / "x.gguf", gguf_tensors(peft)) if name == "gguf" else peft


def test_every_row_reads_or_writes() -> None:
    assert set(FORMATS.values()) == {*READABLE, *WRITABLE}
    for row in FORMATS.values():
        assert (row.read is None) == (row.detect is None)
        assert row.write is None or row.write_into is None
        assert row.help.startswith(("a ", "an "))


@pytest.mark.parametrize("name", [row.name for row in READABLE])
def test_exactly_one_format_reads_a_path(zoo: TinyZoo, tmp_path: Path, name: str) -> None:
    path = write(zoo, name, tmp_path)
    row = detect_format(path)
    assert row is not None and row.name == name
    others = [other.name for other in READABLE if other.name != name and other.detect and other.detect(path)]
    assert others in ([], ["peft"])  # the row of PEFT comes last: an mlx folder has an adapter_config.json too


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "is missing; give a"), ("folder", "is a folder of no known"), ("text", "is a file of no known")],
)
def test_other_paths_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("no adapter", encoding="utf-8")
    assert detect_format(tmp_path / name) is None
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path / name, BASE)


@pytest.mark.parametrize("name", [row.name for row in READABLE])
def test_a_task_is_added_where_only_the_runtime_is(
    zoo: TinyZoo, bundle_copy: Path, new_task: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    adapter = write(zoo, name, tmp_path)
    arguments = ["bundle", "add-task", bundle_copy, "travel", "--adapter", adapter, "--examples", new_task[1], "--json"]
    done = subprocess.run(
        [sys.executable, "-c", _ADD_TASK, *map(str, arguments)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Bundle(bundle_copy).manifest.adapters["travel"].rank == 4
    assert verify(bundle_copy) == []
