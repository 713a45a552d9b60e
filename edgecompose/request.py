"""Requests to a composer and their results, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edgecompose.bundle.specs import KVCacheType, PromptForm
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergedAdapter, MergeReport
from edgecompose.errors import GenerationError, MergeError, RetrievalError
from edgecompose.generation.decode import Finish
from edgecompose.generation.messages import Overflow, RouteBy
from edgecompose.merging.methods import method_of
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MOST_DRAFTS, MergeSettings, RetrievalSettings, Sampling, override

#: How a blend meets the base: as low-rank inputs beside its weights, or fused into a copy of them.
Attachment = Literal["attach", "fuse"]


@dataclass(frozen=True, slots=True)
class Request:
    """A request; None takes the bundle's default.

    Attributes:
        weights: adapter -> weight; composes by hand and skips retrieval.
        exclude: tasks that retrieval leaves out.
        retrieval, merge: settings; a mapping changes some of the bundle's, an object replaces all.
        sampling: how tokens are drawn; None is greedy.
        max_tokens: longest answer; without a limit it goes on to the context of the base.
        choices: answers to score instead of generating one.
        raw: send the prompt as it is (True) or in the chat template (False). None sends a prompt that resembles the
            examples of a task as the bundle's adapters were trained, and any other in the chat template; so is a raw
            prompt that got no answer.
        special_tokens: whether special tokens that are written in a message are read as such; by default only with
            `raw` True, else they are text.
        attachment: how the blend meets the base; 'fuse' needs a float base.
        stop: texts that the answer ends before.
        route_by: the user's message that retrieval reads, the last or the first.
        overflow: 'truncate' leaves out the oldest part of a prompt that does not fit; the answer tells how much.
        prompt_cache: reuse keys and values of an earlier prompt under the same blend, as far as this one begins with
            it; the answer is the same.
        drafts: tokens of the answer that are guessed for one pass at most, in 0 .. 8; None is 8 on the CPU and 0
            elsewhere. How many are depends on what pays; the answer is the same.

    Raises:
        GenerationError, RetrievalError, MergeError: an unknown setting or value, or one out of range.
    """

    weights: Mapping[str, float] | None = None
    exclude: tuple[str, ...] = ()
    retrieval: RetrievalSettings | Mapping[str, Any] | None = None
    merge: MergeSettings | Mapping[str, Any] | None = None
    max_tokens: int | None = None
    sampling: Sampling | None = None
    choices: tuple[str, ...] = ()
    raw: bool | None = None
    special_tokens: bool | None = None
    attachment: Attachment = "attach"
    stop: tuple[str, ...] = ()
    route_by: RouteBy = "last"
    overflow: Overflow = "refuse"
    prompt_cache: bool = False
    drafts: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("route_by", RouteBy), ("overflow", Overflow), ("attachment", Attachment)):
            value, known = getattr(self, name), get_args(choices)
            if value not in known:
                raise GenerationError(f"{name} is {value!r:.80}; expected {' or '.join(known)}")
        override(RetrievalSettings(), self.retrieval, RetrievalError)
        method_of(override(MergeSettings(), self.merge, MergeError))
        if not all(self.stop):
            raise GenerationError("a stop string is empty; give some text for each")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise GenerationError(f"max_tokens is {self.max_tokens}; expected 1 or more")
        if self.drafts is not None and (type(self.drafts) is not int or not 0 <= self.drafts <= MOST_DRAFTS):
            raise GenerationError(f"drafts is {self.drafts!r:.80}; expected an integer in 0 to {MOST_DRAFTS}")


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """A blend on the device, and the retrieval that led to it."""

    retrieval: Retrieval
    settings: MergeSettings
    merged: MergedAdapter


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it was computed; `timings_ms` has one entry a stage of `timing.STAGES`.

    `prompt` is the text that retrieval read, the user's message of a conversation. `finish` is 'length' where the
    answer was cut at its longest; `dropped_tokens` of the prompt were left out for lack of room.
    `choices` maps each given choice to its mean log-likelihood (nats a token), None when none were given.
    `attachment` is the one that was used: nothing is fused where no adapter was chosen.
    `accepted_tokens` of the `drafted_tokens` that were guessed are part of the answer.
    `embedder_device` is None where nothing was embedded. `prompt_form` is 'chat' where the chat template was used.
    `kv_cache` is what the caller chose; CUDA computes attention in float16 all the same.
    """

    prompt: str
    text: str
    retrieval: Retrieval
    settings: MergeSettings
    composition: str
    device: Device
    timings_ms: Mapping[str, float]
    prompt_tokens: int
    generated_tokens: int
    choices: Mapping[str, float] | None = None
    report: MergeReport = MergeReport()
    attachment: Attachment = "attach"
    embedder_device: Device | None = None
    finish: Finish = "stop"
    dropped_tokens: int = 0
    prompt_form: PromptForm = "raw"
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_cache: KVCacheType = "float32"
