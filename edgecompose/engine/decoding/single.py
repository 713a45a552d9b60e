"""What the passes of one sequence alone need: its cache and its blend, bound to the session."""

from __future__ import annotations

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.blend_rows import BlendRows, is_padded
from edgecompose.engine.decoding.decoder_pass import Float, PassBinding, PassRow
from edgecompose.engine.decoding.kv_cache import KVCache
from edgecompose.engine.device import Device, Session
from edgecompose.engine.fusing import FusedWeights
from edgecompose.engine.merged import MergedAdapter
from edgecompose.engine.slots import bind_slots

Blend = MergedAdapter | FusedWeights


class Single:
    """A binding of a session with one blend and a cache of one row.

    `blend` is the one whose memory the session reads, so that every entry of the cache was computed with it. Binding
    the hundreds of slots of a blend takes 2 ms, so the next sequence under the same blend gets what this one used.
    """

    def __init__(self, session: Session, spec: BaseSpec, device: Device, blend: Blend) -> None:
        self.blend = blend
        self.cache = KVCache(session, spec, device)
        self._pass = PassBinding(session, spec, slots=not isinstance(blend, FusedWeights))
        self._version = self.cache.version
        self._padded = BlendRows(spec.slots, device)
        if isinstance(blend, FusedWeights):
            blend.bind_inputs(self._pass.binding, device)
        elif is_padded(blend):
            bind_slots(self._pass.binding, blend, device, leading=(1, 1))
        else:
            self._padded.place([blend])
            self._padded.bind(self._pass.binding, 1)

    def run(self, row: PassRow, *, together: bool, long: bool) -> Float:
        """The logits of a pass, (row.kept, vocabulary); overwritten by the next.

        Args:
            together: all tokens meet the blend at once, as those of a prompt do; else token by token.
            long: as in `PassBinding.run`.

        Raises:
            GenerationError: memory does not suffice for the cache.
            BundleError: the graph fails on what it should take.
        """
        self.cache.grow(row.past + len(row.ids), lengths=[row.past])
        if self._version != self.cache.version:
            self.cache.bind(self._pass.binding, 1)
            self._version = self.cache.version
        count = len(row.ids)
        return self._pass.run([row], (count, 1, 1) if together else (1, 1, count), long=long)
