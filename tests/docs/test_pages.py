"""The README's size; links, pictures and numbers of README and docs."""

import json
import re

import pytest

from docs import make_calibration_tables, make_findings, make_speed_tables, make_structure_picture
from tests.docs.pages import PAGES, ROOT


def links(page):
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text())


def anchors(page):
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_stays_short():
    assert (ROOT / "README.md").stat().st_size <= 9_216


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_leads_to_every_page():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set(PAGES[1:]) <= linked


def test_every_picture_is_shown():
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert set((ROOT / "docs").glob("*.png")) <= shown


@pytest.mark.parametrize("page", make_speed_tables.PAGES, ids=lambda page: page.name)
def test_speeds_are_those_of_the_committed_results(page):
    """Otherwise run `python -m docs.make_speed_tables`."""
    assert make_speed_tables.updated(page.read_text()) == page.read_text()


@pytest.mark.parametrize("page", make_findings.PAGES, ids=lambda page: page.name)
def test_findings_are_those_of_the_committed_results(page):
    """Otherwise run `python -m docs.make_findings`."""
    assert make_findings.updated(page.read_text()) == page.read_text()


def test_calibrations_are_those_of_the_committed_results():
    """Otherwise run `python -m docs.make_calibration_tables`."""
    page = make_calibration_tables.PAGE.read_text()
    assert make_calibration_tables.updated(page) == page


def test_the_picture_of_the_structure_has_every_room():
    graph = make_structure_picture.read()
    assert {"ops", "generators", "stages", "train"} <= graph.keys() and "generators" in graph["stages"]


def test_detection_is_that_of_the_committed_results():
    page = (ROOT / "docs" / "evaluations.md").read_text()
    files = list((ROOT / "docs" / "detection").glob("*.json"))
    assert len(files) == 2
    for path in files:
        record = json.loads(path.read_text())
        (steps,) = (x.partition("=")[2] for x in record["options"] if x.startswith("detection.iterations="))
        names = ("ap", "ap50", "ap75", "coco_ap", "coco_ap50")
        ap, ap50, ap75, *coco = (f"{100 * record['results'][f'detection_{name}']:.1f}" for name in names)
        assert f"| {steps} | {ap} | {ap50} | {ap75} | {', '.join(coco)} |\n" in page
        assert all(x in page for x in record["options"] if not x.startswith(("detection.root", "detection.iterations")))


def test_a_ratio_that_noise_can_turn_round_is_not_quoted():
    row = {"ratio": 1.2, "ratio_low": 0.9, "ratio_high": 1.5}
    assert make_speed_tables.ratio(row) == "undecided"
    assert make_speed_tables.ratio(row | {"ratio_low": 1.1}) == "1.2x (1.1 to 1.5)"
    assert make_speed_tables.ratio({"ratio": 0.83, "ratio_low": 0.8, "ratio_high": 0.9}) == "0.83x (0.80 to 0.90)"
