"""The decoder graph of every shape that people use gives transformers' logits, on prompts longer than every window."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import torch
import transformers

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.decoding.decoder_state import DecoderState
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import ExportError
from edgecompose_export.base.export import export_base
from edgecompose_export.weights.source import open_weights
from tests import tiny

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
#: Of the largest logit.
TOLERANCE = 1e-4
LENGTH = 300
NO_ADAPTER = MergedAdapter({}, "none")
_LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + i for i in range(pairs)],
    }


#: Row of the table and settings of the configuration, by the model that has them.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": ("llama", {"rope_theta": 5e5, "rope_scaling": _LLAMA3, "tie_word_embeddings": True}),
    "llama-3.2-3b": ("llama", {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "llama-old-spelling": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "falcon-3": ("llama", {"head_dim": 64}),
    "mistral-0.1": ("mistral", {"sliding_window": 17}),
    "mistral-0.3": ("mistral", {"sliding_window": None}),
    "mistral-nemo": ("mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2.5-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2.5-yarn": ("qwen2", {"rope_scaling": _YARN, "rope_theta": 1e6}),
    "yarn-mscale": ("llama", {"rope_scaling": {**_YARN, "beta_fast": 16.0, "mscale": 1.0, "mscale_all_dim": 0.7}}),
    "qwen3-bias": ("qwen3", {"attention_bias": True}),
    "gemma-2": ("gemma2", {"num_hidden_layers": 3}),
    "gemma-3-odd": ("gemma3_text", {"hidden_size": 96, "num_key_value_heads": 1}),
    "gemma-3-4b": ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 1e6}),
    "phi-3-4k": ("phi3", {"sliding_window": 17, "original_max_position_embeddings": 512}),
    "phi-3.5": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_scaling": longrope(8), "sliding_window": 262144},
    ),
    "phi-4-mini": (
        "phi3",
        {
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": 64,
            "rope_scaling": longrope(12),
            "tie_word_embeddings": True,
        },
    ),
    "olmo-2-gqa": ("olmo2", {"attention_bias": True}),
    "granite-odd-vocabulary": ("granite", {}),
    "granite-4-nope": ("granitemoehybrid", {"position_embedding_type": "nope"}),
    "stablelm-2": ("stablelm", {"partial_rotary_factor": 0.25}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "smollm3-window": (
        "smollm3",
        {"num_hidden_layers": 8, "use_sliding_window": True, "sliding_window": 16, "no_rope_layer_interval": 3},
    ),
}


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def logits_of(model: Any, ids: list[int]) -> Float:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].float().numpy())


def in_one_piece(decoding: DecoderState, ids: list[int]) -> Float:
    return decoding.forward(ids, rows=len(ids)).copy()


def token_by_token(decoding: DecoderState, ids: list[int]) -> Float:
    return np.concatenate([decoding.forward([token]).copy() for token in ids])


def rewound(decoding: DecoderState, ids: list[int]) -> Float:
    third = len(ids) // 3
    decoding.forward(ids)
    decoding.rewind(third)
    decoding.forward(ids[:5])
    decoding.rewind(third)
    return decoding.forward(ids[third:], rows=len(ids) - third).copy()


def test_logits_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    architecture, settings = SHAPES[shape]
    folder = tiny.write_model(tmp_path / "model", architecture, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, attn_implementation="eager", dtype=torch.float32
    ).eval()
    spec = export_base(folder, tmp_path / "base", "fp32")
    decoder = Decoder(tmp_path / "base" / spec.graph, spec, choose_device("cpu"))
    ids = np.random.default_rng(0).integers(0, tiny.VOCABULARY, LENGTH).tolist()
    expected = logits_of(model, ids)
    scale = np.abs(expected).max()
    assert scale > 0.3
    ways: tuple[Callable[[DecoderState, list[int]], Float], ...] = (in_one_piece, token_by_token, rewound)
    for feed in ways:
        rows = feed(decoder.start(NO_ADAPTER, LENGTH + 5), ids)
        # before LongRoPE's limit, rows that came one by one had the short frequencies, as in transformers
        compared = rows if spec.long_from is None or feed is not token_by_token else rows[spec.long_from :]
        assert np.abs(compared - expected[-len(compared) :]).max() <= TOLERANCE * scale, feed.__name__


@pytest.mark.parametrize("length", [40, 64, 65, 90])
def test_length_decides_the_frequencies_of_longrope(tmp_path: Path, length: int) -> None:
    """A sequence that passes the limit is read again, one that goes back below it too."""
    folder = tiny.write_model(tmp_path / "model", SHAPES["phi-3.5"][0], **SHAPES["phi-3.5"][1])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    spec: BaseSpec = export_base(folder, tmp_path / "base", "fp32")
    assert spec.long_from == 64
    decoder = Decoder(tmp_path / "base" / spec.graph, spec, choose_device("cpu"))
    ids = np.random.default_rng(1).integers(0, tiny.VOCABULARY, 100).tolist()
    decoding = decoder.start(NO_ADAPTER, 120)
    decoding.forward(ids)
    decoding.rewind(length - 1)
    row = decoding.forward(ids[length - 1 : length])
    expected = logits_of(model, ids[:length])
    assert decoding.tokens == ids[:length]
    assert np.abs(row[0] - expected[-1]).max() <= TOLERANCE * np.abs(expected).max()


def test_both_sets_of_frequencies_differ(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", SHAPES["phi-3.5"][0], **SHAPES["phi-3.5"][1])
    (rotary,) = open_weights(folder).config.rotaries
    assert rotary.long_frequencies is not None
    assert np.abs(rotary.frequencies / rotary.long_frequencies).max() > 2


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'.*llama3, yarn"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "hybrid with Mamba layers"),
        ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}, "mixture of experts"),
    ],
)
def test_what_cannot_be_exported_is_named(
    tmp_path: Path, architecture: str, settings: dict[str, Any], message: str
) -> None:
    folder = tiny.write_model(tmp_path / "model", architecture)
    config = transformers.AutoConfig.from_pretrained(folder).to_dict() | settings
    tiny.write_json(folder / "config.json", config)
    with pytest.raises(ExportError, match=message):
        export_base(folder, tmp_path / "base", "fp32")
    assert not (tmp_path / "base").exists()
