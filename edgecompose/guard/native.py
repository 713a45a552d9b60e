"""Turns what extension libraries raise into errors of ours.

ONNX Runtime, USearch, safetensors, tokenizers and numpy raise RuntimeError, ValueError, bare Exception, and classes
of their own; a panic of Rust is even a BaseException, which `except Exception` lets through.
"""

from __future__ import annotations

from types import TracebackType

from edgecompose.errors import EdgeComposeError

_LONGEST = 300
#: What pyo3 calls a panic of Rust.
_PANIC = "PanicException"


class native:
    """Work of an extension library: whatever it raises becomes one error of one line.

    Errors of ours pass as they are, and so do KeyboardInterrupt, SystemExit and the like.

    Args:
        error: the class to raise.
        what: what failed, for the message, such as "the decoder graph cannot be run".
        advice: what the reader of the message can do.
    """

    __slots__ = ("_advice", "_error", "_what")

    def __init__(self, error: type[EdgeComposeError], what: str, advice: str = "export the bundle again") -> None:
        self._error, self._what, self._advice = error, what, advice

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, reason: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or reason is None or issubclass(kind, EdgeComposeError):
            return
        if issubclass(kind, Exception) or kind.__name__ == _PANIC:
            raise self._error(f"{self._what}: {said(reason)}; {self._advice}") from reason


def said(reason: BaseException) -> str:
    """What an exception says, in one line of at most 300 characters."""
    if isinstance(reason, MemoryError):
        return "memory ran out"
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
