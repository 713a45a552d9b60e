"""For every architecture: what a token gets depends neither on the company nor on how many tokens a step has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from tests import tiny
from tests.export.decoders import NO_ADAPTER, load_exported, open_decoder
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow
Float = npt.NDArray[np.float32]
#: Longer than every window of the tiny models, and on both sides of the limit of LongRoPE.
PROMPTS = (list(range(3, 90)), [7, 8], list(range(250, 5, -3)))
STEPS = 12


def blends_of(zoo: TinyZoo, merger: Merger, architecture: str, precision: str, folder: Path) -> list[MergedAdapter]:
    base = zoo.base(architecture, precision)
    adapters = [
        load_exported(zoo.lora(name, architecture), base, folder / f"{name}.safetensors") for name in ("one", "two")
    ]
    settings = MergeSettings(method="product")
    weights = (((0,), [1.0]), ((0, 1), [0.5, -0.4]))
    return [NO_ADAPTER, *(merger.merge([adapters[i] for i in chosen], shares, settings) for chosen, shares in weights)]


def write_alone(decoder: Decoder, blend: MergedAdapter, prompt: list[int], steps: int) -> tuple[list[int], Float]:
    state, logits, tokens = decoder.start(blend, len(prompt) + steps + 1), list[Float](), list[int]()
    last = state.forward(prompt)[-1]
    for _ in range(steps):
        tokens.append(int(last.argmax()))
        last = state.step(tokens[-1:])[0]
        logits.append(last.copy())
    return tokens, np.array(logits)


@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
@pytest.mark.parametrize("architecture", list(tiny.ARCHITECTURES))
def test_company_and_the_length_of_a_step_change_nothing(
    zoo: TinyZoo, merger: Merger, tmp_path: Path, architecture: str, precision: str
) -> None:
    decoder = open_decoder(zoo.base(architecture, precision))
    batch = decoder._sequences.queue._batch
    assert batch is not None
    blends = blends_of(zoo, merger, architecture, precision, tmp_path)
    alone = [write_alone(decoder, blend, prompt, STEPS) for blend, prompt in zip(blends, PROMPTS, strict=True)]
    states = [decoder.start(blend, 200) for blend in blends]
    for state, prompt in zip(states, PROMPTS, strict=True):
        state.forward(prompt)
    written = [list[Float]() for _ in states]
    for start in range(0, STEPS, 3):  # three tokens, two and one of each sequence in a pass, then the rest of them
        for counts in ((0, 3), (0, 2), (0, 1)), ((3, 3), (2, 3), (1, 3)):
            jobs = []
            for state, (tokens, _), (first, last) in zip(states, alone, counts, strict=True):
                if ids := tokens[start + first : start + last]:
                    jobs.append((state, ids))
            for (state, _), logits in zip(jobs, batch.write(jobs) if jobs else [], strict=True):
                written[states.index(state)].extend(logits)
    tolerance = 1e-4 if precision == "fp32" else 0.0
    for got, (_, expected) in zip(written, alone, strict=True):
        assert np.abs(np.array(got) - expected).max() <= tolerance * np.abs(expected).max()
