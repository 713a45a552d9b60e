"""Tokens of a tokenizer folder."""

from __future__ import annotations

from tokenizers import pre_tokenizers

WORDS = sorted(pre_tokenizers.ByteLevel.alphabet())
#: Added tokens in the order of their ids, from 256 on, and whether each is special.
ADDED = {
    "<unk>": True,
    "<s>": True,
    "</s>": True,
    "<bos>": True,
    "<eos>": True,
    "<pad>": True,
    "<start_of_turn>": True,
    "<end_of_turn>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|endoftext|>": True,
    "<think>": False,
    "<tool_call>": False,
}
IDS = {text: 256 + i for i, text in enumerate(ADDED)}
