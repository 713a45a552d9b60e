"""The benchmark of CUDA, with the CPU in the place of CUDA: it runs, and it names what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cuda
from benchmarks.engine import batch_times, merge_parity, operators, times
from benchmarks.engine.batch_times import BatchRate
from edgecompose.bundle.adapter import Adapter
from edgecompose.engine import device
from edgecompose.engine.device import choose_device
from edgecompose.engine.merged import MergedAdapter
from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import METHODS
from edgecompose.settings import MergeSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPU = choose_device("cpu")
SMALL = ["--device", "cpu", "--shapes", "smollm2-135m", "--layers", "1", "--rounds", "1", "--rank", "4"]
SMALL += ["--sequences", "1", "3"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, and no times of merging."""
    for module in (cuda, merge_parity):
        monkeypatch.setattr(module, "METHODS", {name: METHODS[name] for name in ("linear", "ties")})
    monkeypatch.setattr(times, "merge_times", lambda *_, **__: [])
    monkeypatch.setattr(operators, "COPIED", {"cpu": 1 << 10})


def test_the_script_runs_where_there_is_no_gpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/cuda.py",
        *SMALL,
        "--bundle",
        str(tmp_path / "none"),
        "--save",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "skipped: there is no bundle" in done.stdout
    line = done.stdout.splitlines()[-1]
    result = json.loads(line)
    assert {row["method"] for row in result["parity"]} == {row["method"] for row in result["merge"]} == set(METHODS)
    assert all(row["passed"] and row["cases"] >= 10 for row in result["parity"])
    assert {row["graph"] for row in result["placement"]} >= {"merge stack", "merge mix"}
    row = result["merge"][0]
    assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["device"]["least"] / 1e6)
    assert row["of_copy"] == pytest.approx(row["gb_per_s"] / result["copy_gb_per_s"][0])
    (saved,) = tmp_path.glob("*-cpu.json")
    assert saved.read_text(encoding="utf-8") == line + "\n"


def test_with_a_bundle_the_decoder_is_checked_and_timed(
    few: None, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cuda.main([*SMALL, "--bundle", str(bundle), "--base", str(bundle.parent / "llama-fp32")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    decoders = [row for row in result["parity"] if "blend" in row]
    assert [row["blend"] for row in decoders] == ["no adapter", "one adapter", "three"] * 2
    assert all(row["equal"] == row["tokens"] == 9 for row in decoders)
    assert [row["rank"] for row in result["decode"]] == [0, 16, 48] * 4
    assert all(row["new_blend"]["least"] > 0 and row["cached_blend"]["median"] > 0 for row in result["compose"])
    assert {row["graph"] for row in result["placement"]} >= {"decoder of bundle", "embedder"}
    assert [row["sequences"] for row in result["batch"]] == [1, 3] * 2
    assert all(row["equal"] == row["sequences"] and row["tokens_per_s"] > 0 for row in result["batch"])


def test_without_cuda_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(device, "has_cuda_provider", lambda: False)
    assert cuda.main([]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("device cuda cannot be used: the installed onnxruntime")
    assert shown.err.count("\n") == 1


def test_a_folder_that_holds_no_base_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main([*SMALL, "--base", str(tmp_path / "absent")]) == 1
    assert capsys.readouterr().err.endswith("absent' holds no base.json; make it with 'edgecompose-export base'\n")


def test_a_wrong_result_is_named(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(merge_parity, "relative_error", lambda a, b, s: 0.5 * (s.majority_sign == "frequency"))
    assert cuda.main([*SMALL, "--bundle", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.err == (
        "FAILED: ties: relative error 5.00e-01, 1e-05 is allowed (int4; density=0.5, majority_sign=frequency)\n"
    )
    passed = {row["method"]: row["passed"] for row in json.loads(shown.out.splitlines()[-1])["parity"]}
    assert passed == {"linear": True, "ties": False}


def test_an_answer_that_company_changes_is_named(
    few: None, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = [BatchRate("cpu", 3, tokens_per_s=9.0, of_one=2.0, equal=2)]
    monkeypatch.setattr(batch_times, "batch_rates", lambda *_, **__: rates)
    assert cuda.main([*SMALL, "--bundle", str(bundle)]) == 1
    assert "FAILED: 3 sequences on cpu: 1 answers are not those alone\n" in capsys.readouterr().err


def test_a_method_that_cannot_be_run_is_named(
    few: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Broken(Merger):
        def merge(
            self, adapters: Sequence[Adapter], weights: Sequence[float], settings: MergeSettings, inner: Any = None
        ) -> MergedAdapter:
            if self._resident is not None and settings.method == "linear":
                raise RuntimeError("no kernel\nfor it")
            return super().merge(adapters, weights, settings, inner)

    monkeypatch.setattr(merge_parity, "Merger", Broken)
    assert cuda.main([*SMALL, "--bundle", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.err == (
        "FAILED: linear: relative error inf, 1e-05 is allowed (int4: RuntimeError: no kernel for it)\n"
    )
    assert json.loads(shown.out.splitlines()[-1])["parity"][0]["error"] == "inf"


def test_the_error_of_exact_methods_is_that_of_the_update() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((2, 4, width)).astype(np.float32) for width in (8, 6))
    expected, exact, factor_wise = {"q_proj": (a, b)}, MergeSettings("product"), MergeSettings("linear")
    scaled = {"q_proj": (a * np.float32(2), b * np.float32(0.5))}
    assert (
        merge_parity.relative_error(scaled, expected, exact)
        < 1e-6
        < merge_parity.relative_error(scaled, expected, factor_wise)
    )
    fewer = {"q_proj": (a[:, :3], b[:, :3])}
    assert merge_parity.relative_error(fewer, expected, exact) > 1e-3
    assert merge_parity.relative_error(fewer, expected, factor_wise) == np.inf
    assert merge_parity.relative_error({}, expected, exact) == np.inf
    assert merge_parity.relative_error({"q_proj": (a + np.float32(np.nan), b)}, expected, exact) == np.inf


def test_a_vote_that_ties_may_flip_and_no_more() -> None:
    a, b = np.ones((1, 1, 200_000), np.float32), np.ones((1, 1, 8), np.float32)
    for flipped, passes in ((2, True), (3, False)):
        flipped_a = a.copy()
        flipped_a[..., :flipped] = -1
        error = merge_parity.relative_error({"q": (flipped_a, b)}, {"q": (a, b)}, MergeSettings("ties"))
        assert (error <= merge_parity.TOLERANCE) is passes
        assert merge_parity.relative_error({"q": (flipped_a, b)}, {"q": (a, b)}, MergeSettings("linear")) == 2


@pytest.mark.parametrize(("operator", "inputs"), [("Identity", 1), ("Add", 2)])
def test_the_graph_that_copies(operator: str, inputs: int) -> None:
    session = device.open_session(operators.one_node(operator, inputs), CPU, name="copy")
    values = np.arange(300, dtype=np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": values})[0], values * inputs)
