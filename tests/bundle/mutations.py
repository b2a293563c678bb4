"""Random damage to bytes and to JSON, for the tests that only a :class:`BundleError` comes of it."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from torchtrt_md.errors import BundleError

COUNT = 10_000
SECONDS = float(os.environ.get("TORCHTRT_MD_FUZZ_SECONDS", "0"))  # how long, where that is longer
# What a reader may take for something else: limits, other types, names that mean something.
STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 64, 65, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(1 << 63)),
    *(0.5, -0.0, 1e308, "", "self", "__class__", "__debug__", "forward", "x", "a.b", "../x", "/dev/zero", "\x00", "名"),
    *(
        "\ud800",
        "float99",
        "half",
        "pigeon",
        "cp",
        "weight",
        "value",
        "manifest.json",
    ),
    *(
        "aten.from_file.default",
        "aten.add_.Tensor",
        "aten.rand.default",
        "operator.getitem",
        "cuda:99",
        "nan",
        "x" * 300,
    ),
    *([], {}, [[]], [None], [1 << 62] * 3, [0] * 70, {"kind": "node", "name": "x"}, {"kind": "list", "items": []}),
    {"kind": "torch", "name": "nn"},
    *(["weight", "up"], ["value", "h"], ["output", "output0"], ["input", "x"], ["pigeon", "x"]),
)


def changed_bytes(data: bytes, chance: random.Random) -> bytes:
    """The data with a few bytes set, cut out, repeated or put in."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed) + 1)
        end = min(len(changed), at + chance.choice((1, 1, 4, 60)))
        match chance.randrange(4):
            case 0:
                changed[at:end] = chance.randbytes(end - at)
            case 1:
                del changed[at:end]
            case 2:
                changed[at:at] = changed[at:end] * chance.choice((1, 2, 50))
            case _:
                changed[at:at] = chance.choice((b"[", b'"', b"{", b"\xff", b"9" * 30, b"-", b"null", b"\\u0000", b","))
    return bytes(changed)


def change(content: Any, chance: random.Random, *, keep_types: bool = False) -> None:
    """Change a few values of parsed JSON, in place; each to one of its own type, where types are kept."""
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(content))
        holder, key = chance.choice(places)
        other_holder, other_key = chance.choice(places)
        what = chance.randrange(6)
        if what == 0 and isinstance(holder, list):
            del holder[key]
        elif what == 1 and isinstance(holder, list):
            holder.insert(key, _plain(holder[key]))
        elif what == 2 and type(holder[key]) is int:
            holder[key] += chance.choice((-1, 1, 7, 1 << 33))
        elif keep_types:
            same = [h[k] for h, k in places if type(h[k]) is type(holder[key]) and not isinstance(h[k], (dict, list))]
            same += [value for value in STRANGE if type(value) is type(holder[key])]
            holder[key] = _plain(chance.choice(same)) if same else holder[key]
        elif what == 3:
            del holder[key]
        elif what == 4 and isinstance(holder, dict):
            holder[str(chance.choice(STRANGE))] = holder.pop(key)
        elif what == 5:
            holder[key] = _plain(other_holder[other_key])
        else:
            holder[key] = _plain(chance.choice(STRANGE))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _plain(value: Any) -> Any:
    """A copy, so that no part of the content is in two places."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def assert_refused_or_read(
    read: Callable[[bytes], object], damaged: Callable[[random.Random], bytes], times: int = COUNT
) -> None:
    """Each of many damaged inputs is read or is a :class:`BundleError`, within two seconds, and many are refused.

    Run for ``TORCHTRT_MD_FUZZ_SECONDS`` where that is set.
    """
    began, count, refused, slowest = time.monotonic(), 0, 0, 0.0
    while count < times or time.monotonic() - began < SECONDS:
        data = damaged(random.Random(count))
        start = time.process_time()
        try:
            read(data)
        except BundleError:
            refused += 1
        except BaseException as error:
            pytest.fail(f"mutation {count} is a {type(error).__name__}: {error}\n{data[:4000]!r}")
        slowest = max(slowest, time.process_time() - start)
        count += 1
    assert times // 10 < refused
    assert slowest < 2, f"one took {slowest:.1f} s"
