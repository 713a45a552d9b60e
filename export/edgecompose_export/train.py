"""LoRA fine-tuning of the base on one task's examples; the result is a PEFT folder.

The loss is on the answer alone, and so are the logits: the output layer of a small model costs as
much as all its blocks. Every example is seen in the form that `edgecompose run` will send
(chat template), in the raw form, or in both by turns.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgecompose.errors import ExportError
from edgecompose.generation.tokenizer import Tokenizer
from edgecompose_export.base_source import Base
from edgecompose_export.checkpoint import load_model
from edgecompose_export.datasets import Example

PromptForm = Literal["chat", "raw", "both"]
PROMPT_FORMS: tuple[PromptForm, ...] = get_args(PromptForm)
STATE_FILE = "training-state.pt"
REPORT_FILE = "training.json"


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What decides the outcome of a training run; kept in the report beside the adapter.

    `alpha` / `rank` is the LoRA scale; `learning_rate` is the peak of a cosine with 6 % warm-up;
    `max_length` is in tokens, longer examples being left out; `batch` is in examples.
    """

    rank: int = 8
    alpha: int = 16
    epochs: int = 2
    learning_rate: float = 1e-3
    batch: int = 8
    max_length: int = 512
    prompt_form: PromptForm = "both"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and answer; `answer` is how many ids at the end are the answer."""

    ids: tuple[int, ...]
    answer: int


def encode_example(tokenizer: Tokenizer, example: Example, *, chat: bool, end: int) -> Encoded:
    """Ids of one example in one form, closed by the end-of-text id."""
    if chat:
        prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": example.prompt}]))
        answer = tokenizer.encode_continuation(example.answer)
    else:
        prompt = tokenizer.encode_prompt(example.prompt)
        answer = tokenizer.encode_continuation(" " + example.answer)
    return Encoded((*prompt, *answer, end), len(answer) + 1)


def plan_batches(sequences: Sequence[Sequence[Encoded]], settings: TrainSettings) -> list[list[Encoded]]:
    """All batches of all epochs, in order; the same for the same settings and data.

    Args:
        sequences: for each example its forms (one, or chat and raw); epoch e takes form (i + e) mod forms.
    """
    rng = random.Random(settings.seed)
    plan: list[list[Encoded]] = []
    for epoch in range(settings.epochs):
        chosen = [forms[(i + epoch) % len(forms)] for i, forms in enumerate(sequences)]
        rng.shuffle(chosen)
        window = settings.batch * 8  # neighbours in length share a batch, so padding stays small
        batches: list[list[Encoded]] = []
        for start in range(0, len(chosen), window):
            part = sorted(chosen[start : start + window], key=lambda s: len(s.ids))
            batches += [part[i : i + settings.batch] for i in range(0, len(part), settings.batch)]
        rng.shuffle(batches)
        plan += batches
    return plan


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 6 % of the steps, then a cosine down to a tenth of the peak."""
    warmup = max(1, round(0.06 * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train_adapter(
    base: Base,
    examples: Sequence[Example],
    output: Path,
    settings: TrainSettings,
    *,
    advance: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> dict[str, Any]:
    """Fine-tune LoRA factors on all linear layers and write a PEFT folder to `output`.

    A run that was stopped goes on from its last saved step when called again with the same settings.

    Args:
        advance: called after each step with (steps done, steps in all, loss of the step).

    Returns:
        The report, as written to `training.json`.

    Raises:
        ExportError: no example is short enough, the loss stopped being a number, or `output`
            holds the state of a run with other settings.
    """
    import torch

    torch.manual_seed(settings.seed)
    output.mkdir(parents=True, exist_ok=True)
    tokenizer, end = base_tokenizer(base), _end(base)
    forms = [_forms(tokenizer, example, settings.prompt_form, end) for example in examples]
    kept = [f for f in forms if all(len(s.ids) <= settings.max_length for s in f)]
    if not kept:
        raise ExportError(f"no example is at most {settings.max_length} tokens long; raise --max-length")
    plan = plan_batches(kept, settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _with_lora(load_model(base), settings).to(device).train()
    if device == "cpu":  # the fused attention's backward on CPUs takes a sixth of a step at these lengths
        model.set_attn_implementation("eager")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    report = {
        "base": base.identity,
        "data": _digest(examples),
        "examples": len(kept),
        "left_out": len(forms) - len(kept),
        "steps": len(plan),
        **asdict(settings),
    }
    losses = _resume(output / STATE_FILE, report, trained, optimizer)
    for step in range(len(losses), len(plan)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(plan), settings.learning_rate)
        loss = _step(model, plan[step], end, device)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise ExportError(f"the loss of step {step} is {losses[-1]}; lower --learning-rate")
        if (step + 1) % 20 == 0:
            _save_state(output / STATE_FILE, report, losses, trained, optimizer)
        advance(step + 1, len(plan), losses[-1])
    model.save_pretrained(output, safe_serialization=True)
    tail = losses[-max(1, len(losses) // 10) :]
    report |= {"final_loss": sum(tail) / len(tail), "precision": _precision(device)[0]}
    (output / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / STATE_FILE).unlink(missing_ok=True)
    return report


def _digest(examples: Sequence[Example]) -> str:
    """sha256 of all prompts and answers, so that a run is resumed on its own data only."""
    return hashlib.sha256(repr([(e.prompt, e.answer) for e in examples]).encode()).hexdigest()


def base_tokenizer(base: Base) -> Tokenizer:
    """The tokenizer of a base, as the runtime has it."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tokenizer.json")
        base.tokenizer.write(path)
        return Tokenizer(path, chat_template=base.tokenizer.template)


def _end(base: Base) -> int:
    end = base.tokenizer.token_id(base.tokenizer.eos)
    if end is None:
        raise ExportError("the tokenizer names no end-of-text token, so an answer could never end")
    return end


def _forms(tokenizer: Tokenizer, example: Example, form: PromptForm, end: int) -> list[Encoded]:
    chats = {"chat": [True], "raw": [False], "both": [True, False]}[form]
    return [encode_example(tokenizer, example, chat=chat, end=end) for chat in chats]


def _with_lora(model: Any, settings: TrainSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, bias="none",
        target_modules="all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def _precision(device: str) -> tuple[str, Any]:
    """bfloat16 where the device multiplies in it, else float32 (emulated bf16 is 80 times slower)."""
    import torch

    fast = device == "cuda" or torch.backends.cpu.get_cpu_capability() == "AVX512" and _cpu_has_bf16()
    return ("bf16", torch.bfloat16) if fast else ("fp32", torch.float32)


def _cpu_has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    return info.is_file() and "avx512_bf16" in info.read_text(encoding="utf-8")


def _step(model: Any, batch: Sequence[Encoded], pad: int, device: str) -> Any:
    """Mean cross-entropy of the answers' tokens in a left-padded batch."""
    import torch

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


def _save_state(path: Path, report: dict[str, Any], losses: list[float], trained: list[Any], optimizer: Any) -> None:
    import torch

    state = {
        "report": report, "losses": losses, "parameters": [p.detach().cpu() for p in trained],
        "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def _resume(path: Path, report: dict[str, Any], trained: list[Any], optimizer: Any) -> list[float]:
    import torch

    if not path.is_file():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known = state["report"]
    except Exception as error:  # torch raises classes of all kinds on damaged files
        raise ExportError(f"'{path}' cannot be read ({error}); delete it to begin again") from error
    if known != report:
        different = sorted(k for k in report if report[k] != known.get(k))
        raise ExportError(
            f"'{path.parent}' holds an unfinished run with other {', '.join(different)}; "
            "use the same settings to go on, or another folder"
        )
    with torch.no_grad():
        for parameter, saved in zip(trained, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
