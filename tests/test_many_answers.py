"""A thousand answers by thirty-two threads: each is what it is alone, whatever the others do."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, Request, open_bundle
from edgecompose.cancellation import Cancellation
from edgecompose.errors import Cancelled
from edgecompose.settings import Sampling
from tests.generation.models import PROMPTS

pytestmark = pytest.mark.slow
THREADS, REQUESTS = 32, 1000
REQUESTED = (
    Request(max_tokens=10, weights={}),
    Request(max_tokens=14, weights={"animals": 1.0}, prompt_cache=True),
    Request(max_tokens=12, weights={"animals": 0.5, "numbers": 0.75, "colours": -0.5}),
    Request(max_tokens=16, weights={"numbers": 0.3, "colours": 0.6}, sampling=Sampling(1.2, seed=7), drafts=0),
    Request(max_tokens=60, weights={"colours": 1.0}, sampling=Sampling(0.8, seed=1)),
    Request(max_tokens=3),
    Request(choices=("yes", "no", "maybe"), weights={"animals": 1.0}),
)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture(scope="module")
def expected(bundle: Path) -> dict[tuple[str, int], str]:
    with open_bundle(bundle, device="cpu") as composer:
        return {
            (prompt, number): composer.run(prompt, request).text
            for prompt in PROMPTS
            for number, request in enumerate(REQUESTED)
        }


class Load:
    """Threads that ask, read slowly, and go away in the middle, each by dice of its own."""

    def __init__(self, composer: Composer, expected: dict[tuple[str, int], str]) -> None:
        self._composer, self._expected = composer, expected
        self._lock = threading.Lock()
        self.left, self.whole, self.ended = REQUESTS, 0, 0
        self.by_thread: list[int] = []

    def run(self, seed: int) -> None:
        dice, count = np.random.default_rng(seed), 0
        while self._take():
            self._request(dice)
            count += 1
        self.by_thread.append(count)

    def _take(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0

    def _request(self, dice: np.random.Generator) -> None:
        prompt, number = PROMPTS[dice.integers(len(PROMPTS))], int(dice.integers(len(REQUESTED)))
        kind, at = dice.choice(["whole", "slow", "leaves", "cancels"], p=[0.7, 0.1, 0.1, 0.1]), int(dice.integers(8))
        cancellation = Cancellation()
        with self._composer.generate(prompt, REQUESTED[number], cancellation=cancellation) as generation:
            for step in range(1000):
                if step == at and kind == "slow":
                    time.sleep(0.05)
                if step == at and kind == "leaves":
                    break
                if step == at and kind == "cancels":
                    cancellation.cancel()
                try:
                    if generation.step() is None:
                        break
                except Cancelled:
                    break
            else:
                raise AssertionError("the answer has no end")
        with self._lock:
            if kind in ("whole", "slow"):
                self.whole += 1
                assert generation.answer.text == self._expected[prompt, number]
            else:
                self.ended += 1


def test_a_thousand_answers_at_once_are_what_they_are_alone(
    opened: Composer, expected: dict[tuple[str, int], str]
) -> None:
    queue = opened.model.decoder._sequences.queue
    batch = queue._batch
    assert batch is not None
    sizes: list[int] = []
    load, done = Load(opened, expected), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            sizes.append(batch.bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(THREADS) as threads:
        for future in [threads.submit(load.run, seed) for seed in range(THREADS)]:
            future.result(600)
    done.set()
    watcher.join()
    assert load.whole + load.ended == REQUESTS and load.ended > 100
    assert min(load.by_thread) > 5, "every thread had its share"
    spec = opened.bundle.manifest.base
    a_row = 2 * spec.layers * spec.kv_heads * spec.head_size * 4 * (spec.context + 65)
    factors = sum(4 * g.layers * 32 * (g.n_in + g.n_out) for g in spec.slots)
    assert max(sizes) <= 2 * THREADS * (a_row + factors), "the batch has no more rows than sequences, twice at most"
    gc.collect()
    assert not batch._rows and not queue._jobs and not queue._writers
