"""SentencePiece tokenizers of GGUF files have the ids of transformers; real files those of llama.cpp."""

from __future__ import annotations

import functools
import io
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.gemma import GemmaTokenizer
from transformers.models.llama import LlamaTokenizer

from edgecompose.errors import ExportError
from edgecompose.formats.gguf_file import read_gguf
from edgecompose_export.tokenizer.gguf import gguf_tokenizer, merges_of_scores
from tests.export.gguf_vocabularies import CORPUS, PIECES, TEXTS, load

pytestmark = pytest.mark.slow

REAL = sorted((Path(__file__).parents[2] / "build" / "models").glob("**/*.gguf"))


@functools.cache
def _sentencepiece(*, gemma: bool) -> tuple[bytes, dict[str, Any]]:
    """A small model as Llama's or Gemma's is trained, and the same as a GGUF file would describe it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    out, ids = io.BytesIO(), (3, 2, 1, 0) if gemma else (0, 1, 2, -1)
    spaces = ["▁" * count for count in range(2, 9)]
    user = ["<mask>", *("\n" * n for n in range(1, 5)), *spaces, "<h1>"] if gemma else ["<mask>"]
    lines = [line for line in (CORPUS + "".join(PIECES)).replace("\r", "").split("\n") if line] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=0.98,
        unk_id=ids[0],
        bos_id=ids[1],
        eos_id=ids[2],
        pad_id=ids[3],
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=not gemma,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=user,
        control_symbols=["<start_of_turn>"],
        hard_vocab_limit=False,
        minloglevel=2,
        **({"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"} if gemma else {}),
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    count = model.get_piece_size()
    chunks = [model.id_to_piece(i) for i in range(count)]
    kinds = [
        2 if model.is_unknown(i) else 6 if model.is_byte(i) else 3 if model.is_control(i) else 4 if p in user else 1
        for i, p in enumerate(chunks)
    ]
    metadata = {
        "general.architecture": "gemma3" if gemma else "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type": kinds,
        # as llama.cpp's converter writes user-defined ones
        "tokenizer.ggml.tokens": [p.replace("▁", " ") if k == 4 else p for p, k in zip(chunks, kinds, strict=True)],
        "tokenizer.ggml.scores": [-1000.0 if k == 4 else model.get_score(i) for i, k in enumerate(kinds)],
        "tokenizer.ggml.unknown_token_id": ids[0],
        "tokenizer.ggml.bos_token_id": ids[1],
        "tokenizer.ggml.eos_token_id": ids[2],
        "tokenizer.ggml.add_space_prefix": not gemma,
    }
    return out.getvalue(), metadata


@functools.cache
def _sentencepiece_pair(folder: Path, *, gemma: bool) -> tuple[Any, Any]:
    content, metadata = _sentencepiece(gemma=gemma)
    path = folder / f"{'gemma' if gemma else 'llama'}.model"
    path.write_bytes(content)
    if gemma:
        theirs: Any = transformers.GemmaTokenizerFast.from_pretrained(_as_folder(path, GemmaTokenizer(str(path))))
    else:
        theirs = transformers.LlamaTokenizerFast.from_pretrained(
            _as_folder(path, LlamaTokenizer(str(path), legacy=True, add_bos_token=True))
        )
    return load(metadata), theirs


def _as_folder(path: Path, slow: Any) -> Path:
    folder = path.with_suffix("")
    slow.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentencepieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sentencepiece")


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@given(text=TEXTS)
def test_ids_of_scores_are_those_of_transformers(sentencepieces: Path, gemma: bool, text: str) -> None:
    ours, theirs = _sentencepiece_pair(sentencepieces, gemma=gemma)
    text = text.replace("\x00", "")  # SentencePiece reads up to it
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize(
    "text",
    [
        CORPUS,
        "".join(PIECES),
        "a   b",
        "    x",
        "x" + " " * 20 + "y",
        "\n\n\n\n\n\n",
        "",
        " ",
        "<start_of_turn>user\nhi",
        "<s>a<mask> b",
        "<h1>x</h1>",
        "a\t\tb",
        "▁▁a ▁b",
        "½漢字😀",
    ],
)
def test_these_texts_have_the_same_ids(sentencepieces: Path, gemma: bool, text: str) -> None:
    ours, theirs = _sentencepiece_pair(sentencepieces, gemma=gemma)
    assert ours.encode(text).ids == theirs(text)["input_ids"]


def test_scores_give_the_same_merges_as_transformers() -> None:
    _, metadata = _sentencepiece(gemma=False)
    ids = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    theirs = generate_merges(ids, [(token, scores[number]) for token, number in ids.items()])
    assert merges_of_scores(ids, scores) == theirs


def test_scores_that_are_no_scores_are_refused() -> None:
    _, metadata = _sentencepiece(gemma=False)
    with pytest.raises(ExportError, match=r"scores .* is a list of 1, expected"):
        gguf_tokenizer(metadata | {"tokenizer.ggml.scores": [0.0]})


def test_special_tokens_of_phi3_take_the_space_behind_them() -> None:
    _, metadata = _sentencepiece(gemma=False)
    made = load(metadata | {"general.architecture": "phi3"})
    assert made.encode("<start_of_turn>  \n a").ids == made.encode("<start_of_turn>a").ids


@pytest.mark.parametrize("path", REAL or [None], ids=[p.name for p in REAL] or ["none"])
def test_real_files_have_the_ids_of_llama_cpp(path: Path | None) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    if path is None:
        pytest.skip("no GGUF model under build/models")
    ours = load(dict(read_gguf(path).metadata))
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    texts = [first + then + last for first in PIECES for then in PIECES[::5] for last in PIECES[::9]]
    for text in texts:
        text = unicodedata.normalize("NFC", text).replace("\x00", "").replace("</s>", "")
        if text:  # llama.cpp takes </s> for a special token wherever it is in the vocabulary
            assert ours.encode(text).ids == theirs.tokenize(text.encode(), add_bos=True, special=True), text
