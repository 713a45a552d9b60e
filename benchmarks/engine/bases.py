"""The decoders that `cuda.py` runs, with adapters for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.measuring.adapters import gaussian_adapter
from edgecompose.bundle.adapter import Adapter, parse_adapter
from edgecompose.bundle.files import Bundle
from edgecompose.bundle.records import value_from_json
from edgecompose.bundle.specs import BaseSpec
from edgecompose.engine.decoding.decoder import decoder_graph
from edgecompose.engine.device import Device, host
from edgecompose.errors import BundleError
from edgecompose.generation.tokenizer import Tokenizer

#: Kind of device -> the graph that it runs.
Graphs = Mapping[Literal["cpu", "cuda"], Path]
#: A device of each kind, to choose its graph.
_KINDS = (host(""), Device("cuda", (), ""))
PROMPT = "Customer review of a business: We waited forty minutes, and the soup came cold. Positive or negative?"
_ADAPTERS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """A decoder to run, and at least three adapters for it. `graphs`: the one for each kind of device."""

    name: str
    graphs: Graphs
    tokenizer: Path
    spec: BaseSpec
    adapters: tuple[Adapter, ...]

    @classmethod
    def of_bundle(cls, folder: Path) -> Base:
        """The base of a bundle and its first adapters, random ones where it has fewer than three."""
        bundle = Bundle(folder)
        spec = bundle.manifest.base
        names = sorted(bundle.manifest.adapters)[:_ADAPTERS]
        adapters = [
            parse_adapter(bundle.adapter_content(name), name, groups=spec.slots, base=spec.identity) for name in names
        ]
        adapters += _gaussian_adapters(spec, _ADAPTERS - len(adapters))
        bundle.path(spec.graph)  # checks the data file of all graphs
        graphs: Graphs = {device.kind: bundle.path(decoder_graph(spec, device)) for device in _KINDS}
        tokenizer = bundle.path(spec.tokenizer)
        return cls(folder.name, graphs=graphs, tokenizer=tokenizer, spec=spec, adapters=tuple(adapters))

    @classmethod
    def of_folder(cls, folder: Path) -> Base:
        """An exported base with random adapters.

        Raises:
            BundleError: the folder holds none.
        """
        if not (folder / "base.json").is_file():
            raise BundleError(f"'{folder}' holds no base.json; make it with 'edgecompose-export base'")
        content = json.loads((folder / "base.json").read_text(encoding="utf-8"))
        spec = value_from_json(BaseSpec, content, "base.json")
        adapters = _gaussian_adapters(spec, _ADAPTERS)
        graphs: Graphs = {device.kind: folder / decoder_graph(spec, device) for device in _KINDS}
        tokenizer = folder / spec.tokenizer
        return cls(folder.name, graphs=graphs, tokenizer=tokenizer, spec=spec, adapters=tuple(adapters))

    def prompt(self) -> list[int]:
        """Ids of PROMPT, at most half of the context."""
        return Tokenizer(self.tokenizer).encode_prompt(PROMPT)[: self.spec.context // 2]


def _gaussian_adapters(spec: BaseSpec, count: int) -> list[Adapter]:
    return [gaussian_adapter(f"random{i}", spec.slots, rank=8, bits=4) for i in range(count)]
