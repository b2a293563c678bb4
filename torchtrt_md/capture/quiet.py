"""Keep from the user the pages of traceback that PyTorch logs where an op fails on fake tensors.

The error itself is raised, and says the user's line; the log would bury it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGERS = ("torch._subclasses.fake_tensor",)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what these loggers say of exceptions, in this thread."""
    thread = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        return record.exc_info is None or threading.get_ident() != thread

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)
