"""Small adapters, indexes, bundles and tokenizers for the tests."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from edgecompose.bundle.adapter import Adapter, AdapterModule, adapter_to_bytes
from edgecompose.bundle.files import describe_file
from edgecompose.bundle.manifest import MANIFEST_FILE, Defaults, Manifest, manifest_to_json
from edgecompose.bundle.quantization import Bits, QuantizedFactor, block_for, pack, quantize
from edgecompose.bundle.specs import AdapterSpec, BaseSpec, EmbedderSpec, IndexSpec, SlotGroup, TaskSpec
from edgecompose.merging.sparsify import thresholds
from edgecompose.retrieval.index import new_index
from edgecompose.settings import RetrievalSettings

Float = npt.NDArray[np.float32]
BASE = "b" * 64
#: Widths whose blocks hold 8 values, so that even 4-bit magnitudes can all differ within a block.
GROUPS = (SlotGroup("q_proj", 3, 24, 40), SlotGroup("k_proj", 3, 40, 8), SlotGroup("down_proj", 3, 56, 24))
#: Widths with full blocks of 32, and with blocks of 16 and 2.
WIDE = (SlotGroup("o_proj", 2, 64, 96), SlotGroup("up_proj", 2, 48, 6))
#: Any text, lone surrogates included (`st.text` builds a table of all Unicode first, which takes seconds).
TEXT = st.lists(st.integers(0, 255).map(chr) | st.integers(0, 0x10FFFF).map(chr), max_size=12).map("".join)
_PRIMES = [n for n in range(1024, 2048) if all(n % d for d in range(2, 46))]


def make_factor(rng: np.random.Generator, rank: int, layers: int, width: int, bits: Bits) -> QuantizedFactor:
    """A random factor. No two magnitudes of a layer are equal (0 apart), unless a 4-bit block is longer than 8:
    codes differ within a block, and scales are as distinct primes.
    """
    if bits == 16:
        return quantize(rng.standard_normal((layers, rank, width)).astype(np.float32), 16)
    block, top = block_for(width, bits), 127 if bits == 8 else 8
    pool = np.resize(np.arange(top + 1), max(block, top + 1))
    codes = rng.permuted(np.broadcast_to(pool, (layers, rank, width // block, pool.size)), axis=-1)[..., :block]
    signs = rng.choice([-1, 1], codes.shape)
    codes = np.where(codes == 8, -8, codes * signs) if bits == 4 else codes * signs
    primes = np.stack([np.resize(rng.permutation(_PRIMES), rank * width // block) for _ in range(layers)])
    scales = (primes.reshape(layers, rank, width // block) / 2048).astype(np.float16)
    raised = (codes.reshape(layers, rank, width) + (1 << (bits - 1))).astype(np.uint8)
    return QuantizedFactor(pack(raised, bits), scales, 0.03 if bits == 4 else 0.002, bits)


def make_adapter(
    name: str,
    *,
    groups: Sequence[SlotGroup] = GROUPS,
    rank: int = 4,
    bits: Bits = 8,
    scaling: Sequence[float] | float = 2.0,
    base: str = BASE,
) -> Adapter:
    """A random adapter; its name is its seed."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    modules = {}
    for group in groups:
        a = make_factor(rng, rank, group.layers, group.n_in, bits)
        b = make_factor(rng, rank, group.layers, group.n_out, bits)
        modules[group.name] = _module(a, b, scaling)
    return in_memory(name, modules, bits, base)


def adapter_of(name: str, factors: Mapping[str, tuple[Float, Float]], *, scaling: float = 1.0) -> Adapter:
    """An 8-bit adapter from float factors A (L, in, r) and B (L, r, out) by module."""
    modules = {
        module: _module(quantize(a.transpose(0, 2, 1), 8), quantize(b, 8), scaling)
        for module, (a, b) in factors.items()
    }
    return in_memory(name, modules, 8, BASE)


def in_memory(name: str, modules: Mapping[str, AdapterModule], bits: Bits, base: str) -> Adapter:
    """An adapter with the digest that its file would have."""
    content = adapter_to_bytes(modules, bits=bits, base=base, source={"name": name})
    return Adapter(name, modules, bits, base, hashlib.sha256(content).hexdigest())


def write_adapter(path: Path, adapter: Adapter) -> Path:
    """The file of an adapter."""
    source = {"name": adapter.name}
    path.write_bytes(adapter_to_bytes(adapter.modules, bits=adapter.bits, base=adapter.base, source=source))
    return path


def write_index(path: Path, vectors: Float, *, dtype: str = "f32", embedder: str = "e" * 64) -> IndexSpec:
    """An index of the rows of `vectors`, keys 0, 1, ..., and its description."""
    count, dimension = vectors.shape
    index = new_index(dimension, dtype, vectors=count)
    if count:
        index.add(np.arange(count), vectors, threads=1)
    index.save(str(path))
    return IndexSpec(path.name, count, dimension, embedder, "f16" if dtype == "f16" else "f32")


def write_bundle(root: Path) -> Manifest:
    """A bundle whose files are 16 meaningless bytes each; its manifest is valid and true."""
    names = [
        "base/model.onnx",
        "base/model.onnx.data",
        "base/tokenizer.json",
        "base/chat.jinja",
        "embedder/model.onnx",
        "embedder/tokenizer.json",
        "index.usearch",
        "index.jsonl",
        "adapters/one.safetensors",
        "adapters/two.safetensors",
    ]
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hashlib.sha256(name.encode()).hexdigest()[:16].encode())
    manifest = Manifest(
        name="test",
        base=BaseSpec(
            graph="base/model.onnx",
            tokenizer="base/tokenizer.json",
            identity=BASE,
            precision="int8",
            context=128,
            kv_heads=2,
            head_size=8,
            vocabulary=300,
            end_tokens=(1, 2),
            slots=GROUPS,
            chat_template="base/chat.jinja",
        ),
        embedder=EmbedderSpec(
            graph="embedder/model.onnx",
            tokenizer="embedder/tokenizer.json",
            identity="e" * 64,
            precision="int8",
            dimension=8,
            max_length=64,
            pooling="mean",
            normalize=True,
        ),
        index=IndexSpec("index.usearch", 5, 8, f"{'e' * 64}/int8/mean/64/unit", texts="index.jsonl"),
        tasks={"alpha": TaskSpec({"one": 1.0}, 0, 2), "beta": TaskSpec({"two": 1.0}, 2, 3)},
        adapters={
            "one": AdapterSpec("adapters/one.safetensors", 4, 8, BASE, 0.005, {"task": "alpha"}),
            "two": AdapterSpec("adapters/two.safetensors", 4, 4, BASE, 0.08),
        },
        defaults=Defaults(retrieval=RetrievalSettings(neighbours=3)),
        files={name: describe_file(root / name) for name in names},
    )
    (root / MANIFEST_FILE).write_text(manifest_to_json(manifest), encoding="utf-8")
    return manifest


def write_tokenizer(path: Path) -> Path:
    """A byte-level tokenizer: one token a UTF-8 byte, and `<s>`, which it would put first by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    start = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save(str(path))
    return path


def _module(a: QuantizedFactor, b: QuantizedFactor, scaling: Sequence[float] | float) -> AdapterModule:
    layers, rank, _ = a.codes.shape
    scales = np.broadcast_to(np.asarray(scaling, np.float32), layers).copy()
    return AdapterModule(a, b, scales, np.full(layers, rank, np.int32), np.stack([thresholds(a), thresholds(b)]))
