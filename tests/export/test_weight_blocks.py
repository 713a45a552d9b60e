"""Blocks stand for the values of the package gguf, and ONNX Runtime's kernels compute with exactly these values."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("onnx", reason="a package of edgecompose-export")

import onnxruntime
from onnx import TensorProto, numpy_helper

from edgecompose.errors import ExportError
from edgecompose_export.graphs.writer import MICROSOFT, GraphWriter
from edgecompose_export.weights.blocks import BlockForm, Blocks, packed, stored_rows
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS, read_blocks
from edgecompose_export.weights.rounding import quantize_4bit, quantize_8bit

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
#: Bytes where a type's float16 scales stand.
SCALES_AT = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
#: Scales of a file: usual ones, both ends of float16, its smallest numbers, zeros, negative ones.
SCALES = st.one_of(st.sampled_from([65504.0, -65504.0, 6e-8, 6.1e-5, 0.0, -0.0]), st.floats(-2, 2, width=16))
#: Every form that weights are stored in.
FORMS = sorted({*GGUF_FORMS.values(), BlockForm(8, 64), BlockForm(4, 32, zeros=True)}, key=str)


def raw_blocks(kind: str, rows: int, seed: int, scales: tuple[float, float] = (0.01, -0.02)) -> npt.NDArray[np.uint8]:
    """Rows of three random blocks with these scales."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    raw = np.random.default_rng(seed).integers(0, 256, (3 * rows, size), np.uint8)
    for offset, scale in zip(SCALES_AT[kind], scales, strict=False):
        raw[:, offset : offset + 2] = np.array([scale], "<f2").view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", GGUF_FORMS)
@given(rows=st.integers(1, 3), seed=st.integers(0, 2**32 - 1), scales=st.tuples(SCALES, SCALES))
def test_values_are_those_of_gguf(kind: str, rows: int, seed: int, scales: tuple[float, float]) -> None:
    """Without offsets to the last bit; with offsets but for what rounding m + z d loses."""
    raw = raw_blocks(kind, rows, seed, scales)
    exact = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    blocks = read_blocks(raw, kind)
    ours = blocks.values(exact.shape[1])
    assert blocks.form == GGUF_FORMS[kind]
    if blocks.offsets is None:
        np.testing.assert_array_equal(ours, exact)
        return
    middle = 1 << (blocks.bits - 1)
    largest = middle * np.abs(blocks.scales) + np.abs(blocks.offsets)
    distance = np.abs(ours - exact).reshape(*largest.shape, -1).max(-1)
    assert (distance <= 4 * np.finfo(np.float32).eps * largest).all()


@pytest.mark.parametrize("kind", GGUF_FORMS)
def test_some_rows_are_those_of_all(kind: str) -> None:
    raw = raw_blocks(kind, 5, 1)
    whole = read_blocks(raw, kind)
    width = whole.codes.shape[1] * whole.codes.shape[2]
    np.testing.assert_array_equal(whole[2:4].values(width), read_blocks(raw[2:4], kind).values(width))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", GGUF_FORMS)
def test_a_scale_that_is_no_number_is_refused(kind: str, value: float) -> None:
    for scales in ((value, 0.0), (0.0, value))[: len(SCALES_AT[kind])]:
        with pytest.raises(ExportError, match="a scale is not a finite number; the file is damaged"):
            read_blocks(raw_blocks(kind, 1, 0, scales), kind)


@pytest.mark.parametrize("kind", [kind.name for kind in GGMLQuantizationType if kind.name not in GGUF_FORMS])
def test_any_other_type_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ExportError, match=f"weights have the type {kind}, expected one of F32, F16, BF16, Q8_0, "):
        read_blocks(np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]), np.uint8), kind)


# Stored for MatMulNBits and GatherBlockQuantized


def random_blocks(form: BlockForm, rows: int, width: int, seed: int) -> Blocks:
    rng = np.random.default_rng(seed)
    count, half = -(-width // form.block), 1 << (form.bits - 1)
    codes = rng.integers(0, 2 * half, (rows, count, form.block)).astype(np.uint8)
    zeros = rng.integers(0, 2 * half, (rows, count)).astype(np.uint8) if form.zeros else None
    middle = half if zeros is None else zeros[..., None]
    inside = np.arange(count * form.block).reshape(count, form.block) < width
    codes = np.where(inside, codes, middle).astype(np.uint8)
    scales = (rng.normal(size=(rows, count)) * 0.01).astype(np.float32)
    offsets = (rng.normal(size=(rows, count)) * 0.05).astype(np.float32) if form.offsets else None
    return Blocks(form.bits, codes, scales, offsets, zeros)


def run(graph: GraphWriter, feeds: dict[str, npt.NDArray[Any]]) -> Float:
    graph.output("y", TensorProto.FLOAT, ["n", "m"])
    session = onnxruntime.InferenceSession(graph.model().SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], feeds)[0])


def product(blocks: Blocks, x: Float, level: int) -> Float:
    """Inputs times the stored rows, as one node of ONNX Runtime."""
    form, width, graph = blocks.form, x.shape[1], GraphWriter("product")
    codes, scales, zeros = stored_rows(blocks, width)
    assert codes.shape == (len(scales), form.blocks(width), form.block * form.bits // 8)
    extended = x
    if form.offsets:
        sums = x.reshape(len(x), -1, form.block).sum(-1)
        extended = np.concatenate([x, *[sums] * form.copies(width)], -1)
    assert extended.shape[1] == form.extended(width)
    names = [graph.input("x", TensorProto.FLOAT, ["n", extended.shape[1]])]
    for name, values in (("codes", codes), ("scales", scales.reshape(-1)), ("zeros", zeros)):
        if values is not None:
            names.append(
                graph.tensor(
                    numpy_helper.from_array(
                        np.ascontiguousarray(values.reshape(values.shape if name == "codes" else -1)), name
                    )
                )
            )
    graph.node(
        "MatMulNBits",
        names,
        "y",
        domain=MICROSOFT,
        K=extended.shape[1],
        N=len(scales),
        bits=form.bits,
        block_size=form.block,
        accuracy_level=level,
    )
    return run(graph, {"x": extended})


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("width", [64, 192, 320, 1024])
def test_products_are_those_of_the_values(form: BlockForm, width: int) -> None:
    """With float activations to 1 in 50,000, or 1 in 100 where offsets have twice 4 bits; with int8 ones to 1 in 50."""
    blocks = random_blocks(form, 40, width, width)
    x = np.random.default_rng(1).normal(size=(5, width)).astype(np.float32)
    exact = x.astype(np.float64) @ blocks.values(width).astype(np.float64).T
    largest = np.abs(exact).max()
    float_tolerance = 1e-2 if form.offsets and form.bits == 4 else 2e-5
    assert np.abs(product(blocks, x, 1) - exact).max() < float_tolerance * largest
    assert np.abs(product(blocks, x, 4) - exact).max() < 2e-2 * largest


@given(
    form=st.sampled_from(FORMS),
    count=st.integers(1, 9),
    rows=st.integers(1, 5),
    seed=st.integers(0, 999),
    size=st.sampled_from([1e-30, 1.0, 1e20]),
)
def test_offsets_are_kept_in_twice_the_bits(form: BlockForm, count: int, rows: int, seed: int, size: float) -> None:
    """What the stored rows give for an input that is 1 in one block: its sum of weights."""
    width = count * form.block
    blocks = random_blocks(form, rows, width, seed)
    offsets = None if blocks.offsets is None else blocks.offsets * np.float32(size)
    blocks = Blocks(blocks.bits, blocks.codes, blocks.scales * np.float32(size), offsets, blocks.zeros)
    codes, scales, zeros = stored_rows(blocks, width)
    if form.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], -1).reshape(rows, -1, form.block)
    if zeros is not None:
        zeros = np.stack([zeros & 15, zeros >> 4], -1).reshape(rows, -1)[:, :count]
    middle: Any = 1 << (form.bits - 1) if zeros is None else zeros[..., None].astype(np.float64)
    weights = ((codes.astype(np.float64) - middle) * scales[..., None]).reshape(rows, -1)
    x = np.repeat(np.eye(count), form.block, axis=1)
    extended = np.concatenate([x, *[np.eye(count) * form.block] * form.copies(width)], 1)
    assert extended.shape[1] <= weights.shape[1] < extended.shape[1] + form.block
    sums = np.pad(extended, ((0, 0), (0, weights.shape[1] - extended.shape[1]))) @ weights.T
    exact = blocks.values(width).astype(np.float64).reshape(rows, count, -1).sum(-1).T
    bound = 0.0 if offsets is None else form.block * float(np.abs(offsets).max()) / 2 ** (2 * form.bits - 2)
    assert np.abs(sums - exact).max() <= bound + 1e-5 * np.abs(exact).max()


@pytest.mark.parametrize("form", [form for form in FORMS if not form.offsets and not form.zeros], ids=str)
def test_rows_that_are_looked_up_are_the_values(form: BlockForm) -> None:
    blocks = random_blocks(form, 12, 256, 3)
    codes, scales, _ = stored_rows(blocks, 256)
    graph = GraphWriter("rows")
    ids = graph.input("ids", TensorProto.INT64, ["n"])
    names = [
        graph.tensor(numpy_helper.from_array(values, name))
        for name, values in (("codes", codes.reshape(12, -1)), ("scales", scales))
    ]
    graph.node(
        "GatherBlockQuantized",
        [names[0], ids, names[1]],
        "y",
        domain=MICROSOFT,
        gather_axis=0,
        quantize_axis=1,
        block_size=form.block,
        bits=form.bits,
    )
    picked = np.array([11, 0, 5, 5], np.int64)
    np.testing.assert_array_equal(run(graph, {"ids": picked}), blocks.values(256)[picked])


def test_two_codes_are_a_byte_the_first_one_low() -> None:
    assert packed(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]


# Quantised here

ROWS = st.tuples(st.integers(1, 4), st.integers(1, 100), st.integers(0, 999), st.sampled_from([1e-3, 1.0, 1e3]))


def random_rows(rows: int, width: int, seed: int, size: float) -> Float:
    return (np.random.default_rng(seed).normal(size=(rows, width)) * size).astype(np.float32)


def blocks_of(rows: Float, block: int) -> Float:
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % block))).reshape(len(rows), -1, block)


@given(shape=ROWS, block=st.sampled_from([16, 32, 64]))
def test_eight_bits_are_within_half_a_step_and_their_own_rounding(
    shape: tuple[int, int, int, float], block: int
) -> None:
    rows = random_rows(*shape)
    width = rows.shape[1]
    values = quantize_8bit(rows, block).values(width)
    steps = np.abs(blocks_of(rows, block)).max(-1, keepdims=True) / 127
    assert (np.abs(blocks_of(values - rows, block)) <= steps * 0.50001).all()
    np.testing.assert_allclose(quantize_8bit(values, block).values(width), values, rtol=1e-6)


@given(shape=ROWS)
def test_four_bits_are_within_half_a_step(shape: tuple[int, int, int, float]) -> None:
    rows = random_rows(*shape)
    blocks = blocks_of(rows, 32)
    steps = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
    errors = blocks_of(quantize_4bit(rows).values(rows.shape[1]) - rows, 32)
    assert (np.abs(errors) <= steps * 0.5001 + 1e-6 * np.abs(blocks).max()).all()


def test_what_has_16_levels_is_kept() -> None:
    levels = np.random.default_rng(0).permuted(np.tile(np.arange(32) % 16, (8, 4, 1)), axis=-1)
    rows = (levels * 0.25 - 1.5).reshape(8, -1).astype(np.float32)
    np.testing.assert_array_equal(quantize_4bit(rows).values(128), rows)
    importance = np.random.default_rng(1).random(128).astype(np.float32)
    np.testing.assert_allclose(quantize_4bit(rows, importance).values(128), rows, atol=1e-5)


@given(
    seed=st.integers(0, 999),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
    outlier=st.sampled_from([1.0, 1e4, 1e6, 1e8, 1e10]),
)
def test_importance_never_raises_the_weighted_error(seed: int, spread: float, outlier: float) -> None:
    """Though one input weighs any number of times as much as the others; and no weight goes far from its value."""
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=(16, 64)) * 0.05).astype(np.float32)
    importance = np.exp(rng.normal(size=64) * spread).astype(np.float32)
    importance[rng.integers(64)] *= np.float32(outlier)
    plain, weighted = quantize_4bit(rows).values(64), quantize_4bit(rows, importance).values(64)
    errors = [
        (np.square(rows.astype(np.float64) - values) * importance).reshape(16, 2, 32).sum(-1)
        for values in (plain, weighted)
    ]
    assert (errors[1] <= errors[0] * 1.01).all()
    blocks = blocks_of(rows, 32)
    steps = (blocks.max(-1, keepdims=True) - blocks.min(-1, keepdims=True)) / 15
    assert (np.abs(blocks_of(weighted - rows, 32)) <= 4 * steps).all()
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("importance", [None, np.ones(64, np.float32), np.zeros(64, np.float32)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.3, -7.5])
def test_constant_rows_stay_themselves(value: float, importance: Float | None) -> None:
    rows = np.full((3, 64), value, np.float32)
    np.testing.assert_allclose(quantize_4bit(rows, importance).values(64), rows, rtol=1e-6)
    np.testing.assert_allclose(quantize_8bit(rows).values(64), rows, rtol=1e-6)
