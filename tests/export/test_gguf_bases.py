"""Bases as GGUF files: the same decoder as the folder that they were written from, and as llama.cpp makes of them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch
import transformers

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose_export.graphs.decoder import slot_groups, write_decoder
from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import DataFile
from edgecompose_export.weights.places import tensor_names
from edgecompose_export.weights.source import open_weights
from tests.export.gguf_bases import IDS, assert_same_decoder, source_forms
from tests.gguf_models import MODELS, write_gguf

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
#: llama.cpp looks GELU up in a table of float16 (GGML_GELU_FP16).
GELU_TABLE = 0.01


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A Hugging Face folder of each model."""
    root = tmp_path_factory.mktemp("models")
    return {name: model.write(root / name) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def files(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A GGUF file in float32 of each model."""
    root = tmp_path_factory.mktemp("files")
    return {name: write_gguf(root / f"{name}.gguf", folder) for name, folder in folders.items()}


def transformers_logits(folder: Path, ids: list[int]) -> Float:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def our_logits(path: Path, ids: list[int], folder: Path) -> Float:
    """Logits of the exported decoder at all positions."""
    source = open_weights(path)
    config = source.config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with DataFile(folder / "decoder.onnx.data") as data:
        weights = StoredWeights(source, source_forms(source), data)
        graph = write_decoder(config, weights, slots=True)
        weights.fill()
    graph.save(folder / "decoder.onnx")
    spec = BaseSpec(
        graph="decoder.onnx",
        tokenizer="t",
        identity="i",
        precision="fp32",
        context=config.context,
        kv_heads=config.kv_heads,
        head_size=config.head_size,
        vocabulary=config.vocabulary,
        end_tokens=(0,),
        slots=slot_groups(config),
        long_from=config.long_from,
    )
    decoder = Decoder(folder / "decoder.onnx", spec, choose_device("cpu"))
    state = decoder.start(MergedAdapter({}, "base"), len(ids))
    return state.forward(ids, rows=len(ids)).copy()


def llama_cpp_logits(path: Path, ids: list[int], *, n_ctx: int = 512, fast: float = -1.0, slow: float = -1.0) -> Float:
    """Logits of llama.cpp on the CPU with caches in float32.

    Args:
        fast, slow: beta of yarn, by default the model's.
    """
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama.cpp is not installed; run 'pip install llama-cpp-python'"
    )
    llama = llama_cpp.Llama(
        str(path),
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_ubatch=n_ctx,
        logits_all=True,
        flash_attn=False,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=1,
        use_mmap=False,
        n_gpu_layers=0,
        yarn_ext_factor=-1.0,
        yarn_attn_factor=-1.0,
        yarn_beta_fast=fast,
        yarn_beta_slow=slow,
    )
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids)], np.float32)
    llama.close()
    return logits


def difference(one: Float, other: Float) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(one - other).max() / np.abs(one).max())


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_is_the_decoder_of_its_folder(
    name: str, folders: Mapping[str, Path], files: Mapping[str, Path]
) -> None:
    folder, file = open_weights(folders[name]), open_weights(files[name])
    assert_same_decoder(folder.config, file.config)
    for tensor, shape in tensor_names(folder.config):
        values = file.floats(tensor)
        assert values.shape == shape
        np.testing.assert_allclose(values, folder.floats(tensor), rtol=1e-6, atol=1e-7, err_msg=tensor)


@pytest.mark.parametrize("name", MODELS)
def test_a_gguf_file_gives_the_logits_of_transformers(
    name: str, folders: Mapping[str, Path], files: Mapping[str, Path], tmp_path: Path
) -> None:
    theirs = transformers_logits(folders[name], IDS)
    assert difference(theirs, our_logits(files[name], IDS, tmp_path)) < 3e-5


#: llama.cpp does not apply Phi-3's window (ggml-org/llama.cpp#13676), nor the attention factor of yarn that its own
#: converter writes: both are compared with it by tests of their own.
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("phi3", "llama-yarn-factor")])
def test_a_gguf_file_gives_the_logits_of_llama_cpp(name: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    theirs = llama_cpp_logits(files[name], IDS, fast=16.0 if name == "llama-yarn" else -1.0)
    limit = GELU_TABLE if name.startswith("gemma") else 3e-5
    assert difference(theirs, our_logits(files[name], IDS, tmp_path)) < limit


#: Keys that a model of the file's architecture may have beside the usual ones, as llama.cpp reads them.
KEYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "attention factor of yarn": ("llama-yarn", {"llama.rope.scaling.attn_factor": 1.3}),
    "attention factor of linear scaling": ("llama-linear", {"llama.rope.scaling.attn_factor": 1.3}),
    "attention factor alone": ("llama", {"llama.rope.scaling.attn_factor": 1.3}),
    "attention factor with rope_freqs": ("llama-3.2", {"llama.rope.scaling.attn_factor": 1.3}),
    "attention factor of LongRoPE": ("phi3-long", {"phi3.rope.scaling.attn_factor": 1.5}),
    "factor without a type": ("llama", {"llama.rope.scaling.factor": 4.0}),
    "factor of type none": ("llama", {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"}),
    "factor by its old name": ("llama", {"llama.rope.scale_linear": 4.0}),
    "scales of another architecture": (
        "llama",
        {
            "llama.logit_scale": 4.0,
            "llama.embedding_scale": 3.0,
            "llama.residual_scale": 0.5,
            "llama.attention.scale": 0.5,
        },
    ),
    "no scales": (
        "granite",
        {"granite.attention.scale": 0.0, "granite.embedding_scale": 0.0, "granite.residual_scale": 0.0},
    ),
    "attention scale of Gemma": ("gemma2", {"gemma2.attention.scale": 0.5}),
    "caps of Gemma": ("gemma", {"gemma.final_logit_softcapping": 4.0}),
    "caps of Gemma 2": ("gemma2", {"gemma2.final_logit_softcapping": 4.0, "gemma2.attn_logit_softcapping": 3.0}),
    "caps of Gemma 3": ("gemma3", {"gemma3.final_logit_softcapping": 4.0, "gemma3.attn_logit_softcapping": 3.0}),
    "pattern of Gemma 2": ("gemma2", {"gemma2.attention.sliding_window_pattern": 3}),
    "pattern of Gemma 3": ("gemma3", {"gemma3.attention.sliding_window_pattern": 3}),
    "local frequencies of Gemma 3": ("gemma3-linear", {"gemma3.rope.freq_base_swa": 3000.0}),
    "parallel StableLM that says it is not": ("stablelm-parallel", {"stablelm.use_parallel_residual": 0}),
    "StableLM that says it is parallel": ("stablelm", {"stablelm.use_parallel_residual": 1}),
}


@pytest.mark.parametrize("case", KEYS)
def test_metadata_means_what_llama_cpp_reads(case: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    name, metadata = KEYS[case]
    path = write_gguf(tmp_path / "model.gguf", folders[name], metadata=metadata)
    limit = GELU_TABLE if name.startswith("gemma") else 3e-5
    assert difference(llama_cpp_logits(path, IDS), our_logits(path, IDS, tmp_path / "out")) < limit


@pytest.mark.parametrize(("name", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_queries_otherwise(name: str, layers: int, tmp_path: Path) -> None:
    """By its number of layers, as in llama.cpp. Small norms keep the error of its GELU from adding up."""
    model = MODELS[name]
    hidden, heads = model.changes.get("hidden_size", 64), 4
    changes = {"num_hidden_layers": layers, "query_pre_attn_scalar": hidden // heads, "layer_types": None}
    folder = model.write(tmp_path / "model", **changes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        for parameter_name, parameter in loaded.named_parameters():
            if parameter_name.endswith("post_feedforward_layernorm.weight"):
                parameter.copy_(parameter * 0 - 0.99)
    loaded.save_pretrained(folder)
    path = write_gguf(tmp_path / "model.gguf", folder)
    ours = our_logits(path, IDS, tmp_path / "out")
    assert difference(transformers_logits(folder, IDS), ours) < 1e-3
    assert difference(llama_cpp_logits(path, IDS), ours) < GELU_TABLE


def test_short_factors_hold_up_to_the_original_context(tmp_path: Path) -> None:
    """llama.cpp chooses by the size of its context (256 and 512 here), we by the length of the sequence."""
    sizes = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
    folder = MODELS["phi3-long"].write(tmp_path / "model", **sizes)
    path = write_gguf(tmp_path / "model.gguf", folder)
    assert difference(llama_cpp_logits(path, IDS, n_ctx=256), our_logits(path, IDS, tmp_path / "out")) < 5e-5
    longer = [*IDS, *IDS]
    assert difference(llama_cpp_logits(path, longer, n_ctx=512), our_logits(path, longer, tmp_path / "out")) < 5e-5


def test_without_its_window_phi3_is_that_of_llama_cpp(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """llama.cpp says 'Phi SWA is currently disabled' and sees the whole text; we keep the window, as transformers."""
    path = write_gguf(tmp_path / "model.gguf", folders["phi3"], metadata={"phi3.attention.sliding_window": 0})
    assert difference(llama_cpp_logits(path, IDS), our_logits(path, IDS, tmp_path / "out")) < 3e-5


def test_yarn_has_the_numbers_of_the_file(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """llama.cpp takes them as arguments: those of the file it does not read for every architecture."""
    metadata = {"llama.rope.scaling.yarn_beta_fast": 16.0, "llama.rope.scaling.yarn_beta_slow": 3.0}
    path = write_gguf(tmp_path / "model.gguf", folders["llama-yarn"], metadata=metadata)
    theirs = llama_cpp_logits(path, IDS, fast=16.0, slow=3.0)
    assert difference(theirs, our_logits(path, IDS, tmp_path / "out")) < 3e-5


def test_a_window_of_mistral_is_kept(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """llama.cpp reads no window for 'llama', and its converter writes none; a file that has one gets it."""
    path = write_gguf(tmp_path / "model.gguf", folders["mistral"], metadata={"llama.attention.sliding_window": 16})
    assert {layer.window for layer in open_weights(path).config.layers} == {16}
