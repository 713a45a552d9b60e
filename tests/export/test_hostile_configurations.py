"""Configurations of other models, and any value in any field, are read or refused by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given as with_drawn
from hypothesis import settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")


from edgecompose.errors import ExportError
from edgecompose_export.decoder.config_from_json import config_from_json
from tests import tiny
from tests.export.hostile import MOST_TIME, refusal
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(zoo: TinyZoo, tmp_path: Path) -> Path:
    """A Hugging Face folder, to be damaged."""
    return shutil.copytree(zoo.model("llama"), tmp_path / "llama")


FOREIGN: Mapping[str, tuple[dict[str, Any], str]] = {
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    "AWQ": ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    "bitsandbytes": ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    "FP8": ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
    "vision": ({"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": {}}, "text_config"),
    "MoE": ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts"),
    "MoE of Qwen": ({"model_type": "qwen3_moe", "num_experts": 128}, "num_experts"),
    "MoE of DeepSeek": ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "n_routed_experts"),
    "Mamba": ({"model_type": "mamba2"}, "mamba2"),
    "hybrid": ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, "layer_types"),
    "encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, "t5"),
    "classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_configurations_are_refused_by_name(kind: str, folder: Path) -> None:
    fields, part = FOREIGN[kind]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("architectures", None)
    tiny.write_json(folder / "config.json", config | fields)
    assert part in refusal(folder)


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_no_base(whole: bool, folder: Path) -> None:
    tiny.write_json(folder / "adapter_config.json", {"peft_type": "LORA"})
    if not whole:
        (folder / "config.json").unlink()
    assert "adapter_config.json" in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 50000, '{"a": \x00}', "\ufeff[]"])
def test_a_configuration_that_is_no_object_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(folder)


def configurations() -> dict[str, dict[str, Any]]:
    import transformers

    return {
        name: getattr(transformers, kind)(**(tiny._SHAPE | changes)).to_dict()
        for name, (kind, _, changes) in tiny.ARCHITECTURES.items()
    }


CONFIGURATIONS = configurations()
#: Fields that older or other configurations have.
OTHERS = (
    "sliding_window",
    "layer_types",
    "head_dim",
    "quantization_config",
    "text_config",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "no_rope_layers",
    "no_rope_layer_interval",
    "max_window_layers",
    "use_sliding_window",
    "original_max_position_embeddings",
    "hidden_activation",
    "num_local_experts",
)
NUMBERS = st.sampled_from((0, -1, 1, 2, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf")))
LEAVES = st.none() | st.booleans() | NUMBERS | st.integers() | st.floats() | st.text(max_size=4)
SCALINGS = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(("linear", "dynamic", "yarn", "llama3", "longrope", "su")) | LEAVES},
    optional=dict.fromkeys(
        (
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "attention_factor",
            "short_factor",
            "long_factor",
            "rope_theta",
        ),
        LEAVES,
    ),
)
VALUES = (
    LEAVES
    | SCALINGS
    | st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner))
)


@pytest.mark.parametrize("name", CONFIGURATIONS)
@with_drawn(data=st.data())
@settings(max_examples=30, deadline=None)
def test_any_value_of_a_field_is_read_or_refused(name: str, data: st.DataObject) -> None:
    config = CONFIGURATIONS[name]
    key = data.draw(st.sampled_from([*config, *OTHERS]))
    started = time.monotonic()
    try:
        config_from_json({**config, key: data.draw(VALUES)}, "base")
    except ExportError as error:
        assert "\n" not in str(error)
    assert time.monotonic() - started < MOST_TIME
