"""What has 4 bits: the cheapest for each byte first, within a budget; sensitivities are those that are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="a package of edgecompose-export")
pytest.importorskip("transformers", reason="a package of edgecompose-export")

from edgecompose_export.calibration.logits import final_norm, float_logits
from edgecompose_export.calibration.mixed_precision import (
    EIGHT_BITS,
    FOUR_BITS,
    Choice,
    Unit,
    choose_forms,
    eight_bit_forms,
    is_head_again,
)
from edgecompose_export.calibration.reference import FloatBlocks, embedded, float_states
from edgecompose_export.weights.places import EMBEDDING, HEAD
from edgecompose_export.weights.source import open_weights
from tests import gguf_models

UNITS = st.lists(st.tuples(st.integers(1, 1000), st.floats(0, 1)), max_size=12)


def choice(units: list[tuple[int, float]]) -> Choice:
    made = tuple(Unit((f"{i}.weight",), saved, kl) for i, (saved, kl) in enumerate(units))
    return Choice({unit.tensors[0]: EIGHT_BITS for unit in made}, made, {})


def four(forms: object) -> set[str]:
    assert isinstance(forms, dict)
    return {tensor for tensor, form in forms.items() if form == FOUR_BITS}


@given(units=UNITS, budgets=st.tuples(st.floats(0, 4), st.floats(0, 4)))
def test_a_budget_is_kept_and_a_larger_one_takes_more(
    units: list[tuple[int, float]], budgets: tuple[float, float]
) -> None:
    mixed = choice(units)
    low, high = (four(mixed.within(budget)) for budget in sorted(budgets))
    assert low <= high
    elapsed = sum(unit.kl for unit in mixed.units if unit.tensors[0] in high)
    assert elapsed <= max(budgets) + 1e-9
    assert len(four(mixed.within(mixed.cost * (1 + 1e-9) + 1e-9))) == len(units)


@given(units=UNITS, budget=st.floats(0, 4))
def test_what_is_left_in_8_bits_costs_no_less_for_each_byte(units: list[tuple[int, float]], budget: float) -> None:
    mixed = choice(units)
    chosen = four(mixed.within(budget))
    rates = {unit.tensors[0]: unit.kl / unit.saved for unit in mixed.units}
    inside, outside = ([rates[t] for t in rates if (t in chosen) == taken] for taken in (True, False))
    assert not inside or not outside or max(inside) <= min(outside)


def test_measured_costs_are_those_of_the_changed_model(tmp_path: Path) -> None:
    """All units of one block in 4 bits at once: the divergence is that of the model with exactly this change."""
    source = open_weights(gguf_models.MODELS["llama"].write(tmp_path / "source", num_hidden_layers=2))
    prompts = [[int(t) for t in np.random.default_rng(7).integers(0, 290, 80)]]
    texts = [[int(t) for t in np.random.default_rng(8).integers(0, 290, 120)]]
    reference = float_states(source, prompts)
    made = choose_forms(source, prompts=prompts, texts=texts, reference=reference, scratch=tmp_path)
    assert {unit.tensors[0].split(".")[0] for unit in made.units} == {"0", "1"}
    blocks = FloatBlocks(source)
    for layer in range(2):
        stream = embedded(source, prompts[0])
        for i in range(2):
            weights = blocks.load(i)
            if i == layer:
                weights |= {
                    t: made.quantised[t]().values(source.shape(t)[1])
                    for unit in made.units
                    for t in unit.tensors
                    if t.startswith(f"{i}.")
                }
            stream = blocks.run(i, weights, stream)[0]
        exact, other = (
            np.concatenate(list(float_logits(source, states)), -1).astype(np.float64)
            for states in (reference.states[0], final_norm(source, stream[0]))
        )
        p, q = (
            x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (exact, other)
        )
        kl = float((np.exp(p) * (p - q)).sum(-1).mean())
        cost = sum(unit.kl for unit in made.units if unit.tensors[0].startswith(f"{layer}."))
        assert cost == pytest.approx(kl, rel=1e-3)
        assert cost > 0


def test_what_a_file_has_in_4_bits_stays(tmp_path: Path) -> None:
    model = gguf_models.MODELS["llama"]
    folder = model.write(tmp_path / "source", hidden_size=256, intermediate_size=256)
    forms = eight_bit_forms(open_weights(gguf_models.write_gguf(tmp_path / "x.gguf", folder, "Q4_0")))
    assert {getattr(forms[f"0.{m}.weight"], "bits", None) for m in ("q_proj", "up_proj", "down_proj")} == {4}
    assert forms[HEAD] == EIGHT_BITS
    floats = eight_bit_forms(open_weights(folder))
    assert set(map(str, floats.values())) <= {str(EIGHT_BITS), "shared"}


def test_an_embedding_that_is_the_output_layer_is_kept_once(tmp_path: Path) -> None:
    model = gguf_models.MODELS["llama"]
    folder = model.write(tmp_path / "source", hidden_size=64)
    source = open_weights(folder)
    assert not is_head_again(source)
    tied = model.write(tmp_path / "tied", tie_word_embeddings=True)
    file = gguf_models.write_gguf(tmp_path / "x.gguf", tied)
    rows = open_weights(file).floats(EMBEDDING)
    again = gguf_models.write_gguf(tmp_path / "y.gguf", tied, extra={"output.weight": rows * np.float32(1.01)})
    assert is_head_again(open_weights(again))
    assert eight_bit_forms(open_weights(again))[EMBEDDING] == "shared"
