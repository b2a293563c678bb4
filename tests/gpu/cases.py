"""The cases of the suite, in the order in which they run.

doors     one launch: md.compile and torch.compile; at its end a rank hangs
bundles   another: what was exported beside the first; ranks that do something wrong; at its end a rank is killed
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable

from gpu.bundles import (
    BUNDLES,
    CPU_BUNDLES,
    by_module,
    damaged,
    export,
    from_bundle,
    hang,
    killed,
    larger,
    skipped_call,
    wrong_input,
)
from gpu.case import Case, Found, Rank
from gpu.checks import (
    CALLS,
    float8_exchanges,
    graphs,
    many_calls,
    quantizers,
    ring_self_test,
    self_tests,
    vote_cost,
    weights_once,
)
from gpu.doors import CPU_DOORS, DOORS, one_by_one, ranks_differ, through, two_models
from gpu.networks import make
from gpu.offers import step_times
from torchtrt_md.launch.watchdog import EXIT_CODE

__all__ = ["cases", "export", "make"]

OTHERS: list[tuple[str, Callable[[Rank], Found]]] = [
    ("torch.compile: two models of one class", two_models),
    ("torch.compile: layers one by one, dense", functools.partial(one_by_one, "dense")),
    ("torch.compile: layers one by one, sharded", functools.partial(one_by_one, "sharded")),
    ("torch.compile: layers one by one, replaced", functools.partial(one_by_one, "replaced")),
    ("torch.compile: ranks in different graphs, a flag", functools.partial(ranks_differ, "flag")),
    ("torch.compile: ranks in different graphs, a shape", functools.partial(ranks_differ, "shape")),
    ("md.compile: weights held once", weights_once),
    ("md.compile: the cost of a vote", vote_cost),
    (f"md.compile: {CALLS} calls", many_calls),
    ("md.compile: exchanges in float8", float8_exchanges),
    ("md.compile: quantizers in engines", quantizers),
    ("CUDA graphs: replays, budget, failures", graphs),
    ("self-tests: every op", self_tests),
    ("ring inside an engine: the self-test", ring_self_test),
]


def cases(device: str, ranks: int) -> list[Case]:
    """All cases, in the order in which they run."""
    gpu = device == "cuda"
    bundles = BUNDLES if gpu else CPU_BUNDLES
    doors = DOORS if gpu else CPU_DOORS
    found = [Case(d.name, functools.partial(through, d), seconds=150 if d.tune else 90) for d in doors]
    if gpu:
        found += [Case(name, run) for name, run in OTHERS]
        words = ("all_to_all", "axis 'cp'")
        found.append(Case("rank 1: alone in a collective", hang, ends={1: EXIT_CODE}, says=words))
    found += [Case(f"bundle: {b.name}", functools.partial(from_bundle, b), "bundles") for b in bundles]
    found.append(Case("bundle: the times of its steps", functools.partial(step_times, bundles[0]), "bundles"))
    if gpu:
        found.append(Case("bundle: python -m torchtrt_md.run", by_module, "bundles", 120))
        found.append(Case("rank 1: a skipped call", functools.partial(skipped_call, bundles[0]), "bundles"))
    found += [
        Case("rank 1: a wrong input", functools.partial(wrong_input, bundles[0]), "bundles"),
        Case("rank 1: a damaged file", functools.partial(damaged, bundles[0]), "bundles"),
        Case("a bundle for more ranks", larger, "bundles"),
        Case("rank 1: killed", functools.partial(killed, bundles[0]), "bundles", ends={1: -signal.SIGKILL}),
    ]
    return found
