"""LoRA fine-tuning of a base on the examples of one task; the result is a PEFT folder.

Loss and logits are computed for the answer alone: the output layer of a small model costs as much as all its blocks.
Each example has the form that `edgecompose run` sends (chat template), the raw form, or both alternately.
"""

from __future__ import annotations

import errno
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from edgecompose.bundle.atomic import files_together
from edgecompose.bundle.lock import lock
from edgecompose.errors import ExportError
from edgecompose.formats.lora import CONFIG_FILE
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose.guard.filesystem import naming
from edgecompose.retrieval.examples import Example
from edgecompose_export.base.checkpoint import load_model
from edgecompose_export.base.source import Base
from edgecompose_export.training.batches import (
    Encoded,
    PromptForm,
    TrainSettings,
    encode_example,
    learning_rate_at,
    plan_batches,
)
from edgecompose_export.training.state import STATE_FILE, TrainingRun, digest_of

REPORT_FILE = "training.json"
#: Steps between two saved states.
_SAVE_EVERY = 20


def train_adapter(
    base: Base,
    examples: Sequence[Example],
    output: Path,
    settings: TrainSettings,
    *,
    advance: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Fine-tune LoRA factors on all linear layers and write a PEFT folder to `output`.

    A run is resumable: a call with the same settings continues from the last saved step.

    Args:
        advance: called after each step with (steps done, steps in all, loss of the step).

    Returns:
        The report, as written to `training.json`.

    Raises:
        ExportError: no example is short enough, the loss stopped being a number, or `output`
            holds the state of a run with other settings.
        InUse: another process is training to `output`.
        OSError: something cannot be written; the last saved state stays.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with naming(output), lock(output):
        return _train(base, examples, output, settings, advance)


def _train(
    base: Base,
    examples: Sequence[Example],
    output: Path,
    settings: TrainSettings,
    advance: Callable[[int, int, float], None],
) -> dict[str, Any]:
    import torch

    torch.manual_seed(settings.seed)
    tokenizer, end = base_tokenizer(base), _end(base)
    sequences = [_forms(tokenizer, example, settings.prompt_form, end=end) for example in examples]
    short = [forms for forms in sequences if all(len(form.ids) <= settings.max_length for form in forms)]
    if not short:
        raise ExportError(f"no example is at most {settings.max_length} tokens long; raise --max-length")
    output.mkdir(exist_ok=True)
    plan = plan_batches(short, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _with_lora(load_model(base), settings).to(device).train()
    if device == "cpu":  # the fused attention's backward on CPUs takes a sixth of a step at these lengths
        model.set_attn_implementation("eager")
    report = {
        "base": base.identity,
        "data": digest_of(examples),
        "examples": len(short),
        "left_out": len(sequences) - len(short),
        "steps": len(plan),
        **asdict(settings),
    }
    losses = _run(
        model, plan, output / STATE_FILE, report=report, peak=settings.learning_rate, end=end, advance=advance
    )
    tail = losses[-max(1, len(losses) // 10) :]
    report |= {"final_loss": sum(tail) / len(tail), "precision": _precision(device)[0]}
    with files_together(output, last=CONFIG_FILE) as work:
        _save_adapter(model, work)
        (work / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / STATE_FILE).unlink(missing_ok=True)
    return report


def _save_adapter(model: Any, folder: Path) -> None:
    """Write the PEFT folder of a model.

    Raises:
        OSError: it cannot be written.
    """
    try:
        model.save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:  # what the library makes of a full disk
        raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(folder)) from error


def _run(
    model: Any,
    plan: Sequence[Sequence[Encoded]],
    state: Path,
    *,
    report: dict[str, Any],
    peak: float,
    end: int,
    advance: Callable[[int, int, float], None],
) -> list[float]:
    """Run the steps of the plan that are not in the saved state; return the losses of all steps."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak, weight_decay=0.0)
    run = TrainingRun(report, losses=[], parameters=trained, optimizer=optimizer)
    run.resume(state)
    for step in range(len(run.losses), len(plan)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(plan), peak)
        loss = _loss(model, plan[step], pad=end)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.losses.append(float(loss.detach()))
        if not math.isfinite(run.losses[-1]):
            raise ExportError(f"the loss of step {step} is {run.losses[-1]}; lower --learning-rate")
        if (step + 1) % _SAVE_EVERY == 0:
            run.save(state)
        advance(step + 1, len(plan), run.losses[-1])
    return run.losses


def base_tokenizer(base: Base) -> Tokenizer:
    """The tokenizer of a base for the runtime's class."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tokenizer.json")
        base.tokenizer.write(path)
        return Tokenizer(path, chat_template=base.tokenizer.template)


def _end(base: Base) -> int:
    end = base.tokenizer.token_id(base.tokenizer.eos)
    if end is None:
        raise ExportError("the tokenizer names no end-of-text token, so an answer could never end")
    return end


def _forms(tokenizer: Tokenizer, example: Example, form: PromptForm, *, end: int) -> list[Encoded]:
    chats = {"chat": [True], "raw": [False], "both": [True, False]}[form]
    return [encode_example(tokenizer, example, chat=chat, end=end) for chat in chats]


def _with_lora(model: Any, settings: TrainSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _precision(device: str) -> tuple[str, Any]:
    """bfloat16 where the device multiplies in it, else float32 (emulated bf16 is 80 times slower)."""
    import torch

    fast = device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bf16()
    return ("bf16", torch.bfloat16) if fast else ("fp32", torch.float32)


def _cpu_has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="utf-8")


def _loss(model: Any, batch: Sequence[Encoded], *, pad: int) -> Any:
    """Mean cross-entropy of the answers' tokens in a left-padded batch."""
    import torch

    device = model.device.type
    width = max(len(s.ids) for s in batch)
    keep = max(s.answer for s in batch) + 1
    ids = torch.tensor([[pad] * (width - len(s.ids)) + list(s.ids) for s in batch], device=device)
    mask = torch.tensor([[0] * (width - len(s.ids)) + [1] * len(s.ids) for s in batch], device=device)
    targets = torch.tensor([[-100] * (keep - 1 - s.answer) + list(s.ids[-s.answer :]) for s in batch], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    name, dtype = _precision(device)
    with torch.autocast(device, dtype=dtype, enabled=name == "bf16"):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep).logits
    return torch.nn.functional.cross_entropy(
        logits[:, -keep:-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100
    )
