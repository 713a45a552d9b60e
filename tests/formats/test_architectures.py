"""Adapters of every format fit every row of the table of architectures: PEFT's logits, and files that read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")
pytest.importorskip("gguf", reason="a package of edgecompose-export")

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from edgecompose.adapters import convert_adapter
from edgecompose.bundle.adapter import Adapter, load_adapter
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import Decoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import BundleError, MergeError
from edgecompose.formats.architectures import ARCHITECTURES, architecture_of
from edgecompose.formats.gguf import write_gguf_lora
from edgecompose.formats.peft import write_peft_folder
from edgecompose.merging.merger import Merger
from edgecompose.settings import MergeSettings
from edgecompose_export.base.export import export_base
from tests import gguf_models, tiny
from tests.fixtures_tiny import TinyZoo
from tests.lora_files import gguf_tensors, mlx_tensors, same_arrays, updates, write_gguf, write_mlx

pytestmark = pytest.mark.slow

Float = npt.NDArray[np.float32]
ROWS = tuple(ARCHITECTURES)
GGUF_ROWS = tuple(row.name for row in ARCHITECTURES.values() if row.gguf is not None)
#: Of the largest logit.
TOLERANCE = 1e-4
#: llama.cpp computes the activation of Gemma by a table in float16.
LLAMA_CPP_TOLERANCE = {"gemma": 3e-3, "gemma2": 3e-3, "gemma3_text": 3e-3}
#: More than two windows.
IDS = np.random.default_rng(3).integers(0, tiny.VOCABULARY - 3, 45).tolist()


@dataclass(frozen=True, eq=False)
class Case:
    """A base with an adapter of all its modules, as a PEFT folder."""

    model: Path
    decoder: Decoder
    spec: BaseSpec
    peft: Path

    def exported(self, source: Path, output: Path) -> Adapter:
        """An adapter of any format, in 16 bits, which hold the factors of `powers_of_two` exactly."""
        convert_adapter(source, self.spec, output, 16)
        return load_adapter(output, output.stem, self.spec.slots, self.spec.identity)

    def logits(self, blend: MergedAdapter, how: str) -> Float:
        decoding = self.decoder.start(blend, len(IDS))
        if how == "whole":
            return decoding.forward(IDS, rows=len(IDS)).copy()
        return np.concatenate([decoding.forward([token]).copy() for token in IDS])


def powers_of_two(folder: Path, model: Path) -> Path:
    """A PEFT folder of rank 4 and scale 2 with factors of -1/4 .. 1/4, each a power of two: exact in every format."""
    tiny.write_lora(folder, model)
    file, generator = folder / "adapter_model.safetensors", torch.Generator().manual_seed(7)
    tensors = {}
    for key, values in load_file(file).items():
        exponents = torch.randint(2, 6, values.shape, generator=generator)
        signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
        tensors[key] = signs * 0.5**exponents
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def cases(zoo: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    """Filled as tests ask for them."""
    yield Cases(zoo, tmp_path_factory)


class Cases(dict[str, Case]):
    def __init__(self, zoo: TinyZoo, paths: pytest.TempPathFactory) -> None:
        super().__init__()
        self._zoo, self._paths = zoo, paths

    def __missing__(self, name: str) -> Case:
        base, model = self._zoo.base(name), self._zoo.model(name)
        assert base.spec.architecture == name
        decoder = Decoder(base.folder / base.spec.graph, base.spec, choose_device("cpu"))
        self[name] = Case(model, decoder, base.spec, powers_of_two(self._paths.mktemp(name) / "lora", model))
        return self[name]


def logits_of_peft(model: Path, lora: Path | None) -> Float:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
    )
    if lora is not None:
        loaded = peft.PeftModel.from_pretrained(loaded, lora)
    with torch.no_grad():
        values: Float = loaded.eval()(torch.tensor([IDS])).logits[0].float().numpy()
    return values


def distance(ours: Float, theirs: Float) -> float:
    """Largest difference of a logit, over the largest logit."""
    return float(np.abs(ours - theirs[-len(ours) :]).max() / np.abs(theirs).max())


def blend_of(merger: Merger, adapter: Adapter) -> MergedAdapter:
    return merger.merge([adapter], [1.0], MergeSettings())


def gguf_form(case: Case, path: Path) -> Path:
    """The adapter as llama.cpp's converter writes it."""
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(str(case.spec.architecture), str(case.spec.architecture))
    tensors = gguf_tensors(case.peft, arch, case.spec.head_size)
    fields = {
        "general.type": "adapter",
        "general.architecture": arch,
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    return write_gguf(path, tensors, fields)


def test_every_row_has_a_tiny_model() -> None:
    assert set(tiny.ARCHITECTURES) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_logits_are_those_of_peft(cases: dict[str, Case], merger: Merger, tmp_path: Path, name: str) -> None:
    case = cases[name]
    adapter = case.exported(case.peft, tmp_path / "adapter.safetensors")
    assert {module: part.ranks.tolist() for module, part in adapter.modules.items()} == {
        group.name: [4] * group.layers for group in case.spec.slots
    }
    blend, theirs = blend_of(merger, adapter), logits_of_peft(case.model, case.peft)
    for how in ("whole", "token by token"):
        assert distance(case.logits(blend, how), theirs) <= TOLERANCE, how
    assert distance(logits_of_peft(case.model, None), theirs) > 0.1


@pytest.mark.parametrize("name", ROWS)
def test_formats_with_the_same_factors_give_the_same_arrays(cases: dict[str, Case], tmp_path: Path, name: str) -> None:
    case = cases[name]
    adapter = case.exported(case.peft, tmp_path / "peft.safetensors")
    tensors = mlx_tensors(case.peft)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}}
    wrapped = {f"language_model.{key}": values for key, values in tensors.items()}
    sources = [write_mlx(tmp_path / "mlx", tensors, config), write_mlx(tmp_path / "wrapped", wrapped, config)]
    if name in GGUF_ROWS:
        sources.append(gguf_form(case, tmp_path / "lora.gguf"))
    for source in sources:
        other = case.exported(source, tmp_path / f"{source.stem}.safetensors")
        assert same_arrays(adapter, other), source.name


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "base_model.model.language_model.model."])
@pytest.mark.parametrize("name", ["gemma3_text", "granitemoehybrid"])
def test_adapters_of_wrapped_models_are_read(cases: dict[str, Case], tmp_path: Path, name: str, prefix: str) -> None:
    case, folder = cases[name], tmp_path / "wrapped"
    folder.mkdir()
    tensors = load_file(case.peft / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.model.", prefix): values for key, values in tensors.items()}
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_bytes((case.peft / "adapter_config.json").read_bytes())
    both = [case.exported(source, tmp_path / f"{source.name}.safetensors") for source in (case.peft, folder)]
    assert same_arrays(*both)


def some_modules(adapter: Adapter) -> Adapter:
    """The adapter without a part of each packed module."""
    modules = {name: module for name, module in adapter.modules.items() if name not in ("k_proj", "up_proj")}
    return replace(adapter, modules=modules, digest=adapter.digest[::-1])


@pytest.mark.parametrize("whole", [True, False], ids=["all modules", "some modules"])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_written_reads_back(
    cases: dict[str, Case], merger: Merger, tmp_path: Path, name: str, whole: bool
) -> None:
    case = cases[name]
    adapter = case.exported(case.peft, tmp_path / "adapter.safetensors")
    blend = blend_of(merger, adapter if whole else some_modules(adapter))
    write_peft_folder(blend, tmp_path / "peft", case.spec)
    written = [tmp_path / "peft"]
    if name in GGUF_ROWS:
        written.append(write_gguf_lora(blend, tmp_path / "lora.gguf", case.spec))
    for path in written:
        back = updates(case.exported(path, tmp_path / f"{path.suffix or 'peft'}.safetensors"))
        for module, (a, b) in blend.factors().items():
            update = a.swapaxes(1, 2) @ b
            assert np.abs(back[module] - update).max() <= 1e-6 * np.abs(update).max(), (path.name, module)
        assert not any(back[module].any() for module in back.keys() - blend.modules.keys())
    theirs = logits_of_peft(case.model, tmp_path / "peft")
    assert distance(case.logits(blend, "whole"), theirs) <= TOLERANCE


@pytest.mark.parametrize("name", GGUF_ROWS)
def test_llama_cpp_gives_our_logits(cases: dict[str, Case], merger: Merger, tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed; run 'pip install llama-cpp-python'")
    source = cases[name].model
    if name == "mistral":  # GGUF files have no window for it
        source = tiny.write_model(tmp_path / "model", name, sliding_window=None)
    file = gguf_models.write_gguf(tmp_path / "base.gguf", source)
    spec = export_base(file, tmp_path / "base", "fp32")
    decoder = Decoder(tmp_path / "base" / spec.graph, spec, choose_device("cpu"))
    case = Case(source, decoder, spec, cases[name].peft)
    blend = blend_of(merger, case.exported(case.peft, tmp_path / "adapter.safetensors"))
    lora = write_gguf_lora(blend, tmp_path / "lora.gguf", spec)
    theirs, alone = logits_of_llama_cpp(file, lora), logits_of_llama_cpp(file, None)
    tolerance = LLAMA_CPP_TOLERANCE.get(name, TOLERANCE)
    assert distance(case.logits(blend, "whole"), theirs) <= tolerance
    assert distance(alone, theirs) > 0.1


def logits_of_llama_cpp(model: Path, lora: Path | None) -> Float:
    import llama_cpp

    llama = llama_cpp.Llama(
        str(model),
        lora_path=None if lora is None else str(lora),
        n_ctx=64,
        verbose=False,
        n_threads=1,
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama.eval(IDS)
    values = np.array(llama.scores[: len(IDS)], np.float32)
    llama.close()
    return values


def test_rows_without_gguf_files_are_refused_by_name(cases: dict[str, Case], merger: Merger, tmp_path: Path) -> None:
    case = cases["granitemoehybrid"]
    blend = blend_of(merger, case.exported(case.peft, tmp_path / "adapter.safetensors"))
    with pytest.raises(MergeError, match=r"architecture is granitemoehybrid; llama, mistral, .* use --format peft"):
        write_gguf_lora(blend, tmp_path / "lora.gguf", case.spec)
    assert not (tmp_path / "lora.gguf").exists()
    write_peft_folder(blend, tmp_path / "peft", case.spec)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["input_linear", "k_proj", "o_proj", "output_linear", "q_proj", "v_proj"]


def test_an_unknown_architecture_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BundleError, match=r"'mamba', expected one of llama, mistral, .*smollm3; update edgecompose"):
        architecture_of("mamba")
    assert architecture_of(None) is ARCHITECTURES["llama"]  # older bundles
