"""What the parameters of notebooks may be: a range or the known names for each, checked before anything runs.

A parameter means the same in every notebook, so a rule goes by its name; where a notebook is narrower or wider, its
number leads to a rule of its own. What only the data can tell (more examples than a corpus has) is an error of the
study that finds out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from packlib.attention import KERNELS
from packlib.lab import models, paper
from packlib.lab.data.corpora import located
from packlib.lab.parameters import check_pretrained, unknown_name
from packlib.lab.runs.spec import DTYPES, KERNEL_NAMES, RunSpec
from packlib.lab.strategies import STRATEGIES

Rule = Callable[[str, Any, Mapping[str, Any]], None]  # name, value, all parameters; raises ValueError


def check_ranges(values: Mapping[str, Any], notebook: str = "") -> None:
    """Hold each parameter against the rule of its name; one without a rule passes.

    values: parameters of the right types. notebook: its name, which begins with its number. Raises `ValueError` (of a
    model, perhaps `OSError`) that names the parameter, what was expected and what is there.

    >>> check_ranges({"batch_sizes": [4, -1]})
    Traceback (most recent call last):
    ValueError: parameter batch_sizes[1] = -1; expected at least 1
    """
    rules = RULES | OF_NOTEBOOK.get(notebook[:2], {})
    for name, value in values.items():
        if name in rules:
            rules[name](name, value, values)


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"parameter {name} = {value!r}; expected {expected}")


# Rules


def anything(name: str, value: Any, others: Mapping[str, Any]) -> None:
    """Its type says all."""


def at_least(least: float, *, above: bool = False) -> Rule:
    """A finite number of at least `least`, or above it."""

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        if not math.isfinite(value) or value < least or (above and value == least):
            raise _wrong(name, value, f"a number above {least}" if above else f"at least {least}")

    return check


def some(rule: Rule = anything) -> Rule:
    """A list (or text) that is not empty, and each of whose items keeps a rule."""

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        if not len(value):
            raise _wrong(name, value, "at least one")
        each(rule)(name, value, others)

    return check


def each(rule: Rule) -> Rule:
    """A list each of whose items keeps a rule; it may be empty."""

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        for i, item in enumerate(value):
            rule(f"{name}[{i}]", item, others)

    return check


def one_of(known: Iterable[str] | Callable[[], Iterable[str]]) -> Rule:
    """One of some names; a function gives those that cost an import."""

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        names = list(known() if callable(known) else known)
        if value not in names:
            raise unknown_name(name, value, names)

    return check


def in_values(rule: Rule) -> Rule:
    """A mapping whose values keep a rule."""

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        for key, item in value.items():
            rule(f"{name}[{key!r}]", item, others)

    return check


def in_keys(known: Iterable[str]) -> Rule:
    """A mapping of known names."""
    names = list(known)

    def check(name: str, value: Any, others: Mapping[str, Any]) -> None:
        for key in value:
            if key not in names:
                raise unknown_name(f"field of parameter {name}", key, names)

    return check


def model(name: str, value: str, others: Mapping[str, Any]) -> None:
    """A name of MODELS, a folder, a .gguf (records of it are redrawn where it is not) or a Hub name."""
    if not value.endswith(".gguf"):
        check_pretrained(name, located(value), models.MODELS, reach=False)


def arm(name: str, value: str, others: Mapping[str, Any]) -> None:
    """A strategy, perhaps with the attention behind a colon."""
    strategy, colon, kernel = value.partition(":")
    one_of(STRATEGIES)(name, strategy, others)
    if colon:
        one_of(KERNEL_NAMES)(f"attention of {name}", kernel, others)


def example_index(name: str, value: int, others: Mapping[str, Any]) -> None:
    """An index into the parameter `examples`."""
    count = len(others["examples"])
    if not 0 <= value < count:
        raise _wrong(name, value, f"an index of the {count} examples, 0 to {count - 1}")


def vocabulary(name: str, value: int, others: Mapping[str, Any]) -> None:
    """Room for every token id of `examples`, and for one that none of them has."""
    largest = max(token for ids in others["examples"] for token in ids)
    if value < largest + 2:
        raise _wrong(name, value, f"at least {largest + 2}: the largest token id is {largest}, one more stays unused")


def pictured(name: str, value: int, others: Mapping[str, Any]) -> None:
    """No more than the examples that are read."""
    if not 1 <= value <= others["limit"]:
        raise _wrong(name, value, f"1 to limit = {others['limit']}")


def heads(name: str, value: list[int], others: Mapping[str, Any]) -> None:
    """Query heads, and key and value heads, which divide them."""
    if len(value) != 2 or min(value) < 1 or value[0] % value[1]:
        raise _wrong(name, value, "two numbers of at least 1, the second dividing the first")


def _model_types() -> Iterable[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return CONFIG_MAPPING_NAMES


def _mixes() -> Iterable[str]:
    from packlib.lab.studies.kernels import MIXES

    return MIXES


def _rungs() -> list[str]:
    from packlib.lab.studies.ladder import CLIMBS

    return [rung.name for climb in CLIMBS.values() for rung in climb]


def _rung_or_none() -> list[str]:
    return ["", *_rungs()]


COUNT, COUNTS = at_least(1), some(at_least(1))
FIELDS = [field.name for field in fields(RunSpec)]
RULES: dict[str, Rule] = {
    "batch_size": COUNT,
    "batch_sizes": COUNTS,
    "beside": each(one_of([*KERNELS])),
    "chunks": COUNTS,
    "climbs": some(in_keys([*FIELDS, "climb", "rungs", "keep"])),
    "corpora": some(some()),
    "corpus": some(),
    "corpus_name": some(),
    "data": in_values(one_of(paper.blog_ratios()["corpus"].unique())),
    "device": one_of(["auto", "cpu", "cuda"]),
    "dtype": one_of(DTYPES),
    "edited_example": example_index,
    "eval_examples": COUNT,
    "examples": some(some(at_least(0))),
    "further": each(in_keys([*FIELDS, "models", "corpora", "strategies"])),
    "gradient_accumulation": COUNT,
    "grown": COUNT,
    "head_dim": COUNT,
    "heads": heads,
    "here": one_of(_rung_or_none),
    "hybrid": one_of(_model_types),
    "kernel": one_of(["auto", *KERNELS]),
    "layers": COUNT,
    "learning_rate": at_least(0, above=True),
    "lengths": COUNTS,
    "limit": COUNT,
    "matrix": one_of(["published", "run"]),
    "matrix_attentions": some(some()),
    "matrix_models": some(one_of(_model_types)),
    "max_tokens": at_least(2),
    "mean_length": COUNT,
    "measure": anything,
    "measured": some(),
    "min_tokens": at_least(0),
    "mixes": some(one_of(_mixes)),
    "model": model,
    "models": some(model),
    "options": in_keys(FIELDS),
    "parity": in_keys([*FIELDS, "climbs", "keep"]),
    "pictured": pictured,
    "published": anything,
    "records_run": anything,
    "repeats": COUNT,
    "run": some(),
    "rungs": each(one_of(_rungs)),
    "safe_models": some(one_of(_model_types)),
    "seed": at_least(0),
    "seeds": some(at_least(0)),
    "settings": some(some()),
    "stand_ins": in_values(one_of(paper.table_2()["model"].unique())),
    "state_models": some(one_of(_model_types)),
    "steps": COUNT,
    "strategies": some(arm),
    "tokenizer": some(),
    "tokenizers": some(some()),
    "tokens": COUNTS,
    "unsafe_models": some(one_of(_model_types)),
    "vocab_size": vocabulary,
    "world_size": COUNT,
}
OF_NOTEBOOK: dict[str, dict[str, Rule]] = {
    "00": {"examples": COUNT},
    "04": {"dtype": one_of(["float32", "bfloat16", "float64"])},
    "06": {"batch_sizes": each(COUNT)},  # none: no curve
    "07": {  # layers: 0, as published
        "layers": at_least(0),
        "further": in_keys(["equal_time", "third_reason", "constant_examples", "neighbours", "cutting"]),
    },
    "08": {"device": one_of(["cpu", "cuda"])},
}
