"""The memory of a step by hand is what published runs took, and sharing shows what batching saves."""

import copy

import pytest

from packlib.lab import models, records
from packlib.lab.studies import memory

CONFIG = models.model_config("mistral-7b")


@pytest.fixture(scope="module")
def published():
    return records.read_records(records.run_folder("h200_models", create=False))


def test_parts_are_those_of_the_architecture():
    parameters = models.parameter_count(CONFIG).total
    step = memory.step_memory(CONFIG, 100)
    assert step.weights == step.gradients == 2 * parameters and step.moments == 4 * parameters
    assert step.activations == 2 * 100 * (32 * 4096 + 7 * 14336 + 3 * 4096)
    assert memory.step_memory(CONFIG, 200).activations == 2 * step.activations
    shared = memory.step_memory(CONFIG, 100, moment_size=4, gpus=8)
    assert shared.moments == parameters and shared.activations == step.activations


def test_published_peaks_are_near_and_would_not_be_with_half_the_activations(published, monkeypatch):
    table = memory.peaks(published)
    assert len(table) >= 8 and table["measured"].max() / table["measured"].min() > 1.1
    assert table["error"].abs().max() < 0.03
    monkeypatch.setattr(memory, "LAYER_INNER", 0)
    wrong = memory.peaks(published)
    assert wrong["error"].abs().max() > 0.08
    assert f"{len(table)} published peaks of mistral-7b" in memory.peaks_finding(table)


def test_runs_that_the_formula_does_not_speak_of_are_left_out(published):
    (run, *_) = [run for run in published if run["status"] == "ok" and memory._plain(run)]
    assert memory._plain(run)
    for section, name, value in (
        ("spec", "dtype", "float32"),
        ("spec", "rig", {"recompute": "none"}),
        ("spec", "rig", {"recompute": "all", "liger": True}),
        ("environment", "cuda", None),
    ):
        other = copy.deepcopy(run)
        other[section][name] = value
        assert not memory._plain(other), name


def test_slots_are_those_of_the_largest_batch(published):
    slots = memory.slots_by_strategy(published, "mistral-7b", "multitask", ["padding", "multipack_posid", "dynapipe"])
    assert list(slots) == ["padding", "multipack_posid"] and slots["multipack_posid"] == 4 * 4096 > slots["padding"]
    assert not memory.slots_by_strategy(published, "mistral-7b", "nothing", ["padding"])


def test_sharing_shows_what_batching_saves():
    slots = {"padding": 16384, "minibatch_packing": 8000}
    table = memory.shared_memory(CONFIG, slots, [1, 8])
    packed = table[table["strategy"] == "minibatch_packing"].set_index("gpus")["total over padding's"]
    assert packed[8] < packed[1] < 1
    same = memory.shared_memory(CONFIG, {"padding": 5, "minibatch_packing": 5}, [1, 8])
    assert (same["total over padding's"] == 1).all()
    assert f"{packed[1]:.2f} × the memory of Padding on 1 GPU and {packed[8]:.2f} × on 8" in memory.shared_finding(
        table
    )
    figure = memory.memory_bars(table)
    figure.canvas.draw()
    assert [len(ax.patches) for ax in figure.axes] == [8, 8] and "1 and 8 GPUs" in figure.alt
    bars = sum(bar.get_width() for bar in figure.axes[0].patches)
    assert bars * 1e9 == pytest.approx(table[table["gpus"] == 1][list(memory.PARTS)].to_numpy().sum())
