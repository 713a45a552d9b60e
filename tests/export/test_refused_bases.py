"""What `edgecompose-export base` says of a base that it refuses: one line, before the long work, and nothing is left.

GGUF files are taken apart and put together again with one thing wrong.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.formats.gguf_file import read_gguf
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.spec import read_base_spec
from edgecompose_export.cli import main
from tests.export.refusals import listed, one_line
from tests.gguf_models import MODELS, write_gguf

pytestmark = pytest.mark.slow

_KINDS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}


@dataclasses.dataclass
class Tensor:
    """A tensor of a file; `offset` None is where it belongs."""

    name: str
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


@dataclasses.dataclass
class Parts:
    """What a GGUF file is made of. Values are Python's, or bytes that hold type and value as they are in the file."""

    metadata: list[tuple[str, Any]]
    tensors: list[Tensor]
    version: int = 3
    order: str = "<"
    tensor_count: int | None = None
    key_count: int | None = None

    def put(self, key: str, value: Any) -> None:
        """Another value of a key, or one more."""
        self.metadata = [*((k, v) for k, v in self.metadata if k != key), (key, value)]

    def drop(self, key: str) -> None:
        """No such key."""
        self.metadata = [(k, v) for k, v in self.metadata if k != key]

    def tensor(self, name: str) -> Tensor:
        """One of the tensors."""
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def write(self, path: Path) -> Path:
        """Put the file together."""
        counts = self.tensor_count or len(self.tensors), self.key_count or len(self.metadata)
        head = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, *counts)
        for key, value in self.metadata:
            head += text(key) + (value if isinstance(value, bytes) else typed(value))
        data = b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            data += tensor.data + bytes(-len(tensor.data) % 32)
            head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
            head += struct.pack("<IQ", tensor.kind, offset % 2**64)
        path.write_bytes(head + bytes(-len(head) % 32) + data)
        return path


def text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def typed(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        rows = [typed(entry) for entry in value]
        kind = rows[0][:4] if rows else struct.pack("<I", 4)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(rows)) + b"".join(row[4:] for row in rows)
    number, code = _KINDS[type(value)]
    return struct.pack("<I", number) + struct.pack(code, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS["llama"].write(tmp_path_factory.mktemp("refused") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return write_gguf(folder.parent / "whole.gguf", folder)


@pytest.fixture
def parts(whole: Path) -> Parts:
    file = read_gguf(whole)
    tensors = [
        Tensor(t.name, t.shape, GGMLQuantizationType[t.type], file.data(t.name).tobytes())
        for t in file.tensors.values()
    ]
    return Parts(list(file.metadata.items()), tensors)


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A Hugging Face folder, to be damaged."""
    return shutil.copytree(folder, tmp_path / "model")


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Runs the command on a base; returns what it says, having seen that it refuses it by the headers alone."""

    def at_last(*args: Any, **named: Any) -> Any:
        raise AssertionError("the long work has begun")

    def run(source: Path) -> str:
        before = listed(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr("edgecompose_export.base.export.float_states", at_last)
            result = CliRunner().invoke(main, ["base", str(source), "-o", str(tmp_path / "out")])
        assert listed(tmp_path) == before
        return one_line(result, source)

    return run


Change = Callable[[Parts], object]


def nested(depth: int) -> bytes:
    return struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQ", 4, 0)


def at_offset(name: str, offset: int) -> Change:
    return lambda parts: setattr(parts.tensor(name), "offset", offset)


def reshaped(name: str, *shape: int) -> Change:
    return lambda parts: setattr(parts.tensor(name), "shape", shape)


def with_key(key: str, value: Any) -> Change:
    return lambda parts: parts.put(key, value)


def without(key: str) -> Change:
    return lambda parts: parts.drop(key)


def with_field(name: str, value: Any) -> Change:
    return lambda parts: setattr(parts, name, value)


def doubled_key(parts: Parts) -> None:
    parts.metadata.append(("llama.block_count", 1))


def doubled_tensor(parts: Parts) -> None:
    parts.tensors.append(parts.tensor("output_norm.weight"))


def big_endian(parts: Parts) -> None:
    parts.order = ">"


def longer(key: str, count: int) -> Change:
    """A list with other than its entries: `count` of the first one."""

    def change(parts: Parts) -> None:
        values = dict(parts.metadata)[key]
        parts.put(key, [values[0]] * count)

    return change


def more_tokens(parts: Parts) -> None:
    """The vocabulary of a model with more rows."""
    values = dict(parts.metadata)
    parts.put("tokenizer.ggml.tokens", [*values["tokenizer.ggml.tokens"], "more", "most"])
    parts.put("tokenizer.ggml.token_type", [*values["tokenizer.ggml.token_type"], 1, 1])


def with_bad_token(parts: Parts) -> None:
    tokens = list(dict(parts.metadata)["tokenizer.ggml.tokens"])
    tokens[5] = "\udcff"
    parts.put("tokenizer.ggml.tokens", tokens)


def of_sentencepiece(parts: Parts) -> None:
    parts.put("tokenizer.ggml.model", "llama")
    parts.drop("tokenizer.ggml.merges")


def name_of_terminal_codes(parts: Parts) -> None:
    parts.tensor("output_norm.weight").name = "\x1b[2J\n\x07"


GGUF: Mapping[str, tuple[Change, str]] = {
    "tensors without end": (with_field("tensor_count", 2**63), r"takes \d+ bytes, the file ends|tensor name|axes"),
    "keys without end": (with_field("key_count", 2**64 - 1), "the file ends|twice|unknown type"),
    "nested lists": (with_key("a", nested(100)), "value of 'a' is of the unknown type 9"),
    "a type of no value": (with_key("a", struct.pack("<I", 13)), "value of 'a' is of the unknown type 13"),
    "a string of a terabyte": (with_key("a", struct.pack("<IQ", 8, 2**40)), "takes 1099511627776 bytes"),
    "a list of a terabyte": (with_key("a", struct.pack("<IIQ", 9, 4, 2**38)), "has 274877906944 entries"),
    "a negative offset": (at_offset("output_norm.weight", -32), "'output_norm.weight'.* begins at byte"),
    "overlapping tensors": (at_offset("output_norm.weight", 0), "'output_norm.weight'.* begins at byte 0 .* expected"),
    "an unaligned tensor": (at_offset("token_embd.weight", 1), "begins at byte 1 of the data, expected 0"),
    "a tensor of no axes": (reshaped("output_norm.weight"), "'output_norm.weight' has 0 axes"),
    "a tensor of five axes": (reshaped("output_norm.weight", 1, 1, 1, 1, 64), "'output_norm.weight' has 5 axes"),
    "a tensor of no rows": (reshaped("output_norm.weight", 0), "'output_norm.weight' has shape"),
    "a tensor of many rows": (reshaped("output.weight", 2**62, 64), "'output.weight'.*the file ends"),
    "a norm of another width": (reshaped("output_norm.weight", 8, 8), r"output_norm.weight \[8, 8\], expected \[64\]"),
    "a tensor twice": (doubled_tensor, "holds a tensor twice: output_norm.weight"),
    "a key twice": (doubled_key, "'llama.block_count' stands there twice"),
    "version 1": (with_field("version", 1), "is of version 1, expected"),
    "version 4": (with_field("version", 4), "is of version 4, expected"),
    "big-endian": (big_endian, "is big-endian; convert it"),
    "no alignment": (with_key("general.alignment", 0), "general.alignment is 0, expected a power of 2"),
    "a name that is no text": (name_of_terminal_codes, r"output_norm.weight"),
    # other kinds of files
    "an adapter": (with_key("general.type", "adapter"), "is a GGUF 'adapter', expected a model; give"),
    "an importance matrix": (with_key("general.type", "imatrix"), "is a GGUF 'imatrix', expected a model; give"),
    "a vision part": (with_key("general.type", "mmproj"), "is a GGUF 'mmproj', expected a model; give"),
    "an older vision part": (with_key("general.architecture", "clip"), "architecture 'clip', expected one of"),
    "Mamba": (with_key("general.architecture", "mamba"), "architecture 'mamba', expected one of"),
    "no architecture": (without("general.architecture"), "architecture None"),
    "a mixture of experts": (with_key("llama.expert_count", 8), "mixture of experts.*give a dense model"),
    # numbers
    "no layers": (with_key("llama.block_count", 0), "block_count|no layer"),
    "layers without end": (with_key("llama.block_count", 2**32 - 1), "block_count is 4294967295, expected"),
    "no block count": (without("llama.block_count"), "block_count"),
    "no heads": (with_key("llama.attention.head_count", 0), "head"),
    "heads without end": (with_key("llama.attention.head_count", 2**32 - 4), "attn_q.weight|head"),
    "three heads": (with_key("llama.attention.head_count", 3), "3 query heads cannot share 2 key heads"),
    "heads as text": (with_key("llama.attention.head_count", "many"), "many|head_count"),
    "heads as lists": (with_key("llama.attention.head_count", [4, 2]), "different widths"),
    "odd rotations": (with_key("llama.rope.dimension_count", 15), "15 values of a head rotate"),
    "wide rotations": (with_key("llama.rope.dimension_count", 64), "rotate"),
    "endless rotations": (with_key("llama.rope.dimension_count", 2**32 - 2), "rotate"),
    "no context": (with_key("llama.context_length", 0), "context"),
    "another width": (with_key("llama.embedding_length", 2**31), r"have another shape.*expected \["),
    "epsilon that is no number": (with_key("llama.attention.layer_norm_rms_epsilon", float("nan")), "epsilon"),
    "a base that is no number": (with_key("llama.rope.freq_base", float("nan")), "theta|freq_base"),
    "a negative base": (with_key("llama.rope.freq_base", -1.0), "theta|freq_base"),
    # vocabulary
    "more tokens than rows": (more_tokens, "2 words with ids from 300 on.*put the tokenizer of this model"),
    "an unknown pre-tokenizer": (with_key("tokenizer.ggml.pre", "strange"), "pre-tokenizer 'strange'.*give the model"),
    "no tokens": (without("tokenizer.ggml.tokens"), "no vocabulary.*convert"),
    "fewer kinds than tokens": (longer("tokenizer.ggml.token_type", 7), "token_type.*a list of 7, expected 300"),
    "tokens of one text": (longer("tokenizer.ggml.tokens", 300), "merges"),
    "merges of no tokens": (longer("tokenizer.ggml.merges", 0), "no tokenizer.ggml.merges"),
    "a token that is no text": (with_bad_token, "token 5 of the GGUF file is not UTF-8"),
    "an end beyond the tokens": (with_key("tokenizer.ggml.eos_token_id", 300), "eos_token_id.*300, expected an id"),
    "SentencePiece without scores": (of_sentencepiece, "tokenizer.ggml.scores.* is None, expected 300 numbers"),
    "an unknown tokenizer": (with_key("tokenizer.ggml.model", "rwkv"), "kind 'rwkv'.*give"),
    "a template that is no Jinja": (with_key("tokenizer.chat_template", "{% if %}"), "template is not valid Jinja"),
    "a template that is no text": (with_key("tokenizer.chat_template", "a \udc80"), "template is not UTF-8"),
}


@pytest.mark.parametrize("case", GGUF)
def test_a_gguf_file_with_one_thing_wrong(
    case: str, parts: Parts, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    change, message = GGUF[case]
    change(parts)
    line = refused(parts.write(tmp_path / "wrong.gguf"))
    assert re.search(message, line), line


def test_a_file_that_is_put_together_again_is_the_same(parts: Parts, whole: Path, tmp_path: Path) -> None:
    """So what is refused above is refused for its change."""
    copy, file = read_gguf(parts.write(tmp_path / "copy.gguf")), read_gguf(whole)
    assert copy.metadata == file.metadata
    assert all(np.array_equal(copy.data(name), file.data(name)) for name in file.tensors)


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ1_S", "TQ1_0", "MXFP4", "Q8_K", "I32"])
def test_a_type_that_is_not_read_is_named(
    kind: str, parts: Parts, tmp_path: Path, refused: Callable[[Path], str]
) -> None:
    known = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[known]
    width = 256 if block > 1 else 64
    tensor = parts.tensor("blk.0.ffn_up.weight")
    tensor.kind, tensor.shape, tensor.data = known, (96, width), bytes(96 * width // block * size)
    line = refused(parts.write(tmp_path / "wrong.gguf"))
    assert f"blk.0.ffn_up.weight ({kind})" in line


def test_fewer_tokens_than_rows_are_fine(parts: Parts, tmp_path: Path) -> None:
    """Embeddings are padded often."""
    values = dict(parts.metadata)
    for name in ("tokens", "token_type"):
        parts.put(f"tokenizer.ggml.{name}", values[f"tokenizer.ggml.{name}"][:-1])
    for name in ("bos", "eos", "padding"):
        parts.put(f"tokenizer.ggml.{name}_token_id", 297)
    source = parts.write(tmp_path / "padded.gguf")
    result = CliRunner().invoke(main, ["base", str(source), "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert read_base_spec(tmp_path / "out").vocabulary == 300
    assert Tokenizer(tmp_path / "out" / "tokenizer.json").vocabulary_size == 299
