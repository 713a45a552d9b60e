"""What all comparisons of two devices share."""

from __future__ import annotations


class Compared:
    """A comparison: its largest error, and the error that is allowed."""

    __slots__ = ()
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether no case was beyond the tolerance."""
        return self.error <= self.tolerance


def one_line(failure: Exception) -> str:
    """An exception in one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:240]}"
