"""llama.cpp on the same GGUF and the same blend: in this process as calls to time, or in a process of its own.

It takes part where `llama-cpp-python` is installed. `pip install llama-cpp-python` compiles it in some minutes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.timing import Step

_PROCESS = """
import sys, llama_cpp
model, lora, tokens = sys.argv[1], sys.argv[2] or None, int(sys.argv[3])
threads = dict(n_threads={threads}, n_threads_batch={threads})
llama = llama_cpp.Llama(model, lora_path=lora, n_ctx=2048, verbose=False, **threads)
llama.eval([265] * tokens)
for _ in range(8):
    llama.eval([llama.sample(temp=0)])
"""


def is_available(gguf: Path) -> bool:
    """Whether llama.cpp is installed and the GGUF file exists."""
    return importlib.util.find_spec("llama_cpp") is not None and gguf.is_file()


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A GGUF base, and a LoRA file or none."""

    gguf: Path
    lora: Path | None = None

    def command(self, tokens: int) -> list[str]:
        """A process that reads a prompt of so many tokens and writes eight."""
        program = _PROCESS.format(threads=os.cpu_count())
        lora = "" if self.lora is None else str(self.lora)
        return [sys.executable, "-c", program, str(self.gguf), lora, str(tokens)]

    def open(self) -> Any:
        """The model, loaded into this process, with as many threads as our decoder has."""
        import llama_cpp

        threads = os.cpu_count()
        return llama_cpp.Llama(
            str(self.gguf),
            n_threads=threads,
            n_threads_batch=threads,
            n_ctx=1100,
            verbose=False,
            lora_path=None if self.lora is None else str(self.lora),
        )


def token_steps(model: Any, ids: Sequence[int], *, capacity: int) -> Step:
    """A call that decodes one token greedily; a full sequence starts again after the prompt."""
    model.eval(ids)
    token = model.sample(temp=0)

    def step() -> None:
        nonlocal token
        if model.n_tokens >= capacity:
            model.n_tokens = len(ids)
        model.eval([token])
        token = model.sample(temp=0)

    return step


def answers(model: Any, ids: Sequence[int], *, tokens: int) -> Step:
    """A call that decodes so many tokens greedily after the prompt."""
    model.eval(ids)
    first = model.sample(temp=0)

    def write() -> None:
        model.n_tokens, token = len(ids), first
        for _ in range(tokens):
            model.eval([token])
            token = model.sample(temp=0)

    return write


def readings(model: Any, ids: Sequence[int]) -> Step:
    """A call that reads the prompt and chooses the first token of the answer."""

    def read() -> None:
        model.reset()
        model.eval(ids)
        model.sample(temp=0)

    return read
