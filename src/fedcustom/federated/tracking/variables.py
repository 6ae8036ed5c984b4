"""Environment variables that trackers' libraries read: set while a tracker works, and then taken back."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_values: dict[str, str] = {}
_holders = Counter[str]()
"""What was set here and is held, and by how many."""

_lock = threading.Lock()


@contextmanager
def held(defaults: Mapping[str, str]) -> Iterator[None]:
    """Set those variables that the environment does not have. The last who holds one takes it back, unless it
    has another value by then.

    Trackers of several runs may hold the same variable; its value is that of the first.
    """
    with _lock:
        names = [name for name in defaults if name in _values or name not in os.environ]
        for name in names:
            if name not in _values:
                os.environ[name] = _values[name] = defaults[name]
        _holders.update(names)
    try:
        yield
    finally:
        with _lock:
            for name in names:
                _holders[name] -= 1
                if not _holders[name] and os.environ.get(name) == _values.pop(name):
                    del os.environ[name]
