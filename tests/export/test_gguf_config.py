"""Any metadata of a GGUF file is read or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import ExportError
from edgecompose.formats.gguf_file import read_gguf
from edgecompose_export.decoder.config_from_gguf import config_from_gguf
from edgecompose_export.decoder.rotary import Float
from tests import gguf_models
from tests.export.configurations import VALUES, check_is_whole

pytestmark = pytest.mark.slow

GGUF_MORE = (
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.scale",
    "expert_count",
    "final_logit_softcapping",
    "logit_scale",
    "rope.dimension_count",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
)
Header = tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, Float]]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Header]:
    """Metadata, shapes and rotary factors of GGUF files."""
    read = {}
    for name in ("llama-3.2", "llama-yarn", "gemma2", "gemma3", "phi3-long", "granite", "stablelm", "smollm3"):
        folder: Path = tmp_path_factory.mktemp(name)
        model = gguf_models.MODELS[name].write(folder / "model")
        file = read_gguf(gguf_models.write_gguf(folder / "model.gguf", model))
        shapes = {tensor: stored.shape for tensor, stored in file.tensors.items()}
        factors = {
            tensor.removesuffix(".weight"): np.array(file.data(tensor)).view("<f4").reshape(-1)
            for tensor in shapes
            if tensor.startswith("rope_")
        }
        metadata = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
        read[name] = (metadata, shapes, factors)
    return read


@given(data=st.data())
@settings(max_examples=200)
def test_any_value_of_any_metadata_is_read_or_refused(headers: dict[str, Header], data: st.DataObject) -> None:
    metadata, shapes, factors = headers[data.draw(st.sampled_from(sorted(headers)))]
    prefix = metadata["general.architecture"]
    keys = sorted({*metadata, *(f"{prefix}.{key}" for key in GGUF_MORE), "general.type"})
    changes = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=2))
    try:
        config = config_from_gguf(metadata | changes, shapes, factors, "tiny")
    except ExportError as error:
        assert str(error)
        return
    check_is_whole(config)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["llama-3.2", "phi3-long"])
def test_rotary_factors_that_are_no_positive_numbers_are_refused(
    headers: dict[str, Header], name: str, value: float
) -> None:
    metadata, shapes, factors = headers[name]
    for tensor, values in factors.items():
        harmed = values.copy()
        harmed[1] = value
        with pytest.raises(ExportError, match="positive number|not positive"):
            config_from_gguf(metadata, shapes, {**factors, tensor: harmed}, "tiny")


def test_layers_of_different_widths_are_refused(headers: dict[str, Header]) -> None:
    metadata, shapes, factors = headers["llama-3.2"]
    for key in ("feed_forward_length", "attention.head_count_kv"):
        harmed = metadata | {f"llama.{key}": [2, 4, 2]}
        with pytest.raises(ExportError, match=r"layers of different widths \(\[2, 4\]\) are not exported"):
            config_from_gguf(harmed, shapes, factors, "tiny")


def test_a_mixture_of_experts_and_an_adapter_are_named(headers: dict[str, Header]) -> None:
    metadata, shapes, factors = headers["llama-3.2"]
    for changes, message in (
        ({"llama.expert_count": 8}, "a mixture of experts, which is not exported"),
        ({"general.type": "adapter"}, "is a GGUF 'adapter', expected a model"),
        ({"general.architecture": "mamba"}, "GGUF architecture 'mamba', expected one of llama, "),
        ({"general.architecture": ["llama"]}, r"GGUF architecture \['llama'\]"),
        ({"llama.block_count": 2**31}, "block_count is 2147483648, expected 1 to 4096"),
        ({"llama.attention.head_count": 0}, "metadata cannot be read|0 query heads|heads 0"),
    ):
        with pytest.raises(ExportError, match=message):
            config_from_gguf(metadata | changes, shapes, factors, "tiny")


@pytest.mark.parametrize(
    ("name", "changes", "left_out"),
    [
        ("llama-3.2", {"attention.head_count": 0}, "attention.key_length"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "rope.dimension_count"),
        ("llama-yarn", {"rope.freq_base": 1.0}, ""),
        ("phi3-long", {"context_length": 2, "rope.scaling.original_context_length": 1}, "rope.scaling.attn_factor"),
    ],
    ids=str,
)
def test_metadata_that_divides_by_zero_is_refused(
    headers: dict[str, Header], name: str, changes: dict[str, Any], left_out: str
) -> None:
    metadata, shapes, factors = headers[name]
    prefix = metadata["general.architecture"]
    harmed = metadata | {f"{prefix}.{key}": value for key, value in changes.items()}
    harmed.pop(f"{prefix}.{left_out}", None)
    with pytest.raises(ExportError, match="its metadata cannot be read: .* by zero; convert it again"):
        config_from_gguf(harmed, shapes, factors, "tiny")
