"""Small BigBiGANs, and its forward written straight from a state dict: what the generator is tested against."""

import torch
import torch.nn.functional as F

from copgen_fast.generators.bigbigan import BigBiGAN


def small_bigbigan(width=3, resolution=64, dtype=torch.float64, seed=0):
    """Every number of it matters: no statistic, gain or gamma is left at its start."""
    torch.manual_seed(seed)
    generator = BigBiGAN(width, resolution, attention=32, shared=8, embeddings=5)
    for name, value in generator.state_dict().items():
        if name.endswith(("stored_var", "output_layer.0.gain")):
            value.uniform_(0.5, 2)
        elif name.endswith(("stored_mean", "bias", "gamma")):
            value.normal_(std=0.5)
    generator.shared.weight.data[:] = generator.shared.weight.data[0].clone()
    return generator.to(dtype).eval().requires_grad_(False)


def weight(state, name):
    """A layer's weight over the norm that one power iteration from the stored u estimates."""
    matrix = state[f"{name}.weight"].reshape(len(state[f"{name}.weight"]), -1)
    v = state[f"{name}.u0"] @ matrix
    v = v / v.norm().clamp_min(1e-4)
    u = v @ matrix.T
    u = u / u.norm().clamp_min(1e-4)
    return state[f"{name}.weight"] / (v @ matrix.T @ u.T)


def conv(state, name, x, padding):
    return F.conv2d(x, weight(state, name), state.get(f"{name}.bias"), padding=padding)


def normalise(state, name, x, condition):
    mean, var = state[f"{name}.stored_mean"], state[f"{name}.stored_var"]
    x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-4)
    gain = 1 + condition @ weight(state, f"{name}.gain").T
    bias = condition @ weight(state, f"{name}.bias").T
    return x * gain[:, :, None, None] + bias[:, :, None, None]


def attend(state, name, x):
    n, channels, height, width = x.shape
    theta = conv(state, f"{name}.theta", x, 0).reshape(n, -1, height * width)
    phi = F.max_pool2d(conv(state, f"{name}.phi", x, 0), 2).reshape(n, -1, height * width // 4)
    g = F.max_pool2d(conv(state, f"{name}.g", x, 0), 2).reshape(n, -1, height * width // 4)
    beta = torch.einsum("ncq,nck->nqk", theta, phi).softmax(2)
    found = torch.einsum("nck,nqk->ncq", g, beta).reshape(n, -1, height, width)
    return x + state[f"{name}.gamma"] * conv(state, f"{name}.o", found, 0)


def bigbigan(state, z, blocks, attention_after):
    """Images of latents z [N, 20 (blocks + 1)] by a state dict of the published names."""
    chunks = z.split(20, 1)
    shared = state["shared.weight"][0].expand(len(z), -1)
    x = (chunks[0] @ weight(state, "linear").T + state["linear.bias"]).reshape(len(z), -1, 4, 4)
    for i in range(blocks):
        condition = torch.cat([shared, chunks[i + 1]], 1)
        name = f"blocks.{i}.0"
        h = normalise(state, f"{name}.bn1", x, condition).clamp_min(0)
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        h = conv(state, f"{name}.conv1", h, 1)
        h = conv(state, f"{name}.conv2", normalise(state, f"{name}.bn2", h, condition).clamp_min(0), 1)
        x = h + conv(state, f"{name}.conv_sc", x.repeat_interleave(2, 2).repeat_interleave(2, 3), 0)
        if i == attention_after:
            x = attend(state, f"blocks.{i}.1", x)
    last = "output_layer.0"
    mean, var = (state[f"{last}.{part}"][:, None, None] for part in ("stored_mean", "stored_var"))
    gain, bias = (state[f"{last}.{part}"][:, None, None] for part in ("gain", "bias"))
    x = (x - mean) / torch.sqrt(var + 1e-5) * gain + bias
    return conv(state, "output_layer.2", x.clamp_min(0), 1).tanh()
