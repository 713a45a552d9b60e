"""A safetensors file is read as the library reads it, and refused in one line where its header lies."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load, save

from edgecompose.errors import AdapterError, RetrievalError
from edgecompose.guard.tensors import metadata_of, tensors_of
from tests.attack.mutations import mutate_bytes

DTYPES = [np.uint8, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]
SOUND = save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.uint8)}, {"k": "v"})


def file_of(header: Any, data: bytes = b"", *, size: int | None = None) -> bytes:
    """A file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: Any = (), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [first, last]}


@given(
    st.dictionaries(
        st.text(st.sampled_from("ab.é"), min_size=1),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, min_side=0, max_side=4))
        ),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
)
def test_it_reads_what_the_library_wrote(values: dict[str, Any], metadata: dict[str, str]) -> None:
    content = save(values, metadata or None)
    tensors, read_metadata = tensors_of(content, "x", AdapterError)
    assert read_metadata == metadata
    assert set(tensors) == set(values)
    for name, value in load(content).items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
        assert tensors[name].tobytes() == value.tobytes()
        assert tensors[name].flags.aligned


def test_metadata_can_be_read_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(SOUND)
    assert metadata_of(tmp_path / "x", "x", AdapterError) == {"k": "v"}
    with pytest.raises(RetrievalError, match="y cannot be read: .*No such file"):
        metadata_of(tmp_path / "none", "y", RetrievalError)


LIES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a header beyond the end": file_of({}, size=100),
    "a header of 2^63 bytes": file_of({}, size=2**63),
    "no JSON": file_of(b"{"),
    "no UTF-8": file_of(b"\xff"),
    "an array": file_of([]),
    "nested deep": file_of(b"[" * 100_000),
    "a number of many digits": file_of(b'{"a":' + b"1" * 5000 + b"}"),
    "a name twice": file_of(b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":1}', b"x"),
    "metadata that are no texts": file_of({"__metadata__": {"a": 1}}),
    "a tensor that is no object": file_of({"a": 1}),
    "a place that is no pair": file_of({"a": {"dtype": "U8", "shape": [], "data_offsets": [0]}}),
    "a place that is a boolean": file_of({"a": {"dtype": "U8", "shape": [], "data_offsets": [False, True]}}, b"x"),
    "a negative place": file_of({"a": entry(-1, 0)}),
    "a negative size": file_of({"a": entry(0, 1, (-1, -1))}, b"x"),
    "a shape that is a text": file_of({"a": entry(0, 1, "1")}, b"x"),
    "a type that numpy lacks": file_of({"a": entry(0, 2, (1,), "BF16")}, b"xx"),
    "a type that is no text": file_of({"a": entry(0, 2, (1,), ["F16"])}, b"xx"),
    "fewer bytes than values": file_of({"a": entry(0, 4, (2,), "F32")}, b"x" * 4),
    "beyond the end": file_of({"a": entry(0, 4, (4,))}, b"xyz"),
    "huge": file_of({"a": entry(0, 2**63, (2**63,))}, b"xyz"),
    "a huge shape of nothing": file_of({"a": entry(0, 0, (0, 2**62, 2**62))}),
    "overlap": file_of({"a": entry(0, 2, (2,)), "b": entry(1, 3, (2,))}, b"xyz"),
    "a hole": file_of({"a": entry(1, 3, (2,))}, b"xyz"),
    "bytes behind": file_of({"a": entry(0, 2, (2,))}, b"xyz"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_header_that_lies_is_one_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="^adapter 'x' cannot be read: .*; export it again$") as caught:
        tensors_of(LIES[kind], "adapter 'x'", AdapterError)
    assert len(str(caught.value)) < 500
    (tmp_path / "x").write_bytes(LIES[kind])
    try:
        metadata_of(tmp_path / "x", "x", AdapterError)
    except AdapterError:
        return


@pytest.mark.parametrize("read", [tensors_of, lambda content, *rest: load(content)])
def test_what_is_refused_here_is_what_the_library_refuses(read: Callable[..., Any]) -> None:
    assert read(SOUND, "x", AdapterError)
    for kind in ("a hole", "bytes behind", "overlap", "beyond the end", "fewer bytes than values"):
        with pytest.raises(Exception, match=r"."):
            read(LIES[kind], "x", AdapterError)


def test_damaged_files_give_tensors_or_one_error() -> None:
    rng = random.Random(0)
    for _ in range(500):
        try:
            tensors_of(mutate_bytes(rng, SOUND), "x", AdapterError)
        except AdapterError:
            continue
