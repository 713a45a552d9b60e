"""The precisions of an exported base, and the form of each weight under them."""

from __future__ import annotations

from typing import Literal

from edgecompose_export.base.source import Base
from edgecompose_export.weights.forms import EIGHT, FOUR, Form, source_form
from edgecompose_export.weights.places import EMBEDDING, HEAD, linear_tensors
from edgecompose_export.weights.source import WeightSource, linear_weights

Precision = Literal["source", "auto", "int8", "int4", "fp16", "fp32"]
#: Precisions with weights that a blend can be fused into.
FLOAT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
#: Number of weights below which a folder gets 'auto' if the caller names no precision.
_LARGEST_MIXED = 3_000_000_000


def uniform_forms(source: WeightSource, precision: Precision) -> dict[str, Form]:
    """The form of each weight under a precision other than 'auto', by tensor.

    The output layer and the embedding have 8 bits where linear modules have 4. Weights that have no more bits in the
    file stay unchanged.
    """
    tied = source.config.tied
    tensors = [*linear_tensors(source.config), HEAD, *([] if tied else [EMBEDDING])]
    forms: dict[str, Form] = {}
    for tensor in tensors:
        own = source_form(source.type_of(EMBEDDING if tensor == HEAD and tied else tensor))
        if precision == "source":
            forms[tensor] = own
        elif precision in FLOAT_PRECISIONS:
            forms[tensor] = "float16" if precision == "fp16" else "float32"
        else:
            bits = 8 if precision == "int8" or tensor in (HEAD, EMBEDDING) else 4
            unchanged = not isinstance(own, str) and own.bits <= bits
            forms[tensor] = own if unchanged else EIGHT if bits == 8 or _ragged(source, tensor) else FOUR
    return forms


def _ragged(source: WeightSource, tensor: str) -> bool:
    """Whether rows end inside a block, so that block sums are impossible."""
    return source.shape(tensor)[1] % FOUR.block != 0


def default_precision(base: Base) -> Precision:
    """The precision if the caller names none: measuring a mix takes too long for the largest bases."""
    if base.path.is_file():
        return "source"
    return "auto" if linear_weights(base.weights) < _LARGEST_MIXED else "int8"
