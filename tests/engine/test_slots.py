"""Inputs and outputs of a base's graphs."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("onnx", reason="a package of edgecompose-export")


from edgecompose.engine.decoding.decoder import FusedDecoder
from edgecompose.engine.device import choose_device
from edgecompose.engine.fusing import Fuser, require_fusing
from edgecompose.errors import BundleError
from edgecompose_export.graphs.fuse import DECODER_GRAPH, FUSE_GRAPH
from tests.fixtures_tiny import Exported, TinyZoo

pytestmark = pytest.mark.slow


@pytest.fixture
def llama(zoo: TinyZoo) -> Exported:
    return zoo.base("llama")


@pytest.mark.parametrize("change", ["fuse", "fused decoder"])
def test_a_graph_that_is_not_the_described_one_is_refused(llama: Exported, change: str) -> None:
    fusing = require_fusing(llama.spec)
    name = "layers.1.o_proj.weight"
    wrong = dataclasses.replace(fusing, weights={**fusing.weights, name: (9, 9, 9)})
    device, spec = choose_device("cpu"), dataclasses.replace(llama.spec, fusing=wrong)
    with pytest.raises(BundleError, match=f"the {change} graph is not the one that the manifest describes: {name}"):
        if change == "fuse":
            Fuser(llama.folder / FUSE_GRAPH, spec, device)
        else:
            FusedDecoder(llama.folder / DECODER_GRAPH, spec, device)
