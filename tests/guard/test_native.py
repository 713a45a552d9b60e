"""Whatever an extension raises is one error of one line; what ends a process passes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given

from edgecompose.errors import BundleError, EdgeComposeError, MergeError, RetrievalError
from edgecompose.guard.native import native, said
from tests.factories import TEXT


def _panic() -> BaseException:
    """A real panic of Rust: a table of a normalizer that points beyond its end."""
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="}
    content = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    try:
        tokenizers.Tokenizer.from_str(json.dumps({**content, "normalizer": normalizer})).encode("hello")
    except BaseException as reason:
        return reason
    raise AssertionError("no panic")


@pytest.mark.parametrize("reason", [ValueError("x\ny"), RuntimeError(""), Exception("y" * 5000), OSError(2, "z")])
def test_an_exception_becomes_an_error_of_the_class_that_was_named(reason: Exception) -> None:
    with pytest.raises(BundleError, match="^the graph cannot be read: .*; export the bundle again$") as caught:  # noqa: SIM117
        with native(BundleError, "the graph cannot be read"):
            raise reason
    assert caught.value.__cause__ is reason
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


def test_a_panic_of_rust_is_an_error_though_it_is_no_exception() -> None:
    reason = _panic()
    assert not isinstance(reason, Exception)
    with pytest.raises(BundleError, match="cannot be read"), native(BundleError, "the tokenizer cannot be read"):
        raise reason


def test_what_numpy_raises_is_named() -> None:
    with pytest.raises(MergeError, match="Matrix is not positive definite; choose"):  # noqa: SIM117
        with native(MergeError, "the adapters cannot be merged", "choose others"):
            np.linalg.cholesky(np.array([[-1.0]]))


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), SystemExit(3), GeneratorExit(), RetrievalError("ours")])
def test_errors_of_ours_and_what_ends_a_process_pass(reason: BaseException) -> None:
    with pytest.raises(type(reason)) as caught, native(BundleError, "x"):
        raise reason
    assert caught.value is reason


def test_memory_that_ran_out_has_a_message() -> None:
    with pytest.raises(BundleError, match="x: memory ran out; "), native(BundleError, "x"):
        raise MemoryError


@given(TEXT)
def test_what_is_said_is_one_short_line(text: str) -> None:
    words = said(EdgeComposeError(text))
    assert words and len(words.splitlines()) <= 1 and len(words) <= 301
