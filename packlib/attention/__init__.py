"""Variable-length attention: kernels with one signature, and the function that makes them known to transformers."""

from packlib.attention.flash_stand_in import flash_stand_in
from packlib.attention.kernels import KERNELS, kernel_table, resolve_kernel, varlen_attention
from packlib.attention.register import register_attention

__all__ = ["KERNELS", "flash_stand_in", "kernel_table", "register_attention", "resolve_kernel", "varlen_attention"]
