"""Places among the requests in progress, and work that is read value by value."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from edgecompose.errors import ApiError
from edgecompose.server.http.turns import Turns, Work


def check(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


async def nothing(work: Work[int]) -> None:
    """Give no value."""


def test_more_than_may_wait_are_refused_and_places_go_in_order() -> None:
    async def work() -> None:
        counts: list[int] = []
        turns = Turns(1, 2, threads=1, count=counts.append)
        order: list[int] = []
        go_on = asyncio.Event()

        def request(number: int) -> Work[int]:
            async def produce(work: Work[int]) -> None:
                async with turns.admitted(work):
                    order.append(number)
                    await go_on.wait()

            return Work(produce)

        works = [request(number) for number in range(4)]
        with pytest.raises(ApiError, match="3 requests are in progress or wait") as raised:
            await works[3].next()
        assert raised.value.status == 429 and turns.inside == 3
        assert [work.waits for work in works[:3]] == [False, True, True]
        works[1].end()
        go_on.set()
        assert [await works[0].next(), await works[2].next()] == [None, None]
        await asyncio.wait([work.task for work in works])
        assert order == [0, 2] and turns.inside == 0 and sum(counts) == 0

    check(work())


@pytest.mark.parametrize("active", [1, 2])
def test_a_place_that_is_left_goes_to_the_next_and_is_taken_again(active: int) -> None:
    async def work() -> None:
        turns = Turns(active, 5, threads=1, count=lambda change: None)
        steps: list[str] = []

        async def slow(work: Work[int]) -> None:
            async with turns.admitted(work) as place:
                async with place.idle():
                    steps.append("idle")
                    if active == 1:
                        place.leave_idle()
                    await asyncio.sleep(0.05)
                steps.append("back")

        async def quick(work: Work[int]) -> None:
            async with turns.admitted(work):
                steps.append("quick")

        works = [Work(slow), Work(quick)]
        await asyncio.gather(*(work.next() for work in works))
        assert steps == ["idle", "quick", "back"]

    check(work())


def test_turns_pass_between_steps_when_they_have_lasted_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        turns = Turns(3, 5, threads=1, count=lambda change: None)
        steps: list[int] = []

        def request(number: int) -> Work[int]:
            async def produce(work: Work[int]) -> None:
                async with turns.admitted(work) as place:
                    for _ in range(3):
                        steps.append(number)
                        await asyncio.sleep(0)  # a step in a thread
                        await place.pass_turn()

            return Work(produce)

        for seconds, order in ((60.0, [0, 0, 0, 1, 1, 1, 2, 2, 2]), (-1.0, [0, 1, 2, 0, 1, 2, 0, 1, 2])):
            monkeypatch.setattr("edgecompose.server.http.turns._TURN", seconds)
            steps.clear()
            works = [request(number) for number in range(3)]
            await asyncio.gather(*(work.next() for work in works))
            assert steps == order

    check(work())


def test_work_goes_one_value_ahead_of_its_reader() -> None:
    async def work() -> None:
        given: list[int] = []

        async def count(work: Work[int]) -> None:
            for number in range(4):
                given.append(number)
                await work.put(number)

        counting = Work(count)
        await asyncio.sleep(0.02)
        assert given == [0, 1]
        assert [await counting.next() for _ in range(5)] == [0, 1, 2, 3, None]

    check(work())


@pytest.mark.parametrize("read_first", [False, True])
def test_work_that_is_ended_tells_its_reader_while_it_still_runs(read_first: bool) -> None:
    async def work() -> None:
        ended = asyncio.Event()

        async def stubborn(work: Work[int]) -> None:
            await work.put(1)
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(0.05)  # as a thread that is at a step
                ended.set()
                raise

        running = Work(stubborn)
        await asyncio.sleep(0.01)
        if read_first:
            assert await running.next() == 1
        running.end(ApiError("over", status=503))
        with pytest.raises(ApiError, match="over"):
            await running.next()
        assert not ended.is_set()
        await asyncio.wait([running.task])
        assert ended.is_set()

    check(work())


def test_what_is_complete_is_not_taken_back() -> None:
    async def work() -> None:
        done = Work(nothing)
        await asyncio.wait([done.task])
        done.end(ApiError("over"))
        assert await done.next() is None

    check(work())


def test_an_error_is_the_last_value() -> None:
    async def work() -> None:
        async def broken(work: Work[int]) -> None:
            await work.put(1)
            raise ZeroDivisionError

        failing = Work(broken)
        assert await failing.next() == 1
        with pytest.raises(ZeroDivisionError):
            await failing.next()

    check(work())
