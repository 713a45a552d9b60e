"""Factors of a blend for the linear modules that the base's own model has, some of which pack several."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import BaseSpec
from edgecompose.formats.architectures import PACKED

#: Module -> factors A (L, R, n_in) and B (L, R, n_out).
Factors = Mapping[str, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]


def model_factors(factors: Factors, base: BaseSpec, modules: Container[str]) -> Factors:
    """Factors for the modules of a model, of transformers or in a GGUF file.

    Where it packs several into one, A holds the ranks of all parts one after another, and B is zero but for the columns
    of each part at its ranks: the update is the same.

    Args:
        base: says how wide the parts of packed modules are.
        modules: those that the model has, such as `Architecture.paths`.
    """
    groups, result = {group.name: group for group in base.slots}, dict(factors)
    for packed, parts in PACKED.items():
        present = [part for part in parts if part in factors]
        if packed not in modules or not present:
            continue
        a = np.concatenate([factors[part][0] for part in present], axis=1)
        b = np.zeros((*a.shape[:2], sum(groups[part].n_out for part in parts)), np.float32)
        row = column = 0
        for part in parts:
            if part in factors:
                own = result.pop(part)[1]
                b[:, row : row + own.shape[1], column : column + own.shape[2]] = own
                row += own.shape[1]
            column += groups[part].n_out
        result[packed] = (a, b)
    return result
