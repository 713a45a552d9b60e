"""The tokenizer of a base: its tokenizer.json, its chat template and the tokens that end an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.errors import BundleError, ExportError, GenerationError
from edgecompose.generation.chat_template import ChatTemplate, self_contained
from edgecompose_export.tokenizer.post_processor import State, first_token

#: Texts of special tokens that end a turn or a text in some models.
_ENDS = frozenset(
    {
        "</s>",
        "<eos>",
        "<end_of_turn>",
        "<turn|>",
        "<end_of_utterance>",
        "<|im_end|>",
        "<|end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<|EOT|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|endofturn|>",
        "<|end_of_turn|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|return|>",
        "<|call|>",
        "<EOT>",
        "[EOS]",
        "[EOT]",
        "[|endofturn|]",
        "<｜end▁of▁sentence｜>",
    }
)
_MARK = "qzxanswerqzx"


@dataclass(frozen=True)
class BaseTokenizer:
    """The tokenizer of a base.

    Attributes:
        state: its tokenizer.json.
        template: its chat template, which needs no variable beside the conversation; None where there is none.
        end_tokens: sorted ids that end an answer.
        first_token: the id that `tokenizer(text)` puts first, None where it puts none.
        bos, eos, unk, pad: texts of special tokens.
    """

    state: State
    template: str | None
    end_tokens: tuple[int, ...]
    first_token: int | None
    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ids: list[int] = [*self.state["model"]["vocab"].values(), *(row["id"] for row in self.state["added_tokens"])]
        return 1 + max(ids)

    def token_id(self, text: str | None) -> int | None:
        """Id of a token by its exact spelling, None when there is no such token."""
        return None if text is None else id_of(self.state, text)

    def fitted(self, vocabulary: int) -> BaseTokenizer:
        """The tokenizer for a base whose embedding has `vocabulary` rows.

        Added tokens without a row are dropped, as no graph can read them (Gemma 3 has one for images). Their text is
        then tokenised like any other. A smaller tokenizer is correct, since embeddings are often padded.

        Raises:
            ExportError: words of the vocabulary have no row: the tokenizer is that of another model.
        """
        model = self.state["model"]
        dropped = {row["content"] for row in self.state["added_tokens"] if row["id"] >= vocabulary}
        beyond = [word for word, number in model["vocab"].items() if number >= vocabulary and word not in dropped]
        if beyond:
            raise ExportError(
                f"the tokenizer has {len(beyond)} words with ids from {vocabulary} on, such as {beyond[0]!r:.40}; the "
                f"base's vocabulary has {vocabulary} rows; put the tokenizer of this model beside its weights"
            )
        if self.first_token is not None and self.first_token >= vocabulary:
            raise ExportError(
                f"the tokenizer begins texts with token {self.first_token}, the base's vocabulary has {vocabulary} "
                "rows; put the tokenizer of this model beside its weights"
            )
        ends = tuple(token for token in self.end_tokens if token < vocabulary)
        if not dropped:
            return self if ends == self.end_tokens else dataclasses.replace(self, end_tokens=ends)
        added = [row for row in self.state["added_tokens"] if row["content"] not in dropped]
        words = {word: number for word, number in model["vocab"].items() if word not in dropped}
        merges = [merge for merge in model["merges"] if not dropped.intersection(_parts(merge))]
        state = self.state | {"added_tokens": added, "model": model | {"vocab": words, "merges": merges}}
        return dataclasses.replace(self, state=state, end_tokens=ends)

    def write(self, path: Path) -> None:
        """Write the tokenizer.json, and create its folder if it does not exist."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.state, ensure_ascii=False), encoding="utf-8")


def assemble_tokenizer(
    state: State, *, template: str | None, values: Mapping[str, str | Sequence[str]], ends: Iterable[int | None]
) -> BaseTokenizer:
    """A tokenizer from its parts.

    Args:
        values: special tokens by the names under which a chat template sees them.
        ends: ids that end an answer, beside those of known special tokens and of the template.
    """
    added = {row["content"]: row for row in state["added_tokens"]}
    if template is not None:
        template = self_contained(template, values)
        if any("\ud800" <= character <= "\udfff" for character in template):
            raise ExportError("the chat template is not UTF-8; convert or copy the model again")
    known = {
        row["id"]
        for text, row in added.items()
        if text in _ENDS and (row.get("special") or text.startswith("<|") or text == "<end_of_turn>")
    }  # in Gemma </s> is an HTML tag and not special
    turn = None if template is None else _end_of_turn(template, added)
    texts = {name: values.get(f"{name}_token") for name in ("bos", "eos", "unk", "pad")}
    return BaseTokenizer(
        state,
        template,
        end_tokens=tuple(sorted(known.union(end for end in (*ends, turn) if end is not None))),
        first_token=first_token(state.get("post_processor")),
        **{name: text if isinstance(text, str) else None for name, text in texts.items()},
    )


def _end_of_turn(template: str, added: Mapping[str, State]) -> int | None:
    """The added token that the template writes after a message of the assistant, None where it writes none."""
    talk = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _MARK}]
    try:
        text = ChatTemplate(template).render(talk, add_generation_prompt=False)
    except GenerationError:
        return None
    except BundleError as error:
        reason = str(error.__cause__ or error)
        raise ExportError(f"the chat template is not valid Jinja: {reason:.200}; copy that of this model") from error
    _, mark, rest = text.rpartition(_MARK)
    rest = rest.lstrip()
    ends = [token for token in added if token.strip() and rest.startswith(token)] if mark else []
    return int(added[max(ends, key=len)]["id"]) if ends else None


def default_template(templates: Any, source: str) -> str | None:
    """The only template, or the default of several.

    Raises:
        ExportError: several templates, none of them called 'default'.
    """
    if isinstance(templates, list):
        templates = {str(row.get("name")): row.get("template") for row in templates if isinstance(row, dict)}
    if isinstance(templates, dict):
        if templates and "default" not in templates:
            raise ExportError(
                f"{source} has the chat templates {', '.join(map(str, sorted(templates)))}, expected one called "
                "'default'; give that name to the template of conversations"
            )
        templates = templates.get("default")
    return templates if isinstance(templates, str) and templates else None


def id_of(state: State, text: str) -> int | None:
    """Id of a token by its exact spelling."""
    for row in state["added_tokens"]:
        if row["content"] == text:
            return int(row["id"])
    number = state["model"]["vocab"].get(text)
    return None if number is None else int(number)


def _parts(merge: Any) -> tuple[str, ...]:
    """Both words of a merge, and their join."""
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
    return (*pair, "".join(pair))
