"""The matrix of notebook 04: every situation has its known verdict, and the three dtypes agree."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator
from packlib.isolation import check_isolation
from packlib.lab import records
from packlib.lab.small_models import small_model
from packlib.lab.studies import isolation
from packlib.losses import WEIGHTINGS


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_attention()


COLLATED = ("FlatteningCollator", isolation.ISOLATED)


def expected(attention, situation):
    """The table of PITFALLS.md, for a model with rotary positions that takes any attention."""
    if attention == "packlib_varlen":
        return "exact" if "cu_seqlens" in situation or situation in COLLATED else "refused"
    if attention == "flash_attention_2":
        return "leak" if situation in ("+ mask with pads", "two packed rows") else "exact"
    return "exact" if situation in (*COLLATED, "position ids alone", "two packed rows") else "leak"


@pytest.fixture(scope="module")
def matrix():
    return isolation.run_matrix(["llama"], ["sdpa", "flash_attention_2", "packlib_varlen"])


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_masked_attentions_are_alike(attention):
    for situation in ("position ids alone", "cache left on"):
        assert isolation.check_cell("llama", attention, situation, "float32")["verdict"] == expected(
            attention, situation
        )


def test_matrix_shows_every_situation(matrix):
    assert len(matrix["cells"]) == 3 * 8 * 3 and not matrix["disagreements"]
    for cell in matrix["cells"]:
        if (cell["dtype"], cell["situation"]) != (
            "float64",
            "cu_seqlens, no position ids",
        ):  # float64 sees RoPE's float32 angles
            assert cell["verdict"] == expected(cell["attention"], cell["situation"]), cell
    json.dumps(matrix, allow_nan=False)


def test_disagreements_count_false_alarms_and_misses():
    cell = {"model": "m", "attention": "a", "situation": "s"}
    cells = [
        cell | {"dtype": d, "verdict": v} for d, v in (("float64", "leak"), ("float32", "exact"), ("bfloat16", "leak"))
    ]
    assert [(d["dtype"], d["kind"]) for d in isolation.disagreements(cells)] == [("float32", "miss")]
    cells[0]["verdict"] = "exact"
    assert [(d["dtype"], d["kind"]) for d in isolation.disagreements(cells)] == [("bfloat16", "false alarm")]


def test_unsupported_is_a_cell():
    cell = isolation.check_cell("bloom", "flex_attention", "FlatteningCollator", "float32")
    assert cell["verdict"] == "unsupported" and "BloomForCausalLM" in cell["reason"]


def test_heat_map(matrix):
    figure = isolation.heat_map(matrix)
    figure.canvas.draw()
    (ax,) = figure.axes
    leaks = sum(cell["verdict"] == "leak" for cell in isolation.judged(matrix, "float32").to_dict("records"))
    version = matrix["environment"]["transformers"]
    title = figure.get_suptitle().replace("\n", " ")
    assert title.startswith(f"transformers {version}, float32: packed examples see each other in 6 of ")
    assert "sdpa 4, flash_attention_2 2, packlib_varlen 0" in figure.alt
    (crosses,) = ax.collections
    assert len(crosses.get_offsets()) == leaks == 6
    for across, down in crosses.get_offsets():
        attention, situation = divmod(int(across), len(isolation.SITUATIONS))
        where = ("sdpa", "flash_attention_2", "packlib_varlen")[attention], list(isolation.SITUATIONS)[situation]
        assert down == 0 and expected(*where) == "leak", where


@pytest.mark.parametrize("attentions", [["sdpa"], ["sdpa", "packlib_varlen"]])
def test_a_small_heat_map_is_not_cut(matrix, attentions):
    few = matrix | {"cells": [cell for cell in matrix["cells"] if cell["attention"] in attentions]}
    figure = isolation.heat_map(few)
    figure.canvas.draw()
    (ax,), (legend,), page = figure.axes, figure.legends, figure.bbox
    title, names = figure._suptitle.get_window_extent(), [text.get_window_extent() for text in ax.texts]
    for box in (title, legend.get_window_extent(), *names):
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert not any(box.overlaps(title) for box in names) and [text.get_text() for text in ax.texts] == attentions
    assert page.width / figure.dpi >= 6, "room for a title"
    assert [text.get_text() for text in legend.get_texts()][:2] == ["exact", "rounding"]


def test_a_look_is_a_few_cells():
    frame = isolation.look(["opt"], ["sdpa", "packlib_varlen"], ["FlatteningCollator"])
    assert frame["verdict"].tolist() == ["leak", "exact"]
    page = isolation.styled(frame).to_html()
    assert isolation.VERDICTS["leak"] in page and "an edit moves others by" in page and ">why<" not in page


def test_a_refusal_says_why():
    frame = isolation.look(["llama"], ["packlib_varlen"], ["position ids alone"])
    page = isolation.styled(frame).to_html()
    assert frame["verdict"].tolist() == ["refused"] and ">why<" in page
    assert "no boundaries reached the attention<" in page and "starts at" not in page


@pytest.mark.parametrize("lengths", [(9, 4, 6, 11), (7, 3, 5), (5, 5, 5, 5)])
def test_any_lengths_fit_two_rows(lengths):
    for attention, verdict in (("sdpa", "exact"), ("flash_attention_2", "leak")):
        cell = isolation.check_cell("llama", attention, "two packed rows", "float32", lengths)
        assert cell["verdict"] == verdict, (attention, cell)


def test_a_look_packs_examples_of_the_lengths_that_it_is_given():
    seen = []
    for lengths in ((9, 2), (4, 4, 4)):
        frame = isolation.look(["llama"], ["sdpa"], ["cache left on"], lengths=lengths)
        report = check_isolation(
            small_model("llama"), batch_builder=isolation.SITUATIONS["cache left on"], lengths=lengths
        )
        seen.append(max(x for i, row in enumerate(report.influence) for x in row[:i]))
        assert frame["influence"].tolist() == seen[-1:]
    assert seen[0] != seen[1]
    record = isolation.run_matrix(["llama"], ["sdpa"], ["position ids alone"], ["float32"], lengths=(9, 2))
    assert record["lengths"] == [9, 2]


def test_influence_is_drawn_as_it_was_measured():
    reports = [check_isolation(small_model(name), lengths=[5, 4, 6]) for name in ("llama", "opt")]
    figure = isolation.influence_pictures(reports)
    figure.canvas.draw()
    assert figure.alt == "llama, sdpa: exact; opt, sdpa: leak"
    for ax, report in zip(figure.axes, reports):
        assert [text.get_text() for text in ax.texts] == [f"{x:.2g}" for row in report.influence for x in row]


def test_weights_of_the_loss_are_those_of_the_examples():
    examples = isolation.weighed_examples(seed=1)
    assert [len(example["input_ids"]) for example in examples] == list(isolation.WEIGHED)
    equal = isolation.equivalence("llama", examples)
    assert equal["weighting"].tolist() == list(WEIGHTINGS) and equal["gradient_error"].max() < 1e-4
    weights = isolation.weightings("llama", examples)
    for weighting in ("per_token", "per_example"):
        mean = (weights["loss"] * weights[f"weight {weighting.replace('_', ' ')}"]).sum()
        packed = equal.set_index("weighting").loc[weighting, "loss_packed"]
        assert mean == pytest.approx(packed, rel=1e-5)


def test_findings_count_the_cells(matrix):
    equal = pd.DataFrame({"gradient_error": [1e-7, 2e-7]})
    ran, disagree, ours, gradients = isolation.findings(matrix, "float32", equal)
    cells = isolation.judged(matrix, "float32")
    assert f": 6 of {(~cells['verdict'].isin(['unsupported', 'refused'])).sum()} combinations" in ran
    assert disagree.startswith("0 of 72 verdicts") and ours.endswith(
        "0 leaks in attention, 0 in all; 0 model types refused."
    )
    assert gradients.endswith("is 2.0e-07.")


def test_isolated_mixers_are_a_situation():
    situations = ["FlatteningCollator", isolation.ISOLATED]
    record = isolation.run_matrix(["minimax", "blt"], ["sdpa"], situations, ["float32"])
    verdicts = [cell["verdict"] for cell in record["cells"]]
    assert verdicts == ["leak", "exact", "leak", "refused"]
    assert "no module of it can be isolated" in record["cells"][3]["reason"]
    said = isolation.findings(record, "float32", pd.DataFrame({"gradient_error": [0.0]}))
    assert not any("packlib_varlen" in line for line in said), "nothing of what was not tried"
    assert said[2].startswith("isolate_mixers keeps examples apart in 1 of the 2 combinations")
    old = record | {"cells": [cell for cell in record["cells"] if cell["situation"] != isolation.ISOLATED]}
    assert len(isolation.findings(old, "float32", pd.DataFrame({"gradient_error": [0.0]}))) == len(said) - 1


def test_a_hybrid_before_and_after_the_repair():
    (before, after), said = isolation.repaired("minimax", "float32", [5, 4, 6])
    assert before.verdict == "leak" and before.culprit == "state" and after.isolated
    assert after.attention == f"{before.attention} + isolate_mixers", "two panels that can be told apart"
    assert (
        said == "on one line a segment: model.layers.1.self_attn (MiniMaxLightningAttention); 1.20 slots a token inside"
    )


def test_the_newest_matrix_is_the_published_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m packlib matrix"):
        isolation.published(tmp_path)
    for version, created in (("1", "2026-02-01"), ("2", "2026-01-01")):
        environment = {"created": created, "transformers": version}
        records.write_json(tmp_path / f"transformers-{version}.json", {"environment": environment})
    assert isolation.published(tmp_path)["environment"]["transformers"] == "1"


def test_publishing_leaves_a_record_and_its_figure(tmp_path, monkeypatch, matrix):
    monkeypatch.setattr(isolation, "run_matrix", lambda models: matrix)
    said = isolation.publish(["llama"], tmp_path)
    (record,) = tmp_path.glob("*.json")
    assert said == f"72 cells, 0 disagree with float64: {record}"
    assert isolation.published(tmp_path)["cells"] == matrix["cells"]
    with Image.open(record.with_suffix(".png")) as image:
        assert image.info["Description"] == isolation.heat_map(matrix).alt


@pytest.mark.slow
@pytest.mark.parametrize("model_type", isolation.MODELS)
def test_whole_matrix(model_type):
    record = isolation.run_matrix([model_type])
    assert not record["disagreements"]
    assert all(c["seconds"] < 20 for c in record["cells"])


def test_a_loss_has_no_gradient_in_another_example_only_with_boundaries():
    lengths = [5, 3, 6]
    model = small_model("llama", register_attention("sdpa"))
    row = {"input_ids": list(range(10, 24)), "seq_lengths": lengths}
    isolated, contaminated = (
        isolation.loss_gradients(model, FlatteningCollator(boundary=boundary)([row]), lengths)
        for boundary in ("segment", "row")
    )
    assert np.array_equal(isolated > 0, np.eye(3, dtype=bool))
    assert np.array_equal(contaminated > 0, np.tri(3, dtype=bool))
    figure = isolation.gradient_pictures({"with": isolated, "without": contaminated})
    figure.canvas.draw()
    assert [len(ax.texts) for ax in figure.axes] == [9, 9] and figure.alt.startswith(
        "with: up to 0 in another example; without: up to "
    )
