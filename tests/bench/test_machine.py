"""What a file of results says of the machine."""

import pytest

from bench import machine


def test_stolen_time_is_a_share_of_all_cores_since_the_start(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 0 0 0 50 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    disturbance = machine.Disturbance(stat)
    assert disturbance.read()["steal"] is None, "no time has passed"
    stat.write_text("cpu  140 0 60 840 0 0 0 60 99 9\n")
    found = disturbance.read()
    assert found["steal"] == pytest.approx(0.1) and found["load_end"] >= 0


def test_steal_is_unknown_without_linuxs_counters(tmp_path):
    assert machine.Disturbance(tmp_path / "none").read()["steal"] is None
