"""Small BigGAN-deep networks of the package with random weights, and folders of them as it publishes its own."""

import json

import torch
import torch.nn.functional as F

from copgen_fast.generators.biggan_deep import BigGANDeep

TINY = {
    "output_dim": 32,
    "z_dim": 6,
    "class_embed_dim": 6,
    "channel_width": 4,
    "num_classes": 5,
    "layers": [[False, 16, 16], [True, 16, 8], [False, 8, 8], [True, 8, 4], [False, 4, 2], [True, 2, 1]],
    "attention_layer_position": 5,
    "eps": 1e-4,
    "n_stats": 51,
}


def random_network(seed=0, **changes):
    """The package's BigGAN; every number of it matters: no statistic, gain or gamma is left at its start."""
    from pytorch_pretrained_biggan import BigGAN, BigGANConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BigGAN(BigGANConfig.from_dict(TINY | changes))
        for name, value in network.state_dict().items():
            if name.endswith(("running_vars", "generator.bn.weight")):
                value.uniform_(0.5, 2)
            elif name.endswith(("running_means", "bias", "gamma")):
                value.normal_(std=0.5)
    for layer in network.modules():
        if hasattr(layer, "weight_orig"):
            matrix = layer.weight_orig.detach().flatten(1)
            for _ in range(5):  # as after training: random vectors give norms near 0
                layer.weight_v = F.normalize(matrix.T @ layer.weight_u, dim=0)
                layer.weight_u = F.normalize(matrix @ layer.weight_v, dim=0)
    return network


def small_biggan_deep(dtype=torch.float64, truncation=1.0, seed=0, **changes):
    network = random_network(seed, **changes).to(dtype)
    return BigGANDeep(network, truncation).eval().requires_grad_(False)


def write_folder(folder, seed=0, **changes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    torch.save(random_network(seed, **changes).state_dict(), folder / "pytorch_model.bin")
    return folder
