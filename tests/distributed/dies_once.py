"""Run strop; rank 1 kills itself after step 5 the first time, so that torchrun restarts all ranks.

python -m tests.distributed.dies_once WORDS...
"""

from __future__ import annotations

import os
import signal

from strop.cli import app
from tests.distributed.suite import at_step

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(5, lambda job: os.kill(os.getpid(), signal.SIGKILL))()
app.main()
