import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from copgen_fast.errors import CopgenError
from copgen_fast.pairs.codecs import CODECS
from copgen_fast.pairs.write.encoding import Encoders

PIXELS = np.random.RandomState(0).randint(0, 256, (2, 37, 5, 7, 3)).astype(np.uint8)


@pytest.fixture
def opened():
    """Makes Encoders whose memory holds PIXELS after 11 other bytes."""
    made = []

    def make(codec, workers):
        encoders = Encoders(codec, workers)
        made.append(encoders)
        if encoders.memory is not None:
            os.pwrite(encoders.memory, PIXELS.tobytes(), 11)
        return encoders

    yield make
    for encoders in made:
        encoders.close()


@pytest.mark.parametrize("codec", list(CODECS))
def test_files_come_in_order_whoever_encodes(opened, codec):
    expected = [tuple(CODECS[codec].encode(PIXELS[side, row]) for side in (0, 1)) for row in range(37)]
    for workers in (0, 2):
        encoders = opened(codec, workers)
        batches = [encoders.submit(PIXELS, 11) for _ in range(3)]
        assert [files() for files in batches] == [expected] * 3
        assert len(encoders.processes) == (0 if codec == "raw" else workers)


def test_a_dead_worker_is_named(opened):
    encoders = opened("png", 2)
    assert len(encoders.submit(PIXELS, 11)()) == 37
    os.kill(encoders.processes[0], signal.SIGKILL)
    with pytest.raises(CopgenError, match=rf"worker 1 of 2 \(process {encoders.processes[0]}\) was ended by SIGKILL"):
        [encoders.submit(PIXELS, 11)() for _ in range(2)]


def test_a_worker_that_fails_is_named(opened, capfd):
    encoders = opened("png", 1)
    with pytest.raises(CopgenError, match=r"worker 1 of 1 .* ended with exit code 1"):
        encoders.submit(PIXELS, 10**6)()  # beyond the memory
    assert "ValueError" in capfd.readouterr().err


def test_close_ends_the_workers(opened):
    encoders = opened("png", 2)
    processes = encoders.processes
    # A Ctrl-C in the terminal reaches this process's group; the workers must outlive it while the shard is finished.
    assert all(os.getpgid(process) != os.getpgid(0) for process in processes)
    encoders.submit(PIXELS, 11)
    encoders.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_no_worker_outlives_a_killed_parent():
    script = (
        "import os, signal, numpy as np\n"
        "from copgen_fast.pairs.write.encoding import Encoders\n"
        "encoders = Encoders('png', 2)\n"
        "os.ftruncate(encoders.memory, 2 * 64 * 64 * 64 * 3)\n"
        "pixels = np.zeros((2, 64, 64, 64, 3), np.uint8)\n"
        "encoders.submit(pixels, 0)()\n"
        "encoders.submit(pixels, 0)\n"  # one has work, and one is idle or has
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    parent.communicate(timeout=180)  # ends when nobody holds the pipe any more: workers inherit it
    assert parent.returncode == -signal.SIGKILL
