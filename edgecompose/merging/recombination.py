"""Low-rank recombination: small matrices that turn the stacked rows of adapters into those of their blend.

Gram matrices of the rows come from the device; the decompositions are numpy's. Results that do not depend on
weights are cached for each set of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter
from edgecompose.caching import LruCache
from edgecompose.engine.merged import SIDES, Side
from edgecompose.merging import core_space
from edgecompose.merging.gather import Gather, Part, Parts, layer_chunks, ranks_of
from edgecompose.merging.methods import method_of
from edgecompose.merging.runner import GraphRunner
from edgecompose.settings import MergeSettings

Double = npt.NDArray[np.float64]
Grams = tuple[Double, Double]
#: The adapters that touch a module, with their weights.
Members = Sequence[tuple[Adapter, float]]
_GRAMS_BYTES, _SPACES_BYTES = 64 << 20, 128 << 20


class Recombiner:
    """Computes the recombinations of 'truncate' and 'core' methods. Safe between threads.

    Args:
        gather: the rows of a module's factors in some layers, stacked.
    """

    def __init__(self, runner: GraphRunner, gather: Gather) -> None:
        self._runner, self._gather = runner, gather
        self._grams: LruCache[Grams] = LruCache(_GRAMS_BYTES, lambda pair: pair[0].nbytes + pair[1].nbytes)
        self._spaces: LruCache[core_space.CoreSpace] = LruCache(_SPACES_BYTES, lambda space: space.nbytes)

    def recombine(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Recombination]:
        """The recombination of each module.

        Args:
            parts: with scales but without weights, in the order of `members`.
        """
        solve = self._truncated if method_of(settings).plan == "truncate" else self._in_core_space
        return solve(members, parts, settings)

    def _truncated(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Recombination]:
        """Of svd, for rows of A with their weights."""
        result = {}
        for module, (gram_a, gram_b) in self.gram_matrices(parts).items():
            ranks = ranks_of(parts[module])
            largest = max(ranks) if settings.rank is None and settings.energy is None else settings.rank
            row_weights = np.repeat([w for _, w in members[module]], ranks)
            weighted = gram_a * np.outer(row_weights, row_weights)
            result[module] = core_space.truncate(weighted, gram_b, largest, settings.energy)
        return result

    def _in_core_space(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Recombination]:
        """Of the core methods; what does not depend on weights is kept for the next blend of the same adapters."""
        method = method_of(settings)
        assert method.combine is not None
        sparsify = method.sparsify
        name = "all" if sparsify is None else f"{sparsify.name}|{settings.density}|{settings.dare_seed}"
        keys = {module: f"{_set_of(members)}|{name}" for module, members in parts.items()}
        spaces = {module: self._spaces.get(key) for module, key in keys.items()}
        grams = self.gram_matrices({module: parts[module] for module, space in spaces.items() if space is None})
        result = {}
        for module, space in spaces.items():
            if space is None:
                whole = core_space.core_space(*grams[module], ranks_of(parts[module]))
                if sparsify is not None:
                    seeds = [f"{adapter.digest}/{module}/{settings.dare_seed}" for adapter, _ in members[module]]
                    whole = replace(whole, cores=sparsify.cores(whole.cores, settings.density, seeds))
                space = whole
                self._spaces.put(keys[module], space)
            core = method.combine(space.cores, np.array([w for _, w in members[module]], np.float64))
            energy = np.ones(len(core))
            result[module] = core_space.Recombination(None, space.between(core), energy, energy)
        return result

    def gram_matrices(self, parts: Parts) -> dict[str, Grams]:
        """Inner products of the stacked rows of each module, A A^T and B B^T: (L, R, R), scales in A, no weights."""
        known = {module: self._grams.get(_set_of(members)) for module, members in parts.items()}
        missing = {module: parts[module] for module, grams in known.items() if grams is None}
        filled: dict[tuple[str, Side], npt.NDArray[np.float32]] = {}
        for module, members in missing.items():
            layers, rank = len(members[0].weight_a), sum(ranks_of(members))
            for side in SIDES:
                filled[module, side] = np.empty((layers, rank, rank), np.float32)

        def fill(item: tuple[str, Side, slice]) -> None:
            module, side, layers = item
            rows = self._gather(parts[module], side, layers)
            count, rank = filled[module, side][layers].shape[:2]
            out = self._runner.device.empty((count, rank, rank))
            shape = np.array([count, rank, parts[module][0].side(side)[0].width], np.int64)
            self._runner.run(f"{rows.graph}gram", {**rows.feeds, "shape": shape}, out.data_ptr(), (count, rank, rank))
            filled[module, side][layers] = out.numpy()

        self._runner.map(fill, layer_chunks(missing, self._runner.device))
        for module, members in missing.items():
            grams = filled[module, "A"].astype(np.float64), filled[module, "B"].astype(np.float64)
            self._grams.put(_set_of(members), grams)
            known[module] = grams
        return {module: grams for module, grams in known.items() if grams is not None}


def _set_of(parts: Sequence[Part]) -> str:
    """Names the factors of a module in some adapters, in their order."""
    return "|".join(part.key for part in parts)
