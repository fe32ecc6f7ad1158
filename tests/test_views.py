import torch

from copgen_fast import augmentations, seeds
from copgen_fast.views import random_views


def test_views_are_replayed_by_their_key_and_drawn_per_image():
    policy = augmentations.get("simclr")
    images = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.expand(6, -1, -1, -1).contiguous()
    views = random_views(images, policy, seeds.generator(0, "pretrain views", 3))
    assert views.shape == images.shape and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(views, random_views(images, policy, seeds.generator(0, "pretrain views", 3)))
    assert not torch.equal(views, random_views(images, policy, seeds.generator(0, "pretrain views", 4)))
    assert all(not torch.equal(views[0], view) for view in views[1:])


def test_views_are_differentiable():
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    random_views(images, augmentations.get("no-color"), seeds.generator(0)).sum().backward()
    assert images.grad.abs().sum() > 0
