"""The exporter's rooms, and what only the table of architectures may know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import edgecompose_export
from edgecompose.formats.architectures import ARCHITECTURES

PACKAGE = Path(edgecompose_export.__file__).parent
#: Modules whose tables are of tokenizers and downloads, for more architectures than those of bases.
_OTHER_TABLES = {"fetch/models.py", "tokenizer/folder.py", "tokenizer/pre_tokenizers.py"}
#: The name of Llama's row is also that of a SentencePiece tokenizer in GGUF files.
_NAMES = set(ARCHITECTURES) - {"llama"}
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("name", sorted(set(MODULES) - _OTHER_TABLES))
def test_no_module_compares_names_of_architectures(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not texts & _NAMES, "what an architecture is belongs into its row of formats/architectures.py"


def test_a_room_has_a_docstring_and_at_most_ten_modules() -> None:
    rooms = {path.parent for path in MODULES.values()} - {PACKAGE}
    for room in rooms:
        assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8"))), room
        assert len([path for path in room.glob("*.py") if path.name != "__init__.py"]) <= 10, room
