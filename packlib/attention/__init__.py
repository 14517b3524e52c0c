"""Variable-length attention: kernels with one signature, and the function that makes them known to transformers."""

from packlib.attention.convolutions import hand_over_boundaries
from packlib.attention.flash_stand_in import flash_stand_in
from packlib.attention.kernels import KERNELS, kernel_table, resolve_kernel, varlen_attention
from packlib.attention.lines import mixer_waste
from packlib.attention.mixers import isolate_mixers
from packlib.attention.register import carries_state, register_attention

__all__ = [
    "KERNELS",
    "carries_state",
    "flash_stand_in",
    "hand_over_boundaries",
    "isolate_mixers",
    "kernel_table",
    "mixer_waste",
    "register_attention",
    "resolve_kernel",
    "varlen_attention",
]
