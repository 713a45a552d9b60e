"""Token ids of calibration text: prompts for measuring distances, prose and code for quantisation."""

from __future__ import annotations

import pydoc_data.topics
from importlib import resources

from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.weights.source import WeightSource, linear_weights

#: Pairs of a number of weights and the largest number of positions of calibration prompts for such a base.
_POSITIONS = ((3_000_000_000, 400), (0, 4096))
#: Texts that quantisation is calibrated on, and tokens of each; those of keys and values, which need less.
_TEXTS, _TEXT_LENGTH = 6, 384
_KV_TEXTS, _OPENING = 2, 6


def calibration_prompts() -> list[str]:
    """Prompts of many kinds, on which distances are measured."""
    text = (resources.files("edgecompose_export.calibration") / "prompts.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines() if line]


def calibration_ids(tokenizer: Tokenizer, source: WeightSource) -> list[list[int]]:
    """Ids of calibration prompts, through the chat template where the base has one; fewer prompts for large bases."""
    limit = next(positions for weights, positions in _POSITIONS if linear_weights(source) >= weights)
    prompts: list[list[int]] = []
    for text in calibration_prompts():
        ids = _render(tokenizer, text)[: source.config.context]
        if prompts and sum(map(len, prompts)) + len(ids) > limit:
            break
        prompts.append(ids)
    return prompts


def _render(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if tokenizer.has_chat_template:
        return tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
    return tokenizer.encode_prompt(prompt)


def calibration_texts(tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of prose and code that every machine with Python has: the topics of its reference."""
    topics = pydoc_data.topics.topics
    names = sorted(topics, key=lambda name: -len(topics[name]))[:_TEXTS]
    return [tokenizer.encode_prompt(topics[name][: _TEXT_LENGTH * 8])[:_TEXT_LENGTH] for name in names]


def kv_texts(tokenizer: Tokenizer, source: WeightSource) -> list[list[int]]:
    """Token ids that keys and values are measured on beside calibration prompts: long texts, and many openings.

    The first token of a sequence has keys and values like no other, and chat templates begin with the same one.
    """
    openings = [tokenizer.encode_prompt(text)[:_OPENING] for text in calibration_prompts()]
    texts = [*calibration_texts(tokenizer)[:_KV_TEXTS], *openings]
    return [text[: source.config.context] for text in texts if text]
