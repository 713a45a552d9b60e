"""Standard streams that are closed, full, or of another encoding."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgecompose.cli.terminal import streams
from edgecompose.cli.terminal.streams import json_line, read_input, read_input_line
from edgecompose.errors import EdgeComposeError
from tests.cli.calls import PROMPT
from tests.cli.processes import environment, run_in_shell

#: It starts processes; `make check` leaves it out.
pytestmark = pytest.mark.slow

FULL = "standard output': No space left on device"
CLOSED = "standard output': Bad file descriptor; it is closed"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("run", "--help"), ("inspect", "{bundle}", "--json")]
)
@pytest.mark.parametrize(("redirection", "message"), [(">/dev/full", FULL), (">&-", CLOSED)])
def test_an_output_that_cannot_be_written_is_one_line(
    bundle: Path, arguments: tuple[str, ...], redirection: str, message: str
) -> None:
    code, out, err = run_in_shell(redirection, *(a.format(bundle=bundle) for a in arguments))
    assert (code, out) == (1, "")
    assert message in err and len(err.splitlines()) == 1


def test_an_answer_that_nobody_can_get_is_an_error(bundle: Path) -> None:
    for options in ((), ("--json",)):
        code, _, err = run_in_shell(">&-", "run", bundle, PROMPT, *options)
        assert code == 1 and CLOSED in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("--help",), ("inspect", "{bundle}")])
def test_a_pipe_that_nobody_reads_ends_the_command_in_silence(bundle: Path, arguments: tuple[str, ...]) -> None:
    line = [sys.executable, "-m", "edgecompose", *(a.format(bundle=bundle) for a in arguments)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("redirection", ["2>&-", pytest.param("2>/dev/full", marks=pytest.mark.slow)])
def test_an_error_that_cannot_be_said_keeps_its_exit_code(bundle: Path, redirection: str) -> None:
    assert run_in_shell(redirection, "inspect", "absent") == (1, "", "")
    assert run_in_shell(redirection, "inspect") == (2, "", "")
    code, out, err = run_in_shell(redirection, "run", bundle, PROMPT, "--explain")
    assert (code, err) == (0, "") and out


@pytest.mark.parametrize("command", ["run", "chat"])
def test_an_input_that_is_closed_is_an_error(bundle: Path, command: str) -> None:
    for arguments in ((command, bundle), (command, bundle, *(["-"] if command == "run" else []))):
        code, out, err = run_in_shell("<&-", *arguments)
        assert (code, out) == (1, "")
        assert "standard input cannot be read (Bad file descriptor)" in err and len(err.splitlines()) == 1


def test_no_file_gets_the_descriptor_of_a_closed_stream() -> None:
    code = (
        "from edgecompose.cli.terminal.streams import prepare_streams; prepare_streams(); "
        "import os; fd = os.open('/dev/null', os.O_RDONLY); import sys; os._exit(fd)"
    )
    line = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    assert subprocess.run(line, env=environment(), check=False).returncode > 2


@pytest.mark.parametrize(
    "encoding",
    ["latin-1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ascii", "cp1252", "utf-8", "cp437:strict"))],
)
def test_any_encoding_of_the_output_gets_an_answer(bundle: Path, encoding: str) -> None:
    def text(*arguments: object) -> str:
        code, out, err = run_in_shell("", *arguments, PYTHONIOENCODING=encoding)
        assert code == 0 and "Traceback" not in err
        return out

    assert "animals" in text("retrieve", bundle, "l'été, 猫")
    assert text("run", bundle, "l'été, 猫", "--explain")
    assert text("inspect", bundle) and text("--help")
    result = json.loads(text("run", bundle, "l'été, 猫", "--json"))
    assert result["prompt"] == "l'été, 猫"


def test_a_locale_without_characters_is_no_obstacle(bundle: Path) -> None:
    code, out, _ = run_in_shell("", "run", bundle, "l'été, 猫", "--json", LC_ALL="C")
    assert code == 0 and json.loads(out)["prompt"] == "l'été, 猫"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_name_that_is_not_unicode_is_a_clear_error(encoding: str) -> None:
    line = f"PYTHONIOENCODING={encoding} exec \"$0\" -m edgecompose inspect $(printf '/caf\\351')"
    done = subprocess.run(["sh", "-c", line, sys.executable], capture_output=True, env=environment(), check=False)
    assert done.returncode == 1
    assert done.stderr.decode("latin-1").count("\n") == 1
    assert b"bundle '/caf\\udce9' is not a directory" in done.stderr


def test_a_prompt_that_is_not_unicode_is_a_clear_error(bundle: Path) -> None:
    line = 'exec "$0" -m edgecompose run "$1" $(printf \'caf\\351\')'
    command = ["sh", "-c", line, sys.executable, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 1 and "not valid Unicode" in done.stderr and len(done.stderr.splitlines()) == 1


class _Stdin:
    """Standard input of some bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"a\n\n", "a"), (b"a\r\n", "a"), (b"\n a \n", "\n a "), (b"\xef\xbb\xbfa", "a"), (b"", "")],
)
def test_a_prompt_is_read_without_its_line_end_and_byte_order_mark(
    content: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", _Stdin(content))
    assert read_input() == text


def test_an_endless_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_BYTES", 8)
    for read in (read_input, read_input_line):
        monkeypatch.setattr(sys, "stdin", _Stdin(b"123456789"))
        with pytest.raises(EdgeComposeError, match="standard input has more than"):
            read()


@given(
    value=st.dictionaries(st.text(), st.text(st.characters())), encoding=st.sampled_from(["utf-8", "cp1252", "ascii"])
)
def test_json_survives_any_encoding(value: dict[str, str], encoding: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        line = json_line(value)
    assert json.loads(line.encode(encoding).decode(encoding)) == value
    assert "\n" not in line
