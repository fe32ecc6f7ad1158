import re

from copgen_fast.stages.report import table
from copgen_fast.training.metrics import read_rows


def test_the_page_is_self_contained_and_shows_everything(finished_run):
    page = (finished_run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 15
    assert all(source.startswith("data:image/png;base64,") for source in sources), "nothing is fetched from elsewhere"
    for words in ("random", "pixels", "identity", "gaussian", "untrained-navigator", "COP-Gen, 0.5 x T(z)",
                  "Samples of the generator", "displacement E||T(z)||", "pretraining loss", "low-shot accuracy",
                  "images/s", "views/s", "torch: ", "navigator.temperature: 0.1"):  # fmt: skip
        assert words in page, words


def test_rows_of_all_stages_are_joined(finished_run):
    rows = read_rows(finished_run / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"navigator"} | {
        f"pretrain.{name}" for name in ("identity", "gaussian", "untrained-navigator", "navigator")
    }
    assert len(rows) == 4 + 4 * 6


def test_the_terminal_table_shows_per_cent():
    text = table({"random": {"linear_top1": 0.5, "knn_top1": 0.25}, "pixels": {"linear_top1": 1.0, "knn_top1": 0.125}})
    assert [line.split() for line in text.splitlines()] == [
        ["method", "linear", "kNN"],
        ["random", "50.0", "25.0"],
        ["pixels", "100.0", "12.5"],
    ]
