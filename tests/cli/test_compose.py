"""The command `compose`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgecompose import MergeSettings, Request, open_bundle
from tests.cli.calls import PROMPT, RETRIEVAL_KEYS, call, fault_of, result_of
from tests.fixtures_tiny import ADAPTERS, TinyZoo


def test_compose_writes_a_peft_folder_once(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "blend"
    result = result_of("compose", bundle, PROMPT, "-o", output, "--neighbours", 9)
    assert set(result) == {"prompt", "files", "method", *RETRIEVAL_KEYS, "ranks", "composition", "merge"}
    assert result["files"] == [str(output / "adapter_config.json"), str(output / "adapter_model.safetensors")]
    assert all(Path(name).is_file() for name in result["files"])
    assert result["ranks"]["q_proj"] == sum(ADAPTERS[n]["r"] for n in result["weights"] if n != "colours")
    assert "already holds adapter_config.json" in fault_of("compose", bundle, PROMPT, "-o", output)
    text = call("compose", bundle, PROMPT, "-o", tmp_path / "other")
    assert f"written       {tmp_path / 'other'}" in text.stdout


def test_compose_writes_a_whole_model(zoo: TinyZoo, bundle: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    source, output = zoo.model("llama"), tmp_path / "deep" / "model"
    expected = ("--format", "merged", "--checkpoint", source, "-o", output)
    result = result_of("compose", bundle, PROMPT, "--adapter", "animals=1", *expected)
    assert {Path(name).name for name in result["files"]} == {path.name for path in source.iterdir()}
    assert all(Path(name).is_file() for name in result["files"])
    model = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True).eval()
    with open_bundle(bundle, device="cpu") as composer:
        ids = composer.model.tokenizer.encode("the cat sat on a blue mat, twice")
        merged = composer.compose(PROMPT, Request(weights={"animals": 1.0})).merged
        ours = composer.model.decoder.start(merged, len(ids)).forward(ids, rows=len(ids)).copy()
    with torch.no_grad():
        assert np.abs(ours - model(torch.tensor([ids])).logits[0].numpy()).max() <= 1e-3
    assert "exists" in fault_of("compose", bundle, PROMPT, *expected)
    other = ("--checkpoint", zoo.model("qwen3"), "-o", tmp_path / "x")
    assert "base was exported from" in fault_of("compose", bundle, PROMPT, "--format", "merged", *other)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize(
    "options", [("--format", "merged"), ("--checkpoint", "x"), ("--format", "gguf", "--checkpoint", "x")], ids=" ".join
)
def test_a_model_and_its_checkpoint_need_each_other(bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = call("compose", bundle, PROMPT, "-o", tmp_path / "out", *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--checkpoint FOLDER goes with --format merged; give both or neither" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--neighbours", 13, "--nucleus", 1),
        ("--adapter", "animals=0.8", "--adapter", "numbers=-0.3", "--adapter", "colours=1.4"),
        ("--adapter", "animals=1.5", "--method", "linear"),
        ("--adapter", "colours=1", "--method", "ties"),
    ],
    ids=["retrieved", "by hand", "linear", "one layer"],
)
def test_a_composed_folder_gives_peft_the_logits_of_the_decoder(
    zoo: TinyZoo, bundle: Path, tmp_path: Path, options: tuple[object, ...]
) -> None:
    import peft
    import torch
    import transformers

    result = result_of("compose", bundle, PROMPT, "-o", tmp_path / "blend", *options)
    base = transformers.AutoModelForCausalLM.from_pretrained(zoo.model("llama"), local_files_only=True)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "blend").eval()
    with open_bundle(bundle, device="cpu") as composer:
        ids = composer.model.tokenizer.encode("the cat sat on a blue mat, twice")
        settings = MergeSettings(result["method"])
        merged = composer.compose(PROMPT, Request(weights=result["weights"], merge=settings)).merged
        assert merged.digest == result["composition"]
        blends = (merged, composer.blends.merger.merge([], [], settings))
        ours, plain = (composer.model.decoder.start(b, len(ids)).forward(ids, rows=len(ids)).copy() for b in blends)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(ours - theirs).max() <= 1e-3
    assert np.abs(ours - plain).max() > 0.1
