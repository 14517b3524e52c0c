"""Names and values that somebody typed, checked where they enter.

papermill passes what YAML or the command line gives it: `1e-4` in YAML is a string, `true` on the command line is a
string. A value is held against a default of the type that it must have, and a name against the known ones.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HUB_SECONDS = 5  # to wait for its answer
MANY = 60  # names are not listed one by one
HINTS = {  # what to write instead
    float: " (in YAML write 1.0e-4, on papermill's command line use -y)",
    list: " (on papermill's command line use -y)",
    bool: " (on papermill's command line use -y or True/False)",
}


def unknown_name(kind: str, name: str, known: Iterable[str], *, also: Iterable[str] = ()) -> ValueError:
    """The one error for a name that is not in a table: it lists the known names (many: how many), the nearest, `also`.

    also: what else is taken, in words.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    listed = known if len(known) <= MANY else [f"{len(known)} names"]
    return ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join([*listed, *also])}")


def check_pretrained(kind: str, name: str, known: Iterable[str] = (), *, reach: bool = True) -> None:
    """Refuse a pretrained model or tokenizer that is nowhere, before a client of the Hub asks for it six times.

    name: a folder, a .gguf file, a Hub name that is in the cache, or `org/name`. known: names that need none of these.
    reach: ask the Hub once whether it has that name. Raises `ValueError` for a name that cannot be one, with the known
    ones and the nearest, and for one that the Hub does not have; `OSError` where the Hub cannot be reached.

    >>> check_pretrained("model", "mistral-7c", ["mistral-7b"])
    Traceback (most recent call last):
    ValueError: unknown model 'mistral-7c' (did you mean 'mistral-7b'?); known: mistral-7b, a folder, .gguf, org/name
    """
    if name in known or Path(name).exists() or _in_cache(name):
        return
    if name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1:
        raise OSError(f"{kind} {name!r} is no file or folder here")
    if name.count("/") != 1:
        raise unknown_name(kind, name, known, also=("a folder", ".gguf", "org/name"))
    if reach:
        _ask_hub(kind, name)


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json")]
    except HFValidationError:
        return False
    return any(isinstance(path, str) for path in found)


def _ask_hub(kind: str, name: str) -> None:
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise OSError(f"{kind} {name!r} is neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set")
    try:
        huggingface_hub.model_info(name, timeout=HUB_SECONDS)
    except RepositoryNotFoundError:
        raise ValueError(f"unknown {kind} {name!r}: the Hub has no such name") from None
    except Exception as error:  # whatever its HTTP client raises without a network
        raise OSError(f"{kind} {name!r} is not here, and the Hub does not answer: {error}") from None


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
