"""The form in which each weight is stored: its own, another block form, or floats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgecompose_export.weights.blocks import BlockForm, Blocks
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS
from edgecompose_export.weights.rounding import quantize_4bit, quantize_8bit
from edgecompose_export.weights.source import WeightSource

FloatForm = Literal["float32", "float16", "bfloat16"]
#: 'shared' is for an embedding that is not tied, but almost equal to the output layer: it reads the same bytes.
Form = BlockForm | FloatForm | Literal["shared"]
#: Values of a matrix that are converted at once.
_CHUNK = 1 << 22
#: The lossless form of each float type of a file.
FLOAT_FORMS: Mapping[str, FloatForm] = {"F32": "float32", "F64": "float32", "F16": "float16", "BF16": "bfloat16"}
EIGHT, FOUR = BlockForm(8, 32), BlockForm(4, 32, offsets=True)
#: Gives the blocks of a tensor in a form that comes neither from the file nor from simple rounding.
Quantised = Callable[[], Blocks]


def source_form(kind: str) -> Form:
    """The lossless form of a tensor of a file."""
    return FLOAT_FORMS[kind] if kind in FLOAT_FORMS else GGUF_FORMS[kind]


def read_form(
    source: WeightSource,
    tensor: str,
    form: BlockForm,
    *,
    start: int,
    stop: int,
    importance: npt.NDArray[np.float32] | None = None,
) -> Blocks:
    """Rows of a matrix in a block form: the blocks of the file if they have it, else quantised from its values."""
    if GGUF_FORMS.get(source.type_of(tensor)) == form:
        return source.blocks(tensor, start, stop)
    rows = source.floats(tensor, start, stop)
    return quantize_4bit(rows, importance) if form == FOUR else quantize_8bit(rows, form.block)


def row_chunks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a matrix of which each has about _CHUNK values."""
    rows, width = shape
    step = max(1, _CHUNK // width)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
