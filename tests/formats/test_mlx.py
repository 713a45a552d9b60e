"""Folders of mlx_lm: its scales; what cannot be composed is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

import torch

from edgecompose.adapters import convert_adapter
from edgecompose.errors import AdapterError, EdgeComposeError, SlotMismatch, UnsupportedAdapter
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import (
    BASE,
    MLX_CONFIG,
    Tensors,
    as_it_is,
    exported,
    mlx_tensors,
    poison,
    refused,
    with_tensor,
    without,
    write_mlx,
)

MLX_SCALES: dict[str, tuple[dict[str, Any], float | None]] = {
    "new": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}, 20.0),
    "a whole number": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 3, "keys": ["x"]}}, 3.0),
    "new, alpha ignored": ({"num_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 16}}, 5.0),
    "old without alpha": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0}}, 5.0),
    "old, alpha of no effect": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 4}}, 5.0),
    "old with alpha": ({"lora_layers": 16, "lora_parameters": {"rank": 4, "scale": 5.0, "alpha": 16}}, None),
}


@pytest.mark.parametrize("case", MLX_SCALES)
def test_scales_are_those_of_mlx(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    config, scale = MLX_SCALES[case]
    folder = write_mlx(tmp_path / "mlx", mlx_tensors(zoo.lora("one")), config)
    if scale is None:
        with pytest.raises(UnsupportedAdapter, match=r"scale 5\.0 and alpha 16.*put what was meant into scale"):
            convert_adapter(folder, BASE, tmp_path / "x")
    else:
        adapter = exported(folder, tmp_path / "x")
        assert all((m.scaling == np.float32(scale)).all() for m in adapter.modules.values())


def test_a_prefix_and_few_layers_are_read(zoo: TinyZoo, tmp_path: Path) -> None:
    tensors = {f"language_model.{k}": v for k, v in mlx_tensors(zoo.lora("one")).items() if ".1." in k}
    adapter = exported(write_mlx(tmp_path / "mlx", tensors), tmp_path / "x")
    assert all(m.ranks.tolist() == [0, 4] for m in adapter.modules.values())


_MLX_QUERY = "model.layers.0.self_attn.q_proj"


_PARAMETERS: dict[str, Any] = {"rank": 4, "scale": 2.0}


MLX_REFUSED: dict[str, tuple[dict[str, Any], Callable[[Tensors], None], type[EdgeComposeError], str]] = {
    "dora": ({"fine_tune_type": "dora"}, as_it_is, UnsupportedAdapter, "fine_tune_type 'dora'"),
    "full": ({"fine_tune_type": "full"}, as_it_is, UnsupportedAdapter, "fine_tune_type 'full'"),
    "old dora": ({"fine_tune_type": None, "use_dora": True}, as_it_is, UnsupportedAdapter, "'dora'"),
    "magnitude": (
        {},
        with_tensor(f"{_MLX_QUERY}.m", torch.ones(64)),
        UnsupportedAdapter,
        r"q_proj\.m', a magnitude of DoRA",
    ),
    "experts": (
        {},
        with_tensor("model.layers.0.mlp.switch_mlp.up_proj.lora_a", torch.ones(2, 4, 64)),
        UnsupportedAdapter,
        "fused experts",
    ),
    "embedding": (
        {},
        with_tensor("model.embed_tokens.lora_a", torch.ones(300, 4)),
        UnsupportedAdapter,
        r"embed_tokens\.lora_a; it was trained with new tokens",
    ),
    "output": (
        {},
        with_tensor("lm_head.lora_b", torch.ones(4, 300)),
        UnsupportedAdapter,
        r"lm_head\.lora_b; it was trained with new tokens",
    ),
    "NaN": ({}, poison(f"{_MLX_QUERY}.lora_b"), AdapterError, "not finite"),
    "alone": ({}, without(f"{_MLX_QUERY}.lora_b"), AdapterError, r"0\.self_attn\.q_proj' has lora_A alone"),
    "other shape": ({}, with_tensor(f"{_MLX_QUERY}.lora_b", torch.ones(4, 32)), SlotMismatch, "64x32 in the adapter"),
    "not turned": ({}, with_tensor(f"{_MLX_QUERY}.lora_a", torch.ones(4, 64)), AdapterError, "factors of shapes"),
    "no scale": ({"lora_parameters": {"rank": 4}}, as_it_is, AdapterError, "None is no usable scale.*; give a number"),
    "text": ({"lora_parameters": _PARAMETERS | {"scale": "2"}}, as_it_is, AdapterError, "'2' is no usable scale"),
    "infinite": ({"lora_parameters": _PARAMETERS | {"scale": float("inf")}}, as_it_is, AdapterError, "usable scale"),
    "no parameters": ({"lora_parameters": None}, as_it_is, AdapterError, "has no lora_parameters"),
    "no rank": ({"lora_parameters": {"scale": 2.0}}, as_it_is, AdapterError, "has rank None"),
    "other rank": ({"lora_parameters": _PARAMETERS | {"rank": 8}}, as_it_is, AdapterError, "rank 4, .* says 8"),
    "nothing": ({}, lambda tensors: tensors.clear(), AdapterError, "no LoRA factor"),
}


@pytest.mark.parametrize("case", MLX_REFUSED)
def test_folders_of_mlx_that_cannot_be_composed(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    config, change, error, message = MLX_REFUSED[case]
    tensors = mlx_tensors(zoo.lora("one"))
    change(tensors)
    refused(write_mlx(tmp_path / "mlx", tensors, MLX_CONFIG | config), BASE, tmp_path, error, message)


def test_incomplete_folders_of_mlx(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = write_mlx(tmp_path / "mlx", mlx_tensors(zoo.lora("one")))
    whole = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(whole[:-1])
    refused(folder, BASE, tmp_path, AdapterError, r"adapters\.safetensors cannot be read")
    (folder / "adapters.safetensors").unlink()
    refused(folder, BASE, tmp_path, AdapterError, r"has no adapters\.safetensors")
    (folder / "adapter_config.json").unlink()
    refused(folder, BASE, tmp_path, AdapterError, r"is a folder of no known format; give")
