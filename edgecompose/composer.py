"""The pipeline from a prompt to an answer: retrieve, merge, generate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgecompose.answering import Answering
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.specs import KVCacheType
from edgecompose.cancellation import Cancellation
from edgecompose.closing import Closing
from edgecompose.engine.device import Device, DeviceRequest, choose_device
from edgecompose.engine.fusing import require_fusing
from edgecompose.errors import EdgeComposeError, GenerationError, MergeError, RetrievalError
from edgecompose.generation.encoding import ConversationEncoder, Encoded, longest_prompt
from edgecompose.generation.language_model import LanguageModel
from edgecompose.generation.messages import Message, Prompt, conversation, query_text
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.merging.blends import CACHE_BYTES, Blends
from edgecompose.request import Answer, Composition, Request
from edgecompose.retrieval.retriever import Retrieval, Retriever
from edgecompose.settings import MOST_DRAFTS, MergeSettings, override, resolve
from edgecompose.streaming import Generation, write_all
from edgecompose.timing import Timings

Float = npt.NDArray[np.float32]
#: Answers of a batch that are written together.
_PARALLEL = 8
#: The largest file of saved prompts.
PROMPT_CACHE_BYTES = 1 << 30


class Composer(Closing):
    """An opened bundle on a device. Parts are loaded when first needed; `close` drops them.

    Safe between threads: several threads get the answers that one gets. Blends are kept up to `cache_bytes`, fused
    bases up to `fused_cache_bytes`, by default the last one that was used.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        *,
        kv_cache: KVCacheType = "float32",
        cache_bytes: int = CACHE_BYTES,
        fused_cache_bytes: int | None = None,
    ) -> None:
        self.bundle, self.device = bundle, device
        self.retriever = Retriever(bundle, device)
        self.blends = Blends(bundle, device, cache_bytes=cache_bytes)
        self.model = LanguageModel(bundle, device, kv_cache=kv_cache, fused_cache_bytes=fused_cache_bytes)

    def close(self) -> None:
        """Drop the sessions, the index and the adapters; they are loaded again when needed."""
        for part in (self.model, self.blends, self.retriever):
            part.close()

    def release_embedder(self) -> None:
        """Drop the sentence encoder and the index, for programs that answer once: the base has their memory then.

        They are loaded again when needed.
        """
        self.retriever.release()

    def warm_up(self) -> None:
        """Load everything that an answer needs."""
        self.retriever.load()
        _ = (self.model.tokenizer, self.model.decoder, self.blends.merger)

    def save_prompts(self, path: str | Path, *, limit: int = PROMPT_CACHE_BYTES) -> int:
        """Write the prompts that were read to a file, so that another process need not read them; say how many.

        It appears in one rename; the last of several writers wins. It holds the texts of the prompts.

        Args:
            limit: bytes of the largest file; what was used longest ago is left out.

        Raises:
            GenerationError: the device is no CPU.
            OSError: the file cannot be written.
        """
        return self.model.save_prompts(Path(path), limit=limit)

    def load_prompts(self, path: str | Path, *, limit: int = PROMPT_CACHE_BYTES) -> int | None:
        """Read what `save_prompts` wrote, and say how many prompts that are: answers are the same, and begin earlier.

        None where they were read with another base, KV cache, ONNX Runtime or processor. They are not used then, and
        those of another blend are never used for this one.

        Raises:
            GenerationError: the device is no CPU; or the file cannot be read, is larger than `limit`, or is damaged.
        """
        return self.model.load_prompts(Path(path), limit=limit)

    @property
    def default_merge(self) -> MergeSettings:
        """The bundle's method and parameters."""
        return self.bundle.manifest.defaults.merge

    def retrieve(self, prompt: Prompt, request: Request | None = None, *, timings: Timings | None = None) -> Retrieval:
        """The tasks that a prompt resembles (embed, retrieve, weigh).

        Args:
            timings: gets the time of each stage.
        """
        request = request or Request()
        return self._retrieve(query_text(conversation(prompt), request.route_by), request, timings or Timings())

    def embed(self, text: str) -> tuple[Float, int]:
        """The vector (dimension,) that the sentence encoder gives a text, and how many tokens it read of it.

        Raises:
            RetrievalError: the text is empty, or no Unicode.
        """
        return self.retriever.embed(text)

    def compose(
        self, prompt: Prompt, request: Request | None = None, *, cancellation: Cancellation | None = None
    ) -> Composition:
        """The blend for a prompt, on the device (embed, retrieve, weigh, merge).

        Raises:
            Cancelled: another thread ended it through `cancellation`.
        """
        request, cancellation = request or Request(), cancellation or Cancellation()
        return self._compose(query_text(conversation(prompt), request.route_by), request, Timings(), cancellation)

    def run(
        self, prompt: Prompt, request: Request | None = None, *, on_text: Callable[[str], None] = lambda text: None
    ) -> Answer:
        """Answer a prompt.

        Args:
            on_text: called with each chunk of the answer's text.

        Raises:
            EdgeComposeError: of the stage that failed.
        """
        with self.generate(prompt, request) as generation:
            for text in generation:
                on_text(text)
            return generation.answer

    def batch(
        self,
        prompts: Sequence[Prompt],
        requests: Request | Sequence[Request] | None = None,
        *,
        parallel: int | None = None,
    ) -> Generator[Answer | EdgeComposeError, None, None]:
        """Answer several prompts, each under its own blend; answers come in the prompts' order.

        Each is a sequence of its own and gets to the bit what it gets alone. An error takes the place of the answer
        that it prevented. Closing the generator ends the answers in progress.

        Args:
            requests: one for all, or one for each.
            parallel: answers that are written together, by default eight; each takes memory for its keys and values.

        Raises:
            GenerationError: the numbers of requests and prompts differ, or `parallel` is below 1.
        """
        each = list(requests) if isinstance(requests, Sequence) else [requests or Request()] * len(prompts)
        if len(each) != len(prompts):
            raise GenerationError(f"{len(prompts)} prompts and {len(each)} requests were passed; expected one for each")
        if parallel is not None and parallel < 1:
            raise GenerationError(f"parallel is {parallel}; expected 1 or more")
        begin = [functools.partial(self.generate, *pair) for pair in zip(prompts, each, strict=True)]
        return write_all(begin, parallel or _PARALLEL)

    def score(self, prompt: Prompt, choices: Sequence[str], request: Request | None = None) -> dict[str, float]:
        """Mean log-likelihood (nats a token) of each of some answers to a prompt.

        Raises:
            GenerationError: no choice, an empty one, or one twice.
            EdgeComposeError: of the stage that failed.
        """
        if not choices:
            raise GenerationError("no choice to score; expected one or more")
        scores = self.run(prompt, dataclasses.replace(request or Request(), choices=tuple(choices))).choices
        return dict(scores or {})

    def generate(
        self, prompt: Prompt, request: Request | None = None, *, cancellation: Cancellation | None = None
    ) -> Generation:
        """Compose the blend for a prompt, and return an iterator over the answer.

        Args:
            prompt: text, or the messages of a conversation.
            cancellation: another thread ends every stage through it, those before the first token too.

        Raises:
            Cancelled: another thread ended it.
            EdgeComposeError: of the stage that failed.
        """
        request, messages, timings = request or Request(), conversation(prompt), Timings()
        cancellation = cancellation or Cancellation()
        if request.attachment == "fuse":
            require_fusing(self.bundle.manifest.base)
        with timings.stage("total"):
            query = query_text(messages, request.route_by)
            composition = self._compose(query, request, timings, cancellation)
            with timings.stage("load"):
                tokenizer = self.model.tokenizer
            raw = self.sends_raw(messages, request, composition.retrieval)
            choices = _encode_choices(tokenizer, request.choices, raw=raw)
            max_tokens = resolve(request.max_tokens, self.bundle.manifest.defaults.max_tokens)
            encode = functools.partial(self._encode, messages, request, choices, max_tokens, cancellation)
            encoded = encode(raw=raw)
            cancellation.check()
            blend = self.model.attach(composition.merged, fuse=request.attachment == "fuse", timings=timings)
        by_default = raw and request.raw is None and tokenizer.has_chat_template
        answering = Answering(
            model=self.model,
            query=query,
            request=request,
            composition=composition,
            blend=blend,
            encoded=encoded,
            choices=choices,
            max_tokens=max_tokens,
            drafts=resolve(request.drafts, MOST_DRAFTS if self.device.kind == "cpu" else 0),
            examples=functools.partial(self.retriever.answers_of, composition.retrieval),
            in_template=functools.partial(encode, raw=False) if by_default else None,
            timings=timings,
            cancellation=cancellation,
        )
        described = functools.partial(answering.answer, self.bundle, self.device)
        return Generation(composition, answering.chunks(), described, cancellation)

    def sends_raw(self, messages: Sequence[Message], request: Request, retrieval: Retrieval) -> bool:
        """Whether a prompt is sent without the chat template.

        Adapters that were trained on raw prompts get a raw one where it resembles their examples, whatever answers it:
        the base alone is asked in the form in which the blend is. All else is sent in the chat template. Choices are
        those of a task, so they are scored in the form of the adapters.

        Args:
            retrieval: that of the request.
        """
        if request.raw is not None:
            return request.raw
        if len(messages) > 1:
            return False
        if not self.model.tokenizer.has_chat_template:
            return True
        if self.bundle.manifest.defaults.prompt_form == "chat":
            return False
        if request.weights is None or request.choices:
            return request.weights is not None or bool(retrieval.nucleus)
        return self._resembles(query_text(messages, request.route_by))

    def _resembles(self, query: str) -> bool:
        """Whether a text resembles the examples of some task, by the bundle's settings."""
        try:
            return bool(self._retrieve(query, Request(), Timings()).nucleus)
        except RetrievalError:  # white space alone, or no example
            return False

    def _encode(
        self,
        messages: Sequence[Message],
        request: Request,
        choices: Sequence[Sequence[int]],
        max_tokens: int | None,
        cancellation: Cancellation,
        *,
        raw: bool,
    ) -> Encoded:
        """The prompt as token ids that leave room for the answer, or the longest choice."""
        context, longest = self.bundle.manifest.base.context, max(map(len, choices), default=0)
        encoder = ConversationEncoder(
            self.model.tokenizer,
            raw=raw,
            special_tokens=resolve(request.special_tokens, request.raw is True),
            cancellation=cancellation,
        )
        most = context - longest if choices else longest_prompt(context, max_tokens)
        return self.model.encode(messages, encoder, room=longest or 1, most=most, overflow=request.overflow)

    def _retrieve(self, query: str, request: Request, timings: Timings) -> Retrieval:
        if request.weights is not None:
            return Retrieval((), {}, {}, dict(request.weights))
        settings = override(self.bundle.manifest.defaults.retrieval, request.retrieval, RetrievalError)
        if request.choices:  # a task, if one that the bundle may not know
            settings = dataclasses.replace(settings, min_resemblance=0)
        return self.retriever.retrieve(query, settings, request.exclude, timings)

    def _compose(self, query: str, request: Request, timings: Timings, cancellation: Cancellation) -> Composition:
        cancellation.check()
        retrieval = self._retrieve(query, request, timings)
        cancellation.check()
        settings = override(self.default_merge, request.merge, MergeError)
        return Composition(retrieval, settings, self.blends.blend(retrieval.weights, settings, timings))


def _encode_choices(tokenizer: Tokenizer, choices: Sequence[str], *, raw: bool) -> list[list[int]]:
    """Token ids of each choice, as it would follow the prompt."""
    if len(set(choices)) != len(choices):
        raise GenerationError("a choice appears twice; name each once")
    return [tokenizer.encode_continuation(f" {choice}" if raw else choice) for choice in choices]


def open_bundle(
    path: str | Path, *, device: DeviceRequest = "auto", in_memory: bool = False, kv_cache: KVCacheType = "float32"
) -> Composer:
    """Open a bundle for answering prompts; use it in a `with` statement.

    Args:
        path: the bundle's directory.
        device: 'auto', 'cpu' or 'cuda'.
        in_memory: for programs that run for long: read the weights of bases of up to 512 MB into memory, so that nobody
            who writes over their file can end this process. This takes a tenth more memory.
        kv_cache: 'float32'; 'int8', which takes a quarter of the memory and gives nearly the same answers; 'int4'. The
            base has those that stay near float32, on a CPU.

    Raises:
        BundleError: the bundle cannot be used.
        DeviceError: the device cannot be used.
        GenerationError: the base has no such KV cache on the device.
    """
    return Composer(Bundle(Path(path), in_memory=in_memory), choose_device(device), kv_cache=kv_cache)
