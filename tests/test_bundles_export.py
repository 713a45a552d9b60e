"""Bundles from recipes, bundles that change task by task, and bundles that somebody damaged."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

from edgecompose import Composer, EdgeComposeError, MergeSettings, Request, Sampling, open_bundle
from edgecompose.bundle.files import Bundle, read_manifest, verify
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.errors import ExportError, FileDamaged, ManifestInvalid, RetrievalError, UnknownAdapter
from edgecompose.settings import RetrievalSettings
from edgecompose_export import bundles
from edgecompose_export.bundles import add_task, build_bundle, remove_task
from edgecompose_export.datasets import read_examples
from edgecompose_export.embedder import open_embedder
from edgecompose_export.examples import write_examples
from edgecompose_export.recipe import read_recipe
from tests import tiny
from tests.fixtures_tiny import ADAPTERS, TASKS, TinyZoo

PROMPT = TASKS["animals"][0]
NEAREST = Request(retrieval=RetrievalSettings(neighbours=1))
NEW_PROMPTS = ("where is the station?", "which train is late?", "a ticket to the sea")
ALONE = Request(weights={})


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files, in the order in which they were flushed; the disk itself is spared (it may take seconds)."""
    names: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    return names


@pytest.fixture(scope="module")
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


@pytest.fixture
def new_task(zoo: TinyZoo, tmp_path: Path) -> tuple[Path, Path]:
    """A PEFT folder and examples of a task that the bundle lacks."""
    return zoo.lora("travel", r=2, target_modules=["o_proj"]), tiny.write_task(tmp_path / "travel.jsonl", NEW_PROMPTS)


def run(root: Path, prompt: str = PROMPT, request: Request | None = None) -> Any:
    with open_bundle(root, device="cpu") as opened:
        return opened.run(prompt, request)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# From a recipe


def test_a_built_bundle_is_sound_and_says_what_is_in_it(bundle: Path) -> None:
    assert verify(bundle) == []
    manifest = Bundle(bundle).manifest
    assert manifest.name == "tiny"
    assert manifest.index.vectors == sum(map(len, TASKS.values()))
    assert {name: task.examples for name, task in manifest.tasks.items()} == {n: len(p) for n, p in TASKS.items()}
    assert {name: spec.rank for name, spec in manifest.adapters.items()} == {n: a["r"] for n, a in ADAPTERS.items()}
    assert all(spec.bits == 8 and 0 < spec.error < 0.02 for spec in manifest.adapters.values())
    assert (manifest.defaults.retrieval.neighbours, manifest.defaults.max_tokens) == (4, 6)
    assert set(contents(bundle)) == {*manifest.files, MANIFEST_FILE}


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_of_a_task_finds_its_task(composer: Composer, task: str) -> None:
    for prompt in TASKS[task]:
        retrieval = composer.retrieve(prompt, NEAREST)
        assert [n.task for n in retrieval.neighbours] == [task]
        assert retrieval.neighbours[0].similarity == pytest.approx(1, abs=2e-3)
        assert retrieval.weights == {task: pytest.approx(1)}


def test_a_whole_answer(composer: Composer) -> None:
    pieces: list[str] = []
    answer = composer.run(PROMPT, on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert 0 <= answer.generated_tokens <= 6
    assert answer.prompt_tokens > len(PROMPT) / 2
    assert len(answer.retrieval.neighbours) == 4
    assert sum(answer.retrieval.weights.values()) == pytest.approx(1)
    assert sum(answer.retrieval.distribution.values()) == pytest.approx(1)
    assert answer == dataclasses.replace(composer.run(PROMPT), timings_ms=answer.timings_ms)


def test_the_blend_changes_the_logits(composer: Composer) -> None:
    choices = ("yes", "no", "maybe so")
    scores = [
        composer.run(PROMPT, dataclasses.replace(request, choices=choices)).choices
        for request in (ALONE, Request(weights={"animals": 1.0}), Request(weights={"animals": -1.0}), Request())
    ]
    values = [tuple(s.values()) for s in scores if s is not None]
    assert len(set(values)) == 4


def test_choices_are_ranked(composer: Composer) -> None:
    answer = composer.run(PROMPT, Request(choices=("yes", "no", "maybe so")))
    assert answer.choices is not None
    assert list(answer.choices) == ["yes", "no", "maybe so"]
    assert all(score < 0 for score in answer.choices.values())
    assert answer.text == max(answer.choices, key=answer.choices.__getitem__)
    turned = composer.run(PROMPT, Request(choices=("maybe so", "no", "yes")))
    assert turned.choices == pytest.approx(answer.choices, abs=1e-5)
    with pytest.raises(EdgeComposeError, match="appears twice"):
        composer.run(PROMPT, Request(choices=("yes", "yes")))


def test_an_excluded_task_is_left_out(composer: Composer) -> None:
    retrieval = composer.retrieve(PROMPT, Request(exclude=("animals",), retrieval=RetrievalSettings(neighbours=50)))
    assert {n.task for n in retrieval.neighbours} == {"numbers", "colours"}
    assert len(retrieval.neighbours) == 9
    assert "animals" not in retrieval.weights
    with pytest.raises(UnknownAdapter, match="no task 'absent'"):
        composer.retrieve(PROMPT, Request(exclude=("absent",)))
    with pytest.raises(RetrievalError, match="no example is left"):
        composer.retrieve(PROMPT, Request(exclude=tuple(TASKS)))


def test_weights_by_hand_skip_retrieval(composer: Composer) -> None:
    answer = composer.run("", Request(weights={"numbers": 0.5, "colours": -0.25}))
    assert answer.retrieval.neighbours == ()
    assert answer.retrieval.weights == {"numbers": 0.5, "colours": -0.25}
    assert answer.timings_ms["embed"] == 0
    other = composer.run("", Request(weights={"colours": -0.25, "numbers": 0.5}))
    assert (other.composition, other.text) == (answer.composition, answer.text)
    with pytest.raises(UnknownAdapter, match="'absent' is not in the bundle"):
        composer.run(PROMPT, Request(weights={"absent": 1.0}))


def test_zero_weight_is_the_base_alone(composer: Composer) -> None:
    choices = ("one", "two")
    zero = composer.run(PROMPT, Request(weights={"animals": 0.0}, choices=choices)).choices
    assert zero == pytest.approx(composer.run(PROMPT, Request(weights={}, choices=choices)).choices, abs=1e-5)


def test_a_seed_decides_what_is_drawn(composer: Composer) -> None:
    def draw(seed: int) -> str:
        return composer.run(PROMPT, Request(sampling=Sampling(5.0, 1.0, seed), max_tokens=12)).text

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune"])
def test_factorwise_methods_want_one_rank(composer: Composer, method: str) -> None:
    settings = MergeSettings(method)
    assert composer.run(PROMPT, Request(weights={"animals": 1.0}, merge=settings)).settings == settings
    with pytest.raises(EdgeComposeError, match=r"has ranks \[2, 4\]"):
        composer.run(PROMPT, Request(weights={"animals": 0.5, "numbers": 0.5}, merge=settings))


def test_a_closed_composer_loads_again(bundle: Path) -> None:
    opened = open_bundle(bundle, device="cpu")
    opened.warm_up()
    first = opened.run(PROMPT).text
    opened.close()
    assert opened.run(PROMPT).text == first


def test_the_same_recipe_gives_the_same_bytes(zoo: TinyZoo, bundle: Path, tmp_path: Path) -> None:
    build_bundle(zoo.recipe(), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(bundle)


def test_prebuilt_parts_give_the_same_bundle(zoo: TinyZoo, bundle: Path, tmp_path: Path) -> None:
    """Examples indexed and adapters quantised beforehand."""
    folder, _ = zoo.embedder()
    embedder, spec = open_embedder(folder)
    named = {name: read_examples(zoo.task(name)) for name in TASKS}
    write_examples(named, embedder, spec, tmp_path / "examples", keep_text=True)
    adapters = {name: f'adapter = "{bundle}/adapters/{name}.safetensors"' for name in TASKS}
    recipe = write_recipe(zoo, tmp_path, 'examples = "examples"', tasks=adapters)
    build_bundle(recipe, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(bundle)


def write_recipe(zoo: TinyZoo, folder: Path, *lines: str, tasks: dict[str, str] | None = None) -> Path:
    """The recipe of the tiny bundle with other lines on top, or with other tasks."""
    whole = zoo.recipe().read_text(encoding="utf-8")
    head, *bodies = whole.replace('= "', f'= "{zoo.root}/').replace(f'"{zoo.root}/tiny"', '"tiny"').split("[tasks.")
    if tasks is not None:
        bodies = [f"{name}]\n{content}\n" for name, content in tasks.items()]
    path = folder / "recipe.toml"
    path.write_text("[tasks.".join(["\n".join([*lines, head]), *bodies]), encoding="utf-8")
    return path


def task_lines(zoo: TinyZoo, name: str = "animals", **other: str) -> str:
    places = {"adapter": str(zoo.lora(name, **ADAPTERS[name])), "examples": str(zoo.task(name))} | other
    return "\n".join(f'{key} = "{place}"' for key, place in places.items())


BAD_RECIPES: dict[str, tuple[Callable[[str, TinyZoo], str], str]] = {
    "not TOML": (lambda text, zoo: text + "[", r"recipe\.toml' cannot be read"),
    "unknown key": (lambda text, zoo: f"colour = 1\n{text}", "unknown fields: colour"),
    "unknown key of a task": (lambda text, zoo: text + "weight = 2\n", r"tasks\.\w+ has unknown fields: weight"),
    "unknown default": (lambda text, zoo: text.replace("neighbours =", "neighbors ="), "retrieval has unknown fields"),
    "bad default": (lambda text, zoo: text.replace("neighbours = 4", "neighbours = 0"), "neighbours"),
    "unknown method": (
        lambda text, zoo: text.replace("[defaults]", '[defaults]\nmerge = {method = "average"}'),
        "method 'average' is unknown",
    ),
    "no name": (lambda text, zoo: text.replace('name = "tiny"', ""), "lacks fields: name"),
    "wrong type": (lambda text, zoo: text.replace('name = "tiny"', "name = 3"), r"name is 3; expected str"),
    "bits": (lambda text, zoo: text.replace("bits = 8", "bits = 5"), "bits is 5; expected one of 4, 8, 16"),
    "no tasks": (lambda text, zoo: text.split("[tasks.")[0] + "[tasks]", "names no task"),
    "no task table": (lambda text, zoo: text.split("[tasks.")[0], "lacks fields: tasks"),
    "bad name": (lambda text, zoo: text.replace("[tasks.animals]", '[tasks."../x"]'), r"'\.\./x' is not allowed"),
    "no base": (lambda text, zoo: text.replace("llama-fp32", "absent"), r"absent' holds no base\.json"),
    "no embedder": (lambda text, zoo: text.replace("bert-f32", "absent"), r"absent-4' holds no embedder\.json"),
    "no adapter": (lambda text, zoo: text.replace("lora/llama/animals", "absent"), "absent' is neither a PEFT folder"),
    "no examples": (lambda text, zoo: text.replace("animals.jsonl", "absent.jsonl"), r"absent\.jsonl' cannot be read"),
    "examples of nobody": (lambda text, zoo: text.replace("examples = ", "# ", 1), "tasks without examples: animals"),
    "examples twice": (lambda text, zoo: f'examples = "x"\n{text}', "both for itself and for tasks"),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    BAD_RECIPES,
)
def test_a_bad_recipe_is_refused_by_name(zoo: TinyZoo, tmp_path: Path, case: str) -> None:
    change, message = BAD_RECIPES[case]
    recipe = write_recipe(zoo, tmp_path)
    recipe.write_text(change(recipe.read_text(encoding="utf-8"), zoo), encoding="utf-8")
    with pytest.raises(EdgeComposeError, match=message):
        build_bundle(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bits = 5", "bits is 5"),
        ('colour = "red"', "unknown fields: colour"),
        ('defaults = {merge = {method = "average"}}', "merge method 'average' is unknown"),
        ("defaults = {merge = {density = 0}}", "density is 0"),
        ("defaults = {temperature = 0.1}", "called 'routing_temperature' in [defaults.retrieval] now"),
        ('admission = "a.json"', "called 'validation' now"),
        ('tasks = {"../up" = {adapter = "a"}}', "name '../up' is not allowed"),
    ],
)
def test_every_fault_of_a_recipe_is_an_export_error(tmp_path: Path, line: str, message: str) -> None:
    tasks = "" if line.startswith("tasks") else '[tasks.animals]\nadapter = "a"\n'
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "a"\nbase = "b"\nembedder = "c"\n{line}\n{tasks}', encoding="utf-8")
    with pytest.raises(ExportError, match=re.escape(message)) as raised:
        read_recipe(path)
    assert str(path) in str(raised.value)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.toml' cannot be read"):
        read_recipe(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ExportError, match=r"latin\.toml' cannot be read"):
        read_recipe(tmp_path / "latin.toml")


def test_an_index_of_another_embedder_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    folder, _ = zoo.embedder("f32", pooling="cls")
    embedder, spec = open_embedder(folder)
    write_examples({"animals": read_examples(zoo.task("animals"))}, embedder, spec, tmp_path / "examples")
    tasks = {"animals": task_lines(zoo).splitlines()[0]}
    recipe = write_recipe(zoo, tmp_path, 'examples = "examples"', tasks=tasks)
    with pytest.raises(ExportError, match=r"embedded by .*/cls\+4/.*the bundle's embedder is .*/mean\+4/"):
        build_bundle(recipe, tmp_path / "out")


def test_a_prebuilt_index_must_hold_the_tasks_of_the_recipe(zoo: TinyZoo, tmp_path: Path) -> None:
    embedder, spec = open_embedder(zoo.embedder()[0])
    named = {name: read_examples(zoo.task(name)) for name in ("animals", "numbers")}
    write_examples(named, embedder, spec, tmp_path / "examples")
    lines = {name: task_lines(zoo, name).splitlines()[0] for name in TASKS}
    recipe = write_recipe(zoo, tmp_path, 'examples = "examples"', tasks=lines)
    with pytest.raises(ExportError, match="has no examples of: colours"):
        build_bundle(recipe, tmp_path / "out")
    recipe = write_recipe(zoo, tmp_path, 'examples = "examples"', tasks={"animals": lines["animals"]})
    with pytest.raises(ExportError, match="hold tasks that the recipe lacks: numbers"):
        build_bundle(recipe, tmp_path / "out")
    recipe = write_recipe(zoo, tmp_path, 'examples = "absent"', tasks=lines)
    with pytest.raises(ExportError, match=r"absent' has no readable examples\.json"):
        build_bundle(recipe, tmp_path / "out")


def test_an_adapter_file_of_another_base_is_refused(zoo: TinyZoo, bundle: Path, tmp_path: Path) -> None:
    other = {"animals": task_lines(zoo, adapter=str(bundle / "adapters/animals.safetensors"))}
    recipe = write_recipe(zoo, tmp_path, tasks=other)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("llama-fp32", zoo.base("qwen2").folder.name))
    with pytest.raises(EdgeComposeError, match="adapter 'animals' was exported against base"):
        build_bundle(recipe, tmp_path / "out")


@pytest.mark.parametrize("name", ["base.json", "embedder.json"])
def test_a_damaged_description_is_refused_by_name(zoo: TinyZoo, tmp_path: Path, name: str) -> None:
    source = zoo.base("llama").folder if name == "base.json" else zoo.embedder()[0]
    folder = shutil.copytree(source, tmp_path / "damaged")
    (folder / name).write_text("{", encoding="utf-8")
    recipe = write_recipe(zoo, tmp_path)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(source), str(folder)), encoding="utf-8")
    with pytest.raises(EdgeComposeError, match=name):
        build_bundle(recipe, tmp_path / "out")


# Replacing


def test_only_bundles_are_replaced_and_only_when_told(zoo: TinyZoo, bundle_copy: Path, tmp_path: Path) -> None:
    recipe = write_recipe(zoo, tmp_path, tasks={"animals": task_lines(zoo)})
    before = contents(bundle_copy)
    with pytest.raises(ExportError, match="exists; give --force"):
        build_bundle(recipe, bundle_copy)
    assert contents(bundle_copy) == before
    (bundle_copy / "notes.txt").write_text("lost", encoding="utf-8")
    build_bundle(recipe, bundle_copy, force=True)
    assert list(Bundle(bundle_copy).manifest.tasks) == ["animals"]
    assert verify(bundle_copy) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    build_bundle(recipe, mine, force=True)
    assert verify(mine) == []
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(ExportError, match="is not a bundle and is not empty"):
        build_bundle(recipe, other, force=True)
    assert contents(other) == {"thesis.tex": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "mine", "other", "recipe.toml"]


def test_a_file_is_not_replaced(zoo: TinyZoo, tmp_path: Path) -> None:
    recipe = write_recipe(zoo, tmp_path)
    with pytest.raises(ExportError, match=r"recipe\.toml"):
        build_bundle(recipe, recipe, force=True)


class Stop(BaseException):
    """Stands for a signal: nobody may catch it."""


@pytest.mark.parametrize("step", ["copying base and embedder", "adapters", "examples", "hashing"])
def test_a_build_that_is_stopped_leaves_nothing(zoo: TinyZoo, tmp_path: Path, step: str) -> None:
    def stop(name: str) -> None:
        if name == step:
            raise Stop

    recipe = write_recipe(zoo, tmp_path)
    with pytest.raises(Stop):
        build_bundle(recipe, tmp_path / "out", advance=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_a_replacement_that_fails_leaves_the_old_bundle(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(zoo, tmp_path, tasks={"animals": task_lines(zoo)})
    before = contents(bundle_copy)
    monkeypatch.setattr(bundles, "_write_manifest", _fail)
    with pytest.raises(OSError, match="disk full"):
        build_bundle(recipe, bundle_copy, force=True)
    assert contents(bundle_copy) == before


def test_a_last_rename_that_fails_leaves_the_old_bundle(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(zoo, tmp_path, tasks={"animals": task_lines(zoo)})
    before, rename = contents(bundle_copy), Path.rename

    def fail(path: Path, target: Path) -> Path:
        return _fail() if path.name.endswith(".tmp") and Path(target) == bundle_copy else rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="disk full"):
        build_bundle(recipe, bundle_copy, force=True)
    assert contents(bundle_copy) == before


# Task by task


def test_an_added_task_is_found(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    before = Bundle(bundle_copy).manifest
    steps: list[tuple[int, int]] = []
    made = add_task(bundle_copy, "travel", *new_task, advance=lambda done, of: steps.append((done, of)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    manifest = Bundle(bundle_copy).manifest
    assert manifest == made
    assert verify(bundle_copy) == []
    assert manifest.index.vectors == before.index.vectors + 3
    assert manifest.tasks["travel"].first_key == before.index.vectors
    assert (manifest.adapters["travel"].rank, manifest.adapters["travel"].bits) == (2, 4)
    with open_bundle(bundle_copy, device="cpu") as opened:
        for prompt in NEW_PROMPTS:
            assert opened.retrieve(prompt, NEAREST).weights == {"travel": pytest.approx(1)}
        assert opened.retrieve(PROMPT, NEAREST).weights == {"animals": pytest.approx(1)}
        opened.run(NEW_PROMPTS[0])


def test_texts_grow_and_shrink_with_the_tasks(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    add_task(bundle_copy, "travel", *new_task)
    remove_task(bundle_copy, "numbers")
    manifest = Bundle(bundle_copy).manifest
    assert manifest.index.texts is not None
    lines = [json.loads(line) for line in (bundle_copy / manifest.index.texts).read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [*TASKS["animals"], *TASKS["colours"], *NEW_PROMPTS]
    for line in lines:
        (name,) = [n for n, t in manifest.tasks.items() if t.first_key <= line["key"] < t.first_key + t.examples]
        assert line["prompt"] in (*TASKS.get(name, ()), *NEW_PROMPTS)
    assert verify(bundle_copy) == []


def test_texts_with_other_line_separators_survive_a_removal(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    prompt = "one\u2028two\u0085three"
    new_task[1].write_text(json.dumps({"prompt": prompt, "answer": "x"}) + "\n", encoding="utf-8")
    add_task(bundle_copy, "travel", *new_task)
    texts = remove_task(bundle_copy, "animals").index.texts
    assert texts is not None
    lines = (bundle_copy / texts).read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(lines[-1])["prompt"] == prompt
    assert verify(bundle_copy) == []


def test_texts_are_not_kept_unless_wanted(zoo: TinyZoo, tmp_path: Path, new_task: tuple[Path, Path]) -> None:
    recipe = write_recipe(zoo, tmp_path)
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("keep_text = true", ""), encoding="utf-8")
    root = tmp_path / "out"
    build_bundle(recipe, root)
    add_task(root, "travel", *new_task)
    remove_task(root, "animals")
    assert read_manifest(root).index.texts is None
    assert not list(root.glob("*.jsonl"))
    assert not any(NEW_PROMPTS[0].encode() in content for content in contents(root).values())


def test_a_removed_task_leaves_no_trace(bundle_copy: Path) -> None:
    remove_task(bundle_copy, "numbers")
    assert verify(bundle_copy) == []
    manifest = Bundle(bundle_copy).manifest
    assert list(manifest.tasks) == ["animals", "colours"]
    assert list(manifest.adapters) == ["animals", "colours"]
    assert manifest.index.vectors == 9
    assert not (bundle_copy / "adapters/numbers.safetensors").exists()
    with open_bundle(bundle_copy, device="cpu") as opened:
        found = opened.retrieve(TASKS["numbers"][0], Request(retrieval=RetrievalSettings(neighbours=50))).neighbours
        assert {n.task for n in found} == {"animals", "colours"}
        for task in ("animals", "colours"):
            assert opened.retrieve(TASKS[task][1], NEAREST).neighbours[0].task == task
    remove_task(bundle_copy, "animals")
    with pytest.raises(ExportError, match="'colours' is the only task"):
        remove_task(bundle_copy, "colours")
    assert verify(bundle_copy) == []


def test_adding_and_removing_gives_the_same_answers(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    before = run(bundle_copy)
    add_task(bundle_copy, "travel", *new_task)
    remove_task(bundle_copy, "travel")
    after = run(bundle_copy)
    assert after.text == before.text
    assert after.retrieval.weights == pytest.approx(before.retrieval.weights)
    assert [n.key for n in after.retrieval.neighbours] == [n.key for n in before.retrieval.neighbours]


def test_a_quantised_adapter_can_be_added(bundle_copy: Path, tmp_path: Path, new_task: tuple[Path, Path]) -> None:
    copy = shutil.copyfile(bundle_copy / "adapters/numbers.safetensors", tmp_path / "mine.safetensors")
    made = add_task(bundle_copy, "travel", copy, new_task[1])
    assert made.adapters["travel"].rank == 2
    assert made.adapters["travel"].error == made.adapters["numbers"].error
    assert verify(bundle_copy) == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("animals", ExportError, "already has a task 'animals'"),
        ("../up", ManifestInvalid, "is not allowed"),
        ("", ManifestInvalid, "is not allowed"),
    ],
)
def test_a_name_that_is_taken_or_bad_is_refused(
    bundle_copy: Path, new_task: tuple[Path, Path], name: str, error: type[EdgeComposeError], message: str
) -> None:
    before = contents(bundle_copy)
    with pytest.raises(error, match=message):
        add_task(bundle_copy, name, *new_task)
    assert contents(bundle_copy) == before


def test_parts_that_cannot_be_used_are_refused(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, new_task: tuple[Path, Path]
) -> None:
    before = contents(bundle_copy)
    adapter, examples = new_task
    for bad, message in (
        ((tmp_path / "absent", examples), "neither a PEFT folder nor"),
        ((examples, examples), "cannot be read"),
        ((zoo.lora("one", "qwen3"), examples), "does not fit this base"),
        ((adapter, tmp_path / "absent.jsonl"), "cannot be read"),
    ):
        with pytest.raises(EdgeComposeError, match=message):
            add_task(bundle_copy, "travel", *bad)
        assert contents(bundle_copy) == before
    with pytest.raises(UnknownAdapter, match="has no task 'travel'; it has: animals, colours, numbers"):
        remove_task(bundle_copy, "travel")


def test_files_of_the_user_survive(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    (bundle_copy / "README.md").write_text("mine", encoding="utf-8")
    add_task(bundle_copy, "travel", *new_task)
    assert (bundle_copy / "README.md").read_text(encoding="utf-8") == "mine"


# Failures at every step


def _fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError("disk full")


def _fail_for(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of Path that fails for names with `part` in them."""

    def maybe(path: Path, *args: Any, **kwargs: Any) -> Any:
        return _fail() if part in path.name else method(path, *args, **kwargs)

    return maybe


STEPS: dict[str, tuple[Any, str, Any]] = {
    "copying the adapter": (bundles, "_place_adapter", _fail),
    "writing the adapter": (bundles, "export_adapter", _fail),
    "opening the index": (bundles, "open_index", _fail),
    "opening the embedder": (bundles, "_embedder_of", _fail),
    "embedding": (bundles, "embed_prompts", _fail),
    "saving the index": ("usearch.index.Index", "save", _fail),
    "naming the index": (bundles, "_index_name", _fail),
    "placing the index": (Path, "replace", _fail_for("usearch", Path.replace)),
    "hashing": (bundles, "describe_file", _fail),
    "writing texts or the manifest": (Path, "write_text", _fail),
    "flushing": (bundles, "_sync", _fail),
    "placing the manifest": (Path, "replace", _fail_for("manifest", Path.replace)),
}


def _break(patch: pytest.MonkeyPatch, step: str) -> None:
    """Let one step of a change fail."""
    place, name, replacement = STEPS[step]
    if isinstance(place, str):
        patch.setattr(f"{place}.{name}", replacement)
    else:
        patch.setattr(place, name, replacement)


@pytest.mark.parametrize("step", STEPS)
def test_a_change_that_fails_leaves_the_old_bundle(
    bundle_copy: Path, new_task: tuple[Path, Path], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, manifest = run(bundle_copy), (bundle_copy / MANIFEST_FILE).read_bytes()
    with monkeypatch.context() as patch:
        _break(patch, step)
        with pytest.raises(OSError, match="disk full"):
            add_task(bundle_copy, "travel", *new_task)
    assert (bundle_copy / MANIFEST_FILE).read_bytes() == manifest
    after = run(bundle_copy)
    assert (after.text, after.retrieval) == (old.text, old.retrieval)
    assert all("is not in the manifest" in fault for fault in verify(bundle_copy))
    add_task(bundle_copy, "travel", *new_task)
    assert verify(bundle_copy) == []


@pytest.mark.parametrize("step", ["saving the index", "placing the index", "flushing", "placing the manifest"])
def test_a_removal_that_fails_leaves_the_old_bundle(
    bundle_copy: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = run(bundle_copy)
    with monkeypatch.context() as patch:
        _break(patch, step)
        with pytest.raises(OSError, match="disk full"):
            remove_task(bundle_copy, "animals")
    after = run(bundle_copy)
    assert (after.text, after.retrieval) == (old.text, old.retrieval)
    remove_task(bundle_copy, "animals")
    assert verify(bundle_copy) == []


def test_everything_is_on_disk_before_the_manifest_names_it(
    bundle_copy: Path, new_task: tuple[Path, Path], synced: list[str]
) -> None:
    manifest = add_task(bundle_copy, "travel", *new_task)
    before = synced[: synced.index(f".{MANIFEST_FILE}.tmp")]
    assert set(before) == {Path(name).name for name in manifest.files}
    assert synced[-1] == bundle_copy.name


def test_a_cleaning_up_that_fails_leaves_the_new_bundle(
    bundle_copy: Path, new_task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", _fail_for("usearch", Path.unlink))
        with pytest.raises(OSError, match="disk full"):
            add_task(bundle_copy, "travel", *new_task)
    assert "travel" in Bundle(bundle_copy).manifest.tasks
    assert run(bundle_copy, NEW_PROMPTS[0], NEAREST).retrieval.weights == {"travel": pytest.approx(1)}
    assert all("is not in the manifest" in fault for fault in verify(bundle_copy))


# Damage


def _index_of(root: Path) -> str:
    return read_manifest(root).index.file


USED: dict[str, Callable[[Path], str]] = {
    "index": _index_of,
    "decoder": lambda root: "base/decoder.onnx",
    "decoder data": lambda root: "base/decoder.onnx.data",
    "tokenizer": lambda root: "base/tokenizer.json",
    "chat template": lambda root: "base/chat_template.jinja",
    "encoder": lambda root: "embedder/encoder.onnx",
    "encoder's tokenizer": lambda root: "embedder/tokenizer.json",
    "adapter": lambda root: "adapters/animals.safetensors",
}


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("part", USED)
def test_one_flipped_bit_anywhere_is_one_error(bundle_copy: Path, part: str, place: float) -> None:
    name = USED[part](bundle_copy)
    content = bytearray((bundle_copy / name).read_bytes())
    content[round(place * (len(content) - 1))] ^= 0x10
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(FileDamaged, match=f"'{name}' has sha256"):
        run(bundle_copy, PROMPT, NEAREST)
    (fault,) = verify(bundle_copy)
    assert name in fault


LIES: dict[str, tuple[str, Any]] = {
    "key-value heads": ("base.kv_heads", 4),
    "head size": ("base.head_size", 32),
    "vocabulary": ("base.vocabulary", 301),
    "another graph": ("base.graph", "embedder/encoder.onnx"),
    "another encoder": ("embedder.graph", "base/decoder.onnx"),
}


@pytest.mark.parametrize("case", LIES)
def test_a_manifest_that_disagrees_with_a_graph_is_one_error(bundle_copy: Path, case: str) -> None:
    path, value = LIES[case]
    part, field = path.split(".")
    manifest = json.loads((bundle_copy / MANIFEST_FILE).read_text(encoding="utf-8"))
    manifest[part][field] = value
    tiny.write_json(bundle_copy / MANIFEST_FILE, manifest)
    with pytest.raises(EdgeComposeError):
        run(bundle_copy)


def test_damage_to_what_is_not_used_does_not_matter(bundle_copy: Path) -> None:
    path = bundle_copy / "adapters/colours.safetensors"
    path.write_bytes(bytes(len(path.read_bytes())))
    assert run(bundle_copy, PROMPT, NEAREST).text == run(bundle_copy, PROMPT, NEAREST).text
    with pytest.raises(FileDamaged, match="colours"):
        run(bundle_copy, PROMPT, Request(weights={"colours": 1.0}))


@pytest.mark.parametrize("part", ["index", "decoder data", "adapter"])
def test_a_damaged_bundle_is_not_changed(bundle_copy: Path, part: str, new_task: tuple[Path, Path]) -> None:
    name = USED[part](bundle_copy)
    size = (bundle_copy / name).stat().st_size
    (bundle_copy / name).write_bytes(bytes(size + 1))
    with pytest.raises(FileDamaged, match=name):
        add_task(bundle_copy, "travel", *new_task)
    with pytest.raises(FileDamaged, match=name):
        remove_task(bundle_copy, "animals")


def test_vectors_in_the_index_are_those_of_the_embedder(composer: Composer) -> None:
    query = composer.retriever.embedder.embed(PROMPT)
    (nearest,) = composer.retriever.index.search(query, 1)
    assert nearest.key == 0
    assert nearest.similarity == pytest.approx(1, abs=2e-3)
    assert np.linalg.norm(query) == pytest.approx(1, abs=1e-5)


def test_a_prompt_seen_before_is_neither_embedded_nor_searched_again(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = TASKS["numbers"][0]
    with open_bundle(bundle, device="cpu") as opened:
        first = opened.retrieve(prompt)
        assert opened.compose(prompt).merged is opened.compose(prompt).merged

        def refuse(text: str) -> None:
            raise AssertionError(f"embedded again: {text}")

        monkeypatch.setattr(opened.retriever.embedder, "embed_tokens", refuse)
        assert opened.retrieve(prompt) == first
        for other in (
            Request(exclude=("numbers",)),
            Request(retrieval=RetrievalSettings(routing_temperature=0.1)),
            Request(retrieval=RetrievalSettings(nucleus=0.5)),
        ):
            assert opened.retrieve(prompt, other) != first
        with pytest.raises(AssertionError, match="embedded again"):
            opened.retrieve(TASKS["colours"][0])


def test_a_task_is_adapters_whom_the_recipe_names(zoo: TinyZoo, tmp_path: Path) -> None:
    tasks = {name: task_lines(zoo, name) for name in TASKS}
    tasks["animals"] += "\nadapters = { numbers = 0.75, animals = 0.25 }"
    tasks["colours"] += "\nadapters = {}"
    manifest = build_bundle(write_recipe(zoo, tmp_path, tasks=tasks), tmp_path / "out")
    assert manifest.tasks["animals"].adapters == {"numbers": 0.75, "animals": 0.25}
    with open_bundle(tmp_path / "out", device="cpu") as opened:
        found = opened.retrieve(TASKS["animals"][0], NEAREST)
        assert found.weights == {"numbers": 0.75, "animals": 0.25}
        alone = opened.run(TASKS["colours"][0], dataclasses.replace(NEAREST, max_tokens=4))
        assert alone.retrieval.nucleus == {"colours": 1.0} and alone.retrieval.weights == {}
        assert alone.text == opened.run(TASKS["colours"][0], Request(weights={}, max_tokens=4)).text
        left_out = opened.retrieve(TASKS["animals"][0], dataclasses.replace(NEAREST, exclude=("numbers",)))
        assert left_out.weights == {"animals": 1.0}  # whose other part goes with the task that is left out


def test_a_task_adapters_an_unknown_one_is_refused(zoo: TinyZoo, tmp_path: Path) -> None:
    recipe = write_recipe(zoo, tmp_path, tasks={"animals": task_lines(zoo) + "\nadapters = { birds = 1.0 }"})
    with pytest.raises(ExportError, match="mapped to unknown tasks: birds"):
        build_bundle(recipe, tmp_path / "out")


def test_the_validation_gate_excludes_what_hurts(zoo: TinyZoo, tmp_path: Path) -> None:
    gains = {"animals": [0.1, 0.2], "numbers": [-0.3, -0.1]}
    tasks = {name: {"n": 9, "accuracy": 0.5} for name in gains}
    tiny.write_json(tmp_path / "validation.json", {
        "main": "own", "variants": {"base": {"tasks": tasks}, "own": {"tasks": tasks}},
        "against": {"base": {"by_task": {name: {"ci95": ci95} for name, ci95 in gains.items()}}},
    })  # fmt: skip
    manifest = build_bundle(write_recipe(zoo, tmp_path, 'validation = "validation.json"'), tmp_path / "out")
    verdicts = {name: a.validation and a.validation.verdict for name, a in manifest.adapters.items()}
    assert verdicts == {"animals": "helps", "numbers": "hurts", "colours": None}
    with open_bundle(tmp_path / "out", device="cpu") as opened:
        assert opened.retrieve(TASKS["animals"][0], NEAREST).weights == {"animals": 1.0}
        barred = opened.retrieve(TASKS["numbers"][0], NEAREST)
        assert (dict(barred.nucleus), dict(barred.weights)) == ({"numbers": 1.0}, {})
        assert opened.compose("", Request(weights={"numbers": 1.0})).merged.modules  # by hand it can be had


def test_where_no_task_stands_out_the_base_answers_in_its_chat_template(zoo: TinyZoo, tmp_path: Path) -> None:
    recipe = write_recipe(zoo, tmp_path)
    text = recipe.read_text(encoding="utf-8").replace(
        "[defaults]", '[defaults]\nprompt_form = "raw"\nretrieval = {neighbours = 4, fallback = 0.9}'
    )
    text = text.replace("[defaults.retrieval]\nneighbours = 4\n", "")
    recipe.write_text(text, encoding="utf-8")
    build_bundle(recipe, tmp_path / "out")
    prompt, sure, unsure = (
        TASKS["animals"][0],
        Request(retrieval={"neighbours": 1}, max_tokens=2),
        Request(retrieval={"neighbours": 13}, max_tokens=2),
    )
    with open_bundle(tmp_path / "out", device="cpu") as opened:
        plain = len(opened.model.tokenizer.encode(prompt))
        near = opened.run(prompt, sure)
        assert near.retrieval.weights and near.prompt_tokens == plain
        alone = opened.run(prompt, unsure)
        assert alone.retrieval.weights == {} and alone.retrieval.distribution
        assert alone.prompt_tokens > plain
        assert opened.run(prompt, replace(unsure, raw=True)).prompt_tokens == plain
        assert opened.run(prompt, Request(weights={}, max_tokens=2)).prompt_tokens == plain


def test_the_index_has_a_metric_of_its_own_unless_told_otherwise(zoo: TinyZoo, tmp_path: Path) -> None:
    embedder, spec = open_embedder(zoo.embedder()[0])
    named = {name: read_examples(zoo.task(name)) for name in TASKS}
    learned = write_examples(named, embedder, spec, tmp_path / "learned")
    plain = write_examples(named, embedder, spec, tmp_path / "plain", whiten=False)
    assert (learned.index.dimension, plain.index.dimension) == (spec.dimension // 3, spec.dimension)
    assert (learned.index.whitening, plain.index.whitening) == ("whitening.safetensors", None)
    assert not (tmp_path / "plain" / "whitening.safetensors").exists()
