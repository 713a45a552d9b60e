"""All settings, each declared once: name, type, range, default and help.

A bundle's defaults, requests, fields of the API, options of the command and the reference derive from these classes.
A new setting is one field here, and the line that reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from edgecompose.errors import EdgeComposeError, GenerationError, MergeError, RetrievalError

T = TypeVar("T")
MajoritySign = Literal["total", "frequency"]
_KEY = "edgecompose"
#: Tokens of an answer that may be drafted for one pass.
MOST_DRAFTS = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """Help and range of a setting. `low` and `high` are allowed values, `above` is a bound that is not."""

    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None

    def allows(self, value: float) -> bool:
        """Whether a number is in range, an integer of any size too; NaN and infinity never are."""
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )

    @property
    def range(self) -> str:
        """The range in words, empty where there is none."""
        if self.high is not None:
            closed = self.low is not None
            return f"{self.low:g} to {_digits(self.high)}" if closed else f"a number in ({self.above:g}, {self.high:g}]"
        if self.above is not None:
            return f"a number above {self.above:g}"
        return "" if self.low is None else f"{self.low:g} or more"


def _digits(value: float) -> str:
    """A bound as text; a large integer with all its digits."""
    return str(value) if isinstance(value, int) else f"{value:g}"


def setting(default: Any, help: str, **bounds: float) -> Any:
    """A field of a class of settings; `bounds` are those of `Setting`."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(help, **bounds)})


def settings_of(kind: type[Any]) -> dict[str, Setting]:
    """The settings of a class, by name."""
    return {item.name: item.metadata[_KEY] for item in dataclasses.fields(kind)}


def names_of(kind: type[Any]) -> tuple[str, ...]:
    """Names of the fields of a dataclass."""
    return tuple(item.name for item in dataclasses.fields(kind))


def resolve(value: T | None, default: T) -> T:
    """A value of a request, or else the default."""
    return default if value is None else value


def override(defaults: T, changes: T | Mapping[str, Any] | None, error: type[EdgeComposeError]) -> T:
    """The settings that hold: `changes` themselves, or `defaults` with the fields that a mapping names, or as they are.

    Raises:
        error: a name that is no setting; of the class itself: a value out of range.
    """
    if changes is None:
        return defaults
    if not isinstance(changes, Mapping):
        return changes
    unknown = sorted(set(changes) - set(names_of(type(defaults))))
    if unknown:
        raise error(
            f"settings {', '.join(unknown)} are unknown; expected some of {', '.join(names_of(type(defaults)))}"
        )
    return dataclasses.replace(defaults, **changes)  # type: ignore[type-var]


def _check(values: Any, error: type[EdgeComposeError]) -> None:
    """Raise `error` for the first setting of `values` that is no number or out of range."""
    for item in dataclasses.fields(values):
        value, limits = getattr(values, item.name), item.metadata[_KEY]
        if not limits.range or (value is None and item.default is None):
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not limits.allows(value):
            raise error(f"{item.name} is {value!r:.80}; expected {limits.range}")


@dataclass(frozen=True, slots=True)
class RetrievalSettings:
    """How neighbours become weights of tasks (arXiv 2602.21222: N, T and p are its names).

    Raises:
        RetrievalError: a value out of range.
    """

    neighbours: int = setting(100, "Neighbours to retrieve (N).", low=1)
    routing_temperature: float = setting(
        1.0, "T of exp(-(1-cos)/T): smaller trusts the nearest neighbours more.", above=0
    )
    nucleus: float = setting(0.9, "Share of the distribution over tasks that is kept (p).", above=0, high=1)
    class_size_exponent: float = setting(
        0.0, "Power of a task's number of examples that its votes are divided by.", low=0, high=1
    )
    shortcut: float = setting(1.0, "Share of the top task at which it is taken alone.", above=0, high=1)
    fallback: float = setting(0.0, "Share of the top task below which the base answers alone.", low=0, high=1)
    min_resemblance: float = setting(
        0.7,
        "Resemblance below which the base answers alone, in its chat template; 1 is that of a task's own examples.",
        low=0,
        high=10,
    )

    def __post_init__(self) -> None:
        _check(self, RetrievalError)


@dataclass(frozen=True, slots=True)
class MergeSettings:
    """A merge method and its parameters; a method reads only those that its row in `merging.methods` names.

    Raises:
        MergeError: a value out of range.
    """

    method: str = setting("product", "How adapters are merged.")
    density: float = setting(0.5, "Share of entries that pruning and dropping keep.", above=0, high=1)
    majority_sign: MajoritySign = setting("total", "How ties elects a sign: by sums or by counts.")
    rank: int | None = setting(None, "Largest rank that svd leaves.", low=1)
    energy: float | None = setting(None, "Share of the squared norm that svd keeps at least.", above=0, high=1)
    dare_seed: int = setting(0, "Which entries the dare methods keep.", low=0)
    norm_guard: bool = setting(False, "Rescale the blend to the weighted mean norm of its parts.")

    def __post_init__(self) -> None:
        _check(self, MergeError)
        if self.majority_sign not in ("total", "frequency"):
            raise MergeError(f"majority_sign is {self.majority_sign!r}; expected total or frequency")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; the operations are those of transformers.

    min-p is that of arXiv 2407.01082, the repetition penalty that of arXiv 1909.05858.

    Raises:
        GenerationError: a value out of range.
    """

    temperature: float = setting(0.8, "Divides the logits; 0 is greedy.", low=0)
    top_p: float = setting(0.95, "Draw from the fewest tokens whose probabilities reach it.", above=0, high=1)
    seed: int | None = setting(None, "Makes draws reproducible; without one they differ.", low=0, high=2**63 - 1)
    top_k: int = setting(0, "Draw from the k most likely tokens; 0 is all.", low=0)
    min_p: float = setting(0.0, "Draw from tokens at least that times as likely as the most likely one.", low=0, high=1)
    repetition_penalty: float = setting(
        1.0, "Above 1, tokens that were read or written before are less likely.", above=0
    )

    def __post_init__(self) -> None:
        _check(self, GenerationError)
