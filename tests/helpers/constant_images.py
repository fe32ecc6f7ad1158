"""Images of one colour and parameters that put their values at thresholds, where rounding could decide."""

import torch

from copgen_fast.ops import AugmentParams, augment

COLOURS = torch.tensor([0, 0.1, 0.2, 0.25, 1 / 3, 127 / 255, 0.5, 128 / 255, 0.75, 0.9, 1])
FACTORS = torch.tensor([0, 0.5, 1, 1.5, 2])
SHIFTS = torch.tensor([-0.5, 0, 1 / 6, 1 / 3, 0.5])


def at_thresholds(count, seed):
    """`count` float or uint8 images, their parameters, and the views' size."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(shape, generator=g)

    def mostly(share, values, shape):
        """Some of `values`, or with probability 1 - `share` numbers from the smallest to the largest of them."""
        low, high = values.min(), values.max()
        chosen = values[torch.randint(len(values), shape, generator=g)]
        return torch.where(uniform(*shape) < share, chosen, low + (high - low) * uniform(*shape))

    height, width, *size = torch.randint(1, 12, (4,), generator=g).tolist()
    colours = mostly(0.6, COLOURS, (count, 3))
    colours = torch.where(uniform(count, 1) < 0.5, colours[:, :1], colours)
    as_bytes = seed % 4 == 0
    images = (255 * colours).round().byte() if as_bytes else colours
    colours = images / 255 if as_bytes else colours
    params = AugmentParams.neutral(count, (height, width))
    sides = 1 + (uniform(count, 2) * torch.tensor([height, width])).long()
    places = (uniform(count, 2) * (torch.tensor([height + 1, width + 1]) - sides)).long()
    params.crop[:] = torch.cat([places, sides], 1)
    params.flip[:], params.jitter[:], params.gray[:] = uniform(count) < 0.5, uniform(count) < 0.7, uniform(count) < 0.2
    params.order[:] = uniform(count, 4).argsort(1)
    params.factors[:] = torch.cat([mostly(0.5, FACTORS, (count, 3)), mostly(0.6, SHIFTS, (count, 1))], 1)
    threshold = torch.where(uniform(count) < 0.5, colours[:, 0], mostly(1, COLOURS, (count,)))
    params.solarize[:] = torch.where(uniform(count) < 0.6, threshold, torch.inf)
    return images[:, :, None, None].expand(-1, -1, height, width).contiguous(), params, tuple(size)


def assert_alike(backend, count, seed, device="cpu"):
    """Views, and gradients of their sum, of `backend` and the reference."""
    images, params, size = at_thresholds(count, seed)
    images, params, found = images.to(device), params.to(device), []
    for name in (backend, "reference"):
        leaf = images.clone().requires_grad_(images.is_floating_point())
        views = augment(leaf, params, size, backend=name)
        grads = torch.autograd.grad(views.sum(), leaf) if leaf.requires_grad else ()
        found.append((views.detach(), *grads))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
