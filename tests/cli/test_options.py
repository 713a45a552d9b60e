"""Options that commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgecompose.merging.methods import METHODS
from tests.cli.calls import PROMPT, call, result_of, write_questions


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
        ("run", ("--choices", "a,b", "--drafts", 3), "--drafts has no effect beside --choices"),
        ("run", ("--drafts", 9), "9 is not in the range 0<=x<=8"),
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


def test_drafts_can_be_switched_off(bundle: Path) -> None:
    on, off = (result_of("run", bundle, PROMPT, "--max-tokens", 60, "--raw", "--drafts", count) for count in (8, 0))
    assert on["answer"] == off["answer"]
    assert on["tokens"]["drafted"] > 0 == off["tokens"]["drafted"]
