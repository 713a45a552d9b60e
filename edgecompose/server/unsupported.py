"""Fields of other servers that would change an answer and that this one does not support.

Such a field is accepted with the values that change nothing, and refused by name with any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgecompose.bundle.records import shown
from edgecompose.errors import ApiError


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One field: the values that change nothing, and what to use instead of it, if anything."""

    neutral: tuple[Any, ...] = ()
    instead: str = ""


_CHOICES = "'choices' in 'edgecompose'"
#: OpenAI's first, then those of vLLM, llama.cpp, Ollama and transformers.
FIELDS: Mapping[str, Unsupported] = {
    "n": Unsupported((1,)),
    "best_of": Unsupported((1,)),
    "presence_penalty": Unsupported((0,), "'repetition_penalty'"),
    "frequency_penalty": Unsupported((0,), "'repetition_penalty'"),
    "logit_bias": Unsupported(({},)),
    "logprobs": Unsupported((False,), _CHOICES),
    "top_logprobs": Unsupported((0,)),
    "echo": Unsupported((False,)),
    "suffix": Unsupported(("",)),
    "tools": Unsupported(([],)),
    "functions": Unsupported(([],)),
    "tool_choice": Unsupported(("none", "auto")),
    "function_call": Unsupported(("none", "auto")),
    "response_format": Unsupported(({"type": "text"},), _CHOICES),
    "modalities": Unsupported((["text"],)),
    "audio": Unsupported(),
    "prediction": Unsupported(),
    "web_search_options": Unsupported(),
    "reasoning_effort": Unsupported(("none",)),
    "reasoning": Unsupported(({}, {"effort": "none"})),
    "guided_json": Unsupported((), _CHOICES),
    "guided_choice": Unsupported((), _CHOICES),
    "guided_regex": Unsupported((), _CHOICES),
    "guided_grammar": Unsupported((), _CHOICES),
    "structured_outputs": Unsupported(({},), _CHOICES),
    "prompt_logprobs": Unsupported((0, False)),
    "truncate_prompt_tokens": Unsupported((), "'overflow' in 'edgecompose'"),
    "stop_token_ids": Unsupported(([],), "'stop'"),
    "bad_words": Unsupported(([],)),
    "allowed_token_ids": Unsupported(),
    "min_tokens": Unsupported((0,)),
    "ignore_eos": Unsupported((False,)),
    "include_stop_str_in_output": Unsupported((False,)),
    "skip_special_tokens": Unsupported((True,)),
    "spaces_between_special_tokens": Unsupported((True,)),
    "add_generation_prompt": Unsupported((True,)),
    "continue_final_message": Unsupported((False,)),
    "chat_template": Unsupported(),
    "chat_template_kwargs": Unsupported(({}, {"enable_thinking": False})),
    "enable_thinking": Unsupported((False,)),
    "documents": Unsupported(([],)),
    "use_beam_search": Unsupported((False,)),
    "num_beams": Unsupported((1,)),
    "length_penalty": Unsupported((1,)),
    "no_repeat_ngram_size": Unsupported((0,)),
    "grammar": Unsupported(("",), _CHOICES),
    "json_schema": Unsupported(({},), _CHOICES),
    "format": Unsupported(("",), _CHOICES),
    "repeat_penalty": Unsupported((1,), "'repetition_penalty'"),
    "repeat_last_n": Unsupported((0,)),
    "penalty_last_n": Unsupported((0,)),
    "typical_p": Unsupported((1,)),
    "tfs_z": Unsupported((1,)),
    "top_a": Unsupported((0,)),
    "top_n_sigma": Unsupported((-1, 0)),
    "mirostat": Unsupported((0,)),
    "mirostat_mode": Unsupported((0,)),
    "dynatemp_range": Unsupported((0,)),
    "dry_multiplier": Unsupported((0,)),
    "xtc_probability": Unsupported((0,)),
    "eta_cutoff": Unsupported((0,)),
    "epsilon_cutoff": Unsupported((0,)),
    "samplers": Unsupported(),
    "n_probs": Unsupported((0,)),
    "n_predict": Unsupported((-1,), "'max_tokens'"),
    "num_predict": Unsupported((-1,), "'max_tokens'"),
    "max_new_tokens": Unsupported((-1,), "'max_tokens'"),
    "options": Unsupported(({},), "the fields themselves"),
    "dimensions": Unsupported(),
}
#: Fields that nothing comes of where `tool_choice` is "none".
_OF_TOOLS = ("tools", "functions")


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Look for the first field of the table that would change the answer.

    Raises:
        ApiError: there is one; the message names it.
    """
    without_tools = fields.get("tool_choice") == "none" or fields.get("function_call") == "none"
    for name, row in FIELDS.items():
        value = fields.get(name)
        if value is None or any(_same(value, neutral) for neutral in row.neutral):
            continue
        if name in _OF_TOOLS and without_tools and isinstance(value, list):
            continue
        advice = f"use {row.instead}" if row.instead else "leave it out"
        raise ApiError(f"'{name}' is {shown(value)}, which is not supported; {advice}", param=name)


def _same(value: object, neutral: object) -> bool:
    """Whether they are equal in JSON, where true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
