"""The flag that ends work."""

from __future__ import annotations

import pytest

from edgecompose.cancellation import Cancellation
from edgecompose.errors import Cancelled


def test_work_goes_on_until_it_is_cancelled() -> None:
    cancellation = Cancellation()
    cancellation.check()
    cancellation.cancel()
    assert cancellation.cancelled
    with pytest.raises(Cancelled, match="ended the work"):
        cancellation.check()
