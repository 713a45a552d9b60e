"""Fused blends in a bundle: answers, memory, damaged graphs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")


from edgecompose import Composer, EdgeComposeError, Request, open_bundle
from edgecompose.bundle.files import verify
from edgecompose.engine.fusing import FusedWeights, Fuser
from edgecompose.engine.merged import MergedAdapter
from edgecompose.errors import FileDamaged
from edgecompose.tasks import add_task, remove_task
from edgecompose_export.graphs.fuse import DECODER_GRAPH, FUSE_GRAPH
from tests import tiny
from tests.engine.fused import BASES, TOLERANCE, change_base
from tests.fixtures_tiny import TASKS, Exported, TinyZoo

pytestmark = pytest.mark.slow

PROMPT = TASKS["animals"][0]


@pytest.fixture(params=BASES, ids="-".join)
def base(request: pytest.FixtureRequest, zoo: TinyZoo) -> Exported:
    return zoo.base(*request.param)


@pytest.fixture
def llama(zoo: TinyZoo) -> Exported:
    return zoo.base("llama")


@pytest.fixture
def composer(bundle: Path) -> Iterator[Composer]:
    with open_bundle(bundle, device="cpu") as opened:
        yield opened


def both(root: Path, weights: dict[str, float]) -> list[dict[str, float]]:
    """Scores of choices under attach and under fuse."""
    result = []
    with open_bundle(root, device="cpu") as opened:
        for attachment in ("attach", "fuse"):
            request = Request(weights=weights, choices=("yes", "no", "maybe so"), attachment=attachment)
            answer = opened.run(PROMPT, request)
            assert answer.attachment == attachment
            assert answer.choices is not None
            result.append(dict(answer.choices))
    return result


def test_a_bundle_keeps_fusing_as_tasks_come_and_go(
    zoo: TinyZoo, bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    attached, fused = both(bundle_copy, {"animals": 0.6, "numbers": -0.4, "colours": 1.0})
    assert fused == pytest.approx(attached, abs=TOLERANCE)
    travel = zoo.lora("travel", r=2, target_modules=["o_proj"])
    add_task(bundle_copy, "travel", travel, tiny.write_task(tmp_path / "travel.jsonl", ("a ticket to the sea",)))
    assert verify(bundle_copy) == []
    attached, fused = both(bundle_copy, {"animals": 0.6, "travel": 2.0})
    assert fused == pytest.approx(attached, abs=TOLERANCE)
    remove_task(bundle_copy, "animals")
    assert verify(bundle_copy) == []
    attached, fused = both(bundle_copy, {"travel": 2.0})
    assert fused == pytest.approx(attached, abs=TOLERANCE)


def test_a_whole_answer_is_the_same_under_fuse(composer: Composer) -> None:
    attached, fused = (composer.run(PROMPT, Request(attachment=a)) for a in ("attach", "fuse"))
    assert (fused.text, fused.composition, fused.generated_tokens) == (
        attached.text,
        attached.composition,
        attached.generated_tokens,
    )
    assert (attached.attachment, fused.attachment) == ("attach", "fuse")
    long = composer.run(PROMPT, Request(attachment="fuse", max_tokens=60, raw=True))
    assert long.drafted_tokens == 0, "fed weights are multiplied otherwise for one row than for several"
    assert attached.timings_ms["fuse"] == 0 < fused.timings_ms["fuse"]
    alone = composer.run(PROMPT, Request(weights={}, attachment="fuse"))
    assert (alone.attachment, alone.timings_ms["fuse"]) == ("attach", 0)
    with pytest.raises(EdgeComposeError, match="attachment is 'melt'; expected attach or fuse"):
        Request(attachment="melt")  # type: ignore[arg-type]


def test_the_last_fused_base_is_kept_and_its_memory_used_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    fuse = Fuser.fuse

    def watch(fuser: Fuser, adapter: MergedAdapter) -> FusedWeights:
        fused = fuse(fuser, adapter)
        made.append(fused.buffer.data_ptr())
        return fused

    monkeypatch.setattr(Fuser, "fuse", watch)
    with open_bundle(bundle, device="cpu") as composer:
        for name in ("animals", "animals", "numbers", "numbers", "animals"):
            composer.run(PROMPT, Request(weights={name: 1.0}, attachment="fuse", max_tokens=1))
        assert len(made) == 3
        assert len(set(made)) == 1
        keeps_none = Composer(composer.bundle, composer.device, fused_cache_bytes=0)
        for _ in range(2):
            keeps_none.run(PROMPT, Request(weights={"animals": 1.0}, attachment="fuse", max_tokens=1))
        assert len(made) == 5
        composer.close()
        assert composer.run(PROMPT, Request(weights={"animals": 1.0}, attachment="fuse")).attachment == "fuse"


def test_a_bundle_of_a_quantised_base_attaches_and_refuses_to_fuse(bundle_copy: Path) -> None:
    change_base(bundle_copy, lambda base: base.update(precision="int4", fusing=None))
    with open_bundle(bundle_copy, device="cpu") as opened:
        assert opened.run(PROMPT).attachment == "attach"
        with pytest.raises(EdgeComposeError, match="this bundle's base is int4"):
            opened.run(PROMPT, Request(attachment="fuse"))


def test_a_bundle_from_before_fusing_opens(bundle_copy: Path) -> None:
    change_base(bundle_copy, lambda base: base.pop("fusing"))
    with open_bundle(bundle_copy, device="cpu") as opened:
        assert opened.run(PROMPT).text
        with pytest.raises(EdgeComposeError, match="exported without them"):
            opened.run(PROMPT, Request(attachment="fuse"))


@pytest.mark.parametrize("name", [f"base/{FUSE_GRAPH}", f"base/{DECODER_GRAPH}", "base/decoder.onnx.data"])
def test_a_damaged_or_missing_graph_is_refused_by_name(bundle: Path, tmp_path: Path, name: str) -> None:
    root = shutil.copytree(bundle, tmp_path / "copy")
    path = root / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with (
        open_bundle(root, device="cpu") as opened,
        pytest.raises(FileDamaged, match=rf"file '{name}' has sha256 .*copy or export the bundle again"),
    ):
        opened.run(PROMPT, Request(attachment="fuse"))
    assert any(name in problem for problem in verify(root))
    path.unlink()
    with pytest.raises(FileDamaged, match=f"file '{name}' is missing"):
        open_bundle(root, device="cpu")
