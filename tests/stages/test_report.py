import re
import shutil

from copgen_fast import train
from copgen_fast.runtime import artifacts
from copgen_fast.stages.report import table
from copgen_fast.training.metrics import read_rows
from tests.conftest import TINY
from tests.helpers.voc_fixtures import write_set


def test_the_page_is_self_contained_and_shows_everything(finished_run):
    page = (finished_run / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) >= 10
    assert all(re.match("data:image/(png|jpeg);base64,", source) for source in sources), "nothing is fetched"
    for words in ("random", "pixels", "identity", "gaussian", "untrained-navigator", "Scale of dz", "copgen_fast.study",
                  "Samples of the generator", "displacement E||T_z(z)||", "pretraining loss",
                  "lowshot top1 %, with its standard deviation",
                  "images/s", "views/s", "torch: ", "navigator.temperature: 0.1"):  # fmt: skip
        assert words in page, words


def test_the_page_says_which_embeddings_had_collapsed(copied_run):
    summary = copied_run / "pretrain" / "gaussian" / "simclr" / "summary.json"
    artifacts.write_record(summary, artifacts.read_record(summary) | {"embedding_std": 0.01})
    assert train.main([*TINY, "--out", str(copied_run)]) == 0
    lines = re.findall("<strong>(.*)</strong>", (copied_run / "report.html").read_text())
    assert [line for line in lines if "collapse" in line] == [
        "gaussian: the embeddings collapse, their standard deviation is 0.010 of that of uniform directions: try a "
        "smaller --pretrain.lr or a larger batch"
    ]


def test_rows_of_all_stages_are_joined(finished_run):
    rows = read_rows(finished_run / "metrics.jsonl")
    assert {row["stage"] for row in rows} == {"navigator"} | {
        f"pretrain.{name}" for name in ("identity", "gaussian", "untrained-navigator", "navigator")
    }
    assert len(rows) == 4 + 4 * 6


def test_the_table_has_a_column_for_whatever_numbers_come():
    results = {
        "random": {"linear_top1": 0.5, "seconds": 3.0},
        "mine": {"linear_top1": 0.25, "lowshot_top1": 0.5, "lowshot_std": 0.125, "lowshot_min": 0.3, "rankme": 7.125},
        "small": {"kernel": 0.00314, "kernel_std": 0.00021, "rankme": 0.0},
    }
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.text(results).splitlines()]
    assert lines == [
        ["linear top1 %", "lowshot top1 %", "lowshot min %", "rankme", "kernel"],
        ["random", "50.0"],
        ["mine", "25.0", "50.0 ± 12.5", "30.0", "7.12"],
        ["small", "0.00", "0.0031 ± 0.00021"],
    ]
    names = ["linear_top1", "lowshot_top1", "lowshot_min", "rankme", "kernel"]
    assert [column.name for column in table.columns(results)] == names
    assert table.columns({"mine": {"of_my_own": 0.5}})[0].text({"of_my_own": 0.5}) == "0.50", "no accuracy"


def test_the_main_columns_are_accuracies_of_evaluations():
    names = ["linear_top1", "linear_top5", "knn_top1", "knn_k20_t07_top1", "linear_augmented_top1_last", "rankme",
             "linear_augmented_top1_best", "semi_supervised_1pct_top1", "pairs_retrieval_top1", "mine_ap"]  # fmt: skip
    shown = table.columns({"random": dict.fromkeys(names, 0.5)})
    evaluations = ["linear", "knn", "linear-augmented", "semi-supervised", "pairs", "mine", "collapse"]
    assert [column.name for column in table.main(shown, evaluations)] == [names[i] for i in (0, 2, 4, 7, 9)]
    assert table.main(shown, ["collapse"]) == shown[:6]


def test_every_number_is_in_the_first_table_or_among_the_others(finished_run):
    first, _, others = (finished_run / "report.html").read_text().partition("more numbers</summary>")
    sources = [artifacts.read_record(path) for path in (finished_run / "probe").glob("*.json")]
    for column in table.columns(dict(enumerate(sources))):
        heading = f'<th scope="col">{column.title}</th>'
        assert (heading in first) == (column.name in ("linear_top1", "lowshot_top1", "knn_top1")), column.name
        assert (heading in first) != (heading in others.partition("</details>")[0])


def test_detections_are_shown_and_counted_in_per_cent(copied_run, tmp_path, capsys):
    write_set(tmp_path)
    shutil.rmtree(copied_run / "probe")  # other evaluations may be chosen as long as no result is there
    options = "iterations=1 batch=2 sizes=48 test_size=48 anchors=24 proposals=10 proposals_test=5 rois=8 precise_bn=0"
    words = [f"detection.{word}" for word in (f"root={tmp_path}", "train=2007-trainval", *options.split())]
    command = [*TINY, "--stages", "probe", "report", "--probe.evals", "detection", "--evals.options", *words]
    assert train.main([*command, "--out", str(copied_run)]) == 0
    said = capsys.readouterr().out
    assert "detection: left out for Flatten" in said and "detection ap50 %" in said
    page = (copied_run / "report.html").read_text()
    assert len(re.findall('<span>(.*)</span><img src="data:image/', page.partition("Detections in test")[2])) == 5
    shutil.move(tmp_path / "VOCdevkit", tmp_path / "moved" / "VOCdevkit")
    words[0] = f"detection.root={tmp_path / 'moved'}"
    command = [*TINY, "--stages", "probe", "--probe.evals", "detection", "--evals.options", *words]
    assert train.main([*command, "--out", str(copied_run)]) == 0, "where the images lie makes no other run"
