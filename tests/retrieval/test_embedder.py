"""The pure steps around the sentence encoder."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.bundle.specs import EmbedderSpec
from edgecompose.errors import BundleError, RetrievalError
from edgecompose.retrieval.embedder import Embedder, head_and_tail, normalize
from edgecompose.retrieval.pooling import pooling_of


@given(st.integers(0, 60), st.integers(1, 30))
def test_a_long_sequence_keeps_both_ends_and_exactly_the_limit(length: int, limit: int) -> None:
    ids = list(range(length))
    remaining = head_and_tail(ids, limit)
    assert len(remaining) == min(length, limit)
    head = limit // 2
    assert remaining == ids if length <= limit else remaining == ids[:head] + ids[length - limit + head :]


@pytest.mark.parametrize(
    ("limit", "remaining"), [(8, [0, 1, 2, 3, 16, 17, 18, 19]), (9, [0, 1, 2, 3, 15, 16, 17, 18, 19])]
)
def test_an_odd_limit_gives_the_tail_one_more(limit: int, remaining: list[int]) -> None:
    assert head_and_tail(list(range(20)), limit) == remaining


@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_normalizing_keeps_the_direction(length: float) -> None:
    vector = np.array([3, 0, -4], np.float32) * np.float32(length)
    assert normalize(vector) == pytest.approx([0.6, 0, -0.8], rel=1e-6)
    assert normalize(vector).dtype == np.float32


def test_a_zero_vector_stays_zero() -> None:
    assert normalize(np.zeros(3, np.float32)).tolist() == [0, 0, 0]


class Graph:
    """A session that gives what it was made with, whatever it is asked."""

    def __init__(self, *outputs: object) -> None:
        self.outputs = outputs

    def run(self, names: None, feeds: dict[str, object]) -> list[object]:
        return list(self.outputs)


def _embedder(session: Graph, **fields: object) -> Embedder:
    plain = EmbedderSpec(
        graph="g",
        tokenizer="t",
        identity="i",
        precision="fp32",
        dimension=4,
        max_length=16,
        pooling="mean",
        normalize=True,
    )
    spec = dataclasses.replace(plain, **fields)  # type: ignore[arg-type]
    embedder = object.__new__(Embedder)
    vars(embedder).update(_session=session, _inputs=set(), _spec=spec, _pooling=pooling_of(spec.pooling))
    return embedder


@pytest.mark.parametrize(
    "outputs",
    [
        (),
        (np.ones((1, 4), np.float32),),
        (np.ones((2, 3, 4), np.float32),),
        (np.ones((1, 2, 4), np.float32),),
        (np.ones((1, 3, 4, 1), np.float32),),
        (np.array([[["a"] * 4] * 3], object),),
        ([1.0],),
    ],
)
def test_a_graph_that_is_no_encoder_is_one_error(outputs: tuple[object, ...]) -> None:
    with pytest.raises(BundleError, match="graph does not do what the manifest says"):
        _embedder(Graph(*outputs)).embed_tokens([1, 2, 3])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_or_of_another_width_is_one_error(value: float) -> None:
    assert _embedder(Graph(np.ones((1, 3, 4), np.float32))).embed_tokens([1, 2, 3]) == pytest.approx(0.5)
    with pytest.raises(RetrievalError, match="unusable vector"):
        _embedder(Graph(np.full((1, 3, 4), value, np.float32)), normalize=False).embed_tokens([1, 2, 3])
    with pytest.raises(RetrievalError, match="unusable vector"):
        _embedder(Graph(np.ones((1, 3, 5), np.float32))).embed_tokens([1, 2, 3])


def test_a_text_without_a_token_is_one_error() -> None:
    with pytest.raises(RetrievalError, match="no token of the prompt"):
        _embedder(Graph()).embed_tokens([])
