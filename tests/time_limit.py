"""Hooks of pytest that end the process when a test, with its fixtures, takes too long.

The limit is TEST_SECONDS, an environment variable; without it there is none. It depends on no
plugin and on no version of pytest: faulthandler_timeout, which pyproject.toml sets, ends the
process only in recent ones. The stacks of all threads are printed on stderr.

A conftest imports these hooks by their names.
"""

import faulthandler
import os
from collections.abc import Iterator

import pytest

_seconds = float(os.environ.get("TEST_SECONDS", 0))
_stderr = -1


def pytest_configure() -> None:
    """Keep stderr as it is before pytest captures it."""
    global _stderr
    _stderr = os.dup(2)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Start the clock of a test, and stop it."""
    if _seconds:
        faulthandler.dump_traceback_later(_seconds, exit=True, file=_stderr)
    yield
    if _seconds:
        faulthandler.cancel_dump_traceback_later()
