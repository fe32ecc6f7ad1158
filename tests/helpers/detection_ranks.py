"""A detector trained by one of several processes; test_detection.py starts them."""

import os

import torch

from copgen_fast import evaluate, registry
from copgen_fast.config import RunConfig
from copgen_fast.evals import _detection_training as training
from copgen_fast.evals._faster_rcnn import FasterRCNN
from copgen_fast.images import voc
from copgen_fast.runtime import distributed
from tests.helpers.voc_fixtures import tiny_encoder

CPU = torch.device("cpu")
WORDS = "iterations=2 batch=4 lr=0.01 warmup=0 sizes=48,64 test_size=64 max_size=80 anchors=16,32 proposals=40 rois=8 "
WORDS += "proposals_test=10 precise_bn=1"


def trained(ranks, root, folder):
    """Final state in float64, and what is found in the test images."""
    config = registry.options("evals", "detection", WORDS.split())
    train = voc.read(root, ["2007-trainval"])
    test = voc.read(root, ["2007-test"])
    torch.manual_seed(0)
    detector = FasterRCNN(tiny_encoder(), 2, (0.5,) * 3, (0.5,) * 3, config.shape()).double()
    run = RunConfig(log_every=1)
    detector = training.train(detector, train.images, config.recipe(), run, folder, ranks)
    found = training.detect(detector, test.images, config.recipe(), "fp32", ranks)
    return {"state": detector.state_dict(), "found": [tuple(each) for each in found]}


def rank_main(rank, world, ports, root, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    with distributed.joined(CPU, 60.0) as ranks:
        torch.save(trained(ranks, root, folder), folder / f"{rank}.pt")
    os.environ["MASTER_PORT"] = ports[1]
    words = [f"detection.{word}" for word in (f"root={root}", "train=2007-trainval", *WORDS.split())]
    options = ["--evals", "detection", "--evals.options", *words, "--device", "cpu"]
    return evaluate.main([str(folder / "encoder.pth"), *options])
