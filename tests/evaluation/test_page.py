"""The report of an evaluation: a page that is complete in itself, its charts, and the table of the command line."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgecompose.evaluation.page import shortened, write_report
from edgecompose.evaluation.results import Evaluation
from tests.evaluation.reports import HOSTILE, answered, example_evaluation, result_of

pytestmark = pytest.mark.slow

CHARTS = ("accuracy", "weights", "confusion", "reliability")
_VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements close in order; keeps elements and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "deep" / "report"
    evaluation = example_evaluation(prompt=HOSTILE)
    for _ in range(2):  # the second time over the first
        files = write_report(evaluation, evaluation.summary(), result_of(evaluation), folder)
    assert files[0] == folder / "index.html"
    assert {path.name for path in folder.iterdir()} == {path.name for path in files}
    return folder


def test_all_files_are_there(folder: Path) -> None:
    names = {f"{chart}.{kind}" for chart in CHARTS for kind in ("svg", "png")}
    assert {path.name for path in folder.iterdir()} == {"index.html", "result.json", *names}
    for chart in CHARTS:
        assert (folder / f"{chart}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        root = ET.parse(folder / f"{chart}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(root.findall(".//{http://www.w3.org/2000/svg}text")) > 3  # text, not outlines
        assert "prefers-color-scheme" in (folder / f"{chart}.svg").read_text(encoding="utf-8")
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == result_of(example_evaluation())


def test_the_page_is_complete_in_itself_and_accessible(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == len(CHARTS)
    for image, chart in zip(images, CHARTS, strict=True):
        source = image["src"] or ""
        assert source.startswith("data:image/svg+xml;base64,")
        assert base64.b64decode(source.split(",")[1]) == (folder / f"{chart}.svg").read_bytes()
        assert len(image["alt"] or "") > 20
    for _, attributes in page.elements:
        assert not {"href", "srcset", "onclick", "onerror"} & set(attributes)
    tables = [tag for tag, _ in page.elements if tag in ("table", "caption")]
    assert tables == ["table", "caption"] * 3
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")
    assert ("html", {"lang": "en"}) in page.elements
    for word in ("prefers-color-scheme: dark", "width=device-width", "default-src 'none'"):
        assert word in text
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]


def test_the_page_holds_no_address_and_no_markup_of_the_examples(folder: Path) -> None:
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"https?://", text.replace(escaped(HOSTILE), "")) == []
    assert "<script" not in text.lower()
    page = Page(text)
    assert f"{HOSTILE} 3" in page.text  # a prompt, as it was
    assert "49014001" not in page.text
    for chart in CHARTS:
        svg = (folder / f"{chart}.svg").read_text(encoding="utf-8")
        assert "<script" not in svg
        assert "<image" not in svg


def escaped(text: str) -> str:
    import markupsafe

    return str(markupsafe.escape(text))


def test_figures_are_in_the_page(folder: Path) -> None:
    text = Page((folder / "index.html").read_text(encoding="utf-8")).text
    result = result_of(example_evaluation())
    assert f"retrieved: {result['mean_accuracy'] * 100:.1f} % right" in text
    for actual in result["variants"].values():
        assert f"{actual['mean_accuracy'] * 100:.1f}" in text
        assert "-".join(f"{bound * 100:.1f}" for bound in actual["mean_ci95"]) in text
    assert text.count("expected “yes”, got “no”") == 6
    assert "film 0.750, other 0.250" in text
    assert "Not every variant has every task" in text


def test_a_page_without_misses_says_so(tmp_path: Path) -> None:
    evaluation = Evaluation("base", {"base": (answered("film", 0, True, "base"),)})
    write_report(evaluation, evaluation.summary(), result_of(evaluation), tmp_path)
    assert "None." in Page((tmp_path / "index.html").read_text(encoding="utf-8")).text


def test_long_texts_lose_their_middle() -> None:
    assert shortened("x" * 600) == "x" * 600
    assert shortened("a" * 1000 + "b" * 1000) == f"{'a' * 400} [...] {'b' * 200}"
    assert shortened("a" * 1000, 3, 0) == "aaa [...]"
