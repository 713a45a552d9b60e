"""Decoders and weights of GGUF files, for comparison."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.weights.forms import Form, source_form
from edgecompose_export.weights.places import EMBEDDING, HEAD, linear_tensors
from edgecompose_export.weights.source import WeightSource

#: More tokens than every window and than the original context of LongRoPE.
IDS = np.random.default_rng(0).integers(0, 297, 200).tolist()


def source_forms(source: WeightSource) -> dict[str, Form]:
    """The forms that keep every matrix as the file has it."""
    tied = source.config.tied
    forms = {tensor: source_form(source.type_of(tensor)) for tensor in linear_tensors(source.config)}
    forms[HEAD] = source_form(source.type_of(EMBEDDING if tied else HEAD))
    return forms if tied else forms | {EMBEDDING: source_form(source.type_of(EMBEDDING))}


def assert_same_decoder(one: DecoderConfig, other: DecoderConfig) -> None:
    """Both mean the same; Mistral's row is Llama's in GGUF."""
    for item in dataclasses.fields(DecoderConfig):
        first, second = getattr(one, item.name), getattr(other, item.name)
        if item.name == "architecture":
            assert first.gguf == second.gguf
        elif item.name == "rotaries":
            assert len(first) == len(second)
            for turn, other_turn in zip(first, second, strict=True):
                np.testing.assert_allclose(turn.frequencies, other_turn.frequencies, rtol=2e-6)
                assert turn.scale == pytest.approx(other_turn.scale, rel=1e-6)
                assert turn.long_from == other_turn.long_from
                if turn.long_frequencies is not None:
                    np.testing.assert_allclose(turn.long_frequencies, other_turn.long_frequencies, rtol=2e-6)
        elif isinstance(first, float):
            assert first == pytest.approx(second, rel=1e-6), item.name
        else:
            assert first == second, item.name
