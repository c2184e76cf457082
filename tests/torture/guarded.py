"""Runs one attack after the other in bounded time and memory: `guarded` says of each which error it gave."""

import os
import resource
import signal
import warnings

import pytest

from sta_adapter.errors import STAError


class TooLong(BaseException):
    """Not an Exception: nothing that is tested may catch it."""


def _ring(number, frame):
    raise TooLong


def counts(name, usual):
    """How many cases, and so many in one test: `STA_TORTURE_...` says otherwise."""
    return int(os.environ.get(f"STA_TORTURE_{name}", usual))


def guarded(case, attack, seconds=20, megabytes=150):
    """The error of ours that `attack()` gives, or None; any other error, more time or more memory fails the test."""
    signal.signal(signal.SIGALRM, _ring)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(seconds)
    error = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attack()
    except STAError as found:
        error = found
    except BaseException as crash:
        pytest.fail(f"{case}: {type(crash).__name__}: {str(crash)[:500]}")
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start
    assert grown < megabytes * 1024, f"{case} took {grown // 1024} MB more"
    return error
