"""The part of a report that moves: what its pictures show, how many bytes they take, and its controls in a browser."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from copgen_fast import generators
from copgen_fast.config import PairsConfig
from copgen_fast.positives.navigator import untrained
from copgen_fast.presets import PRESETS
from copgen_fast.runtime import artifacts
from copgen_fast.stages import Run, report
from copgen_fast.stages.report import LIMIT
from copgen_fast.stages.report.explorer import explore, plan
from copgen_fast.stages.report.scene import COLUMNS, Scene
from copgen_fast.train import parse
from tests.conftest import TINY
from tests.helpers import chromium

CPU = torch.device("cpu")


class Page(HTMLParser):
    """The tags of a page, with their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.script, self.inside = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes), list(self.inside)))
        if tag not in ("meta", "img", "input", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag, "tags are closed in order"

    def handle_data(self, data):
        self.script += data if self.inside[-1:] == ["script"] else ""

    def all(self, tag):
        return [attributes for name, attributes, _ in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(finished_run):
    return Page((finished_run / "report.html").read_text())


def pixels_of(uri):
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(picture.convert("RGB")).astype(int)


def test_sheets_show_what_the_generator_makes(page, finished_run):
    """The latents of the written pairs and of kept navigators, at every scale."""
    sheets = [tag for tag in page.all("img") if "data-way" in tag]
    kept = sorted((finished_run / "navigator" / "kept").glob("*.safetensors"))
    times = ["before training", "after 32 latents", "after 64 latents"]
    assert [(sheet["data-way"], sheet["data-time"]) for sheet in sheets] == [
        *(("gaussian", ""), ("untrained-navigator", "")),
        *(("navigator", time) for time in times),
    ]
    G = generators.build("digits")
    for sheet in sheets:
        shard = finished_run / "pairs" / sheet["data-way"] / "shard-000000.safetensors"
        tensors = artifacts.read_tensors(shard)
        z, dz = tensors["z"], tensors["z_positive"] - tensors["z"]
        if sheet["data-time"]:
            T = artifacts.read_tensors(kept[times.index(sheet["data-time"])])
            hidden = F.linear(z, T["walker.0.weight"], T["walker.0.bias"]).relu()
            dz = F.linear(hidden, T["walker.2.weight"], T["walker.2.bias"])
        assert float(sheet["data-distance"]) == pytest.approx(dz.norm(dim=1).mean().item(), rel=1e-4)
        shown = pixels_of(sheet["src"])
        assert shown.shape == (9 * 32, COLUMNS * 32, 3)
        for row, scale in ((0, 0.0), (3, 0.75), (8, 2.0)):
            images = ((G(z + scale * dz).clamp(-1, 1) + 1) * 127.5).permute(2, 0, 3, 1).reshape(32, COLUMNS * 32, 3)
            difference = np.abs(shown[32 * row : 32 * row + 32] - images.numpy())
            assert difference.mean() < 2.5, (sheet["data-way"], scale)


def test_a_page_needs_no_network_and_every_part_has_words(page, finished_run):
    assert (finished_run / "report.html").stat().st_size < LIMIT / 2
    labelled = {tag["for"] for tag in page.all("label") if "for" in tag}
    inputs = [(tag, inside) for name, tag, inside in page.tags if name == "input"]
    assert len(inputs) == 5 and all(tag.get("id") in labelled or "label" in inside for tag, inside in inputs)
    assert all(tag["alt"] and tag["src"].startswith("data:image/") for tag in page.all("img"))
    assert not page.all("link") and not any("src" in tag for tag in page.all("script"))
    assert not re.search(r"https?:|fetch|import|XMLHttp", page.script)
    assert [tag["for"] for tag in page.all("output")] == ["scale", "time"]


class Waves(nn.Module):
    """Images with as much in them as photographs have, of classes."""

    latent_dim, latent_groups, latent_shape = 6, (2, 4), (6,)

    def __init__(self, classes=0, side=128):
        super().__init__()
        self.classes, self.image_shape = classes, (3, side, side)
        self.register_buffer("waves", torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(0)))
        self.waves = 4 * F.avg_pool2d(self.waves, 15, 1, 7)

    def forward(self, z, labels=None):
        images = torch.einsum("nk,kchw->nchw", z, self.waves)
        return (images if labels is None else images + labels[:, None, None, None] / 10).clamp(-1, 1)


def scene_of(classes=0, side=128):
    z = torch.randn(COLUMNS, 6, generator=torch.Generator().manual_seed(1))
    return Scene(Waves(classes, side), CPU, z, list(range(COLUMNS)))


def run_of(*ways, folder=Path("."), options=()):
    pairs = PairsConfig(positives=ways, options=options)
    return Run(dataclasses.replace(PRESETS["quickstart"], pairs=pairs), folder, CPU)


@pytest.mark.parametrize("budget", [1_200_000, 300_000])
def test_large_images_are_made_to_fit(budget):
    ways = "gaussian", "untrained-navigator"
    found = explore(run_of(*ways, options=("gaussian.groups=1",)), scene_of(classes=4), budget)
    assert sum(len(sheet.picture) for sheet in found.sheets) <= budget
    assert found.size == (80, 80) and found.smaller and found.conditional and found.ways == list(ways)
    assert found.times == [] and found.first == "gaussian"
    for sheet in found.sheets:
        assert Image.open(io.BytesIO(sheet.picture)).size == (80 * COLUMNS, 80 * (found.steps + 1))


def test_ways_that_do_not_move_latents_are_left_out():
    assert explore(run_of("identity"), scene_of(), 10**6) is None
    assert explore(run_of("identity", "gaussian"), scene_of(), 10**6).ways == ["gaussian"]


def test_of_many_kept_navigators_the_first_the_last_and_some_between_are_shown(tmp_path):
    run = run_of("navigator", folder=tmp_path)
    files = [tmp_path / "navigator" / "kept" / f"{1000 * number:010d}.safetensors" for number in range(21)]
    for seed, path in enumerate((run.navigator_file, *files)):
        artifacts.write_tensors(path, untrained(6, run.config.navigator, seed).state_dict())
    found = explore(run, scene_of(side=16), 10**6)
    assert found.kept == 21 and not found.smaller and found.steps == 8
    shown = [0, 2, 5, 7, 10, 12, 15, 17, 20]
    assert found.times == ["before training", *(f"after {number},000 latents" for number in shown[1:])]
    assert len({sheet.picture for sheet in found.sheets}) == len({sheet.distance for sheet in found.sheets}) == 9


@pytest.mark.parametrize(
    ("ways", "earlier", "budget", "expected"),
    [
        (3, 5, 10**6, (8, 5)),
        (3, 20, 10**6, (8, 8)),
        (1, 10, 45_000, (8, 4)),
        (1, 10, 44_000, (4, 7)),
        (1, 2, 27_000, (8, 2)),
        (2, 10, 16_000, (2, 3)),
        (9, 10, 5_000, (2, 0)),
        (1, 0, 10**6, (8, 0)),
    ],
)
def test_scales_are_left_out_before_times(ways, earlier, budget, expected):
    assert plan(1000, ways, earlier, budget) == expected


STATE = """(() => {
    const text = name => document.querySelector(`output[for=${name}]`).textContent;
    const canvas = document.querySelector('canvas');
    const at = document.activeElement;
    return {scale: text('scale'), time: text('time'), label: canvas.getAttribute('aria-label'),
            picture: canvas.toDataURL(), sheets: document.querySelector('.sheets').checkVisibility(),
            at: at.id || at.value, disabled: document.getElementById('time').disabled,
            ring: getComputedStyle(at).outlineStyle};
})()"""


@pytest.mark.skipif(chromium.PATH is None, reason="there is no chromium")
def test_keys_move_the_sliders_and_the_picture_follows(finished_run, copied_run, tmp_path):
    with chromium.browser(tmp_path / "profile") as page:
        page.open(finished_run / "report.html")
        first = page.value(STATE)
        assert not first["sheets"], "in place of the sheets"
        assert first["scale"].startswith("1 × dz, mean distance ") and first["time"] == "after 64 latents"

        def distance(state):
            return float(state["scale"].partition("distance ")[2])

        page.value("document.querySelector('[name=way]:checked').focus()")
        seen = [first["picture"]]

        def after(*keys):
            for key in keys:
                page.press(key)
            state = page.value(STATE)
            seen.append(state["picture"])
            return state

        state = after("Tab", "ArrowRight")
        assert state["at"] == "scale" and state["ring"] == "solid"
        assert state["scale"].startswith("1.25 × dz") and "by navigator after 64 latents at 1.25" in state["label"]
        state = after("End")
        assert state["scale"].startswith("2 × dz") and distance(state) == pytest.approx(2 * distance(first), abs=0.02)
        assert after("Tab", "ArrowLeft")["time"] == "after 32 latents"
        assert after("Home")["time"] == "before training"
        page.value("document.querySelector('[name=way]:checked').focus()")
        state = after("ArrowLeft")
        assert state["at"] == "untrained-navigator" and state["disabled"] and state["time"] == "of the navigator alone"
        assert state["picture"] == seen[-2], "which is the navigator before training"
        assert after("ArrowLeft")["at"] == "gaussian"
        assert len(set(seen)) == len(seen) - 1
        page.value("document.getElementById('scale').focus()")
        anchors = after("Home")
        assert anchors["scale"] == "0 × dz, mean distance 0.00"
        assert all(address.startswith(("file:", "data:")) for address in page.requests())

        config = parse([*TINY, "--pairs.positives", "identity", "gaussian"])
        report.run(Run(config, copied_run, CPU))
        page.open(copied_run / "report.html")
        alone = "[document.querySelector('fieldset').checkVisibility(), document.getElementById('time')]"
        assert page.value(alone) == [False, None], "of one way that moves latents, and none that is trained"
        label = page.value("document.querySelector('canvas').getAttribute('aria-label')")
        assert label == "Anchors above their positives by gaussian at 1 times dz"

        page.call("Emulation.setScriptExecutionDisabled", value=True)
        page.open(finished_run / "report.html")
        shown = (
            "[document.querySelector('.sheets').checkVisibility(), document.querySelector('form').checkVisibility()]"
        )
        assert page.value(shown) == [True, False]
