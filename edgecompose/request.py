"""What a caller asks of a composer, and what comes back: frozen values, nothing that acts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from edgecompose.bundle.manifest import PromptForm
from edgecompose.engine.device import Device
from edgecompose.engine.merged import MergedAdapter, MergeReport
from edgecompose.errors import GenerationError, RetrievalError
from edgecompose.generation.decode import Finish
from edgecompose.generation.messages import Overflow, Query
from edgecompose.generation.sampler import Sampling
from edgecompose.merging.methods import MergeSettings
from edgecompose.retrieval.index import Neighbour
from edgecompose.retrieval.routing import WeighSettings

#: How a blend meets the base: as low-rank inputs beside its weights, or written into a copy of them.
Attachment = Literal["attach", "fold"]
ATTACHMENTS: tuple[Attachment, ...] = get_args(Attachment)
#: Fields of a request, and of a bundle's defaults, that are those of `WeighSettings`.
WEIGH_NAMES = tuple(item.name for item in dataclasses.fields(WeighSettings))


T = TypeVar("T")


def given(wanted: T | None, default: T) -> T:
    """What a request says, or else the bundle's default."""
    return default if wanted is None else wanted


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller may decide; None takes the bundle's default.

    `weights` composes by hand and skips retrieval; `exclude` leaves tasks out of it;
    `neighbours`, `temperature` and `nucleus` are the paper's N, T and p, `size_correction`, `shortcut` and `fallback`
    those of `weighting.WeighSettings`; `raw` sends the prompt as it is (True) or in the chat template (False), None as
    the bundle's adapters were trained, and in the chat template where the base answers alone for lack of anything near,
    or where a prompt that was sent as it is got no token for an answer;
    `choices` are scored instead of generating; `sampling` None takes the likeliest token always; `stop` are texts that
    the answer ends before; `query` is which message of a conversation retrieval reads; `overflow` 'truncate' leaves out
    the oldest part of a prompt that the context has no room for, and the answer says how much; `reuse` lets a prompt
    begin where an earlier answer under the same blend left off, as far as they agree: a chat reads only what is new,
    and logits may differ in the last bits from those of a prompt that is read at once;
    `attachment` is how the blend meets the base, 'fold' being for float bases only.
    """

    weights: Mapping[str, float] | None = None
    exclude: tuple[str, ...] = ()
    neighbours: int | None = None
    temperature: float | None = None
    nucleus: float | None = None
    size_correction: float | None = None
    shortcut: float | None = None
    fallback: float | None = None
    merge: MergeSettings | None = None
    max_tokens: int | None = None
    sampling: Sampling | None = None
    choices: tuple[str, ...] = ()
    raw: bool | None = None
    attachment: Attachment = "attach"
    stop: tuple[str, ...] = ()
    query: Query = "last"
    overflow: Overflow = "refuse"
    reuse: bool = False

    def __post_init__(self) -> None:
        for name, found, known in (
            ("query", self.query, get_args(Query)), ("overflow", self.overflow, get_args(Overflow))
        ):  # fmt: skip
            if found not in known:
                raise GenerationError(f"{name} '{found}' is unknown; use {' or '.join(known)}")
        if not all(self.stop):
            raise GenerationError("a stop string is empty; give some text for each")
        if self.attachment not in ATTACHMENTS:
            raise GenerationError(f"attachment '{self.attachment}' is unknown; use {' or '.join(ATTACHMENTS)}")
        if self.neighbours is not None and self.neighbours < 1:
            raise RetrievalError(f"{self.neighbours} neighbours were asked for; 1 or more is wanted")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise GenerationError(f"max_tokens is {self.max_tokens}; 1 or more is wanted")


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Neighbours, the distribution over tasks before the nucleus cut, the tasks that it kept, and adapter weights."""

    neighbours: tuple[Neighbour, ...]
    distribution: Mapping[str, float]
    nucleus: Mapping[str, float]
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class Composition:
    """A blend on the device with what led to it."""

    retrieval: Retrieval
    settings: MergeSettings
    merged: MergedAdapter


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and how it came about; `timings_ms` has one entry a stage of `clock.STAGES`.

    `prompt` is the text that retrieval read, the user's message of a conversation. `finish` is 'length' where the
    answer was cut at its longest; `dropped_tokens` of the prompt were left out for lack of room.
    `choices` maps each given choice to its mean log-likelihood (nats a token), None when none were given.
    `attachment` is the one that was used: nothing is folded where no adapter was chosen.
    `embedder_device` is None where nothing was embedded. `prompt_form` is 'chat' where the chat template was used.
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
