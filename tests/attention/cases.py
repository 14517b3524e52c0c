"""What tests of attention share: random queries, segments and batches, and the error of a result."""

import torch

from packlib.attention import varlen_attention
from packlib.collators import FlatteningCollator

LENGTHS = (7, 1, 19, 19, 30, 0, 3)


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int().to(device)


def random_qkv(lengths, heads=4, kv_heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    ]


def run(kernel, qkv, lengths, device="cpu", dtype=torch.float64, backward=True, **options):
    """Output and the three gradients, on the CPU in float64."""
    qkv = [x.detach().to(device, dtype, copy=True).requires_grad_(backward) for x in qkv]
    out = varlen_attention(*qkv, boundaries(lengths, device), max(lengths), kernel=kernel, **options)
    if backward:
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out))
    return [x.detach().double().cpu() for x in (out, *(x.grad for x in qkv if backward))]


def worst(results, truth):
    """Largest error of any result, relative to its largest value.

    The output's largest value is a floor: at a window of one token there is no gradient at the queries.
    """
    floor = float(truth[0].abs().max())
    return max(float((r - t).abs().max()) / max(float(t.abs().max()), floor) for r, t in zip(results, truth))


def features(lengths=(9, 4, 14), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 250, (n,), generator=generator).tolist()} for n in lengths]


def packed(examples):
    batch = FlatteningCollator()(examples)
    del batch["labels"], batch["seq_idx"]
    return batch


@torch.no_grad()
def alone(model, examples):
    return torch.cat([model(input_ids=torch.tensor([e["input_ids"]]), use_cache=False).logits[0] for e in examples])
