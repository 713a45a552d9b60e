"""A base's tensors are those of transformers, whatever files they lie in, all rows or some of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import safetensors.torch
import torch
import transformers

from edgecompose.errors import ExportError
from edgecompose.formats.architectures import ARCHITECTURES
from edgecompose_export.base.source import locate_base, weights_digest
from edgecompose_export.weights.places import EMBEDDING, FINAL_NORM, HEAD, tensor_names
from edgecompose_export.weights.source import WeightSource, as_floats, open_weights, read_config
from tests import gguf_models, tiny

Float = npt.NDArray[np.float32]
NORMS = {
    "before": {"attention_in": "input_layernorm", "mlp_in": "post_attention_layernorm"},
    "after": {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"},
    "around": {
        "attention_in": "input_layernorm",
        "attention_out": "post_attention_layernorm",
        "mlp_in": "pre_feedforward_layernorm",
        "mlp_out": "post_feedforward_layernorm",
    },
}


def tensors_of(folder: Path) -> dict[str, Float]:
    """The tensors of a decoder, by our names, from the model that transformers loads."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    row = ARCHITECTURES[model.config.model_type]
    state = {name: values.numpy() for name, values in model.state_dict().items()}
    plus = 1 if row.name.startswith("gemma") else 0
    config, size = model.config, getattr(model.config, "head_dim", None)
    size = size or config.hidden_size // config.num_attention_heads
    key = config.num_key_value_heads * size
    cuts = {
        "qkv_proj": [config.num_attention_heads * size, config.num_attention_heads * size + key],
        "gate_up_proj": [96],
    }
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    named = {EMBEDDING: state["model.embed_tokens.weight"], FINAL_NORM: state["model.norm.weight"] + plus}
    if "model.norm.bias" in state:
        named["final_norm.bias"] = state["model.norm.bias"]
    if not config.tie_word_embeddings:
        named[HEAD] = state["lm_head.weight"]
    for layer, end in ((i, end) for i in range(config.num_hidden_layers) for end in ("weight", "bias")):
        norms = {**NORMS[row.norms], "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        for ours, theirs in norms.items():
            if (path := f"model.layers.{layer}.{theirs}.{end}") in state:
                named[f"{layer}.{ours}.{end}"] = state[path] + plus
        for module, theirs in row.paths.items():
            if (path := f"model.layers.{layer}.{theirs}.{end}") in state:
                split = np.split(state[path], cuts[module]) if module in cuts else [state[path]]
                for part, values in zip(parts.get(module, (module,)), split, strict=True):
                    named[f"{layer}.{part}.{end}"] = values
    return named


def check_tensors(source: WeightSource, exact: dict[str, Float]) -> None:
    assert {name for name, _ in tensor_names(source.config)} == set(exact)
    for name, shape in tensor_names(source.config):
        assert name in source and source.shape(name) == shape
        np.testing.assert_array_equal(source.floats(name), exact[name], err_msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", name)
    check_tensors(open_weights(folder), tensors_of(folder))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["one file", "shards", "bin"])
def test_tensors_are_the_same_in_any_file(dtype: torch.dtype, way: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "phi3")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=dtype)
    (folder / "model.safetensors").unlink()
    if way == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="60KB" if way == "shards" else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (way == "shards")
    source = open_weights(folder)
    assert source.type_of(EMBEDDING) == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[str(dtype)[6:]]
    check_tensors(source, tensors_of(folder))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[WeightSource]:
    """Packed rows in a folder, rotary pairs side by side in a GGUF file, blocks in another."""
    folder = tmp_path_factory.mktemp("sources")
    packed = tiny.write_model(folder / "phi3", "phi3")
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
    llama = gguf_models.MODELS["llama-bias"].write(folder / "llama", **wide)
    files = [gguf_models.write_gguf(folder / f"{kind}.gguf", llama, kind) for kind in ("F32", "Q8_0", "Q4_K")]
    return [open_weights(path) for path in (packed, *files)]


@given(data=st.data())
def test_some_rows_are_those_of_all(sources: list[WeightSource], data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(sources))
    name, shape = data.draw(st.sampled_from([(n, s) for n, s in tensor_names(source.config) if len(s) == 2]))
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    whole, part = source.floats(name), source.floats(name, start, stop)
    np.testing.assert_array_equal(part, whole[start:stop])
    if source.type_of(name) in ("Q8_0", "Q4_K"):
        blocks = source.blocks(name, start, stop).values(shape[1])
        np.testing.assert_allclose(blocks, part, rtol=0, atol=1e-5 * np.abs(whole).max())


@given(kind=st.sampled_from(["F16", "BF16", "F64"]), seed=st.integers(0, 999))
def test_float_types_are_those_of_torch(kind: str, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, (3, 64), np.uint8)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[kind]
    exact = torch.from_numpy(raw.copy()).view(dtype).float().numpy()
    np.testing.assert_array_equal(as_floats(raw, kind), exact)


# Refusals and names


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A folder, and the tensors of its file."""
    folder = tiny.write_model(tmp_path / "model", "llama")
    return folder, safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.norm.weight", None, r"1 tensors are missing .*: model\.norm\.weight"),
        ("model.norm.bias", torch.zeros(64), r"1 tensors are not part of such a model: model\.norm\.bias"),
        ("model.norm.weight", torch.zeros(65), r"have another shape: model\.norm\.weight \[65\], expected \[64\]"),
        ("model.norm.weight", torch.zeros(64, dtype=torch.int8), r"an unknown type, .*norm\.weight \(I8\)"),
    ],
)
def test_tensors_that_make_no_model_are_named(
    state: tuple[Path, dict[str, Any]], name: str, change: Any, message: str
) -> None:
    folder, tensors = state
    changed = {**tensors, name: change}
    safetensors.torch.save_file({k: v for k, v in changed.items() if v is not None}, folder / "model.safetensors")
    with pytest.raises(ExportError, match=message):
        open_weights(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(state: tuple[Path, dict[str, Any]], value: float) -> None:
    folder, tensors = state
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = value
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    source = open_weights(folder)
    assert np.isfinite(source.floats("1.up_proj.weight", 0, 7)).all()
    with pytest.raises(ExportError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds numbers that are not"):
        source.floats("1.up_proj.weight")


def test_buffers_beside_weights_are_no_part_and_no_harm(state: tuple[Path, dict[str, Any]]) -> None:
    folder, tensors = state
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    safetensors.torch.save_file(tensors | more, folder / "model.safetensors")
    check_tensors(open_weights(folder), tensors_of(folder))


def test_a_base_is_named_by_the_bytes_of_its_files(state: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = state
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert weights_digest(folder) == hashlib.sha256(digest.encode()).hexdigest()
    file = gguf_models.write_gguf(tmp_path / "x.gguf", folder)
    assert weights_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    first = gguf_models.write_gguf(tmp_path / "y.gguf", folder, shard_tensors=9)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tmp_path.glob("y-*.gguf"))]
    assert len(digests) > 1
    assert weights_digest(first) == hashlib.sha256("".join(digests).encode()).hexdigest()


def test_a_base_is_a_folder_a_file_or_the_only_file_of_a_folder(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "folder" / "config.json", {})
    assert locate_base(tmp_path / "folder") == tmp_path / "folder"
    files = tmp_path / "files"
    files.mkdir()
    with pytest.raises(ExportError, match="has no config.json but 0 GGUF models"):
        locate_base(files)
    for number in (1, 2):
        (files / f"x-0000{number}-of-00002.gguf").touch()
    assert locate_base(files) == locate_base(files / "x-00001-of-00002.gguf") == files / "x-00001-of-00002.gguf"
    (files / "y.gguf").touch()
    with pytest.raises(ExportError, match="has no config.json but 2 GGUF models"):
        locate_base(files)
    (files / "notes.txt").touch()
    with pytest.raises(ExportError, match=r"is neither a folder nor a \.gguf file"):
        locate_base(files / "notes.txt")
    with pytest.raises(ExportError, match="has no config.json but 0 GGUF models"):
        locate_base(tmp_path / "nowhere")


def test_an_adapter_and_what_is_no_object_are_no_configuration(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "config.json", [1])
    with pytest.raises(ExportError, match="holds a list, expected a JSON object; copy it again"):
        read_config(tmp_path)
    tiny.write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(ExportError, match=r"holds an adapter \(adapter_config.json\), expected a base"):
        read_config(tmp_path)
