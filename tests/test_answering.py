"""An answer: in the chat template where a raw prompt gets none."""

from __future__ import annotations

import json
from pathlib import Path

from edgecompose import open_bundle
from tests.cli.calls import PROMPT, call, result_of


def test_a_raw_prompt_without_an_answer_is_sent_in_the_chat_template(bundle_copy: Path) -> None:
    path = bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["defaults"]["prompt_form"] = "raw"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    assert result_of("run", bundle_copy, PROMPT)["prompt_form"] == "raw"
    chat = result_of("run", bundle_copy, PROMPT, "--chat")
    with open_bundle(bundle_copy, device="cpu") as composer:
        ids = composer.model.tokenizer.encode(PROMPT)
        decoding = composer.model.decoder.start(composer.compose(PROMPT).merged, len(ids))
        manifest["base"]["end_tokens"].append(int(decoding.forward(ids)[0].argmax()))
    path.write_text(json.dumps(manifest), encoding="utf-8")
    result = result_of("run", bundle_copy, PROMPT)
    assert (result["prompt_form"], chat["prompt_form"]) == ("chat", "chat")
    assert result["answer"] and chat["answer"].startswith(result["answer"])
    assert result["tokens"]["prompt"] == chat["tokens"]["prompt"]
    raw = result_of("run", bundle_copy, PROMPT, "--raw")
    assert (raw["answer"], raw["prompt_form"], raw["tokens"]["generated"]) == ("", "raw", 0)
    assert "in the chat template" in call("run", bundle_copy, PROMPT, "--explain").stderr
