"""The `edgecompose-export` command on tiny inputs: every command once as it should be, and once as it should not."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

from edgecompose import open_bundle
from edgecompose.bundle.files import sha256_of, verify
from edgecompose_export.cli import main
from tests import tiny
from tests.fixtures_tiny import TASKS, TinyZoo, ignore_tracer_warnings

pytestmark = pytest.mark.slow

COMMANDS = (
    ("base",),
    ("checkpoint",),
    ("embedder",),
    ("adapter",),
    ("examples",),
    ("train",),
    ("fetch",),
    ("bundle",),
    ("bundle", "build"),
    ("bundle", "add-task"),
    ("bundle", "remove-task"),
)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def result_of(*arguments: object) -> Any:
    """The JSON object that a command prints on stdout."""
    done = call(*arguments, "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def fault_of(*arguments: object) -> str:
    """What a command that fails on purpose says on stderr; nothing is on stdout, and there is no traceback."""
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (1, ""), done.output
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("edgecompose-export: ")
    return line


def test_base(zoo: TinyZoo, tmp_path: Path) -> None:
    done = call("base", zoo.model("llama"), "-o", tmp_path / "base")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    assert "llama, auto, 2 layers, context 512; KL 0.0" in line
    for step in ("opening the base", "computing the reference", "writing the weights", "measuring the distance"):
        assert step in done.stderr
    result = result_of("base", zoo.model("llama"), "-o", tmp_path / "more", "--precision", "int4", "--accept-distance")
    assert (result["precision"], result["context"]) == ("int4", 512)
    assert result == json.loads((tmp_path / "more/base.json").read_text(encoding="utf-8"))
    assert "exists and is not empty" in fault_of("base", zoo.model("llama"), "-o", tmp_path / "base")
    too_far = ("base", zoo.model("llama"), "-o", tmp_path / "far", "--precision", "int4")
    assert "nats from the values of the file" in fault_of(*too_far)
    assert "has no config.json" in fault_of("base", tmp_path / "absent", "-o", tmp_path / "x")


def test_checkpoint(zoo: TinyZoo, tmp_path: Path) -> None:
    file = tiny.write_gguf(tmp_path / "x.gguf", zoo.model("llama"))
    done = call("checkpoint", file, "-o", tmp_path / "float")
    assert done.exit_code == 0, done.output
    assert f"{tmp_path / 'float'}: float32, 0 MB, of base {sha256_of(file)[:12]}" in done.stdout
    result = result_of("checkpoint", zoo.model("llama"), "-o", tmp_path / "short", "--dtype", "bfloat16")
    assert result["dtype"] == "bfloat16" and len(result["base"]) == 64
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "short").iterdir())
    assert "exists; remove it" in fault_of("checkpoint", file, "-o", tmp_path / "float")
    assert "has no config.json" in fault_of("checkpoint", tmp_path / "absent", "-o", tmp_path / "x")


def test_embedder(zoo: TinyZoo, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        ignore_tracer_warnings()
        done = call("embedder", zoo.encoder(), "-o", tmp_path / "encoder", "--precision", "f32")
        assert done.exit_code == 0, done.output
        assert "f32, 96 dimensions, mean pooling, cosine" in done.stdout
        result = result_of("embedder", zoo.encoder(), "-o", tmp_path / "int8")
    assert result["precision"] == "int8"
    assert "already holds an exported embedder" in fault_of("embedder", zoo.encoder(), "-o", tmp_path / "int8")
    assert "config.json' is missing" in fault_of("embedder", tmp_path, "-o", tmp_path / "x")


def test_adapter(zoo: TinyZoo, tmp_path: Path) -> None:
    base, lora, output = zoo.base("llama").folder, zoo.lora("one"), tmp_path / "one.safetensors"
    done = call("adapter", lora, "--base", base, "-o", output)
    assert done.exit_code == 0, done.output
    assert "rank 4, 4 bits" in done.stdout
    assert "relative error q_proj 0." in done.stdout
    result = result_of("adapter", lora, "--base", base, "-o", tmp_path / "eight.safetensors", "--bits", "8")
    assert (result["bits"], result["rank"], result["file"]) == (8, 4, "eight.safetensors")
    assert "exists; remove it" in fault_of("adapter", lora, "--base", base, "-o", output)
    assert "holds no base.json" in fault_of("adapter", lora, "--base", tmp_path, "-o", tmp_path / "x")
    assert "is a folder of no known format" in fault_of("adapter", tmp_path, "--base", base, "-o", tmp_path / "x")
    other = zoo.lora("one", "qwen3")
    assert "does not fit this base" in fault_of("adapter", other, "--base", base, "-o", tmp_path / "x")


def test_examples(zoo: TinyZoo, tmp_path: Path) -> None:
    embedder, _ = zoo.embedder()
    pairs = [f"{name}={zoo.task(name)}" for name in ("numbers", "animals")]
    done = call("examples", *pairs, "--embedder", embedder, "-o", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert "8 vectors (numbers 4, animals 4)" in done.stdout
    assert not (tmp_path / "plain/examples.jsonl").exists()
    result = result_of("examples", *pairs, "--embedder", embedder, "-o", tmp_path / "texts", "--keep-text")
    assert result["tasks"]["animals"] == {"first_key": 4, "examples": 4}
    lines = (tmp_path / "texts/examples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [*TASKS["numbers"], *TASKS["animals"]]
    assert "already holds examples" in fault_of("examples", *pairs, "--embedder", embedder, "-o", tmp_path / "texts")
    assert "cannot be read" in fault_of("examples", "a=absent", "--embedder", embedder, "-o", tmp_path / "x")
    assert "holds no embedder.json" in fault_of("examples", *pairs, "--embedder", tmp_path, "-o", tmp_path / "x")
    for bad in ("animals", "=file", "animals="):
        done = call("examples", bad, "--embedder", embedder, "-o", tmp_path / "x")
        assert done.exit_code == 2
        assert "is not NAME=FILE.jsonl" in done.stderr


def test_train(zoo: TinyZoo, tmp_path: Path) -> None:
    task, output = zoo.task("animals"), tmp_path / "lora"
    few = ("--rank", 2, "--epochs", 1, "--batch", 4, "--prompt-form", "chat")
    done = call("train", zoo.model("llama"), task, "-o", output, *few)
    assert done.exit_code == 0, done.output
    assert "1 steps on 4 examples, final loss" in done.stdout
    assert (output / "adapter_model.safetensors").is_file()
    result = result_of("train", zoo.model("llama"), task, "-o", tmp_path / "more", *few, "--limit", 3)
    assert (result["examples"], result["rank"]) == (3, 2)
    assert "no example is at most 8 tokens" in fault_of(
        "train", zoo.model("llama"), task, "-o", tmp_path / "x", "--max-length", 8
    )
    assert "cannot be read" in fault_of("train", zoo.model("llama"), tmp_path / "absent", "-o", tmp_path / "x")
    assert "has no config.json" in fault_of("train", tmp_path / "absent", task, "-o", tmp_path / "x")
    bad = tiny.write_task(tmp_path / "bad.jsonl", ["prompt"], answer=" ")
    assert "bad.jsonl:1 has no 'answer'" in fault_of("train", zoo.model("llama"), bad, "-o", tmp_path / "x")


@pytest.mark.parametrize("spelling", [("bundle",), ("bundle", "build")], ids=" ".join)
def test_bundle(zoo: TinyZoo, tmp_path: Path, spelling: tuple[str, ...]) -> None:
    output = tmp_path / "out"
    done = call(*spelling, zoo.recipe(), "-o", output)
    assert done.exit_code == 0, done.output
    assert f"{output}: 3 tasks, 13 examples" in done.stdout
    assert verify(output) == []
    assert "exists; give --force" in fault_of(*spelling, zoo.recipe(), "-o", output)
    assert set(result_of(*spelling, zoo.recipe(), "-o", output, "--force")["tasks"]) == set(TASKS)
    assert "cannot be read" in fault_of(*spelling, tmp_path / "absent.toml", "-o", tmp_path / "x")
    (tmp_path / "bad.toml").write_text("colour = 1\n", encoding="utf-8")
    assert "unknown fields: colour" in fault_of(*spelling, tmp_path / "bad.toml", "-o", tmp_path / "x")


def test_tasks_come_and_go(zoo: TinyZoo, bundle_copy: Path, tmp_path: Path) -> None:
    examples = tiny.write_task(tmp_path / "travel.jsonl", ["where is the station?", "a ticket to the sea"])
    lora = zoo.lora("travel", r=2, target_modules=["o_proj"])
    new = ("bundle", "add-task", bundle_copy, "travel", "--adapter", lora, "--examples", examples)
    done = call(*new)
    assert done.exit_code == 0, done.output
    assert "4 tasks, 15 examples" in done.stdout
    with open_bundle(bundle_copy, device="cpu") as composer:
        assert composer.retrieve("where is the station?").neighbours[0].task == "travel"
    assert "already has a task 'travel'" in fault_of(*new)
    result = result_of("bundle", "remove-task", bundle_copy, "travel")
    assert set(result["tasks"]) == set(TASKS)
    assert verify(bundle_copy) == []
    assert result_of(*new, "--bits", "8")["adapters"]["travel"]["bits"] == 8
    assert "has no task 'birds'" in fault_of("bundle", "remove-task", bundle_copy, "birds")
    assert "is not a directory" in fault_of("bundle", "remove-task", tmp_path / "absent", "birds")
    empty = tiny.write_task(tmp_path / "empty.jsonl", [])
    faulty = ("bundle", "add-task", bundle_copy, "more", "--adapter", lora, "--examples", empty)
    assert "empty.jsonl' holds no example" in fault_of(*faulty)


def command_at(path: tuple[str, ...]) -> click.Command:
    command: click.Command = main
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_shows_a_call_that_can_be_parsed(path: tuple[str, ...]) -> None:
    shown = call(*path, "--help")
    assert shown.exit_code == 0
    lines = [line.strip() for line in shown.stdout.splitlines() if line.strip().startswith("edgecompose")]
    assert lines  # of edgecompose-export, or of edgecompose where the command is the runtime's
    for line in lines:
        _, *arguments = shlex.split(line)
        assert arguments[0] == path[0]
        command: click.Command = main
        while isinstance(command, click.Group):
            _, result, arguments = command.resolve_command(click.Context(command), arguments)
            assert result is not None
            command = result
        with command.make_context(command.name, list(arguments)):
            pass


def test_the_help_names_every_command() -> None:
    visible = {name for name, command in main.commands.items() if not command.hidden}
    assert visible == {path[0] for path in COMMANDS}
    group = command_at(("bundle",))
    assert isinstance(group, click.Group)
    assert set(group.commands) == {path[1] for path in COMMANDS if len(path) == 2}


def test_merge_graphs(tmp_path: Path) -> None:
    done = call("merge-graphs", tmp_path / "graphs")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{len(list((tmp_path / 'graphs').rglob('*.onnx')))} graphs written")


@pytest.mark.parametrize(
    "arguments",
    [
        ("unknown",),
        ("base",),
        ("base", "x"),
        ("adapter", "x", "-o", "y"),
        ("train", "x", "y", "-o", "z", "--rank", "0"),
        ("bundle", "add-task", "x"),
        ("bundle", "x"),
        ("fetch",),
        ("base", "x", "-o", "y", "--precision", "int2"),
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "Error: " in done.stderr


def test_an_output_that_cannot_be_written_is_a_fault(zoo: TinyZoo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    output = tmp_path / "file" / "adapter.safetensors"
    message = fault_of("adapter", zoo.lora("one"), "--base", zoo.base("llama").folder, "-o", output)
    assert str(tmp_path / "file") in message


def test_a_fault_is_one_line(tmp_path: Path) -> None:
    done = call("bundle", tmp_path / "absent.toml", "-o", tmp_path / "x")
    assert len(done.stderr.splitlines()) == 1


def test_a_fault_of_transformers_is_one_line(tmp_path: Path) -> None:
    tiny.write_json(tmp_path / "base/config.json", {"model_type": "mystery", "architectures": ["MysteryForCausalLM"]})
    done = call("base", tmp_path / "base", "-o", tmp_path / "x")
    assert done.exit_code == 1
    assert len(done.stderr.strip().splitlines()) <= 2  # the step, and the fault
