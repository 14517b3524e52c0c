"""Checks a notebook's parameters where they enter.

papermill passes what YAML or the command line gives it: `1e-4` in YAML is a string, `true` on the command line is a string, and a
misspelt name only warns. The cell after the tagged one calls `check_parameters`, so that all of these stop the run at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The one error for a name that is not in a table: it lists the known names and the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")


def check_parameters(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Hold each notebook parameter against a default of the right type.

    `values` is usually `globals()`; `defaults` maps each parameter to a value of the type it must have (an int is accepted where a
    float is expected; `None` among the values of a list default's type is not). A `None` default accepts anything.
    Returns the checked values, in the order of `defaults`. Raises `NameError` for a missing parameter and `TypeError` for a wrong type,
    both naming the parameter.

    >>> check_parameters({"seed": 3, "rate": 1}, {"seed": 0, "rate": 1e-4})
    {'seed': 3, 'rate': 1.0}
    >>> check_parameters({"rate": "1e-4"}, {"rate": 1e-4})
    Traceback (most recent call last):
    TypeError: parameter rate = '1e-4' is a str; expected float (in YAML write 1.0e-4, on papermill's command line use -y)
    """
    checked = {}
    for name, default in defaults.items():
        if name not in values:
            raise NameError(f"parameter {name} is missing; expected {type(default).__name__}")
        checked[name] = _checked(name, values[name], default)
    return checked


def _checked(name: str, value: Any, default: Any) -> Any:
    expected = type(default)
    if default is None or (isinstance(value, expected) and isinstance(value, bool) == isinstance(default, bool)):
        if isinstance(default, list) and default:
            return [_checked(f"{name}[{i}]", item, default[0]) for i, item in enumerate(value)]
        return value
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    hint = {float: " (in YAML write 1.0e-4, on papermill's command line use -y)", list: " (on papermill's command line use -y)",
            bool: " (on papermill's command line use -y or True/False)"}.get(expected, "")  # fmt: skip
    raise TypeError(f"parameter {name} = {value!r} is a {type(value).__name__}; expected {expected.__name__}{hint}")
