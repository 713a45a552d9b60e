"""Who may compute: some requests are in progress and take turns, more wait, and the rest are refused."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from edgecompose.errors import ApiError

T = TypeVar("T")
#: Seconds that a turn lasts at least, if there is so much to compute. Short answers end within one, and the next answer
#: to the same beginning reuses what was read.
_TURN = 0.15


class Place:
    """A place among the requests in progress, and, from time to time, the turn to compute."""

    def __init__(self, places: asyncio.Semaphore, threads: asyncio.Semaphore) -> None:
        self._places, self._threads = places, threads
        self._has_place = self._has_turn = False
        self._since = 0.0

    async def take(self) -> None:
        """Wait for the place, then for a turn."""
        await self._places.acquire()
        self._has_place = True
        await self._begin_turn()

    def leave(self) -> None:
        """Give the place and the turn to the next that waits."""
        self._end_turn()
        if self._has_place:
            self._has_place = False
            self._places.release()

    async def pass_turn(self) -> None:
        """Between two steps: go on, or let the others have their turns first where this one has lasted long enough."""
        if time.monotonic() - self._since > _TURN:
            self._end_turn()
            await self._begin_turn()

    @contextlib.asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Without the turn, in which others compute meanwhile."""
        self._end_turn()
        yield
        if self._has_place:
            await self._begin_turn()
        else:
            await self.take()

    def leave_idle(self) -> None:
        """Give the place away too, while idle: for a request whose reader does not keep up."""
        if self._has_place:
            self._has_place = False
            self._places.release()

    async def _begin_turn(self) -> None:
        await self._threads.acquire()
        self._has_turn, self._since = True, time.monotonic()

    def _end_turn(self) -> None:
        if self._has_turn:
            self._has_turn = False
            self._threads.release()


class Turns:
    """Places for `active` requests, which take turns in `threads`; `queue` more wait, in the order of their arrival.

    Args:
        count: called with 1 for each request that comes in, and -1 for each that leaves.
    """

    def __init__(self, active: int, queue: int, *, threads: int, count: Callable[[int], object]) -> None:
        self._places, self._threads = asyncio.Semaphore(active), asyncio.Semaphore(threads)
        self._most, self._count = active + queue, count
        self.inside = 0

    @contextlib.asynccontextmanager
    async def admitted(self, work: Work[T]) -> AsyncIterator[Place]:
        """A place for a piece of work, with the turn.

        Raises:
            ApiError: too many wait already.
        """
        if self.inside >= self._most:
            raise ApiError(f"{self.inside} requests are in progress or wait; come again", code="queue_full", status=429)
        self.inside += 1
        self._count(1)
        place = Place(self._places, self._threads)
        try:
            await place.take()
            work.waits = False
            yield place
        finally:
            place.leave()
            self.inside -= 1
            self._count(-1)


class Work(Generic[T]):
    """What is computed for one request, in a task of its own: its values are read one by one as they come.

    One value is kept until it is read; then the computation goes on. So it can be ended, and its reader told, while a
    thread is still busy with it.

    Args:
        produce: computes; it is given this object, and awaits `put` with each value.
    """

    def __init__(self, produce: Callable[[Work[T]], Awaitable[None]]) -> None:
        self._values: asyncio.Queue[T | Exception | None] = asyncio.Queue(1)
        self.waits = True
        self.task = asyncio.create_task(self._run(produce))

    @property
    def unread(self) -> bool:
        """Whether a value waits to be read, so that `put` would wait."""
        return self._values.full()

    async def put(self, value: T) -> None:
        """Give a value to the reader; waits until the one before was read."""
        await self._values.put(value)

    async def next(self) -> T | None:
        """The next value, None after the last.

        Raises:
            Exception: the computation failed, or was ended.
        """
        value = await self._values.get()
        if isinstance(value, Exception):
            raise value
        return value

    def coming(self) -> asyncio.Task[T | None]:
        """A task that waits for the next value; it may be dropped, whatever comes of it."""
        task = asyncio.create_task(self.next())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    def end(self, error: Exception | None = None) -> None:
        """Stop computing; the reader gets `error` next, if any."""
        if self.task.done() and error is not None and not self._values.empty():
            return  # it is complete; its last values are still to be read
        self.task.cancel()
        if error is not None:
            while not self._values.empty():
                self._values.get_nowait()
            self._values.put_nowait(error)

    async def _run(self, produce: Callable[[Work[T]], Awaitable[None]]) -> None:
        end: Exception | None = None
        try:
            await produce(self)
        except Exception as error:
            end = error
        await self._values.put(end)
