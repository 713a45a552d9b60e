"""The commands `run` and `retrieve`."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from unittest.mock import ANY

import click
import pytest

from edgecompose import Request, Sampling, open_bundle
from edgecompose.cli.options import read_prompt
from edgecompose.settings import RetrievalSettings
from edgecompose.timing import STAGES
from tests.cli.calls import PROMPT, RETRIEVAL_KEYS, call, fault_of, result_of
from tests.fixtures_tiny import TASKS


def test_an_answer_as_json_has_the_documented_keys(bundle: Path) -> None:
    result = result_of("run", bundle, PROMPT)
    assert set(result) == {
        "prompt",
        "answer",
        "method",
        "attachment",
        "weights",
        "resemblance",
        "neighbours",
        "distribution",
        "device",
        "kv_cache",
        "timings_ms",
        "tokens",
        "finish",
        "prompt_form",
        "composition",
        "merge",
    }
    assert (result["prompt"], result["method"]) == (PROMPT, "product")
    assert sum(result["weights"].values()) == pytest.approx(1)
    assert sum(result["distribution"].values()) == pytest.approx(1)
    assert set(result["weights"]) <= set(result["distribution"]) <= set(TASKS)
    assert len(result["neighbours"]) == 4
    assert result["neighbours"][0] == {"task": "animals", "key": 0, "similarity": pytest.approx(1, abs=2e-3)}
    assert set(result["device"]) == {"kind", "providers", "reason"}
    assert result["device"]["kind"] in ("cpu", "cuda")
    assert result["device"]["providers"][-1] == "CPUExecutionProvider"
    assert result["device"]["reason"]
    assert tuple(result["timings_ms"]) == STAGES
    assert {"embed", "retrieve", "weigh", "merge", "fuse", "prefill", "decode", "total"} <= set(STAGES)
    assert all(math.isfinite(elapsed) and elapsed >= 0 for elapsed in result["timings_ms"].values())
    assert result["timings_ms"]["total"] >= max(result["timings_ms"][stage] for stage in STAGES[:-1])
    assert set(result["tokens"]) == {"prompt", "generated", "dropped", "drafted", "accepted"}
    assert result["finish"] in ("stop", "length")
    assert len(result["composition"]) == 64


def test_choices_are_scored(bundle: Path) -> None:
    result = result_of("run", bundle, PROMPT, "--choices", "yes, no", "--choice", "well, maybe")
    assert list(result["choices"]) == ["yes", "no", "well, maybe"]
    assert result["answer"] == max(result["choices"], key=result["choices"].__getitem__)
    assert all(score < 0 for score in result["choices"].values())


def test_the_answer_alone_is_on_standard_output(bundle: Path) -> None:
    answer = result_of("run", bundle, PROMPT)["answer"]
    plain, explained = call("run", bundle, PROMPT), call("run", bundle, PROMPT, "--explain")
    assert plain.exit_code == explained.exit_code == 0
    assert plain.stdout == explained.stdout == f"{answer}\n"
    assert plain.stderr == ""
    for word in ("neighbours", "tasks", "adapters", "animals", "method", "device", "tokens", "time (ms)"):
        assert word in explained.stderr
    scored = call("run", bundle, PROMPT, "--choices", "yes,no", "--explain")
    assert scored.stdout in ("yes\n", "no\n")
    assert "choices" in scored.stderr


def test_a_blend_is_fused_on_request(bundle: Path, bundle_copy: Path) -> None:
    attached, fused = result_of("run", bundle, PROMPT), result_of("run", bundle, PROMPT, "--fuse")
    assert result_of("run", bundle, PROMPT, "--fold")["attachment"] == "fuse"
    assert (attached["attachment"], fused["attachment"]) == ("attach", "fuse")
    assert fused["answer"] == attached["answer"]
    assert "attached" in call("run", bundle, PROMPT, "--explain").stderr
    assert "fused" in call("run", bundle, PROMPT, "--explain", "--fuse").stderr
    assert result_of("inspect", bundle)["base"]["fuse"] is True
    assert "can be fused" in call("inspect", bundle).stdout
    path = bundle_copy / "manifest.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    result["base"] |= {"precision": "int8", "fusing": None}
    path.write_text(json.dumps(result), encoding="utf-8")
    assert "fusing needs a float base; this bundle's base is int8" in fault_of("run", bundle_copy, PROMPT, "--fuse")
    assert "can be fused" not in call("inspect", bundle_copy).stdout


def test_standard_input_is_read(bundle: Path) -> None:
    expected = result_of("run", bundle, "l'été, 猫")
    for stdin in ("l'été, 猫", "l'été, 猫\n"):
        result = result_of("run", bundle, "-", stdin=stdin.encode())
        assert (result["prompt"], result["answer"]) == (expected["prompt"], expected["answer"])
    assert result_of("retrieve", bundle, "-", stdin=PROMPT.encode())["prompt"] == PROMPT
    assert "standard input is not UTF-8" in fault_of("run", bundle, "-", stdin=b"caf\xe9")


def test_a_prompt_is_piped_into_the_commands(bundle: Path, tmp_path: Path) -> None:
    for command in ("run", "retrieve"):
        assert result_of(command, bundle, stdin=f"{PROMPT}\r\n".encode())["prompt"] == PROMPT
    result_of("compose", bundle, "-o", tmp_path / "blend", stdin=PROMPT.encode())
    assert result_of("run", bundle, PROMPT, stdin=b"something else")["prompt"] == PROMPT
    assert result_of("run", bundle, stdin=b"\xef\xbb\xbfhello")["prompt"] == "hello"


def test_a_prompt_that_is_missing_is_a_wrong_call(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("run", "retrieve"):
        done = call(command, bundle, stdin=b"\n")
        assert done.exit_code == 2 and "standard input is empty; give the prompt as an argument" in done.stderr
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    with pytest.raises(click.UsageError, match="give it as an argument, or pipe text into the command"):
        read_prompt(None)


def test_every_option_reaches_the_composer(bundle: Path) -> None:
    retrieval: tuple[object, ...] = ("--neighbours", 9, "--nucleus", 1, "--routing-temperature", 0.05)
    retrieval += ("--exclude", "animals", "--min-resemblance", 0)
    result = result_of("run", bundle, PROMPT, *retrieval, "--max-tokens", 3)
    assert len(result["neighbours"]) == 9
    assert set(result["weights"]) == {"numbers", "colours"}
    assert result["tokens"]["generated"] <= 3
    request = Request(
        retrieval=RetrievalSettings(neighbours=9, nucleus=1.0, routing_temperature=0.05, min_resemblance=0),
        exclude=("animals",),
        max_tokens=3,
    )
    with open_bundle(bundle, device="cpu") as composer:
        assert dict(composer.retrieve(PROMPT, request).weights) == pytest.approx(result["weights"])
    by_hand = result_of("run", bundle, PROMPT, "--adapter", "numbers=0.5", "--adapter", "colours=-1e-1", "--raw")
    assert (by_hand["weights"], by_hand["neighbours"]) == ({"numbers": 0.5, "colours": -0.1}, [])
    assert by_hand["tokens"]["prompt"] < result["tokens"]["prompt"]
    sampled = [result_of("run", bundle, PROMPT, "--temperature", 9, "--top-p", 1, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0]["answer"] == sampled[1]["answer"] != sampled[2]["answer"]
    cut = result_of("run", bundle, PROMPT, "--temperature", 9, "--top-k", 1)
    assert cut["answer"] == result_of("run", bundle, PROMPT)["answer"]  # the most likely of one
    assert result_of("run", bundle, PROMPT, "--sample", "--temperature", 9, "--min-p", 1) == {**cut, "timings_ms": ANY}
    settings = ("--sample", "--temperature", 0, "--repetition-penalty", 5)
    with open_bundle(bundle, device="cpu") as composer:
        request = Request(sampling=Sampling(temperature=0, repetition_penalty=5))
        expected = composer.run(PROMPT, request).text
    penalised = result_of("run", bundle, PROMPT, *settings)
    assert penalised["answer"] == expected
    assert result_of("run", bundle, PROMPT, *settings[3:]) == {**penalised, "timings_ms": ANY}
    stopped = result_of("run", bundle, PROMPT, "--stop", cut["answer"][1:3])
    assert (stopped["answer"], stopped["finish"]) == (cut["answer"][:1], "stop")


def test_a_long_prompt_is_refused_or_cut_and_that_is_said(bundle: Path) -> None:
    long = "the cat sat on a mat " * 600
    assert "context of 512" in fault_of("run", bundle, "-", stdin=long.encode())
    done = call("run", bundle, "-", "--truncate", "--json", stdin=long.encode())
    assert done.exit_code == 0
    left_out = json.loads(done.stdout)["tokens"]["dropped"]
    assert left_out > 0 and f"the first {left_out} tokens did not fit and were left out" in done.stderr


def test_retrieve_shows_the_tasks(bundle: Path) -> None:
    result = result_of("retrieve", bundle, PROMPT)
    assert set(result) == {"prompt", *RETRIEVAL_KEYS}
    answer = result_of("run", bundle, PROMPT)
    assert result == {"prompt": PROMPT} | {key: answer[key] for key in RETRIEVAL_KEYS}
    text = call("retrieve", bundle, PROMPT)
    assert (text.exit_code, text.stderr) == (0, "")
    assert "animals (example 0)" in text.stdout
    assert "adapters" in text.stdout


def test_a_second_run_reads_nothing_of_a_prompt_that_is_kept_in_a_file(bundle: Path, tmp_path: Path) -> None:
    options = ("--raw", "--adapter", "animals=1", "--max-tokens", "5", "--prompt-cache", tmp_path / "kept")
    first, second = (result_of("run", bundle, PROMPT, *options) for _ in range(2))
    assert first["answer"] == second["answer"]
    assert (tmp_path / "kept").stat().st_size > 0
    quantised = call("run", bundle, PROMPT, *options, "--kv-cache", "int8", "--explain")
    assert quantised.exit_code == 0 and "KV cache      int8" in quantised.stderr
    assert "is of another base, KV cache, ONNX Runtime or processor, and is replaced" in quantised.stderr


def test_a_file_that_is_no_prompt_cache_is_refused_and_stays(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("my notes", encoding="utf-8")
    fault = fault_of("run", bundle, PROMPT, "--prompt-cache", tmp_path / "notes")
    assert "is damaged, or no such file" in fault and "give another file" in fault
    assert (tmp_path / "notes").read_text(encoding="utf-8") == "my notes"
