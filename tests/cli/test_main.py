"""The `edgecompose` command: what it prints where, and with which exit code."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from edgecompose import Chat, MergeSettings, Message, Request, Sampling, __version__, open_bundle
from edgecompose.bundle.files import read_manifest
from edgecompose.cli.main import main
from edgecompose.errors import GenerationError
from edgecompose.merging.methods import METHODS
from edgecompose.settings import RetrievalSettings
from edgecompose.timing import STAGES
from tests.fixtures_tiny import ADAPTERS, TASKS, TinyZoo

PROMPT = TASKS["animals"][0]
COMMANDS = ("run", "chat", "batch", "serve", "retrieve", "compose", "eval", "inspect", "verify", "doctor", "bundle")
RETRIEVAL_KEYS = {"weights", "neighbours", "distribution"}


def call(*arguments: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=stdin)


def result_of(*arguments: object, stdin: bytes | None = None) -> Any:
    """The JSON object that a command prints, which is all that it prints."""
    done = call(*arguments, "--json", stdin=stdin)
    assert (done.exit_code, done.stderr.strip()) == (0, ""), done.output
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def fault_of(*arguments: object, stdin: bytes | None = None) -> str:
    """The one line on stderr of a command that fails on purpose; nothing is on stdout."""
    done = call(*arguments, stdin=stdin)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("edgecompose: ")
    return line.removeprefix("edgecompose: ")


def test_an_answer_as_json_has_the_documented_keys(bundle: Path) -> None:
    found = result_of("run", bundle, PROMPT)
    assert set(found) == {
        "prompt",
        "answer",
        "method",
        "attachment",
        "weights",
        "neighbours",
        "distribution",
        "device",
        "timings_ms",
        "tokens",
        "finish",
        "prompt_form",
        "composition",
        "merge",
    }
    assert (found["prompt"], found["method"]) == (PROMPT, "product")
    assert sum(found["weights"].values()) == pytest.approx(1)
    assert sum(found["distribution"].values()) == pytest.approx(1)
    assert set(found["weights"]) <= set(found["distribution"]) <= set(TASKS)
    assert len(found["neighbours"]) == 4
    assert found["neighbours"][0] == {"task": "animals", "key": 0, "similarity": pytest.approx(1, abs=2e-3)}
    assert set(found["device"]) == {"kind", "providers", "reason"}
    assert found["device"]["kind"] in ("cpu", "cuda")
    assert found["device"]["providers"][-1] == "CPUExecutionProvider"
    assert found["device"]["reason"]
    assert tuple(found["timings_ms"]) == STAGES
    assert {"embed", "retrieve", "weigh", "merge", "fuse", "prefill", "decode", "total"} <= set(STAGES)
    assert all(math.isfinite(spent) and spent >= 0 for spent in found["timings_ms"].values())
    assert found["timings_ms"]["total"] >= max(found["timings_ms"][stage] for stage in STAGES[:-1])
    assert set(found["tokens"]) == {"prompt", "generated", "dropped"}
    assert found["finish"] in ("stop", "length")
    assert len(found["composition"]) == 64


def test_choices_are_scored(bundle: Path) -> None:
    found = result_of("run", bundle, PROMPT, "--choices", "yes, no", "--choice", "well, maybe")
    assert list(found["choices"]) == ["yes", "no", "well, maybe"]
    assert found["answer"] == max(found["choices"], key=found["choices"].__getitem__)
    assert all(score < 0 for score in found["choices"].values())


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


def test_a_blend_is_fused_where_that_was_asked_for(bundle: Path, bundle_copy: Path) -> None:
    attached, fused = result_of("run", bundle, PROMPT), result_of("run", bundle, PROMPT, "--fuse")
    assert result_of("run", bundle, PROMPT, "--fold")["attachment"] == "fuse"
    assert (attached["attachment"], fused["attachment"]) == ("attach", "fuse")
    assert fused["answer"] == attached["answer"]
    assert "attached" in call("run", bundle, PROMPT, "--explain").stderr
    assert "fused" in call("run", bundle, PROMPT, "--explain", "--fuse").stderr
    assert result_of("inspect", bundle)["base"]["fuse"] is True
    assert "can be fused" in call("inspect", bundle).stdout
    path = bundle_copy / "manifest.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found["base"] |= {"precision": "int8", "fusing": None}
    path.write_text(json.dumps(found), encoding="utf-8")
    assert "fusing needs a float base; this bundle's base is int8" in fault_of("run", bundle_copy, PROMPT, "--fuse")
    assert "can be fused" not in call("inspect", bundle_copy).stdout


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
    found = result_of("run", bundle_copy, PROMPT)
    assert (found["prompt_form"], chat["prompt_form"]) == ("chat", "chat")
    assert found["answer"] and chat["answer"].startswith(found["answer"])
    assert found["tokens"]["prompt"] == chat["tokens"]["prompt"]
    raw = result_of("run", bundle_copy, PROMPT, "--raw")
    assert (raw["answer"], raw["prompt_form"], raw["tokens"]["generated"]) == ("", "raw", 0)
    assert "in the chat template" in call("run", bundle_copy, PROMPT, "--explain").stderr


def test_standard_input_is_read(bundle: Path) -> None:
    wanted = result_of("run", bundle, "l'été, 猫")
    for stdin in ("l'été, 猫", "l'été, 猫\n"):
        found = result_of("run", bundle, "-", stdin=stdin.encode())
        assert (found["prompt"], found["answer"]) == (wanted["prompt"], wanted["answer"])
    assert result_of("retrieve", bundle, "-", stdin=PROMPT.encode())["prompt"] == PROMPT
    assert "standard input is not UTF-8" in fault_of("run", bundle, "-", stdin=b"caf\xe9")


def test_every_option_reaches_the_composer(bundle: Path) -> None:
    retrieval = ("--neighbours", 9, "--nucleus", 1, "--routing-temperature", 0.05, "--exclude", "animals")
    found = result_of("run", bundle, PROMPT, *retrieval, "--max-tokens", 3)
    assert len(found["neighbours"]) == 9
    assert set(found["weights"]) == {"numbers", "colours"}
    assert found["tokens"]["generated"] <= 3
    request = Request(
        retrieval=RetrievalSettings(neighbours=9, nucleus=1.0, routing_temperature=0.05),
        exclude=("animals",),
        max_tokens=3,
    )
    with open_bundle(bundle, device="cpu") as composer:
        assert dict(composer.retrieve(PROMPT, request).weights) == pytest.approx(found["weights"])
    by_hand = result_of("run", bundle, PROMPT, "--adapter", "numbers=0.5", "--adapter", "colours=-1e-1", "--raw")
    assert (by_hand["weights"], by_hand["neighbours"]) == ({"numbers": 0.5, "colours": -0.1}, [])
    assert by_hand["tokens"]["prompt"] < found["tokens"]["prompt"]
    sampled = [result_of("run", bundle, PROMPT, "--temperature", 9, "--top-p", 1, "--seed", seed) for seed in (1, 1, 2)]
    assert sampled[0]["answer"] == sampled[1]["answer"] != sampled[2]["answer"]
    cut = result_of("run", bundle, PROMPT, "--temperature", 9, "--top-k", 1)
    assert cut["answer"] == result_of("run", bundle, PROMPT)["answer"]  # the likeliest of one
    assert result_of("run", bundle, PROMPT, "--sample", "--temperature", 9, "--min-p", 1) == {**cut, "timings_ms": ANY}
    settings = ("--sample", "--temperature", 0, "--repetition-penalty", 5)
    with open_bundle(bundle, device="cpu") as composer:
        request = Request(sampling=Sampling(temperature=0, repetition_penalty=5))
        wanted = composer.run(PROMPT, request).text
    penalised = result_of("run", bundle, PROMPT, *settings)
    assert penalised["answer"] == wanted
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


def test_a_chat_remembers_what_was_said(bundle: Path) -> None:
    talk = b"the cat sat on a mat\ntwo and two is four\n/new\ntwo and two is four\n\nnever read\n"
    done = call("chat", bundle, "--json", "--adapter", "animals=1", "--system", "be brief", stdin=talk)
    assert (done.exit_code, done.stderr) == (0, "")
    first, second, alone = map(json.loads, done.stdout.splitlines())
    assert second["tokens"]["prompt"] > first["tokens"]["prompt"] > 0
    assert alone["prompt"] == second["prompt"] and alone["tokens"]["prompt"] < second["tokens"]["prompt"]
    shown = call("chat", bundle, "--explain", stdin=talk)
    assert shown.exit_code == 0 and shown.stderr.count("composition") == 3
    assert fault_of("chat", bundle, stdin=b"caf\xe9\n").startswith("standard input is not UTF-8")


def test_a_chat_survives_an_answer_that_was_ended(bundle: Path) -> None:
    with open_bundle(bundle, device="cpu") as composer:
        talk = Chat(composer, Request(max_tokens=8), system="be brief")

        def interrupt(text: str) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            talk.say(PROMPT, on_text=interrupt)
        assert roles(talk) == ["system", "user", "assistant"]
        with pytest.raises(GenerationError):
            talk.say("x " * 2000)
        assert roles(talk) == ["system", "user", "assistant"]
        talk.say("and then?")
        assert roles(talk) == ["system", "user", "assistant", "user", "assistant"]
        assert talk.messages[3].content == "and then?"
        talk.reset()
        assert list(talk.messages) == [Message("system", "be brief")]


def roles(talk: Chat) -> list[str]:
    return [message.role for message in talk.messages]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_chosen(bundle: Path, method: str) -> None:
    row = METHODS[method]
    values = {"density": 0.9, "majority_sign": "frequency", "dare_seed": 3, "rank": 2, "energy": 0.9}
    options = {name: (f"--{name.replace('_', '-')}", value) for name, value in values.items()}
    read = [word for name in row.parameters for word in options[name]]
    settings = ("--adapter", "animals=1", "--method", method)
    assert result_of("run", bundle, PROMPT, *settings, *read)["method"] == method
    for name in values.keys() - set(row.parameters):
        done = call("run", bundle, PROMPT, *settings, *options[name])
        assert done.exit_code == 2 and f"{name} has no effect on method {method}" in done.stderr


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("run", ("--adapter", "animals=1", "--neighbours", 3), "--neighbours has no effect beside --adapter"),
        ("run", ("--adapter", "animals=1", "--exclude", "numbers"), "--exclude has no effect beside --adapter"),
        ("run", ("--temperature", 0, "--top-p", 0.5), "--top-p has no effect at --temperature 0"),
        ("run", ("--temperature", 0, "--seed", 5), "--seed has no effect at --temperature 0"),
        ("run", ("--choices", "a,b", "--temperature", 1), "--temperature has no effect beside --choices"),
        ("run", ("--choices", "a,b", "--max-tokens", 3), "--max-tokens has no effect beside --choices"),
        ("run", ("--choices", "a,b", "--stop", "x"), "--stop has no effect beside --choices"),
        ("run", ("--rank", 3), "rank has no effect on method product"),
        ("eval", ("--methods", "ties", "--energy", 0.5), "energy has no effect on method"),
        ("run", ("--top-n", 3), "--top-n is called --neighbours now"),
        ("run", ("--sample-top-p", 0.5), "--sample-top-p is called --top-p now"),
        ("retrieve", ("--temperature", 0.1), "--temperature is called --routing-temperature now"),
        ("retrieve", ("--top-p", 0.9), "--top-p is called --nucleus now"),
        ("compose", ("-o", "x", "--size-correction", 0.9), "--size-correction is called --class-size-exponent now"),
        ("chat", ("--query", "first"), "--query is called --route-by now"),
    ],
)
def test_an_option_without_effect_or_of_an_old_name_is_refused(
    bundle: Path, tmp_path: Path, command: str, options: tuple[object, ...], words: str
) -> None:
    arguments: dict[str, tuple[object, ...]] = {"chat": (), "eval": (write_questions(tmp_path / "questions.jsonl"),)}
    done = call(command, bundle, *arguments.get(command, (PROMPT,)), *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in " ".join(done.stderr.split())


def test_any_option_of_sampling_draws(bundle: Path) -> None:
    greedy = result_of("run", bundle, PROMPT, "--max-tokens", 12)["answer"]
    for options in (("--seed", 1), ("--temperature", 3), ("--top-k", 50), ("--top-p", 0.99), ("--min-p", 0.001)):
        drawn = {
            result_of("run", bundle, PROMPT, "--max-tokens", 12, *options, "--seed", seed)["answer"]
            for seed in range(4)
        }
        assert drawn != {greedy}, options


def test_retrieve_shows_the_tasks(bundle: Path) -> None:
    found = result_of("retrieve", bundle, PROMPT)
    assert set(found) == {"prompt", *RETRIEVAL_KEYS}
    answer = result_of("run", bundle, PROMPT)
    assert found == {"prompt": PROMPT} | {key: answer[key] for key in RETRIEVAL_KEYS}
    text = call("retrieve", bundle, PROMPT)
    assert (text.exit_code, text.stderr) == (0, "")
    assert "animals (example 0)" in text.stdout
    assert "adapters" in text.stdout


def test_inspect_describes_a_bundle(bundle: Path) -> None:
    found = result_of("inspect", bundle)
    manifest = read_manifest(bundle)
    assert set(found) == {
        "name",
        "schema_version",
        "created_by",
        "bytes",
        "files",
        "base",
        "embedder",
        "tasks",
        "adapters",
        "defaults",
    }
    assert (found["name"], found["schema_version"], found["files"]) == ("tiny", 5, len(manifest.files))
    assert found["bytes"] == sum((bundle / name).stat().st_size for name in manifest.files)
    assert {name: task["examples"] for name, task in found["tasks"].items()} == {n: len(p) for n, p in TASKS.items()}
    assert {name: a["rank"] for name, a in found["adapters"].items()} == {name: a["r"] for name, a in ADAPTERS.items()}
    assert found["defaults"]["retrieval"]["neighbours"] == 4
    text = call("inspect", bundle)
    assert text.exit_code == 0
    assert all(name in text.stdout for name in (*TASKS, "llama", "fp32", "q_proj"))


def test_verify_lists_all_faults(bundle_copy: Path) -> None:
    manifest = read_manifest(bundle_copy)
    size = sum(entry.bytes for entry in manifest.files.values())
    assert result_of("verify", bundle_copy) == {
        "bundle": str(bundle_copy),
        "files": len(manifest.files),
        "bytes": size,
        "problems": [],
    }
    assert "no fault found" in call("verify", bundle_copy).stdout
    (bundle_copy / "adapters/animals.safetensors").unlink()
    (bundle_copy / "base/tokenizer.json").write_text("{}", encoding="utf-8")
    done = call("verify", bundle_copy)
    assert done.exit_code == 1
    assert len(done.stdout.splitlines()) == 2
    assert "adapters/animals.safetensors' is missing" in done.stdout
    as_json = call("verify", bundle_copy, "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"] == done.stdout.splitlines()


def test_doctor_reports_the_installation() -> None:
    done = call("doctor", "--json")
    found = json.loads(done.stdout)
    assert set(found) == {
        "python",
        "platform",
        "versions",
        "onnxruntime_packages",
        "available_providers",
        "device",
        "telemetry_disabled",
        "problems",
    }
    assert done.exit_code == (1 if found["problems"] else 0)
    assert found["telemetry_disabled"] is True
    assert set(found["versions"]) == {"onnxruntime", "usearch", "numpy"}
    assert "CPUExecutionProvider" in found["available_providers"]
    assert call("doctor").stdout.startswith("python ")


def test_doctor_fails_when_something_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1", "onnxruntime-gpu": "2"}
    monkeypatch.setattr("edgecompose.engine.device.installed_packages", lambda: both)
    monkeypatch.setattr("edgecompose.engine.device.telemetry_disabled", lambda: False)
    done = call("doctor")
    assert done.exit_code == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in done.stdout
    assert "telemetry is not switched off" in done.stdout
    assert len(json.loads(call("doctor", "--json").stdout)["problems"]) == 2


def test_cuda_that_is_not_there_is_an_error_that_says_why(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("edgecompose.engine.device", "edgecompose.cli.main"):
        monkeypatch.setattr(f"{place}.available_providers", lambda: ("CPUExecutionProvider",), raising=False)
    for command in ("run", "retrieve"):
        message = fault_of(command, bundle, PROMPT, "--device", "cuda")
        assert re.search(r"device cuda cannot be used: .*onnxruntime .*CUDA.*--device cpu", message)
    found = result_of("run", bundle, PROMPT, "--device", "auto")["device"]
    assert found["kind"] == "cpu"
    assert re.search(r"auto fell back to cpu: .*onnxruntime ", found["reason"])
    assert result_of("run", bundle, PROMPT, "--device", "cpu")["device"]["reason"] == "cpu was asked for"


FAULTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no bundle": (("run", "{bundle}/absent", PROMPT), "is not a directory"),
    "no manifest": (("inspect", "{bundle}/base"), "has no manifest.json"),
    "no manifest to verify": (("verify", "{bundle}/base"), "has no manifest.json"),
    "empty prompt": (("run", "{bundle}", " "), "an empty prompt"),
    "empty prompt by hand": (("run", "{bundle}", "", "--adapter", "animals=1", "--raw"), "the prompt is empty"),
    "not Unicode": (("run", "{bundle}", "a\udcff"), "not valid Unicode"),
    "unknown task": (("retrieve", "{bundle}", PROMPT, "--exclude", "birds"), "no task 'birds'"),
    "unknown adapter": (("run", "{bundle}", PROMPT, "--adapter", "birds=1"), "'birds' is not in the bundle"),
    "adapter twice": (
        ("run", "{bundle}", PROMPT, "--adapter", "animals=1", "--adapter", "animals=2"),
        "'animals' is named twice",
    ),
    "infinite weight": (("run", "{bundle}", PROMPT, "--adapter", "animals=inf"), "not finite"),
    "too long": (("run", "{bundle}", PROMPT, "--max-tokens", "512"), "the base has a context of 512"),
    "unlike ranks": (
        ("run", "{bundle}", PROMPT, "--method", "linear", "--adapter", "animals=1", "--adapter", "numbers=1"),
        "ranks [2, 4]",
    ),
    "choice twice": (("run", "{bundle}", PROMPT, "--choices", "a,a"), "appears twice"),
    "nothing left": (
        ("retrieve", "{bundle}", PROMPT, "--exclude", "animals", "--exclude", "numbers", "--exclude", "colours"),
        "no example is left",
    ),
    "nothing to compose": (("compose", "{bundle}", PROMPT, "-o", "out", "--exclude", "birds"), "no task 'birds'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line_and_exit_code_1(bundle: Path, case: str) -> None:
    arguments, message = FAULTS[case]
    assert message in fault_of(*(a.format(bundle=bundle) for a in arguments))


def test_a_damaged_bundle_is_one_line_and_exit_code_1(bundle_copy: Path) -> None:
    path = bundle_copy / "base/decoder.onnx.data"
    path.write_bytes(bytes(path.stat().st_size))
    assert "base/decoder.onnx.data' has sha256" in fault_of("run", bundle_copy, PROMPT)
    assert "base/decoder.onnx.data' has sha256" in fault_of("run", bundle_copy, PROMPT, "--json")
    (bundle_copy / "manifest.json").write_text("{", encoding="utf-8")
    for command in (("run", bundle_copy, PROMPT), ("inspect", bundle_copy), ("verify", bundle_copy)):
        assert "is not JSON" in fault_of(*command)


def test_a_folder_that_cannot_be_made_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert str(tmp_path / "file") in fault_of("compose", bundle, PROMPT, "-o", tmp_path / "file" / "blend")


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "x"),
        ("unknown",),
        ("run", "x", "y", "--frobnicate"),
        ("run", "x", "y", "--neighbours", "0"),
        ("run", "x", "y", "--top-p", "0"),
        ("run", "x", "y", "--top-p", "1.5"),
        ("run", "x", "y", "--routing-temperature", "0"),
        ("run", "x", "y", "--density", "0"),
        ("run", "x", "y", "--method", "average"),
        ("compose", "x", "y"),
        ("run", "x", "y", "--device", "tpu"),
        ("run", "x", "y", "--max-tokens", "no"),
        ("run", "x", "y", "--seed=-1"),
        ("run", "{bundle}", "y", "--adapter", "animals"),
        ("run", "{bundle}", "y", "--adapter", "animals=much"),
        ("run", "{bundle}", "y", "--choices", "a,,b"),
        ("eval", "x"),
        ("eval", "x", "y", "--methods", "best"),
        ("eval", "x", "y", "--methods", "base,base"),
        ("eval", "x", "y", "--methods", ""),
        ("eval", "x", "y", "--limit", "0"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_exit_code_2(bundle: Path, arguments: tuple[str, ...]) -> None:
    done = call(*(a.format(bundle=bundle) for a in arguments))
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Usage: " in done.stderr
    assert "Error: " in done.stderr


def examples_in(help_text: str) -> list[list[str]]:
    return [shlex.split(line) for line in map(str.strip, help_text.splitlines()) if line.startswith("edgecompose ")]


@pytest.mark.parametrize("command", ["bundle upgrade", *(name for name in COMMANDS if name != "bundle")])
def test_the_example_in_the_help_runs(
    zoo: TinyZoo, bundle: Path, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edgecompose.cli.serve.run_server", lambda *args, **settings: click.echo("it would serve"))
    Path("models").mkdir()
    Path("models/demo").symlink_to(bundle)
    Path("build").mkdir()
    Path("build/checkpoint").symlink_to(zoo.model("llama"))
    write_questions(Path("questions.jsonl"))
    line = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": PROMPT}}
    Path("calls.jsonl").write_text(json.dumps(line), encoding="utf-8")
    shown = call(*command.split(), "--help")
    assert shown.exit_code == 0
    examples = examples_in(shown.stdout)
    assert examples
    for _, *arguments in examples:
        assert " ".join(arguments).startswith(command)
        stdin = b'{"jsonrpc": "2.0", "id": 1, "method": "models"}\n' if "--stdio" in arguments else b"hello\n"
        done = call(*arguments, stdin=stdin if command in ("chat", "serve") else None)
        assert done.exit_code == 0, done.output
        assert done.stdout


def test_the_help_names_every_command() -> None:
    shown = call("--help").stdout
    assert set(main.list_commands(click.Context(main))) == set(COMMANDS)
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    assert call("-h").stdout == shown


# eval

METRICS_KEYS = {"tasks", "mean_accuracy", "mean_ci95", "timings_ms"}


def write_questions(path: Path, *more: Any) -> Path:
    """Two examples of each task of the bundle, one of another."""
    rows = [
        {"task": task, "prompt": f"{prompt}, is it?", "answer": "yes", "choices": ["yes", "no"]}
        for task, prompts in TASKS.items()
        for prompt in prompts[:2]
    ]
    rows += [{"task": "birds", "prompt": "which bird sings?", "answer": "a lark", "aliases": ["lark"]}, *more]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_an_evaluation_as_json_has_the_documented_keys(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    found = result_of("eval", bundle, data, data)  # a file appears twice counts once
    assert set(found) == {"main", *METRICS_KEYS, "settings", "variants", "against"}
    assert found["main"] == "retrieved"
    assert list(found["variants"]) == ["base", "own", "retrieved"]
    for metrics in found["variants"].values():
        assert set(metrics) == {*METRICS_KEYS, "weights", "routing"}
    assert {key: found[key] for key in METRICS_KEYS} == {
        key: found["variants"]["retrieved"][key] for key in METRICS_KEYS
    }
    assert {task: score["n"] for task, score in found["tasks"].items()} == {"birds": 1, **dict.fromkeys(TASKS, 2)}
    assert all(set(score) == {"n", "accuracy", "ci95"} for score in found["tasks"].values())
    assert found["mean_ci95"][0] <= found["mean_accuracy"] <= found["mean_ci95"][1]
    assert tuple(found["timings_ms"]) == STAGES
    assert set(found["against"]) == {"base", "own"}
    assert set(found["against"]["own"]) == {"tasks", "difference", "ci95", "wins", "by_task"}
    assert (found["against"]["own"]["tasks"], found["against"]["base"]["tasks"]) == (3, 4)
    assert set(found["variants"]["retrieved"]["routing"]) == {"confusion", "reliability", "calibration_error"}
    assert found["settings"]["files"] == ["questions.jsonl"] * 2
    assert found["settings"]["variants"]["own"] == {"kind": "own", "method": "product", "norm_guard": False}


def test_every_option_reaches_the_evaluation(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    options = (
        "--methods",
        "top1, core_ties",
        "--limit",
        1,
        "--exclude-own",
        "--raw",
        "--max-tokens",
        2,
        "--neighbours",
        9,
        "--nucleus",
        1,
        "--routing-temperature",
        0.3,
        "--density",
        0.7,
        "--norm-guard",
        "--exclude",
        "colours",
    )
    found = result_of("eval", bundle, data, *options)
    assert found["main"] == "core_ties"
    assert {task: score["n"] for task, score in found["tasks"].items()} == dict.fromkeys(("birds", *TASKS), 1)
    settings = found["settings"]
    wanted = {
        "limit": 1,
        "exclude_own": True,
        "raw": True,
        "max_tokens": 2,
        "neighbours": 9,
        "nucleus": 1.0,
        "routing_temperature": 0.3,
        "exclude": ["colours"],
        "device": "cpu",
        "bundle": "tiny",
    }
    assert {key: settings[key] for key in wanted} == wanted
    assert settings["variants"]["core_ties"] == {
        "kind": "retrieved",
        "method": "core_ties",
        "density": 0.7,
        "norm_guard": True,
    }
    assert found["variants"]["core_ties"]["weights"]["animals"] == {"numbers": 1.0}
    assert settings["variants"]["top1"]["kind"] == "top1"


def test_an_evaluation_is_a_table(bundle: Path, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    done = call("eval", bundle, data, "--methods", "own,base")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["task", "n", "own", "base"]
    assert [line[0] for line in lines[1:7]] == [*sorted((*TASKS, "birds")), "mean", "95"]
    assert lines[2][2] == "-"
    assert done.stdout.splitlines()[-1].startswith("base less own: ")


def test_a_report_is_written_and_outcomes_are_kept_beside_it(bundle: Path, tmp_path: Path) -> None:
    data, report = write_questions(tmp_path / "questions.jsonl"), tmp_path / "deep" / "report"
    found = result_of("eval", bundle, data, "--report", report)
    answer_cache = (report / "answers.jsonl").read_bytes()
    assert json.loads((report / "result.json").read_text(encoding="utf-8")) == found
    assert (report / "index.html").is_file()
    again = call("eval", bundle, data, "--report", report)
    assert f"written       {report / 'index.html'}" in again.stdout
    assert (report / "answers.jsonl").read_bytes() == answer_cache
    kept = tmp_path / "kept.jsonl"
    result_of("eval", bundle, data, "--answer-cache", kept, "--methods", "base")
    assert len(kept.read_bytes().splitlines()) == 7


def test_what_cannot_be_evaluated_is_a_fault(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_questions(tmp_path / "questions.jsonl")
    assert str(tmp_path / "absent.jsonl") in fault_of("eval", bundle, tmp_path / "absent.jsonl")
    bad = write_questions(tmp_path / "bad.jsonl", {"prompt": "x"})
    assert f"{bad}:8 has no answer" in fault_of("eval", bundle, data, bad)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert "no example remains for 'retrieved'" in fault_of("eval", bundle, empty)
    assert "is no answer of an evaluation" in fault_of("eval", bundle, data, "--answer-cache", data)
    assert "no task 'fish'" in fault_of("eval", bundle, data, "--exclude", "fish")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "edgecompose[report]" in fault_of("eval", bundle, data, "--report", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def _is_installed() -> bool:
    return any(d.name == "edgecompose" for d in importlib.metadata.distributions())


def test_the_version_is_that_of_the_package() -> None:
    done = call("--version")
    assert done.exit_code == 0
    assert __version__ in done.stdout


# compose


def test_compose_writes_a_peft_folder_once(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "blend"
    found = result_of("compose", bundle, PROMPT, "-o", output, "--neighbours", 9)
    assert set(found) == {"prompt", "files", "method", *RETRIEVAL_KEYS, "ranks", "composition", "merge"}
    assert found["files"] == [str(output / "adapter_config.json"), str(output / "adapter_model.safetensors")]
    assert all(Path(name).is_file() for name in found["files"])
    assert found["ranks"]["q_proj"] == sum(ADAPTERS[n]["r"] for n in found["weights"] if n != "colours")
    assert "already holds adapter_config.json" in fault_of("compose", bundle, PROMPT, "-o", output)
    text = call("compose", bundle, PROMPT, "-o", tmp_path / "other")
    assert f"written       {tmp_path / 'other'}" in text.stdout


def test_compose_writes_a_whole_model(zoo: TinyZoo, bundle: Path, tmp_path: Path) -> None:
    import torch
    import transformers

    source, output = zoo.model("llama"), tmp_path / "deep" / "model"
    wanted = ("--format", "merged", "--checkpoint", source, "-o", output)
    found = result_of("compose", bundle, PROMPT, "--adapter", "animals=1", *wanted)
    assert {Path(name).name for name in found["files"]} == {path.name for path in source.iterdir()}
    assert all(Path(name).is_file() for name in found["files"])
    model = transformers.AutoModelForCausalLM.from_pretrained(output, local_files_only=True).eval()
    with open_bundle(bundle, device="cpu") as composer:
        ids = composer.model.tokenizer.encode("the cat sat on a blue mat, twice")
        merged = composer.compose(PROMPT, Request(weights={"animals": 1.0})).merged
        ours = composer.model.decoder.start(merged, len(ids)).forward(ids, rows=len(ids)).copy()
    with torch.no_grad():
        assert np.abs(ours - model(torch.tensor([ids])).logits[0].numpy()).max() <= 1e-3
    assert "exists" in fault_of("compose", bundle, PROMPT, *wanted)
    other = ("--checkpoint", zoo.model("qwen3"), "-o", tmp_path / "x")
    assert "base was exported from" in fault_of("compose", bundle, PROMPT, "--format", "merged", *other)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize(
    "options", [("--format", "merged"), ("--checkpoint", "x"), ("--format", "gguf", "--checkpoint", "x")], ids=" ".join
)
def test_a_model_and_its_checkpoint_want_each_other(bundle: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
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

    found = result_of("compose", bundle, PROMPT, "-o", tmp_path / "blend", *options)
    base = transformers.AutoModelForCausalLM.from_pretrained(zoo.model("llama"), local_files_only=True)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "blend").eval()
    with open_bundle(bundle, device="cpu") as composer:
        ids = composer.model.tokenizer.encode("the cat sat on a blue mat, twice")
        settings = MergeSettings(found["method"])
        merged = composer.compose(PROMPT, Request(weights=found["weights"], merge=settings)).merged
        assert merged.digest == found["composition"]
        blends = (merged, composer.blends.merger.merge([], [], settings))
        ours, plain = (composer.model.decoder.start(b, len(ids)).forward(ids, rows=len(ids)).copy() for b in blends)
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(ours - theirs).max() <= 1e-3
    assert np.abs(ours - plain).max() > 0.1
