"""PEFT folders: what would be lost in silence, and settings that cannot be right, are refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import peft
import torch
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.errors import AdapterError, UnsupportedAdapter
from edgecompose.formats.peft import PeftScales
from tests import tiny
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import slots_of_llama

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = slots_of_llama()


@pytest.fixture
def lora(zoo: TinyZoo, tmp_path: Path) -> Path:
    """A PEFT folder that may be changed."""
    return shutil.copytree(zoo.lora("one"), tmp_path / "one")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    tiny.write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias=all"),
    "bias of LoRA": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save (lm_head: trained with new tokens)"),
    "other modules_to_save": ({"modules_to_save": ["score"]}, "modules_to_save (score),"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices (trained with new tokens)"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "QALoRA": ({"use_qalora": True}, "use_qalora"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights=pissa_niter_16"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights=loftq"),
    "several": (
        {"use_dora": True, "bias": "lora_only", "init_lora_weights": "CorDA"},
        "use_dora, bias=lora_only, init_lora_weights=corda",
    ),
    "another tuner": ({"peft_type": "IA3"}, "is of type 'IA3'; only LORA"),
    "no tuner": ({"peft_type": None}, "is of type None; only LORA"),
    "block diagonal": ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}}, "use_bdlora"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_would_be_dropped_in_silence_is_refused(lora: Path, tmp_path: Path, case: str) -> None:
    values, named = UNSUPPORTED[case]
    change_config(lora, **values)
    with pytest.raises(UnsupportedAdapter, match=f"'one'.*{re.escape(named)}"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_fan_in_fan_out_means_nothing_for_linear_modules(lora: Path, tmp_path: Path) -> None:
    """PEFT warns and goes on; configs of older versions still say so."""
    convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    change_config(lora, fan_in_fan_out=True)
    convert_adapter(lora, BASE, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_initialisations_that_leave_the_base_alone_are_fine(lora: Path, tmp_path: Path, init: Any) -> None:
    change_config(lora, init_lora_weights=init)
    convert_adapter(lora, BASE, tmp_path / "a.safetensors")


def test_a_real_dora_folder_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = zoo.lora("dora", use_dora=True, target_modules=["q_proj"])
    with pytest.raises(UnsupportedAdapter, match="use_dora"):
        convert_adapter(folder, BASE, tmp_path / "a.safetensors")
    change_config(folder, use_dora=False)
    with pytest.raises(UnsupportedAdapter, match=r"tensors that have no slot: .*lora_magnitude_vector"):
        convert_adapter(folder, BASE, tmp_path / "a.safetensors")


def test_a_rank_that_disagrees_with_the_config_is_refused(lora: Path, tmp_path: Path) -> None:
    change_config(lora, r=8)
    with pytest.raises(AdapterError, match=r"_proj' has rank 4, adapter_config\.json says 8; the scale would be wrong"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


@pytest.mark.parametrize("rank", [0, -1, None, "4", 2.5])
def test_a_rank_that_is_no_positive_number_is_refused(lora: Path, tmp_path: Path, rank: Any) -> None:
    change_config(lora, r=rank)
    with pytest.raises(AdapterError, match="positive whole number"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "values",
    [
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"[": 4}},
        {"alpha_pattern": {"q_proj": None}},
    ],
    ids=str,
)
def test_a_config_that_gives_no_scale_is_refused(lora: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    change_config(lora, **values)
    with pytest.raises(AdapterError, match="'one'"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


def test_an_alpha_that_is_not_given_is_that_of_peft() -> None:
    assert PeftScales("x", {"r": 4}).scale("model.layers.0.self_attn.q_proj") == peft.LoraConfig(r=4).lora_alpha / 4


@pytest.mark.parametrize(
    "values",
    [
        {"r": 2_000_000_000},
        {"r": True},
        {"lora_alpha": 1e308},
        {"lora_alpha": -2e9},
        {"rank_pattern": {"q_proj": -5}},
        {"rank_pattern": {"q_proj": 4.5}},
        {"alpha_pattern": {"q_proj": 1e300}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"x" * 2000: 4}},
        {"rank_pattern": {r"(?<=x)q_proj": 4}},
        {"rank_pattern": {"(.*.*.*.*.*.*)*Z": 4, "((a*)*)*b": 2}},
        {"alpha_pattern": {f"(.*.*.*)*{n}" * 20: 4 for n in range(50)}},
    ],
    ids=lambda values: str(values)[:60],
)
def test_settings_beyond_reason_end_in_one_line(lora: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    """`(.*.*.*.*.*.*)*Z` matches nothing and takes Python's own engine for ever, so that it may also be accepted."""
    change_config(lora, **values)
    before = time.process_time()
    if "(.*.*.*.*.*.*)*Z" in values.get("rank_pattern", {}):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    else:
        with pytest.raises(AdapterError, match="'one'") as caught:
            convert_adapter(lora, BASE, tmp_path / "a.safetensors")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.process_time() - before < 60


@pytest.mark.parametrize(
    "key",
    [
        "q_proj",
        "self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        r".*layers\.[0-9]+\.self_attn\.(q|v)_proj",
        r"^model\.layers\.(0|1[0-9])\..*",
        r"layers\.(?:0|1)\.self_attn\.[qkv]_proj",
        r"(?!.*mlp).*_proj",
        ".*",
        r"\w+\.\d+\..*q_proj$",
    ],
)
def test_patterns_match_where_peft_matches_them(key: str) -> None:
    from peft.utils.other import get_pattern_key

    scales = PeftScales("x", {"r": 4, "rank_pattern": {key: 2}})
    for layer in (0, 1, 12):
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"):
            for prefix in ("", "base_model.model."):
                path = f"{prefix}model.layers.{layer}.{module}"
                assert scales.rank(path) == (2 if get_pattern_key([key], path) == key else 4), path


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.embed_tokens.lora_embedding_A",
        "lm_head.lora_A.weight",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
    ],
)
def test_bare_tensors_of_the_vocabulary_say_what_they_mean(lora: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(lora / WEIGHTS)
    save_file({**tensors, f"base_model.model.{name}": torch.ones(4, 4)}, lora / WEIGHTS)
    message = f"{re.escape(name)}.*trained with new tokens.*train it on the linear modules"
    with pytest.raises(UnsupportedAdapter, match=message):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a\nb", "x" * 1000, "\u202ex"])
def test_names_that_cannot_be_shown_are_refused_in_one_line(lora: Path, tmp_path: Path, name: str) -> None:
    save_file({**load_file(lora / WEIGHTS), name: torch.ones(4, 4)}, lora / WEIGHTS)
    with pytest.raises(UnsupportedAdapter, match="no slot") as caught:
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("value", [1e30, 65505.0, float("inf")])
def test_factors_beyond_half_precision_are_refused(lora: Path, tmp_path: Path, value: float) -> None:
    tensors = load_file(lora / WEIGHTS)
    tensors[min(tensors)][0, 0] = value
    save_file(tensors, lora / WEIGHTS)
    with pytest.raises(AdapterError, match="not finite .* or beyond 65504"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


def test_a_byte_order_mark_in_a_config_is_skipped(lora: Path, tmp_path: Path) -> None:
    (lora / CONFIG).write_bytes(b"\xef\xbb\xbf" + (lora / CONFIG).read_bytes())
    convert_adapter(lora, BASE, tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", ["[" * 100_000, '{"r": ' + "1" * 5000 + "}", '{"a":' * 50_000, "\ufeff"])
def test_a_config_that_is_no_json_is_one_line(lora: Path, tmp_path: Path, content: str) -> None:
    (lora / CONFIG).write_text(content, encoding="utf-8")
    with pytest.raises(AdapterError, match="cannot be read as JSON") as caught:
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\xff" * 64, b"version https://git-lfs", b""])
def test_other_files_under_the_name_of_the_weights(lora: Path, tmp_path: Path, start: bytes) -> None:
    (lora / WEIGHTS).write_bytes(start + bytes(100 if start else 0))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors cannot be read"):
        convert_adapter(lora, BASE, tmp_path / "a.safetensors")


def test_a_pipe_under_the_name_of_a_file_is_not_waited_for(lora: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, CONFIG):
        (lora / name).unlink()
        os.mkfifo(lora / name)
        with pytest.raises(AdapterError):
            convert_adapter(lora, BASE, tmp_path / "a.safetensors")
