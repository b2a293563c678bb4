"""One program in a launch: its road, and the way up of what was built for this rank.  ``tune`` goes it many times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchtrt_md.bundle.from_program import manifest_of
from torchtrt_md.choices import Choices
from torchtrt_md.launch import Launch
from torchtrt_md.options import Options
from torchtrt_md.program import Output, ShardedProgram, Weights
from torchtrt_md.road import Built, Road, summary_of
from torchtrt_md.runtime.bring_up import Known, bring_up
from torchtrt_md.runtime.executor import Executor
from torchtrt_md.runtime.graphs import Budget
from torchtrt_md.runtime.runner import Runner
from torchtrt_md.runtime.weights import ModelWeights, WeightGuard, check_equal
from torchtrt_md.segment import Part, Wire


class Session:
    """One program in a launch: its road, and the way up of what was built for this rank."""

    def __init__(
        self, launch: Launch, program: ShardedProgram, options: Options, *, store_weights: bool = False
    ) -> None:
        self.launch, self.program, self.options = launch, program, options
        self.store_weights = store_weights and options.transpose_weights
        self.known = Known()
        self.choices_file: Path | None = None  # where what is tuned is kept
        self.road = Road(
            program,
            options,
            ranks=[launch.rank],
            agreement=launch.agreement,
            turns=launch.in_turns,
            share=launch.share,
        )

    def default(self) -> Choices:
        """What is chosen without timing anything."""
        device = self.launch.device
        return self.road.default(torch.cuda.get_device_capability(device) if device.type == "cuda" else None)

    def built(self, choices: Choices) -> Built:
        """Lower, place and build; the ranks vote after each."""
        return self.road.build(self.road.lower(choices), choices)

    def placed(self, choices: Choices) -> Built:
        """Lower and place, of which no engine is built yet; see :meth:`Road.engines`."""
        return self.road.place(self.road.lower(choices), choices)

    def executor(
        self,
        built: Built,
        parts: Sequence[Part] | None = None,
        outputs: Sequence[Wire] | None = None,
        *,
        store: bool = False,
    ) -> Executor:
        """What runs the program, or only these parts of it, which return ``outputs``; see ``store_weights``."""
        program, rank = built.placed.program, self.launch.rank
        weights = ModelWeights(program, rank)
        return bring_up(
            self.launch,
            program.mesh,
            built.parts[rank] if parts is None else parts,
            weights.local,
            outputs or [Wire("output", value.name) for value in program.outputs],
            self_tests=built.self_tests,
            target=self.options.target,
            transport=built.choices.transport,
            overlap=self.options.overlap,
            stored=weights.store if store else None,
            known=self.known,
        )

    def runner(self, built: Built, budget: Budget | None, name: str) -> Runner:
        """The runner of what was built."""
        lowered, rank = built.placed.program, self.launch.rank
        captured, agreement, check = self.program, self.launch.agreement, self.options.check
        executor = self.executor(built, store=self.store_weights)
        ranks = [[part.segment for part in parts] for parts in built.parts]
        return Runner(
            manifest_of(lowered, ranks, built.choices, target=self.options.target),
            executor,
            launch=self.launch,
            votes=self.options.votes,
            cuda_graph=self.options.cuda_graph,
            static_outputs=self.options.static_outputs,
            budget=budget or Budget(self.options.max_graphs),
            nest=lambda outputs: _nested(lowered, outputs),
            guard=_guard(lowered.weights, executor.device).check,
            name=name,
            summary=summary_of(name, built, rank),
            choices=built.choices,
            parts_of=lambda others: ModelWeights(_with(lowered, others), rank).local,
            # As the program's own were.
            check_others=lambda others: check_equal(_with(captured, others), agreement) if check else None,
        )


def _with(program: ShardedProgram, others: Mapping[str, Tensor]) -> ShardedProgram:
    """The program with other weights in the places of those that this process has, whole or as shards."""
    held = program.weights
    whole, shards = ({name: others.get(name, t) for name, t in of.items()} for of in (held.whole, held.shards))
    return replace(program, weights=replace(held, whole=whole, shards=shards))


def _guard(weights: Weights, device: torch.device) -> WeightGuard:
    held = {**weights.shards, **weights.whole}
    if weights.checkpoint is not None:
        held |= weights.checkpoint.tensors(weights.given.values(), device)
    return WeightGuard(held, weights.holders, weights.constants, weights.replaced, weights.outer)


def _nested(program: ShardedProgram, outputs: Mapping[str, Tensor]) -> Any:
    """The outputs as the model itself returns them, in a class of its own where it has one."""
    tensors = [outputs[value.name] for value in program.outputs]
    leaves = [tensors[leaf.index] if isinstance(leaf, Output) else leaf for leaf in program.out_leaves]
    return pytree.tree_unflatten(leaves, program.out_spec)
