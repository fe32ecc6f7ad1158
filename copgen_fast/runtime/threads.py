"""How many threads PyTorch's operators take."""

from __future__ import annotations

import threading

import torch

_one_at_a_time = threading.Lock()  # a thread that begins within another's call would take its 1 for what was before


def alone() -> None:
    """Let PyTorch's operators in this thread take no other threads; in all others they take as many as before.

    Threads that work side by side would else split small operators among further threads, and wait for those.
    """
    with _one_at_a_time:
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # of this thread, and of all that have not computed yet: for those, it is set back
        back = threading.Thread(target=torch.set_num_threads, args=(before,))
        back.start()
        back.join()
