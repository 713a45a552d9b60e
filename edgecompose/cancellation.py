"""Ends work that another thread does."""

from __future__ import annotations

from edgecompose.errors import Cancelled


class Cancellation:
    """A flag that one thread sets and the working thread looks at between its steps."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """Ask the work to end; it does so at its next step."""
        self.cancelled = True

    def check(self) -> None:
        """Go on, unless the work was cancelled.

        Raises:
            Cancelled: it was.
        """
        if self.cancelled:
            raise Cancelled("the caller ended the work before it was done")
