"""Generates one answer: reads the prompt, yields chunks, and describes the result."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field

from edgecompose.bundle.files import Bundle
from edgecompose.cancellation import Cancellation
from edgecompose.engine.device import Device
from edgecompose.engine.fusing import FusedWeights
from edgecompose.generation.decode import Chunk, Finish
from edgecompose.generation.encoding import Encoded
from edgecompose.generation.language_model import Blend, LanguageModel
from edgecompose.request import Answer, Composition, Request
from edgecompose.retrieval.embedder import embedder_device
from edgecompose.timing import Timings


@dataclass(slots=True, eq=False)
class Answering:
    """A request with its blend, and the state of its answer.

    Attributes:
        query: the text that retrieval read.
        choices: those of the request, as token ids.
        drafts: tokens that are drafted for a pass at most.
        examples: gives answers that this one may resemble, the most alike first.
        in_template: gives the prompt in the chat template, for a raw prompt that gets no answer; None otherwise.
    """

    model: LanguageModel
    query: str
    request: Request
    composition: Composition
    blend: Blend
    encoded: Encoded
    choices: Sequence[Sequence[int]]
    max_tokens: int | None
    drafts: int
    examples: Callable[[], Iterable[str]]
    in_template: Callable[[], Encoded] | None
    timings: Timings
    cancellation: Cancellation
    _texts: list[str] = field(default_factory=list)
    _tokens: int = 0
    _drafted: int = 0
    _accepted: int = 0
    _finish: Finish = "stop"
    _scores: dict[str, float] | None = None

    def chunks(self) -> Generator[Chunk, None, None]:
        """The answer, chunk by chunk; for choices, the most likely one at the end.

        Raises:
            Cancelled: another thread ended it.
        """
        for chunk in self.timings.each(self._chunks(), "total"):
            self.cancellation.check()
            self._texts.append(chunk.text)
            self._tokens += chunk.tokens
            self._drafted += chunk.drafted
            self._accepted += chunk.accepted
            self._finish = chunk.finish_reason or self._finish
            yield chunk

    def answer(self, bundle: Bundle, device: Device) -> Answer:
        """The whole answer and how it was computed, once all chunks were read."""
        embedded = self.request.weights is None
        merged, encoded = self.composition.merged, self.encoded
        return Answer(
            prompt=self.query,
            text="".join(self._texts),
            retrieval=self.composition.retrieval,
            settings=self.composition.settings,
            composition=merged.digest,
            device=device,
            timings_ms=self.timings.elapsed_ms,
            prompt_tokens=len(encoded.ids),
            generated_tokens=self._tokens,
            choices=self._scores,
            report=merged.report,
            attachment="fuse" if isinstance(self.blend, FusedWeights) else "attach",
            embedder_device=embedder_device(bundle.manifest.embedder, device) if embedded else None,
            finish=self._finish,
            dropped_tokens=encoded.dropped,
            prompt_form=encoded.form,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            kv_cache=self.model.kv_cache,
        )

    def _chunks(self) -> Generator[Chunk, None, None]:
        if self.choices:
            yield from self._best_choice()
            return
        yield from self._write()
        if not self._tokens and self.in_template is not None:
            self.encoded = self.in_template()
            yield from self._write()

    def _write(self) -> Generator[Chunk, None, None]:
        return self.model.write(
            self.encoded,
            self.blend,
            self.timings,
            max_tokens=self.max_tokens,
            sampling=self.request.sampling,
            stop=self.request.stop,
            prompt_cache=self.request.prompt_cache,
            drafts=self.drafts,
            examples=self.examples,
            keep_space=self.request.raw is True,  # the caller continues a text
        )

    def _best_choice(self) -> Generator[Chunk, None, None]:
        scores = yield from self.model.choose(self.encoded, self.choices, self.blend, self.timings)
        self._scores = dict(zip(self.request.choices, scores, strict=True))
        yield Chunk(max(self._scores, key=self._scores.__getitem__), sum(map(len, self.choices)), "stop")
