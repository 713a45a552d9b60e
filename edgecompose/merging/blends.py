"""Loads the adapters of a bundle and caches their blends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.adapter import Adapter, parse_adapter
from edgecompose.bundle.files import Bundle
from edgecompose.caching import Lazy, LazyParts, LruCache
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import AdapterError
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import composition_digest
from edgecompose.settings import MergeSettings
from edgecompose.timing import Timings

Double = npt.NDArray[np.float64]
#: Blends are kept for the next request with the same one, up to so many bytes.
CACHE_BYTES = 64 << 20


class Blends(LazyParts):
    """Blends of a bundle's adapters on a device. Safe between threads."""

    def __init__(self, bundle: Bundle, device: Device, *, cache_bytes: int = CACHE_BYTES) -> None:
        super().__init__()
        self._bundle, self._device = bundle, device
        self._adapters: dict[str, Adapter] = {}
        self._blends: LruCache[MergedAdapter] = LruCache(cache_bytes, lambda merged: merged.bytes)

    @Lazy
    def merger(self) -> Merger:
        """Computes blends; opened when first needed."""
        return Merger(self._device)

    def close(self) -> None:
        """Drop the merger, the adapters and the blends; they are loaded again when needed."""
        with self._loading:
            self._adapters.clear()
            self._blends.clear()
            self.drop()

    def adapter(self, name: str) -> Adapter:
        """One adapter of the bundle, read and checked once.

        Raises:
            UnknownAdapter: the bundle has no adapter of that name.
            AdapterError: its file cannot be used, or is not what the manifest says.
        """
        with self._loading:
            if name not in self._adapters:
                base = self._bundle.manifest.base
                content = self._bundle.adapter_content(name)
                adapter = parse_adapter(content, name, base.slots, base.identity)
                spec = self._bundle.manifest.adapters[name]
                if (adapter.rank, adapter.bits) != (spec.rank, spec.bits):
                    raise AdapterError(
                        f"adapter '{name}' has rank {adapter.rank} in {adapter.bits} bits, the manifest says rank "
                        f"{spec.rank} in {spec.bits} bits; export the bundle again"
                    )
                self._adapters[name] = adapter
            return self._adapters[name]

    def blend(
        self, weights: Mapping[str, float], settings: MergeSettings, timings: Timings | None = None
    ) -> MergedAdapter:
        """The blend of adapters with weights, from the cache or merged now.

        Raises:
            UnknownAdapter: the bundle has no adapter of that name.
            MergeError: the adapters cannot be merged this way.
        """
        timings = timings or Timings()
        with timings.stage("load"):
            adapters = [self.adapter(name) for name in weights]
        with timings.stage("merge"):
            digest = self.digest(weights, settings)
            merged = self._blends.get(digest)
            if merged is None:
                inner = self.inner_products(list(weights)) if settings.norm_guard else None
                merged = self.merger.merge(adapters, list(weights.values()), settings, inner)
                self._blends.put(digest, merged)
            return merged

    def digest(self, weights: Mapping[str, float], settings: MergeSettings) -> str:
        """Content hash of a blend, without reading an adapter."""
        manifest = self._bundle.manifest
        files = {name: manifest.files[manifest.adapters[name].file].sha256 for name in weights}
        return composition_digest(files, weights, settings)

    def inner_products(self, names: Sequence[str]) -> Double:
        """Inner products (K, K) of adapters' updates: those of the manifest, or else computed from the factors."""
        known = self._bundle.manifest.inner_products
        pairs = [(min(one, other), max(one, other)) for one in names for other in names]
        if all(other in known.get(one, {}) for one, other in pairs):
            return np.array([known[one][other] for one, other in pairs]).reshape(len(names), len(names))
        return self.merger.inner_products([self.adapter(name) for name in names])
