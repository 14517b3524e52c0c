"""What a notebook's parameter must be is said before anything runs: parameter, expected, actual."""

import pytest

from packlib.lab.pages import ranges, reproduce

DEFAULTS = {path.stem: reproduce.declared_parameters(path) for path in reproduce.notebooks()}


def of(number: str) -> str:
    return next(name for name in DEFAULTS if name.startswith(number))


@pytest.mark.parametrize("notebook", DEFAULTS)
def test_every_parameter_has_a_rule_and_its_default_keeps_it(notebook):
    known = ranges.RULES | ranges.OF_NOTEBOOK.get(notebook[:2], {})
    assert not DEFAULTS[notebook].keys() - known.keys(), "add them to RULES"
    ranges.check_ranges(DEFAULTS[notebook], notebook)


def test_no_rule_is_left_over():
    assert not ranges.RULES.keys() - {name for declared in DEFAULTS.values() for name in declared}


@pytest.mark.parametrize(
    ("number", "wrong", "message"),
    [
        ("00", {"lengths": [4, 0]}, r"lengths\[1\] = 0; expected at least 1"),
        ("00", {"examples": 0}, "examples = 0; expected at least 1"),
        ("00", {"kernel": "flsh"}, r"unknown kernel 'flsh'.*; known: .*flash_attn"),
        ("01", {"corpora": []}, r"corpora = \[\]; expected at least one"),
        ("01", {"batch_sizes": [1, -4]}, r"batch_sizes\[1\] = -4; expected at least 1"),
        ("01", {"batch_sizes": []}, r"batch_sizes = \[\]; expected at least one"),
        ("01", {"model": "tiny-lama"}, r"unknown model 'tiny-lama' \(did you mean 'tiny-llama'\?\); known: .*phi-2"),
        ("02", {"edited_example": 4}, "edited_example = 4; expected an index of the 4 examples, 0 to 3"),
        ("02", {"edited_example": -1}, "edited_example = -1; expected an index"),
        ("02", {"examples": [[1], []]}, r"examples\[1\] = \[\]; expected at least one"),
        ("02", {"examples": [[1], [2, -3]]}, r"examples\[1\]\[1\] = -3; expected at least 0"),
        ("02", {"vocab_size": 411}, "vocab_size = 411; expected at least 412: the largest token id is 410"),
        ("03", {"pictured": 9, "limit": 8}, "pictured = 9; expected 1 to limit = 8"),
        ("03", {"world_size": 0}, "world_size = 0; expected at least 1"),
        (
            "04",
            {"dtype": "flaot32"},
            r"unknown dtype 'flaot32' \(did you mean 'float32'\?\); known: bfloat16, float32,",
        ),
        ("04", {"matrix": "runs"}, r"unknown matrix 'runs' \(did you mean 'run'\?\); known: published, run"),
        ("04", {"unsafe_models": ["otp"]}, r"unknown unsafe_models\[0\] 'otp' .*; known: \d+ names"),
        (
            "05",
            {"mixes": ["evn"]},
            r"unknown mixes\[0\] 'evn' \(did you mean 'even'\?\); known: even, heavy_tail, narrow",
        ),
        ("05", {"heads": [4, 3]}, r"heads = \[4, 3\]; expected two numbers of at least 1, the second dividing"),
        ("05", {"device": "gpu"}, "unknown device 'gpu'.*; known: auto, cpu, cuda"),
        ("05", {"layers": 0}, "layers = 0; expected at least 1"),
        ("06", {"strategies": ["paddin"]}, r"unknown strategies\[0\] 'paddin' \(did you mean 'padding'\?\)"),
        ("06", {"strategies": ["padding:sdp"]}, r"unknown attention of strategies\[0\] 'sdp'"),
        ("06", {"models": []}, r"models = \[\]; expected at least one"),
        ("06", {"options": {"limt": 3}}, r"unknown field of parameter options 'limt' \(did you mean 'limit'\?\)"),
        (
            "06",
            {"further": [{"corpus": "x"}, {"strategis": []}]},
            r"unknown field of parameter further\[1\] 'strategis'",
        ),
        ("07", {"learning_rate": 0.0}, r"learning_rate = 0\.0; expected a number above 0"),
        ("07", {"learning_rate": float("nan")}, "learning_rate = nan; expected a number above 0"),
        ("07", {"further": {"equal_times": {}}}, r"unknown field of parameter further 'equal_times'"),
        ("07", {"seeds": []}, r"seeds = \[\]; expected at least one"),
        ("08", {"rungs": ["flatened"]}, r"unknown rungs\[0\] 'flatened' \(did you mean 'flattened'\?\)"),
        ("08", {"climbs": [{"corpsu": "x"}]}, r"unknown field of parameter climbs\[0\] 'corpsu'"),
        ("08", {"here": "roof"}, "unknown here 'roof'"),
        ("08", {"device": "auto"}, "unknown device 'auto'; known: cpu, cuda"),
        ("09", {"stand_ins": {"tiny-llama": "mistral"}}, r"unknown stand_ins\['tiny-llama'\] 'mistral'"),
        ("09", {"data": {"pydocs": "FLANN"}}, r"unknown data\['pydocs'\] 'FLANN' \(did you mean 'FLAN'\?\)"),
    ],
)
def test_what_is_out_of_range_is_named(number, wrong, message):
    with pytest.raises(ValueError, match=message):
        ranges.check_ranges(DEFAULTS[of(number)] | wrong, of(number))


@pytest.mark.parametrize(
    ("number", "right"),
    [
        ("02", {"edited_example": 3, "vocab_size": 412}),
        ("06", {"batch_sizes": []}),
        ("06", {"strategies": ["padding:transformers_sdpa"], "models": ["not-here.gguf", "org/name"]}),
        ("07", {"layers": 0}),
    ],
)
def test_what_is_on_the_edge_is_taken(number, right):
    """The negative control, and what published runs need: a weights file that is not here is redrawn from records."""
    ranges.check_ranges(DEFAULTS[of(number)] | right, of(number))
