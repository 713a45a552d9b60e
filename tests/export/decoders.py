"""Decoders of exported bases, and their logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")


from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import Adapter, load_adapter
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from tests import tiny
from tests.fixtures_tiny import Exported

Float = npt.NDArray[np.float32]
NO_ADAPTER = MergedAdapter({}, "none")
IDS = np.random.default_rng(5).integers(0, tiny.VOCABULARY, 40).tolist()


def open_decoder(base: Exported) -> Decoder:
    return Decoder(base.folder / base.spec.graph, base.spec, choose_device("cpu"))


def logits_of(decoder: Decoder, ids: Sequence[int] = IDS, merged: MergedAdapter = NO_ADAPTER) -> Float:
    """Logits of all positions, from one prefill."""
    return decoder.start(merged, len(ids)).forward(ids, rows=len(ids)).copy()


def difference(one: Float, other: Float) -> float:
    assert one.shape == other.shape
    return float(np.abs(one - other).max())


def load_exported(lora: Path, base: Exported, output: Path) -> Adapter:
    convert_adapter(lora, base.spec, output, 8)
    return load_adapter(output, lora.name, base.spec.slots, base.spec.identity)
