"""How far positives may go: the rule, a world where the answer is known, `--navigator.delta auto` and the command."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from copgen_fast import generators, positives
from copgen_fast.config import NavigatorConfig, PairsConfig, PretrainConfig, RunConfig, faults
from copgen_fast.errors import UsageError
from copgen_fast.files import sha256
from copgen_fast.presets import PRESETS
from copgen_fast.stages import Run, _calibration
from copgen_fast.stages._calibration import Calibration, Same, by_group, calibrate, compare, propose
from copgen_fast.studies import _calibrate
from copgen_fast.train import main
from tests.conftest import TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("ratios", "expected", "note"),
    [
        ((1.0, 0.95, 0.85, 0.1), 2.5, ""),  # halfway between 0.95 and 0.85
        ((1.0, 0.8, 0.95, 0.95), 1.5, ""),  # where it falls first
        ((0.4, 0.3, 0.2, 0.1), 1.1 / 1.6, "less than the smallest distance tried"),  # 2 at distance 0
        ((1.0, 0.95, 0.95, 0.9), 4.0, "at least, as no distance tried is too far"),
    ],
)
def test_the_proposal_is_where_agreement_first_falls_below_its_part(ratios, expected, note):
    found = propose((1, 2, 3, 4), ratios, 2.0, 0.9)
    assert found.distance == pytest.approx(expected) and found.note.startswith(note) and bool(found.note) == bool(note)


def test_pairs_are_compared_by_cluster_retrieval_and_rank():
    at = torch.tensor
    h, h_prime = at([[0.0, 0], [0, 0], [4, 0]]), at([[1.0, 0], [3, 0], [4, 1]])
    unrelated, centres = at([[2.0, 0], [4, 0.5], [9, 0]]), [at([[0.0, 0], [4, 0]]), at([[0.0, 0], [2, 0]])]
    found = compare(h.double(), h_prime.double(), unrelated.double(), [c.double() for c in centres])
    assert found.cluster.tolist() == [[True, False, True], [True, False, True]]
    assert found.found.tolist() == [False, False, False]  # as near to an unrelated one; nearer; nearer
    assert found.rank.tolist() == pytest.approx([0, 1 / 3, 1 / 3])
    assert compare(h[:1], h[:1], unrelated, centres).means([2, 3]) == {
        "agreement": {"2": 1.0, "3": 1.0}, "retrieval_top1": 1.0, "rank": 0.0
    }  # fmt: skip


class Circle:
    """Latents are points about four corners of the unit circle; what phi sees of one is its direction."""

    latent_dim, latent_groups, classes, record = 2, (), 0, {"digest": "of the circle"}

    def sample(self, seed, count):
        random = np.random.RandomState(seed)
        angle = random.randint(4, size=count) * math.pi / 2 + random.uniform(-0.04, 0.04, count)
        return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)], 1)).float()


class Direction:
    def __init__(self, run, G):
        pass

    def __call__(self, z, labels, views=None):
        return torch.nn.functional.normalize(z.double())


@pytest.fixture
def circle(monkeypatch, tmp_path):
    """`calibrate` on a circle: one step sideways leaves a cluster where it is longer than 1."""
    monkeypatch.setattr(_calibration, "Phi", Direction)
    run = Run(PRESETS["quickstart"], tmp_path, CPU)
    run.encoder_file("identity").parent.mkdir(parents=True)
    run.encoder_file("identity").write_bytes(b"weights")
    z = _calibration.draw_anchors(run, Circle(), 400)
    sideways = torch.stack([-z[:, 1], z[:, 0]], 1)
    moves = {"equal": 0.8 * sideways, "spread": torch.linspace(0, 2, 400)[:, None] * sideways}

    def found(**options):
        return calibrate(
            run, Calibration(anchors=400, unrelated=400, clusters=(4,), **options), Circle(), run, z, moves
        )

    return found


def test_the_distance_is_found_where_it_is_known(circle):
    found = circle(distances=(0.5, 0.6, 0.9, 1.1))
    equal, spread = found["ways"]["equal"], found["ways"]["spread"]
    assert [point["agreement"]["4"] for point in equal["curve"]] == [1, 1, 1, 1, 0]
    assert [point["distance"] for point in equal["curve"]] == pytest.approx([0.5, 0.6, 0.8, 0.9, 1.1])  # 0.8: its own
    assert equal["proposal"] == pytest.approx(0.92) and equal["interval"] == pytest.approx([0.92, 0.92])
    # Lengths from 0 to 2 times the mean: all stay at 0.5, and 1 / 1.2 of them at 0.6.
    assert spread["curve"][1]["agreement"]["4"] == pytest.approx(1 / 1.2, abs=0.02)
    assert spread["proposal"] == pytest.approx(0.56, abs=0.02)
    low, high = spread["interval"]
    assert low < spread["proposal"] < high and high - low < 0.1
    assert found["reference"] == {"agreement": {"4": 1.0}, "retrieval_top1": 1.0, "rank": 0.0}
    assert found["chance"]["agreement"]["4"] == pytest.approx(0.25, abs=0.07)
    assert equal["curve"][0]["retrieval_top1"] < 0.01, "many unrelated points lie between"
    json.dumps(found)


def test_calibration_is_deterministic_and_its_grid_follows_the_prior(circle):
    found = circle()
    assert found == circle()
    assert [point["distance"] for point in found["ways"]["spread"]["curve"]][:3] == pytest.approx([0.05, 0.1, 0.15])
    assert circle(keep=1.0)["ways"]["equal"]["proposal"] <= found["ways"]["equal"]["proposal"]


def test_a_distance_suits_every_number_of_clusters():
    def same(*rates):
        return Same(
            torch.tensor([[1.0] * round(100 * r) + [0.0] * round(100 - 100 * r) for r in rates]) > 0, None, None
        )

    found = _calibration.proposals((1, 2), [same(1, 1), same(0.5, 0.8)], same(1, 1), 0.9)
    assert found["proposal_by_clusters"] == pytest.approx([1.2, 1.5]) and found["proposal"] == pytest.approx(1.2)


def test_groups_are_moved_one_at_a_time():
    dz = torch.arange(1.0, 7).view(1, 6)
    found = by_group({"gaussian": dz, "kept": torch.tensor([[1.0, 0, 0, 0, 0, 0]])}, (2, 4))
    assert list(found) == ["gaussian, group 0", "gaussian, group 1", "kept, group 0"]
    assert found["gaussian, group 1"].tolist() == [[0, 0, 3, 4, 5, 6]]
    assert torch.equal(found["gaussian, group 0"] + found["gaussian, group 1"], dz)


FEW = ["--anchors", "40", "--unrelated", "64", "--clusters", "4", "8", "--distances", "0.5", "3"]


def test_a_run_is_calibrated_by_its_identity_encoder_or_one_made_like_it(copied_run, capsys):
    shutil.rmtree(copied_run / "pretrain" / "gaussian")  # not needed
    assert _calibrate.main([str(copied_run), *FEW]) == 0
    first = json.loads((copied_run / "calibration" / "calibration.json").read_text())
    out = capsys.readouterr().out
    assert list(first["ways"]) == ["gaussian", "untrained-navigator", "navigator"]
    assert re_found(out, "navigator", first["ways"]["navigator"]["proposal"]) and "two views" in out
    assert (copied_run / "calibration" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert 0 < first["reference"]["agreement"]["8"] <= 1
    # The same encoder to the bit, pretrained on pairs that are drawn meanwhile.
    shutil.rmtree(copied_run / "pretrain")
    assert _calibrate.main([str(copied_run), *FEW]) == 0
    second = json.loads((copied_run / "calibration" / "calibration.json").read_text())
    assert second.pop("encoder") == "calibration/pretrain/identity/simclr/encoder.safetensors"
    assert first.pop("encoder") == "pretrain/identity/simclr/encoder.safetensors"
    first.pop("record_sha256"), second.pop("record_sha256")
    assert second == first


def re_found(text, name, value):
    return any(line.split()[:2] == [name, f"{value:.3g}"] for line in text.splitlines())


def test_what_can_not_be_calibrated_is_refused_in_a_line(tmp_path, copied_run):
    with pytest.raises(UsageError, match="is no run folder, it has no config.json"):
        _calibrate.main([str(tmp_path)])
    with pytest.raises(UsageError, match="expected .* of at most 64"):
        _calibrate.main([str(copied_run), "--unrelated", "64", "--clusters", "65"])
    (copied_run / "navigator" / "navigator.safetensors").unlink()
    with pytest.raises(UsageError, match=r"navigator.safetensors is missing: run `--stages navigator`"):
        _calibrate.main([str(copied_run), *FEW])
    run = Run(RunConfig(pairs=PairsConfig(positives=("identity",))), tmp_path, CPU)
    G = generators.load(PRESETS["quickstart"].generator, CPU)
    with pytest.raises(UsageError, match="none of them moves z"):
        _calibration.displacements(run, G, torch.zeros(3, 64))


@pytest.fixture
def few(monkeypatch):
    """`auto` by few images."""
    options = functools.partial(Calibration, anchors=40, unrelated=64, clusters=(4,), distances=(0.5, 3.0))
    monkeypatch.setattr(_calibration, "Calibration", options)


def run_auto(folder, *words):
    return main([*TINY, "--out", str(folder), "--navigator.delta", "auto", *words])


def test_delta_is_found_once_and_a_resumed_run_keeps_it(tmp_path, few, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert run_auto(folder, "--stages", "navigator", "--navigator.init", "near-zero") == 0
    record = json.loads((folder / "navigator" / "delta.json").read_text())
    way = record["calibration"]["ways"]["untrained-navigator"]
    assert record["delta"] == way["proposal"] > 0
    assert f"navigator.delta: {record['delta']:.3g} by calibration" in capsys.readouterr().out
    assert json.loads((folder / "config.json").read_text())["navigator.delta"] == "auto"
    trained = sha256(folder / "navigator" / "navigator.safetensors")

    monkeypatch.setattr(_calibration, "calibrate", None)  # what was found is read
    for path in folder.glob("navigator/*"):
        if path.name != "delta.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run_auto(folder, "--stages", "navigator", "--navigator.init", "near-zero") == 0
    assert sha256(folder / "navigator" / "navigator.safetensors") == trained
    assert main([*TINY, "--out", str(folder), "--stages", "navigator", "--navigator.init", "near-zero"]) == 2
    assert "navigator.delta (auto there, None here)" in capsys.readouterr().err


def test_auto_is_the_radius_of_projection_in_later_stages(tmp_path, few, capsys):
    words = ["--navigator.project", "--pairs.positives", "navigator", "untrained-navigator"]
    assert run_auto(tmp_path / "early", *words, "--stages", "pairs") == 2
    assert "navigator.delta: auto is found by the navigator stage: run" in capsys.readouterr().err
    folder = tmp_path / "run"
    assert run_auto(folder, *words, "--stages", "navigator", "pairs") == 0
    config = dataclasses.replace(
        PRESETS["quickstart"],
        navigator=dataclasses.replace(PRESETS["quickstart"].navigator, delta="auto", project=True),
    )
    run = Run(config, folder, CPU)
    G = generators.load(config.generator, CPU)
    z = G.sample(0, 50)
    for name in ("navigator", "untrained-navigator"):
        norms = (positives.build(name, run.setting(G, None))(z, range(50)) - z).norm(dim=1)
        assert norms.max() <= run.navigator.delta + 1e-5


def test_a_start_beyond_delta_is_told(capsys):
    found = {"proposal": 1.0, "interval": [0.9, 1.1], "note": "", "distance": 2.0}
    _calibration.tell(found, projected=False)
    assert "warning: navigator.delta: T_z starts at E||T_z(z)|| 2, so that training ends" in capsys.readouterr().out
    _calibration.tell(found, projected=True)
    assert "warning" not in capsys.readouterr().out
    _calibration.tell(found | {"note": "at least"}, projected=True)
    assert "warning: navigator.delta: at least; an encoder that learned little" in capsys.readouterr().out


def test_an_augmentation_is_needed_to_learn_from_identity_pairs(tmp_path, capsys):
    config = PRESETS["quickstart"]
    plain = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, augmentation="none"))
    assert _calibration.augmentation_of(config) == "digits" == _calibration.augmentation_of(plain)
    neither = dataclasses.replace(plain, navigator=dataclasses.replace(config.navigator, augmentation="none"))
    with pytest.raises(UsageError, match="both --pretrain.augmentation and --navigator.augmentation are none: give"):
        _calibration.augmentation_of(neither)
    words = ["--stages", "navigator", "--pretrain.augmentation", "none", "--navigator.augmentation", "none"]
    assert run_auto(tmp_path / "run", *words) == 2
    assert not (tmp_path / "run").exists() and "are none: give one, or a number" in capsys.readouterr().err


def test_auto_needs_enough_pairs_for_a_batch():
    config = RunConfig(
        stages=("navigator",), navigator=NavigatorConfig(delta="auto"), pairs=PairsConfig(count=10),
        pretrain=PretrainConfig(batch=11),
    )  # fmt: skip
    (fault,) = faults(config)
    assert fault.startswith("navigator.delta: auto pretrains an encoder on 10 identity pairs")
    assert faults(dataclasses.replace(config, navigator=NavigatorConfig(delta="auto", project=True))) == [fault]
    assert not faults(dataclasses.replace(config, navigator=NavigatorConfig(delta=1.0)))
