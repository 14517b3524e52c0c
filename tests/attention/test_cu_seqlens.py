"""Lengths on the host: read once from the device, and again after an edit."""

from packlib.attention.cu_seqlens import segment_lengths
from tests.attention.cases import boundaries


def test_host_lengths_are_read_once_and_again_after_an_edit():
    cu_seqlens = boundaries((3, 4))
    assert segment_lengths(cu_seqlens) is segment_lengths(cu_seqlens)
    cu_seqlens[1] = 5
    assert segment_lengths(cu_seqlens) == [5, 2]
