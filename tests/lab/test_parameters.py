"""Parameters are checked where they enter: names, types, and what papermill makes of YAML and the command line."""

import pytest

from packlib.lab.parameters import check_parameters, unknown_name

DEFAULTS = {
    "steps": 1,
    "rate": 0.5,
    "name": "",
    "draw": True,
    "sizes": [1],
    "rates": [0.5],
    "options": {},
    "anything": None,
}
GIVEN = {
    "steps": 3,
    "rate": 1e-4,
    "name": "x",
    "draw": False,
    "sizes": [1, 2],
    "rates": [0.1],
    "options": {"a": 1},
    "anything": "x",
    "other": 1,
}


def test_good_values_come_back_in_order():
    checked = check_parameters(GIVEN, DEFAULTS)
    assert list(checked) == list(DEFAULTS) and checked == {name: GIVEN[name] for name in DEFAULTS}
    assert check_parameters({"sizes": []}, {"sizes": [1]}) == {"sizes": []}


def test_whole_numbers_are_floats_where_floats_are_expected():
    checked = check_parameters(GIVEN | {"rate": 2, "rates": [1, 0.5]}, DEFAULTS)
    assert (checked["rate"], checked["rates"]) == (2.0, [1.0, 0.5])
    assert all(type(value) is float for value in [checked["rate"], *checked["rates"]])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rate", "1e-4", r"rate = '1e-4' is a str; expected float \(in YAML write 1\.0e-4"),
        ("draw", "true", r"draw = 'true' is a str; expected bool \(on papermill's command line use -y or True/False\)"),
        ("draw", 1, "draw = 1 is a int; expected bool"),
        ("steps", True, "steps = True is a bool; expected int"),
        ("steps", 2.0, "steps = 2.0 is a float; expected int"),
        ("steps", None, "steps = None is a NoneType; expected int"),
        ("rate", False, "rate = False is a bool; expected float"),
        ("sizes", "[1, 2]", r"sizes = '\[1, 2\]' is a str; expected list \(on papermill's command line use -y\)"),
        ("sizes", (1, 2), r"sizes = \(1, 2\) is a tuple; expected list"),
        ("sizes", [1, "2"], r"sizes\[1\] = '2' is a str; expected int"),
        ("rates", [0.1, None], r"rates\[1\] = None is a NoneType; expected float"),
        ("name", 5, "name = 5 is a int; expected str"),
    ],
)
def test_wrong_types_are_named(name, value, message):
    with pytest.raises(TypeError, match=f"^parameter {message}"):
        check_parameters(GIVEN | {name: value}, DEFAULTS)


def test_a_missing_parameter_is_named():
    with pytest.raises(NameError, match="parameter rate is missing; expected float"):
        check_parameters({"steps": 1}, DEFAULTS)


def test_the_nearest_known_name_is_offered():
    near = "unknown preset 'smok' (did you mean 'smoke'?); known: cpu, smoke"
    assert str(unknown_name("preset", "smok", ["smoke", "cpu"])) == near
    assert str(unknown_name("preset", "zzz", ["smoke", "cpu"])) == "unknown preset 'zzz'; known: cpu, smoke"
