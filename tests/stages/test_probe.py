"""The probe stage keeps nothing of an encoder that it has evaluated."""

import gc
import weakref

from copgen_fast.evals import FrozenEncoder
from copgen_fast.train import main


def test_features_are_freed_once_an_encoder_is_evaluated(tmp_path, monkeypatch):
    known, split_features = [], FrozenEncoder.split_features

    def seen(*arguments):
        found = split_features(*arguments)
        known.append(weakref.ref(found.features))
        return found

    monkeypatch.setattr(FrozenEncoder, "split_features", seen)
    words = ["--stages", "probe", "--probe.baselines-only", "--probe.evals", "knn", "--device", "cpu"]
    assert main(["quickstart", *words, "--out", str(tmp_path / "run")]) == 0
    gc.collect()
    assert len(known) == 4 and not any(of() is not None for of in known), "of an untrained encoder, and of pixels"
