"""Serves a bundle over standard input and output, for editors and tools that start a child process.

One JSON-RPC 2.0 message a line. Methods are those of the table of endpoints: `chat`, `complete`, `embed` and `compose`
take the body of the HTTP call as `params` and give its response as `result`. With `stream` true, chunks come first, as
notifications `piece` with the `id` of the call and the `text`. `models` lists names, `cancel` with `id` ends an answer,
`shutdown` ends the process. Calls are answered one after another; `cancel` and `shutdown` are handled at once.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edgecompose.composer import Composer
from edgecompose.errors import EdgeComposeError
from edgecompose.server import protocol, responses
from edgecompose.server.endpoints import BY_METHOD
from edgecompose.server.protocol import ApiCall
from edgecompose.server.responses import Json
from edgecompose.streaming import Generation

_METHODS = (*BY_METHOD, "models")
_PARSE, _REQUEST, _METHOD, _INTERNAL, _OURS, _CANCELLED = -32700, -32600, -32601, -32603, -32000, -32800


class StdioServer:
    """Answers the lines of one input.

    Args:
        lines: messages, UTF-8.
        write: is given each message of ours, a whole line; called by one thread at a time.
        max_tokens: upper bound of `max_tokens` of a call.
    """

    def __init__(
        self, composer: Composer, lines: Iterable[bytes], write: Callable[[bytes], object], *, max_tokens: int = 4096
    ) -> None:
        self._composer, self._lines, self._write_line = composer, lines, write
        self._max_tokens = max_tokens
        self._writing = threading.Lock()
        self._calls: dict[object, _Call] = {}

    def serve(self) -> None:
        """Answer until the input ends or `shutdown` is called; answers in progress stop."""
        with ThreadPoolExecutor(1, "edgecompose-stdio") as thread:
            for line in self._lines:
                if line.strip() and not self._take(line, thread):
                    break
            for call in list(self._calls.values()):
                call.cancel()

    def _take(self, line: bytes, thread: ThreadPoolExecutor) -> bool:
        """Answer a line, or have it answered; False when that was the last."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            self._fail(None, _PARSE, f"the line is not JSON: {error}")
            return True
        if not isinstance(message, dict) or not isinstance(message.get("method"), str):
            self._fail(None, _REQUEST, "expected an object with jsonrpc, id, method and params, one a line")
            return True
        name, method, params = message.get("id"), message["method"], message.get("params") or {}
        if not _is_id(name) or not isinstance(params, dict) or not _is_id(params.get("id")):
            self._fail(None, _REQUEST, "id has to be text or a number, and params an object")
        elif method == "shutdown":
            self._succeed(name, None)
            return False
        elif method == "cancel":
            running = self._calls.get(params.get("id"))
            if running is not None:
                running.cancel()
            self._succeed(name, {"cancelled": running is not None})
        elif method not in _METHODS:
            self._fail(name, _METHOD, f"no method is called {method!r:.80}; use {', '.join(_METHODS)}")
        elif name in self._calls:
            self._fail(name, _REQUEST, f"a call with the id {name!r:.80} is still being answered; use another")
        else:
            call = self._calls[name] = _Call()
            answered = thread.submit(self._answer, name, method, params, call)
            answered.add_done_callback(lambda _: self._calls.pop(name, None))
        return True

    def _answer(self, name: object, method: str, params: Mapping[str, Any], call: _Call) -> None:
        try:
            self._succeed(name, self._result(method, params, call, name))
        except _Cancelled:
            self._fail(name, _CANCELLED, "the call was cancelled")
        except EdgeComposeError as error:
            self._fail(name, _OURS, str(error))
        except Exception as error:  # an internal error; the caller must still get a response
            self._fail(name, _INTERNAL, f"{type(error).__name__}: {error}")

    def _result(self, method: str, params: Mapping[str, Any], call: _Call, name: object) -> Json:
        if method == "models":
            return {"models": protocol.model_names(self._composer)}
        action = BY_METHOD[method].action
        if isinstance(action, str):
            api_call = protocol.call_of(self._composer, action, dict(params), max_tokens=self._max_tokens)
            return self._generate(api_call, call, name)
        return action(self._composer, dict(params), self._max_tokens)()

    def _generate(self, api_call: ApiCall, call: _Call, name: object) -> Json:
        answers = []
        for index, prompt in enumerate(api_call.prompts):
            with call.watched(self._composer.generate(prompt, api_call.request)) as generation:
                for text in generation:
                    if api_call.stream:
                        self._send({"method": "piece", "params": {"id": name, "index": index, "text": text}})
                if call.cancelled:
                    raise _Cancelled
                answers.append(generation.answer)
        return responses.response(api_call, answers, responses.new_id(api_call.kind))

    def _succeed(self, name: object, result: Json | None) -> None:
        self._send({"id": name, "result": result})

    def _fail(self, name: object, code: int, message: str) -> None:
        self._send({"id": name, "error": {"code": code, "message": message}})

    def _send(self, message: Json) -> None:
        line = json.dumps({"jsonrpc": "2.0", **message}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        with self._writing:
            self._write_line(line)


def _is_id(value: object) -> bool:
    return not isinstance(value, (dict, list))


class _Cancelled(Exception):
    """A call was cancelled while it was answered."""


class _Call:
    """A call that is being answered, or waits for it."""

    def __init__(self) -> None:
        self.cancelled = False
        self._generation: Generation | None = None
        self._lock = threading.Lock()

    def watched(self, generation: Generation) -> Generation:
        """The same generation, which `cancel` closes."""
        with self._lock:
            self._generation = generation
            if self.cancelled:
                generation.close()
        return generation

    def cancel(self) -> None:
        """End the answer at the token that it is at."""
        with self._lock:
            self.cancelled = True
            if self._generation is not None:
                self._generation.close()
