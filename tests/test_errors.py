"""The tree of errors."""

from __future__ import annotations

import re

import pytest

from edgecompose import errors

CLASSES: dict[str, type[errors.EdgeComposeError]] = {
    name: value for name, value in vars(errors).items() if isinstance(value, type)
}


@pytest.mark.parametrize("name", CLASSES)
def test_every_error_is_ours_and_in_the_tree(name: str) -> None:
    assert issubclass(CLASSES[name], errors.EdgeComposeError)
    assert CLASSES[name].exit_code == 1
    assert errors.__doc__ is not None
    assert len(re.findall(rf"\b{name}\b", errors.__doc__.replace("that EdgeCompose raises", ""))) == 1


def test_the_tree_has_the_parents_of_the_classes() -> None:
    assert errors.__doc__ is not None
    parents: dict[int, str] = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"([ │├└─]*)([A-Z]\w+)  ", line)
        if match is None:
            continue
        depth, name = len(match[1]), match[2]
        parents[depth] = name
        above = [parents[other] for other in sorted(parents) if other < depth]
        if above:
            assert CLASSES[name].__base__ is CLASSES[above[-1]], name


def test_an_error_of_the_api_has_a_field_a_code_and_a_status() -> None:
    error = errors.ApiError("no", param="model", code="model_not_found", status=404)
    assert (str(error), error.param, error.code, error.status) == ("no", "model", "model_not_found", 404)
    assert errors.ApiError("no").status == 400
