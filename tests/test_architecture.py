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
from pathlib import Path

import click
import pytest

import edgecompose
from edgecompose.cli.main import COMMANDS, main
from tests.fixtures_tiny import TASKS

ROOT = Path(__file__).parents[1]
RUNTIME, EXPORT = ROOT / "edgecompose", ROOT / "export" / "edgecompose_export"
BUILD_TIME = {"torch", "transformers", "peft", "optimum", "onnx", "onnx_ir", "gguf", "edgecompose_export"}
#: The rooms that each room may import, beside itself and the ground. Data flows down this list.
GROUND = {"errors", "timing", "caching", "settings", "closing", "cancellation"}
ROOMS: dict[str, set[str]] = {
    "guard": set(),
    "bundle": set(),
    "engine": {"bundle"},
    "retrieval": {"bundle", "engine"},
    "merging": {"bundle", "engine"},
    "generation": {"bundle", "engine"},
    "formats": {"bundle", "engine"},
    "pipeline": {"bundle", "engine", "retrieval", "merging", "generation", "formats"},
    "evaluation": {"bundle", "engine", "retrieval", "merging", "generation", "pipeline"},
    "server": {"bundle", "engine", "retrieval", "merging", "generation", "pipeline"},
    "cli": {"bundle", "engine", "retrieval", "merging", "generation", "formats", "pipeline", "evaluation", "server"},
}
#: Packages of the extra 'server', which only its modules import.
SERVER = {"h11", "prometheus_client", "starlette", "uvicorn"}


@functools.cache
def modules(package: Path) -> dict[str, ast.Module]:
    """Module -> its syntax, by dotted name below the package; a room's __init__ goes by the room's name."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


#: Folders with modules: the rooms, and those within one.
FOLDERS = [path.parent.relative_to(RUNTIME).as_posix().replace("/", ".") for path in RUNTIME.glob("*/**/__init__.py")]


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
    """Modules of the runtime that a module imports, by dotted name below the package."""
    known = modules(RUNTIME)
    names = set()
    for name in imported(tree):
        root, _, below = name.partition(".")
        if root == "edgecompose" and below:
            names.add(next((n for n in (below, below.rpartition(".")[0]) if n in known), "__init__"))
    return names - {"__init__"}


def room_of(module: str) -> str:
    """The room of a module: its folder, the ground, or the pipeline."""
    room = module.partition(".")[0]
    return "ground" if room in GROUND else room if room in ROOMS else "pipeline"


def foreign(tree: ast.Module) -> set[str]:
    """Distributions that a module imports, the standard library apart."""
    roots = {name.split(".")[0] for name in imported(tree)}
    return roots - set(sys.stdlib_module_names) - {"edgecompose"}


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ORT_", "HF_"))}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'export'}", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


def test_a_room_imports_only_the_rooms_above_it() -> None:
    for name, tree in modules(RUNTIME).items():
        room = room_of(name)
        allowed = {"ground", "guard", room, *ROOMS.get(room, set())}
        wrong = {other for other in ours(tree) if room_of(other) not in allowed}
        assert not wrong or name in ("__init__", "__main__"), f"{name} of room {room} imports {sorted(wrong)}"


def test_there_is_no_circle_between_rooms_nor_between_modules() -> None:
    assert list(graphlib.TopologicalSorter(ROOMS).static_order())[-1] == "cli"
    graph = {name: ours(tree) for name, tree in modules(RUNTIME).items()}
    assert "errors" in list(graphlib.TopologicalSorter(graph).static_order())[:3]


def test_a_room_has_one_sentence_and_four_to_ten_files() -> None:
    for folder in FOLDERS:
        files = [name for name in modules(RUNTIME) if name.rpartition(".")[0] == folder and name not in FOLDERS]
        assert ast.get_docstring(modules(RUNTIME)[folder]), folder
        assert 4 <= len(files) <= 10, (folder, files)


def test_onnxruntime_is_imported_in_one_place() -> None:
    importers = {name for name, tree in modules(RUNTIME).items() if "onnxruntime" in foreign(tree)}
    assert importers == {"engine.device"}


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
    assert {name for name, tree in modules(RUNTIME).items() if "matplotlib" in foreign(tree)} == {"evaluation.charts"}
    done = run_python("import sys; import edgecompose.cli.main; print('matplotlib' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_the_server_is_an_extra_that_nothing_else_imports() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert {re.split(r"[<>=]", expected)[0].replace("-", "_") for expected in extras["server"]} == SERVER
    importers = {name for name, tree in modules(RUNTIME).items() if foreign(tree) & SERVER}
    assert importers == {
        f"server.http.{name}" for name in ("app", "body", "connection", "events", "gate", "metrics", "serving")
    }
    done = run_python(f"import sys; import edgecompose.cli.main; print({SERVER} & set(sys.modules))")
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
    assert edgecompose.__all__ == sorted(edgecompose._MODULES)
    for name in edgecompose.__all__:
        assert getattr(edgecompose, name).__name__ == name
    assert set(edgecompose.__all__) <= set(dir(edgecompose))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = edgecompose.nothing  # type: ignore[attr-defined]


def test_type_checkers_see_the_public_names_where_they_are_imported_from() -> None:
    tree = modules(RUNTIME)["__init__"]
    names = {
        alias.name: (node.module or "").removeprefix("edgecompose.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert names == edgecompose._MODULES


def test_importing_the_package_and_showing_its_help_load_no_library_for_numbers() -> None:
    heavy = {"numpy", "onnxruntime", "usearch", "tokenizers", "rich", "asyncio"}
    for code in ("import edgecompose", "import edgecompose.cli.main as m; m.main(['--help'], standalone_mode=False)"):
        done = run_python(f"{code}; import sys; print({heavy} & set(sys.modules))")
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()"), done.stderr


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


def test_telemetry_is_switched_off_before_onnxruntime_is_imported() -> None:
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("seen", os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
from edgecompose import open_bundle
"""
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "seen 1\n", "")


def test_importing_changes_no_variable_of_the_host_but_the_one_for_telemetry() -> None:
    code = """
import os
before = dict(os.environ)
import edgecompose.cli.run, edgecompose.server
print({name: value for name, value in os.environ.items() if before.get(name) != value}, set(before) - set(os.environ))
"""
    done = run_python(code)
    assert (done.returncode, done.stdout) == (0, "{'ORT_DISABLE_TELEMETRY': '1'} set()\n"), done.stderr


def test_importing_and_running_loads_nothing_of_build_time(bundle: Path) -> None:
    code = """
import json, sys
from edgecompose.cli.main import main
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


def test_the_table_of_commands_says_how_each_begins() -> None:
    for name, (module, help_text) in COMMANDS.items():
        command = main.get_command(click.Context(main), name)
        assert command is not None and command.name == name
        assert (command.help or "").startswith(help_text), name
        assert f"{module}.py" in {path.name for path in (RUNTIME / "cli").iterdir()}


def test_the_help_of_the_export_loads_no_torch() -> None:
    """Its commands import what they need when they run, so that help and mistakes are quick."""
    heavy = "sorted({'torch', 'transformers', 'onnx'} & set(sys.modules))"
    done = run_python(f"import sys; import edgecompose_export.cli; print({heavy})")
    assert (done.returncode, done.stdout) == (0, "[]\n")


@pytest.mark.skipif(sys.platform != "linux", reason="seen on Linux")
def test_usearch_before_onnxruntime_is_refused_and_does_not_crash() -> None:
    command = [sys.executable, "-c", "import usearch.index; from edgecompose import open_bundle"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert finished.returncode == 1
    assert "import onnxruntime (or edgecompose.composer) before usearch" in finished.stderr


@pytest.mark.parametrize("name", [name for name in modules(RUNTIME) if name not in ("__init__", "__main__", *FOLDERS)])
def test_every_module_has_its_file_of_tests(name: str) -> None:
    folder, _, module = name.rpartition(".")
    assert list((ROOT / "tests" / folder.replace(".", "/")).glob(f"test_{module}*.py"))
