"""A blend written as GGUF, loaded by llama.cpp itself on the same base in float32, gives the same greedy answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; run 'pip install llama-cpp-python' (it compiles)")

import llama_cpp
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize

from edgecompose import Composer, Request, open_bundle
from edgecompose.formats.gguf import write_gguf_lora

ROOT = Path(__file__).parent.parent
BUNDLE = ROOT / "build" / "demo-fp32"
MODEL = ROOT / "build" / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUNDLE / "manifest.json").is_file(), reason="build/demo-fp32 is not built; run 'make bundle-fp32'"
    ),
]
TOKENS = 16
PROMPTS = {
    "yelp": "Customer review of a business: The soup came cold and the room was dirty.\n"
    "Would you call this customer's experience positive or negative?\nAnswer:",
    "snli": "A photo is described as: Two dogs run across a frozen lake.\nIs it then true that: The animals sleep.\n"
    "Say yes, maybe or no.\nAnswer:",
    "story_cloze": "Ana planted tomatoes in spring. She watered them every day. In August they were ripe.\n"
    "What happened next?",
    "squad": "Passage: Mangroves grow along tropical coasts. Their roots slow the water, so mud settles between them.\n"
    "Question: What settles between the roots of mangroves?\nAnswer:",
}


def float_gguf(source: Path, target: Path) -> Path:
    """A GGUF file with every tensor in float32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, sub_type=field.types[-1] if kind == GGUFValueType.ARRAY else None
            )
    writer.add_file_type(0)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def greedy(model: Path, lora: Path | None, ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """Greedy token ids by llama.cpp with caches in float32, without the end token."""
    llama = llama_cpp.Llama(
        str(model),
        lora_path=None if lora is None else str(lora),
        n_ctx=512,
        verbose=False,
        n_threads=2,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    written: list[int] = []
    llama.eval(ids)
    while len(written) < TOKENS and (token := llama.sample(temp=0)) not in ends:
        written.append(token)
        llama.eval([token])
    llama.close()
    return written


def test_llama_cpp_answers_as_we_do(tmp_path: Path) -> None:
    model = float_gguf(MODEL, tmp_path / "float.gguf")
    changed = 0
    with open_bundle(BUNDLE, device="cpu") as composer:
        ends = composer.bundle.manifest.base.end_tokens
        for task, prompt in PROMPTS.items():
            ids = composer.model.tokenizer.encode(prompt)
            weights = {task: 0.8, "copa": 0.3}
            request = Request(weights=weights, raw=True, max_tokens=TOKENS)
            lora = write_gguf_lora(
                composer.compose(prompt, request).merged, tmp_path / f"{task}.gguf", composer.bundle.manifest.base
            )
            theirs = greedy(model, lora, ids, ends)
            assert composer.model.tokenizer.decode(theirs).lstrip() == composer.run(prompt, request).text
            assert alone(composer, prompt) == composer.model.tokenizer.decode(greedy(model, None, ids, ends)).lstrip()
            changed += theirs != greedy(model, None, ids, ends)
    assert changed >= 2  # the adapters matter


def alone(composer: Composer, prompt: str) -> str:
    return composer.run(prompt, Request(weights={}, raw=True, max_tokens=TOKENS)).text
