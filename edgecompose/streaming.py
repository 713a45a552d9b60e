"""Answers as they are written: one that is read piece by piece, and several at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from edgecompose.errors import EdgeComposeError, GenerationError
from edgecompose.request import Answer, Composition


class Generation:
    """An answer that is being written: iterate over its pieces of text, then read `answer`.

    Closing it, or leaving its `with` block, stops the model at the token it is at; any thread may close it.
    """

    def __init__(self, composition: Composition, pieces: Generator[str, None, Answer]) -> None:
        self.composition = composition
        self._pieces = pieces
        self._answer: Answer | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        if self._closed:
            raise StopIteration  # or who reads would take the lock again and again before who closes gets it
        try:
            with self._lock:
                return next(self._pieces)
        except StopIteration as ended:
            if ended.value is not None:
                self._answer = ended.value
            raise

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop, wherever the answer is; returns when the model has stopped."""
        self._closed = True
        with self._lock:
            self._pieces.close()

    @property
    def answer(self) -> Answer:
        """The whole answer and how it came about.

        Raises:
            GenerationError: it was not written to its end.
        """
        if self._answer is None:
            raise GenerationError("the answer is not complete; read all of its pieces first")
        return self._answer


def write_all(
    begin: Sequence[Callable[[], Generation]], workers: int
) -> Generator[Answer | EdgeComposeError, None, None]:
    """The answers of several generations, in their order; an error takes the place of the answer that it prevented.

    Closing what is returned ends the answers that are being written.

    Args:
        workers: how many are written at once, at least 1.
    """
    ended = threading.Event()

    def write(start: Callable[[], Generation]) -> Answer | EdgeComposeError:
        try:
            with start() as generation:
                for _ in generation:
                    if ended.is_set():
                        break
                return generation.answer
        except EdgeComposeError as error:
            return error

    with ThreadPoolExecutor(workers, "edgecompose-batch") as threads:
        try:
            yield from threads.map(write, begin)
        finally:
            ended.set()
            threads.shutdown(cancel_futures=True)
