"""Bundles from recipes."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")

from edgecompose import EdgeComposeError, Request, open_bundle
from edgecompose.bundle import atomic
from edgecompose.bundle.files import Bundle, verify
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.errors import ExportError
from edgecompose.retrieval.examples import read_examples
from edgecompose_export import bundles
from edgecompose_export.bundles import build_bundle
from edgecompose_export.embedder import open_embedder
from edgecompose_export.examples import write_examples
from edgecompose_export.recipe import read_recipe
from tests import tiny
from tests.fixtures_tiny import ADAPTERS, TASKS, TinyZoo
from tests.recipes import NEAREST, contents, fail, task_lines, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("synced")]


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
    "wrong type": (lambda text, zoo: text.replace('name = "tiny"', "name = 3"), r"name is 3; expected a string"),
    "bits": (lambda text, zoo: text.replace("bits = 8", "bits = 5"), "bits is 5; expected one of 4, 8, 16"),
    "no tasks": (lambda text, zoo: text.split("[tasks.")[0] + "[tasks]", "names no task"),
    "no task table": (lambda text, zoo: text.split("[tasks.")[0], "lacks fields: tasks"),
    "bad name": (lambda text, zoo: text.replace("[tasks.animals]", '[tasks."../x"]'), r"'\.\./x' is not allowed"),
    "no base": (lambda text, zoo: text.replace("llama-fp32", "absent"), r"absent' holds no base\.json"),
    "no embedder": (lambda text, zoo: text.replace("bert-f32", "absent"), r"absent-4' holds no embedder\.json"),
    "no adapter": (lambda text, zoo: text.replace("lora/llama/animals", "absent"), "absent' is missing; give a"),
    "no examples": (lambda text, zoo: text.replace("animals.jsonl", "absent.jsonl"), r"absent\.jsonl' cannot be read"),
    "examples of nobody": (lambda text, zoo: text.replace("examples = ", "# ", 1), "tasks without examples: animals"),
    "examples twice": (lambda text, zoo: f'examples = "x"\n{text}', "both for itself and for tasks"),
}


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


@pytest.mark.parametrize(
    "value",
    ["9" * 5000, "0x" + "f" * 5000, "[" * 2000 + "]" * 2000, "18446744073709551616", '"\\u0000"', "nan", "1979-05-27"],
    ids=lambda value: value[:12],
)
def test_values_beyond_reason_in_a_recipe_end_in_one_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'name = "a"\nbase = "b"\nembedder = "c"\nbits = {value}\n[tasks.x]\nadapter = "a"\n', "utf-8")
    with pytest.raises(ExportError, match=r"recipe\.toml") as raised:
        read_recipe(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_a_recipe_may_have_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = 'name = "a"\r\nbase = "b"\r\nembedder = "c"\r\n[tasks.x]\r\nadapter = "a"\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert list(read_recipe(path).tasks) == ["x"]
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(ExportError, match="it is UTF-16 or UTF-32; save it as UTF-8"):
        read_recipe(path)


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
    with pytest.raises(ExportError, match=r"examples\.json' is missing; make it with"):
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


def test_only_bundles_are_replaced_and_only_with_force(zoo: TinyZoo, bundle_copy: Path, tmp_path: Path) -> None:
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
    monkeypatch.setattr(bundles, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        build_bundle(recipe, bundle_copy, force=True)
    assert contents(bundle_copy) == before


def test_a_last_rename_that_fails_leaves_the_old_bundle(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(zoo, tmp_path, tasks={"animals": task_lines(zoo)})
    before, rename = contents(bundle_copy), Path.rename

    def fail_last(path: Path, target: Path) -> Path:
        return fail() if path.name.endswith(".tmp") and Path(target) == bundle_copy else rename(path, target)

    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_last)
    with pytest.raises(OSError, match="disk full"):
        build_bundle(recipe, bundle_copy, force=True)
    assert contents(bundle_copy) == before


def test_a_task_is_adapters_whom_the_recipe_names(zoo: TinyZoo, tmp_path: Path) -> None:
    tasks = {name: task_lines(zoo, name) for name in TASKS}
    tasks["animals"] += "\nadapters = { numbers = 0.75, animals = 0.25 }"
    tasks["colours"] += "\nadapters = {}"
    manifest = build_bundle(write_recipe(zoo, tmp_path, tasks=tasks), tmp_path / "out")
    assert manifest.tasks["animals"].adapters == {"numbers": 0.75, "animals": 0.25}
    with open_bundle(tmp_path / "out", device="cpu") as opened:
        result = opened.retrieve(TASKS["animals"][0], NEAREST)
        assert result.weights == {"numbers": 0.75, "animals": 0.25}
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
    tiny.write_json(
        tmp_path / "validation.json",
        {
            "main": "own",
            "variants": {"base": {"tasks": tasks}, "own": {"tasks": tasks}},
            "against": {"base": {"by_task": {name: {"ci95": ci95} for name, ci95 in gains.items()}}},
        },
    )
    manifest = build_bundle(write_recipe(zoo, tmp_path, 'validation = "validation.json"'), tmp_path / "out")
    verdicts = {name: a.validation and a.validation.verdict for name, a in manifest.adapters.items()}
    assert verdicts == {"animals": "helps", "numbers": "hurts", "colours": None}
    with open_bundle(tmp_path / "out", device="cpu") as opened:
        assert opened.retrieve(TASKS["animals"][0], NEAREST).weights == {"animals": 1.0}
        excluded = opened.retrieve(TASKS["numbers"][0], NEAREST)
        assert (dict(excluded.nucleus), dict(excluded.weights)) == ({"numbers": 1.0}, {})
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
        base = Request(weights={}, max_tokens=2)
        assert opened.run(prompt, base).prompt_tokens > plain, "by the bundle's settings no task stands out"
        assert opened.run(prompt, replace(base, choices=("a", "b"), max_tokens=None)).prompt_form == "raw"


def test_the_index_has_a_learned_metric_by_default(zoo: TinyZoo, tmp_path: Path) -> None:
    embedder, spec = open_embedder(zoo.embedder()[0])
    named = {name: read_examples(zoo.task(name)) for name in TASKS}
    learned = write_examples(named, embedder, spec, tmp_path / "learned")
    plain = write_examples(named, embedder, spec, tmp_path / "plain", whiten=False)
    assert (learned.index.dimension, plain.index.dimension) == (spec.dimension // 3, spec.dimension)
    assert (learned.index.whitening, plain.index.whitening) == ("whitening.safetensors", None)
    assert not (tmp_path / "plain" / "whitening.safetensors").exists()
