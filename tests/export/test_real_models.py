"""A base that people really have, where `make real-models` has fetched it: small, right, and answering."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("gguf", reason="a package of edgecompose-export")

from edgecompose import Composer, Message, Request, open_bundle
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.generation.scoring import log_softmax
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base.export import export_base
from edgecompose_export.bundles import build_bundle
from edgecompose_export.weights.source import open_weights
from tests.openers import OPENERS, begins_an_answer
from tests.tiny import write_task

BUILD = Path(__file__).parents[2] / "build"
FOLDER = BUILD / "models/qwen2.5-coder-0.5b-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not list(FOLDER.glob("*.gguf")), reason="the model is not there; run: make real-models"),
]
PROMPTS = {
    "reviews": [
        f"Review: the {noun} was {word}. Positive or negative?" for noun in ("food", "room") for word in ("good", "bad")
    ],
    "order": [
        f"Premise: {a} is larger than {b}. Does it follow that {b} is smaller? yes or no:" for a in "xy" for b in "zw"
    ],
}
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


@pytest.fixture(scope="module")
def composer(real: Real, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composer]:
    """A bundle of this base with two tasks, whose adapters are random."""
    if not (BUILD / "embedder/embedder.json").is_file():
        pytest.skip("the encoder is not built; run: make bundle")
    root = tmp_path_factory.mktemp("bundle")
    recipe = [
        f'name = "real"\nbase = "{real.folder}"\nembedder = "{BUILD / "embedder"}"\n[defaults]\nprompt_form = "raw"'
    ]
    for seed, (name, prompts) in enumerate(PROMPTS.items()):
        write_adapter(root / name, real.spec, seed)
        write_task(root / f"{name}.jsonl", prompts)
        recipe.append(f'[tasks.{name}]\nadapter = "{name}"\nexamples = "{name}.jsonl"')
    (root / "recipe.toml").write_text("\n".join(recipe), encoding="utf-8")
    build_bundle(root / "recipe.toml", root / "bundle")
    with open_bundle(root / "bundle", device="cpu") as opened:
        yield opened


def write_adapter(folder: Path, spec: BaseSpec, seed: int) -> None:
    """A PEFT folder of rank 2 on the queries of all layers."""
    (group,) = (group for group in spec.slots if group.name == "q_proj")
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(group.layers):
        place = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{place}.lora_A.weight"] = rng.normal(size=(2, group.n_in)).astype(np.float32) / 30
        tensors[f"{place}.lora_B.weight"] = rng.normal(size=(group.n_out, 2)).astype(np.float32) / 30
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("text", OPENERS)
def test_openers_are_answered_in_the_chat_template_and_the_same_each_time(composer: Composer, text: str) -> None:
    request = Request(max_tokens=5, prompt_cache=True)
    answers = [composer.run([Message("user", text)], request) for _ in range(2)]
    assert {answer.prompt_form for answer in answers} == {"chat"} and not answers[0].retrieval.weights
    assert begins_an_answer(answers[0].text), answers[0].text
    assert answers[0].text == answers[1].text


def test_a_conversation_is_the_same_with_and_without_the_prompt_cache(composer: Composer) -> None:
    talk = [Message("user", "Write a Python function that adds two numbers, and explain each of its lines. " * 10)]
    for weights in ({}, {"reviews": 0.5, "order": 0.5}):
        for _ in range(2):
            requests = [Request(weights=weights, max_tokens=4, prompt_cache=cache) for cache in (False, True)]
            texts = {composer.run(talk, request).text for request in requests}
            assert len(texts) == 1
            while composer.model.read_ahead():
                pass
            talk += [Message("assistant", texts.pop()), Message("user", "Explain the second line again.")]
