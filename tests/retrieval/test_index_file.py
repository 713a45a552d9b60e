"""An index file that leads out of itself is refused before USearch reads it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgecompose.bundle.specs import IndexSpec
from edgecompose.engine.device import choose_device  # noqa: F401 - ONNX Runtime comes before USearch
from edgecompose.errors import RetrievalError
from edgecompose.retrieval import index as retrieval
from edgecompose.retrieval.index import new_index, open_index, vectors_of
from edgecompose.retrieval.index_file import check_index_file
from tests.attack.mutations import mutate_bytes
from tests.factories import write_index

COUNT, WIDTH = 300, 8


def vectors(count: int = COUNT, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


@pytest.fixture
def spec(tmp_path: Path) -> IndexSpec:
    return write_index(tmp_path / "i.usearch", vectors(), dtype="f16")


@settings(max_examples=15)
@given(st.sampled_from([0, 1, 2, 3, 40, 700]), st.sampled_from(["f16", "f32"]), st.booleans())
def test_what_usearch_writes_is_sound(
    tmp_path_factory: pytest.TempPathFactory, count: int, dtype: str, large: bool
) -> None:
    folder = tmp_path_factory.mktemp("index")
    index = new_index(WIDTH, dtype, vectors=retrieval.EXACT_BELOW + 1 if large else 0)
    if count:
        index.add(np.arange(count), vectors(count), threads=1)
    index.save(str(folder / "i"))
    spec = IndexSpec("i", count, WIDTH, "e", "f16" if dtype == "f16" else "f32")
    check_index_file(folder / "i", spec, unique=True)
    opened = open_index(folder / "i", spec, editable=True)  # and again when vectors were added to what was read
    opened.add(np.arange(count, count + 50), vectors(50, seed=1), threads=1)
    opened.save(str(folder / "j"))
    check_index_file(folder / "j", IndexSpec("j", count + 50, WIDTH, "e", spec.dtype), unique=True)
    assert vectors_of(opened, np.arange(count + 50, dtype=np.uint64)).shape == (count + 50, WIDTH)


def _places(content: bytes) -> dict[str, int]:
    """Where the parts of a file of float16 vectors begin."""
    head = 8 + 2 * COUNT * WIDTH
    graph = head + 64
    connectivity, base = struct.unpack_from("<QQ", content, graph + 8)
    levels = graph + 40
    nodes = levels + 2 * COUNT
    level = np.frombuffer(content, np.int16, COUNT, levels).astype(np.int64)
    sizes = 14 + 4 * base + level * (4 + 4 * connectivity)
    upper = int(np.flatnonzero(level)[0])
    starts = nodes + np.cumsum(sizes) - sizes
    return {
        "head": head,
        "graph": graph,
        "levels": levels,
        "nodes": nodes,
        "lower": int(np.flatnonzero(level == 0)[0]),
        "upper list": int(starts[upper]) + 14 + 4 * base,
    }


def _put(place: str, offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        struct.pack_into(f"<{form}", content, _places(bytes(content))[place] + offset, value)

    return change


def _point_up(content: bytearray) -> None:
    """A list of level 1 names a node of level 0."""
    places = _places(bytes(content))
    struct.pack_into("<II", content, places["upper list"], 1, places["lower"])


def _start_below(content: bytearray) -> None:
    places = _places(bytes(content))
    struct.pack_into("<Q", content, places["graph"] + 32, places["lower"])


DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "rows": (lambda c: struct.pack_into("<I", c, 0, 5), "it has 5 vectors"),
    "columns": (lambda c: struct.pack_into("<I", c, 4, 2**31), "vectors of 2147483648 bytes"),
    "magic": (_put("head", 0, "B", 0), "no index of USearch"),
    "version": (_put("head", 7, "H", 3), "version 3.26 of its format, expected version 2"),
    "metric": (_put("head", 13, "B", ord("e")), "its kinds are"),
    "scalar": (_put("head", 14, "B", 11), "its kinds are"),
    "kind of keys": (_put("head", 15, "B", 15), "its kinds are"),
    "kind of slots": (_put("head", 16, "B", 14), "its kinds are"),
    "present": (_put("head", 17, "Q", COUNT - 1), "its head says 299 vectors"),
    "deleted": (_put("head", 25, "Q", 2**63), "deleted ones"),
    "dimensions": (_put("head", 33, "Q", 2**40), "dimensions"),
    "several vectors a key": (_put("head", 41, "B", 1), "its kinds are"),
    "size": (_put("graph", 0, "Q", 2**40), "graph has 1099511627776 nodes"),
    "connectivity": (_put("graph", 8, "Q", 2**63), "connectivity"),
    "no connectivity": (_put("graph", 8, "Q", 0), "connectivity"),
    "connectivity of the base": (_put("graph", 16, "Q", 33), "nodes have"),
    "highest level": (_put("graph", 24, "Q", 9), "levels of its nodes"),
    "entry": (_put("graph", 32, "Q", COUNT), "a search begins at node 300"),
    "entry of a low level": (_start_below, "expected one of level"),
    "a negative level": (_put("levels", 0, "h", -1), "levels of its nodes are -1"),
    "a level": (_put("levels", 0, "h", 1), "nodes have|another level"),
    "a key": (_put("nodes", 0, "Q", 2**64 - 1), "has the key"),
    "a level of a node": (_put("nodes", 8, "h", 1), "another level"),
    "a count": (_put("nodes", 10, "I", 2**31), "neighbours that there are not"),
    "a neighbour": (_put("nodes", 14, "I", COUNT), "neighbours that there are not"),
    "an upper count": (_put("upper list", 0, "I", 17), "level 1 that there are not"),
    "an upper neighbour": (_put("upper list", 4, "I", COUNT), "level 1 that there are not"),
    "an upper neighbour of a low level": (_point_up, "do not reach it"),
    "a vector that is not finite": (lambda c: struct.pack_into("<H", c, 8, 0x7C00), "not finite"),
    "a vector that is not a number": (lambda c: struct.pack_into("<H", c, 8, 0xFE01), "not finite"),
    "a byte more": (lambda c: c.append(0), "nodes have"),
    "a byte less": (lambda c: c.pop(), "nodes have"),
    "no graph": (lambda c: c.__delitem__(slice(8 + 2 * COUNT * WIDTH + 70, None)), "ends before its graph"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_number_that_leads_out_is_one_error(tmp_path: Path, spec: IndexSpec, kind: str) -> None:
    change, message = DAMAGE[kind]
    content = bytearray((tmp_path / spec.file).read_bytes())
    change(content)
    (tmp_path / spec.file).write_bytes(content)
    for editable in (False, True):
        with pytest.raises(RetrievalError, match=f"^index 'i.usearch' cannot be read: .*({message})"):
            open_index(tmp_path / spec.file, spec, editable=editable)


def test_two_vectors_of_one_key_can_be_searched_and_not_added_to(tmp_path: Path, spec: IndexSpec) -> None:
    content = bytearray((tmp_path / spec.file).read_bytes())
    _put("nodes", 0, "Q", 7)(content)
    (tmp_path / spec.file).write_bytes(content)
    assert len(open_index(tmp_path / spec.file, spec)) == COUNT
    with pytest.raises(RetrievalError, match="two vectors have one key"):
        open_index(tmp_path / spec.file, spec, editable=True)


def test_a_key_that_the_index_lacks_is_one_error(tmp_path: Path, spec: IndexSpec) -> None:
    opened = open_index(tmp_path / spec.file, spec, editable=True)
    np.testing.assert_allclose(vectors_of(opened, np.array([3], np.uint64)), vectors()[3:4], atol=2e-2)
    with pytest.raises(RetrievalError, match="a task has examples that it lacks"):
        vectors_of(opened, np.array([3, COUNT], np.uint64))


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_walked_or_are_one_error(
    tmp_path: Path, spec: IndexSpec, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Searched by walking, and added to: a number that was overlooked would end this process."""
    monkeypatch.setattr(retrieval, "EXACT_BELOW", 10)
    rng, whole = random.Random(seed), (tmp_path / spec.file).read_bytes()
    for _ in range(60):
        (tmp_path / spec.file).write_bytes(mutate_bytes(rng, whole))
        try:
            for editable in (False, True):
                opened = open_index(tmp_path / spec.file, spec, editable=editable)
                opened.search(vectors(1, seed=5)[0], 20, exact=False, threads=1)
            opened.add(np.arange(10_000, 10_005), vectors(5, seed=6), threads=1)
        except RetrievalError:
            continue
