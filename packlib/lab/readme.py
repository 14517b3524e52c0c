"""`python -m packlib tables`: every measured number of README.md, written from the records of published runs; `--check` only compares.

A block begins with `<!-- table: NAME RUN -->` and ends with `<!-- end -->`; between them stands `BLOCKS[NAME]` of papermill_runs/RUN/records, nothing
where they hold nothing for it. The figure's alt text has all of its numbers and is stored in the PNG, so that `--check` notices an old picture.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image

from packlib.lab import comparison, convergence, figures, paper, records, tables
from packlib.lab.parameters import unknown_name

BLOCK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)
MODEL, NAME = "mistral-7b", "Mistral-7B"  # of the headline
STANDS_FOR = {"multitask": comparison.FLAN, "math": "OrcaMath"}  # our corpora and the paper's
SETTING = {name: paper.SETTING[name] for name in ("batch_size", "max_tokens", "gradient_accumulation")}
HEADLINE = ["padding", "group_by_length", "minibatch_packing", "multipack_posid", "trl_padding_free", "trl_packing_bfd"]
SAME_BATCHES = ["padding", "minibatch_packing", "trl_padding", "trl_padding_free"]  # the same examples at every step


def _speed(frame: pd.DataFrame) -> pd.DataFrame:
    """The timed runs of whole models at the paper's setting that had the device to themselves."""
    alone = frame["environment.concurrent_runs"] == 1
    return frame[
        alone
        & frame["eval_every"].isna()
        & frame["layers"].isna()
        & (frame[list(SETTING)] == pd.Series(SETTING)).all(axis=1)
    ]


def _against(frame: pd.DataFrame) -> pd.DataFrame:
    """`tables.against` corpus by corpus, with `data`, the corpus in one word, and `speed_up_paper`, the paper's ratio."""
    table = tables.against(_speed(frame)).assign(data=lambda t: t["corpus"].map(_data))
    known = comparison.paper_values()[["data", "model", "strategy", "speed_up"]].replace(
        {"data": {v: k for k, v in STANDS_FOR.items()}}
    )
    table = table.merge(
        known.assign(kernel="auto"), how="left", on=["data", "model", "strategy", "kernel"], suffixes=("", "_paper")
    )
    return table.sort_values(
        "data", key=lambda d: d.map([*dict.fromkeys([*STANDS_FOR, *d])].index), kind="stable", ignore_index=True
    )


def _data(corpus: str) -> str:
    return tables.short(corpus).split("_")[0]


def _markdown(table: pd.DataFrame) -> str:
    shown = tables.display_table(table).assign(model=table["model"], corpus=table["data"]).drop(columns="rows")
    forms = table["data"].map(
        {"multitask": "{:.2f}", "math": "about {:.1f}"}
    )  # "about" is what the blog post says of OrcaMath
    theirs = ["" if pd.isna(ratio) else form.format(ratio) for ratio, form in zip(table["speed_up_paper"], forms)]
    shown.insert(list(shown).index("× padding") + 1, "the paper's", theirs)
    return tables.markdown(
        shown.loc[:, [name for name in shown if name not in ("model", "corpus") or shown[name].nunique() > 1]]
    )


def _headline(frame: pd.DataFrame) -> pd.DataFrame:
    table = _against(frame[(frame["model"] == MODEL) & (frame["kernel"] == "auto")])
    return table[table["strategy"].isin(HEADLINE)].reset_index(drop=True)


def _devices(frame: pd.DataFrame) -> str:
    return " and ".join(
        f"{n:.0f} × {device}"
        for n, device in sorted({*zip(frame["environment.device_count"], frame["environment.device"])})
    )


def claim(frame: pd.DataFrame, run: str) -> str:
    arms = _headline(frame).set_index(["data", "strategy"]).loc["multitask"]
    packed, full = arms.loc["minibatch_packing"], arms.loc["multipack_posid"]
    saved = f"{100 * (1 - packed['memory_ratio']):.0f} % less peak memory"
    return (
        f"**{NAME} on {_devices(_speed(frame))}, a multi-task corpus, batches of {SETTING['batch_size']}: padding computes "
        f"{packed['limit']:.2f} slots for every real token. Flattening the same batches trains {packed['speed_up']:.2f} × as fast with {saved}; "
        f"packing whole examples into full rows trains {full['speed_up']:.2f} × as fast, in fewer and larger steps.**"
    )


def headline(frame: pd.DataFrame, run: str) -> str:
    used = _speed(frame[(frame["model"] == MODEL) & (frame["status"] == "ok")])
    traces = {record["run_id"]: record["trace"] for record in records.read_records(_folder(run))}
    same = used[used["strategy"].isin(SAME_BATCHES)].groupby("corpus")["run_id"]
    gap = max(np.ptp([traces[identity]["loss"] for identity in ids], axis=0).max() for _, ids in same)
    one = used.iloc[0]
    versions = ", ".join(f"{name} {one[f'environment.{name.lower()}']}" for name in ("torch", "transformers", "TRL"))
    setting = f"{SETTING['batch_size']} examples × {SETTING['gradient_accumulation']} accumulated, {SETTING['max_tokens']:,} tokens at most"
    where = f"{_devices(used)}, {versions}; random weights, {one['dtype']}, gradient checkpointing; {setting}; "
    where += f"{one['metrics.measured_steps']:.0f} steps an arm after {one['warmup_steps']:.0f} of warm-up"
    parity = f"Arms that get the same mini-batches agree in training loss to {gap:.3f} nats at every step."
    return f"{_markdown(_headline(frame).drop(columns='fill').assign(fill=None))}\n\n{where}. {parity}"


def arms(frame: pd.DataFrame, run: str) -> str:
    return _markdown(_against(frame[frame["model"] == MODEL]))


def models(frame: pd.DataFrame, run: str) -> str:
    table = _against(frame[frame["kernel"] == "auto"])
    return _markdown(
        table[(table["strategy"] == "minibatch_packing") & (table["data"] == "multitask")].reset_index(drop=True)
    )


def losses(frame: pd.DataFrame, run: str) -> str:
    rows, found = [], frame[frame["eval_every"].notna() & frame["atom_size"].isna() & (frame["status"] == "ok")]
    for (_, corpus), group in found.groupby(["model", "corpus"], sort=False):
        group = group[group["learning_rate"] == group.loc[group["strategy"] == "padding", "learning_rate"].max()]
        kinds = [group["strategy"].isin(SAME_BATCHES), group["examples_per_step"].notna(), group["steps"].notna()]
        shares = np.select(
            kinds, ["", convergence.EXAMPLES, convergence.STEPS], convergence.EPOCHS
        )  # see `convergence.arms`
        named = [convergence.Arm(strategy, variant, None).label for strategy, variant in zip(group["strategy"], shares)]
        group = group.assign(arm=named, per_token=group["metrics.eval_loss_per_token"])
        told = {gap["label"]: convergence.tell(gap) for gap in convergence.differences(group).to_dict("records")}
        for name, runs in group.groupby("arm", sort=False):
            numbers = {
                "steps": f"{runs['metrics.optimizer_steps'].mean():,.0f}",
                "validation loss": f"{runs['per_token'].mean():.4f}",
            }
            rows.append({"corpus": _data(corpus), "batching": name} | numbers | {"minus padding's": told.get(name, "")})
    models = " and ".join(found["model"].map(tables.short).unique())
    said = f"Validation loss of {models} (notebook 07), on held-out examples that see only themselves, each arm against padding seed by seed:"
    return f"{said}\n\n{tables.markdown(pd.DataFrame(rows))}" if rows else ""


def figure(frame: pd.DataFrame, run: str) -> str:
    table = _headline(frame).dropna(subset="speed_up")
    bars = (
        f"{row.data}, {figures.label(row.strategy)} {row.speed_up:.2f} (limit {row.limit:.2f})"
        for row in table.itertuples()
    )
    return f"![Real tokens/s relative to padding, {NAME} on {_devices(_speed(frame))}. {'; '.join(bars)}.](papermill_runs/{run}/figures/readme.png)"


BLOCKS = {function.__name__: function for function in (claim, headline, figure, arms, models, losses)}


def _folder(run: str) -> Path:
    return records.project_root() / "papermill_runs" / run


def _draw(frame: pd.DataFrame, path: Path, text: str) -> None:
    figures.theme()
    table = _headline(frame).dropna(subset="speed_up").assign(corpus=lambda t: t["data"])
    first = table.drop_duplicates("strategy").set_index("strategy")["speed_up"]
    said = f"{first['minibatch_packing']:.2f} × as fast flattened, {first['multipack_posid']:.2f} × in full rows"
    picture = figures.speed_up_bars(table, f"{NAME} on {_devices(_speed(frame))}, {table['data'].iloc[0]}: {said}")
    path.parent.mkdir(exist_ok=True)
    picture.savefig(path, dpi=figures.DPI, metadata={"Description": text})
    plt.close(picture)


def render(text: str, *, draw: bool = False) -> tuple[str, list[str]]:
    """README's text as the records have it, and the names of its blocks that differed. draw: draw the figure anew if it did.

    Raises `ValueError` for an unknown block, and for a run without records.
    """
    stale = []

    def block(match: re.Match[str]) -> str:
        begin, name, run, old, end = match.groups()
        if name not in BLOCKS:
            raise unknown_name("block of README.md", name, BLOCKS)
        if not len(frame := records.load_records(_folder(run))):
            raise ValueError(f"papermill_runs/{run}/records is empty; expected the records of a published run")
        new, path = BLOCKS[name](frame, run), _folder(run) / "figures" / "readme.png"
        old_picture = name == "figure" and not (path.exists() and Image.open(path).info.get("Description") == new)
        if old_picture and draw:
            _draw(frame, path, new)
        new += "\n" if new else ""
        stale.extend([name] if new != old or old_picture else [])
        return begin + new + end

    return BLOCK.sub(block, text), stale


def update(*, check: bool = False) -> str:
    """Write README.md anew; returns what was done. check: write nothing, raise `ValueError` where it differs."""
    path = records.project_root() / "README.md"
    text, stale = render(path.read_text(), draw=not check)
    if check and stale:
        raise ValueError(f"README.md is not what the records say: {', '.join(stale)}; run make tables")
    if stale:
        path.write_text(text)
    return f"README.md: {', '.join(stale) or 'nothing'} to change"
