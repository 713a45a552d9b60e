"""Targets of what is text: chat templates, tokenizers, examples and recipes."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from edgecompose.engine.tokenizer_file import encode_ends, open_tokenizer
from edgecompose.errors import RetrievalError
from edgecompose.evaluation.examples import read_eval_examples
from edgecompose.generation.chat_template import ChatTemplate
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.retrieval.examples import read_examples
from edgecompose_export.recipe import read_recipe
from tests.attack.mutations import mutate_bytes, mutate_json_text, write_text
from tests.attack.target import Target
from tests.attack.templates import random_template

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content|trim }}{% endfor %}"
_MESSAGES = [{"role": "user", "content": "hello <b>there</b>"}, {"role": "assistant", "content": "é" * 40}] * 2
_TEXT = "Hello world, naïve 中文 <s>x</s> 12345\n\n  the end " * 3


def _prepare_template(folder: Path) -> None:
    (folder / "template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _mutate_template(rng: random.Random, folder: Path) -> None:
    write_text(folder / "template.jinja", random_template(rng))


def _attempt_template(folder: Path) -> str:
    text = ChatTemplate((folder / "template.jinja").read_text(encoding="utf-8")).render(_MESSAGES)
    assert len(text) < 3_000_000, f"{len(text)} characters of output"
    return "accepted"


def byte_level() -> tokenizers.Tokenizer:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("h", "e"), ("l", "l"), ("Ġ", "w"), ("he", "ll")]
    for one, other in merges:
        alphabet[one + other] = len(alphabet)
    tokenizer = tokenizers.Tokenizer(models.BPE(alphabet, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    names = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=names)
    return tokenizer


def _word_piece() -> tokenizers.Tokenizer:
    pieces = ["[UNK]", "[CLS]", "[SEP]", *(f"{start}{c}" for start in ("", "##") for c in "abcdefghelowrd")]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = [("[CLS]", 1), ("[SEP]", 2)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=names)
    return tokenizer


def _unigram() -> tokenizers.Tokenizer:
    scores = [("<unk>", -9.0), ("▁", -3.0), ("▁the", -2.0), *((c, -4.0) for c in "abcdefghlorwt")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def tokenizer_texts() -> list[str]:
    states = [json.loads(make().to_str()) for make in (byte_level, _word_piece, _unigram)]
    states[1]["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    return [json.dumps(state, ensure_ascii=False) for state in states]


def _prepare_tokenizer(folder: Path) -> None:
    write_text(folder / "tokenizer.json", tokenizer_texts()[0])


def _mutate_tokenizer(rng: random.Random, folder: Path) -> None:
    write_text(folder / "tokenizer.json", mutate_json_text(rng, rng.choice(tokenizer_texts())))


def _attempt_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer(path, chat_template=TEMPLATE, vocabulary=400)
    for text in (_TEXT, "", " ", "<s>"):
        ids = [*tokenizer.encode(text), *tokenizer.encode_prompt(text), *tokenizer.encode_continuation(text)]
        assert all(0 <= token < 400 for token in ids)
        stream = tokenizer.stream()
        shown = "".join(stream.push(token) for token in ids[:50]) + stream.finish()
        assert isinstance(shown, str)
    tokenizer.decode([0, 399, 2**31, 2**32 - 1])
    assert len(encode_ends(open_tokenizer(path), _TEXT * 20, 8, RetrievalError)) >= 0
    return "accepted"


def _prepare_examples(folder: Path) -> None:
    rows = [{"prompt": f"what is {n}?", "answer": "né", "choices": ["né", "b"], "task": "t"} for n in range(6)]
    write_text(
        folder / "x.jsonl", "".join(f"{json.dumps(row, ensure_ascii=n % 2 == 0)}\n" for n, row in enumerate(rows))
    )


def _mutate_examples(rng: random.Random, folder: Path) -> None:
    path = folder / "x.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    kind = rng.randrange(4)
    if kind == 0:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        return
    if kind == 1:
        path.write_bytes(
            rng.choice((b"\xef\xbb\xbf", b"")) + "\n".join(lines).encode(rng.choice(("utf-8", "utf-16", "utf-32")))
        )
        return
    number = rng.randrange(len(lines))
    lines[number] = mutate_json_text(rng, lines[number])
    text = f"[{','.join(lines)}]" if kind == 2 and rng.random() < 0.2 else "\n".join(lines)
    write_text(path, text)


def _attempt_examples(folder: Path) -> str:
    path = folder / "x.jsonl"
    for example in read_examples(path):
        example.prompt.encode("utf-8")
    for row in read_eval_examples(path):
        assert row.id
    return "accepted"


_RECIPE = """name = "demo"
base = "base"
embedder = "encoder"
examples = "examples"
bits = 4
keep_text = false

[defaults]
max_tokens = 64
prompt_form = "raw"

[defaults.retrieval]
neighbours = 20
nucleus = 0.9

[defaults.merge]
method = "linear"
density = 0.5

[tasks.one]
adapter = "one"

[tasks.two]
adapter = "two.safetensors"
adapters = {one = 0.5, two = 1.0}
"""
_TOML = (
    "[" * 3000,
    "9" * 5000,
    "1e999",
    "nan",
    "-inf",
    '"""',
    "{a = {b = {",
    "0x" + "f" * 5000,
    "1979-05-27",
    "\ufeff",
    "[[x]]",
)


def _prepare_recipe(folder: Path) -> None:
    write_text(folder / "recipe.toml", _RECIPE)


def _mutate_recipe(rng: random.Random, folder: Path) -> None:
    path, lines = folder / "recipe.toml", _RECIPE.splitlines()
    kind, place = rng.randrange(4), rng.randrange(len(lines))
    if kind == 0:
        path.write_bytes(mutate_bytes(rng, _RECIPE.encode()))
        return
    if kind == 1:
        lines[place] = lines[place].split("=")[0] + "= " + rng.choice(_TOML)
    elif kind == 2:
        lines.insert(place, rng.choice(lines))
    else:
        lines[place] = lines[place].replace(rng.choice("abcdeo0.=[]\"'{}"), rng.choice(_TOML), 1)
    write_text(path, "\n".join(lines))


def _attempt_recipe(folder: Path) -> str:
    recipe = read_recipe(folder / "recipe.toml")
    assert recipe.tasks
    return "accepted"


TARGETS = (
    Target("template", "cheap", _prepare_template, _mutate_template, _attempt_template, seconds=60.0),
    Target("tokenizer", "cheap", _prepare_tokenizer, _mutate_tokenizer, _attempt_tokenizer),
    Target("examples", "cheap", _prepare_examples, _mutate_examples, _attempt_examples),
    Target("recipe", "cheap", _prepare_recipe, _mutate_recipe, _attempt_recipe),
)
