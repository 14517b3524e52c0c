"""Where a training step of a 7B model goes at small batches: wall time, time with a kernel on the GPU, launches.

`python benchmarks/profile_step.py --out profile.json [--model mistral-7b] [--lengths 150 230 180 190]` prints a table
and writes JSON. A step is two micro-batches of these examples (accumulation 2), forward and backward with gradient
checkpointing, and fused AdamW in bfloat16: padding and packed rows, on the same kernel.
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from packlib.attention import register_attention
from packlib.collators import FlatteningCollator, PaddingCollator
from packlib.lab import models


def timed(work, device: str) -> dict[str, float]:
    """Wall seconds of `work()`, the best of three; of one profiled call seconds in which kernels ran, and how many."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    walls = []
    for _ in range(3):
        synchronize()
        begin = time.perf_counter()
        work()
        synchronize()
        walls.append(time.perf_counter() - begin)
    found = {"wall_seconds": min(walls)}
    with profile(activities=[ProfilerActivity.CUDA]) if device == "cuda" else nullcontext() as trace:
        work()
        synchronize()
    if device == "cuda":
        kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        found |= {
            "kernel_seconds": sum(event.self_device_time_total for event in kernels) / 1e6,
            "kernels": len(kernels),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="mistral-7b")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[150, 230, 180, 190], help="tokens of the examples of a micro-batch"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = models.build_model(arguments.model, attn_implementation=register_attention(), dtype=dtype, device=device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda")
    features = [{"input_ids": list(range(3, 3 + n))} for n in arguments.lengths]
    batches = {"padding": PaddingCollator(0)(features), "minibatch_packing": FlatteningCollator()(features)}
    batches = {
        name: {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for name, batch in batches.items()
    }
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "model": arguments.model,
    }
    for name, batch in batches.items():

        def both(batch=batch):
            for _ in range(2):
                model(**batch | {"use_cache": False}).loss.backward()

        both()
        found[name] = {"slots": 2 * batch["input_ids"].numel()} | timed(both, device)

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    update()
    found["clip and AdamW"] = timed(update, device)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in (*batches, "clip and AdamW"):
        print(f"{name:20}", {key: round(value, 4) for key, value in found[name].items()})


if __name__ == "__main__":
    main()
