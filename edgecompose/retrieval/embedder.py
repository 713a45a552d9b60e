"""Embeds prompts as unit vectors with the bundle's sentence encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from edgecompose.bundle.specs import EmbedderSpec
from edgecompose.engine.device import Device, host, open_session
from edgecompose.engine.tokenizer_file import encode_ends, open_tokenizer
from edgecompose.errors import BundleError, RetrievalError
from edgecompose.guard.native import native
from edgecompose.retrieval.pooling import pool, pooling_of

Float = npt.NDArray[np.float32]


class Embedder:
    """A sentence encoder. It embeds one text at a time: int8 activations are scaled over a whole batch, so the vector
    of a text would depend on the other texts. It runs where `embedder_device` says.

    Args:
        data: contents of files beside the graph that are not to be mapped.
    """

    def __init__(
        self,
        graph: Path,
        tokenizer: Path,
        spec: EmbedderSpec,
        device: Device,
        *,
        data: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self._spec, self._pooling = spec, pooling_of(spec.pooling)
        self._session = open_session(graph, embedder_device(spec, device), name="embedder", data=data)
        self._inputs = {i.name for i in self._session.get_inputs()}
        self._tokenizer = open_tokenizer(tokenizer)

    def embed(self, text: str) -> Float:
        """The vector (dimension,) of a text, of unit norm when the encoder normalises.

        A text longer than the encoder's window keeps its head and its tail: the question is often at the end.

        Raises:
            RetrievalError: the text is empty, or its vector is not finite.
        """
        return self.embed_tokens(self.tokens(text))

    def embed_tokens(self, ids: list[int]) -> Float:
        """The vector of a text by its ids, as `tokens` gives them.

        Raises:
            BundleError: the graph is no encoder, or one of a shorter window or another width.
            RetrievalError: there is no id, or the vector is not finite.
        """
        if not ids:
            raise RetrievalError("the embedder's tokenizer makes no token of the prompt; give other text")
        row = np.array([ids], np.int64)
        feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        with native(BundleError, "the embedder's graph does not do what the manifest says"):
            (hidden, *_) = self._session.run(None, {k: v for k, v in feeds.items() if k in self._inputs})
            if hidden.ndim != 3 or hidden.shape[:2] != row.shape:
                raise ValueError(f"it gives the shape {hidden.shape} for {len(ids)} tokens")
            parts = pool(np.asarray(hidden[0], np.float32), self._pooling, self._spec.ends)
        vector = np.concatenate([normalize(part) if self._spec.normalize else part for part in parts])
        if self._spec.normalize:
            vector = normalize(vector)
        if vector.shape != (self._spec.dimension,) or not np.isfinite(vector).all():
            raise RetrievalError(
                f"the encoder gave an unusable vector of shape {vector.shape}; export the bundle again"
            )
        return vector

    def tokens(self, text: str) -> list[int]:
        """The ids that are read of a text, special ones included.

        Raises:
            RetrievalError: the text is empty, or no Unicode.
            BundleError: the tokenizer is damaged.
        """
        if not text.strip():
            raise RetrievalError("an empty prompt cannot be embedded; give some text")
        limit = self._spec.max_length
        return head_and_tail(encode_ends(self._tokenizer, text, limit, RetrievalError), limit)


def embedder_device(spec: EmbedderSpec, device: Device) -> Device:
    """Where an encoder runs: a float one on the device, an int8 one on the CPU.

    DynamicQuantizeLinear and MatMulInteger, as the int8 graph has them, have no CUDA kernels: a third of its nodes
    would run on the CPU all the same, between copies.
    """
    if spec.precision == "int8" and device.kind != "cpu":
        return host(f"{device.kind} has no kernels for an int8 embedder")
    return device


def head_and_tail(ids: list[int], limit: int) -> list[int]:
    """The first half and the last half of a sequence longer than `limit`, special tokens at both ends kept."""
    if len(ids) <= limit:
        return ids
    head = limit // 2
    return ids[:head] + ids[len(ids) - (limit - head) :]


def normalize(vector: Float) -> Float:
    """The vector at unit Euclidean norm (a zero vector stays zero)."""
    norm = float(np.linalg.norm(vector))
    return np.asarray(vector / norm, np.float32) if norm else vector
