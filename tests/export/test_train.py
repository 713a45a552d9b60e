"""Training learns, covers the data, and goes on after an interruption as if there had been none."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("peft", reason="a package of edgecompose-export")

import peft
import torch
import transformers
from safetensors.torch import load_file

from edgecompose.adapters import convert_adapter
from edgecompose.errors import ExportError
from edgecompose.retrieval.examples import Example
from edgecompose_export.base.checkpoint import load_model
from edgecompose_export.base.source import open_base
from edgecompose_export.training.batches import Encoded, TrainSettings, encode_example, learning_rate_at, plan_batches
from edgecompose_export.training.state import STATE_FILE
from edgecompose_export.training.train import base_tokenizer, train_adapter
from tests import tiny
from tests.fixtures_tiny import TinyZoo

pytestmark = pytest.mark.slow

EXAMPLES = [Example(f"{a} and {b}?", "yes" if a < b else "no") for a in range(4) for b in range(3)]
#: 3 steps an epoch.
SETTINGS = TrainSettings(rank=2, alpha=4, epochs=2, learning_rate=1e-2, batch=4, max_length=64, prompt_form="chat")
#: 24 steps, so that the state of step 20 is saved.
LONG = TrainSettings(rank=2, alpha=4, epochs=8, learning_rate=3e-3, batch=4, max_length=64)


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    """On a GPU sums are not the same twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


class Stop(BaseException):
    """Stands for a signal: nobody may catch it."""


def stop_at(last: int) -> Any:
    def advance(step: int, steps: int, loss: float) -> None:
        if step == last:
            raise Stop

    return advance


def train(zoo: TinyZoo, output: Path, settings: TrainSettings = SETTINGS, **other: Any) -> dict[str, Any]:
    return train_adapter(open_base(zoo.model("llama")), other.pop("examples", EXAMPLES), output, settings, **other)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_the_learning_rate_rises_then_falls_to_a_tenth(steps: int) -> None:
    rates = [learning_rate_at(step, steps, 2.0) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    top = rates.index(max(rates))
    assert rates[top] == 2.0
    assert top <= max(1, 0.06 * steps)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates[top:]) >= 0.2
    assert learning_rate_at(steps, steps, 2.0) == pytest.approx(0.2) or steps == 1


def sequences(count: int, forms: int) -> list[list[Encoded]]:
    return [[Encoded((i, form) * (1 + i % 7), 1) for form in range(forms)] for i in range(count)]


@pytest.mark.parametrize("count", [1, 4, 5, 37, 100])
@pytest.mark.parametrize("forms", [1, 2])
def test_each_epoch_sees_each_example_once_and_its_forms_by_turns(count: int, forms: int) -> None:
    settings = TrainSettings(epochs=3, batch=4, seed=1)
    plan = plan_batches(sequences(count, forms), settings)
    assert len(plan) == 3 * math.ceil(count / 4)
    assert all(1 <= len(batch) <= 4 for batch in plan)
    for epoch in range(3):
        part = plan[epoch * len(plan) // 3 : (epoch + 1) * len(plan) // 3]
        seen = Counter(encoded.ids[:2] for batch in part for encoded in batch)
        assert seen == {(i, (i + epoch) % forms): 1 for i in range(count)}


def test_the_seed_decides_the_plan() -> None:
    data = sequences(50, 2)
    plans = [plan_batches(data, TrainSettings(seed=seed)) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


def test_neighbours_in_length_share_a_batch() -> None:
    plan = plan_batches(sequences(64, 1), TrainSettings(epochs=1, batch=8))
    spread = [len({len(encoded.ids) for encoded in batch}) for batch in plan]
    assert max(spread) <= 3


def test_an_example_is_encoded_as_run_will_send_it(zoo: TinyZoo, tmp_path: Path) -> None:
    tokenizer = base_tokenizer(open_base(zoo.model("llama")))
    example, end = Example("two and two?", "four"), tiny.VOCABULARY - 1
    raw = encode_example(tokenizer, example, chat=False, end=end)
    assert raw.ids[-1] == end
    assert tokenizer.decode(raw.ids) == "two and two? four"
    assert tokenizer.decode(raw.ids[-raw.answer :]) == " four"
    chat = encode_example(tokenizer, example, chat=True, end=end)
    prompt = tokenizer.encode(tokenizer.chat([{"role": "user", "content": "two and two?"}]))
    assert list(chat.ids) == [*prompt, *tokenizer.encode("four"), end]
    assert chat.answer == len(tokenizer.encode("four")) + 1


def test_a_few_steps_lower_the_loss(zoo: TinyZoo, tmp_path: Path) -> None:
    losses: list[float] = []
    report = train(zoo, tmp_path / "lora", advance=lambda step, steps, loss: losses.append(loss))
    assert len(losses) == report["steps"] == 6
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert report["final_loss"] == losses[-1]
    assert (report["examples"], report["left_out"], report["rank"]) == (12, 0, 2)
    assert json.loads((tmp_path / "lora/training.json").read_text(encoding="utf-8")) == report
    assert not (tmp_path / "lora" / STATE_FILE).exists()
    weights = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert all(tensor.any() for tensor in weights.values())


def test_the_folder_is_one_that_peft_and_the_export_read(zoo: TinyZoo, tmp_path: Path) -> None:
    train(zoo, tmp_path / "lora")
    base = transformers.AutoModelForCausalLM.from_pretrained(zoo.model("llama"), local_files_only=True)
    peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    made = convert_adapter(tmp_path / "lora", zoo.base("llama").spec, tmp_path / "lora.safetensors")
    assert made.spec.rank == 2
    assert set(made.errors) == {group.name for group in zoo.base("llama").spec.slots}
    assert made.spec.source["training"]["steps"] == 6


def test_padding_changes_nothing(zoo: TinyZoo, tmp_path: Path) -> None:
    """A long prompt in the batch leaves the loss of a short one alone."""
    from edgecompose_export.training.train import _loss

    tokenizer = base_tokenizer(open_base(zoo.model("llama")))
    model = load_model(open_base(zoo.model("llama")))
    examples = [Example("short", "yes"), Example("a much longer prompt than that " * 3, "no way")]
    encoded = [encode_example(tokenizer, e, chat=True, end=299) for e in examples]
    with torch.no_grad():
        alone = [float(_loss(model, [e], pad=299)) for e in encoded]
        both = float(_loss(model, encoded, pad=299))
    mean = sum(loss * e.answer for loss, e in zip(alone, encoded, strict=True)) / sum(e.answer for e in encoded)
    assert both == pytest.approx(mean, rel=1e-2)


@pytest.mark.parametrize("last", [7, 20, 23])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(zoo: TinyZoo, tmp_path: Path, last: int) -> None:
    whole = train(zoo, tmp_path / "whole", LONG)
    with pytest.raises(Stop):
        train(zoo, tmp_path / "parts", LONG, advance=stop_at(last))
    assert (tmp_path / "parts" / STATE_FILE).exists() == (last >= 20)
    steps: list[int] = []
    report = train(zoo, tmp_path / "parts", LONG, advance=lambda step, of, loss: steps.append(step))
    assert steps == list(range(21 if last >= 20 else 1, 25))
    assert report["final_loss"] == pytest.approx(whole["final_loss"], rel=1e-5)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert set(one) == set(other)
    assert all(torch.allclose(one[key], other[key], atol=1e-6) for key in one)


@pytest.fixture(scope="module")
def unfinished(zoo: TinyZoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its state was saved."""
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.raises(Stop):
        train(zoo, folder, LONG, advance=stop_at(20))
    return folder


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"seed": 5}, "seed"),
        ({"rank": 3}, "rank"),
        ({"epochs": 9}, "epochs, steps"),
        ({"prompt_form": "raw"}, "prompt_form"),
    ],
)
def test_other_settings_do_not_go_on(
    zoo: TinyZoo, unfinished: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    folder = shutil.copytree(unfinished, tmp_path / "run")
    with pytest.raises(ExportError, match=f"unfinished run with other {named}; use the same settings"):
        train(zoo, folder, dataclasses.replace(LONG, **changes))


def test_other_examples_do_not_go_on(zoo: TinyZoo, unfinished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(unfinished, tmp_path / "run")
    others = [Example(example.prompt, "maybe") for example in EXAMPLES]
    with pytest.raises(ExportError, match="unfinished run"):
        train(zoo, folder, LONG, examples=others)


@pytest.mark.parametrize("content", [b"", b"PK nonsense", b"\x80\x02"])
def test_a_damaged_state_is_refused(zoo: TinyZoo, tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(ExportError, match=STATE_FILE):
        train(zoo, tmp_path)


def test_examples_that_are_too_long_are_left_out_or_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    mixed = [*EXAMPLES, Example("word " * 50, "yes")]
    report = train(zoo, tmp_path / "some", examples=mixed)
    assert (report["examples"], report["left_out"]) == (12, 1)
    with pytest.raises(ExportError, match="no example is at most 64 tokens long; raise --max-length"):
        train(zoo, tmp_path / "none", examples=mixed[-1:])


def test_a_loss_that_is_no_number_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the loss of step \d+ is (nan|inf); lower --learning-rate"):
        train(zoo, tmp_path, dataclasses.replace(SETTINGS, learning_rate=1e30))


def test_a_tokenizer_without_an_end_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.model("llama"), tmp_path / "llama")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("eos_token")
        tiny.write_json(path, values)
    with pytest.raises(ExportError, match="no end-of-text token"):
        train_adapter(open_base(folder), EXAMPLES, tmp_path / "lora", SETTINGS)
