"""``Choices``: what is left to choose once a program is captured, and was chosen by formula or by timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import msgspec

from torchtrt_md.lowering.passes import Exchange
from torchtrt_md.parallel import Placement
from torchtrt_md.segment import Runs

Transport: TypeAlias = Literal["nccl", "store"]
ExchangeDtype: TypeAlias = Literal["model", "float8"]


class Decision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that was chosen for this program, by formula or by timing, in words for people.

    ``what`` was decided ("attention [1,24,4608,128]"), what was ``chosen`` ("ulysses"), ``why`` ("sends the fewest
    bytes"), and candidate -> milliseconds where candidates were timed.
    """

    what: str
    chosen: str
    why: str
    times_ms: dict[str, float] = {}


@dataclass(frozen=True)
class Choices:
    """How a program is lowered, cut and built.

    Attributes:
        placement: where attention runs.
        compute: what compute parts run as: ``engine`` or ``inductor``.
        exchanges: how attentions get what they lack, by
            :func:`torchtrt_md.lowering.choose_strategy.attention_key`; others follow the axis's strategy.
        runs: what compute parts of some graphs run as, by the graph's digest; others as ``compute`` says.
        transport: what does the exchanges between engines: ``nccl``, or a kernel that ``store``s.
        exchange_dtype: what queries, keys and values are sent as: their own dtype (``model``) or ``float8``.
        decisions: why, in words, and the times that decided.
        tuned_on: the GPU that they were timed on, "" where nothing was timed.
    """

    placement: Placement
    compute: Runs = "engine"
    exchanges: Mapping[str, Exchange] = field(default_factory=dict)
    runs: Mapping[str, Runs] = field(default_factory=dict)
    transport: Transport = "nccl"
    exchange_dtype: ExchangeDtype = "model"
    decisions: tuple[Decision, ...] = ()
    tuned_on: str = ""

    @property
    def with_engines(self) -> bool:
        """Does any part become an engine?"""
        return self.compute == "engine" or "engine" in self.runs.values()
