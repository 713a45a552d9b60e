"""Serves a bundle over standard input and output, for editors and tools that start a child process.

One JSON-RPC 2.0 message, or a batch of them, a line. Methods are those of the table of endpoints: `chat`, `complete`,
`embed` and `compose` take the body of the HTTP call as `params` and give its response as `result`. With `stream` true,
chunks come first, as notifications `piece` with the `id` of the call and the `text`. `models` lists names, `health`
tells whether the bundle has changed, `cancel` with `id` ends a call, `shutdown` ends the process. Calls are answered
one after another, the last four at once. A notification gets no answer.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from edgecompose.cancellation import Cancellation
from edgecompose.composer import Composer
from edgecompose.errors import BundleError, Cancelled, EdgeComposeError
from edgecompose.server import jsonrpc, protocol, responses
from edgecompose.server.config import ServerSettings
from edgecompose.server.endpoints import BY_METHOD, run_steps
from edgecompose.server.jsonrpc import Call, RpcError, TooLong
from edgecompose.server.protocol import ApiCall
from edgecompose.server.responses import Json

_METHODS = (*BY_METHOD, "models", "health", "cancel", "shutdown")
#: Seconds between two looks at whether anybody still reads the answers.
_LOOK = 0.5


class StdioServer:
    """Answers the lines of one input.

    Args:
        lines: messages, UTF-8; read by a thread of its own.
        write: is given each message of ours, a whole line; called by one thread at a time.
        settings: `calls` bounds each call; `active` and `queue` together bound the calls that wait.
        closed: whether nobody reads what is written any more, as far as it is known before the next line.
    """

    def __init__(
        self,
        composer: Composer,
        lines: Iterable[bytes | TooLong],
        write: Callable[[bytes], object],
        *,
        settings: ServerSettings,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._composer, self._lines, self._write_line = composer, lines, write
        self._settings, self._closed = settings, closed
        self._writing = threading.Lock()
        self._calls: dict[object, _Running] = {}
        self._unread = False

    def serve(self) -> None:
        """Answer until the input ends, `shutdown` is called or nobody reads; answers in progress stop."""
        lines: queue.Queue[bytes | TooLong | None] = queue.Queue(1)
        threading.Thread(target=self._read, args=(lines,), daemon=True).start()
        with ThreadPoolExecutor(1, "edgecompose-stdio") as thread:
            try:
                while not (self._unread or self._closed()):
                    try:
                        line = lines.get(timeout=_LOOK)
                    except queue.Empty:
                        continue
                    if line is None or not self._take(line, thread):
                        return
            finally:
                for running in list(self._calls.values()):
                    running.cancel()

    def _read(self, lines: queue.Queue[bytes | TooLong | None]) -> None:
        try:
            for line in self._lines:
                lines.put(line)
        finally:
            lines.put(None)

    def _take(self, line: bytes | TooLong, thread: ThreadPoolExecutor) -> bool:
        """Answer a line, or have it answered; False when that was the last."""
        if isinstance(line, bytes) and not line.strip():
            return True
        try:
            value = jsonrpc.parse_line(line)
        except RpcError as error:
            self._send(_failure(error.name, error.code, str(error)))
            return True
        if not isinstance(value, list):
            return self._begin(value, thread, self._send)
        if not value:
            self._send(_failure(None, jsonrpc.INVALID_REQUEST, "the batch is empty; send at least one message"))
            return True
        batch = _Batch(len(value), self._send)
        results = [self._begin(message, thread, batch.add) for message in value]
        return all(results)

    def _begin(self, message: object, thread: ThreadPoolExecutor, send: Callable[[Json | None], None]) -> bool:
        """Answer a message through `send`, now or later; None where it is a notification. False for the last."""
        try:
            call = jsonrpc.parse_message(message)
        except RpcError as error:
            send(_failure(error.name, error.code, str(error)))
            return True
        answer = _silent(send) if call.is_notification else send
        if call.method in ("health", "models", "cancel", "shutdown"):
            answer(self._at_once(call))
        elif call.method not in BY_METHOD:
            text = f"no method is called {call.method!r:.80}; use {', '.join(_METHODS)}"
            answer(_failure(call.name, jsonrpc.NO_METHOD, text))
        elif call.name in self._calls:
            text = f"a call with the id {call.name!r:.80} is still being answered; use another"
            answer(_failure(call.name, jsonrpc.INVALID_REQUEST, text))
        elif len(self._calls) >= self._settings.active + self._settings.queue:
            answer(_failure(call.name, jsonrpc.REFUSED, f"{len(self._calls)} calls wait; wait for an answer"))
        else:
            self._queue(call, thread, answer)
        return call.method != "shutdown"

    def _queue(self, call: Call, thread: ThreadPoolExecutor, answer: Callable[[Json | None], None]) -> None:
        running = _Running()
        key = running if call.is_notification else call.name
        self._calls[key] = running
        running.job = job = thread.submit(self._answer, call, running)

        def finish(job: Future[Json]) -> None:
            self._calls.pop(key, None)
            answer(_cancelled(call) if job.cancelled() else job.result())

        job.add_done_callback(finish)

    def _at_once(self, call: Call) -> Json:
        """The answer to a call that needs no model."""
        if call.method == "shutdown":
            return _success(call, None)
        if call.method == "models":
            return _success(call, {"models": protocol.model_names(self._composer)})
        if call.method == "health":
            bundle = self._composer.bundle
            return _success(call, {"status": "ok", "bundle": bundle.manifest.name, "bundle_changed": bundle.changed})
        name = call.params.get("id")
        if isinstance(name, (dict, list)):
            return _failure(call.name, jsonrpc.INVALID_PARAMS, "params.id has to be a string or a number")
        running = self._calls.get(name)
        if running is not None:
            running.cancel()
        return _success(call, {"cancelled": running is not None})

    def _answer(self, call: Call, running: _Running) -> Json:
        """The response to a call, whatever happens."""
        try:
            return _success(call, self._result(call, running.cancellation))
        except Cancelled:
            return _cancelled(call)
        except Exception as error:
            if isinstance(error, (BundleError, OSError)) and self._composer.bundle.changed:
                error = responses.bundle_changed(error)
            if isinstance(error, EdgeComposeError):
                failure = responses.error_json(error)["error"]
                return _failure(call.name, jsonrpc.REFUSED, failure["message"], failure)
            return _failure(call.name, jsonrpc.INTERNAL, f"{type(error).__name__}: {error}")

    def _result(self, call: Call, cancellation: Cancellation) -> Json:
        action = BY_METHOD[call.method].action
        limits = self._settings.calls
        if not isinstance(action, str):
            return run_steps(action(self._composer, call.params, limits)(cancellation), cancellation)
        return self._generate(protocol.call_of(self._composer, action, call.params, limits), call, cancellation)

    def _generate(self, api_call: ApiCall, call: Call, cancellation: Cancellation) -> Json:
        answers = []
        for index, prompt in enumerate(api_call.prompts):
            cancellation.check()
            with self._composer.generate(prompt, api_call.request, cancellation=cancellation) as generation:
                while (chunk := generation.step()) is not None:
                    cancellation.check()
                    if api_call.stream and chunk.text and not call.is_notification:
                        self._send({"method": "piece", "params": {"id": call.name, "index": index, "text": chunk.text}})
                answers.append(generation.answer)
        changed = self._composer.bundle.changed
        return responses.response(api_call, answers, responses.new_id(api_call.kind), changed=changed)

    def _send(self, message: Json | list[Json] | None) -> None:
        if message is None or self._unread:
            return
        full = [{"jsonrpc": "2.0", **one} for one in (message if isinstance(message, list) else [message])]
        line = json.dumps(full if isinstance(message, list) else full[0]).encode("ascii") + b"\n"
        try:
            with self._writing:
                self._write_line(line)
        except (OSError, ValueError):  # the parent has closed our output: nobody is left to answer
            self._unread = True
            for running in list(self._calls.values()):
                running.cancel()


class _Running:
    """A call that is being answered, or waits for it."""

    def __init__(self) -> None:
        self.cancellation = Cancellation()
        self.job: Future[Json] | None = None

    def cancel(self) -> None:
        """End the answer at the step that it is at; one that has not begun never does."""
        self.cancellation.cancel()
        if self.job is not None:
            self.job.cancel()


class _Batch:
    """Collects the answers to the messages of a batch, and sends them when the last is there; none is no line."""

    def __init__(self, size: int, send: Callable[[list[Json]], None]) -> None:
        self._missing, self._send = size, send
        self._answers: list[Json] = []
        self._lock = threading.Lock()

    def add(self, answer: Json | None) -> None:
        """Take the answer to one message, None for a notification."""
        with self._lock:
            self._missing -= 1
            if answer is not None:
                self._answers.append(answer)
            whole = not self._missing and self._answers
        if whole:
            self._send(self._answers)


def _silent(send: Callable[[Json | None], None]) -> Callable[[Json | None], None]:
    return lambda answer: send(None)


def _success(call: Call, result: Json | None) -> Json:
    return {"id": call.name, "result": result}


def _cancelled(call: Call) -> Json:
    return _failure(call.name, jsonrpc.CANCELLED, "the call was cancelled")


def _failure(name: Any, code: int, message: str, data: Json | None = None) -> Json:
    return {"id": name, "error": {"code": code, "message": message, **({} if data is None else {"data": data})}}
