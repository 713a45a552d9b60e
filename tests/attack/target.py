"""What is attacked: how its files are made, damaged, and used."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Target:
    """One part of the product that takes bytes from outside.

    Attributes:
        name: such as 'manifest', 'peft', 'requests'.
        cost: 'cheap' for hundreds of cases a second and more, 'full' for those that open sessions.
        prepare: writes the unmutated files of a case into an empty folder; called once.
        mutate: damages the files in a copy of that folder, in place; all randomness comes from the argument.
        attempt: uses the files as the product does, and returns 'accepted' when that worked. A clear refusal is an
            EdgeComposeError, an OSError or an error of click. Whatever else is raised, a crash, a hang beyond
            `seconds` and memory beyond the limit are findings; an AssertionError says that an answer is wrong.
        seconds: the longest attempt.
    """

    name: str
    cost: Literal["cheap", "full"]
    prepare: Callable[[Path], None]
    mutate: Callable[[random.Random, Path], None]
    attempt: Callable[[Path], str]
    seconds: float = 10.0
