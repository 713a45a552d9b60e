"""The saved state of a training run, from which the run is resumed."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgecompose.bundle.atomic import replaced_file
from edgecompose.errors import ExportError
from edgecompose.retrieval.examples import Example

STATE_FILE = "training-state.pt"


def digest_of(examples: Sequence[Example]) -> str:
    """sha256 of all prompts and answers; a run is resumed only on the same data."""
    return hashlib.sha256(repr([(e.prompt, e.answer) for e in examples]).encode()).hexdigest()


@dataclass(frozen=True)
class TrainingRun:
    """The state of a training run; torch objects are of type Any, since torch is imported late.

    Attributes:
        report: settings and data of the run.
        losses: of the finished steps.
        parameters: trained parameters.
        optimizer: of these parameters.
    """

    report: dict[str, Any]
    losses: list[float]
    parameters: list[Any]
    optimizer: Any

    def save(self, path: Path) -> None:
        """Write the state, in the place of an older one.

        Raises:
            OSError: it cannot be written; the older one stays.
        """
        import torch

        state = {
            "report": self.report,
            "losses": self.losses,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
        }
        with replaced_file(path) as work:
            try:
                torch.save(state, work)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(errno.ENOSPC, f"cannot be written ({error})", str(path)) from error

    def resume(self, path: Path) -> None:
        """Load the state at `path`, if there is one.

        Raises:
            ExportError: the state cannot be read, or belongs to a run with other settings or data.
        """
        import torch

        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved = state["report"]
        except Exception as error:  # torch raises classes of all kinds on damaged files
            raise ExportError(f"'{path}' cannot be read ({error}); delete it to begin again") from error
        if saved != self.report:
            different = sorted(k for k in self.report if self.report[k] != saved.get(k))
            raise ExportError(
                f"'{path.parent}' holds an unfinished run with other {', '.join(different)}; "
                "use the same settings to resume it, or another folder"
            )
        with torch.no_grad():
            for parameter, values in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(values)
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses[:] = state["losses"]
