"""InfoNCE of one rank of a group, a process that test_info_nce_group.py starts."""

import torch
import torch.distributed as dist

from copgen_fast.ops import info_nce
from copgen_fast.ops.backend import INSTALLED

PAIRS = 12  # of all ranks together
BACKENDS = [name for name in ("cpp", "chunked") if name in INSTALLED] + ["reference"]
QUEUE = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CASES = {
    "symmetric": {},
    "sharp": {"temperature": 0.01},
    "one-sided": {"symmetric": False},
    "base": {"base_temperature": 0.07},
    "labels": {"labels": torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 2, 2, 2, 5])},
    "labels, one-sided": {"labels": torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 2, 2, 2, 5]), "symmetric": False},
    "negatives": {"negatives": QUEUE},
    "negatives alone": {"negatives": QUEUE, "in_batch": False},
    "raw": {"normalize": False, "temperature": 1.0},
    "several positives": {"several": 2},
    "several positives of a label, with negatives": {
        "several": 3,
        "labels": torch.tensor([0, 1, 2, -1, 0, 1, 2, -1, 2, 2, 2, 5]),
        "negatives": QUEUE,
    },
}


def embeddings(several=1):
    """Anchors [N, 8], and their positives, [K, N, 8] of several."""
    seeded = torch.Generator().manual_seed(0)
    anchors, *positives = torch.randn(1 + several, PAIRS, 8, generator=seeded, dtype=torch.float64)
    return anchors, positives[0] if several == 1 else torch.stack(positives)


def compute(part, labels, options, group, backend):
    """Loss, its rows, stats, gradients of the embeddings and of a learned temperature."""
    a, p = (x.clone().requires_grad_() for x in part)
    t = torch.tensor(options.get("temperature", 0.1), dtype=torch.float64, requires_grad=True)
    options = {**options, "labels": labels, "group": group, "backend": backend}
    options.pop("several", None)
    loss, stats = info_nce(a, p, return_stats=True, **options)
    gradients = torch.autograd.grad(loss, (a, p))
    learned = info_nce(a, p, **{**options, "temperature": t})
    of_t = torch.autograd.grad(learned, (a, p, t))
    return [loss.detach(), learned.detach(), *stats, *gradients, *of_t]


def here(x, rank, world):
    count = PAIRS // world
    return x[..., rank * count : (rank + 1) * count, :] if x.ndim > 1 else x[rank * count : (rank + 1) * count]


def main(rank, world, out):
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=world)
    group = dist.group.WORLD
    results = {}
    for name, options in CASES.items():
        labels = options.get("labels")
        labels = None if labels is None else here(labels, rank, world)
        for backend in BACKENDS:
            part = [here(x, rank, world) for x in embeddings(options.get("several", 1))]
            results[f"{name}/{backend}"] = compute(part, labels, options, group, backend)
    try:
        info_nce(*torch.randn(2, 3 + rank, 8), group=group)
        results["unequal"] = None
    except ValueError as error:
        results["unequal"] = str(error)
    torch.save(results, f"{out}/{rank}.pt")
    dist.destroy_process_group()
