"""Damage to bytes, texts and JSON values; all randomness comes from the generator that a caller passes."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

#: Integers at the edges of machine types and of sense.
INTEGERS = (0, 1, -1, 2, 7, 8, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63))
FLOATS = (0.0, -0.0, 1e-45, 1e-308, 0.5, 1.5, -1.0, 65504.0, 1e6, 3.4e38, 1e39, 1e300, 1.7e308, -1.7e308)
TEXTS = (
    "",
    " ",
    "\0",
    "..",
    "../x",
    "/etc/passwd",
    "C:\\x",
    "a/../../b",
    "\ud800",
    "\ufeff",
    "x" * 5000,
    "\u202e",
    "<s>",
    "nan",
    "{{ 1 }}",
)
_WORDS = (b"\0", b"\xff", b"\xff\xff\xff\xff", b"\0\0\0\0\0\0\0\0", b"\xff" * 8, b"\x7f", b"\x80", b"\n", b"{", b"[")
_DEPTH = 3000


def hostile(rng: random.Random) -> Any:
    """Any JSON value that a reader may not expect."""
    return rng.choice(
        (
            rng.choice(INTEGERS),
            rng.choice(FLOATS),
            rng.choice((float("nan"), float("inf"), float("-inf"))),
            rng.choice(TEXTS),
            rng.choice((None, True, False)),
            [],
            {},
            [rng.choice(INTEGERS)] * rng.randrange(5),
            {rng.choice(TEXTS): rng.choice(INTEGERS)},
            rng.randrange(-100, 100_000),
            rng.uniform(-10, 10),
            10 ** rng.randrange(20, 400),
        )
    )


def mutate_bytes(rng: random.Random, content: bytes, *, changes: int = 4) -> bytes:
    """Bytes with up to `changes` of them flipped, replaced, removed, inserted, repeated, or cut off."""
    data = bytearray(content)
    for _ in range(rng.randint(1, changes)):
        place = rng.randrange(len(data) + 1)
        span = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 64)))
        kind = rng.randrange(8)
        if kind <= 1 and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[place : place + span] = rng.randbytes(span)
        elif kind == 3:
            data[place : place + span] = b""
        elif kind == 4:
            data[place:place] = rng.choice(_WORDS)
        elif kind == 5:
            word = rng.choice(_WORDS)
            data[place : place + len(word)] = word
        elif kind == 6:
            size = rng.choice((4, 8))
            number = rng.choice((*INTEGERS, rng.randrange(0, 2 * len(data) + 2)))
            data[place : place + size] = (number % (1 << 8 * size)).to_bytes(size, "little")
        elif rng.random() < 0.3:
            del data[place:]
        else:
            start = rng.randrange(len(data) + 1)
            data[place:place] = data[start : start + span]
    return bytes(data)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys that lead to every value inside of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, item in items for path in ((*place, key), *places(item, (*place, key)))]


def mutate_json(rng: random.Random, value: Any, *, changes: int = 2) -> Any:
    """A copy of a JSON value with up to `changes` values replaced, removed, added, renamed, nudged or swapped."""
    value = json.loads(json.dumps(value))  # copies faster than deepcopy
    for _ in range(rng.randint(1, changes)):
        paths = places(value)
        if not paths:
            return hostile(rng)
        path = rng.choice(paths)
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        _mutate_item(rng, holder, path[-1], paths, value)
    return value


def mutate_json_text(rng: random.Random, text: str) -> str:
    """The text of a JSON document, damaged as a value, or as a text: depth, repeated keys, long numbers, bytes."""
    kind = rng.randrange(10)
    if kind <= 6:
        return json.dumps(mutate_json(rng, json.loads(text)), ensure_ascii=rng.random() < 0.9)
    if kind == 7:
        return mutate_bytes(rng, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
    place = rng.choice([i for i, letter in enumerate(text) if letter == ":"] or [0])
    addition = rng.choice(("[" * _DEPTH, '{"a":' * _DEPTH, "9" * 5000, "-" + "1" * 400, "NaN", "1e999", "-Infinity"))
    return text[: place + 1] + addition + text[place + 1 :]


def write_text(path: Path, text: str) -> None:
    """Write a text, whatever surrogates it has."""
    path.write_bytes(text.encode("utf-8", "surrogatepass" if "\ud800" in text else "surrogateescape"))


def _mutate_item(rng: random.Random, holder: Any, key: Any, paths: list[tuple[Any, ...]], root: Any) -> None:
    kind = rng.randrange(7)
    item = holder[key]
    if kind <= 1:
        holder[key] = hostile(rng)
    elif kind == 2:
        del holder[key]
    elif kind == 3 and isinstance(holder, dict):
        holder[rng.choice((*TEXTS, f"{key}x"))] = holder.pop(key)
    elif kind == 4 and isinstance(item, (int, float)) and not isinstance(item, bool):
        holder[key] = rng.choice((item + 1, item - 1, -item, item * 2, item * 1000, item // 3, 0))
    elif kind == 4 and isinstance(item, str):
        holder[key] = rng.choice((item + "x", item[:-1], item.upper(), item[::-1], f"./{item}", f"../{item}"))
    elif kind == 5:
        other = root
        for step in rng.choice(paths):
            other = other[step] if _has(other, step) else other
        holder[key] = copy.deepcopy(other)
    elif isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(item))
    else:
        holder[str(rng.choice((*TEXTS, "a")))] = copy.deepcopy(item)


def _has(value: Any, key: Any) -> bool:
    try:
        value[key]
    except (KeyError, IndexError, TypeError):
        return False
    return True
