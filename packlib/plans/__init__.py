"""Plans: which pieces of which examples form each row. `plan.py` has the plan, `planners.py` the ways to make one."""

from packlib.plans.plan import Plan, PlanReport, Segment
from packlib.plans.planners import (
    CostModel,
    best_fit,
    best_fit_crop,
    best_fit_decreasing,
    constant_examples,
    dynamic_programming,
    first_fit_decreasing,
    fixed_length,
    histogram,
    length_grouped_batches,
    next_fit,
    shuffled_batches,
    token_budget,
)
from packlib.plans.streams import RowsEstimate, estimate_rows, stream

__all__ = [
    "CostModel",
    "Plan",
    "PlanReport",
    "RowsEstimate",
    "Segment",
    "best_fit",
    "best_fit_crop",
    "best_fit_decreasing",
    "constant_examples",
    "dynamic_programming",
    "estimate_rows",
    "first_fit_decreasing",
    "fixed_length",
    "histogram",
    "length_grouped_batches",
    "next_fit",
    "shuffled_batches",
    "stream",
    "token_budget",
]
