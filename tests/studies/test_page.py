"""A study's page: complete, in one file, small, and usable without pictures."""

import html
import re

import pytest

from copgen_fast.statistics.summary import summarize
from copgen_fast.studies import _charts, _page, _tables
from tests.helpers import pairs_fixtures
from tests.helpers.study_results import GAIN, study_results, write_files


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    results = write_files(study_results(states={("identity", 4): "failed"}), folder)
    for name, run in (("identity", results["runs"][0]), ("gaussian", results["runs"][5])):
        pairs_fixtures.write(folder / run["folder"] / "pairs" / name)
    _page.write(results, summarize(results, folder, resamples=200), folder)
    return (folder / "study.html").read_text()


def test_the_page_is_one_file_with_everything(page):
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 3 + 2 and all(source.startswith("data:image/") for source in sources)
    assert len(page) < 3_000_000 and "<script" not in page and "http" not in page
    text = html.unescape(page)
    for words in ("Positives on noise", "linear top1 % against E||dz||", "Pretraining loss, mean and",
                  "identity, seed 4 failed: NaN in the loss", "19 of 20 runs are done", "holds 0", "torch: 9.9",
                  "over test images", "52.33", "gaussian.distance=2.1"):  # fmt: skip
        assert words in text, words


def test_every_picture_is_described(page):
    descriptions = re.findall(r'<img[^>]* alt="([^"]*)"', page)
    assert len(descriptions) == page.count("<img") and all(len(text) > 20 for text in descriptions)
    assert "gaussian d=1.4 4" in descriptions[0], "values are told"


def test_a_study_of_which_nothing_is_done_has_a_page(tmp_path):
    results = study_results(states={(name, seed): "waiting" for name in GAIN for seed in range(5)})
    results["references"] = []
    _page.write(results, summarize(results), tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert "0 of 20 runs are done" in page and "<img" not in page


def test_arms_that_differ_in_distance_alone_are_one_line():
    summary = summarize(study_results())
    groups = [_charts.group_of(arm, summary) for arm in summary.arms if not arm.reference]
    assert groups == ["identity", "gaussian", "gaussian", "navigator"]
    results = study_results()
    for index, arm in enumerate(results["study"]["arms"]):
        arm["settings"] = arm["settings"] | {
            "pretrain.augmentation": ["none", "simclr"][index % 2],
            "pretrain.epochs": "3",
        }
    summary = summarize(results)
    groups = [_charts.group_of(arm, summary) for arm in summary.arms if not arm.reference]
    assert groups == ["identity, augmentation none", "gaussian, augmentation simclr", "gaussian, augmentation none",
                      "navigator, augmentation simclr"]  # fmt: skip


def test_more_groups_than_colours_are_told_apart():
    assert len({_charts.style_of(index) for index in range(3 * _charts.LINES)}) == 3 * _charts.LINES
    markers = [_charts.style_of(index)[2] for index in (0, _charts.LINES)]
    assert markers[0] != markers[1], "single points have no line"


def test_arms_without_distances_are_each_their_own():
    results = study_results()
    for arm in results["study"]["arms"]:
        arm["settings"] = {"pretrain.lr": str(len(arm["name"]))}
    summary = summarize(results)
    assert [_charts.group_of(arm, summary) for arm in summary.arms[:4]] == list(GAIN)


def test_curves_are_over_the_steps_that_all_seeds_have():
    logs = {
        "one": [[{"step": i, "loss": 1.0} for i in range(n)] for n in (3, 5)],
        "alone": [[{"step": 0, "loss": 2.0}]],
    }
    assert _charts.curves(logs).startswith(b"\x89PNG")


def test_numbers_that_are_no_accuracies_are_drawn_as_they_are():
    results = study_results(metric="mi_lower_bound")
    summary = summarize(results)
    column = _tables.columns_of(summary)["mi_lower_bound"]
    assert not column.percent and _charts.dots(summary, column) and _charts.against_distance(summary, column)


def test_what_one_way_alone_is_given_does_not_name_its_line():
    results = study_results()
    results["study"]["arms"][3]["settings"] |= {"navigator.project": "True", "navigator.delta": "1.4"}
    assert _charts.group_of(summarize(results).arm("navigator d=1.4"), summarize(results)) == "navigator"
