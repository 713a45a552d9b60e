"""A base model to a decoder graph with adapter slots, quantised, with its distance from float32 measured."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgecompose.blend import MergedAdapter
from edgecompose.decoder import Decoder
from edgecompose.device import choose_device
from edgecompose.errors import ExportError
from edgecompose.generation import log_softmax
from edgecompose.manifest import BaseSpec, Distance, SlotGroup
from edgecompose.tokenization import Tokenizer
from edgecompose.typed_json import value_from_json
from edgecompose_export.checkpoint import Checkpoint
from edgecompose_export.cuda_graph import write_cuda_graph
from edgecompose_export.datasets import read_json
from edgecompose_export.folding import without_data, write_folding
from edgecompose_export.quantize import quantize_decoder
from edgecompose_export.slots import add_slots, feed_lengths, keep_last_logits

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
#: Precisions whose weights a blend can be written into.
FLOAT_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")
SPEC_FILE = "base.json"
#: Mean KL divergence (nats) that a quantised base may have from float32.
LARGEST_KL = 0.01
#: Mean KL divergence (nats) from float32 that attention in float16 may bring. It brings about 1e-6.
LARGEST_HALF_KL = 1e-3
#: Largest difference of a logit between transformers and the float32 graph.
LARGEST_LOGIT_ERROR = 1e-3
_NO_ADAPTER = MergedAdapter({}, "base")
Float = npt.NDArray[np.float32]


def export_base(
    checkpoint: Checkpoint,
    output: Path,
    precision: Precision = "int8",
    *,
    accept_distance: bool = False,
    advance: Callable[[str], None] = lambda step: None,
) -> BaseSpec:
    """Write `decoder.onnx`, `tokenizer.json`, `chat_template.jinja` and `base.json` to `output`.

    A float base (fp32, fp16) also gets the graphs of `folding.write_folding`. Every decoder gets another for CUDA
    beside it (`cuda_graph`), unless float16 attention moves the float graph by more than LARGEST_HALF_KL.

    Args:
        accept_distance: keep a quantised base whose KL divergence exceeds LARGEST_KL.
        advance: called with the name of each step as it begins.

    Raises:
        ExportError: an architecture that cannot be exported, a float graph whose logits differ from
            transformers', or a quantised graph too far from the float one.
    """
    if (output / SPEC_FILE).exists():
        raise ExportError(f"'{output}' already holds an exported base; remove it or give another folder")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".build-") as scratch:
        work = Path(scratch)
        advance("loading the checkpoint")
        model = checkpoint.model()
        template = checkpoint.write_tokenizer(output)
        _write_template(output, template)
        advance("building the float graph")
        graph, widths = build_decoder(model, checkpoint, work), _head_widths(model.config)[1:]
        bare = without_data(graph)
        slots = add_slots(graph, widths)
        spec = _describe(model, slots, checkpoint, precision, template)
        save_graph(graph, work / "float.onnx")
        tokenizer = Tokenizer(output / spec.tokenizer, chat_template=template)
        prompts = [_render(tokenizer, prompt) for prompt in calibration_prompts()]
        advance("comparing with transformers")
        _check_parity(model, work / "float.onnx", spec, prompts[:3])
        del model
        advance(f"converting to {precision}")
        convert(graph, precision)
        save_graph(graph, output / spec.graph)
        if precision in FLOAT_PRECISIONS:
            spec = dataclasses.replace(spec, folding=write_folding(bare, output / spec.graph, widths))
        if _holds_in_half(work / "float.onnx", spec, prompts[:3]):
            spec = _write_cuda_graphs(output, spec)
        if precision != "fp32":
            advance("measuring the distance from float32")
            distance = measure_distance(work / "float.onnx", output / spec.graph, spec, prompts)
            spec = dataclasses.replace(spec, distance=distance)
            if distance.kl > LARGEST_KL and not accept_distance:
                raise ExportError(
                    f"precision {precision} is {distance.kl:.3f} nats from float32 (top-1 {distance.top1:.0%}), "
                    f"{LARGEST_KL} at most is wanted; use --precision int8, or --accept-distance to keep it"
                )
    (output / SPEC_FILE).write_text(json.dumps(dataclasses.asdict(spec), indent=1) + "\n", encoding="utf-8")
    return spec


def build_decoder(model: Any, checkpoint: Checkpoint, work: Path) -> onnx.ModelProto:
    """The float graph of a model, with the inputs that our decoding loop feeds, without adapter slots.

    Args:
        model: the transformers model of `checkpoint`.
        work: a folder for intermediate files.
    """
    source = checkpoint.folder
    if checkpoint.gguf is not None:
        source = work / "checkpoint"
        model.save_pretrained(source)
        checkpoint.tokenizer().save_pretrained(source)
    _run_builder(source, work / "builder", work / "cache")
    graph = onnx.load(work / "builder" / "model.onnx")
    feed_lengths(graph.graph)
    keep_last_logits(graph.graph)
    return graph


def convert(graph: onnx.ModelProto, precision: Precision) -> None:
    """Bring a float graph to a precision, in place."""
    if precision == "fp16":
        _store_half(graph.graph)
    elif precision in ("int8", "int4"):
        quantize_decoder(graph, 8 if precision == "int8" else 4)


def measure_distance(reference: Path, graph: Path, spec: BaseSpec, prompts: Sequence[Sequence[int]]) -> Distance:
    """KL divergence and top-1 agreement of a graph against the float graph, over all positions of prompts."""
    device = choose_device("cpu")
    decoders = [Decoder(path, spec, device) for path in (reference, graph)]
    kl, agree, positions = 0.0, 0, 0
    for ids in prompts:
        exact, near = (d.start(_NO_ADAPTER, len(ids)).forward(ids, kept=len(ids)) for d in decoders)
        p, q = log_softmax(exact), log_softmax(near)
        kl += float((np.exp(p) * (p - q)).sum())
        agree += int((p.argmax(-1) == q.argmax(-1)).sum())
        positions += len(ids)
    return Distance(kl / positions, agree / positions, len(prompts), positions)


def calibration_prompts() -> list[str]:
    """Prompts of many kinds, one a line, on which distances are measured."""
    text = (resources.files("edgecompose_export") / "prompts.txt").read_text(encoding="utf-8")
    return [line.replace("\\n", "\n") for line in text.splitlines() if line]


def read_base_spec(folder: Path) -> BaseSpec:
    """The description that `export_base` wrote."""
    path = folder / SPEC_FILE
    if not path.is_file():
        raise ExportError(f"'{folder}' holds no {SPEC_FILE}; make it with 'edgecompose-export base'")
    return value_from_json(BaseSpec, read_json(path), SPEC_FILE)


def _run_builder(source: Path, output: Path, cache: Path) -> None:
    command = [
        sys.executable, "-m", "onnxruntime_genai.models.builder",
        "-i", str(source), "-o", str(output), "-p", "fp32", "-e", "cpu", "-c", str(cache),
        "--extra_options", "hf_remote=false",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode or not (output / "model.onnx").is_file():
        reason = finished.stderr.strip().splitlines()[-1:] or ["no reason given"]
        kind = ", ".join(read_json(source / "config.json").get("architectures") or ["unnamed"])
        raise ExportError(f"onnxruntime-genai's builder cannot export '{source.name}' ({kind}): {reason[0]}")


def _describe(
    model: Any, slots: tuple[SlotGroup, ...], checkpoint: Checkpoint, precision: str, template: str | None
) -> BaseSpec:
    config = model.config
    head, query, key = _head_widths(config)
    tokenizer = checkpoint.tokenizer()
    configured = getattr(model.generation_config, "eos_token_id", None)
    # a model that begins another text or turn has ended its answer, so the first token ends one too
    ends = {tokenizer.eos_token_id, tokenizer.bos_token_id} | set(
        configured if isinstance(configured, list) else [configured]
    )
    source = checkpoint.gguf or checkpoint.folder.name
    return BaseSpec(
        graph="decoder.onnx", tokenizer="tokenizer.json", identity=checkpoint.identity(), precision=precision,
        context=int(config.max_position_embeddings), kv_heads=key // head, head_size=head,
        vocabulary=int(config.vocab_size), end_tokens=tuple(sorted(int(e) for e in ends if e is not None)), slots=slots,
        chat_template=None if template is None else "chat_template.jinja", source=source,
        architecture=str(config.model_type),
    )  # fmt: skip


def _head_widths(config: Any) -> tuple[int, int, int]:
    """Head size, and output widths of the query and key projections."""
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return head, heads * head, int(getattr(config, "num_key_value_heads", None) or heads) * head


def _holds_in_half(graph: Path, spec: BaseSpec, prompts: Sequence[Sequence[int]]) -> bool:
    """Whether the float graph bears attention in float16, whose numbers end at 65504 (CPUs have that kernel too)."""
    halved = graph.with_name(write_cuda_graph(graph))
    return measure_distance(graph, halved, spec, prompts).kl <= LARGEST_HALF_KL


def _write_cuda_graphs(output: Path, spec: BaseSpec) -> BaseSpec:
    """Write the decoders for CUDA, and name them."""
    folding = spec.folding
    if folding is not None:
        folded = write_cuda_graph(output / folding.decoder_graph)
        folding = dataclasses.replace(folding, cuda_decoder_graph=folded)
    return dataclasses.replace(spec, folding=folding, cuda_graph=write_cuda_graph(output / spec.graph))


def _store_half(graph: onnx.GraphProto) -> None:
    """Keep large float32 weights as float16 and widen them in the graph, in place.

    The file is half the size; arithmetic stays in float32 (ONNX Runtime folds the casts when it loads).
    """
    halves = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and 0 not in tensor.dims:
            half = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), f"{tensor.name}.half")
            halves.append((tensor.name, half))
    names = {name for name, _ in halves}
    kept = [t for t in graph.initializer if t.name not in names]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *(half for _, half in halves)])
    for name, half in halves:
        graph.node.insert(0, helper.make_node("Cast", [half.name], [name], f"{name}/Widen", to=TensorProto.FLOAT))


def _check_parity(model: Any, graph: Path, spec: BaseSpec, prompts: Sequence[Sequence[int]]) -> None:
    import torch

    decoder = Decoder(graph, spec, choose_device("cpu"))
    for ids in prompts:
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].float().numpy()
        found = decoder.start(_NO_ADAPTER, len(ids)).forward(ids, kept=len(ids))
        error = float(np.abs(wanted - found).max())
        if not error <= LARGEST_LOGIT_ERROR:
            raise ExportError(
                f"the float graph's logits differ from transformers' by {error:.2g}, "
                f"{LARGEST_LOGIT_ERROR} at most is wanted; this architecture is not exported faithfully"
            )


def _render(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if tokenizer.has_chat_template:
        prompt = tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def _write_template(output: Path, template: str | None) -> None:
    if template is not None:
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")


def save_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph, and its tensors into a data file beside it: those are mapped into memory and not copied."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    copy = onnx.ModelProto.FromString(graph.SerializeToString()) if graph.ByteSize() < 1 << 31 else graph
    onnx.save(copy, path, save_as_external_data=True, location=data.name, size_threshold=1024)
    store_reshaped(path)


def store_reshaped(path: Path) -> None:
    """Replace each reshaping of a stored tensor by a stored tensor over the same bytes of the data file.

    ONNX Runtime would reshape it once, into a copy that it keeps.
    """
    model = onnx.load(path, load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = [n for n in model.graph.node if n.op_type == "Reshape" and all(name in stored for name in n.input)]
    for node in found:
        tensor, shape = stored[node.input[0]], numpy_helper.to_array(stored[node.input[1]])
        if tensor.data_location == TensorProto.EXTERNAL and shape.min() > 0:
            copy = TensorProto.FromString(tensor.SerializeToString())
            copy.name, copy.dims[:] = node.output[0], shape.tolist()
            model.graph.initializer.append(copy)
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    for tensor in [t for t in model.graph.initializer if t.name not in read]:
        model.graph.initializer.remove(tensor)
    path.write_bytes(model.SerializeToString())
