"""A base that people really have, where `make real-models` has fetched it: small, right, and answering."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason="a package of edgecompose-export")

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.generation.scoring import log_softmax
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.export import export_base
from edgecompose_export.weights.source import open_weights

FOLDER = Path(__file__).parents[2] / "build/models/qwen2.5-coder-0.5b-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not list(FOLDER.glob("*.gguf")), reason="the model is not there; run: make real-models"),
]
_NO_ADAPTER = MergedAdapter({}, "base")


@dataclass(frozen=True)
class Real:
    """The exported model."""

    folder: Path
    spec: BaseSpec
    decoder: Decoder
    tokenizer: Tokenizer


@pytest.fixture(scope="module")
def gguf_path() -> Path:
    return next(FOLDER.glob("*.gguf"))


@pytest.fixture(scope="module")
def real(gguf_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real") / "base"
    spec = export_base(gguf_path, folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    decoder = Decoder(folder / spec.graph, spec, choose_device("cpu"))
    return Real(folder, spec, decoder, Tokenizer(folder / spec.tokenizer, chat_template=template))


def test_every_tensor_keeps_its_own_codes(real: Real, gguf_path: Path) -> None:
    distance = real.spec.distance
    assert distance is not None
    assert real.spec.precision == "source"
    assert distance.kl <= 0.005 and distance.top1 >= 0.95
    size = sum(path.stat().st_size for path in real.folder.iterdir())
    assert size <= 1.4 * gguf_path.stat().st_size


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is the capital of France? Answer with one word.", "Paris"),
        ("Write a Python expression that adds 2 and 3. Answer with the expression only.", "2 + 3"),
    ],
)
def test_questions_are_answered_and_the_turn_ends(real: Real, question: str, answer: str) -> None:
    ids = real.tokenizer.encode(real.tokenizer.chat([{"role": "user", "content": question}]))
    decoding = real.decoder.start(_NO_ADAPTER, len(ids) + 40)
    token, tokens = int(decoding.forward(ids)[0].argmax()), list[int]()
    while token not in real.spec.end_tokens and len(tokens) < 40:
        tokens.append(token)
        token = int(decoding.forward([token])[0].argmax())
    assert answer in real.tokenizer.decode(tokens)
    assert token in real.spec.end_tokens


def test_logits_are_those_of_llama_cpp(real: Real, gguf_path: Path) -> None:
    """Another program with other kernels on the same file: near in divergence, though both round activations."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    prompt = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + "
    ids = real.tokenizer.encode_prompt(prompt)
    llama = llama_cpp.Llama(str(gguf_path), n_ctx=256, logits_all=True, verbose=False)
    assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == ids
    llama.eval(ids)
    theirs = log_softmax(np.array(llama.scores[: len(ids)], np.float32))
    ours = log_softmax(real.decoder.start(_NO_ADAPTER, len(ids)).forward(ids, rows=len(ids)).copy())
    kl = float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())
    assert 0 <= kl < 0.01
    assert ours[-1].argmax() == theirs[-1].argmax()


def test_the_file_is_read_as_it_says(gguf_path: Path) -> None:
    config = open_weights(gguf_path).config
    assert (len(config.layers), config.heads, config.kv_heads, config.head_size) == (24, 14, 2, 64)
    assert config.biases == {"q_proj", "k_proj", "v_proj"}
    assert not config.tied
