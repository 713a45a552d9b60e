"""The base as a whole: a conversation to ids, ids to an answer under a blend; knows nothing of tasks or retrieval."""

from __future__ import annotations

import functools
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompose.bundle.files import Bundle
from edgecompose.bundle.specs import PromptForm
from edgecompose.caching import LruCache
from edgecompose.engine.decoder import Decoder, Decoding, Float, FusedDecoder, check_capacity, decoder_graph
from edgecompose.engine.device import Device
from edgecompose.engine.fusing import FusedWeights, Fuser, fused_bytes, require_fusing
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError
from edgecompose.generation.decode import Finish, generate, score_choices, stream_text
from edgecompose.generation.messages import Message, Overflow, shortened
from edgecompose.generation.prompt_cache import PrefixCache
from edgecompose.generation.sampler import Sampler, likeliest
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from edgecompose.timing import Clock

Blend = MergedAdapter | FusedWeights
#: Caches have room for the prompt and so many tokens at once; for longer answers they grow.
_FIRST_ROOM = 192


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, how many were left out of it, and whether it stands in the chat template."""

    ids: list[int]
    dropped: int
    form: PromptForm


class LanguageModel:
    """The tokenizer and the decoders of a bundle's base; parts are loaded when first needed. Safe between threads.

    Folded weights are kept up to `fused_cache_bytes`, by default the last that were used.
    """

    def __init__(self, bundle: Bundle, device: Device, *, fused_cache_bytes: int | None = None) -> None:
        self._bundle, self._device = bundle, device
        self._spec = bundle.manifest.base
        self._size_of_folded = 0 if self._spec.fusing is None else fused_bytes(self._spec.fusing)
        limit = self._size_of_folded if fused_cache_bytes is None else fused_cache_bytes
        self._folded: LruCache[FusedWeights] = LruCache(limit, lambda folded: folded.bytes)
        self._prefixes = PrefixCache()
        self._loading = threading.RLock()

    def close(self) -> None:
        """Drop the sessions and what was computed; they are loaded again if asked for."""
        with self._loading:
            self._folded.clear()
            self._prefixes.clear()
            for part in ("tokenizer", "decoder", "fusing", "fused_decoder"):
                self.__dict__.pop(part, None)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer and chat template."""
        with self._loading:
            template = None if self._spec.chat_template is None else self._bundle.text(self._spec.chat_template)
            return Tokenizer(self._bundle.path(self._spec.tokenizer), chat_template=template)

    @functools.cached_property
    def decoder(self) -> Decoder:
        """The base model."""
        decoder = Decoder(self._beside_decoder(decoder_graph(self._spec, self._device)), self._spec, self._device)
        release_freed_memory()
        return decoder

    @functools.cached_property
    def fusing(self) -> Fuser:
        """The fold graph of a float base."""
        graph = require_fusing(self._spec).fuse_graph
        return Fuser(self._beside_decoder(graph), self._spec, self._device)

    @functools.cached_property
    def fused_decoder(self) -> FusedDecoder:
        """The decoder that reads folded weights."""
        graph = decoder_graph(self._spec, self._device, folded=True)
        return FusedDecoder(self._beside_decoder(graph), self._spec, self._device)

    def encode(self, messages: Sequence[Message], room: int, *, raw: bool, overflow: Overflow) -> Encoded:
        """Token ids of a conversation that ends where the answer begins.

        Args:
            room: tokens that the answer may take.
            raw: send the one message as it is, without the chat template.
            overflow: 'truncate' leaves out what does not fit: the oldest turns, then the beginning of the last one.

        Raises:
            GenerationError: nothing to send, or a conversation that would be sent raw.
            PromptTooLong: prompt and room exceed the context, and may not be shortened or not enough.
        """
        if raw and len(messages) > 1:
            raise GenerationError(
                "a conversation of several messages cannot be sent raw; leave --raw out, or send one prompt"
            )
        ids = whole = self._ids(messages, raw)
        excess = len(ids) + room - self._spec.context
        while excess > 0 and overflow == "truncate":
            shorter = shortened(messages) or self._cut(messages, excess)
            if shorter is None:
                break
            messages = shorter
            ids = self._ids(messages, raw)
            excess = len(ids) + room - self._spec.context
        check_capacity(len(ids) + room, self._spec)
        if not ids:
            raise GenerationError("the prompt is empty; give some text")
        return Encoded(ids, len(whole) - len(ids), "raw" if raw else "chat")

    def attach(self, merged: MergedAdapter, *, fuse: bool, clock: Clock) -> Blend:
        """What meets the base: the blend, or a copy of the base's weights with it; nothing to fold in none."""
        if not fuse or not merged.modules:
            return merged
        with clock.stage("load"), self._loading:
            folding = self.fusing
        with clock.stage("fuse"), self._loading:  # one copy of the weights at a time
            folded = self._folded.get(merged.digest)
            if folded is None:
                # what goes is let go of first, so that its memory is used again
                self._folded.make_room(self._size_of_folded)
                folded = folding.fuse(merged)
                self._folded.put(merged.digest, folded)
            return folded

    def write(
        self,
        encoded: Encoded,
        blend: Blend,
        clock: Clock,
        *,
        max_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[str],
        reuse: bool,
    ) -> Generator[str, None, tuple[int, Finish]]:
        """Pieces of the answer as they become certain; returns how many tokens it has and why it ended."""
        decoding, logits = self._read(encoded.ids, blend, max_tokens, clock, reuse=reuse)
        draw = likeliest if sampling is None else Sampler(sampling, encoded.ids)
        tokens = generate(decoding, logits, max_tokens=max_tokens, end_tokens=self._spec.end_tokens, draw=draw)
        stream, count = stream_text(tokens, self.tokenizer, stop), 0
        try:
            while True:
                with clock.stage("decode"):
                    token, piece = next(stream)
                count += token >= 0
                if piece:
                    yield piece
        except StopIteration as ended:
            return count, ended.value
        except Exception:
            reuse = False  # a sequence that broke is not what its tokens say
            raise
        finally:
            if reuse and isinstance(blend, MergedAdapter):
                self._prefixes.put(decoding)

    def choose(self, encoded: Encoded, choices: Sequence[Sequence[int]], blend: Blend, clock: Clock) -> list[float]:
        """Mean log-likelihood (nats a token) of each choice, given as token ids."""
        decoding, logits = self._read(encoded.ids, blend, max(map(len, choices)), clock, reuse=False)
        with clock.stage("decode"):
            return score_choices(decoding, logits, choices)

    def _ids(self, messages: Sequence[Message], raw: bool) -> list[int]:
        if raw:
            return self.tokenizer.encode_prompt(messages[-1].content)
        return self.tokenizer.encode(self.tokenizer.chat([{"role": m.role, "content": m.content} for m in messages]))

    def _cut(self, messages: Sequence[Message], excess: int) -> tuple[Message, ...] | None:
        """The last message without its first tokens, as many as are too many; None where that is all of it."""
        last = self.tokenizer.encode(messages[-1].content)
        if excess >= len(last):
            return None
        return (*messages[:-1], Message("user", self.tokenizer.decode(last[excess:])))

    def _read(self, ids: list[int], blend: Blend, room: int, clock: Clock, *, reuse: bool) -> tuple[Decoding, Float]:
        """A sequence that has read a prompt, and the logits after it."""
        capacity, reserve = len(ids) + room, len(ids) + min(room, _FIRST_ROOM)
        with clock.stage("load"), self._loading:
            decoder = self.fused_decoder if isinstance(blend, FusedWeights) else self.decoder
        with clock.stage("prefill"):
            decoding = self._prefixes.take(blend.digest, ids) if reuse and isinstance(blend, MergedAdapter) else None
            if decoding is None:
                decoding = decoder.start(blend, capacity, reserve=reserve)  # type: ignore[arg-type]  # its own kind
            else:
                decoding.extend(capacity)
            return decoding, decoding.forward(ids[decoding.length :])[0]

    def _beside_decoder(self, graph: str) -> Path:
        """Checked path of a graph that reads the decoder's data file, which is checked as well."""
        data = f"{self._spec.graph}.data"
        if data in self._bundle.manifest.files:
            self._bundle.path(data)
        return self._bundle.path(graph)
