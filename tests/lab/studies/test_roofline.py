"""Points lie under the roof that their device's measured rates make."""

import pytest

from packlib.lab import models, records
from packlib.lab.studies import roofline


@pytest.fixture(scope="module")
def published():
    return records.read_records(records.run_folder("h100", create=False))


def test_points_lie_under_the_roof_and_pads_between_slots_and_tokens(published):
    table = roofline.points(published)
    assert {"padding", "minibatch_packing"} <= set(table["strategy"]) and len(table) >= 5
    assert (table["useful_flops"] <= table["slot_flops"] * 1.0001).all()
    assert (table["slot_flops"] < table["roof"]).all()
    padded, flat = (table[table["strategy"] == name] for name in ("padding", "minibatch_packing"))
    assert (padded["useful_flops"] < 0.9 * padded["slot_flops"]).all()
    assert flat["useful_flops"].to_numpy() == pytest.approx(flat["slot_flops"].to_numpy(), rel=0.2)


def test_intensity_is_worked_by_hand(published):
    row = roofline.points(published).iloc[0]
    count = models.parameter_count(models.model_config(row["model"]))
    by_hand = 6 * (count.active + count.head) * 2 * row["slots"] / (2 * count.total * (3 * 2 + 8))
    assert row["intensity"] == pytest.approx(by_hand)
    assert row["roof"] == min(row["matmul"], row["intensity"] * row["copy"])


def test_the_figure_names_where_the_roof_bends(published):
    table = roofline.points(published)
    figure = roofline.roofline(table)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert f"bends at {table['matmul'].median() / table['copy'].median():,.0f} FLOP" in ax.get_title(loc="left")
    assert {text.get_text() for text in ax.texts} == set(table["corpus"])
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    for x, low, high in zip(table["intensity"], table["useful_flops"] / 1e12, table["slot_flops"] / 1e12):
        (at, bottom), (_, top) = ax.transData.transform([(x, low), (x, high)])
        assert not any(box.x0 < at < box.x1 and box.y0 < top and bottom < box.y1 for box in boxes), "on a stem"


def test_plain_comes_before_climbed_and_trl_lies_on_top(published):
    table = roofline.points(published)
    (ax,) = roofline.roofline(table.sample(frac=1, random_state=0)).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()[1:]]
    assert labels == sorted(labels, key=lambda name: name.endswith("climbed")) and labels[0] == "Padding, plain"
    lines = {line.get_label(): line for line in ax.lines}
    ours, theirs = lines["Multipack + PosID, plain"], lines["TRL packing (bfd), plain"]
    assert theirs.get_markersize() > ours.get_markersize() and theirs.get_zorder() > ours.get_zorder()


def test_the_finding_has_a_share_of_every_run(published):
    table = roofline.points(published)
    said = roofline.finding(table)
    assert said.count("%") == len(table) and said.startswith(
        f"{(table['roof'] == table['matmul']).sum()} of {len(table)}"
    )


def test_what_is_not_on_this_roof_is_left_out(published):
    assert "trl_padding_free" not in set(roofline.points(published)["strategy"])
    compiled = next(r for r in published if (r["spec"].get("rig") or {}).get("compile") and r["status"] == "ok")
    rig = compiled["spec"]["rig"] | {"float8": True}
    float8 = compiled | {"run_id": "float8", "spec": compiled["spec"] | {"rig": rig, "corpus": "float8"}}
    assert len(roofline.points([*published, float8])) == len(roofline.points(published))
