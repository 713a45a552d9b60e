"""The command that `make binary` froze does what the library does: without Python, without PATH, without a network."""

from __future__ import annotations

import json
import platform
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from edgecompose import Request, __version__, open_bundle
from tests.network import without_network

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "models/demo"
EXECUTABLES = {
    "folder": ROOT / "dist/edgecompose/edgecompose",
    "file": ROOT / f"dist/edgecompose-{__version__}-{platform.system().lower()}-{platform.machine()}",
}
PROMPT = "Customer review of a business: Great soup.\nPositive or negative?\nAnswer:"
TOKENS = 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(path.is_file() for path in EXECUTABLES.values()), reason="dist/ is not built; run 'make binary'"
    ),
    pytest.mark.skipif(not (BUNDLE / "manifest.json").is_file(), reason="models/demo is not built; run 'make bundle'"),
]


@pytest.fixture(params=EXECUTABLES)
def executable(request: pytest.FixtureRequest) -> Path:
    return EXECUTABLES[request.param]


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What the library in this process makes of the prompt."""
    with open_bundle(BUNDLE, device="cpu") as composer:
        answer = composer.run(PROMPT, Request(max_tokens=TOKENS))
    return {"answer": answer.text, "composition": answer.composition, "weights": dict(answer.retrieval.weights)}


def call(
    executable: Path, *arguments: object, cwd: Path, stdin: str = "", prefix: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run it with nothing in the environment but HOME and TMPDIR, from a folder of its own."""
    folders = {name: cwd / name for name in ("HOME", "TMPDIR", "cwd")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    environment = {name: str(folders[name]) for name in ("HOME", "TMPDIR")}
    done = subprocess.run(
        [*(prefix or []), str(executable), *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        cwd=folders["cwd"],
        check=False,
        timeout=120,
    )
    assert all(not list(folder.iterdir()) for folder in folders.values()), "something was left behind"
    return done


def test_it_answers_as_the_library_does(executable: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    arguments = ("run", BUNDLE, PROMPT, "--max-tokens", TOKENS, "--device", "cpu", "--json")
    done = call(executable, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert {key: result[key] for key in ("answer", "composition")} == {
        k: expected[k] for k in ("answer", "composition")
    }
    assert result["weights"] == pytest.approx(expected["weights"])


def test_it_answers_where_there_is_no_network(tmp_path: Path, expected: dict[str, Any]) -> None:
    prefix = without_network()
    if prefix is None:
        pytest.skip("this machine does not let us start a process without a network (unshare -rn fails)")
    arguments = ("run", BUNDLE, PROMPT, "--max-tokens", TOKENS, "--json")
    done = call(EXECUTABLES["folder"], *arguments, cwd=tmp_path, prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["answer"] == expected["answer"]


@pytest.mark.parametrize("form", ["peft", "onnx-adapter", "gguf"])
def test_it_writes_adapters(form: str, tmp_path: Path, expected: dict[str, Any]) -> None:
    output = tmp_path / "blend"
    arguments = ("compose", BUNDLE, PROMPT, "-o", output, "--format", form, "--device", "cpu", "--json")
    done = call(EXECUTABLES["folder"], *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["composition"] == expected["composition"]
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert result["files"] == ([str(output / name) for name in names] if form == "peft" else [str(output)])
    assert all(Path(name).stat().st_size > 100 for name in result["files"])


def test_one_file_composes_too(tmp_path: Path, expected: dict[str, Any]) -> None:
    output = tmp_path / "blend"
    done = call(EXECUTABLES["file"], "compose", BUNDLE, PROMPT, "-o", output, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["composition"] == expected["composition"]
    assert sorted(path.name for path in output.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_it_serves_lines(executable: Path, tmp_path: Path, expected: dict[str, Any]) -> None:
    params = {"prompt": PROMPT, "model": "auto", "max_tokens": TOKENS}
    call_line = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "complete", "params": params})
    command = [str(executable), "serve", str(BUNDLE), "--stdio", "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={"HOME": str(tmp_path)}, cwd=tmp_path
    ) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        process.stdin.write(f"{call_line}\n")
        process.stdin.flush()
        result = json.loads(process.stdout.readline())["result"]
        process.stdin.close()  # which ends it
        assert (process.stderr.read(), process.wait(20)) == ("", 0)
    text = result["choices"][0]["text"]  # it goes on from the prompt, so the space before it is a part of it
    assert text == f" {expected['answer']}"
    assert result["edgecompose"]["composition"] == expected["composition"]


def test_it_serves_http(tmp_path: Path) -> None:
    """The server is in it whole, its page too."""
    command = [str(EXECUTABLES["folder"]), "serve", str(BUNDLE), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={"HOME": str(tmp_path)}) as process:
        try:
            assert process.stderr is not None
            url = process.stderr.readline().split()[3]
            with httpx.Client(base_url=url, trust_env=False, transport=httpx.HTTPTransport(retries=5)) as client:
                for path, content in (("/", "<html"), ("/health", "{"), ("/metrics", "# HELP"), ("/v1/models", "auto")):
                    assert content in client.get(path).raise_for_status().text
        finally:
            process.terminate()


def test_it_evaluates_inspects_and_verifies(tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    row = {"task": "yelp", "prompt": PROMPT, "answer": "positive", "choices": ["positive", "negative"]}
    data.write_text(json.dumps(row), encoding="utf-8")
    done = call(EXECUTABLES["folder"], "eval", BUNDLE, data, "--methods", "base,own", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(json.loads(done.stdout)["variants"]) == ["base", "own"]
    reported = call(EXECUTABLES["folder"], "eval", BUNDLE, data, "--report", tmp_path / "report", cwd=tmp_path)
    assert reported.returncode == 1 and "this executable does not hold" in reported.stderr
    for command in ("inspect", "verify"):
        done = call(EXECUTABLES["folder"], command, BUNDLE, "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["problems"] == []


def test_doctor_finds_what_was_frozen(tmp_path: Path) -> None:
    done = call(EXECUTABLES["folder"], "doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["onnxruntime_packages"] == {"onnxruntime": result["versions"]["onnxruntime"]}
    assert (result["problems"], result["telemetry_disabled"]) == ([], True)


def test_a_chat_remembers(tmp_path: Path) -> None:
    talk = "Hello!\nWho are you?\n"
    done = call(EXECUTABLES["folder"], "chat", BUNDLE, "--json", "--max-tokens", 2, cwd=tmp_path, stdin=talk)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (json.loads(line)["tokens"]["prompt"] for line in done.stdout.splitlines())
    assert second > first


def test_errors_exit_with_1_and_usage_with_2(executable: Path, tmp_path: Path) -> None:
    assert call(executable, "--version", cwd=tmp_path).stdout == f"edgecompose, version {__version__}\n"
    absent = call(executable, "run", tmp_path / "absent", PROMPT, cwd=tmp_path)
    assert (absent.returncode, absent.stdout) == (1, "")
    assert absent.stderr.startswith("edgecompose: ") and "is not a directory" in absent.stderr
    usage = call(executable, "run", cwd=tmp_path)
    assert (usage.returncode, usage.stdout) == (2, "")
    assert usage.stderr.startswith(f"Usage: {executable.name} run ")


def test_it_holds_nothing_of_build_time_and_the_licences_of_the_rest() -> None:
    folder = EXECUTABLES["folder"].parent / "_internal"
    names = {path.name.split("-")[0].split(".")[0].lower() for path in folder.iterdir()}
    assert not names & {"torch", "transformers", "peft", "onnx", "matplotlib", "huggingface_hub", "google"}
    assert {"edgecompose", "numpy", "onnxruntime", "python", "usearch"} <= {
        path.name for path in (folder / "licenses").iterdir()
    }
    assert not list(folder.rglob("direct_url.json")), "metadata says where it was built"


def test_the_runtime_starts_no_python() -> None:
    """Where there is none, sys.executable is the command itself."""
    for path in (ROOT / "edgecompose").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "sys.executable" not in text and "multiprocessing" not in text and "subprocess" not in text, path.name


def test_pyinstaller_is_an_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [requirement.split(">")[0] for requirement in extras["binary"]] == ["pyinstaller"]
