"""A study's results.json as `studies` writes it, without running anything, and files of its runs."""

import json

import numpy as np
import torch

from copgen_fast.runtime import artifacts

WAYS = {"identity": 0.0, "gaussian d=1.4": 1.4, "gaussian d=2.1": 2.1, "navigator d=1.4": 1.4}
GAIN = {"identity": 0.0, "gaussian d=1.4": 0.04, "gaussian d=2.1": 0.05, "navigator d=1.4": 0.001}
IMAGES = 1000


def settings_of(name):
    way, _, distance = name.partition(" d=")
    return {"pairs.positives": way} | ({f"positive.options.{way}.distance": distance} if distance else {})


def study_results(seeds=(0, 1, 2, 3, 4), **changes):
    """Four arms and two references; the failed and the waiting runs are those of `changes`, {(arm, seed): state}."""
    states, rng = changes.pop("states", {}), np.random.default_rng(0)
    study = {
        "title": "Positives on noise",
        "preset": "quickstart",
        "settings": {"pretrain.augmentation": "none"},
        "baseline": "identity",
        "metric": "linear_top1",
        "columns": ["knn_top1", "mi_lower_bound"],
        "published": {"gaussian d=1.4": {"linear_top1": 0.5233}},
        "source": "Li et al. 2022, Table 3",
        "seeds": list(seeds),
        "arms": [{"name": name, "settings": settings_of(name)} for name in WAYS],
    } | changes
    luck = {seed: rng.normal(0, 0.02) for seed in seeds}
    runs = [
        run_of(name, seed, 0.4 + GAIN[name] + luck[seed] + rng.normal(0, 0.004), WAYS[name], states.get((name, seed)))
        for name in WAYS
        for seed in seeds
    ]
    references = [
        run_of(name, seed, top1, None) for name, top1 in (("random", 0.31), ("pixels", 0.28)) for seed in seeds
    ]
    return {"study": study, "runs": runs, "references": references}


def run_of(name, seed, top1, distance, state=None):
    numbers = {"linear_top1": top1, "knn_top1": top1 - 0.05, "seconds": 1.0}
    if distance is not None:
        numbers |= {"displacement_norm": distance, "mi_lower_bound": 3.0 - distance / 10, "pretrain_loss": 2.0}
    state = state or "done"
    return {
        "arm": name,
        "seed": seed,
        "folder": f"runs/{name.replace(' ', '_')}/seed-{seed}"
        if distance is not None
        else f"runs/identity/seed-{seed}",
        "state": state,
        "error": "NaN in the loss" if state == "failed" else None,
        "source": settings_of(name)["pairs.positives"],
        "numbers": numbers if state == "done" else {},
    }


def write_files(results, folder):
    """Logs of pretraining, and which images were right, of every finished run."""
    rng, difficulty = np.random.default_rng(1), torch.arange(0.5, IMAGES, dtype=torch.float64) / IMAGES
    for run in (*results["runs"], *results["references"]):
        if run["state"] == "done":
            path, right = folder / run["folder"], {}
            for name in ("linear_top1", "knn_top1"):
                right[name] = difficulty < run["numbers"][name]
                run["numbers"][name] = right[name].double().mean().item()
            artifacts.write_tensors(path / "probe" / f"{run['source']}.images.safetensors", right, source=run["source"])
            if run["arm"] in WAYS:
                rows = [{"step": step, "samples": step, "loss": 5 - step / 9 + rng.normal() / 5} for step in range(20)]
                log = "".join(json.dumps(row) + "\n" for row in rows).encode()
                artifacts.write_bytes(path / "pretrain" / run["source"] / "simclr" / "metrics.jsonl", log)
                artifacts.write_record(path / "versions.json", {"torch": "9.9"})
    return results
