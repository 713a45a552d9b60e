"""`with` blocks close what they hold."""

from __future__ import annotations

import asyncio

import pytest

from edgecompose.closing import AsyncClosing, Closing


class Door(Closing):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class AsyncDoor(AsyncClosing):
    def __init__(self) -> None:
        self.closed = 0

    async def close(self) -> None:
        self.closed += 1


def test_a_block_closes_once_and_passes_errors_on() -> None:
    door = Door()
    with door as opened:
        assert opened is door
    with pytest.raises(KeyError), door:
        raise KeyError
    assert door.closed == 2


def test_an_async_block_closes_once_and_passes_errors_on() -> None:
    async def use(door: AsyncDoor, error: Exception | None) -> None:
        async with door as opened:
            assert opened is door
            if error is not None:
                raise error

    door = AsyncDoor()
    asyncio.run(use(door, None))
    with pytest.raises(KeyError):
        asyncio.run(use(door, KeyError()))
    assert door.closed == 2
