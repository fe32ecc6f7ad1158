import dataclasses
import threading

import numpy as np
import pytest

from copgen_fast.images.codecs import CODECS
from copgen_fast.pairs.write.encoding import Encoder

PIXELS = np.random.RandomState(0).randint(0, 256, (2, 37, 5, 7, 3)).astype(np.uint8)


def encoder_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("encoder")]


@pytest.fixture
def opened():
    made = []

    def make(codec, workers):
        made.append(Encoder(codec, workers))
        return made[-1]

    yield make
    for encoder in made:
        encoder.close()
    assert not encoder_threads()


@pytest.mark.parametrize("codec", list(CODECS))
def test_files_come_in_order_whatever_the_number_of_threads(opened, codec):
    expected = [tuple(CODECS[codec].encode(PIXELS[side, row]) for side in (0, 1)) for row in range(37)]
    for workers in (0, 1, 3):
        encoder = opened(codec, workers)
        batches = [encoder.submit(PIXELS), encoder.submit(PIXELS[:, :5]), encoder.submit(PIXELS)]
        assert [files() for files in batches] == [expected, expected[:5], expected]


@pytest.mark.parametrize(("workers", "where"), [(0, threading.main_thread().name), (2, "encoder")])
def test_threads_encode_where_there_are_any(opened, monkeypatch, workers, where):
    names = set()
    monkeypatch.setitem(CODECS, "png", dataclasses.replace(CODECS["png"], encode=lambda image: note(names)))
    opened("png", workers).submit(PIXELS)()
    assert names and all(name.startswith(where) for name in names)


def note(names):
    names.add(threading.current_thread().name)
    return b""


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_with_the_batch_that_has_it(opened, monkeypatch, workers):
    encode = CODECS["png"].encode

    def fail_at_white(image):
        if image.all():
            raise MemoryError("no room")
        return encode(image)

    monkeypatch.setitem(CODECS, "png", dataclasses.replace(CODECS["png"], encode=fail_at_white))
    bad = PIXELS.copy()
    bad[1, 30] = 255
    encoder = opened("png", workers)
    black = np.zeros_like(PIXELS)
    before, failing, after = encoder.submit(black), encoder.submit(bad), encoder.submit(black)
    assert len(before()) == 37
    with pytest.raises(MemoryError, match="no room"):
        failing()
    assert len(after()) == 37


def test_close_ends_the_threads_whatever_is_still_to_do(monkeypatch):
    begun, encoded = threading.Event(), []

    def count(image):
        encoded.append(image)
        begun.set()
        return b""

    monkeypatch.setitem(CODECS, "png", dataclasses.replace(CODECS["png"], encode=count))
    encoder = Encoder("png", 2)
    for _ in range(50):
        encoder.submit(PIXELS)
    assert begun.wait(60)
    encoder.close()
    assert not encoder_threads()
    done = len(encoded)
    encoder.close()  # again does nothing
    assert len(encoded) == done <= 50 * 2 * 37
