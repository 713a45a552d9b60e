"""Who may import whom, what is public, and what running the runtime loads."""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import edgecompose
from tests.fixtures_tiny import TASKS

ROOT = Path(__file__).parents[1]
RUNTIME, EXPORT = ROOT / "edgecompose", ROOT / "export" / "edgecompose_export"
BUILD_TIME = {"torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "gguf", "edgecompose_export"}
#: Modules of ours that a module may import; those above it (composer, evaluator, report, scoreboard, cli) are free.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "device": {"errors"},
    "console": {"errors"},
    "typed_json": {"errors"},
    "manifest": {"errors", "typed_json"},
    "quantization": {"errors"},
    "chat_template": {"errors"},
    "tokenization": {"errors", "chat_template", "memory"},
    "bundle": {"errors", "manifest"},
    "retrieval": {"errors", "manifest", "whitening"},
    "whitening": {"errors"},
    "weighting": {"errors", "retrieval"},
    "adapter": {"errors", "manifest", "quantization", "trimming"},
    "embedder": {"errors", "device", "manifest"},
    "trimming": {"errors", "quantization"},
    "core_space": set(),
    "buffers": {"device"},
    "methods": {"errors"},
    "blend": {"device", "errors"},
    "rows": {"blend", "device", "quantization"},
    "graph_runner": {"device"},
    "mixing": {"adapter", "blend", "buffers", "core_space", "graph_runner", "methods", "rows", "trimming"},
    "merging": {
        "errors",
        "adapter",
        "blend",
        "buffers",
        "core_space",
        "device",
        "graph_runner",
        "methods",
        "mixing",
        "rows",
        "trimming",
    },
    "binding": {"errors", "blend", "device", "manifest"},
    "folding": {"errors", "binding", "blend", "buffers", "device", "manifest"},
    "decoder": {"errors", "binding", "blend", "device", "folding", "manifest"},
    "sampling": {"errors"},
    "conversation": {"errors"},
    "clock": set(),
    "memory": set(),
    "server_settings": {"errors"},
    "generation": {"errors", "decoder", "sampling", "tokenization"},
    "prefixes": {"decoder"},
    "language_model": {
        "blend",
        "buffers",
        "bundle",
        "clock",
        "conversation",
        "decoder",
        "device",
        "errors",
        "folding",
        "generation",
        "manifest",
        "memory",
        "prefixes",
        "sampling",
        "tokenization",
    },
    "request": {
        "errors",
        "blend",
        "conversation",
        "device",
        "generation",
        "manifest",
        "methods",
        "retrieval",
        "sampling",
        "weighting",
    },
    "writing": {"errors", "request"},
    "atomic": set(),
    "architectures": {"errors"},
    "decoder_modules": {"architectures", "manifest"},
    "float_checkpoint": {"bundle", "errors"},
    "merged_model": {"architectures", "atomic", "blend", "errors", "float_checkpoint", "manifest"},
    "peft_folder": {"architectures", "errors", "blend", "decoder_modules", "manifest"},
    "gguf_lora": {"architectures", "blend", "decoder_modules", "errors", "manifest"},
    "onnx_adapter": {"binding", "blend", "device", "errors"},
    "evaluation": {"errors"},
    "outcomes": {"errors", "typed_json"},
    "judgement": {"clock", "evaluation", "request"},
    "eval_charts": {"errors", "judgement"},
    "eval_report": {"clock", "eval_charts", "judgement", "scoreboard"},
}
#: Packages of the extra 'server', which only its modules import.
SERVER = {"prometheus_client", "starlette", "uvicorn"}
#: The test file of each module that has none of its own name.
COVERED = {
    "edgecompose/__init__": "test_architecture", "edgecompose/__main__": "test_architecture",
    "edgecompose/composer": "test_bundles_export", "edgecompose/decoder": "test_base_export",
    "edgecompose/console": "test_cli", "edgecompose/methods": "test_merging", "edgecompose/blend": "test_merging",
    "edgecompose/graph_runner": "test_merging", "edgecompose/typed_json": "test_manifest",
    "edgecompose/mixing": "test_merging", "edgecompose/judgement": "test_evaluator",
    "edgecompose/outcomes": "test_evaluator", "edgecompose/scoreboard": "test_eval_report",
    "edgecompose/eval_charts": "test_eval_report",
    "edgecompose/binding": "test_folding", "edgecompose/request": "test_cli",
    "edgecompose/cli_eval": "test_cli", "edgecompose/cli_options": "test_cli", "edgecompose/cli_serve": "test_cli",
    "edgecompose/chat": "test_cli", "edgecompose/clock": "test_evaluator", "edgecompose/errors": "test_architecture",
    "edgecompose/writing": "test_language_model",
    "edgecompose/peft_folder": "test_cli", "edgecompose/decoder_modules": "test_merged_model",
    "edgecompose/atomic": "test_merged_model", "edgecompose/float_checkpoint": "test_merged_model",
    "edgecompose/report": "test_cli", "edgecompose/server_metrics": "test_server",
    "edgecompose/server_settings": "test_serving",
    "edgecompose_export/__init__": "test_architecture",
    "edgecompose_export/__main__": "test_architecture", "edgecompose_export/adapters": "test_adapters_export",
    "edgecompose_export/base": "test_base_export", "edgecompose_export/bundles": "test_bundles_export",
    "edgecompose_export/recipe": "test_bundles_export",
    "edgecompose_export/base_source": "test_base_export", "edgecompose_export/cli": "test_export_cli",
    "edgecompose_export/gguf_source": "test_lora_source", "edgecompose_export/mlx_source": "test_lora_source",
    "edgecompose_export/peft_source": "test_adapters_export",
    "edgecompose_export/embedder": "test_embedder_export", "edgecompose_export/examples": "test_bundles_export",
    "edgecompose_export/onnx_files": "test_embedder_export",
}  # fmt: skip


@functools.cache
def modules(package: Path) -> dict[str, ast.Module]:
    return {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.glob("*.py"))}


def imported(tree: ast.Module) -> set[str]:
    """Dotted names of everything that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(tree: ast.Module) -> set[str]:
    """Modules of the runtime that a module imports."""
    known = set(modules(RUNTIME))
    parts = [name.split(".") for name in imported(tree)]
    return {name[1] for name in parts if name[0] == "edgecompose" and len(name) > 1 and name[1] in known}


def foreign(tree: ast.Module) -> set[str]:
    """Distributions that a module imports, the standard library apart."""
    roots = {name.split(".")[0] for name in imported(tree)}
    return roots - set(sys.stdlib_module_names) - {"edgecompose"}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "HF_"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_arrows_point_down() -> None:
    trees = modules(RUNTIME)
    for name, allowed in ARROWS.items():
        assert ours(trees[name]) <= allowed, f"{name} imports {sorted(ours(trees[name]) - allowed)}"
    top = {
        "__init__", "__main__", "aio", "batch_file", "chat", "cli", "cli_eval", "cli_options", "cli_serve",
        "composer", "evaluator", "openai_api", "report",
        "scoreboard",
        "server", "server_metrics", "serving", "stdio",
    }  # fmt: skip
    assert set(trees) - set(ARROWS) == top


def test_there_is_no_circle() -> None:
    graph = {name: ours(tree) for name, tree in modules(RUNTIME).items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())[0] == "errors"


def test_only_the_top_sees_the_composer() -> None:
    importers = {name for name, tree in modules(RUNTIME).items() if "composer" in ours(tree)}
    assert importers == {
        "__init__", "aio", "batch_file", "chat", "cli_options", "evaluator", "openai_api", "scoreboard", "server",
        "serving", "stdio",
    }  # fmt: skip
    assert {name for name, tree in modules(RUNTIME).items() if ours(tree) & {"report", "cli"}} == {
        "__main__", "cli", "openai_api", "server", "stdio",
    }  # fmt: skip


def test_onnxruntime_is_imported_in_one_place() -> None:
    importers = {name for name, tree in modules(RUNTIME).items() if "onnxruntime" in foreign(tree)}
    assert importers == {"device"}


def test_the_runtime_imports_what_it_declares_and_nothing_of_build_time() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in project["dependencies"]}
    used = set().union(*(foreign(tree) for tree in modules(RUNTIME).values()))
    assert used == names | {"onnxruntime", "matplotlib", "gguf"} | SERVER
    assert used & BUILD_TIME == {"gguf"}  # an extra, imported when a file is written


def test_matplotlib_is_an_extra_that_one_module_imports_when_it_draws() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [re.split(r"[<>=]", requirement)[0] for requirement in extras["report"]] == ["matplotlib"]
    assert "edgecompose[gguf,report,server]" in extras["test"]
    assert {name for name, tree in modules(RUNTIME).items() if "matplotlib" in foreign(tree)} == {"eval_charts"}
    done = run_python("import sys; import edgecompose.cli; print('matplotlib' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_the_server_is_an_extra_that_nothing_else_imports() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {re.split(r"[<>=]", wanted)[0].replace("-", "_") for wanted in extras["server"]} == SERVER
    importers = {name for name, tree in modules(RUNTIME).items() if foreign(tree) & SERVER}
    assert importers == {"server", "server_metrics", "serving"}
    done = run_python(f"import sys; import edgecompose.cli; print({SERVER} & set(sys.modules))")
    assert (done.returncode, done.stdout) == (0, "set()\n")


def test_the_export_imports_what_it_declares() -> None:
    project = tomllib.loads((ROOT / "export/pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["cpu"]]
    names = {re.split(r"[<>=\[ ]", requirement)[0].replace("-", "_") for requirement in declared}
    runtime = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names |= {re.split(r"[<>=\[ ]", requirement)[0] for requirement in runtime} | {"onnxruntime", "edgecompose_export"}
    used = set().union(*(foreign(tree) for tree in modules(EXPORT).values()))
    assert used <= names, f"not declared: {sorted(used - names)}"


def test_what_is_public_is_listed() -> None:
    public = {
        name for name, value in vars(edgecompose).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "TYPE_CHECKING"
    }  # fmt: skip
    late = {"AsyncComposer", "AsyncGeneration"}  # imported when they are asked for
    assert {type(getattr(edgecompose, name)) for name in late} == {type}
    assert public | late == set(edgecompose.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgecompose.nothing  # type: ignore[attr-defined]
    assert edgecompose.__all__ == sorted(edgecompose.__all__)


def test_the_versions_agree() -> None:
    import edgecompose_export

    for folder, version in ((ROOT, edgecompose.__version__), (ROOT / "export", edgecompose_export.__version__)):
        assert tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] == version


def test_every_error_of_ours_is_in_the_tree_that_the_docstring_draws() -> None:
    from edgecompose import errors

    classes = {n: v for n, v in vars(errors).items() if isinstance(v, type) and v.__module__ == errors.__name__}
    assert all(issubclass(kind, errors.EdgeComposeError) and kind.exit_code == 1 for kind in classes.values())
    lines = (errors.__doc__ or "").splitlines()
    drawn = {m[2]: len(m[1]) // 4 for m in (re.match(r" {4}([│├└─ ]*)(\w+) ", line) for line in lines) if m}
    root = len(errors.EdgeComposeError.__mro__)
    assert drawn == {name: len(kind.__mro__) - root for name, kind in classes.items()}


@pytest.mark.parametrize("package", [RUNTIME, EXPORT], ids=lambda path: path.name)
def test_every_module_has_tests(package: Path) -> None:
    names = set(modules(package))
    for name in names:
        file = Path(__file__).with_name(f"{COVERED.get(f'{package.name}/{name}', f'test_{name}')}.py")
        assert file.is_file(), f"{package.name}/{name}.py has no {file.name}: write it, or name another in COVERED"
        assert package.name in file.read_text(encoding="utf-8")
    assert {key.split("/")[1] for key in COVERED if key.startswith(f"{package.name}/")} <= names


def test_telemetry_is_switched_off_before_onnxruntime_is_imported() -> None:
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("seen", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
import edgecompose
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "seen 1\n", "")


def test_importing_changes_no_variable_of_the_host_but_the_one_for_telemetry() -> None:
    code = """
import os
before = dict(os.environ)
import edgecompose, edgecompose.cli, edgecompose.server
print({name: value for name, value in os.environ.items() if before.get(name) != value}, set(before) - set(os.environ))
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "{'ORT_DISABLE_TELEMETRY': '1'} set()\n"), done.stderr


def test_importing_and_running_loads_nothing_of_build_time(bundle: Path) -> None:
    code = """
import json, sys
from edgecompose.cli import main
for extra in ([], ["--choices", "yes,no", "--json"], ["--adapter", "animals=1", "--method", "ties"]):
    main(["run", sys.argv[1], sys.argv[2], *extra], standalone_mode=False)
print()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = run_python(code, bundle, TASKS["animals"][0])
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert {"edgecompose", "onnxruntime", "usearch", "numpy"} <= loaded
    assert not loaded & BUILD_TIME


def test_both_packages_can_be_run_as_modules() -> None:
    for package in ("edgecompose", "edgecompose_export"):
        start = f"runpy.run_module('{package}', run_name='__main__')"
        done = run_python(f"import runpy, sys; sys.argv = ['{package}', '--help']; {start}")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage: " in done.stdout


def test_the_help_of_the_export_loads_no_torch() -> None:
    """Its commands import what they need when they run, so that help and mistakes are quick."""
    heavy = "sorted({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    done = run_python(f"import sys; import edgecompose_export.cli; print({heavy})")
    assert (done.returncode, done.stdout) == (0, "[]\n")


@pytest.mark.skipif(sys.platform != "linux", reason="seen on Linux")
def test_usearch_before_onnxruntime_is_refused_and_does_not_crash() -> None:
    command = [sys.executable, "-c", "import usearch.index; import edgecompose"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 1
    assert "import edgecompose (or onnxruntime) before usearch" in finished.stderr
