"""What a profiled step did, from events whose answer is known."""

import pytest
import torch

from packlib.lab.runs import profile


def event(category, name, begin, end):
    return {"cat": category, "name": name, "ts": float(begin), "dur": float(end - begin)}


STEP = [
    event("cuda_runtime", "cudaLaunchKernel", 0, 2),
    event("cuda_runtime", "cudaStreamSynchronize", 2, 60),  # waiting is no launch
    event("cuda_driver", "cuLaunchKernelEx", 60, 65),
    event("kernel", "products", 10, 30),
    event("kernel", "products", 20, 50),  # beside the first, on another stream
    event("gpu_memset", "Memset", 80, 100),
    {"cat": "kernel", "name": "begun and never ended", "ts": 1.0},
    event("cpu_op", "aten::mm", 0, 500),
]


def test_a_step_is_taken_apart():
    found = profile.summarise(STEP)
    assert (found["kernels"], found["launches"]) == (3, 2)
    assert found["kernel_seconds"] == pytest.approx(60e-6), "two at once count once"
    assert found["span_seconds"] == pytest.approx(100e-6) and found["host_seconds"] == pytest.approx(65e-6)
    assert found["waiting"] == pytest.approx(0.4)
    busy = found["busy"]
    assert len(busy) == profile.BINS and sum(busy) / len(busy) == pytest.approx(0.6, abs=1e-3)
    assert busy[0] == 0.0 and busy[int(profile.BINS * 0.4)] == 1.0
    assert found["top"][0] == {"name": "products", "number": 2, "seconds": pytest.approx(50e-6)}


def test_a_cpu_is_not_watched():
    watch = profile.StepProfile(torch.device("cpu"))
    watch.start()
    watch.stop()
    assert watch.summary is None
