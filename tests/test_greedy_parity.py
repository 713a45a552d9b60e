"""Greedy answers are those of transformers + PEFT, token for token, in float32, on the blends of the demo's pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="parity with PEFT needs the packages of edgecompose-export")

import peft
import torch

from edgecompose import Composer, Request, open_bundle
from edgecompose.engine.merged import MergedAdapter
from edgecompose.formats.peft import write_peft_folder
from edgecompose.generation.decode import decode
from edgecompose.generation.stopping import AnswerText
from edgecompose.request import Attachment
from edgecompose.settings import RetrievalSettings
from edgecompose.timing import Timings
from edgecompose_export.base.checkpoint import load_model
from edgecompose_export.base.source import open_base
from edgecompose_export.calibration.prompts import calibration_prompts

ROOT = Path(__file__).parent.parent
BUNDLE, MODEL = ROOT / "build" / "demo-fp32", ROOT / "build" / "models" / "smollm2-135m-instruct"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BUNDLE / "manifest.json").is_file(), reason="build/demo-fp32 is not built; run 'make bundle-fp32'"
    ),
]
PROMPTS = calibration_prompts()[:20]
TOKENS = 16
#: Every prompt gets the adapters that it is nearest to, however far those are.
REQUEST = Request(retrieval=RetrievalSettings(fallback=0.0, min_resemblance=0.0), max_tokens=TOKENS)


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with open_bundle(BUNDLE, device="cpu") as opened:
        yield opened


@dataclass(frozen=True)
class Case:
    """A prompt, how it is sent, its blend, and what transformers + PEFT answer."""

    prompt: str
    raw: bool
    ids: list[int]
    merged: MergedAdapter
    theirs: list[int]


@pytest.fixture(scope="module")
def cases(composer: Composer, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    reference, result = load_model(open_base(MODEL)), []
    tokenizer, folder = composer.model.tokenizer, tmp_path_factory.mktemp("blends")
    for number, prompt in enumerate(PROMPTS):
        raw = number % 2 == 0
        ids = tokenizer.encode(prompt if raw else tokenizer.chat([{"role": "user", "content": prompt}]))
        merged = composer.compose(prompt, REQUEST).merged
        write_peft_folder(merged, folder / str(number), composer.bundle.manifest.base)
        model = peft.PeftModel.from_pretrained(reference, str(folder / str(number)))
        result.append(Case(prompt, raw, ids, merged, _generate(model, ids, composer.bundle.manifest.base.end_tokens)))
        model.unload()
    return result


@pytest.mark.parametrize("attachment", ["attach", "fuse"])
def test_twenty_prompts(composer: Composer, cases: list[Case], attachment: Attachment) -> None:
    tokenizer, adapters, differ = composer.model.tokenizer, 0, []
    for case in cases:
        blend = composer.model.attach(case.merged, fuse=attachment == "fuse", timings=Timings())
        decoder: Any = composer.model.fused_decoder if attachment == "fuse" else composer.model.decoder
        state = decoder.start(blend, len(case.ids) + TOKENS)
        logits, ends = state.forward(case.ids)[0], composer.bundle.manifest.base.end_tokens
        ours: list[int] = []

        def draw(row: Any, ours: list[int] = ours) -> int:
            ours.append(int(row.argmax()))
            return ours[-1]

        list(decode(state, logits, AnswerText(tokenizer), max_tokens=TOKENS, end_tokens=ends, draw=draw))
        ours = [token for token in ours if token not in ends]
        if ours != case.theirs:
            differ.append((case.prompt, tokenizer.decode(ours), tokenizer.decode(case.theirs)))
        answer = composer.run(case.prompt, dataclasses.replace(REQUEST, raw=case.raw, attachment=attachment))
        text = tokenizer.decode(ours)
        assert answer.text == (text if case.raw else text.lstrip())
        adapters += len(answer.retrieval.weights)
    assert differ == []
    assert (len(cases), adapters > len(cases)) == (20, True)


def _generate(model: Any, ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """Greedy token ids by transformers, without the end token."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        written = model.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
    return [token for token in written[0, len(ids) :].tolist() if token not in ends]
