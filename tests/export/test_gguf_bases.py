"""Bases as GGUF files: the same decoder as the folder that they were written from, and as llama.cpp makes of them."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

import torch
import transformers

from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import ExportError
from edgecompose_export.calibration.comparison import compare
from edgecompose_export.calibration.logits import float_logits
from edgecompose_export.calibration.reference import float_states
from edgecompose_export.calibration.stored import stored_logits, stored_states
from edgecompose_export.decoder.config import DecoderConfig
from edgecompose_export.graphs.decoder import slot_groups, write_decoder
from edgecompose_export.graphs.stored_weights import StoredWeights
from edgecompose_export.graphs.writer import DataFile
from edgecompose_export.weights.forms import Form, source_form
from edgecompose_export.weights.gguf_blocks import GGUF_FORMS, read_blocks
from edgecompose_export.weights.places import EMBEDDING, HEAD, linear_tensors, tensor_names
from edgecompose_export.weights.source import WeightSource, open_weights
from tests.gguf_models import MODELS, quantized, write_gguf

Float = npt.NDArray[np.float32]
#: More tokens than every window and than the original context of LongRoPE.
IDS = np.random.default_rng(0).integers(0, 297, 200).tolist()
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


def source_forms(source: WeightSource) -> dict[str, Form]:
    """The forms that keep every matrix as the file has it."""
    tied = source.config.tied
    forms = {tensor: source_form(source.type_of(tensor)) for tensor in linear_tensors(source.config)}
    forms[HEAD] = source_form(source.type_of(EMBEDDING if tied else HEAD))
    return forms if tied else forms | {EMBEDDING: source_form(source.type_of(EMBEDDING))}


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
        "decoder.onnx",
        "t",
        "i",
        "fp32",
        config.context,
        config.kv_heads,
        config.head_size,
        config.vocabulary,
        (0,),
        slot_groups(config),
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


def assert_same_decoder(one: DecoderConfig, other: DecoderConfig) -> None:
    """Both mean the same; Mistral's row is Llama's in GGUF."""
    for item in dataclasses.fields(DecoderConfig):
        first, second = getattr(one, item.name), getattr(other, item.name)
        if item.name == "architecture":
            assert first.gguf == second.gguf
        elif item.name == "rotaries":
            assert len(first) == len(second)
            for turn, other_turn in zip(first, second, strict=True):
                np.testing.assert_allclose(turn.frequencies, other_turn.frequencies, rtol=2e-6)
                assert turn.scale == pytest.approx(other_turn.scale, rel=1e-6)
                assert turn.long_from == other_turn.long_from
                if turn.long_frequencies is not None:
                    np.testing.assert_allclose(turn.long_frequencies, other_turn.long_frequencies, rtol=2e-6)
        elif isinstance(first, float):
            assert first == pytest.approx(second, rel=1e-6), item.name
        else:
            assert first == second, item.name


# Every architecture


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


# Block types


def finite_blocks(data: st.DataObject, kind: str) -> npt.NDArray[np.uint8]:
    size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    rows = data.draw(st.integers(1, 4))
    seed = data.draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 256, (rows, 3 * size), np.uint8)


@pytest.mark.parametrize("kind", GGUF_FORMS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_blocks_stand_for_the_values_of_gguf(kind: str, data: st.DataObject) -> None:
    raw = finite_blocks(data, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        values = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    if not np.isfinite(values).all():
        with pytest.raises(ExportError, match="a scale is not a finite number; the file is damaged"):
            read_blocks(raw, kind)
        return
    ours = read_blocks(raw, kind).values(values.shape[1])
    np.testing.assert_allclose(ours, values, rtol=1e-5, atol=1e-6 * np.abs(values).max())


#: Every matrix has rows of whole super-blocks.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}


@pytest.mark.parametrize("kind", [*GGUF_FORMS, "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_base_of_each_type_is_near_its_own_float_values(kind: str, name: str, tmp_path: Path) -> None:
    source = open_weights(write_gguf(tmp_path / "model.gguf", MODELS[name].write(tmp_path / "model", **WIDE), kind))
    assert {source.type_of(tensor) for tensor in (EMBEDDING, *linear_tensors(source.config))} == {kind}
    with DataFile(tmp_path / "decoder.onnx.data") as data:
        weights = StoredWeights(source, source_forms(source), data)
        write_decoder(source.config, weights, slots=True)
        weights.fill()
    exact = float_states(source, [IDS]).states[0]
    stored = stored_states(source, weights, tmp_path, prompts=[IDS])[0]
    logits = stored_logits(source.config, weights, tmp_path, states=stored)
    result = compare(float_logits(source, exact), logits, [*IDS[1:], -1])
    assert result.positions == len(IDS)
    assert 0 <= result.kl + 1e-6 < 0.01


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0", "MXFP4", "IQ1_S", "IQ3_XXS", "Q8_K"])
def test_types_without_a_form_are_refused_by_name(kind: str, folders: Mapping[str, Path], tmp_path: Path) -> None:
    known = GGMLQuantizationType[kind]
    block, size = GGML_QUANT_SIZES[known]
    folder = MODELS["llama"].write(tmp_path / "model", **WIDE)
    extra = {"blk.0.ffn_up.weight": np.zeros((512, 256 // block * size), np.uint8)}
    path = _with_type(tmp_path, folder, extra, known)
    message = rf"1 tensors have an unknown type.*blk\.0\.ffn_up\.weight \({kind}\)"
    with pytest.raises(ExportError, match=message):
        open_weights(path)
    with pytest.raises(ExportError, match=f"weights have the type {kind}, expected one of F32, F16, BF16, Q8_0"):
        read_blocks(np.zeros((1, size), np.uint8), kind)


def _with_type(tmp_path: Path, folder: Path, extra: dict[str, npt.NDArray[Any]], kind: GGMLQuantizationType) -> Path:
    return write_gguf(tmp_path / "model.gguf", folder, extra=extra, extra_type=kind)


def test_a_type_of_another_time_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    content = bytearray(path.read_bytes())
    name = b"blk.1.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.gguf.*'blk\.1\.ffn_down\.weight' is of type 99, which is not known"):
        open_weights(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused(value: float, folders: Mapping[str, Path], tmp_path: Path) -> None:
    folder = MODELS["llama"].write(tmp_path / "model", **WIDE)
    raw = quantized(np.zeros((512, 256), np.float32), "Q4_K")
    raw[3, :2] = np.array([value], "<f2").view(np.uint8)
    path = _with_type(tmp_path, folder, {"blk.0.ffn_up.weight": raw}, GGMLQuantizationType.Q4_K)
    source = open_weights(path)
    with pytest.raises(
        ExportError, match=r"base 'model\.gguf'.*'blk\.0\.ffn_up\.weight'.*scale is not a finite number"
    ):
        source.blocks("0.up_proj.weight")
    with pytest.raises(ExportError, match=r"base 'model\.gguf'.*'blk\.0\.ffn_up\.weight'.*not finite"):
        source.floats("0.up_proj.weight")


# Shards


@pytest.fixture(scope="module")
def shards(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A model in four files."""
    root = tmp_path_factory.mktemp("shards")
    write_gguf(root / "model.gguf", folders["llama-3.2"], shard_tensors=9)
    return sorted(root.glob("*.gguf"))


def copied(shards: list[Path], folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, folder)) for path in shards]


def test_any_shard_opens_the_model(shards: list[Path], folders: Mapping[str, Path]) -> None:
    assert len(shards) == 4
    folder = open_weights(folders["llama-3.2"])
    for path in (shards[0], shards[1], shards[-1]):
        source = open_weights(path)
        assert_same_decoder(source.config, folder.config)
        for tensor, _ in tensor_names(folder.config):
            assert np.array_equal(source.floats(tensor), folder.floats(tensor)), tensor


@pytest.mark.parametrize("number", range(4))
def test_a_missing_shard_is_named(shards: list[Path], tmp_path: Path, number: int) -> None:
    paths = copied(shards, tmp_path / "m")
    paths[number].unlink()
    rest = next(path for path in paths if path.exists())
    with pytest.raises(ExportError, match=rf"{rest.name}.*{paths[number].name} is missing; put all shards into one"):
        open_weights(rest)


def test_shards_of_two_models_are_refused(shards: list[Path], folders: Mapping[str, Path], tmp_path: Path) -> None:
    paths = copied(shards, tmp_path / "m")
    (tmp_path / "other").mkdir()
    write_gguf(tmp_path / "other" / "model.gguf", folders["qwen3"], shard_tensors=11)
    others = sorted((tmp_path / "other").glob("*.gguf"))
    assert len(others) == len(paths)
    shutil.copy(others[2], paths[2])
    for path in (paths[0], paths[3]):
        with pytest.raises(ExportError, match="model-00003-of-00004|tensors|architecture"):
            open_weights(path)


def test_shards_in_the_wrong_order_are_refused(shards: list[Path], tmp_path: Path) -> None:
    paths = copied(shards, tmp_path / "m")
    shutil.copy(shards[2], paths[1])
    with pytest.raises(ExportError, match=r"model-00002-of-00004\.gguf' does not say that it is shard 2 of 4"):
        open_weights(paths[0])


def test_a_renamed_shard_is_refused(shards: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(shards[0], tmp_path / "model.gguf"))
    with pytest.raises(ExportError, match=r"model\.gguf.* is one of 4 shards.*llama-gguf-split --merge"):
        open_weights(path)


def test_tensors_that_are_left_out_are_named(folders: Mapping[str, Path], tmp_path: Path) -> None:
    omit = ["blk.1.ffn_up.weight", "output_norm.weight"]
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], omit=omit)
    with pytest.raises(ExportError, match=re.escape("base 'model.gguf' (llama): 2 tensors are missing")) as caught:
        open_weights(path)
    assert all(name in str(caught.value) for name in omit)
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], omit=["token_embd.weight"])
    with pytest.raises(ExportError, match=r"base 'model\.gguf': token_embd\.weight is missing"):
        open_weights(path)


def test_tensors_that_are_misshapen_or_left_over_are_named_together(
    folders: Mapping[str, Path], tmp_path: Path
) -> None:
    extra = {
        "blk.0.attn_q.weight": np.zeros((32, 64), np.float32),
        "blk.0.strange.weight": np.zeros(4, np.float32),
        "blk.7.attn_q.weight": np.zeros((64, 64), np.float32),
    }
    path = write_gguf(tmp_path / "model.gguf", folders["llama"], extra=extra, omit=["blk.2.attn_k.weight"])
    with pytest.raises(ExportError) as caught:
        open_weights(path)
    for part in (
        "base 'model.gguf' (llama)",
        "1 tensors are missing",
        "blk.2.attn_k.weight",
        "1 tensors have another shape",
        "blk.0.attn_q.weight [32, 64], expected [64, 64]",
        "2 tensors are not part of such a model",
        "blk.0.strange.weight, blk.7.attn_q.weight",
    ):
        assert part in str(caught.value)


def test_a_doubled_tensor_is_named(folders: Mapping[str, Path], shards: list[Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    content = path.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.2.ffn_up.weight")
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.gguf' holds a tensor twice: blk\.2\.ffn_up\.weight"):
        open_weights(path)
    paths = copied(shards, tmp_path / "m")
    names = [set(re.findall(rb"blk\.\d\.[a-z_]+\.weight", shard.read_bytes())) for shard in shards]
    first, second = (next(n for n in sorted(group) if n.startswith(b"blk.") and len(n) == 19) for group in names[1:3])
    paths[2].write_bytes(paths[2].read_bytes().replace(second, first))
    with pytest.raises(ExportError, match=f"holds a tensor twice: {re.escape(first.decode())}"):
        open_weights(paths[0])


def test_a_file_that_is_cut_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", folders["llama"])
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ExportError, match=r"model\.gguf.*tensor '.*' .*the file ends at byte"):
        open_weights(path)


def test_parts_that_are_not_exported_are_named(folders: Mapping[str, Path], tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("olmo2", {"olmo2.attention.sliding_window": 16}, "OLMo 3"),
        ("llama", {"llama.expert_count": 8}, "mixture of experts"),
        ("llama", {"llama.rope.scaling.type": "su"}, "rope.scaling.type is 'su'"),
        ("llama", {"llama.rope.scaling.type": "longrope"}, "there is no rope_factors_long"),
        ("llama", {"general.type": "adapter"}, "is a GGUF 'adapter', expected a model"),
        ("llama", {"llama.attention.value_length": 8}, "different length"),
        ("llama", {"general.architecture": "mamba"}, "architecture 'mamba', expected one of llama, qwen2"),
    ]
    for name, metadata, message in cases:
        path = write_gguf(tmp_path / "model.gguf", folders[name], metadata=metadata)
        with pytest.raises(ExportError, match=re.escape(message)):
            open_weights(path)
