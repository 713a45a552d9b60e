"""Bases whose blends are fused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgecompose.bundle.manifest import MANIFEST_FILE

#: Largest difference of a logit between attach and fuse: both are float32, the sums are taken in another order.
TOLERANCE = 1e-4
BASES = (("llama", "fp32"), ("qwen2", "fp32"), ("phi3", "fp32"), ("llama", "fp16"))


def change_base(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / MANIFEST_FILE
    result = json.loads(path.read_text(encoding="utf-8"))
    change(result["base"])
    path.write_text(json.dumps(result), encoding="utf-8")
