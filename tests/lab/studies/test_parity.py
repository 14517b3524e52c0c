"""Notebook 08's question whether every rung learns the same: arms, and what is said of made-up losses."""

import numpy as np
import pytest

from packlib.lab import records
from packlib.lab.runs.spec import RunSpec
from packlib.lab.studies import ladder, parity
from packlib.lab.studies.ladder import FULL_ROWS, MINI_BATCHES
from tests.lab.studies import made_records

BASE = RunSpec(corpus="corpus.npz", steps=4, gradient_accumulation=2)
FLOAT32 = np.array([4.0, 3.0, 2.5, 2.0])


def measured(tmp_path, apart):
    """The mini-batch climb in bfloat16; the lowest rung is 1e-3 off float32, others as told."""
    folder = records.run_folder(tmp_path)
    arms = parity.arms(BASE, [MINI_BATCHES], dtype="bfloat16")
    for arm in arms:
        off = 0.0 if arm.rung is parity.REFERENCE else apart.get(arm.rung.name, 1e-3)
        trace = {"loss": list(FLOAT32 + off), "grad_norm": [1.0] * 4}
        made_records.write(folder, arm.spec, trace=trace)
    return arms, ladder.measure(arms, folder, progress=lambda line: None)


def test_the_lowest_rung_is_measured_in_float32_too_and_float8_left_out():
    arms = parity.arms(BASE, [MINI_BATCHES, FULL_ROWS], keep=0.2, dtype="bfloat16", model="tiny-llama")
    references = [arm for arm in arms if arm.rung is parity.REFERENCE]
    assert [arm.climb for arm in references] == [MINI_BATCHES, FULL_ROWS]
    assert [arm.spec.strategy for arm in references] == ["padding", "multipack_posid"]
    assert {arm.spec.dtype for arm in references} == {"float32"}
    assert {arm.spec.dtype for arm in arms if arm.rung is not parity.REFERENCE} == {"bfloat16"}
    assert not any(arm.spec.rig.float8 for arm in arms)
    assert parity.arms(BASE) == []
    with pytest.raises(ValueError, match="leaves nothing to compare"):
        parity.arms(BASE, [MINI_BATCHES])


def test_a_rung_that_is_farther_from_float32_than_eager_layers_is_named(tmp_path):
    arms, found = measured(tmp_path, {"fused loss": 1.9e-3, "CUDA graphs": -5e-3})
    table = parity.table(arms, found).set_index("rung")
    assert table.loc["fused loss", "mean_difference"] == pytest.approx(1.9e-3)
    assert table.loc["CUDA graphs", "largest_difference"] == pytest.approx(5e-3)
    assert np.isnan(table.loc["float32", "mean_difference"])
    (said,) = parity.findings(table.reset_index())
    assert "farther off are CUDA graphs (at most 5.0e-03)" in said and "fused loss" not in said
    assert "farther off" in parity.figure(arms, found).alt


def test_rungs_that_learn_the_same_are_said_to(tmp_path):
    arms, found = measured(tmp_path, {"fused loss": 1.9e-3})
    (said,) = parity.findings(parity.table(arms, found))
    assert said == (
        "Over 4 steps of mini-batches in training: 'padded, SDPA' is 1.0e-03 nats from float32 in the mean, "
        "the 8 rungs above it at most 1.9e-03."
    )
    assert list(parity.display_table(parity.table(arms, found))["climb"].unique()) == [MINI_BATCHES, ""]


def test_without_records_there_is_nothing_to_say_or_draw():
    assert parity.findings(parity.table([], [])) == [] and parity.figure([], []) is None
    assert len(parity.display_table(parity.table([], []))) == 0
