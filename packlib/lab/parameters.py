"""Names and values that somebody typed, checked where they enter.

papermill passes what YAML or the command line gives it: `1e-4` in YAML is a string, `true` on the command line is a
string. A value is held against a default of the type that it must have, and a name against the known ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

HINTS = {  # what to write instead
    float: " (in YAML write 1.0e-4, on papermill's command line use -y)",
    list: " (on papermill's command line use -y)",
    bool: " (on papermill's command line use -y or True/False)",
}


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The one error for a name that is not in a table: it lists the known names and the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join(known)}")


def check_parameters(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Hold each parameter against a default of the right type; returns them in the order of `defaults`.

    values: parameters, and perhaps others, which are not looked at. An int is accepted where a float is expected, and
    comes back as one; items of a list must have the type of the default's first; a default of None accepts anything.
    Raises `NameError` for a missing parameter and `TypeError` for a wrong type, both naming the parameter.

    >>> check_parameters({"seed": 3, "rate": 1}, {"seed": 0, "rate": 1e-4})
    {'seed': 3, 'rate': 1.0}
    >>> check_parameters({"lr": "1e-4"}, {"lr": 1e-4})
    Traceback (most recent call last):
    TypeError: parameter lr = '1e-4' is a str; expected float (in YAML write 1.0e-4, on papermill's command line use -y)
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
    hint = HINTS.get(expected, "")
    raise TypeError(f"parameter {name} = {value!r} is a {type(value).__name__}; expected {expected.__name__}{hint}")
