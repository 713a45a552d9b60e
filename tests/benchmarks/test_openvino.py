"""OpenVINO GenAI in benchmarks: its products get the names by which adapters are found."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.measuring import openvino
from benchmarks.measuring.adapters import slot_groups
from benchmarks.measuring.timing import rates_in_turns
from edgecompose.bundle.specs import BaseSpec
from tests.factories import write_bundle


@dataclass
class Node:
    """A node of OpenVINO's graph, and at once its inputs and outputs."""

    name: str
    kind: str = "MatMul"
    shape: tuple[int, ...] = ()
    is_static: bool = True
    weight: Node | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def get_type_name(self) -> str:
        return self.kind

    def get_friendly_name(self) -> str:
        return self.name

    def set_friendly_name(self, name: str) -> None:
        self.name = name

    def input(self, index: int) -> Node:
        assert self.weight is not None
        return self.weight

    def get_source_output(self) -> Node:
        return self

    def get_node(self) -> Node:
        return self

    def get_partial_shape(self) -> Node:
        return self

    def get_shape(self) -> tuple[int, ...]:
        return self.shape


class Graph:
    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes

    def get_ordered_ops(self) -> list[Node]:
        return self.nodes


@pytest.fixture
def spec(tmp_path: Path) -> BaseSpec:
    """A base of two blocks."""
    base = write_bundle(tmp_path / "bundle").base
    return replace(base, slots=slot_groups("smollm2-135m", 2), architecture="llama")


def product(number: int, shape: tuple[int, ...], *, is_static: bool = True, kind: str = "Convert") -> Node:
    return Node(f"MatMul_{number}", weight=Node("w", kind, shape, is_static=is_static))


def products(spec: BaseSpec) -> list[Node]:
    """Those of all modules in the order of their numbers, then that of the vocabulary."""
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    widths = {group.name: (group.n_out, group.n_in) for group in spec.slots}
    shapes = [widths[name] for name in order] * spec.layers + [(spec.vocabulary, 576)]
    return [product(10 * (i + 1), shape) for i, shape in enumerate(shapes)]


def test_products_are_named_by_their_numbers_whatever_the_order_of_the_graph(spec: BaseSpec) -> None:
    nodes = products(spec)
    others = [product(15, (1, 1), is_static=False), product(25, (64, 64), kind="Softmax"), Node("Add_3", "Add")]
    openvino.name_modules(Graph([*others, *reversed(nodes)]), spec)
    names = [node.name for node in nodes]
    assert names[0] == "__module.model.layers.0.self_attn.q_proj/MatMul"
    assert names[13] == "__module.model.layers.1.mlp.down_proj/MatMul"
    assert names[14] == "MatMul_150"
    assert len(set(names)) == 15
    assert others[0].name == "MatMul_15"


def test_a_graph_of_other_products_is_refused(spec: BaseSpec) -> None:
    nodes = products(spec)
    nodes[0], nodes[1] = product(10, (192, 576)), product(20, (576, 576))
    for wrong in (nodes, products(spec)[1:]):
        with pytest.raises(openvino.Unreadable, match="other shapes than llama's"):
            openvino.name_modules(Graph(wrong), spec)


def test_it_takes_no_part_where_it_or_the_file_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not openvino.is_available(tmp_path / "absent.gguf")
    (tmp_path / "base.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino_genai" else name)
    assert not openvino.is_available(tmp_path / "base.gguf")


def test_variants_that_measure_themselves_run_in_each_round_too() -> None:
    calls: list[str] = []

    def measured() -> float:
        calls.append("b")
        return 0.5

    rates = rates_in_turns({"a": lambda: calls.append("a")}, tokens=8, rounds=2, warm_up=1, timed={"b": measured})
    assert calls == ["a", "b"] * 3
    assert rates["b"] == [16, 16]
    assert len(rates["a"]) == 2
