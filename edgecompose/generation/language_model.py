"""The base model with its tokenizer: encodes conversations, and generates answers under a blend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path

from edgecompose.bundle.files import Bundle
from edgecompose.bundle.specs import KVCacheType
from edgecompose.caching import Lazy, LazyParts, LruCache
from edgecompose.engine.decoding.decoder import Decoder, FusedDecoder, decoder_graph
from edgecompose.engine.decoding.decoder_state import DecoderState, Float, check_capacity
from edgecompose.engine.decoding.saved_prompt import CacheLayout, read_prompts, write_prompts
from edgecompose.engine.device import Device, processor, runtime_version
from edgecompose.engine.fusing import FusedWeights, Fuser, fused_bytes, require_fusing
from edgecompose.engine.graph_file import graph_path
from edgecompose.engine.memory import release_freed_memory
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError
from edgecompose.generation.decode import Chunk, decode
from edgecompose.generation.drafts.draft_length import DraftLength
from edgecompose.generation.drafts.drafter import Drafter
from edgecompose.generation.drafts.example_tokens import example_tokens
from edgecompose.generation.encoding import ConversationEncoder, Encoded
from edgecompose.generation.messages import Message, Overflow
from edgecompose.generation.prompt_cache import CachedPrompt, PromptCache
from edgecompose.generation.sampler import Sampler, greedy
from edgecompose.generation.scoring import score_choices
from edgecompose.generation.stopping import AnswerText
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.settings import Sampling
from edgecompose.timing import Timings

Blend = MergedAdapter | FusedWeights
#: Caches have room for the prompt and so many tokens at once; for longer answers they grow.
_FIRST_ROOM = 192
#: Answers of at most so many tokens are written without drafts.
_SHORT = 4


class LanguageModel(LazyParts):
    """The tokenizer and the decoders of a bundle's base; parts are loaded when first needed. Safe between threads.

    Fused weights are kept up to `fused_cache_bytes`, by default the last that were used.

    Args:
        kv_cache: the element type of keys and values of blends that are attached.

    Raises:
        GenerationError: the base has no such KV cache on the device.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        *,
        kv_cache: KVCacheType = "float32",
        fused_cache_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self._bundle, self._device, self.kv_cache = bundle, device, kv_cache
        self._spec = bundle.manifest.base
        self._graph = decoder_graph(self._spec, device, kv_cache=kv_cache)
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
        spec, path = self._spec, self._bundle.path(self._spec.tokenizer)
        return Tokenizer(path, chat_template=template, vocabulary=spec.vocabulary, context=spec.context)

    @Lazy
    def decoder(self) -> Decoder:
        """The base model."""
        data = self._bundle.graph_data(self._spec.graph) if self._device.kind == "cpu" else {}
        decoder = Decoder(graph_path(self._bundle, self._graph), self._spec, self._device, data=data)
        del data
        release_freed_memory()
        return decoder

    @Lazy
    def fusing(self) -> Fuser:
        """The graph that fuses a blend into a float base."""
        graph = require_fusing(self._spec).fuse_graph
        return Fuser(graph_path(self._bundle, graph), self._spec, self._device)

    @Lazy
    def fused_decoder(self) -> FusedDecoder:
        """The decoder that reads fused weights."""
        graph = decoder_graph(self._spec, self._device, fused=True)
        return FusedDecoder(graph_path(self._bundle, graph), self._spec, self._device)

    def encode(
        self, messages: Sequence[Message], encoder: ConversationEncoder, *, room: int, most: int, overflow: Overflow
    ) -> Encoded:
        """Token ids of a conversation that ends where the answer begins.

        Args:
            room: tokens that the answer takes at least.
            most: tokens that a shortened prompt may have.

        Raises:
            GenerationError: nothing to send, or a conversation that would be sent raw.
            PromptTooLong: prompt and room exceed the context, and may not be shortened or not enough.
            Cancelled: another thread ended it.
        """
        encoded = encoder.encode(messages, most, overflow=overflow)
        check_capacity(len(encoded.ids) + room, self._spec)
        return encoded

    def attach(self, merged: MergedAdapter, *, fuse: bool, timings: Timings) -> Blend:
        """The blend to attach, or a copy of the base's weights with the blend fused in; an empty blend is attached.

        Raises:
            GenerationError: `fuse`, and the base cannot be fused, or keys and values are quantised.
        """
        if not fuse or not merged.modules:
            return merged
        if self.kv_cache != "float32":
            raise GenerationError(
                f"a fused base has a KV cache in float32, not in {self.kv_cache}; leave out --fuse or --kv-cache"
            )
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
        max_tokens: int | None,
        sampling: Sampling | None,
        stop: Sequence[str],
        prompt_cache: bool,
        keep_space: bool = False,
        drafts: int = 0,
        examples: Callable[[], Iterable[str]] = tuple,
    ) -> Generator[Chunk, None, None]:
        """The answer to a prompt, chunk by chunk; chunks without a token come while the prompt is read.

        Args:
            max_tokens: the longest answer; one that is longer, or None, goes up to the context.
            keep_space: as in `AnswerText`.
            drafts: tokens that are drafted for a pass at most; the answer is the same.
            examples: gives answers that this one may resemble, the most alike first; called when drafts need them.
        """
        room = self._spec.context - len(encoded.ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        cached = prompt_cache and isinstance(blend, MergedAdapter)
        state, logits = yield from self._read(encoded.ids, blend, limit, timings, cached=cached)
        after = logits.copy()
        draw = greedy if sampling is None else Sampler(sampling, encoded.ids)
        text = AnswerText(self.tokenizer, stop, keep_space=keep_space)
        drafter = None
        if drafts and limit > _SHORT and isinstance(blend, MergedAdapter):
            # weights that are fed are multiplied by other kernels for one row than for several, which round differently
            drafter = Drafter(
                encoded.ids,
                most=drafts,
                length=DraftLength(state.costs),
                examples=lambda: example_tokens(self.tokenizer, examples(), raw=encoded.form == "raw"),
                end=self._spec.end_tokens,
            )
        chunks = decode(
            state,
            logits,
            text,
            max_tokens=limit,
            end_tokens=self._spec.end_tokens,
            draw=draw,
            drafter=drafter,
        )
        try:
            yield from timings.each(chunks, "decode")
        except Exception:
            cached = False  # the KV cache of a sequence that failed may not match its tokens
            raise
        finally:
            written = list(state.tokens)
            state.leave(keep=len(encoded.ids) if cached else 0)
            if cached:
                self._prompts.put(CachedPrompt(state, len(encoded.ids), written, after))

    def read_ahead(self) -> bool:
        """Read a pass of what an answer wrote as a later prompt will read it; False where nothing is left to read.

        A conversation's next turn then has less to read. Call it while nobody waits for an answer.
        """
        prompt = self._prompts.take_behind()
        if prompt is not None:
            self._prompts.put(prompt.read_pass())
        return prompt is not None

    def save_prompts(self, path: Path, *, limit: int) -> int:
        """Write the prompts that were read under attached blends to a file, the last ones, and say how many.

        Args:
            limit: bytes of the largest file.

        Raises:
            GenerationError: the device is no CPU.
            OSError: the file cannot be written.
        """
        layout, prompts = self._layout(), self._prompts.save(limit)
        write_prompts(path, prompts, layout)
        return len(prompts)

    def load_prompts(self, path: Path, *, limit: int) -> int | None:
        """Read the file that `save_prompts` wrote; None where its prompts were read by another base or machine.

        Raises:
            GenerationError: the device is no CPU; or the file cannot be read, is larger than `limit`, or is damaged.
        """
        layout = self._layout()
        prompts = read_prompts(path, layout, limit=limit)
        if prompts is not None:
            self._prompts.load(prompts, pass_tokens=layout.pass_tokens)
        return None if prompts is None else len(prompts)

    def _layout(self) -> CacheLayout:
        """The layout of caches, with the identity of all that computes them: graph, weights, kernels, processor."""
        if self._device.kind != "cpu":
            raise GenerationError(
                f"a prompt cache is saved on a CPU only, and the device is {self._device.kind}; leave out "
                "--prompt-cache, or use --device cpu"
            )
        files = self._bundle.manifest.files
        names = [self._graph, f"{self._spec.graph}.data"]
        parts = [*(files[name].sha256 for name in names if name in files), runtime_version(), processor()]
        return self.decoder.layout(hashlib.sha256(json.dumps(parts).encode()).hexdigest())

    def choose(
        self, encoded: Encoded, choices: Sequence[Sequence[int]], blend: Blend, timings: Timings
    ) -> Generator[Chunk, None, list[float]]:
        """Mean log-likelihood (nats a token) of each choice, given as token ids; empty chunks come on the way."""
        longest = max(map(len, choices))
        state, logits = yield from self._read(encoded.ids, blend, longest, timings, cached=False)
        scores = []
        for score in timings.each(score_choices(state, logits, choices), "decode"):
            scores.append(score)
            yield Chunk("")
        return scores

    def _read(
        self, ids: list[int], blend: Blend, room: int, timings: Timings, *, cached: bool
    ) -> Generator[Chunk, None, tuple[DecoderState, Float]]:
        """A sequence that has read a prompt, and the logits after it; an empty chunk after each part but the last."""
        capacity, reserve = len(ids) + room, len(ids) + min(room, _FIRST_ROOM)
        with timings.stage("load"):
            decoder = self.fused_decoder if isinstance(blend, FusedWeights) else self.decoder
        logits = None
        with timings.stage("prefill"):

            def start() -> DecoderState:
                return decoder.start(blend, capacity, reserve=reserve)  # type: ignore[arg-type]  # its own kind

            taken = self._prompts.take(blend.digest, ids, start) if cached else None
            if taken is None:
                state = start()
            else:
                state, logits = taken
                state.extend(capacity)
                if logits is not None:
                    return state, logits
        passes = timings.each(state.passes(ids[state.length :]), "prefill")
        for rows in passes:
            logits = rows[-1]
            if state.length < len(ids):
                yield Chunk("")
        assert logits is not None, "a prompt has tokens"
        return state, logits
