"""Sections 7 to 11 of notebook 07, drawn from records: preset smoke asks none of them, for each needs a dozen runs."""

import contextlib
import io
import math

import matplotlib.pyplot as plt
import pytest

from packlib.lab import records
from packlib.lab.studies import convergence, cutting, equal_time, neighbours, third_reason
from tests.lab.studies import made_records
from tests.notebooks.test_notebooks import NOTEBOOKS, code_cells, tagged_cell

(PATH,) = [path for path in NOTEBOOKS if path.stem.startswith("07_")]
SHARED = {"tokenizer": "bpe:512", "layers": 1, "eval_examples": 64, "max_tokens": 512}  # as in the tagged cell
TASK = {"corpus": "arithmetic", "loss": "response", "limit": 80, "batch_size": 8, "rows_per_step": 2, "seeds": [0, 1]}
TIMED = {"pick_seed": 9, "rates": [1e-3, 2e-3], "all_steps": {"padding": 12, "multipack": 6}}
FURTHER = {
    "equal_time": {"settings": [TASK | TIMED]},
    "third_reason": [TASK | {"further_seeds": [0, 1]}],
    "constant_examples": [TASK | {"groups": ["padding", convergence.EXACT]}],
    "neighbours": [TASK | {"eval_context": 2, "generate_examples": 4}],
    "cutting": [{"corpus": "pysource", "steps": 8, "rows_per_step": 4, "seeds": [0, 1]}],
}
FIGURES = {
    "07_equal_time_arithmetic",
    "07_third_reason_arithmetic",
    "07_constant_examples_arithmetic",
    "07_neighbours_arithmetic",
    "07_cutting_pysource",
}


def write(folder, arms):
    """Any losses, for every arm without a record."""
    for i, arm in enumerate(arms):
        if records.find_record(folder, arm.spec.spec_id, None):
            continue
        loss, steps = 2 + 0.1 * math.sin(7 * i), [1, 2]
        metrics = dict.fromkeys(("eval_loss_per_token", "eval_loss_per_example", *neighbours.FURTHER[:1]), loss)
        metrics |= {"eval_tokens": 10, "eval_loss_longest": loss, "eval_loss_by_position": [[1, loss, 5], [2, loss, 5]]}
        metrics |= {"exact_match": 0.5, "exact_match_in_context": 0.25} if arm.spec.eval_context else {}
        evaluations = [{"step": 1, "eval_loss_per_token": 3.0}]
        slots = [100 * n if arm.strategy == "padding" else 150 * n for n in steps]
        trace = {"step": steps, "slots": slots, "tokens": steps, "seconds": [3.5, 7.0], "evaluations": evaluations}
        made_records.write(folder, arm.spec, metrics=metrics, trace=trace)


def run(folder, further):
    """What the notebook prints, and its summary, without measuring."""
    names, said = {"__name__": "notebook"}, io.StringIO()
    for cell in code_cells(PATH):
        if cell.id == tagged_cell(PATH).id:
            cell.source += f"\nrun, measure, further = {str(folder)!r}, False, {further!r}"
        with contextlib.redirect_stdout(said):
            exec(compile(cell.source, PATH.name, "exec"), names)
    plt.close("all")
    return said.getvalue(), records.read_json(folder / "summaries" / f"{PATH.stem}.json")


def test_every_section_draws_and_says_what_its_records_say(tmp_path):
    folder = records.run_folder(tmp_path)
    write(folder, third_reason.arms(FURTHER["third_reason"], **SHARED))
    write(folder, convergence.settings_arms(FURTHER["constant_examples"], seeds=[], **SHARED))
    write(folder, neighbours.arms(FURTHER["neighbours"], **SHARED))
    write(folder, cutting.arms(FURTHER["cutting"], **SHARED))
    equal_time.measure(FURTHER["equal_time"], folder, lambda arms: write(folder, arms), **SHARED)
    printed, summary = run(folder, FURTHER)
    assert set(summary["figures"]) == FIGURES
    said = "\n".join(summary["findings"])
    assert "this run's own steps: " in printed and "this run's own steps: after" in said
    for part in (
        "against mini-batches at equal steps",
        "exactly constant examples",
        "behind related examples",
    ):
        assert part in said and part in printed, part
    assert "pysource, first rows, against “" in said and "21 of 21 planned runs have no result" in said
    assert "nan" not in said


@pytest.mark.parametrize("further", [{}, FURTHER], ids=["not asked", "not measured"])
def test_what_was_not_measured_is_a_line_and_no_figure(further, tmp_path):
    printed, summary = run(records.run_folder(tmp_path), further)
    assert not summary["figures"]
    lines = [
        line
        for line in printed.splitlines()
        if line.startswith("This run does not ask it.") or " runs have a result." in line
    ]
    assert len(lines) == 5 and all(line.startswith("0 of ") == bool(further) for line in lines)
