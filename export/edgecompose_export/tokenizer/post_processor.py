"""The post-processor of a tokenizer.json, which puts tokens before and after a text."""

from __future__ import annotations

from typing import Any

from edgecompose.errors import ExportError

#: A parsed tokenizer.json, or a part of one.
State = dict[str, Any]


def template_processing(first: tuple[str | None, int | None], last: tuple[str | None, int | None]) -> State | None:
    """A post-processor that puts a token before and after each text; None where there is neither.

    Args:
        first: text and id of the token; no text means none.
        last: the same.
    """
    if first[0] is None and last[0] is None:
        return None

    def around(name: str, kind: int) -> list[State]:
        steps: list[State] = [{"Sequence": {"id": name, "type_id": kind}}]
        if first[0] is not None:
            steps.insert(0, {"SpecialToken": {"id": first[0], "type_id": kind}})
        if last[0] is not None:
            steps.append({"SpecialToken": {"id": last[0], "type_id": kind}})
        return steps

    tokens = {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in (first, last) if text is not None}
    single = around("A", 0)
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *around("B", 1)],
        "special_tokens": tokens,
    }


def first_token(processor: Any) -> int | None:
    """The id that a post-processor of tokenizer.json puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        firsts = [first_token(step) for step in processor.get("processors", [])]
        return next((first for first in firsts if first is not None), None)
    steps = processor.get("single") if processor.get("type") == "TemplateProcessing" else None
    if not steps or "SpecialToken" not in steps[0]:
        return None
    name = steps[0]["SpecialToken"].get("id")
    token = processor.get("special_tokens", {}).get(name)
    if not isinstance(token, dict) or not isinstance(token.get("ids"), list):
        raise ExportError(
            f"tokenizer.json: the post_processor begins texts with {name!r:.40}, which its special_tokens lack; "
            "copy it again"
        )
    return int(token["ids"][0]) if token["ids"] else None
