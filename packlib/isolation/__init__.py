"""Proof that packed examples do not see each other: `check.py` judges, `probe.py` looks."""

from packlib.isolation.check import (
    ContaminationError,
    EquivalenceReport,
    IsolationReport,
    check_equivalence,
    check_isolation,
)

__all__ = ["ContaminationError", "EquivalenceReport", "IsolationReport", "check_equivalence", "check_isolation"]
