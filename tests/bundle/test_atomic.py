"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompose.bundle.atomic import new_folder, replace_folder, write_text


def fail(*arguments: object) -> None:
    raise OSError("disk full")


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "below" / "out"
    with new_folder(output) as work:
        (work / "a").write_text("x", encoding="utf-8")
        assert not output.exists()
    assert [path.name for path in output.iterdir()] == ["a"]
    assert [path.name for path in output.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_folder(tmp_path / "out") as work:
        (work / "a").touch()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_or_brought_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").touch()
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: fail() if path.suffix == ".tmp" else rename(path, to))
        with pytest.raises(OSError, match="disk full"), new_folder(output, put=replace_folder):
            pass
    assert [path.name for path in output.iterdir()] == ["old"]
    with new_folder(output, put=replace_folder) as work:
        (work / "new").touch()
    assert [path.name for path in output.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_text_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one \u2028")
    with monkeypatch.context() as patch:
        patch.setattr("edgecompose.bundle.atomic.sync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "one \u2028"
    assert list(tmp_path.iterdir()) == [path]
