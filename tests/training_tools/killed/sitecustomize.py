"""Where this folder is on Python's path, a run with STA is killed in its fourth step, as by a machine that goes down."""

import os
import signal

from sta_adapter.integrations.callbacks import SaveAdapter


def kill(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)


SaveAdapter.on_step_begin = kill
