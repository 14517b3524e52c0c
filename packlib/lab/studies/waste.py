"""How much of a padded batch is padding? What notebooks 00 and 01 count from lengths alone, before anything is trained.

Waste is slots per real token: 2 means that half of what a model computes is thrown away. One table per question, one
row per point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from packlib import plans
from packlib.lab import figures
from packlib.lab.advice import Advice
from packlib.lab.data.corpora import load_corpus
from packlib.lab.figures import COLORS, Picture
from packlib.lab.strategies import STRATEGIES, Strategy, plan_for
from packlib.plans import Plan

Line = list[tuple[int, int]]  # a line of a picture: (example, tokens) from left to right
PADDING = -1  # the example of a pad
FOREIGN = to_rgb("#d55e00")  # attention to another example
PAGE_EXAMPLES, PAGE_TOKENS = 6, 14  # what fits a picture


# Tables


def strategy_table(lengths: Sequence[int], *, batch_size: int, seed: int = 0) -> pd.DataFrame:
    """Every strategy as a plan, a layout and a boundary, and what it needs for examples of these lengths.

    batch_size: examples of a mini-batch. A row has room for the longest example. Columns `in words`, `plan` (what its
    planner says of itself), `layout`, `boundary`, `a step holds` (at most), `steps` and `slots`.
    """
    rows, longest = {}, max(lengths)
    for strategy in STRATEGIES.values():
        plan = plan_for(strategy, lengths, batch_size=batch_size, max_tokens=longest, seed=seed)
        rows[strategy.name] = {
            "in words": strategy.label,
            "plan": _in_a_sentence(strategy) if strategy.trl is None else "as TRL makes it",
            "layout": strategy.layout,
            "boundary": strategy.boundary,
            "a step holds": {
                "examples": f"{batch_size} examples",
                "row": f"{batch_size} rows of {longest} slots",
                "batch": f"{batch_size * longest} slots",
            }[strategy.size],
            "steps": -(-len(plan) // strategy.rows_per_batch(batch_size)),
            "slots": plan.report(lengths, strategy.layout).slots,
        }
    return pd.DataFrame(rows).T.rename_axis("strategy")


def _in_a_sentence(strategy: Strategy) -> str:
    """What the planner's docstring begins with, and what the strategy tells it besides."""
    said = (strategy.planner.__doc__ or strategy.planner.__name__).splitlines()[0].split(". ")[0]
    said = said.rstrip(".").replace("`", "")
    told = [f"{name} = {value}" for name, value in strategy.own.items() if name != "overflow"]
    return f"{said} ({', '.join(told)})" if told else said


def waste_by_batch_size(lengths: np.ndarray, batch_sizes: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """Waste of random padded mini-batches, of group-by-length and of packing: `batch_size, strategy, waste`."""
    rows = []
    for size in batch_sizes:
        padded = plans.shuffled_batches(lengths, size, seed=seed).report(lengths, "padded").waste
        grouped = plans.length_grouped_batches(lengths, size, seed=seed).report(lengths, "padded").waste
        rows += [(size, "padding", padded), (size, "group_by_length", grouped), (size, "minibatch_packing", 1.0)]
    return pd.DataFrame(rows, columns=["batch_size", "strategy", "waste"])


def capacity_table(lengths: np.ndarray, capacities: Sequence[int]) -> pd.DataFrame:
    """What rows of some capacities (tokens) lose by truncation, and how full best fit packs what is left.

    Columns `max_tokens`, `cut_examples, lost_tokens` (shares), `row_fill` (real tokens over rows × capacity), `rows`.
    """
    rows = []
    for capacity in capacities:
        kept = np.minimum(lengths, capacity)
        report = plans.best_fit_decreasing(kept, capacity, overflow="error").report(kept)
        cut, lost = (lengths > capacity).mean(), 1 - kept.sum() / lengths.sum()
        rows.append((capacity, cut, lost, report.capacity_fill, report.rows))
    return pd.DataFrame(rows, columns=["max_tokens", "cut_examples", "lost_tokens", "row_fill", "rows"])


def tokenizer_table(
    corpus: str, tokenizers: Sequence[str], *, batch_size: int, max_tokens: int, limit: int | None = None
) -> pd.DataFrame:
    """The same text under several tokenizers: lengths in tokens, padding's waste, the share lost, packed rows.

    `waste, whole` is padding's waste of the examples as they are, `waste, cut` after truncation to max_tokens.
    batch_size: examples of a mini-batch. max_tokens: capacity of a row, where examples are truncated.
    limit: examples of the corpus, a seeded subset.
    """
    rows = []
    for name in tokenizers:
        loaded = load_corpus(corpus, tokenizer=name, limit=limit)
        n = loaded.lengths
        kept = np.minimum(n, max_tokens)
        row = {
            "tokenizer": name,
            "vocabulary": loaded.vocab_size,
            "tokens": int(n.sum()),
            "mean": n.mean(),
            "p99": np.percentile(n, 99),
            "std / mean": n.std() / n.mean(),
            "waste, whole": plans.shuffled_batches(n, batch_size).report(n, "padded").waste,
            "waste, cut": plans.shuffled_batches(kept, batch_size).report(kept, "padded").waste,
            "lost tokens": 1 - kept.sum() / n.sum(),
            "packed rows": len(plans.best_fit_decreasing(kept, max_tokens, overflow="error")),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def tokenizer_effect(table: pd.DataFrame) -> str:
    """From the smallest vocabulary of a `tokenizer_table` to the largest: what changes, in a sentence.

    >>> columns = ["tokenizer", "vocabulary", "tokens", "std / mean", "waste, whole", "waste, cut", "lost tokens"]
    >>> rows = [("few", 300, 4000, 1.0, 2.0, 1.5, 0.5), ("many", 900, 1000, 1.1, 2.1, 1.8, 0.25)]
    >>> tokenizer_effect(pd.DataFrame(rows, columns=columns))[:88]
    'From few to many the text shrinks by 75%, the spread of its lengths (std / mean) changes'
    """
    few, many = (table.loc[place] for place in (table["vocabulary"].idxmin(), table["vocabulary"].idxmax()))

    def change(name: str) -> str:
        return f"{round(many[name] / few[name] - 1, 2) + 0.0:+.0%}"  # no -0%

    return (
        f"From {few['tokenizer']} to {many['tokenizer']} the text shrinks by {1 - many['tokens'] / few['tokens']:.0%}, "
        f"the spread of its lengths (std / mean) changes by {change('std / mean')} and padding's waste by "
        f"{change('waste, whole')}; cut at the capacity, which loses {few['lost tokens']:.0%} of the tokens with the "
        f"first and {many['lost tokens']:.0%} with the last, waste changes by {change('waste, cut')}."
    )


def pair_table(plan: Plan, lengths: Sequence[int]) -> pd.DataFrame:
    """The pairs of tokens that attention computes for a plan of mini-batches, as a sum to check by hand and its value.

    Rows `padded`, `packed, no boundaries` and `packed, boundaries`; columns `sum` and `pairs`. Causal attention needs
    about half of them.

    >>> pair_table(plans.shuffled_batches([3, 1], 2), [3, 1])["sum"].tolist()
    ['2 · 3²', '4²', '1² + 3²']
    """
    rows = [sorted(lengths[segment.example] for segment in row) for row in plan]
    padded = [(len(row), max(row)) for row in rows]
    sums = {
        "padded": (" + ".join(f"{count} · {n}²" for count, n in padded), sum(count * n * n for count, n in padded)),
        "packed, no boundaries": (" + ".join(f"{sum(row)}²" for row in rows), sum(sum(row) ** 2 for row in rows)),
        "packed, boundaries": (
            " + ".join(f"{n}²" for row in rows for n in row),
            sum(n * n for row in rows for n in row),
        ),
    }
    return pd.DataFrame(sums, index=["sum", "pairs"]).T


def page_sized(lengths: np.ndarray, seed: int = 0) -> list[int]:
    """A few of these lengths, drawn and scaled down so that a picture of them fits a page."""
    few = np.random.default_rng(seed).choice(lengths, PAGE_EXAMPLES, replace=False)
    return [int(n) for n in np.ceil(few / few.max() * PAGE_TOKENS)]


# Figures


def length_histograms(lengths: Mapping[str, np.ndarray]) -> Picture:
    """Where the examples are and where the tokens are, over length on a log scale: one panel per corpus."""
    share = {name: _share_of_longest_tenth(n) for name, n in lengths.items()}
    told = [f"{name}: the longest tenth of the examples holds {part:.0%} of the tokens" for name, part in share.items()]
    alt = f"Histograms of length. {', '.join(told)}"
    figure, axes = figures.new(5.8 * len(lengths), 4.2, alt, len(lengths))
    for ax, (name, n) in zip(axes, lengths.items()):
        edges = np.unique(np.geomspace(n.min(), n.max() + 1, 31).round()).tolist()
        ax.hist(n, edges, weights=np.full(len(n), 100 / len(n)), color=COLORS[7], label="examples")
        share_of_tokens = 100 * n / n.sum()
        ax.hist(
            n, edges, weights=share_of_tokens, histtype="step", linewidth=2, hatch="//", color=COLORS[0], label="tokens"
        )
        ax.axvline(n.mean(), color="black", linestyle="--", linewidth=1.4, label=f"mean, {n.mean():.0f} tokens")
        figures.log2_axis(ax)
        ax.set_title(f"{name}: the longest tenth holds {share[name]:.0%} of the tokens", fontsize=11)
        ax.set(xlabel="tokens per example", ylabel="share (%)")
        ax.legend()
    return figure


def _share_of_longest_tenth(lengths: np.ndarray) -> float:
    longest_first = np.sort(lengths)[::-1]
    return longest_first[: max(len(lengths) // 10, 1)].sum() / lengths.sum()


def slots_picture(plan: Plan, lengths: Sequence[int]) -> Picture:
    """One plan of mini-batches (up to 8 short examples) in three ways: its slots, and who attends to whom.

    Padded; packed without boundaries; packed with a boundary at each example.
    """
    padded, flat = plan.report(lengths, "padded"), plan.report(lengths)
    # 1. One line an example, filled up with padding, or one line a mini-batch.
    apart: dict[str, Line] = {}
    together: dict[str, Line] = {}
    for i, row in enumerate(plan, 1):
        sizes = [(segment.example, lengths[segment.example]) for segment in row]
        longest = max(n for _, n in sizes)
        together[f"mini-batch {i}"] = sizes
        for j, (example, n) in enumerate(sizes, 1):
            apart[f"mini-batch {i}, line {j}"] = [(example, n), (PADDING, longest - n)]
    # 2. The slots on the left, the attention of the first mini-batch on the right.
    alt = f"{padded.examples} examples: {padded.slots} slots padded, {flat.slots} packed; "
    alt += "who attends to whom without and with boundaries"
    ratios = (len(apart) * 0.7, 3, 3)
    figure, axes = figures.new(11, 8, alt, 2, 3, width_ratios=(3, 1), height_ratios=ratios)
    tokens, fill = f"{padded.slots} slots for {padded.real_tokens} tokens", f"(fill {padded.fill:.2f})"
    packed = f"{flat.slots} slots (fill {flat.fill:.2f})"
    _draw_slots(axes[0], apart, True, f"Padded: {tokens} {fill}")
    _draw_slots(axes[2], together, False, f"Packed, no boundaries: {packed}")
    _draw_slots(axes[4], together, True, f"Packed, a boundary at each example: {packed}")
    first = list(apart.values())[: len(plan[0])]
    _draw_attention(axes[1], first, True)
    _draw_attention(axes[3], [together["mini-batch 1"]], False)
    _draw_attention(axes[5], [together["mini-batch 1"]], True)
    for ax in axes[::2]:
        ax.set_xlim(0, max(plan.row_lengths) + 0.3)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_slots(ax: Axes, lines: Mapping[str, Line], boundary: bool, title: str) -> None:
    edge = "black" if boundary else "none"
    for y, line in enumerate(lines.values()):
        left = 0
        for example, tokens in line:
            if example == PADDING:
                ax.barh(y, tokens, left=left, color=figures.PAD, hatch="////", edgecolor="0.7", zorder=1)
            else:
                color = figures.EXAMPLES[example % 8]
                ax.barh(y, tokens, left=left, color=color, edgecolor=edge, linewidth=2, zorder=2)
                ax.text(left + tokens / 2, y, chr(65 + example), ha="center", va="center", fontsize=11)
            left += tokens
    ax.set(title=title, xlabel="slots", ylim=(len(lines) - 0.45, -0.55))
    ax.set_yticks(range(len(lines)), list(lines))
    ax.grid(axis="y", visible=False)


def _draw_attention(ax: Axes, lines: Sequence[Line], boundary: bool) -> None:
    image, foreign, scores = attention_image(lines, boundary)
    ax.imshow(image)
    xlabel = f"key: {scores} scores,\n{foreign or 'none'} to other examples"
    ax.set(xticks=[], yticks=[], ylabel="query", xlabel=xlabel, title="Mini-batch 1")
    ax.grid(False)


def attention_image(lines: Sequence[Line], boundary: bool) -> tuple[np.ndarray, int, int]:
    """Who attends to whom in these lines, one below the other.

    Returns a picture, float [T, T, 3], how many scores are between different examples, and how many there are.

    >>> attention_image([[(0, 1), (1, 2)]], boundary=False)[1:], attention_image([[(0, 1), (1, 2)]], boundary=True)[1:]
    ((2, 6), (0, 4))
    """
    owner = np.concatenate([np.repeat([e for e, _ in line], [n for _, n in line]) for line in lines])
    line = np.repeat(np.arange(len(lines)), [sum(n for _, n in row) for row in lines])
    causal = np.tri(len(owner), dtype=bool) & (line[:, None] == line)
    real, same = (owner >= 0)[:, None] & (owner >= 0), owner[:, None] == owner
    seen = causal & real & (same | (not boundary))
    image = np.ones((*seen.shape, 3))
    image[causal & ~real] = figures.PAD
    image[seen] = figures.EXAMPLES[owner[np.nonzero(seen)[0]] % 8]
    image[seen & ~same] = FOREIGN
    return image, int((seen & ~same).sum()), int(seen.sum())


def waste_curves(tables: Mapping[str, pd.DataFrame]) -> Picture:
    """Slots per real token against batch size, one panel per corpus (`waste_by_batch_size`)."""
    worst = {name: t[t["strategy"] == "padding"].sort_values("batch_size").iloc[-1] for name, t in tables.items()}
    told = [
        f"{name}: padding spends {w['waste']:.2f} slots on a token at batch size {w['batch_size']:.0f}"
        for name, w in worst.items()
    ]
    figure, axes = figures.new(5.6 * len(tables), 4.2, "; ".join(told), len(tables), sharey=True)
    for ax, (name, table) in zip(axes, tables.items()):
        for strategy, rows in table.groupby("strategy", sort=False):
            color, _, marker = figures.style(strategy)
            known = figures.label(strategy)
            ax.plot(rows["batch_size"], rows["waste"], color=color, marker=marker, markersize=7, label=known)
        figures.log2_axis(ax)
        at = f"{worst[name]['waste']:.2f} slots per token at {worst[name]['batch_size']:.0f}"
        ax.set(title=f"{name}: {at}", xlabel="examples per mini-batch")
    axes[0].set(ylabel="slots per real token (1 = no waste)", ylim=(0.9, None))
    axes[-1].legend()
    return figure


def capacity_curves(tables: Mapping[str, pd.DataFrame]) -> Picture:
    """What a capacity loses and how full it packs, against the capacity: one line per corpus (`capacity_table`)."""
    told = [
        f"{name}: {table['lost_tokens'].iloc[0]:.0%} of the tokens lost at {table['max_tokens'].iloc[0]}"
        for name, table in tables.items()
    ]
    figure, (lost, fill) = figures.new(11.5, 4.2, f"Tokens lost and row fill by capacity. {'; '.join(told)}", 2)
    for i, (name, table) in enumerate(tables.items()):
        color, marker = COLORS[i % len(COLORS)], figures.MARKERS[i % 6]
        for ax, values in ((lost, 100 * table["lost_tokens"]), (fill, table["row_fill"])):
            ax.plot(table["max_tokens"], values, color=color, marker=marker, markersize=7, label=name)
    fills = pd.concat([table["row_fill"] for table in tables.values()])
    lost.set(title=told[0], ylabel="tokens lost by truncation (%)")
    fill.set(title=f"Best fit: rows {fills.min():.1%} to {fills.max():.1%} full", ylabel="row fill")
    for ax in (lost, fill):
        figures.log2_axis(ax)
        ax.set_xlabel("capacity of a row, max_tokens")
        ax.legend()
    return figure


def predicted_speed_ups(advice: Mapping[str, Advice]) -> Picture:
    """The advice's speed-ups per corpus with their error, and the limit that each strategy's waste sets."""
    rows: list[dict[str, object]] = []
    for corpus, found in advice.items():
        padding = found.strategies[0]
        for p in found.strategies:
            error = p.speed_up * (p.speed_up_error or 0.0)
            row = {"corpus": corpus, "strategy": p.strategy, "speed_up": p.speed_up}
            row |= {"speed_up_low": p.speed_up - error, "speed_up_high": p.speed_up + error}
            rows.append(row | {"limit": padding.waste / p.waste})
    best = {name: max(p.speed_up for p in found.strategies) for name, found in advice.items()}
    title = "Predicted: up to " + ", ".join(f"{value:.2f} × on {name}" for name, value in best.items())
    return figures.bars_with_limits(pd.DataFrame(rows), title)


# Findings


def findings(
    advice: Mapping[str, Advice], by_tokenizer: pd.DataFrame, compared: pd.DataFrame, *, batch_size: int
) -> list[str]:
    """Sentences of notebook 01, every number computed.

    advice: by corpus, the first of them the one of `by_tokenizer` (`tokenizer_table`). compared: `costs.held_out`.
    """
    said = [f"{name}, {batch_size} examples a mini-batch: {answer.recommendation}" for name, answer in advice.items()]
    said.append(f"{next(iter(advice))}: {tokenizer_effect(by_tokenizer)}")
    if len(compared):
        worst = compared["error"].abs().max()
        said.append(f"Predicted from the other strategies, speed-ups are within {worst:.0%} of the measured ones.")
    return said
