"""Variants answer the same examples: the base, each task's own adapter, and blends that retrieval chose."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgecompose.bundle.manifest import Manifest
from edgecompose.composer import Composer
from edgecompose.errors import EvaluationError, GenerationError, MergeError
from edgecompose.evaluation.answer_cache import AnswerCache, AnswerKey, CachedAnswer, open_answer_cache
from edgecompose.evaluation.examples import EvalExample, first_line
from edgecompose.evaluation.results import Evaluation, Result
from edgecompose.generation.messages import conversation
from edgecompose.merging.methods import METHODS
from edgecompose.request import Request
from edgecompose.retrieval.retriever import Retrieval
from edgecompose.settings import MergeSettings, override
from edgecompose.timing import STAGES, Timings

Kind = Literal["base", "own", "top1", "uniform", "retrieved", "fixed"]
#: Kinds that a name alone selects; 'fixed' needs weights.
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "fixed")
#: Longest free-form answer (tokens) where a request names none.
MAX_TOKENS = 24
_NOTHING = Retrieval((), {}, {}, {})


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to answer.

    `base` takes no adapter, `own` the one that is called like the example's task, or else those that serve it (no
    examples of tasks that the bundle lacks), `top1` those of the top task, `uniform` those of the nucleus' tasks
    in equal parts, `retrieved` what the composer chooses itself, `fixed` the request's weights. `exclude_own` leaves
    the example's task out of retrieval.
    """

    name: str
    kind: Kind
    request: Request = Request()
    exclude_own: bool = False

    def __post_init__(self) -> None:
        kinds = get_args(Kind)
        if self.kind not in kinds:
            raise EvaluationError(f"variant '{self.name}' is of kind '{self.kind}'; use one of {', '.join(kinds)}")
        if self.request.sampling is not None:
            raise EvaluationError(f"variant '{self.name}' draws tokens at random; expected greedy decoding")
        if self.request.choices or (self.request.weights is None) == (self.kind == "fixed"):
            raise EvaluationError(
                f"variant '{self.name}' of kind '{self.kind}' has choices, or weights where its kind decides; "
                "choices are those of the examples, and only 'fixed' takes weights"
            )


def parse_variants(names: Sequence[str], request: Request, exclude_own: bool = False) -> list[Variant]:
    """Variants by name: a kind, or a merge method, which is `retrieved` with that method.

    Args:
        request: what all of them ask for.

    Raises:
        EvaluationError: an unknown name.
    """
    kinds: dict[str, Kind] = {kind: kind for kind in KINDS}
    variants = []
    for name in names:
        if name in METHODS:
            merge = {**_changes(request.merge), "method": name}
            variants.append(Variant(name, "retrieved", dataclasses.replace(request, merge=merge), exclude_own))
        elif name in kinds:
            variants.append(Variant(name, kinds[name], request, exclude_own))
        else:
            raise EvaluationError(f"no variant is called '{name}'; use some of {', '.join((*KINDS, *METHODS))}")
    return variants


def _changes(merge: MergeSettings | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Merge settings of a request as changes of the bundle's."""
    return dataclasses.asdict(merge) if isinstance(merge, MergeSettings) else merge or {}


def main_variant(names: Sequence[str]) -> str:
    """The variant that the others are held to: `retrieved`, or the last."""
    return "retrieved" if "retrieved" in names else names[-1]


def adapters_of(manifest: Manifest, task: str) -> dict[str, float]:
    """The adapters that serve a task with their weights; none of a task that the bundle lacks."""
    return dict(manifest.tasks[task].adapters) if task in manifest.tasks else {}


def evaluate(
    composer: Composer,
    examples: Sequence[EvalExample],
    variants: Sequence[Variant],
    *,
    answer_cache: Path | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Have every variant answer every example.

    An answer of one blend to one request is computed once and shared by all variants and runs.

    Args:
        answer_cache: JSONL file of answers that are known; those that are computed are appended to it.
        advance: called with 1 after each example and variant.

    Raises:
        EvaluationError: no example, no variant or two of one name; an example that cannot be answered.
        EdgeComposeError: of the stage that failed.
    """
    names = [variant.name for variant in variants]
    if not names or len(set(names)) < len(names):
        raise EvaluationError(f"variants are '{', '.join(names)}'; expected at least one, each once")
    results: dict[str, list[Result]] = {name: [] for name in names}
    with open_answer_cache(answer_cache) as known:
        bench = _Bench(composer, known)
        for example in examples:
            routes = _Routes(composer, example)
            for variant in variants:
                result = bench.answer(example, variant, routes)
                if result is not None:
                    results[variant.name].append(result)
                advance(1)
    main = main_variant(names)
    if not results[main]:
        expected = "examples of the bundle's tasks" if examples else "at least one example"
        raise EvaluationError(f"no example remains for '{main}'; expected {expected}")
    return Evaluation(main, {name: tuple(result) for name, result in results.items()})


class _Routes:
    """What retrieval finds for one example, once for each setting of it, and the time that it took."""

    def __init__(self, composer: Composer, example: EvalExample) -> None:
        self._composer, self._prompt = composer, example.prompt
        self._retrievals: dict[object, tuple[Retrieval, dict[str, float]]] = {}

    def find(self, request: Request) -> tuple[Retrieval, dict[str, float]]:
        """Retrieval and milliseconds a stage."""
        key = (repr(request.retrieval), request.exclude)
        if key not in self._retrievals:
            timings = Timings()
            retrieval = self._composer.retrieve(self._prompt, request, timings=timings)
            self._retrievals[key] = retrieval, timings.elapsed_ms
        return self._retrievals[key]


class _Bench:
    """Answers of one composer, those that are known not computed again."""

    def __init__(self, composer: Composer, answer_cache: AnswerCache) -> None:
        self._composer, self._answer_cache = composer, answer_cache
        self._manifest = composer.bundle.manifest

    def answer(self, example: EvalExample, variant: Variant, routes: _Routes) -> Result | None:
        """One variant on one example; None where it does not apply."""
        here = example.task in self._manifest.tasks
        if variant.kind == "own" and not here:
            return None
        request = _request(variant, example, here)
        retrieves = variant.kind in ("top1", "uniform", "retrieved")
        retrieval, elapsed_ms = routes.find(request) if retrieves else (_NOTHING, {})
        weights = self._weights(variant, example, request, retrieval)
        if variant.kind != "retrieved":
            request = dataclasses.replace(request, weights=weights)
        raw = self._composer.sends_raw(conversation(example.prompt), request, retrieval)
        request = dataclasses.replace(request, raw=raw, special_tokens=False)
        cached = self._cached(example, request, weights)
        top = next(iter(retrieval.distribution.items()), (None, None))
        timings = {s: cached.timings_ms.get(s, 0.0) + elapsed_ms.get(s, 0.0) for s in STAGES}
        timings["total"] += sum(elapsed_ms.values())  # whose own total is 0
        return Result(
            example,
            cached.right,
            cached.answer,
            weights,
            top[0],
            top[1],
            retrieval.neighbours[0].similarity if retrieval.neighbours else None,
            here and example.task not in request.exclude,
            timings,
        )

    def _weights(
        self, variant: Variant, example: EvalExample, request: Request, retrieval: Retrieval
    ) -> dict[str, float]:
        """The weights of adapters that a variant blends for a request."""
        if variant.kind == "base":
            return {}
        if variant.kind == "fixed":
            return dict(variant.request.weights or {})
        if variant.kind == "own":
            own = example.task in self._manifest.adapters
            return {example.task: 1.0} if own else adapters_of(self._manifest, example.task)
        if variant.kind == "retrieved":
            return dict(retrieval.weights)
        tasks = list(retrieval.nucleus) if variant.kind == "uniform" else list(retrieval.distribution)[:1]
        return self._composer.retriever.adapters_for({task: 1 / len(tasks) for task in tasks}, request.exclude)

    def _cached(self, example: EvalExample, request: Request, weights: Mapping[str, float]) -> CachedAnswer:
        key = self._key(example, request, weights)
        cached = self._answer_cache.answers.get(key)
        if cached is not None:
            return cached
        self._composer.warm_up()  # so that no example's time is that of opening the models
        try:
            answer = self._composer.run(example.prompt, request)
        except GenerationError as error:
            raise EvaluationError(
                f"an example of task '{example.task}' cannot be answered: {error}; "
                f"change it or leave it out, it begins {example.prompt:.60}"
            ) from error
        text = answer.text if request.choices else first_line(answer.text)
        timings = {stage: round(elapsed, 3) for stage, elapsed in answer.timings_ms.items()}
        cached = CachedAnswer(text, example.is_right(text), timings)
        self._answer_cache.add(key, example.task, cached)
        return cached

    def _key(self, example: EvalExample, request: Request, weights: Mapping[str, float]) -> AnswerKey:
        settings = override(self._composer.default_merge, request.merge, MergeError)
        composition = self._composer.blends.digest(weights, settings)
        return AnswerKey(
            self._base(request),
            example.id,
            composition,
            bool(request.raw),
            "choices" if request.choices else "text",
            None if request.choices else request.max_tokens,
        )

    def _base(self, request: Request) -> str:
        """Names what answers: base, precision, chat template, and what computes it (CUDA has attention in float16)."""
        base, files = self._manifest.base, self._manifest.files
        template = None if base.chat_template is None else files[base.chat_template].sha256
        kv_cache = self._composer.model.kv_cache
        parts = [base.identity, base.precision, template, self._composer.device.kind, request.attachment]
        parts += [] if kv_cache == "float32" else [kv_cache]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _request(variant: Variant, example: EvalExample, here: bool) -> Request:
    """What a variant asks for one example, its weights apart."""
    base_request = variant.request
    exclude = base_request.exclude
    if variant.exclude_own and here and example.task not in exclude:
        exclude = (*exclude, example.task)
    return dataclasses.replace(
        base_request, exclude=exclude, choices=example.choices or (), max_tokens=base_request.max_tokens or MAX_TOKENS
    )
