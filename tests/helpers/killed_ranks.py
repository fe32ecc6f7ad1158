"""A rank of the command that is killed in the middle of an epoch, but not again once torchrun has started it anew."""

import os
import signal
import sys

from copgen_fast import train
from copgen_fast.runtime import distributed
from tests.helpers.distributed_ranks import when_at

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    when_at("step 4 of pretrain navigator", lambda: os.kill(os.getpid(), signal.SIGKILL))
distributed.leave(train.main(sys.argv[1:]))
