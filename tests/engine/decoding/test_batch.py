"""Several sequences in one pass: each gets to the last bit what it gets alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, open_bundle
from edgecompose.engine.decoding.batch import Batch
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import GenerationError

pytestmark = pytest.mark.slow
Float = npt.NDArray[np.float32]
#: Blends of ranks that differ, of which some are no multiple of 8, and the base alone.
WEIGHTS: tuple[dict[str, float], ...] = (
    {},
    {"animals": 1.0},
    {"animals": 0.5, "numbers": 0.75, "colours": -0.5},
    {"numbers": 0.3, "colours": 0.6},
)
PROMPTS = ([5, 6, 7], list(range(40)), [9], [250, 3] * 70)


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.fixture(scope="module")
def blends(opened: Composer) -> list[MergedAdapter]:
    return [opened.blends.blend(weights, opened.default_merge) for weights in WEIGHTS]


@pytest.fixture(scope="module")
def batch(opened: Composer) -> Batch:
    batch = opened.model.decoder._sequences.queue._batch
    assert batch is not None
    return batch


class Greedy:
    """A greedy sequence, and what it was given after each token."""

    def __init__(self, opened: Composer, blend: MergedAdapter, prompt: Sequence[int]) -> None:
        self.state: DecoderState = opened.model.decoder.start(blend, max(480, len(prompt) + 4), reserve=len(prompt) + 1)
        self.logits = [self.state.forward(list(prompt))[-1].copy()]

    @property
    def next(self) -> int:
        return int(self.logits[-1].argmax())


def alone(opened: Composer, blend: MergedAdapter, prompt: Sequence[int], steps: int) -> list[Float]:
    sequence = Greedy(opened, blend, prompt)
    for _ in range(steps):
        sequence.logits.append(sequence.state.step([sequence.next])[0].copy())
    return sequence.logits


def step(batch: Batch, sequences: Sequence[Greedy]) -> None:
    for sequence, logits in zip(sequences, batch.write([(s.state, [s.next]) for s in sequences]), strict=True):
        sequence.logits.append(logits[0])


@given(data=st.data())
def test_a_sequence_gets_in_company_what_it_gets_alone(
    opened: Composer, blends: list[MergedAdapter], batch: Batch, data: st.DataObject
) -> None:
    """Whoever joins, pauses and leaves, at whatever length and under whatever blend."""
    choices = st.tuples(st.integers(0, len(blends) - 1), st.integers(0, len(PROMPTS) - 1))
    chosen = data.draw(st.lists(choices, min_size=1, max_size=6))
    sequences = [Greedy(opened, blends[blend], PROMPTS[prompt]) for blend, prompt in chosen]
    for _ in range(data.draw(st.integers(1, 6))):
        taking = data.draw(st.sets(st.integers(0, len(sequences) - 1), min_size=1))
        step(batch, [sequences[number] for number in sorted(taking)])
        leaving = data.draw(st.none() | st.integers(0, len(sequences) - 1))
        if leaving is not None:
            state = sequences[leaving].state
            batch.leave(state, keep=state.length)
            assert state not in batch
    for sequence, (blend, prompt) in zip(sequences, chosen, strict=True):
        sequence.logits.append(sequence.state.step([sequence.next])[0].copy())
        batch.leave(sequence.state, keep=0)
        expected = alone(opened, blends[blend], PROMPTS[prompt], len(sequence.logits) - 1)
        np.testing.assert_array_equal(sequence.logits, expected)
    assert not batch._rows


@pytest.mark.parametrize("blend", range(len(WEIGHTS)))
@pytest.mark.parametrize("counts", [(1, 3), (4, 1, 2), (2, 2)], ids=str)
def test_several_tokens_of_a_step_get_what_they_get_one_by_one(
    opened: Composer, blends: list[MergedAdapter], batch: Batch, blend: int, counts: tuple[int, ...]
) -> None:
    expected, tokens = alone(opened, blends[blend], PROMPTS[1], 8)[1:], list[int]()
    single = Greedy(opened, blends[blend], PROMPTS[1])
    for _ in range(8):
        tokens.append(single.next)
        single.logits.append(single.state.step(tokens[-1:])[0].copy())
    together = Greedy(opened, blends[blend], PROMPTS[1]).state
    np.testing.assert_array_equal(
        np.concatenate([together.step(tokens[:3]).copy(), together.step(tokens[3:])]), expected
    )
    company = [Greedy(opened, one, PROMPTS[0]).state for one in blends[: len(counts)]]
    beside = Greedy(opened, blends[blend], PROMPTS[1]).state
    jobs = [*zip(company, ([7] * count for count in counts), strict=True), (beside, tokens[:5])]
    np.testing.assert_array_equal(batch.write(jobs)[-1], expected[:5])
    beside.rewind(len(PROMPTS[1]) + 2)
    np.testing.assert_array_equal(batch.write([(beside, tokens[2:4])])[0], expected[2:4])
    for state in (beside, *company):
        batch.leave(state, keep=0)


def test_equal_blends_share_their_factors(opened: Composer, blends: list[MergedAdapter], batch: Batch) -> None:
    batch.clear()
    sequences = [Greedy(opened, blends[1], PROMPTS[0]) for _ in range(4)]
    step(batch, sequences)
    assert len([blend for blend in batch._blends._blends if blend is not None]) <= 1
    more = [Greedy(opened, blends[2], PROMPTS[0]) for _ in range(2)]
    step(batch, [*sequences, *more])
    held = [blend.digest for blend in batch._blends._blends if blend is not None]
    assert held == [blends[1].digest] * 2 + [blends[2].digest]  # three groups of two
    for sequence in (*sequences, *more):
        batch.leave(sequence.state, keep=0)


def test_a_sequence_that_is_dropped_or_stops_writing_gives_its_row_to_others(
    opened: Composer, blends: list[MergedAdapter], batch: Batch
) -> None:
    first, second, third = (Greedy(opened, blends[1], prompt) for prompt in PROMPTS[:3])
    step(batch, [first, second, third])
    del second
    gc.collect()
    step(batch, [first, third])
    assert len(batch._rows) == 2
    for _ in range(6):
        step(batch, [first])
    assert third.state not in batch and third.state.length == len(PROMPTS[2]) + 2
    step(batch, [first, third])
    expected = alone(opened, blends[1], PROMPTS[2], 3)
    np.testing.assert_array_equal(third.logits, expected)
    for sequence in (first, third):
        batch.leave(sequence.state, keep=0)


def test_rows_become_shorter_when_a_long_sequence_has_left(
    opened: Composer, blends: list[MergedAdapter], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgecompose.engine.decoding.batch._IDLE_BYTES", 0)
    first, long = Greedy(opened, blends[1], PROMPTS[0]), Greedy(opened, blends[2], [250, 3] * 200)
    step(batch, [first, long])
    before = batch._cache.capacity
    batch.leave(long.state, keep=0)
    second = Greedy(opened, blends[3], PROMPTS[2])
    step(batch, [first, second])
    assert batch._cache.capacity <= before // 4
    step(batch, [first, second])
    for sequence, blend, prompt in ((first, 1, 0), (second, 3, 2)):
        batch.leave(sequence.state, keep=0)
        np.testing.assert_array_equal(
            sequence.logits, alone(opened, blends[blend], PROMPTS[prompt], len(sequence.logits) - 1)
        )


def test_a_batch_that_finds_no_memory_is_an_error_and_loses_nothing(
    opened: Composer, blends: list[MergedAdapter], batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (Greedy(opened, blends[1], prompt) for prompt in PROMPTS[:2])
    batch.clear()
    with monkeypatch.context() as context:
        context.setattr("edgecompose.engine.device.Device.empty", lambda *arguments: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(GenerationError, match="no room for the caches"):
            step(batch, [first, second])
    step(batch, [first, second])
    for sequence, prompt in ((first, PROMPTS[0]), (second, PROMPTS[1])):
        batch.leave(sequence.state, keep=sequence.state.length)
        np.testing.assert_array_equal(sequence.logits, alone(opened, blends[1], prompt, 1))


@pytest.mark.parametrize("end", ["the cache", "the context"])
def test_a_row_that_ends_takes_part_in_passes_of_many_tokens(
    opened: Composer, blends: list[MergedAdapter], batch: Batch, end: str
) -> None:
    length = 60 if end == "the cache" else opened.bundle.manifest.base.context - 4
    prompts, steps = (list(range(40)), [7] * length), 3
    expected = [alone(opened, blends[1], prompt, steps) for prompt in prompts]
    one, two = (Greedy(opened, blends[1], prompt) for prompt in prompts)
    for _ in range(steps):
        drafts = [one.next, *[3] * 8]
        logits, (last,) = batch.write([(one.state, drafts), (two.state, [two.next])])
        one.state.rewind(one.state.length - 8)
        one.logits.append(logits[0])
        two.logits.append(last)
    for sequence, reference in zip((one, two), expected, strict=True):
        np.testing.assert_array_equal(np.array(sequence.logits), np.array(reference))
