"""The paper's tables and figures beside what run folders hold: what only notebook 09 needs. Nothing is measured, and no GPU is needed.

Like beside like: of every run folder, model and corpus the one setting that most arms share, on one kernel, and the paper's value of the same model.
Where a model stands for one of the paper's (tiny-llama on a CPU), only ratios to padding are compared. What either side does not say stays empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from packlib.lab import convergence, figures, models, paper, records, tables
from packlib.lab.spec import RunSpec
from packlib.lab.parameters import unknown_name
from packlib.lab.strategies import STRATEGIES

SAME = {
    "offline_packing_posid": "multipack_posid"
}  # both make rows of batch_size x max_tokens; the paper's may cut examples
BATCHING = {
    SAME.get(strategy, strategy): name for name, strategy in paper.STRATEGY.items()
}  # our strategy -> the paper's name of it
FLAN, BLOG_MODELS = (
    "FLAN",
    ("mistral-7b", "llama-2-7b", "granite-8b-code"),
)  # the data of Table 2; the models of the blog post
VALUES, RATIOS = ["rows", "tokens_per_s", "peak_memory_bytes", "loss"], ["speed_up", "memory_ratio"]
FIELDS = [field.name for field in fields(RunSpec)]
STEP = {
    "batch_size",
    "gradient_accumulation",
    "steps",
    "eval_every",
    "generate_examples",
    "examples_per_step",
}  # differ between arms of Table 4
STATE_BYTES = {"float32": 16, "bf16_mixed": 16, "bfloat16": 8}  # a parameter's weight, gradient and AdamW's two moments
UNITS = {  # title of a pair of columns: column, divisor, format
    "rows": ("rows", 1, "{:,.0f}"), "real tokens/s": ("tokens_per_s", 1, "{:,.0f}"), "peak memory (GB)": ("peak_memory_bytes", 1e9, "{:.1f}"),
    "validation loss": ("loss", 1, "{:.3f}"), "speed, × padding": ("speed_up", 1, "{:.2f}"), "peak memory, × padding": ("memory_ratio", 1, "{:.2f}"),
}  # fmt: skip


def measured(run: Path, published: Sequence[str] = ()) -> pd.DataFrame:
    """`records.load_records` of the training runs in `run` and in published run folders, with `run`, the folder's name, as a column.

    published: names under papermill_runs/, or patterns. A run that two folders hold counts for the first. `ValueError`: a name without records.
    """
    root = records.project_root() / "papermill_runs"
    known = [path.parent.name for path in sorted(root.glob("*/records")) if any(path.glob("*.json"))]
    if unknown := [name for name in published if name not in known and not set(name) & set("*?[")]:
        raise unknown_name("published run", unknown[0], known)
    folders = [run, *(root / name for name in known if any(fnmatch(name, pattern) for pattern in published))]
    frames = [records.load_records(folder).assign(run=folder.name) for folder in folders]
    frame = pd.concat([f for f in frames if len(f)] or [pd.DataFrame(columns=["run_id"])], ignore_index=True)
    frame = frame.reindex(
        columns=list(dict.fromkeys([*frame, "run", "status", "environment.concurrent_runs", *FIELDS]))
    )
    return frame[frame["strategy"].isin(list(STRATEGIES))].drop_duplicates("run_id").reset_index(drop=True)


def _one_setting(frame: pd.DataFrame, free: Iterable[str] = ()) -> pd.DataFrame:
    """`tables.one_setting` of every run, where arms may also differ in the fields `free`."""
    kept = [tables.one_setting(runs.drop(columns=list(free))).index for _, runs in frame.groupby("run", sort=False)]
    return frame.loc[[i for index in kept for i in index]]


def speed_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of notebook 06 that Table 2 can be held against: the paper's strategies on packlib's attention, with the device to themselves."""
    chosen = (
        frame["eval_every"].isna()
        & frame["strategy"].isin(list(BATCHING))
        & (frame["kernel"] == "auto")
        & (frame["status"] == "ok")
    )
    return _one_setting(frame[chosen & (frame["environment.concurrent_runs"] == 1)])


def convergence_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of notebook 07 that Table 4 can be held against, with the columns of `convergence.results`, `run` and `model`."""
    wanted = (
        frame["strategy"].isin(paper.table_4()["strategy"]) & frame["eval_every"].notna() & (frame["status"] == "ok")
    )
    found = _one_setting(frame[wanted], STEP)
    padding, rows = found["strategy"] == "padding", found["batch_size"] * found["gradient_accumulation"]
    usual = rows.where(padding).groupby([found["run"], found["model"], found["corpus"]]).transform("max")
    variant = np.where(
        padding, "", np.where(rows == usual, convergence.EPOCHS, convergence.STEPS)
    )  # as many rows as padding has examples: few steps
    batch = [
        f"({size}, {tokens}, {steps})"
        for size, tokens, steps in zip(found["batch_size"], found["max_tokens"], found["gradient_accumulation"])
    ]
    arm = [convergence.Arm(*names, None).label for names in zip(found["strategy"], variant)]
    results = found.reindex(columns=["metrics.optimizer_steps", "metrics.eval_loss_per_token"]).set_axis(
        ["steps", "per_token"], axis=1
    )
    return (
        found.assign(corpus=found["corpus"].map(tables.short), arm=arm, variant=variant, batch=batch)
        .drop(columns="steps")
        .join(results)
    )


def paper_values() -> pd.DataFrame:
    """`data, model, strategy`, `VALUES` and `RATIOS`, NaN where unknown: Table 2 for FLAN, for OrcaMath the blog's "about" for its three models."""
    table = paper.table_2().rename(columns={"eval_loss_per_token": "loss"}).assign(data=FLAN)
    table = table.merge(paper.ratios_to_padding()[["model", "strategy", *RATIOS]], how="left", on=["model", "strategy"])
    blog = paper.blog_ratios().assign(strategy="minibatch_packing", memory_ratio=lambda t: 1 + t["memory_change"])
    blog = (
        blog[blog["corpus"] != FLAN]
        .rename(columns={"corpus": "data"})
        .merge(pd.DataFrame({"model": BLOG_MODELS}), how="cross")
    )
    table = pd.concat([table, blog], ignore_index=True)
    return table.assign(strategy=table["strategy"].replace(SAME))[["data", "model", "strategy", *VALUES, *RATIOS]]


def side_by_side(arms: pd.DataFrame, data: Mapping[str, str], stand_ins: Mapping[str, str]) -> pd.DataFrame:
    """One row per run, model, corpus and batching: our `VALUES`, `RATIOS` and `limit`, the paper's with `_paper`, and `floor`.

    arms: from `speed_arms`. data: beginning of a corpus's short name -> the paper's data set. stand_ins: model -> the paper's model that its ratios
    are set beside. Rows of the paper that were not measured have no `run`. floor: the part of padding's peak memory that batching cannot change,
    weights, gradients and optimiser states; NaN on a CPU, where the process's own memory counts too.
    """
    columns = ["run", "model", "corpus", "strategy", *VALUES, *RATIOS, "limit"]
    ours = (tables.against(arms, by=("run", "model", "corpus")) if len(arms) else pd.DataFrame()).reindex(
        columns=columns
    )
    ours["corpus"] = ours["corpus"].map(tables.short)
    ours["data"] = [
        next((there for here, there in data.items() if name.startswith(here)), "") for name in ours["corpus"]
    ]
    known, keys = paper_values(), ["data", "model", "strategy"]
    table = ours.merge(known[keys + VALUES], how="outer", on=keys, suffixes=("", "_paper"))
    table = table.astype({"run": object, "corpus": object})  # all empty where nothing was measured
    table["like"] = table["model"].replace(dict(stand_ins))
    ratios = known.rename(columns={"model": "like"})[["data", "like", "strategy", *RATIOS]]
    table = table.merge(ratios, how="left", on=["data", "like", "strategy"], suffixes=("", "_paper"))
    states = {key: _state_bytes(group.iloc[0]) for key, group in arms.groupby(["run", "model"])}
    peaks = table[table["strategy"] == "padding"].set_index(["run", "model", "corpus"])["peak_memory_bytes"]
    table["floor"] = [
        states.get((r.run, r.model), np.nan) / peaks.get((r.run, r.model, r.corpus), np.nan) for r in table.itertuples()
    ]
    order = list(dict.fromkeys([*arms["run"], *known["model"], *arms["model"], *known["data"], *BATCHING]))
    return table.sort_values(
        ["run", "model", "data", "strategy"],
        key=lambda c: c.map(dict(zip(order, range(len(order))))),
        ignore_index=True,
    )


def _state_bytes(record: pd.Series) -> float:
    """Bytes of weights, gradients and AdamW's moments of a run on a GPU; NaN where they are not known or not alone in the peak."""
    if not record["environment.device_count"] or not models.architecture(record["model"]):
        return np.nan
    config = models.model_config(record["model"], layers=None if pd.isna(record["layers"]) else int(record["layers"]))
    return STATE_BYTES[record["dtype"]] * models.parameter_count(config).total


def pairs(table: pd.DataFrame, titles: Sequence[str]) -> pd.DataFrame:
    """`side_by_side` as it is read: run, model, data and batching to the left, `paper` and `here` under every title; no rows without a value."""
    cells = {}
    for title, (column, divisor, form) in ((title, UNITS[title]) for title in titles):
        sides = {"paper": f"{column}_paper", "here": column} | ({"limit": "limit"} if column == "speed_up" else {})
        cells |= {
            (title, side): [form.format(v / divisor) if pd.notna(v) else "" for v in table[name]]
            for side, name in sides.items()
        }
    data = [
        there if pd.isna(here) else f"{here} for {there}" if there else here
        for here, there in zip(table["corpus"], table["data"])
    ]
    index = [table["run"].fillna("not measured"), table["model"], data, table["strategy"].map(BATCHING)]
    shown = pd.DataFrame(cells, index=pd.MultiIndex.from_arrays(index, names=["run", "model", "data", "batching"]))
    return shown[(shown != "").any(axis=1)]


def bars(
    table: pd.DataFrame, value: str, by: Sequence[str], title: str, xlabel: str, line: str, meaning: str
) -> Figure:
    """`figures.beside_paper` of one of `RATIOS`, the range of both in the title, labelled by these columns, the column `line` dashed on our bars."""
    named = table.assign(corpus=table["corpus"].fillna(table["data"]), batching=table["strategy"].map(BATCHING)).fillna(
        {"run": "not measured"}
    )
    named["label"] = named[list(by)].agg(", ".join, axis=1)
    theirs = named.assign(source="paper", **{value: named[f"{value}_paper"]})
    spans = [
        f"{rows.min():.2f} to {rows.max():.2f}" if rows.notna().any() else "nothing"
        for rows in (named[value], theirs[value])
    ]
    both, title = (
        pd.concat([theirs, named.assign(source="ours")]),
        f"{title}:\n{spans[0]} here, {spans[1]} in the paper",
    )
    figure = figures.beside_paper(both, value, title, xlabel)
    ax = figure.axes[0]
    for y, (at, end) in enumerate(zip(named[line], named[value])):
        ax.plot([at, at], [y, y + 0.4], **figures.LIMIT)
        if end < at < end + 0.12 * ax.get_xlim()[1]:  # the number would lie under the line
            ax.texts[len(named) + y].set_x(at)
    ax.plot([], [], label=meaning, **figures.LIMIT)
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set(ylim=(len(named) - 0.4, -0.6))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def settings(arms: pd.DataFrame) -> pd.DataFrame:
    """What differs besides the batching: a row each, a column for the paper and one a run; empty where it is not known."""
    known, rows = paper.SETTING, paper.table_2().set_index(["model", "strategy"])["rows"]["mistral-7b"]
    names = [
        "machine",
        "weights",
        "forward and backward",
        "gradients, AdamW's moments",
        "attention",
        "batch × accumulation",
        "longest row (tokens)",
    ]
    names += ["tokens per example", "slots per real token, padded"]
    per_example = f"{FLAN}: {rows['fixed_length_packing'] * known['max_tokens'] / rows['padding']:.0f}"
    batch, longest = "{batch_size} × {gradient_accumulation}".format(**known), f"{known['max_tokens']:,}"
    columns = {
        "paper": [
            known["devices"],
            "pretrained",
            known["dtype"],
            "",
            "Flash Attention 2",
            batch,
            longest,
            per_example,
            "",
        ]
    }
    for run, group in arms.groupby("run", sort=False):
        one, padded = group.iloc[0], group[group["strategy"] == "padding"].drop_duplicates("corpus")
        counts = [padded["plan.real_tokens"] / padded["plan.examples"], padded["plan.waste"]]
        columns[run] = [
            f"{one['world_size']:.0f} x {one['environment.device']}, not sharded", "random" if models.architecture(one["model"]) else "pretrained",
            one["dtype"], "bfloat16" if one["dtype"] == "bfloat16" else "float32", one["metrics.kernel"],
            "{batch_size:.0f} × {gradient_accumulation:.0f}".format(**one), f"{one['max_tokens']:,.0f}",
            *(", ".join(f"{tables.short(c)}: {v:{form}}" for c, v in zip(padded["corpus"], values)) for values, form in zip(counts, (".0f", ".2f"))),
        ]  # fmt: skip
    return pd.DataFrame(columns, index=names)


def table_4(found: pd.DataFrame) -> pd.DataFrame:
    """`convergence.table_4` of every run, model and corpus of `convergence_arms`, named in `setting`; the paper's alone where there are none."""
    groups = list(found.groupby(["run", "model", "corpus"], sort=False)) or [(None, found)]
    names = ["{}: {} on {}".format(*map(tables.short, key)) if key else "not measured" for key, _ in groups]
    return pd.concat([convergence.table_4(group).assign(setting=name) for name, (_, group) in zip(names, groups)])


def findings(table: pd.DataFrame, four: pd.DataFrame, run: str) -> list[str]:
    """Sentences of notebook 09, every number computed."""
    said = (
        []
        if (table["run"] == run).any()
        else [f"Run {run} has no speed that could be compared: notebook 06 measures it."]
    )
    both = table[(table["strategy"] != "padding") & table["speed_up"].notna() & table["speed_up_paper"].notna()]
    for row in both[both["strategy"] == "minibatch_packing"].itertuples():
        text = f"{row.run}, {row.model} on {row.corpus}: MiniBatchPacking + PosID is {row.speed_up:.2f} times as fast as padding, with a limit of "
        text += f"{row.limit:.2f}, and takes {row.memory_ratio:.2f} of its peak memory; the paper's {row.like} on {row.data}: "
        freed = (
            f" Of the memory that batching can change it saves {(1 - row.memory_ratio) / (1 - row.floor):.0%}."
            if row.floor < 1
            else ""
        )
        said.append(f"{text}{row.speed_up_paper:.2f} and {row.memory_ratio_paper:.2f}.{freed}")
    if len(both):
        gap = both["speed_up"] / both["speed_up_paper"]
        far = both.assign(batching=both["strategy"].map(BATCHING)).loc[np.log(gap).abs().idxmax()]
        where = "{batching}, {run}, {model} on {corpus}: {speed_up:.2f}, the paper's {speed_up_paper:.2f}".format(**far)
        said.append(
            f"{len(both)} speed-ups are known on both sides, ours {gap.min():.2f} to {gap.max():.2f} times the paper's; farthest is {where}."
        )
    for name, rows in four.groupby("setting", sort=False):
        loss = rows.set_index(["source", "label"])["loss"]
        for variant in (convergence.EPOCHS, convergence.STEPS):
            without, with_ids = (
                f"{STRATEGIES[strategy].label}, {variant}" for strategy in (convergence.FIXED, convergence.POSID)
            )
            if {("ours", without), ("ours", with_ids)} <= set(loss.index):
                cost = {who: loss[who, without] - loss[who, with_ids] for who in ("ours", "paper")}
                said.append(
                    f"{name}, {variant}: leaving out position ids costs {cost['ours']:+.3f} nats, in the paper {cost['paper']:+.3f}."
                )
    missing = int((table["run"].isna() & table[[f"{value}_paper" for value in VALUES]].notna().any(axis=1)).sum())
    return [
        *said,
        f"{missing} of {len(paper.table_2())} rows of the paper's Table 2 were measured in none of these runs.",
    ]
