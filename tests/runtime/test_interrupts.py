import os
import signal

import pytest

from copgen_fast.runtime import interrupts


def test_one_signal_asks_and_an_interrupt_after_it_is_at_once():
    before = signal.getsignal(signal.SIGINT)
    with interrupts.handle_signals():
        assert not interrupts.stop_requested()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.stop_requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert not interrupts.stop_requested()
    assert signal.getsignal(signal.SIGINT) is before
