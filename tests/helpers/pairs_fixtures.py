"""A tiny analytic pair source for the tests of copgen_fast.pairs."""

import json

import torch

from copgen_fast.config import PairsConfig
from copgen_fast.files import sha256
from copgen_fast.pairs.write.source import PairSource
from copgen_fast.pairs.write.writer import write_pairs
from copgen_fast.runtime.latents import NamedPrior, sample_each

LATENT_DIM = 4
IDENTITY = {"positive": "shift", "generator": {"name": "analytic", "sha256": "00"}, "start_seed": 7}
CONFIG = PairsConfig(count=10, shard_size=4, batch=3, start_seed=7, samples_per_class=4, workers=0)
WEIGHT = torch.randn(LATENT_DIM, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))


def generate(z):
    return torch.tanh(z @ WEIGHT).view(-1, 3, 8, 8)


def shift(z, seeds):
    return z + 0.3 * sample_each("normal", [seed + 1000 for seed in seeds], z.shape[1])


def generate_of_class(z, labels):
    return generate(z + labels[:, None])


def source(generator=generate, positive=shift, label_of=None, positives=1):
    prior = NamedPrior("truncnorm", LATENT_DIM)
    return PairSource(generator, positive, LATENT_DIM, prior, torch.device("cpu"), label_of, positives)


def write(folder, config=CONFIG, pair_source=None, identity=IDENTITY, progress=None):
    return write_pairs(folder, pair_source or source(), config, identity, progress)


def contents(folder):
    """Name -> bytes of every file of a folder, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forge(path, change):
    """Change the values of a JSON record, and leave out its digest."""
    values = json.loads(path.read_text())
    values.pop("record_sha256", None)
    change(values)
    path.write_text(json.dumps(values))


def update_digest(folder, name, field):
    """Write a file's size and digest into the index, as a careful forger would."""

    def update(index):
        shard = next(shard for shard in index["shards"] if name.startswith(shard["name"].removesuffix(".tar")))
        shard[f"{field}sha256"] = sha256(folder / name)
        shard[f"{field}bytes"] = (folder / name).stat().st_size

    forge(folder / "index.json", update)
