"""The content hash of a blend."""

from __future__ import annotations

from typing import Literal

from edgecompose.merging.merger import Merger
from edgecompose.merging.methods import composition_digest
from edgecompose.settings import MergeSettings
from tests.merging.merged import make_adapters

DIGESTS, SHARES = {"one": "1" * 64, "two": "2" * 64}, {"one": 0.6, "two": 0.4}


def _digest(
    method: str = "product", density: float = 0.5, sign: Literal["total", "frequency"] = "total", **weights: float
) -> str:
    return composition_digest(DIGESTS, SHARES | weights, MergeSettings(method, density, sign))


def test_the_digest_does_not_depend_on_the_order() -> None:
    turned = composition_digest(dict(reversed(DIGESTS.items())), dict(reversed(SHARES.items())), MergeSettings())
    assert turned == _digest()
    assert len(turned) == 64


def test_the_digest_tells_blends_apart() -> None:
    blends = [
        _digest(),
        _digest(one=0.600001),
        _digest(one=0.4, two=0.6),
        _digest("linear"),
        _digest("ties"),
        _digest("ties", 0.6),
        _digest("ties", sign="frequency"),
        _digest("magnitude_prune"),
        _digest("magnitude_prune", 0.6),
        composition_digest(DIGESTS | {"two": "3" * 64}, SHARES, MergeSettings()),
        composition_digest({}, {}, MergeSettings()),
    ]
    assert len(set(blends)) == len(blends)


def test_the_digest_ignores_what_the_method_does_not_use() -> None:
    assert _digest(density=0.1) == _digest(density=0.9) == _digest(sign="frequency")
    assert _digest("magnitude_prune", sign="frequency") == _digest("magnitude_prune")
    assert _digest("cat") == _digest("product")
    assert _digest(one=0.6 + 1e-9) == _digest()


def test_a_merge_carries_the_digest_of_its_content(merger: Merger) -> None:
    adapters = make_adapters([8, 4])
    digests = {a.name: a.digest for a in adapters}
    expected = composition_digest(digests, {"adapter0": 0.3, "adapter1": 0.7}, MergeSettings())
    assert merger.merge(adapters, [0.3, 0.7], MergeSettings()).digest == expected
    assert merger.merge(adapters[::-1], [0.7, 0.3], MergeSettings()).digest == expected
