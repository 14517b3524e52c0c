"""Specs: what cannot be is refused by name, and a run's id outlives every option that is added later."""

import json
from dataclasses import asdict, field, fields, make_dataclass, replace
from typing import Any

import pytest

from packlib.lab import records
from packlib.lab.runs.spec import Rig, RunSpec, grid

BASE = RunSpec(corpus="arithmetic", max_tokens=256, layers=1, steps=10, warmup_steps=1, eval_examples=6)
# Another value of each field, where one more or its opposite will not do.
OTHER: dict[str, Any] = {
    "strategy": "dynapipe",
    "kernel": "flex",
    "dtype": "bfloat16",
    "overflow": "split",
    "unlabelled": "drop",
    "loss": "response",
    "weighting": "per_example",
    "lr_scheduler": "cosine",
    "order": "neighbours",
    "rig": Rig(liger=True),
}


def another(name: str, value: Any) -> Any:
    if name in OTHER:
        return OTHER[name]
    if isinstance(value, bool):
        return not value
    return f"{value}x" if isinstance(value, str) else (value or 0) + 2


# Two rigs that differ in one field alone.
COMPILED = {"compile": "layers"}
REPEATED = {"fused_loss": True, "lean": True, "pad_to": 64}
RIGS: dict[str, tuple[Rig, Rig]] = {
    "compile": (Rig(), Rig(compile="layers")),
    "recompute": (Rig(**COMPILED), Rig(**COMPILED, recompute=0.5)),
    "graphs": (Rig(**REPEATED), Rig(**REPEATED, graphs=True)),
    "fused_loss": (Rig(), Rig(fused_loss=True)),
    "liger": (Rig(), Rig(liger=True)),
    "lean": (Rig(), Rig(lean=True)),
    "pad_to": (Rig(), Rig(pad_to=64)),
    "float8": (Rig(**COMPILED), Rig(**COMPILED, float8=True)),
    "lora_rank": (Rig(), Rig(lora_rank=8)),
    "shard": (Rig(), Rig(shard=True)),
    "native_mixers": (Rig(), Rig(native_mixers=True)),
}


# what is refused


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "strategy",
            "paddin",
            r"unknown strategy 'paddin' \(did you mean 'padding'\?\); known: best_fit_crop_posid, .*trl_padding_free",
        ),
        ("kernel", "sdpaa", r"unknown kernel 'sdpaa' \(did you mean 'sdpa'\?\); known: auto, .*transformers_sdpa"),
        ("dtype", "fp16", "unknown dtype 'fp16'; known: bf16_mixed, bfloat16, float32"),
        ("overflow", "drop", "unknown overflow 'drop'; known: cut, error, split, truncate"),
        ("loss", "prompt", "unknown loss 'prompt'.*; known: full, response"),
        ("weighting", "per_row", "unknown weighting 'per_row'.*; known: longalign, per_example, per_token"),
        ("lr_scheduler", "cosin", r"unknown lr_scheduler 'cosin' \(did you mean 'cosine'\?\)"),
        ("batch_size", 0, "batch_size = 0; expected an integer of at least 1$"),
        ("steps", 0, "steps = 0; expected an integer of at least 1 or None"),
        ("limit", "16", "limit = '16'; expected an integer of at least 1 or None"),
        ("eval_every", True, "eval_every = True; expected an integer of at least 1 or None"),
        ("world_size", -1, "world_size = -1; expected"),
        ("seed", -1, "seed = -1; expected a finite number of at least 0"),
        ("learning_rate", float("nan"), "learning_rate = nan; expected a finite number of at least 0"),
        ("epochs", 0.0, "epochs = 0.0; expected a finite number above 0"),
        ("epochs", float("inf"), "epochs = inf; expected a finite number above 0"),
        ("rig", {"recompute": "some"}, "recompute = 'some'; expected 'none', 'all', or a number between 0 and 1"),
        ("rig", {"recompute": 1.5}, "recompute = 1.5; expected 'none', 'all', or a number between 0 and 1"),
        ("rig", {"recompute": 0.5}, "recompute = 0.5 is a budget of compiled layers; expected compile = 'layers'"),
        ("rig", {"compile": "all"}, "unknown compile 'all'.*; known: layers, none"),
        ("rig", {"pad_to": -1}, "pad_to = -1; expected at least 0 tokens"),
        ("rig", {"lora_rank": 0}, "lora_rank = 0; expected an integer of at least 1 or None"),
        ("rig", {"float8": True}, "expected compile = 'layers'"),
        ("rig", {"graphs": True}, "graphs need .* that repeat and wait for nothing"),
    ],
)
def test_bad_values_are_refused_with_the_known_ones(name, value, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3, "warmup_steps": 3}, "warmup_steps = 3 leaves nothing of steps = 3 to measure; expected fewer"),
        ({"eval_every": 5, "eval_examples": 0}, "eval_every = 5 with eval_examples = 0; expected a held-out set"),
        (
            {"split_rows": True},
            "split_rows = True with examples_per_step = None; expected the number of examples a step",
        ),
        ({"profile": True, "steps": None}, "profile = True adds a step to those of `steps`; expected steps, not None"),
    ],
)
def test_values_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("learning_rate", "1e-4"), ("model", 7), ("seed", 1.0), ("batch_size", True), ("rig", "all")]
)
def test_wrong_types_are_refused(name, value):
    with pytest.raises(TypeError, match=f"parameter {name} = {value!r} is a {type(value).__name__}; expected"):
        replace(BASE, **{name: value})


def test_wrong_options_of_the_rig_are_refused():
    with pytest.raises(TypeError, match="parameter liger = 'True' is a str; expected bool"):
        RunSpec(rig={"liger": "True"})
    with pytest.raises(TypeError, match="wings"):
        RunSpec(rig={"wings": 2})


# identity


def test_every_field_is_part_of_the_identity():
    base = replace(BASE, examples_per_step=4)
    for f in fields(base):
        changed = replace(base, **{f.name: another(f.name, getattr(base, f.name))})
        assert changed.spec_id != base.spec_id, f.name
    assert RIGS.keys() == {f.name for f in fields(Rig)}
    for name, (before, after) in RIGS.items():
        run = replace(BASE, world_size=2 if name == "shard" else 1)
        assert replace(run, rig=before).spec_id != replace(run, rig=after).spec_id, name


def test_a_spec_survives_json():
    spec = replace(BASE, rig=Rig(recompute="all"))
    again = RunSpec(**json.loads(json.dumps(asdict(spec))))
    assert again == spec and again.spec_id == spec.spec_id and isinstance(again.rig, Rig)


def test_a_whole_number_is_the_same_run_as_its_float():
    """YAML's `epochs: 1` and the default 1.0 must not be measured twice."""
    as_integers, as_floats = replace(BASE, epochs=2, learning_rate=1), replace(BASE, epochs=2.0, learning_rate=1.0)
    assert as_integers.spec_id == as_floats.spec_id != BASE.spec_id


def test_a_new_option_with_a_default_leaves_every_id_as_it_was():
    """A later RunSpec, with an option and a rig of more options, names the runs of today as they are named today."""
    later_rig = make_dataclass("LaterRig", [("wings", int, field(default=2))], bases=(Rig,), frozen=True)
    options = [("engines", int, field(default=1)), ("rig", Rig, field(default_factory=later_rig))]
    later = make_dataclass("LaterRunSpec", options, bases=(RunSpec,), frozen=True)
    base = replace(BASE, examples_per_step=4)
    for f in fields(base):
        spec = replace(base, **{f.name: another(f.name, getattr(base, f.name))})
        given = {g.name: getattr(spec, g.name) for g in fields(spec)} | {"rig": later_rig(**asdict(spec.rig))}
        assert later(**given).spec_id == spec.spec_id
        assert later(**given, engines=2).spec_id != spec.spec_id, "the negative control: used, it makes another run"
        wings = {"rig": later_rig(**asdict(spec.rig), wings=3)}
        assert later(**given | wings).spec_id != spec.spec_id


def test_published_runs_keep_their_names():
    """Each record is named by its spec as RunSpec reads it today, so that a sweep finds what is published."""
    published = records.read_records(records.runs_folder() / "h200")
    runs = [record for record in published if "strategy" in record["spec"]]
    assert len(runs) > 100
    for record in runs:
        assert RunSpec(**record["spec"]).spec_id == record["run_id"].split("-")[0]
    assert RunSpec().spec_id == "44136fa355b3" and RunSpec(rig={"recompute": "all"}).spec_id == "4948c6ffe5ea"


# grids


def test_a_grid_has_every_combination_the_last_axis_fastest():
    specs = grid(BASE, seed=range(2), strategy=["padding", "minibatch_packing"])
    assert [(spec.seed, spec.strategy) for spec in specs] == [
        (0, "padding"),
        (0, "minibatch_packing"),
        (1, "padding"),
        (1, "minibatch_packing"),
    ]
    assert {spec.max_tokens for spec in specs} == {256} and grid(BASE) == [BASE]
