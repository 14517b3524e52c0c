"""Sequence packing without cross-contamination: `plans`, `collators`, `losses`, `attention`, `isolation`; and the lab.

Nothing is imported here, so that each of them costs what it needs alone. pyproject.toml reads the version.
"""

__version__ = "0.1.0"
