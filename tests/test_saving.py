"""Modules of every part of the package are saved, pickled and copied whole."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist

from copgen_fast import generators, methods
from copgen_fast.augmentations import get
from copgen_fast.config import EncoderConfig
from copgen_fast.encoders import ContrastiveModel, Encoder, prepare
from copgen_fast.ops import Augment, InfoNCELoss
from copgen_fast.positives.navigator import Navigator
from tests.helpers.bigbigan_fixtures import small_bigbigan

METHODS = ("simclr", "supcon", "nnclr", "negft", "moco", "simsiam", "byol")
SMALL = EncoderConfig("resnet18", "cifar", width=4)


def bigbigan():
    return small_bigbigan(dtype=torch.float32)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IMAGES = random(4, 3, 16, 16).sigmoid()
PAIR = (random(4, 6), random(4, 6).flip(0))
MODULES = {  # how it is made, and its input
    "Augment": (
        lambda: Augment(get("byol"), 8, views=2, out_dtype=torch.bfloat16, memory_format=torch.channels_last),
        (IMAGES,),
    ),
    "InfoNCELoss": (InfoNCELoss, PAIR),
    "InfoNCELoss, learned temperature": (lambda: InfoNCELoss(0.2, learn_temperature=True), PAIR),
    "Encoder": (lambda: prepare(Encoder(SMALL), torch.device("cpu"), checkpointed=True), (IMAGES,)),
    "ContrastiveModel": (lambda: ContrastiveModel(SMALL), (IMAGES,)),
    "Navigator": (lambda: Navigator(6, radius=1.0), (random(4, 6),)),
    **{name: (lambda name=name: methods.build(name, Encoder(SMALL)), (IMAGES,)) for name in METHODS},
    **{name: (lambda name=name: generators.build(name), (random(4, 64),)) for name in ("digits", "residual-flow")},
    "bigbigan": (bigbigan, (random(4, 100),)),
    "bigbigan, rewritten": (lambda: generators.optimize(bigbigan()), (random(4, 100),)),
    "bigbigan, half": (lambda: generators.optimize(bigbigan(), "half"), (random(4, 100),)),
}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(("make", "inputs"), MODULES.values(), ids=MODULES.keys())
def test_a_module_comes_back_as_it_was(make, inputs):
    module = make().eval()
    for again in (saved(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        results = []
        for one in (module, again):
            torch.manual_seed(0)
            out = one(*inputs)
            results.append(out[0] if isinstance(out, tuple) else out)
        assert torch.equal(*results) and results[0].stride() == results[1].stride()


def test_what_cannot_be_saved_says_so():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="InfoNCELoss: a process group can be neither saved nor copied"):
            pickle.dumps(InfoNCELoss(group=dist.group.WORLD))
    finally:
        dist.destroy_process_group()
