"""docs/reference/ is what `python docs/generate.py` writes, and the generator refuses what it cannot describe."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import click
import pytest

pytest.importorskip("torch", reason="the commands of edgecompose-export are described")

from docs import generate
from docs.reference_generator import commands, http_api, python_names
from docs.reference_generator.markdown import anchor, json_lines

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", sorted(path.name for path in generate.FOLDER.glob("*")))
def test_the_reference_is_what_the_code_says(name: str) -> None:
    expected = {path.name: text for path, text in generate.pages().items()}
    assert name in expected, f"docs/reference/{name} is not generated; remove it"
    page = (generate.FOLDER / name).read_text(encoding="utf-8")
    assert page == expected[name], f"docs/reference/{name} is out of date; run: python docs/generate.py"


def test_the_reference_is_whole() -> None:
    assert set(generate.pages()) == set(generate.FOLDER.glob("*"))


def test_the_command_writes_every_page(tmp_path: Path) -> None:
    program = (
        "import pathlib, runpy, sys; sys.argv = ['generate.py']; "
        "pathlib.Path.write_text = lambda path, *_, **__: None; runpy.run_path('docs/generate.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["docs/reference/cli.md", "docs/reference/python.md", "docs/reference/http.md"]


def test_a_field_without_a_description_is_refused() -> None:
    @dataclasses.dataclass
    class Call:
        model: str = "auto"
        surprise: int = 0

    with pytest.raises(SystemExit, match=r"Call has the fields \['model', 'surprise'\]"):
        list(http_api._fields(Call, {"model": "its name"}, http_api._call_default))
    (row,) = http_api._fields(dataclasses.make_dataclass("One", [("n", "int | None", None)]), {"n": "a count"}, str)
    assert row.startswith("| `n` | integer |") and row.endswith("| a count |")


def test_a_status_without_a_description_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_api, "_STATUS", {400: "malformed"})
    with pytest.raises(SystemExit, match="have no description"):
        http_api._statuses()


def test_a_public_name_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgecompose.__all__", ["open_bundle", "surprise"])
    with pytest.raises(SystemExit, match="surprise"):
        python_names.python_page()


@pytest.mark.parametrize(
    ("option", "row"),
    [
        (
            click.Option(["--top-p"], type=click.FloatRange(0, 1, min_open=True)),
            "| `--top-p` number above 0 to 1 |  |  |",
        ),
        (click.Option(["--fold/--attach"], default=True, help="a|b"), "| `--fold`, `--attach` | `--fold` | a\\|b |"),
        (
            click.Option(["--kind"], type=click.Choice(["a", "b"]), required=True),
            "| `--kind` `a` or `b` | required |  |",
        ),
        (click.Option(["--out"], type=click.Path()), "| `--out` `PATH` |  |  |"),
    ],
    ids=["range", "switch", "choice", "path"],
)
def test_an_option_is_a_row(option: click.Option, row: str) -> None:
    assert commands._option(option, click.Context(click.Command("any"))) == row


def test_markdown_helpers() -> None:
    assert anchor("edgecompose-export base (GGUF)") == "edgecompose-export-base-gguf"
    assert json_lines({"a": 1, "b": {"c": "d", "e": None}}) == [
        "{",
        '  "a": 1,',
        '  "b": {',
        '    "c": "d",',
        '    "e": null',
        "  }",
        "}",
    ]
