"""OpenVINO GenAI on the same GGUF and the same adapters, in this process.

It takes part where `openvino-genai` is installed (`pip install openvino-genai`) and can read the file: Q4_0, Q4_1,
Q8_0, F16 and most K-quants of Llama and Qwen, but no Q5_0.

From a GGUF file it makes a graph whose products have no names. Adapters are found by names, so none of them has any
effect then, and nothing says so. `convert` writes that graph once, and gives each product the name of its module; the
weights stay as OpenVINO read them. Adapters are PEFT files: the tensors of a LoRA file of llama.cpp find no module.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring.timing import TimedStep
from edgecompose.bundle.specs import BaseSpec

#: Modules of a block, in the order in which OpenVINO makes their products.
_MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_MODEL = "openvino_model.xml"


class Unreadable(Exception):
    """OpenVINO GenAI cannot run a base; one line."""


def is_available(gguf: Path) -> bool:
    """Whether OpenVINO GenAI is installed and the GGUF file exists."""
    return all(map(importlib.util.find_spec, ("openvino", "openvino_genai"))) and gguf.is_file()


def convert(gguf: Path, folder: Path, spec: BaseSpec) -> Path:
    """Write OpenVINO's graph of a GGUF file with a name for each module into a folder, unless it is there.

    Raises:
        Unreadable: OpenVINO does not read the file, or makes another graph than of Llama's modules.
    """
    target = folder / gguf.stem
    if (target / _MODEL).is_file():
        return target
    import openvino
    import openvino_genai

    work = folder / f".{gguf.stem}.{os.getpid()}.tmp"
    (work / "read").mkdir(parents=True)
    try:
        (work / "read" / "base.gguf").symlink_to(gguf.resolve())
        try:
            openvino_genai.LLMPipeline(str(work / "read" / "base.gguf"), "CPU", enable_save_ov_model=True)
        except RuntimeError as error:
            raise Unreadable(f"OpenVINO does not read {gguf.name}: {str(error).strip().splitlines()[-1]}") from error
        model = openvino.Core().read_model(work / "read" / _MODEL)
        name_modules(model, spec)
        (work / "named").mkdir()
        openvino.save_model(model, work / "named" / _MODEL, compress_to_fp16=False)
        for file in (work / "read").glob("*tokenizer*"):
            shutil.copy(file, work / "named")
        (work / "named").rename(target)
    finally:
        shutil.rmtree(work)
    return target


def name_modules(model: Any, spec: BaseSpec) -> None:
    """Give the product of each module the name by which adapters are matched.

    Raises:
        Unreadable: the products are not the seven of each block, and that of the vocabulary.
    """
    products = [node for node in model.get_ordered_ops() if node.get_type_name() == "MatMul" and _has_weight(node)]
    products.sort(key=lambda node: int(re.sub(r"\D", "", node.get_friendly_name())))
    widths = {group.name: (group.n_out, group.n_in) for group in spec.slots}
    expected = [widths.get(module.rpartition(".")[2]) for module in _MODULES] * spec.layers
    shapes = [tuple(node.input(1).get_shape()) for node in products]
    if shapes[:-1] != expected:
        raise Unreadable(f"OpenVINO's graph has {len(products)} products of other shapes than {spec.architecture}'s")
    for number, node in enumerate(products[:-1]):
        layer, module = divmod(number, len(_MODULES))
        node.set_friendly_name(f"__module.model.layers.{layer}.{_MODULES[module]}/MatMul")


def _has_weight(product: Any) -> bool:
    """Whether a product's second factor is a matrix of the file: rotary angles have no fixed shape."""
    source = product.input(1).get_source_output()
    return bool(source.get_node().get_type_name() == "Convert" and source.get_partial_shape().is_static)


@dataclass(frozen=True, slots=True)
class OpenVino:
    """A converted base, and adapters: files of PEFT, each with a weight."""

    folder: Path
    adapters: tuple[tuple[Path, float], ...] = ()

    def open(self, **properties: Any) -> Any:
        """The pipeline, with as many threads as our decoder has, and its own defaults else."""
        import openvino_genai

        properties = {"INFERENCE_NUM_THREADS": os.cpu_count(), **properties}
        if self.adapters:
            loaded = [(openvino_genai.Adapter(str(path)), weight) for path, weight in self.adapters]
            properties["adapters"] = openvino_genai.AdapterConfig(loaded)
        return openvino_genai.LLMPipeline(str(self.folder), "CPU", **properties)


def decoding(pipeline: Any, ids: Sequence[int], *, tokens: int) -> TimedStep:
    """A call that reads a prompt and decodes greedily; it returns the seconds of the tokens after the first."""
    write = writer(pipeline, ids, tokens=tokens + 1)

    def measure() -> float:
        times = write()[1]
        return times[-1] - times[0]

    return measure


def writer(pipeline: Any, ids: Sequence[int], *, tokens: int) -> Callable[[], tuple[list[int], list[float]]]:
    """A call that gives the greedy answer to a prompt, end tokens ignored, and when each token came (s)."""
    import numpy as np
    import openvino
    import openvino_genai

    class Clock(openvino_genai.StreamerBase):  # type: ignore[misc]  # the package has no types
        """Notes when tokens come."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: int | list[int]) -> Any:
            self.times += [time.perf_counter()] * (1 if isinstance(token, int) else len(token))
            return openvino_genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Nothing is left to write."""

    prompt = openvino.Tensor(np.array([ids], np.int64))
    mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
    settings = openvino_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True)

    def write() -> tuple[list[int], list[float]]:
        clock = Clock()
        result = pipeline.generate(openvino_genai.TokenizedInputs(prompt, mask), settings, clock)
        return list(result.tokens[0]), clock.times

    return write
