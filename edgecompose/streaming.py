"""Streams an answer chunk by chunk, and generates several answers concurrently."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

from edgecompose.cancellation import Cancellation
from edgecompose.closing import Closing
from edgecompose.errors import Cancelled, EdgeComposeError, GenerationError
from edgecompose.generation.decode import Chunk
from edgecompose.request import Answer, Composition


class Generation(Closing):
    """An answer in progress: iterate over its text, then read `answer`.

    Closing it, or leaving its `with` block, stops the model at the present token; any thread may close it.

    Args:
        chunks: the answer, chunk by chunk.
        answer: describes the whole, once all chunks were read.
        cancellation: what `chunks` looks at between its steps.
    """

    def __init__(
        self,
        composition: Composition,
        chunks: Generator[Chunk, None, None],
        answer: Callable[[], Answer],
        cancellation: Cancellation,
    ) -> None:
        self.composition = composition
        self._cancellation = cancellation
        self._chunks, self._describe = chunks, answer
        self._answer: Answer | None = None
        self._lock = threading.Lock()
        self._closed = False

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        while (chunk := self.step()) is not None:
            if chunk.text:
                return chunk.text
        raise StopIteration

    def step(self) -> Chunk | None:
        """The next chunk, None after the last.

        Its text is empty where a part of the prompt was read, or a token completes no character: a step takes a bounded
        time, so that several answers can take turns.

        Raises:
            EdgeComposeError: of the stage that failed.
        """
        if self._closed:  # or a reader would take the lock again before the thread that closes gets it
            return None
        with self._lock:
            try:
                chunk = next(self._chunks, None)
            except Cancelled:
                if self._closed:  # by another thread, in this very step
                    return None
                raise
            if chunk is None and self._answer is None and not self._closed:
                self._answer = self._describe()
            return chunk

    def close(self) -> None:
        """Stop, wherever the answer is; returns when the model has stopped."""
        self._closed = True
        self._cancellation.cancel()
        with self._lock:
            self._chunks.close()

    @property
    def answer(self) -> Answer:
        """The whole answer and how it was computed.

        Raises:
            GenerationError: it was not read to its end.
        """
        if self._answer is None:
            raise GenerationError("the answer is not complete; read all of it first")
        return self._answer


def write_all(
    begin: Sequence[Callable[[], Generation]], workers: int
) -> Generator[Answer | EdgeComposeError, None, None]:
    """The answers of several generations, in their order; an error takes the place of the answer that it prevented.

    Closing the generator stops the answers in progress.

    Args:
        workers: concurrent answers, at least 1.
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
