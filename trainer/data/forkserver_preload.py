"""Imported first by the loaders' fork server, never by the trainer itself: what all loader processes inherit.

A signal that asks a run to stop often goes to all its processes (a terminal's Ctrl-C, torchrun, Slurm). The step
under way still needs its batches, so loader processes are a group of their own and leave such signals alone. They end
with the process they serve (`shards.workers.exit_with_parent`).
"""

from __future__ import annotations

import os
import signal

os.setsid()
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(_number, signal.SIG_IGN)
