"""The paper's tables and figures beside what run folders hold: what notebook 09 shows. Nothing is measured here.

Like beside like: of every run folder, model and corpus the one setting that most arms share, on one kernel, and the
paper's value of the same model. Where a model stands for one of the paper's (tiny-llama on a CPU), only ratios to
padding are compared. What either side does not say stays empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from packlib.lab import doubts, figures, models, paper, records, tables
from packlib.lab.figures import Picture
from packlib.lab.parameters import unknown_name
from packlib.lab.runs.spec import PADDED_SDPA, RunSpec
from packlib.lab.strategies import STRATEGIES
from packlib.lab.studies import convergence

# Both make rows of batch_size x max_tokens; the paper's may cut examples.
SAME = {"offline_packing_posid": "multipack_posid"}
# Our strategy -> the paper's name of it.
BATCHING = {SAME.get(strategy, strategy): name for name, strategy in paper.STRATEGY.items()}
FLAN = "FLAN"  # the data of Table 2
BLOG_MODELS = ("mistral-7b", "llama-2-7b", "granite-8b-code")
VALUES = ["rows", "tokens_per_s", "peak_memory_bytes", "loss"]
RATIOS = ["speed_up", "memory_ratio"]
FIELDS = [field.name for field in fields(RunSpec) if field.name != "rig"]
ARM = ("arm", "variant", "batch")  # of notebook 07's records
STEP = {"batch_size", "gradient_accumulation", "steps", "eval_every", "generate_examples", "examples_per_step"}
STEP |= {"split_rows"}
STATE_BYTES = {"float32": 16, "bf16_mixed": 16, "bfloat16": 8}  # a parameter's weight, gradient and AdamW's two moments
UNITS = {  # title of a pair of columns: column, divisor, format
    "rows": ("rows", 1, "{:,.0f}"),
    "real tokens/s": ("tokens_per_s", 1, "{:,.0f}"),
    "peak memory (GB)": ("peak_memory_bytes", 1e9, "{:.1f}"),
    "validation loss": ("loss", 1, "{:.3f}"),
    "speed, × padding": ("speed_up", 1, "{:.2f}"),
    "peak memory, × padding": ("memory_ratio", 1, "{:.2f}"),
}


# Arms


def measured(run: Path, published: Sequence[str] = ()) -> pd.DataFrame:
    """`records.load_records` of the training runs in `run` and in published run folders.

    published: names under papermill_runs/, or patterns. A record that two folders hold counts for the first. Further
    columns: `run`, the folder's name; `architecture`, the model, which `model` writes with its rig where a folder has
    several; `arm, variant, batch` of notebook 07's records. `ValueError`: a name without records.
    """
    root = records.runs_folder()
    known = [path.parent.name for path in sorted(root.glob("*/records")) if any(path.glob("*.json"))]
    for name in published:
        if name not in known and not set(name) & set("*?["):
            raise unknown_name("published run", name, known)
    wanted = [name for name in known if any(fnmatch(name, pattern) for pattern in published)]
    frames = [_loaded(folder) for folder in (run, *(root / name for name in wanted))]
    frame = pd.concat([f for f in frames if len(f)] or [pd.DataFrame(columns=["run_id"])], ignore_index=True)
    one = ["run_id", "environment.created"]  # another folder may have measured the same spec on another device
    further = [*one, "run", "architecture", "status", "environment.concurrent_runs", *ARM]
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, *further, *FIELDS])))
    return frame[frame["strategy"].isin(list(STRATEGIES))].drop_duplicates(one).reset_index(drop=True).copy()


def _loaded(folder: Path) -> pd.DataFrame:
    frame = records.load_records(folder)
    if "model" not in frame:
        return pd.DataFrame()
    arms = convergence.recognised(records.read_records(folder))
    frame["architecture"], frame["run"] = frame["model"], folder.name
    frame["model"] = tables.named_models(frame["model"], tables.rigs(frame))
    for name, value in (("arm", "label"), ("variant", "variant"), ("batch", "batch")):
        frame[name] = [getattr(arms.get(run_id), value, None) for run_id in frame["run_id"]]
    return frame


def _one_setting(frame: pd.DataFrame, free: Iterable[str] = ()) -> pd.DataFrame:
    """`tables.one_setting` of every run, where arms may also differ in the fields `free`."""
    kept: list[Any] = []
    for _, runs in frame.groupby("run", sort=False):
        kept += list(tables.one_setting(runs.drop(columns=list(free))).index)
    return frame.loc[kept]


def speed_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of notebook 06 that Table 2 can be held against.

    The paper's strategies on packlib's attention, with the device to themselves, where padding was measured on the same
    rig: a rung of notebook 08 is no comparison. Of a model that a folder has on several numbers of GPUs, the most: the
    paper has eight.
    """
    ours = frame["strategy"].isin(list(BATCHING)) & (frame["kernel"] == "auto") & (frame["status"] == "ok")
    arms = _one_setting(tables.alone(frame[ours & frame["eval_every"].isna()]))
    if not len(arms):
        return arms
    gpus = arms["world_size"].fillna(1)
    arms = arms[gpus == gpus.groupby([arms["run"], arms["architecture"]]).transform("max")]
    strategies = arms.groupby([arms["run"], arms["architecture"], arms["corpus"], tables.rigs(arms)])["strategy"]
    arms = arms[strategies.transform(lambda names: names.eq("padding").any() and names.nunique() > 1).astype(bool)]
    for _, runs in arms.groupby("run"):
        arms.loc[runs.index, "model"] = tables.named_models(runs["architecture"], tables.rigs(runs))
    return arms


def convergence_arms(frame: pd.DataFrame) -> pd.DataFrame:
    """Records of notebook 07 that Table 4 can be held against, where an arm besides padding was measured.

    With the columns of `convergence.results`, `run` and `model`.
    """
    of_table_4 = convergence.paper_arms()
    found = _one_setting(frame[frame["arm"].isin(of_table_4) & (frame["status"] == "ok")], STEP | set(ARM))
    arms = found.groupby(["run", "model", "corpus"])["arm"].transform("nunique")
    found = found[arms > 1]
    results = {"metrics.optimizer_steps": "steps", "metrics.eval_loss_per_token": "per_token"}
    found = found.drop(columns=["steps"]).rename(columns=results)
    found = found.reindex(columns=list(dict.fromkeys([*found, *results.values()])))
    return found.assign(corpus=found["corpus"].map(tables.short))


# Tables


def paper_values() -> pd.DataFrame:
    """What the paper and its blog post report: `data, model, strategy`, VALUES and RATIOS, NaN where unknown.

    Table 2 for FLAN; for OrcaMath the blog's "about" for its three models.
    """
    flan = paper.table_2().rename(columns={"eval_loss_per_token": "loss"}).assign(data=FLAN)
    ratios = paper.ratios_to_padding()[["model", "strategy", *RATIOS]]
    flan = flan.merge(ratios, how="left", on=["model", "strategy"])
    blog = paper.blog_ratios().rename(columns={"corpus": "data"})
    blog = blog.assign(strategy="minibatch_packing", memory_ratio=1 + blog["memory_change"])
    blog = blog[blog["data"] != FLAN].merge(pd.DataFrame({"model": BLOG_MODELS}), how="cross")
    known = pd.concat([flan, blog], ignore_index=True)
    return known.assign(strategy=known["strategy"].replace(SAME))[["data", "model", "strategy", *VALUES, *RATIOS]]


def side_by_side(arms: pd.DataFrame, data: Mapping[str, str], stand_ins: Mapping[str, str]) -> pd.DataFrame:
    """One row per run, model, corpus and batching: our VALUES, RATIOS and `limit`, the paper's with `_paper`, `floor`.

    arms: from `speed_arms`. data: beginning of a corpus's short name -> the paper's data set. stand_ins: model -> the
    paper's model that its ratios are set beside (`like`). Rows of the paper that were not measured have no `run`.
    floor: the part of padding's peak memory that batching cannot change, weights, gradients and optimiser states; NaN
    on a CPU, where the process's own memory counts too, and with adapters, where most weights have no states.
    """
    # 1. Ours, and the paper's values of the same model.
    columns = ["run", "model", "corpus", "strategy", *VALUES, *RATIOS, "limit"]
    ours = tables.against(arms, by=("run", "model", "corpus")).reindex(columns=columns)
    ours["corpus"] = ours["corpus"].map(tables.short)
    ours["data"] = [_stands_for(corpus, data) for corpus in ours["corpus"]]
    known, keys = paper_values(), ["data", "model", "strategy"]
    table = ours.merge(known[keys + VALUES], how="outer", on=keys, suffixes=("", "_paper"))
    table = table.astype({"run": object, "corpus": object})  # all empty where nothing was measured
    # 2. The paper's ratios of the model that it stands for.
    table["like"] = table["model"].replace(dict(stand_ins))
    ratios = known.rename(columns={"model": "like"})[["data", "like", "strategy", *RATIOS]]
    table = table.merge(ratios, how="left", on=["data", "like", "strategy"], suffixes=("", "_paper"))
    # 3. What padding's peak consists of besides what batching can change.
    states = {key: _state_bytes(group.iloc[0]) for key, group in arms.groupby(["run", "model"])}
    padding = table[table["strategy"] == "padding"].set_index(["run", "model", "corpus"])["peak_memory_bytes"]
    table["floor"] = [
        states.get((row.run, row.model), np.nan) / padding.get((row.run, row.model, row.corpus), np.nan)
        for row in table.itertuples()
    ]
    # 4. Runs as they come, models and data as in the paper, then ours, batching as in the paper.
    names = dict.fromkeys([*arms["run"], *known["model"], *arms["model"], *known["data"], *BATCHING])
    place = {name: i for i, name in enumerate(names)}
    by = ["run", "model", "data", "strategy"]
    return table.sort_values(by, key=lambda column: column.map(place), ignore_index=True)


def _stands_for(corpus: str, data: Mapping[str, str]) -> str:
    return next((theirs for beginning, theirs in data.items() if corpus.startswith(beginning)), "")


def _state_bytes(record: pd.Series) -> float:
    """Bytes of a GPU's weights, gradients and AdamW's moments in a run that trains all of its weights; else NaN."""
    name, rank = record["architecture"], record.get("rig.lora_rank")
    adapters = pd.notna(rank) and rank > 0
    if not record["environment.device_count"] or not models.architecture(name) or adapters:
        return np.nan
    config = models.model_config(name, layers=None if pd.isna(record["layers"]) else int(record["layers"]))
    shards = record["world_size"] if _sharded(record) else 1
    return STATE_BYTES[record["dtype"]] * models.parameter_count(config).total / shards


def pairs(table: pd.DataFrame, titles: Sequence[str]) -> pd.DataFrame:
    """`side_by_side` as it is read: run, model, data and batching to the left, `paper` and `here` under every title.

    titles: of UNITS. Rows without a value are left out.
    """
    cells = {}
    for title in titles:
        column, divisor, form = UNITS[title]
        sides = {"paper": f"{column}_paper", "here": column} | ({"limit": "limit"} if column == "speed_up" else {})
        for side, name in sides.items():
            cells[title, side] = tables.formatted(table[name] / divisor, form)
    data = [_data_label(*pair) for pair in zip(table["corpus"], table["data"])]
    index = [table["run"].fillna("not measured"), table["model"], data, table["strategy"].map(BATCHING)]
    shown = pd.DataFrame(cells, index=pd.MultiIndex.from_arrays(index, names=["run", "model", "data", "batching"]))
    return shown[(shown != "").any(axis=1)]


def _data_label(ours: Any, theirs: str) -> str:
    if pd.isna(ours):
        return theirs
    return f"{ours} for {theirs}" if theirs else ours


def settings(arms: pd.DataFrame) -> pd.DataFrame:
    """What differs besides the batching: a row each, a column for the paper and one a run; empty where not known.

    Where the models of a run differ in it, every value with its models.
    """
    columns = {"paper": _paper_setting()}
    for run, group in arms.groupby("run", sort=False):
        columns[str(run)] = _our_setting(group)
    return pd.DataFrame(columns)


def flan_mean() -> float:
    """Tokens of the paper's mean example, with Mistral's tokenizer: fixed rows hold every token of an epoch."""
    rows = paper.table_2().set_index(["model", "strategy"])["rows"]["mistral-7b"]
    return float(rows["fixed_length_packing"] * paper.SETTING["max_tokens"] / rows["padding"])


def _paper_setting() -> dict[str, str]:
    known, mean = paper.SETTING, flan_mean()
    return {
        "machine": str(known["devices"]),
        "weights": "pretrained",
        "forward and backward": str(known["dtype"]),
        "gradients, AdamW's moments": "",
        "attention": "Flash Attention 2",
        "batch × accumulation": f"{known['batch_size']} × {known['gradient_accumulation']}",
        "longest row (tokens)": f"{known['max_tokens']:,}",
        "tokens per example": f"{FLAN}: {mean:.0f}",
        "slots per real token, padded": "",
    }


def _our_setting(arms: pd.DataFrame) -> dict[str, str]:
    padded = arms[arms["strategy"] == "padding"].drop_duplicates("corpus")
    corpora, mean = padded["corpus"].map(tables.short), padded["plan.real_tokens"] / padded["plan.examples"]
    of_arms = pd.DataFrame([_of_arm(arm) for _, arm in arms.iterrows()])
    names = [tables.short(name) for name in arms["model"]]
    return {
        **{name: _with_models(of_arms[name], names) for name in of_arms},
        "tokens per example": ", ".join(f"{corpus}: {n:.0f}" for corpus, n in zip(corpora, mean)),
        "slots per real token, padded": ", ".join(f"{c}: {n:.2f}" for c, n in zip(corpora, padded["plan.waste"])),
    }


def _of_arm(arm: pd.Series) -> dict[str, str]:
    """What of a run's setting an arm says."""
    sharding = "FSDP2" if _sharded(arm) else "not sharded"
    return {
        "machine": f"{arm['world_size']:.0f} x {arm['environment.device']}, {sharding}",
        "weights": "random" if models.architecture(arm["architecture"]) else "pretrained",
        "forward and backward": arm["dtype"],
        "gradients, AdamW's moments": "bfloat16" if arm["dtype"] == "bfloat16" else "float32",
        "attention": arm["metrics.kernel"],
        "batch × accumulation": f"{arm['batch_size']:.0f} × {arm['gradient_accumulation']:.0f}",
        "longest row (tokens)": f"{arm['max_tokens']:,.0f}",
    }


def _with_models(values: Iterable[str], models: Iterable[str]) -> str:
    """The values that arms have, each with its models where there are several."""
    found: dict[str, list[str]] = {}
    for value, model in zip(values, models):
        found.setdefault(value, []).append(model)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(dict.fromkeys(of))})" for value, of in found.items())


def _sharded(run: pd.Series) -> bool:
    shard = run.get("rig.shard")
    return bool(pd.notna(shard) and shard)


def table_4(found: pd.DataFrame) -> pd.DataFrame:
    """`convergence.table_4` of every run, model and corpus of `convergence_arms`, named in `setting`.

    The paper's alone where there are none; `who` is whose value a row has.
    """
    parts = [convergence.table_4(arms).assign(setting=name) for name, arms in _by_setting(found)]
    table = pd.concat(parts or [convergence.table_4(found).assign(setting="not measured")])
    return table.assign(who=table["setting"].where(table["source"] == "ours", "paper"))


def _by_setting(found: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Name and rows of every run, model and corpus of `convergence_arms`."""
    for (run, model, corpus), arms in found.groupby(["run", "model", "corpus"], sort=False):
        yield f"{tables.short(run)}: {tables.short(model)} on {corpus}", arms


def table_4_settings(four: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each setting that was measured."""
    return dict(list(four[four["setting"] != "not measured"].groupby("setting", sort=False)))


# Figures


def packed_arms(table: pd.DataFrame) -> pd.DataFrame:
    """Of `side_by_side` the arms that figures show: all but padding, measured, or the paper's where none was."""
    packed = table[table["strategy"] != "padding"]
    return packed.dropna(subset="run") if packed["run"].notna().any() else packed.assign(run="paper")


def speed_figures(table: pd.DataFrame) -> dict[str, Picture]:
    """By run the speed-ups of the strategies of Table 2 with the run's first model, ours and the paper's."""
    found = {}
    for run, group in packed_arms(table).groupby("run", sort=False):
        model = group["model"].iloc[0]
        rows, title = group[group["model"] == model], f"{run}, {model}, speed relative to padding"
        figure = ratio_bars(rows, "speed_up", ["batching"], title)
        figure.alt = f"Speed-up over padding of Table 2's strategies with {model}: the paper's and ours, {run}"
        found[str(run)] = figure
    return found


def blog_throughput(table: pd.DataFrame) -> Picture:
    """The blog post's figure of throughput: MiniBatchPacking over padding, every run and model on the paper's data."""
    rows, title = _minibatch(table), "MiniBatchPacking + PosID, speed relative to padding"
    figure = ratio_bars(rows, "speed_up", ["run", "model"], title)
    figure.alt = "Speed-up of MiniBatchPacking over padding, the paper's and ours, with the limit on every bar"
    return figure


def blog_memory(table: pd.DataFrame) -> Picture:
    """The blog post's figure of memory: MiniBatchPacking over padding, every run and model on the paper's data."""
    rows, title = _minibatch(table), "MiniBatchPacking + PosID, peak memory relative to padding"
    figure = ratio_bars(rows, "memory_ratio", ["run", "model"], title)
    figure.alt = "Peak memory of MiniBatchPacking over padding's, the paper's and ours, fixed part dashed"
    return figure


def _minibatch(table: pd.DataFrame) -> pd.DataFrame:
    """Its rows on what stands for the paper's data; on all data where nothing does."""
    shown = packed_arms(table)
    shown = shown[shown["strategy"] == "minibatch_packing"]
    return shown[shown["data"] != ""] if (shown["data"] != "").any() else shown


LINES = {  # of a ratio: axis, column that is dashed on our bars, what that is
    "speed_up": ("real tokens/s, relative to padding", "limit", "limit of dropping the pads"),
    "memory_ratio": ("peak memory, relative to padding", "floor", "weights, gradients and optimiser states"),
}


def ratio_bars(table: pd.DataFrame, value: str, by: Sequence[str], title: str) -> Picture:
    """`figures.beside_paper` of one of RATIOS, labelled by the columns `by`; the title has ranges of what both know.

    A panel each of the paper's data sets, with all that stands for it, and of any other corpus.
    """
    xlabel, line, meaning = LINES[value]
    named = table.assign(run=table["run"].fillna("not measured"), batching=table["strategy"].map(BATCHING))
    corpus = named["corpus"].fillna(named["data"])
    named["panel"] = named["data"].where(named["data"] != "", corpus)
    named["label"] = named[list(by)].agg(", ".join, axis=1)
    named["label"] += (", " + corpus).where(named.duplicated(["panel", "label"], keep=False), "")
    named["panel"] = named["panel"].map({panel: _panel_title(rows) for panel, rows in named.groupby("panel")})
    theirs = named.assign(source="paper", **{value: named[f"{value}_paper"]})
    both = pd.concat([theirs, named.assign(source="ours")])
    pairs = named[value].notna() & named[f"{value}_paper"].notna()
    told, known = (side[pairs] if pairs.any() else side for side in (named[value], theirs[value]))
    title = f"{title}:\n{_span(told)} here, {_span(known)} in the paper"
    figure = figures.beside_paper(both, value, title, xlabel, panels="panel", decimals=2, limit=line, meaning=meaning)
    for ax in figure.axes:
        ax.axvline(1, color="0.4", linewidth=1)
    return figure


def _panel_title(rows: pd.DataFrame) -> str:
    ours = rows["corpus"].dropna().unique()
    return _data_label(", ".join(ours) if len(ours) else np.nan, rows["data"].iloc[0])


def _span(values: pd.Series) -> str:
    return f"{values.min():.2f} to {values.max():.2f}" if values.notna().any() else "nothing"


def table_4_figure(rows: pd.DataFrame, setting: str) -> Picture:
    """The loss of each arm of Table 4 minus padding's in one setting, ours and the paper's."""
    title = f"{setting}:\neach arm minus padding, paper and here"
    figure = figures.beside_paper(rows, "difference", title, "validation loss above padding's (nats)")
    figure.alt = f"Validation loss above padding of the arms of Table 4: the paper, and {setting}"
    return figure


# Findings


def findings(table: pd.DataFrame, frame: pd.DataFrame, run: str) -> list[str]:
    """Sentences of notebook 09, every number computed; what is said against a run comes first, and nothing ranks it.

    table: `side_by_side` of arms of `frame` (`measured`).
    """
    against = doubts.by_run(frame[frame["run"].isin(table["run"])])
    said = [doubt for found in against.values() for doubt in found]
    if not (table["run"] == run).any():
        said.append(f"Run {run} has no speed that could be compared: notebook 06 measures it.")
    both = table[(table["strategy"] != "padding") & table["speed_up"].notna() & table["speed_up_paper"].notna()]
    sdpa = _over_sdpa(frame)
    said += [_about_minibatch(row, sdpa) for row in both[both["strategy"] == "minibatch_packing"].to_dict("records")]
    if len(both):
        gap = both["speed_up"] / both["speed_up_paper"]
        ours = f"ours {gap.min():.2f} to {gap.max():.2f} times the paper's"
        farthest = _farthest(both[~both["run"].isin(against)], "runs in doubt left out, " if against else "")
        said.append(f"{len(both)} speed-ups are known on both sides, {ours}{farthest}.")
    for name, arms in _by_setting(convergence_arms(frame)):
        said += [f"{name}, {sentence}" for sentence in _about_boundaries(arms)]
    known = table[[f"{value}_paper" for value in VALUES]].notna().any(axis=1)
    missing, total = int((table["run"].isna() & known).sum()), len(paper.table_2())
    return [*said, f"{missing} of {total} rows of the paper's Table 2 were measured in none of these runs."]


def _over_sdpa(frame: pd.DataFrame) -> dict[tuple[str, str, str], str]:
    """Speed of flattened mini-batches over padding through SDPA, in words; by run, model and corpus that have both.

    SDPA held to its flash kernel where that was measured, else as PyTorch chooses.
    """
    arms, rate = speed_arms(frame), "metrics.tokens_per_s.mean"
    if not len(arms):
        return {}
    timed = tables.alone(frame[frame["kernel"].isin(PADDED_SDPA) & (frame["status"] == "ok")])
    same = ["run", "architecture", "corpus", "batch_size", "gradient_accumulation", "max_tokens", "setting"]
    flat, padded = (
        runs[runs["strategy"] == name].assign(setting=tables.rigs(runs)).groupby([*same, *own], sort=False)
        for runs, name, own in ((arms, "minibatch_packing", []), (timed, "padding", ["kernel"]))
    )
    by_kernel = padded[rate].median().unstack().reindex(columns=PADDED_SDPA)
    ratio = (flat[rate].median() / by_kernel.bfill(axis=1).iloc[:, 0]).dropna()
    held = by_kernel["flash_sdpa"].notna()
    named = flat["model"].first()
    how = {True: "held to its flash kernel", False: "as PyTorch chooses"}
    return {
        (key[0], named[key], tables.short(key[2])): f"{found:.2f} times padding through SDPA {how[bool(held[key])]}"
        for key, found in ratio.items()
    }


def _about_minibatch(row: Mapping[str, Any], sdpa: Mapping[tuple[str, str, str], str]) -> str:
    freed, over = "", sdpa.get((row["run"], row["model"], row["corpus"]))
    other = "" if over is None else f" ({over})"
    if row["floor"] < 1:
        share = (1 - row["memory_ratio"]) / (1 - row["floor"])
        freed = f" Of the memory that batching can change it saves {share:.0%}."
    theirs = f"{row['speed_up_paper']:.2f} and {row['memory_ratio_paper']:.2f}"
    return (
        f"{row['run']}, {row['model']} on {row['corpus']}: MiniBatchPacking + PosID is {row['speed_up']:.2f} times as "
        f"fast as padding{other}, with a limit of {row['limit']:.2f}, and takes {row['memory_ratio']:.2f} of its peak "
        f"memory; the paper's {row['like']} on {row['data']}: {theirs}.{freed}"
    )


def _farthest(both: pd.DataFrame, left_out: str) -> str:
    """The speed-up that is farthest from the paper's; nothing of none. left_out: what is said of those not asked."""
    if not len(both):
        return ""
    far = both.loc[np.log(both["speed_up"] / both["speed_up_paper"]).abs().idxmax()]
    where = f"{BATCHING[far['strategy']]}, {far['run']}, {far['model']} on {far['corpus']}"
    return f"; {left_out}farthest is {where}: {far['speed_up']:.2f}, the paper's {far['speed_up_paper']:.2f}"


def _about_boundaries(arms: pd.DataFrame) -> list[str]:
    """What position ids are worth in one setting of Table 4, where both arms were measured."""
    known, said = convergence.table_4(arms), []
    paper_loss = known[known["source"] == "paper"].set_index("label")["loss"]
    for variant in (convergence.EPOCHS, convergence.STEPS):
        without = convergence.arm_label(convergence.FIXED, variant)
        with_ids = convergence.arm_label(convergence.POSID, variant)
        theirs = paper_loss[without] - paper_loss[with_ids]
        for gap in convergence.differences(arms[arms["arm"].isin([without, with_ids])], with_ids).to_dict("records"):
            found = convergence.verdict(gap)
            ours = f"{convergence.tell(gap)}{', ' if found else ''}{found}"
            said.append(
                f"{variant}: leaving out position ids changes the loss by {ours}; in the paper by {theirs:+.3f}."
            )
    return said
