"""The table of poolings: how a sentence encoder's token vectors become one vector.

To add a pooling, add a row. The exporter, the manifest and the embedder follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgecompose.errors import BundleError

Float = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pooling:
    """One row.

    Attributes:
        name: as in a manifest.
        flag: the field of sentence-transformers' `1_Pooling/config.json` that is true.
        pool: token vectors (t, d) -> their vector (d,).
    """

    name: str
    flag: str
    pool: Callable[[Float], Float]


POOLINGS: Mapping[str, Pooling] = MappingProxyType(
    {
        row.name: row
        for row in (
            Pooling("mean", "pooling_mode_mean_tokens", lambda hidden: hidden.mean(axis=0)),
            Pooling("cls", "pooling_mode_cls_token", lambda hidden: hidden[0]),
            Pooling("max", "pooling_mode_max_tokens", lambda hidden: hidden.max(axis=0)),
        )
    }
)


def pooling_of(name: str) -> Pooling:
    """The row of a pooling.

    Raises:
        BundleError: no row has that name.
    """
    if name not in POOLINGS:
        raise BundleError(
            f"the embedder pools by {name!r:.40}, expected one of {', '.join(POOLINGS)}; update edgecompose"
        )
    return POOLINGS[name]


def pool(hidden: Float, pooling: Pooling, ends: int = 0) -> list[Float]:
    """Vectors (d,) of a text; with `ends` > 0 also the means of its first and of its last `ends` tokens.

    A prompt usually says at its beginning or end what is to be done.

    Args:
        hidden: token vectors (t, d).
    """
    whole = pooling.pool(hidden)
    parts = [whole, hidden[:ends].mean(axis=0), hidden[-ends:].mean(axis=0)] if ends else [whole]
    return [np.asarray(part, np.float32) for part in parts]
