"""A checkpoint of the shape of Llama-2-7B with random weights: 13.5 GB in bfloat16, to measure an export of that size.

    python benchmarks/llama7b.py build/models/llama-2-7b-random [--layers N]
    python benchmarks/bases.py llama-2-7b-random --precisions int8 --rank 64

Speed and memory depend on the shape, not on the values. The weights are drawn and written block by block, so the
program takes less than 2 GB. The same seed gives the same bytes. The tokenizer is a byte-level BPE of 32,000 tokens
with the ChatML template of the tests' tiny models.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees only its own folder

import transformers

from benchmarks.measuring.arguments import command_parser
from edgecompose.bundle.atomic import new_folder
from edgecompose.cli.console import counting_bytes
from tests.tiny import CHAT_TEMPLATE, END, SPECIAL

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS = 32_000, 4096, 11_008, 32, 32
SHARD_BYTES = 4 << 30
#: Values of one draw.
_BLOCK = 1 << 24
_SPREAD = 0.02
Shape = tuple[int, ...]


def main() -> None:
    """Parse, write, print the path."""
    parser = command_parser(__doc__)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer make a smaller model for a trial")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        raise SystemExit(f"'{options.output}' exists; remove it or give another folder")
    with new_folder(options.output) as work:
        write_tokenizer(work)
        write_config(work, options.layers)
        size = write_weights(work, options.layers, options.seed)
    print(f"{options.output}: {options.layers} layers, {size / 1e9:.1f} GB")


def tensor_shapes(layers: int) -> dict[str, Shape]:
    """Every tensor of the checkpoint by name."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def write_weights(folder: Path, layers: int, seed: int) -> int:
    """Write the shards and their index; returns the bytes of all tensors."""
    shapes = tensor_shapes(layers)
    shards, total = split(shapes), sum(map(tensor_bytes, shapes.values()))
    rng, index = np.random.default_rng(seed), dict[str, str]()
    with counting_bytes("writing weights", total) as advance:
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            index |= dict.fromkeys(shard, file)
            with (folder / file).open("xb") as stream:
                stream.write(header({name: shapes[name] for name in shard}))
                for block in (block for name in shard for block in random_blocks(shapes[name], rng)):
                    stream.write(block.data)
                    advance(block.nbytes)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return total


def split(shapes: dict[str, Shape]) -> list[list[str]]:
    """Names of the tensors of each shard, in order, at most SHARD_BYTES together."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if size + tensor_bytes(shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes(shape)
    return shards


def tensor_bytes(shape: Shape) -> int:
    """Size of a tensor in bfloat16."""
    return 2 * int(np.prod(shape, dtype=np.int64))


def header(shapes: dict[str, Shape]) -> bytes:
    """The first bytes of a safetensors file with these tensors one after another."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + tensor_bytes(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def random_blocks(shape: Shape, rng: np.random.Generator) -> Iterator[npt.NDArray[np.uint16]]:
    """A tensor in bfloat16, some values at a time: ones for a norm, else normal values."""
    count = int(np.prod(shape, dtype=np.int64))
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        if len(shape) == 1:
            values = np.ones(size, np.float32)
        else:
            values = rng.standard_normal(size, np.float32)
            values *= _SPREAD
        bits = values.view(np.uint32)
        bits += 1 << 15  # rounds to the nearest
        yield (bits >> 16).astype("<u2")


def write_config(folder: Path, layers: int) -> None:
    """The configuration of Llama-2-7B, with the end token of our tokenizer."""
    end = VOCABULARY - 1
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end - 2,
        architectures=["LlamaForCausalLM"],
        torch_dtype="bfloat16",
    )
    config.save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Bytes, pairs of bytes, and special tokens: 32,000 together."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = list(itertools.islice(itertools.product(alphabet, repeat=2), VOCABULARY - len(alphabet) - len(SPECIAL)))
    words = [*alphabet, *(first + second for first, second in pairs)]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=SPECIAL[0])
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
