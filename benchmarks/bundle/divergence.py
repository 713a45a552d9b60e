"""KL divergence of the next token that a stored adapter causes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundle.factors import Factors, Float
from edgecompose.formats.peft import PeftScales, read_config


class Divergence:
    """KL of the next token between the float adapter and a stored one, on the base itself (transformers, PEFT)."""

    def __init__(self, base: Path, folder: Path, *, prompts: Path, limit: int) -> None:
        import torch
        from peft import PeftModel

        from edgecompose_export.base.checkpoint import load_model
        from edgecompose_export.base.source import open_base
        from edgecompose_export.training.train import base_tokenizer

        opened = open_base(base)
        tokenizer = base_tokenizer(opened)
        self._model = PeftModel.from_pretrained(load_model(opened), folder).eval()
        self._scales = PeftScales(folder.name, read_config(folder))
        lines = prompts.read_text(encoding="utf-8").split("\n")[:limit]
        texts = [tokenizer.chat([{"role": "user", "content": json.loads(x)["prompt"]}]) for x in lines if x.strip()]
        self._ids = [torch.tensor([tokenizer.encode(text)]) for text in texts]
        self._expected = [self._logits(ids) for ids in self._ids]

    def of(self, factors: Factors) -> dict[str, float]:
        """Mean KL (nats) at the answer's first token and over all positions; share of equal greedy tokens."""
        import torch

        with torch.no_grad():
            for path, module in self._model.named_modules():
                match = re.match(r"^base_model\.model\.(.*?\.(\d+)\..*?(\w+))$", path)
                if match and hasattr(module, "lora_A") and match[3] in factors:
                    pair, layer = factors[match[3]], int(match[2])
                    full = module.lora_A["default"].weight.shape[0]
                    a, b = (_padded(side[:, layer], full) for side in (pair.a, pair.b))
                    module.lora_A["default"].weight.copy_(torch.from_numpy(a))
                    module.lora_B["default"].weight.copy_(torch.from_numpy(b.T / self._scales.scale(match[1])))
        answers, positions, same = [], [], []
        for ids, expected in zip(self._ids, self._expected, strict=True):
            logits = self._logits(ids)
            kl = (expected.exp() * (expected - logits)).sum(-1)
            answers.append(float(kl[-1]))
            positions.append(float(kl.mean()))
            same.append(float(expected[-1].argmax() == logits[-1].argmax()))
        return {
            "kl_answer": float(np.mean(answers)),
            "kl_prompt": float(np.mean(positions)),
            "same": float(np.mean(same)),
        }

    def _logits(self, ids: Any) -> Any:
        import torch

        with torch.no_grad():
            return self._model(input_ids=ids).logits[0].float().log_softmax(-1)


def _padded(rows: Float, rank: int) -> Float:
    return np.concatenate([rows, np.zeros((rank - rows.shape[0], rows.shape[1]), np.float32)])
