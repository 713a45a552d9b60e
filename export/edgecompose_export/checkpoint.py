"""A base model on disk (Hugging Face folder or GGUF file) as transformers sees it."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from edgecompose.atomic import new_folder
from edgecompose.bundle import sha256_of
from edgecompose.errors import CheckpointError, ExportError
from edgecompose.float_checkpoint import BASE_KEY, read_shard, weights_identity, write_shard

#: Pre-tokenizers that GGUF names and transformers' conversion leaves out (llama.cpp, llama-vocab.cpp).
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})


@dataclass(frozen=True)
class Checkpoint:
    """Where a base model lies: a folder, and the GGUF file in it when it is one."""

    folder: Path
    gguf: str | None

    @property
    def _options(self) -> dict[str, Any]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    def model(self, dtype: Any = None) -> Any:
        """The causal language model (transformers), float32 unless told otherwise, in eval mode."""
        import torch
        from transformers import AutoModelForCausalLM

        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype or torch.float32, local_files_only=True, **self._options
            )
        except Exception as error:  # transformers, safetensors and gguf raise classes of all kinds on damaged files
            raise ExportError(f"base '{self.folder}' cannot be loaded as a causal model: {_one_line(error)}") from error
        return loaded.eval()

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """Loaded once: reading it out of a GGUF takes half a minute."""
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(self.folder, local_files_only=True, **self._options)
        except Exception as error:  # as above
            raise ExportError(f"tokenizer of '{self.folder}' cannot be loaded: {_one_line(error)}") from error
        if self.gguf is not None:
            _set_special_tokens(loaded, self.folder / self.gguf)
        if not getattr(loaded, "is_fast", False):
            raise ExportError(f"tokenizer of '{self.folder}' has no fast form; add a tokenizer.json to the folder")
        return loaded

    def tokenizer(self) -> Any:
        """The fast tokenizer (transformers); it must be used with `add_special_tokens=False`."""
        return self._tokenizer

    def identity(self) -> str:
        """sha256 that names the base: that of its GGUF file, or of its weight files in name order.

        Raises:
            ExportError: a folder without weights.
        """
        if self.gguf is not None:
            return sha256_of(self.folder / self.gguf)
        try:
            return weights_identity(self.folder)
        except CheckpointError as error:
            raise ExportError(str(error)) from error

    def write_tokenizer(self, folder: Path) -> str | None:
        """Write `tokenizer.json` into `folder`; return the chat template, None when there is none."""
        loaded = self.tokenizer()
        state = json.loads(loaded.backend_tokenizer.to_str())
        if self.gguf is not None and _gguf_text(self.folder / self.gguf, "tokenizer.ggml.pre") in _DIGITS_APART:
            state["pre_tokenizer"] = {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, state["pre_tokenizer"]],
            }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        template = loaded.chat_template
        return _self_contained(template, loaded) if isinstance(template, str) else None

    def write_folder(self, output: Path, dtype: str = "float32") -> str:
        """Write a Hugging Face folder of float weights that record this base, for `edgecompose compose --checkpoint`.

        Args:
            output: does not exist yet; appears when it is complete.
            dtype: 'float32', 'float16' or 'bfloat16'.

        Returns:
            The identity that was recorded.

        Raises:
            ExportError: `output` exists, or this cannot be loaded.
        """
        import torch

        if output.exists():
            raise ExportError(f"'{output}' exists; remove it or give another folder")
        identity = self.identity()
        with new_folder(output) as work:
            self.model(getattr(torch, dtype)).save_pretrained(work)
            whole = None if self.gguf is None else False  # else the GGUF goes along as its tokenizer.model
            self.tokenizer().save_pretrained(work, legacy_format=whole)
            self.write_tokenizer(work)
            for path in sorted(work.glob("*.safetensors")):
                marked, shard = path.with_suffix(".marked"), read_shard(path)
                write_shard(shard, marked, {**shard.metadata, BASE_KEY: identity}, {})
                marked.replace(path)
        return identity


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _set_special_tokens(tokenizer: Any, path: Path) -> None:
    """First and last token as the GGUF names them (transformers' conversion gives both the first one's name)."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    for name in ("bos_token", "eos_token"):
        field = fields.get(f"tokenizer.ggml.{name}_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.contents())))


def _self_contained(template: str, tokenizer: Any) -> str:
    """The chat template with the special tokens that it names set in its first line."""
    names = [name for name in ("bos_token", "eos_token") if name in template]
    values = {name: getattr(tokenizer, name) or "" for name in names}
    return "".join(f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()) + template


def find_checkpoint(path: Path) -> Checkpoint:
    """The base at `path`: a folder with config.json, a GGUF file, or a folder holding one GGUF file.

    Raises:
        ExportError: nothing there that transformers could load.
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise ExportError(f"base '{path}' is neither a folder nor a .gguf file")
        return Checkpoint(path.parent, path.name)
    if (path / "config.json").is_file():
        return Checkpoint(path, None)
    found = sorted(p.name for p in path.glob("*.gguf")) if path.is_dir() else []
    if len(found) != 1:
        raise ExportError(
            f"base '{path}' has no config.json but {len(found)} .gguf files; give a Hugging Face folder or a GGUF file"
        )
    return Checkpoint(path, found[0])


def _gguf_text(path: Path, key: str) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get(key)
    return None if field is None else str(field.contents())
