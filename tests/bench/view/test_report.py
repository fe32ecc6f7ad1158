"""`python -m bench report`: the page and its plots from recorded results."""

import base64
import json
import re
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from bench.__main__ import main
from bench.view import plots, report

RESULTS = Path(__file__).parents[3] / "bench" / "results"


def row(area, case, peer, ours_ms, peer_ms, **changed):
    found = {"area": area, "case": case, "device": "cpu", "backend": "b", "precision": "fp32", "direction": "step"}
    found |= {"ours_ms": ours_ms, "ours_spread": 1.1, "peer": peer, "peer_ms": peer_ms, "ratio": peer_ms / ours_ms}
    found |= {"limit": "all there is", "limit_ms": ours_ms / 2, "of_limit": 0.5, "peak_mb": None, "peer_peak_mb": 3.0}
    return found | {"n": 5} | changed


ROWS = [
    row("navigator", "bigbigan B=8 128px", "reference form", 4000.0, 11000.0),
    row("navigator", "bigbigan B=8 128px", "reference form", 2000.0, 11000.0, precision="bf16"),
    *(row("info_nce", f"N={n} D=128", "plain & <simple>", n / 100, n / 10, peak_mb=1.0) for n in (224, 1024)),
    row("info_nce", "N=4096 D=128", "tiles", 41.0, 400.0, peak_mb=2.0),
    row("generator", "bigbigan B=8 128px exact, without spectral", "all rewrites", 3.0, 2.0),
    row("generator", "bigbigan B=8 128px exact, without attention", "all rewrites", 1.9, 2.0),
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(
        json.dumps({"machine": {"cpu": "quick"}, "versions": {"torch": "2"}, "commit": "abc", "rows": ROWS})
    )
    return path


def test_the_command_writes_a_page_and_its_plots(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["report", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.split("\n")
    names = {path.name for path in out.iterdir()}
    assert (
        names
        == {Path(line).name for line in printed if line}
        == {
            "report.html",
            "navigator-step-cpu.png",
            "info-nce-step-cpu.png",
            "info-nce-step-cpu-fp32-over-N.png",
            "generator-step-cpu-ablation.png",
        }
    )
    page = (out / "report.html").read_text()
    assert "plain &amp; &lt;simple&gt;" in page and "<simple>" not in page
    assert "cpu quick" in page and "commit abc" in page and "reference form" in page
    assert page.count("<tr title") == len(ROWS)
    assert "2.75x" in page and 'class="pass"' in page, "targets are on the page"
    embedded = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(embedded) == 4
    for picture in embedded:
        assert base64.b64decode(picture) in {path.read_bytes() for path in out.glob("*.png")}


def test_the_committed_results_are_drawn(tmp_path):
    paths = [RESULTS / name for name in ("generator-cpu.json", "info_nce-cpu.json", "kernels.json")]
    written = report.write(tuple(paths), tmp_path)
    assert len(written) > 5
    for path in written[1:]:
        with Image.open(path) as image:
            assert image.width > 600 and image.height > 200
            assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 8, f"{path.name} is empty"


def test_every_bar_and_word_of_a_plot_is_inside_it(monkeypatch):
    """Bars, labels and the legend overlap nothing of another kind."""
    drawn = []
    monkeypatch.setattr(plots, "png", lambda figure: drawn.append(figure) or b"")
    long = {f"a peer with a name of many words, number {i}": 10.0**i for i in range(6)}
    measured = [plots.Group(f"case {i} with a long name, fp32", 1.0, 0.01, long) for i in range(3)]
    plots.bars(measured, "title")
    plots.ablation(ROWS[-2:], "title")
    for figure in drawn:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        (axes,) = figure.axes
        boxes = [text.get_window_extent(renderer) for text in axes.texts]
        ticks = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        whole = figure.bbox
        for box in (*boxes, *ticks):
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1
        for one, other in zip(boxes, boxes[1:], strict=False):
            assert not one.overlaps(other)
        for legend in figure.legends:
            assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))


def test_nothing_to_draw_is_said(tmp_path, capsys):
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"rows": [{"kernel": "k"}]}))
    assert main(["report", str(empty), "--out", str(tmp_path / "out")]) == 2
    assert "nothing to draw" in capsys.readouterr().err and not (tmp_path / "out").exists()
