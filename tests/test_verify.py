import shutil

from copgen_fast.verify import main


def test_a_runs_pairs_are_made_again_and_compared(finished_run, capsys):
    assert main([str(finished_run), "--samples", "20", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["identity", "gaussian", "untrained-navigator", "navigator"]
    assert all("3 shards as recorded; 20 pairs made again" in line for line in lines)


def test_an_altered_shard_and_an_altered_navigator_are_named(finished_run, copied_run, capsys):
    shard = copied_run / "pairs" / "gaussian" / "shard-000001.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    assert main([str(copied_run), "--device", "cpu"]) == 1
    assert "gaussian/shard-000001.tar is altered" in capsys.readouterr().err
    shutil.copy(finished_run / "pairs" / "gaussian" / "shard-000001.tar", shard)
    navigator = copied_run / "navigator"
    shutil.copy(navigator / "kept" / "0000000000.safetensors", navigator / "navigator.safetensors")
    assert main([str(copied_run), "--device", "cpu"]) == 2
    assert "holds other pairs: navigator_digest" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.json is missing" in capsys.readouterr().err
