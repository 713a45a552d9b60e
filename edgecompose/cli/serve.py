"""The commands `edgecompose serve` and `edgecompose batch`, which speak the OpenAI API."""

from __future__ import annotations

import io
import os
import select
import sys
from pathlib import Path
from typing import Any

import click

from edgecompose.cli.console import counting
from edgecompose.cli.options import (
    bundle_argument,
    device_option,
    json_option,
    kept_prompts,
    kv_cache_option,
    open_composer,
    print_json,
    prompt_cache_bytes_option,
    prompt_cache_option,
)
from edgecompose.server.batch import answer_calls, read_calls
from edgecompose.server.config import CallLimits, ServerSettings, read_key, server_names, server_origins
from edgecompose.server.http.run import run_server
from edgecompose.server.jsonrpc import bounded_lines
from edgecompose.server.stdio import StdioServer


@click.command()
@bundle_argument
@click.argument("calls", type=click.Path(path_type=Path, dir_okay=False))
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File of results.")
@click.option(
    "--parallel", type=click.IntRange(1), default=8, show_default=True, help="Answers that are written together."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer; by default as long as the context.")
@device_option
@kv_cache_option
@json_option
def batch(bundle: Path, calls: Path, output: Path, device: str, kv_cache: str, as_json: bool, **options: Any) -> None:
    """Answer CALLS, a file of OpenAI API calls in the form of its batch API; run it again to resume.

    A line is {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [...]}}.

    \b
    edgecompose batch models/demo calls.jsonl -o results.jsonl
    """
    parsed = read_calls(calls)
    with (
        open_composer(bundle, device, kv_cache=kv_cache) as composer,
        counting("answering", len(parsed)) as advance,
    ):
        done, failed = answer_calls(composer, parsed, output, advance=advance, **options)
    if as_json:
        print_json({"calls": len(parsed), "answered": done, "failed": failed, "output": str(output)})
    else:
        click.echo(f"{output}: {done} of {len(parsed)} calls answered now, {failed} with an error")


@click.command()
@bundle_argument
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen at; any but this machine's own needs a key.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with a key that callers have to send as a bearer token; also the variable EDGECOMPOSE_API_KEY.",
)
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name of this server; repeatable.")
@click.option("--allow-origin", multiple=True, metavar="URL", help="A site whose pages may call it; repeatable.")
@click.option("--model-alias", multiple=True, metavar="NAME", help="Another name of the model 'auto'; repeatable.")
@click.option("--workers", type=click.IntRange(1), help="Threads that compute; by default one an answer in progress.")
@click.option(
    "--active", type=click.IntRange(1), default=8, show_default=True, help="Answers that are written together."
)
@click.option(
    "--queue", type=click.IntRange(0), default=128, show_default=True, help="Requests that wait; more get 429."
)
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer; by default as long as the context.")
@click.option("--stdio", is_flag=True, help="Answer JSON-RPC lines on standard input instead, for a parent process.")
@device_option
@kv_cache_option
@prompt_cache_option
@prompt_cache_bytes_option
def serve(bundle: Path, device: str, kv_cache: str, stdio: bool, **options: Any) -> None:
    """Serve the OpenAI API, and a chat page, to programs on this machine.

    \b
    edgecompose serve models/demo
    edgecompose serve models/demo --stdio
    """
    settings = ServerSettings(
        hosts=server_names(options["host"], options["allow_host"]),
        origins=server_origins(options["allow_origin"]),
        key=None if stdio else read_key(options["api_key_file"]),
        aliases=options["model_alias"],
        calls=CallLimits(max_tokens=options["max_tokens"]),
        workers=options["workers"],
        active=options["active"],
        queue=options["queue"],
    )
    file, limit = options["prompt_cache"], options["prompt_cache_bytes"]
    with (
        open_composer(bundle, device, in_memory=True, kv_cache=kv_cache) as composer,
        kept_prompts(composer, file, limit),
    ):
        if not stdio:
            code = run_server(composer, settings, host=options["host"], port=options["port"], ready=_say_where)
            click.get_current_context().exit(code)
        composer.warm_up()
        lines = bounded_lines(_read, settings.body_bytes)
        StdioServer(composer, lines, _write_line, settings=settings, closed=_output_is_closed).serve()


def _say_where(url: str) -> None:
    click.echo(f"edgecompose: serving at {url} (Ctrl-C ends it)", err=True)


def _read(size: int) -> bytes:
    """Some bytes of standard input, as soon as there are any; none at its end."""
    try:
        return os.read(sys.stdin.fileno(), size)  # which holds no lock that the end of the process would wait for
    except (AttributeError, io.UnsupportedOperation):  # not a file, as in tests
        return sys.stdin.buffer.read(size)


def _write_line(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _output_is_closed() -> bool:
    """Whether nobody reads standard output any more, as far as the system says so before something is written."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such call on this system, or no file
        return False
