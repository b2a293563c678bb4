"""Every model of transformers and diffusers with a plan of its own, through capture, lower and verify.

    python benchmarks/model_matrix.py --ranks 2 --ranks 4 -o docs/models.md
    python benchmarks/model_matrix.py --ranks 2 --only LlamaForCausalLM
    python benchmarks/model_matrix.py --part 1/4 --results found.jsonl     # a quarter of the models; four make a page
    python benchmarks/model_matrix.py --part 1/4 --check docs/models.md    # fails where the page says otherwise

Models of transformers are the causal language models with a tensor-parallel plan that it maps configurations to, made
from a small configuration (small_configs.py), and one for each other configuration of it with such a plan: parts of
models, encoders, models of images and of sound (small_others.py).  Those of diffusers are all classes with a plan,
called as their pipelines call them (small_diffusers.py), in each strategy of a split sequence and tensor-parallel, as
far as they have plans; its transformers without a plan for a split sequence, by plans given by hand, and those without
a tensor-parallel one by a plan made of the names of their layers (small_diffusers_plans.py).
Weights are random.  What does not verify is written down with the first line of the error, or with that of the
library, where the model does not run by itself.  Of the classes some go on to an engine of TensorRT, every
``SAMPLE``-th in the order of their names.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import small_diffusers, small_diffusers_plans, small_others, without_loops  # noqa: E402
from benchmarks.small_configs import TOKENS, small  # noqa: E402

LIMIT_S = 600.0
SAMPLE = 12
BY_NAMES = "tensor, by names"
SAID = "in the library: "  # what library_tp.py says begins so
# Fields without which the library's own default does not run.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
GIVEN: dict[str, dict[str, Any]] = {
    "CohereCompassTextConfig": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}


@dataclass(frozen=True)
class Outcome:
    """What became of one model at one number of ranks.

    Attributes:
        model: its class, and what is different about the call.
        stage: the first that failed: "model", "capture", "lower" or "verify"; "" where all went well.
        line: of the error, or the largest relative error.
        graphs: how many the program has; one serves all ranks.
        seconds: that it took.
        parallel: "tensor", the same by a plan made of names, or the strategy of a split sequence.
        built: "yes" where rank 0's program was built as TensorRT engines, too, or why it was not; "" if that was not
            tried.
        library: of a model of transformers that failed, what became of it in the library itself (library_tp.py).
    """

    model: str
    ranks: int
    stage: str
    line: str
    graphs: int = 0
    seconds: float = 0.0
    parallel: str = "tensor"
    library: str = ""
    built: str = ""


def models() -> list[str]:
    """Every class of transformers for causal language modelling whose configuration has a plan."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if hasattr(transformers, name)]
    names += [name for name in dir(transformers) if name.endswith("ForCausalLM")]
    configs = {name: getattr(getattr(transformers, name), "config_class", None) for name in sorted(set(names))}
    return [name for name, config in configs.items() if getattr(config, "base_model_tp_plan", None)]


def tasks_of(names: Sequence[str], ranks: Sequence[int]) -> list[tuple[str, int, str]]:
    """What is tried: each class in each call and with each plan that it has, on each number of ranks."""
    tried = []
    for name in dict.fromkeys(names):
        if small_others.is_one(name):
            tried += [(call, r, "tensor") for call in small_others.calls(name) for r in ranks]
            continue
        tried += [(call, r, BY_NAMES) for call in _without_tensor_plan(name) for r in ranks]
        if name in small_diffusers_plans.classes():
            calls, strategies = small_diffusers_plans.calls(name), small_diffusers_plans.STRATEGIES
            tried += [(call, r, strategy) for call in calls for strategy in strategies for r in ranks]
            if name not in small_diffusers.classes():
                continue
        diffusers = name in small_diffusers.classes()
        for call in small_diffusers.calls(name) if diffusers else [name, *without_loops.calls(name)]:
            for parallel in small_diffusers.parallels(name) if diffusers else ["tensor"]:
                tried += [(call, r, parallel) for r in ranks]
    return tried


def _without_tensor_plan(name: str) -> list[str]:
    """The calls of a class of diffusers that has no tensor-parallel plan of its own; none of other classes."""
    if name in small_diffusers_plans.classes():
        known, calls = small_diffusers_plans.classes()[name], small_diffusers_plans.calls(name)
    elif name in small_diffusers.classes():
        known, calls = small_diffusers.classes()[name], small_diffusers.calls(name)
    else:
        return []
    return [] if getattr(known, "_tp_plan", None) else calls


def _planned(call: str, parallel: str) -> bool:
    """Whether a class has its call from small_diffusers_plans.py."""
    return parallel != "tensor" and call.partition(", ")[0] in small_diffusers_plans.classes()


def made(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, small, and a call of it."""
    import torch
    import transformers

    call, (name, *_) = name, name.split(", ")
    if not hasattr(transformers, name):
        return small_diffusers.made(call)
    if small_others.is_one(name):
        return small_others.made(call)

    torch.manual_seed(0)
    config_class = getattr(transformers, name).config_class
    config = small(config_class(), **GIVEN.get(config_class.__name__, {}))
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():  # what is ones or zeros when it is made would hide faults
        if parameter.is_floating_point():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    if call != name:
        without_loops.replace(model)
    # Beside special tokens, which the rules of small_configs keep at both ends.
    tokens = torch.randint(8, config.get_text_config().vocab_size - 8, (1, TOKENS))
    return model, (tokens,), {"use_cache": False}


def outcome(name: str, ranks: int, parallel: str = "tensor") -> Outcome:
    """Take one model through the stages."""
    import torch

    import torchtrt_md as md
    from torchtrt_md.verification import verify

    begin = time.perf_counter()
    stage, graphs, built = "model", 0, ""
    try:
        model, args, kwargs = small_diffusers_plans.made(name) if _planned(name, parallel) else made(name)
        with torch.no_grad():
            model(*args, **kwargs)
        stage = "capture"
        program = md.capture(model, args, kwargs, mesh=md.Mesh(n=ranks), parallel=_along(name, parallel, model))
        graphs = len(program.distinct())
        stage = "lower"
        lowered = md.lower(program, placement="split" if parallel == "ring" else "engine")
        stage = "verify"
        report = verify(lowered, model, args, kwargs)
        stage, line = "", f"{report.error:.1e}"
        if parallel in ("tensor", "ulysses") and _is_sampled(name):
            built = _built_of(lowered)
    except Exception as error:  # whatever it is, it goes into the table
        line = f"{type(error).__name__}: " + next(iter(str(error).strip().splitlines()), "")
        if os.environ.get("MATRIX_TRACE"):
            traceback.print_exc()
    return Outcome(name, ranks, stage, line, graphs, time.perf_counter() - begin, parallel, built=built)


def _built_of(lowered: Any) -> str:
    import torchtrt_md as md

    try:
        with tempfile.TemporaryDirectory() as folder:
            md.build(lowered, folder, ranks=[0])
    except md.MDError as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "yes"


def _is_sampled(call: str) -> bool:
    """Whether the class of a call is one of those that go on to engines."""
    name = call.partition(", ")[0]
    return next(names.index(name) for names in (_classes(), _configurations()) if name in names) % SAMPLE == 0


def _names() -> list[str]:
    """All classes, and configurations of other ones, in the order of their names."""
    return sorted([*_classes(), *_configurations()])


@functools.cache
def _classes() -> list[str]:
    return sorted({*models(), *small_diffusers.classes(), *small_diffusers_plans.classes()})


@functools.cache
def _configurations() -> list[str]:
    return small_others.configurations(models())


def _along(name: str, parallel: Any, model: Any) -> Any:
    """How a model is parallel over axis "n"."""
    import torchtrt_md as md

    if parallel == BY_NAMES:
        return md.TensorParallel("n", small_diffusers_plans.tensor_plan(model))
    if parallel == "tensor":
        return md.TensorParallel("n")
    by_hand = small_diffusers_plans.listed(name)[1] if _planned(name, parallel) else None
    return md.ContextParallel("n", parallel, plan=by_hand)


def _in_child(name: str, ranks: int, parallel: str) -> Outcome:
    """In a process of its own: what one model leaves behind, or breaks, is not the next one's."""
    mother, child = multiprocessing.get_context("fork").Pipe()

    def work() -> None:
        import logging

        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        child.send(outcome(name, ranks, parallel))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    child.close()
    try:
        late = Outcome(name, ranks, "time", f"not done in {LIMIT_S:g} s", parallel=parallel)
        found = mother.recv() if mother.poll(LIMIT_S) else late
    except EOFError:
        found = Outcome(name, ranks, "model", "the process died", parallel=parallel)
    process.kill()
    process.join()
    return found


def tried(name: str, ranks: int, parallel: str) -> Outcome:
    """What became of one model, and in the library itself where it failed."""
    found = _in_child(name, ranks, parallel)
    failed = found.stage and found.stage != "model" and _of_transformers(found)
    return replace(found, library=_in_library(name, ranks)) if failed else found


def _in_library(name: str, ranks: int) -> str:
    """What the library itself computes of a model under its own plan, in a launch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    try:
        done = subprocess.run(
            [*command, str(ROOT / "benchmarks" / "library_tp.py"), name],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT_S:g} s"
    said = [line.removeprefix(SAID) for line in done.stdout.splitlines() if line.startswith(SAID)]
    return "; ".join(said) or f"the launch ended with {done.returncode}"


def page(outcomes: Sequence[Outcome], versions: str) -> str:
    """docs/models.md."""
    by_names = [o for o in outcomes if o.parallel == BY_NAMES]
    others = [o for o in outcomes if o.parallel != BY_NAMES]
    parts = [o for o in others if _of_configuration(o)]
    language = [o for o in others if _of_transformers(o) and not _of_configuration(o)]
    generating = [o for o in others if not _of_transformers(o) and not _planned(o.model, o.parallel)]
    planned = [o for o in others if _planned(o.model, o.parallel)]
    lines = [
        "# Models",
        "",
        "Made by `make models`; do not edit. Models made small with random weights, parallel by their own plans, or by",
        f"plans given by hand: captured, lowered and verified in one process, with no GPU. {versions}.",
    ]
    if language:
        lines += [
            "",
            "## transformers",
            "",
            "Every class for causal language modelling whose configuration has a `base_model_tp_plan`. What fails here",
            "was run in a launch by the library's own tensor parallelism, too, and compared with the dense model.",
            "Experts in a loop over those that got a token are replaced by some without, in a row of their own",
            "(`benchmarks/without_loops.py`).",
            *_table(language, ("class",)),
        ]
    if parts:
        lines += [
            "",
            "## transformers, beside causal language models",
            "",
            "Every other configuration with a `base_model_tp_plan`: parts of models, encoders, models of images and of",
            "sound. The class is the one that the plan is for, called by the input that it mainly takes; a model that",
            "has a part for images is given one. Where what decides sizes is held, a module around the model has the",
            "numbers of patches of a picture, or where they are: they are the same in all calls then. Checks of values",
            "are those of transformers that there are as many places for images as images: its switch",
            "`TRANSFORMERS_DISABLE_TORCH_CHECK=1` leaves them out. What fails was compared as above, too.",
            "",
            *(_of_configurations(parts, r) for r in sorted({o.ranks for o in parts})),
            *_table(parts, ("configuration", "class"), _with_class),
        ]
    if generating:
        lines += [
            "",
            "## diffusers",
            "",
            "Every class with a `_cp_plan` or a `_tp_plan`, called as its pipeline calls it: prompts are masked where",
            "it takes a mask, and have lengths that the ranks do not divide, as what is generated has. `tensor` is its",
            "`_tp_plan`, the others are strategies of its `_cp_plan`.",
            *_table(generating, ("class", "parallel")),
        ]
    if planned:
        known = small_diffusers_plans.classes()
        without = [name for name in known if not small_diffusers_plans.calls(name)]
        lines += [
            "",
            "## Without a plan of their own",
            "",
            f"diffusers has {len(known)} transformers without a `_cp_plan`. Those that were tried have a plan of a few",
            "lines given by hand, in `benchmarks/small_diffusers_plans.py`, and are called as above. Where what",
            "decides sizes is held, a module around the model has the arguments whose values the model asks for, such",
            "as masks of the text: they are the same in all calls then.",
            *_wrapped("Not tried, since no call of them is written: " + ", ".join(without) + "."),
            "",
            *(_of_classes(planned, r) for r in sorted({o.ranks for o in planned})),
            *_built(planned),
            *_wide_table(planned),
        ]
    if by_names:
        lines += [
            "",
            "## Tensor parallel without a plan of their own",
            "",
            "Every class of diffusers without a `_tp_plan` of which a call is written, by a plan that",
            "`benchmarks/small_diffusers_plans.py` makes of the names of its layers: heads of attention by DTensors,",
            "since these models count their heads themselves, and feed-forward layers.",
            *_table(by_names, ("class",)),
        ]
    return "\n".join(lines) + "\n"


def _of_transformers(found: Outcome) -> bool:
    import transformers

    return hasattr(transformers, found.model.partition(", ")[0])


def _of_configuration(found: Outcome) -> bool:
    return small_others.is_one(found.model.partition(", ")[0])


def _with_class(row: tuple[str, str]) -> tuple[str, str]:
    return row[0], small_others.class_named(row[0].partition(", ")[0])


def _of_configurations(outcomes: Sequence[Outcome], ranks: int) -> str:
    tried = {o.model.partition(", ")[0] for o in outcomes if o.ranks == ranks}
    right = {o.model.partition(", ")[0] for o in outcomes if o.ranks == ranks and not o.stage}
    return f"- {ranks} ranks, configurations that verify in a call: {len(right)} of {len(tried)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _of_classes(outcomes: Sequence[Outcome], ranks: int) -> str:
    """How many classes verify in every call that was tried, and in every strategy that was."""
    failed: dict[str, set[str]] = {}
    for o in outcomes:
        if o.ranks == ranks:
            failed.setdefault(o.parallel, set())
            failed[o.parallel] |= {o.model.partition(", ")[0]} if o.stage else set()
    tried = {p: {o.model.partition(", ")[0] for o in outcomes if (o.ranks, o.parallel) == (ranks, p)} for p in failed}
    counts = [f"{p} {len(tried[p] - failed[p])} of {len(tried[p])}" for p in sorted(failed)]
    return f"- {ranks} ranks, classes that verify in every call: {', '.join(counts)}"


def _wide_table(outcomes: Sequence[Outcome]) -> list[str]:
    """A row for each call, a column for each strategy at each number of ranks, and the first error."""
    columns = sorted({(o.ranks, o.parallel) for o in outcomes})
    by = {(o.model, o.ranks, o.parallel): o for o in outcomes}
    names = [f"{parallel}, {ranks} ranks" for ranks, parallel in columns]
    lines = ["", "| " + " | ".join(["class", *names, "what failed first"]) + " |", "|---" * (len(columns) + 2) + "|"]
    for model in sorted({o.model for o in outcomes}, key=str.lower):
        row = [by.get((model, *column)) for column in columns]
        cells = [(o.stage or "ok") if o else "not tried" for o in row]
        first = next((_cell(o) for o in row if o and o.stage), "")
        lines.append("| " + " | ".join([model, *cells, first]) + " |")
    return lines


def _table(
    outcomes: Sequence[Outcome],
    columns: Sequence[str],
    named: Callable[[tuple[str, str]], Sequence[str]] | None = None,
) -> list[str]:
    """A row for each call; ``named`` says what stands in the first columns instead of the call and what is parallel."""
    ranks = sorted({o.ranks for o in outcomes})
    by = {(o.model, o.parallel, o.ranks): o for o in outcomes}
    rows = sorted({(o.model, o.parallel) for o in outcomes}, key=lambda row: (row[0].lower(), row[1]))
    of = {r: [o for o in outcomes if o.ranks == r] for r in ranks}
    lines = [
        "",
        *(f"- {r} ranks: {sum(not o.stage for o in of[r])} of {len(of[r])}" for r in ranks),
        *_built(outcomes),
        "",
        "| " + " | ".join([*columns, *(f"{r} ranks" for r in ranks)]) + " |",
        "|---" * (len(columns) + len(ranks)) + "|",
    ]
    for row in rows:
        cells = [_cell(by[*row, r]) if (*row, r) in by else "" for r in ranks]
        lines.append("| " + " | ".join([*(named(row) if named else row[: len(columns)]), *cells]) + " |")
    return lines


def _built(outcomes: Sequence[Outcome]) -> list[str]:
    """Which went on to engines."""
    tried = sorted((o for o in outcomes if o.built), key=lambda o: (o.model.lower(), o.parallel, o.ranks))
    told = {"yes": "- built as TensorRT engines of rank 0, too: "}
    lines = []
    for why in dict.fromkeys(["yes", *(o.built for o in tried)]):
        names = dict.fromkeys(o.model for o in tried if o.built == why)
        if names:
            lines.append(told.get(why, f"- not built whole, by {why.replace('|', ' ')}: ") + "; ".join(names))
    return lines


def differences(outcomes: Sequence[Outcome], text: str) -> list[str]:
    """The rows that a page has otherwise."""
    there = set(text.splitlines())
    return [row for row in page(outcomes, "").splitlines() if row.startswith("| ") and row not in there]


def _cell(o: Outcome) -> str:
    if not o.stage:
        return "ok"
    library = f" **In transformers itself:** {o.library}" if o.library else ""
    return f"{o.stage}: {o.line}{library}".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, action="append", help="2 and 4 by default")
    parser.add_argument("--only", action="append", help="a class")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th model, from the I-th on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a file of results: what is in it is not run again")
    parser.add_argument("-o", "--out", type=Path, help="the page to write")
    parser.add_argument("--check", type=Path, help="a page whose rows are to be those that are found")
    options = parser.parse_args()
    import diffusers
    import torch
    import transformers

    first, count = map(int, options.part.split("/"))
    chosen = [name for name in _names() if not options.only or name in options.only][first - 1 :: count]
    tasks = tasks_of(chosen, options.ranks or [2, 4])
    outcomes = []
    if options.results and options.results.exists():
        outcomes = [Outcome(**json.loads(line)) for line in options.results.read_text().splitlines()]
    done = {(o.model, o.ranks, o.parallel) for o in outcomes}
    tasks = [task for task in tasks if task not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done_one in as_completed([pool.submit(tried, *task) for task in tasks]):
            found = done_one.result()
            outcomes.append(found)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
            print(
                f"{found.model:40} {found.parallel:12} {found.ranks} {found.graphs} graphs {found.seconds:5.1f} s "
                f" {_cell(found)}",
                flush=True,
            )
    for ranks in sorted({o.ranks for o in outcomes}):
        of = [o for o in outcomes if o.ranks == ranks]
        print(f"{ranks} ranks: {sum(not o.stage for o in of)} of {len(of)} verify")
    if options.out:
        modules = (torch, transformers, diffusers)
        versions = ", ".join(f"{module.__name__} {module.__version__}" for module in modules)
        options.out.write_text(page(outcomes, versions))
    if options.check and (rows := differences(outcomes, options.check.read_text())):
        sys.exit("\n".join([f"{options.check} has these rows otherwise:", *rows]))


if __name__ == "__main__":
    main()
