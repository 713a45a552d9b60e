"""Tasks that come to a bundle and leave it, and changes that fail at every step."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from edgecompose import EdgeComposeError, Request, open_bundle, tasks
from edgecompose.bundle import atomic, files
from edgecompose.bundle.files import Bundle, read_manifest, verify
from edgecompose.bundle.lock import lock
from edgecompose.bundle.manifest import MANIFEST_FILE
from edgecompose.bundle.specs import TaskSpec
from edgecompose.bundle.upgrade import upgrade_bundle
from edgecompose.errors import BundleError, ExportError, InUse, ManifestInvalid, UnknownAdapter
from edgecompose.guard import filesystem
from edgecompose.settings import RetrievalSettings
from edgecompose.tasks import add_task, measure_tasks, remove_task
from tests.fixtures_tiny import NEW_PROMPTS, TASKS, TinyZoo
from tests.recipes import NEAREST, PROMPT, contents, fail, fail_for, run, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("synced")]


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
    assert json.loads(lines[-1]) == {"key": 13, "prompt": prompt, "answer": "x"}
    assert verify(bundle_copy) == []


def test_texts_are_stored_only_on_request(zoo: TinyZoo, tmp_path: Path, new_task: tuple[Path, Path]) -> None:
    from edgecompose_export.bundles import build_bundle

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
        result = opened.retrieve(TASKS["numbers"][0], Request(retrieval=RetrievalSettings(neighbours=50))).neighbours
        assert {n.task for n in result} == {"animals", "colours"}
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
        ((tmp_path / "absent", examples), "is missing; give"),
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


STEPS: dict[str, tuple[Any, str, Any]] = {
    "copying the adapter": (tasks, "place_adapter", fail),
    "writing the adapter": (tasks, "convert_adapter", fail),
    "opening the index": (tasks, "open_index", fail),
    "opening the embedder": (tasks, "Retriever", fail),
    "embedding": (tasks, "embed_prompts", fail),
    "saving the index": ("usearch.index.Index", "save", fail),
    "naming the index": (tasks, "index_file_name", fail),
    "placing the adapter": (atomic, "put", fail_for("travel", filesystem.put)),
    "placing the index": (atomic, "put", fail_for("usearch", filesystem.put)),
    "hashing": (tasks, "describe_file", fail),
    "writing texts or the manifest": (Path, "write_text", fail),
    "flushing": (files, "sync", fail),
    "placing the manifest": (atomic, "put", fail_for("manifest", filesystem.put)),
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
    assert verify(bundle_copy) == []
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
    assert verify(bundle_copy) == []
    remove_task(bundle_copy, "animals")
    assert verify(bundle_copy) == []


def test_everything_is_on_disk_before_the_manifest_names_it(
    bundle_copy: Path, new_task: tuple[Path, Path], synced: list[str]
) -> None:
    manifest = add_task(bundle_copy, "travel", *new_task)
    (work,) = {name for name in synced if name.startswith(f".{MANIFEST_FILE}.")}
    before = synced[: synced.index(work)]
    assert set(before) >= {Path(name).name for name in manifest.files}
    assert synced[-1] == bundle_copy.name


def test_a_cleaning_up_that_fails_leaves_the_new_bundle(
    bundle_copy: Path, new_task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail_for("usearch", Path.unlink))
        with pytest.raises(OSError, match="disk full"):
            add_task(bundle_copy, "travel", *new_task)
    assert "travel" in Bundle(bundle_copy).manifest.tasks
    assert run(bundle_copy, NEW_PROMPTS[0], NEAREST).retrieval.weights == {"travel": pytest.approx(1)}
    assert all("is not in the manifest" in fault for fault in verify(bundle_copy))
    (bundle_copy / "README.md").write_text("mine", encoding="utf-8")
    remove_task(bundle_copy, "animals")
    assert verify(bundle_copy) == ["file 'README.md' is not in the manifest; remove it"]


def test_a_full_disk_is_an_error_of_the_system_whatever_usearch_raises(
    bundle_copy: Path, new_task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("usearch.index.Index.save", refuse)
        with pytest.raises(OSError, match=r"No space left on device: .*copy'"):
            add_task(bundle_copy, "travel", *new_task)
    assert verify(bundle_copy) == []


def test_a_second_change_is_refused_and_names_the_first(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    before = contents(bundle_copy)
    with lock(bundle_copy):
        for change in (
            lambda: add_task(bundle_copy, "travel", *new_task),
            lambda: remove_task(bundle_copy, "animals"),
            lambda: upgrade_bundle(bundle_copy),
        ):
            with pytest.raises(InUse, match=f"is being written by process {os.getpid()} on "):
                change()
    assert contents(bundle_copy) == before


def test_of_two_that_add_tasks_at_once_none_is_lost(
    zoo: TinyZoo, bundle_copy: Path, new_task: tuple[Path, Path]
) -> None:
    """Each either adds its task or says that it did not."""
    added, refused = [], []

    def add(name: str) -> None:
        try:
            add_task(bundle_copy, name, *new_task)
            added.append(name)
        except InUse:
            refused.append(name)

    threads = [threading.Thread(target=add, args=(f"travel{i}",)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) + len(refused) == 3 and added
    assert set(read_manifest(bundle_copy).tasks) == {*TASKS, *added}
    assert verify(bundle_copy) == []


def test_a_change_of_another_program_is_not_overwritten(
    bundle_copy: Path, new_task: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system has no locks, the manifest tells."""
    compute = tasks.pairwise_inner_products

    def change(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(tasks, "pairwise_inner_products", compute)
        result = compute(*arguments, **options)
        remove_task(bundle_copy, "animals")
        return result

    monkeypatch.setattr(tasks, "lock", lambda path: contextlib.nullcontext(False))
    monkeypatch.setattr(tasks, "pairwise_inner_products", change)
    with pytest.raises(ExportError, match="was changed by another program meanwhile; run this again"):
        add_task(bundle_copy, "travel", *new_task)
    assert set(read_manifest(bundle_copy).tasks) == {"numbers", "colours"}


def test_what_killed_changes_left_is_removed_and_nothing_else(bundle_copy: Path, new_task: tuple[Path, Path]) -> None:
    for name in ("examples-0123456789ab.usearch", "examples-0123456789ab.jsonl", ".manifest.json.77.tmp"):
        (bundle_copy / name).touch()
    (bundle_copy / ".77.tmp" / "adapters").mkdir(parents=True)
    (bundle_copy / "adapters" / "mine.safetensors").touch()
    add_task(bundle_copy, "travel", *new_task)
    assert verify(bundle_copy) == ["file 'adapters/mine.safetensors' is not in the manifest; remove it"]


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "5", "null", '{"key": null}', '{"key": []}', '{"key": 1e999}', "[" * 9000, '{"key": NaN}'],
)
def test_a_line_of_prompts_that_is_no_object_with_a_key_is_one_error(line: str) -> None:
    assert tasks._is_of('{"key": 3, "prompt": "x"}', TaskSpec({}, 2, 2))
    with pytest.raises(BundleError, match="is no object with a key"):
        tasks._is_of(line, TaskSpec({}, 2, 2))


def test_the_similarities_of_an_older_bundle_are_measured(bundle_copy: Path) -> None:
    path = bundle_copy / MANIFEST_FILE
    text, measured = path.read_text(encoding="utf-8"), read_manifest(bundle_copy)
    assert not measure_tasks(bundle_copy) and path.read_text(encoding="utf-8") == text
    fields = json.loads(text)
    for task in fields["tasks"].values():
        assert 0 < task.pop("similarity") <= 1
    path.write_text(json.dumps(fields), encoding="utf-8")
    assert run(bundle_copy, NEW_PROMPTS[0], NEAREST).retrieval.resemblance is None
    assert measure_tasks(bundle_copy)
    assert read_manifest(bundle_copy) == measured and verify(bundle_copy) == []
