"""`report.md` of a run: the question, what came out, what it was measured with and on; then tables and findings.

Everything is computed from the records and summaries of the run's folder, so that a published run's report can be
written again anywhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from packlib.atomic import atomic_write
from packlib.lab import records, tables
from packlib.lab.doubts import doubts
from packlib.lab.strategies import STRATEGIES

QUESTION = (
    "A padded batch computes slots that hold no token. How much faster does training run, and how much memory does it "
    "take, when examples are packed instead, and does the model learn the same?"
)
LEGEND = {
    "tokens a step": "real tokens of an optimiser step, in the mean",
    "real tokens/s": "tokens of examples trained on per second; **slots/s** counts pads, too",
    "× padding": "real tokens/s over padding's, same model, data and device",
    "limit": "what dropping the pads alone can give: the optimiser's least time stays, all else of padding's step "
    "shrinks as its slots do (where records lack that time: the ratio of slots); fuller batches can give more",
    "fill": "real tokens over slots",
    "memory × padding": "peak memory over padding's",
    "validation loss": "nats per token, held-out examples one by one, after as many passes over the data",
}
ABSENT = "–"  # a ratio without a padding run that had the device alone
SHARED, FULL = (
    "Steps as padding has them: the same number of examples a step",
    "Full rows: a row of so many tokens holds more examples, so that steps are fewer and larger",
)
ON_TERMINAL = 15  # arms
WIDTH = 100  # columns of a sentence on the terminal


def write_report(folder: Path) -> Path:
    """`report.md` of a run folder; returns its path."""
    report = folder / "report.md"
    with atomic_write(report) as file:
        file.write(render(folder))
    return report


def render(folder: Path) -> str:
    """The text of the report."""
    found = records.read_records(folder)
    frame = records.load_records(folder)
    parts = [f"# Padding versus packing: run `{folder.name}`", f"**Question.** {QUESTION}"]
    if found:
        arms, off = _arms(frame), doubts(frame)
        parts += cautions(off)
        said = _summary(arms, ranked=not off)
        if said:
            parts.append("**Summary.** " + " ".join(said))
        parts.append(tables.markdown(_provenance(found)))
        parts += _speed(arms)
    for path in sorted((folder / "summaries").glob("*.json")):
        parts += _notebook(path, folder)
    return "\n\n".join(parts) + "\n"


def cautions(found: Iterable[str]) -> list[str]:
    """Doubts as GitHub shows them in red."""
    return [f"> [!CAUTION]\n> 🔴 **{doubt}**" for doubt in found]


def headline(folder: Path) -> str:
    """A run on the terminal: doubts, then the first arms of the report's table; empty where none was timed."""
    frame = records.load_records(folder)
    arms = _arms(frame)
    if not len(arms):
        return ""
    off = [textwrap.fill(f"🔴 {doubt}", WIDTH) for doubt in doubts(frame)]
    more = f"\n… {len(arms) - ON_TERMINAL} more arms in the report" if len(arms) > ON_TERMINAL else ""
    return "\n\n".join([*off, tables.markdown(_shown(arms.head(ON_TERMINAL))) + more])


def _arms(frame: pd.DataFrame) -> pd.DataFrame:
    """`tables.against` of the runs that had the device to themselves, with `tokens_per_step`; empty without any."""
    if "strategy" not in frame:  # no record, or notebook 05's of attention alone
        return pd.DataFrame()
    timed = tables.one_setting(tables.alone(frame[frame["strategy"].notna()]))
    if not len(timed):
        return pd.DataFrame()
    keys = ["model", "corpus", "rig", "strategy", "kernel"]
    tokens = timed.assign(rig=tables.rigs(timed)).groupby(keys)
    column = "metrics.tokens_per_step"
    means = tokens[column].mean() if column in timed else tokens.size() * float("nan")
    return tables.against(timed).merge(means.rename("tokens_per_step").reset_index(), how="left", on=keys)


def _shown(arms: pd.DataFrame) -> pd.DataFrame:
    """The arms as a reader sees them: every table has its ratios, a missing one is a dash."""
    shown = tables.display_table(arms)
    shown.insert(3, "tokens a step", tables.formatted(arms["tokens_per_step"], "{:,.0f}"))
    for column in ("× padding", "limit"):
        if column not in shown:
            shown[column] = ""
    if "peak memory (GB)" in shown:
        place = list(shown).index("peak memory (GB)") + 1
        shown.insert(place, "memory × padding", tables.formatted(arms["memory_ratio"], "{:.2f}"))
    ratios = [name for name in ("× padding", "limit", "memory × padding") if name in shown]
    shown[ratios] = shown[ratios].replace("", ABSENT)
    return shown.drop(columns="rows", errors="ignore")


def _speed(arms: pd.DataFrame) -> list[str]:
    """The tables of speed and memory, one for each capacity of a step, and what their columns mean."""
    if not len(arms):
        return []
    stays = arms["strategy"].map(lambda name: STRATEGIES[name].examples_stay)
    parts = ["## Speed and memory"]
    columns: set[str] = set()
    for title, part in ((SHARED, arms[stays]), (FULL, arms[~stays])):
        if len(part):
            shown = _shown(part.reset_index(drop=True))
            columns |= set(shown)
            parts += [f"**{title}.**", tables.markdown(shown)]
    legend = [f"- **{name}**: {text}" for name, text in LEGEND.items() if name in columns]
    absent = f"- {ABSENT}: no padding run of the same setting had the device to itself, or the arm has no result"
    return [*parts[:1], "\n".join([*legend, absent]), *parts[1:]]


def _summary(arms: pd.DataFrame, *, ranked: bool) -> list[str]:
    """What the arms say of the two ways to pack: flattened mini-batches, and full rows of whole examples."""
    said: list[str] = []
    if not len(arms):
        return said
    for name, what in {
        "minibatch_packing": "Flattening the same mini-batches trains",
        "multipack_posid": "Packing whole examples into full rows trains",
    }.items():
        own = arms[(arms["strategy"] == name) & (arms["kernel"] == "auto")].dropna(subset="speed_up")
        if len(own):
            said.append(f"{what} {_range(own['speed_up'])} times as fast as padding, {_places(own)}")
            said[-1] += f", and takes {_range(own['memory_ratio'])} of its peak memory."
    if said and not ranked:
        said.append("A control of this run is off (above): the ratios hold more than packing, and none is ranked.")
    return said


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def _places(arms: pd.DataFrame) -> str:
    models, corpora = arms["model"].nunique(), arms["corpus"].nunique()
    counted = [f"{n} {name}{'s' if n > 1 else ''}" for n, name in ((models, "model"), (corpora, "data set"))]
    return "on " + " and ".join(counted)


def _provenance(found: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Commits, dates, device and versions of the runs, a row for each combination."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in found:
        seen = record["environment"]
        sha, dirty = seen.get("git_sha"), seen.get("dirty")
        commit = f"`{sha[:9]}{'-dirty' if dirty else ''}`" if sha else "unknown"
        software = ", ".join(f"{name} {seen[name]}" for name in ("torch", "transformers", "trl") if seen.get(name))
        rows.setdefault((commit, seen["device"], software), []).append(seen["created"][:10])
    table = [
        (commit, min(days) if min(days) == max(days) else f"{min(days)} to {max(days)}", device, software, len(days))
        for (commit, device, software), days in rows.items()
    ]
    return pd.DataFrame(table, columns=["commit", "date", "device", "software", "measured runs"])


def _notebook(path: Path, folder: Path) -> list[str]:
    """A notebook's title, what it doubts, its findings and figures."""
    summary = records.read_json(path)
    parts = [f"## [{summary['title']}]({path.stem}.ipynb)", *cautions(summary.get("doubts", []))]
    if summary["findings"]:
        parts.append("\n".join(f"- {finding}" for finding in summary["findings"]))
    for name, alt in summary.get("figures", {}).items():
        if (folder / "figures" / f"{name}.png").exists():
            parts.append(f"![{alt}](figures/{name}.png)")
    return parts
