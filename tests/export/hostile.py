"""The bounds of a refusal: its words, time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import ExportError
from edgecompose_export.base.export import export_base
from edgecompose_export.base.source import open_base

#: Where to begin again, in the words of the messages.
REMEDIES = (
    "copy",
    "give",
    "convert",
    "can be exported",
    "download",
    "git lfs",
    "put ",
    "damaged",
    "quantise",
    "add ",
    "make ",
)
#: Bytes and seconds for which a header may be read.
MOST_MEMORY, MOST_TIME = 200_000_000, 5.0


def refusal(path: Path, output: Path | None = None) -> str:
    """The message of a base that is refused, which is one line with its name and a remedy."""
    with pytest.raises(ExportError) as caught:
        if output is None:
            open_base(path)
        else:
            export_base(path, output)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert any(remedy in text for remedy in REMEDIES), text
    return text
