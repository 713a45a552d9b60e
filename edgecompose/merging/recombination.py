"""The small matrices that the exact methods mix rows by, and what is kept of a set of adapters for its next blend.

Gram matrices of the rows come from the device; the decompositions are numpy's. What the weights do not enter belongs to
the set of adapters, and is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter
from edgecompose.caching import LruCache
from edgecompose.engine.merged import SIDES, Side
from edgecompose.merging import core_space, sparsify
from edgecompose.merging.gather import Gather, Part, Parts, layer_chunks, ranks_of
from edgecompose.merging.methods import method_of
from edgecompose.merging.runner import GraphRunner
from edgecompose.settings import MergeSettings

Double = npt.NDArray[np.float64]
Grams = tuple[Double, Double]
#: The adapters that touch a module, with their weights.
Members = Sequence[tuple[Adapter, float]]
_GRAMS_BYTES, _SPACES_BYTES = 64 << 20, 128 << 20


class Mixer:
    """Solves for the mixtures of svd and of the core methods. Safe between threads.

    Args:
        gather: the rows of a module's factors in some layers, stacked.
    """

    def __init__(self, runner: GraphRunner, gather: Gather) -> None:
        self._runner, self._gather = runner, gather
        self._grams: LruCache[Grams] = LruCache(_GRAMS_BYTES, lambda pair: pair[0].nbytes + pair[1].nbytes)
        self._spaces: LruCache[core_space.CoreSpace] = LruCache(_SPACES_BYTES, lambda space: space.nbytes)

    def mixes(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Mixes]:
        """The mixtures of each module.

        Args:
            parts: with scales but without weights, in the order of `members`.
        """
        solve = self._truncated if settings.method == "svd" else self._in_core_space
        return solve(members, parts, settings)

    def _truncated(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Mixes]:
        """The mixtures of svd, for rows of A with their weights."""
        mixes = {}
        for module, (gram_a, gram_b) in self.gram_matrices(parts).items():
            ranks = ranks_of(parts[module])
            cap = max(ranks) if settings.rank is None and settings.energy is None else settings.rank
            row_weights = np.repeat([w for _, w in members[module]], ranks)
            weighted = gram_a * np.outer(row_weights, row_weights)
            mixes[module] = core_space.truncate(weighted, gram_b, cap, settings.energy)
        return mixes

    def _in_core_space(
        self, members: Mapping[str, Members], parts: Parts, settings: MergeSettings
    ) -> dict[str, core_space.Mixes]:
        """The mixtures of the core methods; what the weights do not enter is kept for the next blend of the set."""
        keys = {
            m: f"{_set_of(p)}|{method_of(settings).trims}|{settings.density}|{settings.dare_seed}"
            for m, p in parts.items()
        }
        spaces = {module: self._spaces.get(key) for module, key in keys.items()}
        missing = {module: parts[module] for module, space in spaces.items() if space is None}
        grams = self.gram_matrices(missing)
        combine = core_space.disjoint_mean if settings.method == "core_ties" else core_space.weighted_sum
        mixes = {}
        for module, space in spaces.items():
            if space is None:
                space = _trimmed_space(module, members[module], grams[module], ranks_of(parts[module]), settings)
                self._spaces.put(keys[module], space)
            core = combine(space.cores, np.array([w for _, w in members[module]], np.float64))
            whole = np.ones(len(core))
            mixes[module] = core_space.Mixes(None, space.between(core), whole, whole)
        return mixes

    def gram_matrices(self, parts: Parts) -> dict[str, Grams]:
        """Inner products of the stacked rows of each module, A A^T and B B^T: (L, R, R), scales in A, no weights."""
        known = {module: self._grams.get(_set_of(members)) for module, members in parts.items()}
        missing = {module: parts[module] for module, grams in known.items() if grams is None}
        found: dict[tuple[str, Side], npt.NDArray[np.float32]] = {}
        for module, members in missing.items():
            layers, rank = len(members[0].weight_a), sum(ranks_of(members))
            for side in SIDES:
                found[module, side] = np.empty((layers, rank, rank), np.float32)

        def fill(item: tuple[str, Side, slice]) -> None:
            module, side, layers = item
            rows = self._gather(parts[module], side, layers)
            count, rank = found[module, side][layers].shape[:2]
            out = self._runner.device.empty((count, rank, rank))
            shape = np.array([count, rank, parts[module][0].side(side)[0].width], np.int64)
            self._runner.run(f"{rows.graph}gram", {**rows.feeds, "shape": shape}, out.data_ptr(), (count, rank, rank))
            found[module, side][layers] = out.numpy()

        self._runner.map(fill, layer_chunks(missing, self._runner.device))
        for module, members in missing.items():
            grams = found[module, "A"].astype(np.float64), found[module, "B"].astype(np.float64)
            self._grams.put(_set_of(members), grams)
            known[module] = grams
        return {module: grams for module, grams in known.items() if grams is not None}


def _trimmed_space(
    module: str,
    members: Members,
    grams: Grams,
    ranks: tuple[int, ...],
    settings: MergeSettings,
) -> core_space.CoreSpace:
    """Shared bases, and the updates in them with the entries dropped that the method drops."""
    space = core_space.core_space(*grams, ranks)
    cores = space.cores
    if settings.method == "core_dare":
        kept = np.stack([
            sparsify.random_mask(cores.shape[1:], settings.density, f"{adapter.digest}/{module}/{settings.dare_seed}")
            for adapter, _ in members
        ])  # fmt: skip
        return replace(space, cores=cores * kept / settings.density)
    return replace(space, cores=core_space.prune(cores, sparsify.kept_entries(settings.density, cores[0, 0].size)))


def _set_of(parts: Sequence[Part]) -> str:
    """Names the factors of a module in some adapters, in their order."""
    return "|".join(part.key for part in parts)
