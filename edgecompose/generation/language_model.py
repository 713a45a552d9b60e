"""The base model with its tokenizer: encodes conversations, and generates answers under a blend."""

from __future__ import annotations

import bisect
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgecompose.bundle.files import Bundle
from edgecompose.bundle.specs import PromptForm
from edgecompose.caching import Lazy, LazyParts, LruCache
from edgecompose.engine.decoder import Decoder, FusedDecoder, decoder_graph
from edgecompose.engine.decoder_state import DecoderState, Float, check_capacity
from edgecompose.engine.device import Device
from edgecompose.engine.fusing import FusedWeights, Fuser, fused_bytes, require_fusing
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError
from edgecompose.generation.decode import Chunk, decode
from edgecompose.generation.messages import Message, Overflow, without_oldest_turns
from edgecompose.generation.prompt_cache import PromptCache
from edgecompose.generation.sampler import Sampler, greedy
from edgecompose.generation.scoring import score_choices
from edgecompose.generation.stopping import AnswerText
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from edgecompose.timing import Timings

Blend = MergedAdapter | FusedWeights
#: Caches have room for the prompt and so many tokens at once; for longer answers they grow.
_FIRST_ROOM = 192


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a prompt, how many were left out of it, and whether it stands in the chat template."""

    ids: list[int]
    dropped: int
    form: PromptForm


class LanguageModel(LazyParts):
    """The tokenizer and the decoders of a bundle's base; parts are loaded when first needed. Safe between threads.

    Fused weights are kept up to `fused_cache_bytes`, by default the last that were used.
    """

    def __init__(self, bundle: Bundle, device: Device, *, fused_cache_bytes: int | None = None) -> None:
        super().__init__()
        self._bundle, self._device = bundle, device
        self._spec = bundle.manifest.base
        self._fused_bytes = 0 if self._spec.fusing is None else fused_bytes(self._spec.fusing)
        limit = self._fused_bytes if fused_cache_bytes is None else fused_cache_bytes
        self._fused: LruCache[FusedWeights] = LruCache(limit, lambda weights: weights.bytes)
        self._prompts = PromptCache()

    def close(self) -> None:
        """Drop the sessions and caches; they are loaded again when needed."""
        with self._loading:
            self._fused.clear()
            self._prompts.clear()
            self.drop()

    @Lazy
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer and chat template."""
        template = None if self._spec.chat_template is None else self._bundle.text(self._spec.chat_template)
        return Tokenizer(self._bundle.path(self._spec.tokenizer), chat_template=template)

    @Lazy
    def decoder(self) -> Decoder:
        """The base model."""
        decoder = Decoder(self._beside_decoder(decoder_graph(self._spec, self._device)), self._spec, self._device)
        release_freed_memory()
        return decoder

    @Lazy
    def fusing(self) -> Fuser:
        """The graph that fuses a blend into a float base."""
        graph = require_fusing(self._spec).fuse_graph
        return Fuser(self._beside_decoder(graph), self._spec, self._device)

    @Lazy
    def fused_decoder(self) -> FusedDecoder:
        """The decoder that reads fused weights."""
        graph = decoder_graph(self._spec, self._device, fused=True)
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
        if overflow == "truncate":
            ids = self._truncated(messages, ids, self._spec.context - room, raw=raw)
        check_capacity(len(ids) + room, self._spec)
        if not ids:
            raise GenerationError("the prompt is empty; give some text")
        return Encoded(ids, len(whole) - len(ids), "raw" if raw else "chat")

    def attach(self, merged: MergedAdapter, *, fuse: bool, timings: Timings) -> Blend:
        """The blend to attach, or a copy of the base's weights with the blend fused in; an empty blend is attached."""
        if not fuse or not merged.modules:
            return merged
        with timings.stage("load"):
            fuser = self.fusing
        with timings.stage("fuse"), self._loading:  # one copy of the weights at a time
            weights = self._fused.get(merged.digest)
            if weights is None:
                # the old weights are released first, so that their memory is used again
                self._fused.make_room(self._fused_bytes)
                weights = fuser.fuse(merged)
                self._fused.put(merged.digest, weights)
            return weights

    def write(
        self,
        encoded: Encoded,
        blend: Blend,
        timings: Timings,
        *,
        max_tokens: int,
        sampling: Sampling | None,
        stop: Sequence[str],
        prompt_cache: bool,
    ) -> Generator[Chunk, None, None]:
        """The answer to a prompt, chunk by chunk."""
        cached = prompt_cache and isinstance(blend, MergedAdapter)
        state, logits = self._read(encoded.ids, blend, max_tokens, timings, cached=cached)
        draw = greedy if sampling is None else Sampler(sampling, encoded.ids)
        text = AnswerText(self.tokenizer, stop)
        chunks = decode(state, logits, text, max_tokens=max_tokens, end_tokens=self._spec.end_tokens, draw=draw)
        try:
            yield from timings.each(chunks, "decode")
        except Exception:
            cached = False  # the KV cache of a sequence that failed may not match its tokens
            raise
        finally:
            if cached:
                self._prompts.put(state)

    def choose(self, encoded: Encoded, choices: Sequence[Sequence[int]], blend: Blend, timings: Timings) -> list[float]:
        """Mean log-likelihood (nats a token) of each choice, given as token ids."""
        state, logits = self._read(encoded.ids, blend, max(map(len, choices)), timings, cached=False)
        with timings.stage("decode"):
            return score_choices(state, logits, choices)

    def _ids(self, messages: Sequence[Message], raw: bool) -> list[int]:
        if raw:
            return self.tokenizer.encode_prompt(messages[-1].content)
        return self.tokenizer.encode(self.tokenizer.chat([{"role": m.role, "content": m.content} for m in messages]))

    def _truncated(self, messages: Sequence[Message], ids: list[int], most: int, *, raw: bool) -> list[int]:
        """Ids of a conversation without the fewest oldest turns that leave at most `most`; more if none fits."""
        if len(ids) <= most:
            return ids
        shorter = without_oldest_turns(messages)
        if shorter:
            count = bisect.bisect_left(shorter, True, key=lambda talk: len(self._ids(talk, raw)) <= most)
            messages = shorter[min(count, len(shorter) - 1)]
            ids = self._ids(messages, raw)
        while len(ids) > most:
            cut = self._cut(messages, len(ids) - most)
            if cut is None:
                break
            messages, ids = cut, self._ids(cut, raw)
        return ids

    def _cut(self, messages: Sequence[Message], excess: int) -> tuple[Message, ...] | None:
        """The last message without its first tokens, as many as are too many; None where that is all of it."""
        last = self.tokenizer.encode(messages[-1].content)
        if excess >= len(last):
            return None
        return (*messages[:-1], Message("user", self.tokenizer.decode(last[excess:])))

    def _read(
        self, ids: list[int], blend: Blend, room: int, timings: Timings, *, cached: bool
    ) -> tuple[DecoderState, Float]:
        """A sequence that has read a prompt, and the logits after it."""
        capacity, reserve = len(ids) + room, len(ids) + min(room, _FIRST_ROOM)
        with timings.stage("load"):
            decoder = self.fused_decoder if isinstance(blend, FusedWeights) else self.decoder
        with timings.stage("prefill"):
            state = self._prompts.take(blend.digest, ids) if cached else None
            if state is None:
                state = decoder.start(blend, capacity, reserve=reserve)  # type: ignore[arg-type]  # its own kind
            else:
                state.extend(capacity)
            return state, state.forward(ids[state.length :])[0]

    def _beside_decoder(self, graph: str) -> Path:
        """Checked path of a graph that reads the decoder's data file, which is checked as well."""
        data = f"{self._spec.graph}.data"
        if data in self._bundle.manifest.files:
            self._bundle.path(data)
        return self._bundle.path(graph)
