"""What one sequence runs with alone: with ranks that kernels take as they are, and with others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="exports need the packages of edgecompose-export")

from edgecompose import Composer, open_bundle
from edgecompose.engine.decoding.blend_rows import is_padded
from edgecompose.engine.decoding.decoder_pass import PassRow
from edgecompose.engine.decoding.single import Single

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def opened(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as composer:
        yield composer


@pytest.mark.parametrize("weights", [{}, {"animals": 1.0}, {"animals": 0.5, "numbers": 0.75, "colours": -0.5}], ids=str)
@pytest.mark.parametrize("together", [True, False])
def test_both_forms_of_slots_and_every_capacity_give_the_same_logits(
    opened: Composer, weights: dict[str, float], together: bool
) -> None:
    merged, decoder = opened.blends.blend(weights, opened.default_merge), opened.model.decoder
    single = Single(decoder._session, opened.bundle.manifest.base, opened.device, merged)
    assert (single._padded.bytes > 0) == (not is_padded(merged))
    ids, rows = list(range(3, 150)), []
    for token in range(len(ids)):  # the cache grows on the way
        row = PassRow([ids[token]], past=token, kept=1)
        rows.append(single.run(row, together=together, long=False)[0].copy())
    whole = Single(decoder._session, opened.bundle.manifest.base, opened.device, merged)
    logits = whole.run(PassRow(ids, past=0, kept=len(ids)), together=together, long=False)
    if together:
        np.testing.assert_allclose(rows, logits, atol=1e-3 * np.abs(logits).max())
    else:
        np.testing.assert_array_equal(rows, logits)
