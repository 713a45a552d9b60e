"""Adapter files: round trip, fit to a base, and hostile content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from edgecompose.bundle.adapter import FORMAT, Adapter, adapter_metadata, adapter_to_bytes, load_adapter
from edgecompose.bundle.quantization import BITS, Bits, dequantize, largest_magnitude
from edgecompose.errors import AdapterError, SlotMismatch
from tests.factories import BASE, GROUPS, make_adapter, write_adapter

Tensors = dict[str, npt.NDArray[Any]]
METADATA = {"format": FORMAT, "base": BASE, "source": "{}"}


def _load(path: Path) -> Adapter:
    return load_adapter(path, "one", GROUPS, BASE)


@pytest.mark.parametrize("bits", BITS)
def test_a_file_gives_back_what_was_written(tmp_path: Path, bits: Bits) -> None:
    written = make_adapter("one", bits=bits, scaling=[2.0, 0.0, 0.5])
    path = write_adapter(tmp_path / "one.safetensors", written)
    read = _load(path)
    assert (read.name, read.bits, read.base, read.rank) == ("one", bits, BASE, 4)
    assert read.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(read.modules) == sorted(written.modules)
    for name, module in written.modules.items():
        result = read.modules[name]
        assert np.array_equal(dequantize(result.a), dequantize(module.a))
        assert np.array_equal(dequantize(result.b), dequantize(module.b))
        assert result.scaling.tolist() == [2.0, 0.0, 0.5]
        assert result.ranks.tolist() == [4, 4, 4]


def test_metadata_can_be_read_alone(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one.safetensors", make_adapter("one"))
    assert adapter_metadata(path) == METADATA | {"bits": "8", "source": '{"name": "one"}'}


def test_the_same_input_gives_the_same_bytes() -> None:
    modules = make_adapter("one").modules
    turned = {name: modules[name] for name in reversed(list(modules))}
    files = {
        adapter_to_bytes(value, bits=8, base=BASE, source=source)
        for value in (modules, turned)
        for source in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
        for _ in range(4)
    }
    assert len(files) == 1


def test_a_mismatch_lists_every_module_that_does_not_fit(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one.safetensors", make_adapter("one"))
    query, _, down = GROUPS
    other = (replace(query, n_out=48), replace(down, layers=2))  # k_proj has no slot at all
    with pytest.raises(SlotMismatch) as caught:
        load_adapter(path, "one", other, BASE)
    message = str(caught.value)
    assert "'q_proj' is 3 layers of 24x48 in this base, 3 layers of 24x40 in the adapter" in message
    assert "'down_proj' is 2 layers of 56x24 in this base, 3 layers of 56x24 in the adapter" in message
    assert "'k_proj' has no slot in this base" in message


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "one.safetensors", make_adapter("one", base="c" * 64))
    with pytest.raises(SlotMismatch, match="cccccccccccc.*bbbbbbbbbbbb"):
        _load(path)


def _replace(key: str, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {key: np.ascontiguousarray(change(tensors[key]))}


def _without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def _with_value(key: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        values = values.copy()
        values.flat[0] = value
        return values

    return _replace(key, change)


HOSTILE: dict[str, Callable[[Tensors], Tensors]] = {
    "no tensor at all": lambda tensors: {},
    "no scales": _without("q_proj.B.scales"),
    "no ranks": _without("k_proj.ranks"),
    "float codes": _replace("q_proj.A.codes", lambda v: v.astype(np.float32)),
    "wide scales": _replace("q_proj.A.scales", lambda v: v.astype(np.float32)),
    "wide scaling": _replace("q_proj.scaling", lambda v: v.astype(np.float64)),
    "flat codes": _replace("q_proj.A.codes", lambda v: v.reshape(v.shape[0], -1)),
    "three gains": _replace("q_proj.gains", lambda v: np.append(v, v[:1])),
    "infinite scale": _with_value("q_proj.A.scales", np.inf),
    "scale that is not a number": _with_value("q_proj.B.scales", np.nan),
    "infinite gain": _with_value("q_proj.gains", np.inf),
    "scaling that is not a number": _with_value("q_proj.scaling", np.nan),
    "no row": _replace("q_proj.A.codes", lambda v: v[:0]),
    "fewer rows in B": _replace("q_proj.B.codes", lambda v: v[:-1]),
    "fewer layers": _replace("q_proj.scaling", lambda v: v[:-1]),
    "ranks of fewer layers": _replace("q_proj.ranks", lambda v: v[:-1]),
    "no scale": _replace("q_proj.A.scales", lambda v: v[..., :0]),
    "scales that do not divide": _replace("q_proj.A.scales", lambda v: np.repeat(v, 7, axis=2)),
    "a scale a value": _replace("q_proj.A.scales", lambda v: np.repeat(v, 8, axis=2)),
    "a scale a row": _replace("q_proj.A.scales", lambda v: v[..., :1]),
    "a negative rank": _with_value("q_proj.ranks", -5),
    "a rank beyond the rows": _with_value("q_proj.ranks", 2_000_000_000),
    "rows beyond the rank": _with_value("q_proj.ranks", 2),
    "a negative threshold": _with_value("q_proj.thresholds", -1),
    "an infinite threshold": _with_value("q_proj.thresholds", np.inf),
    "thresholds that rise": _replace("q_proj.thresholds", lambda v: v[:, ::-1]),
    "a gain of 1e30": _with_value("q_proj.gains", 1e30),
    "a gain of -3e38": _with_value("k_proj.gains", -3e38),
    "a scaling of 1e38": _with_value("q_proj.scaling", 1e38),
    "scales of 65504": _replace("q_proj.A.scales", lambda v: np.full_like(v, 65504)),
    "a tensor of something else": lambda tensors: tensors | {"q_proj.magnitude": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_tensors_are_refused(tmp_path: Path, what: str, bits: Bits) -> None:
    good = write_adapter(tmp_path / "good.safetensors", make_adapter("one", bits=bits))
    path = tmp_path / "one.safetensors"
    path.write_bytes(save(HOSTILE[what](load(good.read_bytes())), metadata=METADATA | {"bits": str(bits)}))
    with pytest.raises(AdapterError, match="adapter 'one'"):
        _load(path)


#: Reports of errors that are none.
ERRORS = ('{"errors": 5}', '{"errors": {"q_proj": "x"}}', '{"errors": {"q_proj": NaN}}', '{"errors": {"q_proj": true}}')


@pytest.mark.parametrize("source", ["{", "[]", "3", '{"a":' * 9000, '{"a":' * 40 + "1" + "}" * 40, "9" * 5000, *ERRORS])
def test_a_source_that_is_no_object_is_refused(tmp_path: Path, source: str) -> None:
    good = write_adapter(tmp_path / "good.safetensors", make_adapter("one"))
    path = tmp_path / "one.safetensors"
    path.write_bytes(save(load(good.read_bytes()), metadata=METADATA | {"bits": "8", "source": source}))
    with pytest.raises(AdapterError, match="adapter 'one': its source is no"):
        _load(path)


@pytest.mark.parametrize(("field", "value"), [("scaling", 1e7), ("thresholds", -1.0), ("ranks", 99)])
def test_what_would_be_refused_is_not_written(field: str, value: float) -> None:
    module = make_adapter("one").modules["q_proj"]
    bad = replace(module, **{field: np.full_like(getattr(module, field), value)})
    with pytest.raises(AdapterError, match="module 'q_proj'"):
        adapter_to_bytes({"q_proj": bad}, bits=8, base=BASE, source={})


@pytest.mark.parametrize("bits", BITS)
def test_the_bound_of_magnitudes_holds(bits: Bits) -> None:
    for module in make_adapter("one", bits=bits).modules.values():
        for factor in (module.a, module.b):
            largest = float(np.abs(dequantize(factor)).max())
            assert largest * (1 - 1e-6) <= largest_magnitude(factor) <= 2.5 * largest


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_codes_in_float16_must_be_finite(tmp_path: Path, bad: float) -> None:
    good = write_adapter(tmp_path / "good.safetensors", make_adapter("one", bits=16))
    path = tmp_path / "one.safetensors"
    tensors = _with_value("q_proj.B.codes", bad)(load(good.read_bytes()))
    path.write_bytes(save(tensors, metadata=METADATA | {"bits": "16"}))
    with pytest.raises(AdapterError, match="not finite"):
        _load(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, METADATA, METADATA | {"bits": "3"}, METADATA | {"bits": "8", "format": "edgecompose-adapter/99"}],
)
def test_another_format_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    good = write_adapter(tmp_path / "good.safetensors", make_adapter("one"))
    path = tmp_path / "one.safetensors"
    path.write_bytes(save(load(good.read_bytes()), metadata=metadata))
    with pytest.raises(AdapterError, match="expected"):
        _load(path)


def test_codes_of_other_bits_than_the_metadata_says_are_refused(tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good.safetensors", make_adapter("one", bits=8))
    path = tmp_path / "one.safetensors"
    path.write_bytes(save(load(good.read_bytes()), metadata=METADATA | {"bits": "4"}))
    with pytest.raises(AdapterError, match="does not fit|another type"):
        _load(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_a_foreign_file_of_types_that_numpy_lacks_is_refused(tmp_path: Path, dtype: str) -> None:
    size = 8 if dtype == "BF16" else 4
    header = f'{{"base_model.q_proj.lora_A.weight":{{"dtype":"{dtype}","shape":[2,2],"data_offsets":[0,{size}]}}}}'
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(size))
    with pytest.raises(AdapterError):
        _load(path)


@given(st.binary(max_size=200) | st.integers(0, 400))
def test_garbage_and_cut_files_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes | int) -> None:
    path = tmp_path_factory.mktemp("hostile") / "one.safetensors"
    if isinstance(content, int):
        whole = write_adapter(path, make_adapter("one", groups=GROUPS[:1], rank=1)).read_bytes()
        content = whole[: len(whole) * content // 401]
    path.write_bytes(content)
    for read in (_load, adapter_metadata):
        with pytest.raises(AdapterError):
            read(path)


@pytest.mark.parametrize("read", [_load, adapter_metadata])
def test_a_file_that_is_not_there_is_an_adapter_error(tmp_path: Path, read: Callable[[Path], object]) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(AdapterError, match="cannot be read"):
            read(path)
