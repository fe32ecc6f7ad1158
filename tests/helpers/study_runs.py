"""A study of seconds: the words of its command, and what its runs found."""

import json

TINY = """--device cpu --log-every 1 --save-every 1 --generator.level published
    --navigator.samples 16 --navigator.batch 8 --navigator.delta None --navigator.estimator.width 8
    --pairs.count 16 --pairs.shard-size 8 --pairs.batch 8 --pairs.workers 0
    --pretrain.epochs 2 --pretrain.batch 8 --pretrain.encoder.width 8 --pretrain.workers 0
    --pairs.size 16 --navigator.view-size 16 --data.image-size 16 --probe.evals knn""".split()
ARMS = "--vary pairs.positives=identity,navigator pretrain.augmentation=digits,none".split()

ONE = ["--vary", "pairs.positives=identity"]


def words(folder, *other, arms=ARMS, seeds="0,1"):
    """A study's command, two runs side by side."""
    return ["quickstart", "--seeds", seeds, *arms, *TINY, "--jobs", "2", "--out", str(folder), *other]


def found(folder):
    """Numbers of a study's runs and baselines by arm and seed, without times; the runs' states."""
    results = json.loads((folder / "results.json").read_text())
    entries = results["runs"] + results["references"]
    numbers = {
        (entry["arm"], entry["seed"]): {name: x for name, x in entry["numbers"].items() if name != "seconds"}
        for entry in entries
    }
    return numbers, {(entry["arm"], entry["seed"]): entry["state"] for entry in results["runs"]}
