"""A user's generator whose images don't depend on the batch, to the bit and on any machine: sums in one order."""

import torch
from torch import nn


class Waves(nn.Module):
    latent_dim, image_shape, classes = 5, (3, 16, 16), 0

    def __init__(self):
        super().__init__()
        self.register_buffer("waves", torch.linspace(0, 40, 5 * 768).sin().view(5, 3, 16, 16))

    def forward(self, z):
        return sum(z[:, k, None, None, None] * self.waves[k] for k in range(5)).div(4).clamp(-1, 1)


def build(weights, config):
    return Waves()
