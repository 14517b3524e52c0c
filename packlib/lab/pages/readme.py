"""`python -m packlib tables`: every measured number of README.md, and published reports, written from records.

A block begins with `<!-- table: NAME RUN -->` and ends with `<!-- end -->`; between them stands `BLOCKS[NAME]` of
papermill_runs/RUN/records, nothing where they hold nothing for it. The figure's alt text has all of its numbers and is
stored in the PNG, with a digest of the code that drew it, so that `--check`, which only compares, notices an old
picture.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from packlib.attention import KERNELS
from packlib.lab import doubts, figures, paper, records, tables
from packlib.lab.pages import report
from packlib.lab.parameters import unknown_name
from packlib.lab.runs.spec import PADDED_SDPA
from packlib.lab.studies import convergence, cutting, neighbours, new_widths, third_reason, throughput
from packlib.lab.studies import paper as comparison

BLOCK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
MODEL, NAME = "mistral-7b", "Mistral-7B"  # of the headline
STANDS_FOR = {"multitask": comparison.FLAN, "math": "OrcaMath"}  # our corpora and the paper's
SETTING = {name: paper.SETTING[name] for name in ("batch_size", "max_tokens", "gradient_accumulation")}
HEADLINE = ["padding", "group_by_length", "minibatch_packing", "multipack_posid", "trl_padding_free", "trl_packing_bfd"]
SAME_BATCHES = ["padding", "minibatch_packing", "trl_padding", "trl_padding_free"]  # the same examples at every step
RATIO = {"multitask": "{:.2f}", "math": "about {:.1f}"}  # "about" is what the blog post says of OrcaMath


def _speed(frame: pd.DataFrame) -> pd.DataFrame:
    """The timed runs of whole models at the paper's setting on a plain trainer, that had the device to themselves.

    `model` is written with its rig, where that is not the one that most of its runs were on.
    """
    at_setting = (frame[list(SETTING)] == pd.Series(SETTING)).all(axis=1)
    timed = tables.alone(_plain(frame[at_setting & frame["eval_every"].isna() & frame["layers"].isna()]))
    rigs = tables.rigs(timed)
    usual = rigs.groupby(timed["model"]).transform(lambda of_model: of_model.mode().iloc[0])
    named = pd.Series(tables.named_models(timed["model"], rigs), index=timed.index)
    return timed.assign(model=named.where(rigs != usual, timed["model"]))


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs on one device whose layers are launched kernel by kernel."""
    return frame[~tables.rigs(frame).str.contains("compile=|ranks=")]


def _against(frame: pd.DataFrame) -> pd.DataFrame:
    """`throughput.both_baselines` corpus by corpus.

    `data` is the corpus in one word, `speed_up_paper` the paper's ratio.
    """
    table = throughput.both_baselines(_speed(frame))
    table["data"] = table["corpus"].map(_data)
    known = comparison.paper_values()[["data", "model", "strategy", "speed_up"]].assign(kernel="auto")
    known["data"] = known["data"].replace({theirs: ours for ours, theirs in STANDS_FOR.items()})
    keys = ["data", "model", "strategy", "kernel"]
    table = table.merge(known, how="left", on=keys, suffixes=("", "_paper"))
    place = {name: i for i, name in enumerate(dict.fromkeys([*STANDS_FOR, *table["data"]]))}
    return table.sort_values("data", key=lambda names: names.map(place), kind="stable", ignore_index=True)


def _data(corpus: str) -> str:
    return tables.short(corpus).split("_")[0]


def _markdown(table: pd.DataFrame) -> str:
    shown = tables.display_table(table).assign(model=table["model"], corpus=table["data"]).drop(columns="rows")
    theirs = [
        "" if pd.isna(ratio) else RATIO[data].format(ratio)
        for data, ratio in zip(table["data"], table["speed_up_paper"])
    ]
    place = list(shown).index("× padding") + 1
    if table["over_sdpa"].notna().any():
        shown.insert(place, "× padding, SDPA", tables.formatted(table["over_sdpa"], "{:.2f}"))
    shown.insert(place, "the paper's", theirs)
    alike = [name for name in ("model", "corpus") if shown[name].nunique() == 1]
    return tables.markdown(shown.drop(columns=alike))


def _headline(frame: pd.DataFrame) -> pd.DataFrame:
    table = _against(frame)
    kernels = table["kernel"].isin(["auto", *PADDED_SDPA])
    chosen = (table["model"] == MODEL) & kernels & table["strategy"].isin(HEADLINE)
    return table[chosen].reset_index(drop=True)


def _varlen(arms: pd.DataFrame) -> pd.DataFrame:
    """Of `_headline` the arms that attend in packlib's way."""
    return arms[arms["kernel"] == "auto"]


def _devices(frame: pd.DataFrame) -> str:
    places = {*zip(frame["environment.device_count"], frame["environment.device"])}
    return " and ".join(f"{n:.0f} × {device}" for n, device in sorted(places))


def worth(frame: pd.DataFrame, run: str) -> str:
    """What packing is worth in CUDA graphs, and how much of what the device's rates allow, in bold; of one device.

    Below what takes it back: repeats of these runs, and a control on their rigs.
    """
    rate, allowed = "metrics.tokens_per_s.mean", "metrics.limit.tokens_per_s"
    ok = tables.alone(frame[(frame["status"] == "ok") & (frame["model"] == MODEL) & (frame["world_size"] == 1)])
    ok = ok[ok["rig.lora_rank"].isna()].assign(data=ok["corpus"].map(_data))
    graphs = ok["rig.graphs"].eq(True) & ok["rig.lean"].eq(True)
    in_graphs = graphs & ok["batch_size"].eq(SETTING["batch_size"])
    of = ok[in_graphs].groupby(["strategy", "data"])[[rate, allowed]].median()
    if not {"minibatch_packing", "padding"} <= set(of.index.get_level_values("strategy")):
        return ""
    gain = (of.loc["minibatch_packing"] / of.loc["padding"]).dropna()
    gain = gain.loc[[data for data in STANDS_FOR if data in gain.index]]
    gained = " and ".join(f"{ratio:.2f} × as fast on {data}" for data, ratio in gain[rate].items())
    most = " and ".join(f"{ratio:.2f}" for ratio in gain[allowed])
    shares = " and ".join(f"{share:.0%}" for share in gain[rate] / gain[allowed])
    rows = ok[(ok["strategy"] == "multipack_posid") & ~ok["rig.float8"].eq(True) & ok["rig.compile"].eq("layers")]
    of_rig = rows.groupby([tables.rigs(rows), "data", "batch_size"])[rate].transform("median")
    rows = rows[of_rig == of_rig.max()]
    theirs = ok[(ok["strategy"] == "trl_packing_bfd") & ok["data"].isin(rows["data"])][rate]
    full = ""
    if len(theirs):
        full = f"; full rows reach {rows[rate].median():,.0f} real tokens/s there, and "
        full += f"{theirs.median():,.0f} as TRL packs and trains them"
    shown, asked = (ok.loc[[*ok.index[those], *rows.index]] for those in (in_graphs, graphs))
    return _cautions(asked) + (
        f"**{NAME} on {_devices(shown)}, batches of {SETTING['batch_size']}, on a rig that its host does not hold up: "
        f"against padding through SDPA, flattening the same mini-batches trains {gained}; the device's measured rates "
        f"allow {most}, of which that is {shares}{full}.**{_checked(asked)}"
    )


def _checked(frame: pd.DataFrame) -> str:
    """What repeats and a batch of one say for the times of these runs."""
    spread, alike = doubts.repeat_spread(frame), "With one example a batch, where nothing is padded, packing runs at"
    said = [f"Repeats of an arm are within {spread:.1%} of each other."] if pd.notna(spread) else []
    said += [f"{alike} {ratio:.3f} times padding's speed ({where})." for ratio, where in doubts.controls(frame)]
    return f"\n\n{' '.join(said) or 'Each arm ran once, without a control.'}"


def claim(frame: pd.DataFrame, run: str) -> str:
    """The finding in bold, below what takes it back."""
    arms = _varlen(_headline(frame)).set_index(["data", "strategy"]).loc["multitask"]
    packed, full = arms.loc["minibatch_packing"], arms.loc["multipack_posid"]
    saved = f"{100 * (1 - packed['memory_ratio']):.0f} % less peak memory"
    return _cautions(_plain(frame)) + (
        f"**{NAME} on {_devices(_speed(frame))}, a multi-task corpus, batches of {SETTING['batch_size']}: padding "
        f"computes {packed['waste_ratio']:.2f} slots for every real token of the measured steps. Flattening the same "
        f"batches trains {packed['speed_up']:.2f} × as fast with {saved}; packing whole examples into full rows trains "
        f"{full['speed_up']:.2f} × as fast, in fewer and larger steps.**"
    )


def _cautions(frame: pd.DataFrame) -> str:
    """What takes a run's rankings back, in red, to stand above its claim; else nothing."""
    return "".join(f"{caution}\n\n" for caution in report.cautions(doubts.doubts(frame)))


def _mark(frame: pd.DataFrame) -> str:
    """What is off in a run, for a title; else nothing."""
    off = doubts.in_short(doubts.doubts(_plain(frame)))
    return f" ({off})" if off else ""


def _reminder(frame: pd.DataFrame) -> str:
    """What is off, in a line, above further tables of the run that the page begins with; else nothing."""
    off = doubts.in_short(doubts.doubts(_plain(frame))).capitalize()
    return f"🔴 *{off} (see above): read large differences, not small ones.*\n\n" if off else ""


def headline(frame: pd.DataFrame, run: str) -> str:
    """The table of the headline, and what it was measured on."""
    speed = _speed(frame)
    used = speed[(speed["model"] == MODEL) & (speed["status"] == "ok")]
    one = used.iloc[0]
    versions = ", ".join(f"{name} {one[f'environment.{name.lower()}']}" for name in ("torch", "transformers", "TRL"))
    recompute = ", gradient checkpointing" if one["rig.recompute"] == "all" else ""
    examples = f"{SETTING['batch_size']} examples × {SETTING['gradient_accumulation']} accumulated"
    steps = f"{_range(used['metrics.measured_steps'])} steps a run after {_range(used['warmup_steps'])} of warm-up"
    kernels = ", ".join(sorted({kernel for kernel in used["metrics.kernel"] if kernel in KERNELS}))
    where = (
        f"{_devices(used)}, {versions}, attention by {kernels}; random weights, {one['dtype']}{recompute}; "
        f"{examples}, {SETTING['max_tokens']:,} tokens at most; {steps}"
    )
    gap = _largest_gap(used, records.read_records(records.run_folder(run, create=False)))
    parity = f"Arms that get the same mini-batches agree in training loss to {gap:.3f} nats at every step."
    table = _headline(frame).assign(fill=np.nan)
    return f"{_reminder(frame)}{_markdown(table)}\n\n{where}. {parity}"


def _range(values: pd.Series) -> str:
    """Smallest and largest of whole numbers, one where they are the same."""
    low, high = values.min(), values.max()
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _largest_gap(used: pd.DataFrame, found: Iterable[Mapping[str, Any]]) -> float:
    """Largest difference of a step's training loss between arms of a corpus with the same mini-batches, in nats."""
    losses = {record["run_id"]: record["trace"]["loss"] for record in found if record["trace"]}
    same = used[used["strategy"].isin(SAME_BATCHES)].groupby("corpus")["run_id"]
    return max(float(np.ptp([losses[run_id] for run_id in ids], axis=0).max()) for _, ids in same)


def arms(frame: pd.DataFrame, run: str) -> str:
    """Every arm of the headline's model."""
    table = _against(frame)
    return _reminder(frame) + _markdown(table[table["model"] == MODEL].reset_index(drop=True)) + _measured(frame)


def models(frame: pd.DataFrame, run: str) -> str:
    """MiniBatchPacking of every model on the first corpus, below what takes the run's rankings back."""
    table = _against(frame)
    packed = (table["strategy"] == "minibatch_packing") & (table["kernel"] == "auto")
    shown = table[packed & (table["data"] == next(iter(STANDS_FOR)))].reset_index(drop=True)
    return _cautions(_plain(frame)) + _markdown(shown) + _measured(frame)


def _measured(frame: pd.DataFrame) -> str:
    """Where and when the runs of a table were measured, and on which attention."""
    used = _speed(frame)
    used = used[used["status"] == "ok"]
    kernels = ", ".join(sorted({kernel for kernel in used["metrics.kernel"] if kernel in KERNELS}))
    return f"\n\n{_devices(used)}, {used['environment.created'].min()[:10]}, attention by {kernels}."


def losses(frame: pd.DataFrame, run: str) -> str:
    """Validation losses of notebook 07's arms that leave learning rate and shuffling as they are, rig by rig."""
    arms = convergence.recognised(records.read_records(records.run_folder(run, create=False)))
    wanted = {identity: arm for identity, arm in arms.items() if arm.variant in convergence.SHARES}
    found = frame[frame["run_id"].isin(wanted) & (frame["status"] == "ok")]
    rows = []
    rigs = found["run_id"].map({identity: arm.spec.rig.label for identity, arm in wanted.items()})
    for (_, corpus, rig), group in found.groupby(["model", "corpus", rigs], sort=False):
        place = f"{_data(corpus)} ({rig})" if rig else _data(corpus)
        group = pd.concat([group[group["strategy"] == "padding"], group[group["strategy"] != "padding"]])
        labels = [wanted[identity].label for identity in group["run_id"]]
        group = group.assign(arm=labels, per_token=group["metrics.eval_loss_per_token"])
        told = {gap["label"]: convergence.tell(gap) for gap in convergence.differences(group).to_dict("records")}
        for name, runs in group.groupby("arm", sort=False):
            row = {"corpus": place, "batching": name, "steps": f"{runs['metrics.optimizer_steps'].mean():,.0f}"}
            row |= {"validation loss": f"{runs['per_token'].mean():.4f}", "minus padding's": told.get(name, "")}
            rows.append(row)
    if not rows:
        return ""
    models = " and ".join(found["model"].map(tables.short).unique())
    said = f"Validation loss of {models} (notebook 07), on held-out examples that see only themselves"
    return f"{said}, each arm against padding seed by seed:\n\n{tables.markdown(pd.DataFrame(rows))}"


def figure(frame: pd.DataFrame, run: str) -> str:
    """The figure of the headline, its numbers as alt text."""
    bars = [
        f"{row.data}, {figures.label(row.strategy)} {row.speed_up:.2f} (limit {row.limit:.2f})"
        for row in _varlen(_headline(frame)).dropna(subset="speed_up").itertuples()
    ]
    alt = f"Real tokens/s relative to padding{_mark(frame)}, {NAME} on {_devices(_speed(frame))}. {'; '.join(bars)}."
    return f"![{alt}](papermill_runs/{run}/figures/readme.png)"


def widths(frame: pd.DataFrame, run: str) -> str:
    """What a batch width costs padding through SDPA the first time; of the records of notebook 05."""
    found = new_widths.published(records.run_folder(run, create=False) / "attention")
    return "\n".join(f"- {said}" for said in new_widths.findings(found))


def climb(frame: pd.DataFrame, run: str) -> str:
    """The climbs of notebook 08: of each its figure, and what it found on the first corpus."""
    folder = records.run_folder(run, create=False)
    summary = records.read_json(folder / "summaries" / "08_climb_to_the_limit.json")
    told = [finding.split(": ", maxsplit=1) for finding in summary["findings"]]
    devices = _devices(frame[frame["status"] == "ok"])
    parts = [line for caution in report.cautions(summary.get("doubts", [])) for line in (caution, "")]
    for figure, ending in {"08_mini_batches": ", mini-batches", "08_full_rows": ", full rows"}.items():
        if figure not in summary["figures"]:
            continue
        place = next(where for where, _ in told if where.endswith(ending))
        said = [f"- {sentence}" for where, sentence in told if where == place]
        parts += [f"![{summary['figures'][figure]}](papermill_runs/{run}/figures/{figure}.png)", ""]
        parts += [f"{NAME} on {devices}, {place}:", "", *said, ""]
    return "\n".join(parts[:-1])


def learned(frame: pd.DataFrame, run: str) -> str:
    """What 07 found at equal time, of the third reason, constant examples, neighbours and cutting, with a figure."""
    summary = records.read_json(records.run_folder(run, create=False) / "summaries" / "07_compare_convergence.json")
    about = ["the lowest mean loss is", third_reason.GAP_SAID, f"{third_reason.CAUSE}.", f"{third_reason.PART}."]
    about += [f", {convergence.EXACT}: ", "Neighbours: ", *(f": {pair}, " for pair in neighbours.PAIRS)]
    about += [
        f", {name}, against “" for name in ("every token", f"first {cutting.EARLY} tokens", "behind the first row")
    ]
    said = [f"- {line}" for line in summary["findings"] if any(words in line for words in about)]
    figure = next((name for name in summary["figures"] if name.startswith("07_equal_time_multitask")), None)
    if not said or not figure:
        return ""
    picture = f"![{summary['figures'][figure]}](papermill_runs/{run}/figures/{figure}.png)"
    parts = [line for caution in report.cautions(summary["doubts"]) for line in (caution, "")]
    return "\n".join([*parts, picture, "", *said])


def ranks(frame: pd.DataFrame, run: str) -> str:
    """What several GPUs did, against both ways of padding, on the paper's rig and on others."""
    used = frame[(frame["world_size"] > 1) & (frame["status"] == "ok") & (frame["model"] == MODEL)]
    table = throughput.both_baselines(used)
    rigs = tables.named_models([""] * len(table), table["rig"])
    columns = {
        "corpus": table["corpus"].map(_data),
        "rig": [rig.strip(" ()") for rig in rigs],
        "batching": [tables.arm_label(*arm) for arm in zip(table["strategy"], table["kernel"])],
        "real tokens/s of a GPU": tables.formatted(table["tokens_per_s"], "{:,.0f}"),
        "× padding, SDPA": tables.formatted(table["over_sdpa"], "{:.2f}"),
        "× padding, varlen": tables.formatted(table["speed_up"], "{:.2f}"),
        "peak memory of a GPU (GB)": tables.formatted(table["peak_memory_bytes"] / 1e9, "{:.1f}"),
    }
    kernels = ", ".join(sorted({kernel for kernel in used["metrics.kernel"] if kernel in KERNELS}))
    launch = 1e6 * used["metrics.launch_seconds"]
    said = (
        f"{NAME} on {_devices(used)}, attention by {kernels}; the host launches a kernel in {launch.min():.0f} to "
        f"{launch.max():.0f} µs."
    )
    return f"{_cautions(used)}{tables.markdown(pd.DataFrame(columns))}\n\n{said}"


BLOCKS = {
    function.__name__: function
    for function in (worth, claim, headline, figure, widths, climb, learned, ranks, arms, models, losses)
}


def _draw(frame: pd.DataFrame, path: Path, text: str) -> None:
    """Draw the headline's figure, with `text` as its description."""
    figures.theme()
    table = _varlen(_headline(frame)).dropna(subset="speed_up")
    first = table.drop_duplicates("strategy").set_index("strategy")["speed_up"]
    said = f"flattened {first['minibatch_packing']:.2f} ×, full rows {first['multipack_posid']:.2f} ×"
    said += _mark(frame)
    title = f"{NAME} on {_devices(_speed(frame))}, {table['data'].iloc[0]}: {said}"
    picture = figures.bars_with_limits(table.assign(corpus=table["data"]), title, width=11.5, row=0.62)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(figures.png(picture, text, Drawn=_drawing()))


def _drawing() -> str:
    """Digest of the code that draws the figure: a picture of other code is an old one."""
    code = [inspect.getsource(part) for part in (_draw, figures.bars_with_limits, figures.bar, figures.head)]
    look = [repr(part) for part in (figures.THEME, figures.LIMIT, figures.NUMBER, *map(figures.style, HEADLINE))]
    return hashlib.sha256("\n".join([*code, *look]).encode()).hexdigest()[:16]


def render(text: str, *, draw: bool = False) -> tuple[str, list[str]]:
    """README's text as the records have it, and the names of its blocks that differed.

    draw: draw the figure anew if it did. Raises `ValueError` for an unknown block, and for a run without records.
    """
    stale = []

    def block(match: re.Match[str]) -> str:
        begin, name, run, old, end = match.groups()
        if name not in BLOCKS:
            raise unknown_name("block of README.md", name, BLOCKS)
        folder = records.run_folder(run, create=False)
        frame = records.load_records(folder)
        if not len(frame):
            raise ValueError(f"papermill_runs/{run}/records is empty; expected the records of a published run")
        new, picture = BLOCKS[name](frame, run), folder / "figures" / "readme.png"
        old_picture = name == "figure" and _told(picture) != (new, _drawing())
        if old_picture and draw:
            _draw(frame, picture, new)
        new += "\n" if new else ""
        if new != old or old_picture:
            stale.append(name)
        return begin + new + end

    return BLOCK.sub(block, text), stale


def _told(picture: Path) -> tuple[str | None, str | None]:
    """The description in a PNG file and the digest of what drew it; None where it has none."""
    if not picture.exists():
        return None, None
    with Image.open(picture) as image:
        return image.info.get("Description"), image.info.get("Drawn")


def update(*, check: bool = False) -> str:
    """Write README.md anew, and the reports of the runs that it names; returns what was done.

    check: write nothing, raise `ValueError` where one of them differs.
    """
    path = records.project_root() / "README.md"
    text, stale = render(path.read_text(encoding="utf-8"), draw=not check)
    runs = sorted({match[3] for match in BLOCK.finditer(text)})
    old = [run for run in runs if not _reported(records.run_folder(run, create=False))]
    if check and stale:
        raise ValueError(f"README.md is not what the records say: {', '.join(stale)}; run make tables")
    if check and old:
        raise ValueError(f"report.md of {', '.join(old)} is not what the records say; run make tables")
    if stale:
        path.write_text(text, encoding="utf-8")
    for run in old:
        report.write_report(records.run_folder(run))
    reports = f"; report.md: {', '.join(old) or 'nothing'} to change"
    return f"README.md: {', '.join(stale) or 'nothing'} to change{reports}"


def _reported(folder: Path) -> bool:
    """Whether a run's report, if it has one, is what its records and summaries say."""
    path = folder / "report.md"
    return not path.exists() or path.read_text(encoding="utf-8") == report.render(folder)
