"""Every causal language model of transformers with a tensor-parallel plan, through capture, lower and verify.

    python benchmarks/model_matrix.py --ranks 2 --ranks 4 -o docs/models.md
    python benchmarks/model_matrix.py --ranks 2 --only LlamaForCausalLM
    python benchmarks/model_matrix.py --part 1/4 --results found.jsonl     # a quarter of the models; four make a page

Models are those that the installed transformers maps configurations to, made from a small configuration
(small_configs.py) with random weights.  Nothing about a model is listed here.  What does not verify is written down
with the first line of the error, or with that of the library, where the model does not run by itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.small_configs import TOKENS, small  # noqa: E402

LIMIT_S = 600.0
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
        stage: the first that failed: "model", "capture", "lower" or "verify"; "" where all went well.
        line: of the error, or the largest relative error.
        graphs: how many the program has; one serves all ranks.
        seconds: that it took.
    """

    model: str
    ranks: int
    stage: str
    line: str
    graphs: int = 0
    seconds: float = 0.0


def models() -> list[str]:
    """Every class of transformers for causal language modelling whose configuration has a plan."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if hasattr(transformers, name)]
    names += [name for name in dir(transformers) if name.endswith("ForCausalLM")]
    configs = {name: getattr(getattr(transformers, name), "config_class", None) for name in sorted(set(names))}
    return [name for name, config in configs.items() if getattr(config, "base_model_tp_plan", None)]


def made(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model, small, and a call of it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config_class = getattr(transformers, name).config_class
    config = small(config_class(), **GIVEN.get(config_class.__name__, {}))
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():  # what is ones or zeros when it is made would hide faults
        if parameter.is_floating_point():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    # Beside special tokens, which the rules of small_configs keep at both ends.
    tokens = torch.randint(8, config.get_text_config().vocab_size - 8, (1, TOKENS))
    return model, (tokens,), {"use_cache": False}


def outcome(name: str, ranks: int) -> Outcome:
    """Take one model through the stages."""
    import torch

    import torchtrt_md as md
    from torchtrt_md.verification import verify

    begin = time.perf_counter()
    stage, graphs = "model", 0
    try:
        model, args, kwargs = made(name)
        with torch.no_grad():
            model(*args, **kwargs)
        stage = "capture"
        program = md.capture(model, args, kwargs, mesh=md.Mesh(tp=ranks), parallel=md.TensorParallel("tp"))
        graphs = len(program.distinct())
        stage = "lower"
        lowered = md.lower(program)
        stage = "verify"
        report = verify(lowered, model, args, kwargs)
        stage, line = "", f"{report.error:.1e}"
    except Exception as error:  # whatever it is, it goes into the table
        line = f"{type(error).__name__}: " + next(iter(str(error).strip().splitlines()), "")
        if os.environ.get("MATRIX_TRACE"):
            traceback.print_exc()
    return Outcome(name, ranks, stage, line, graphs, time.perf_counter() - begin)


def _in_child(name: str, ranks: int) -> Outcome:
    """In a process of its own: what one model leaves behind, or breaks, is not the next one's."""
    mother, child = multiprocessing.get_context("fork").Pipe()

    def work() -> None:
        import logging

        import torch

        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        child.send(outcome(name, ranks))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    child.close()
    try:
        found = mother.recv() if mother.poll(LIMIT_S) else Outcome(name, ranks, "time", f"not done in {LIMIT_S:g} s")
    except EOFError:
        found = Outcome(name, ranks, "model", "the process died")
    process.kill()
    process.join()
    return found


def page(outcomes: Sequence[Outcome], versions: str) -> str:
    """docs/models.md."""
    ranks = sorted({o.ranks for o in outcomes})
    by = {(o.model, o.ranks): o for o in outcomes}
    names = sorted({o.model for o in outcomes}, key=str.lower)
    lines = [
        "# Models",
        "",
        "Made by `make models`; do not edit. Every class of transformers for causal language modelling whose",
        "configuration has a `base_model_tp_plan`, made small with random weights, with its own plan: captured,",
        f"lowered and verified in one process, with no GPU. {versions}.",
        "",
        *(f"- {r} ranks: {sum(not o.stage for o in outcomes if o.ranks == r)} of {len(names)}" for r in ranks),
        "",
        "| class | " + " | ".join(f"{r} ranks" for r in ranks) + " |",
        "|---" * (len(ranks) + 1) + "|",
    ]
    for name in names:
        cells = [_cell(by[name, r]) if (name, r) in by else "" for r in ranks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(o: Outcome) -> str:
    return "ok" if not o.stage else f"{o.stage}: {o.line}".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, action="append", help="2 and 4 by default")
    parser.add_argument("--only", action="append", help="a class")
    parser.add_argument("--part", default="1/1", help="I/N: every N-th model, from the I-th on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, help="a file of results: what is in it is not run again")
    parser.add_argument("-o", "--out", type=Path, help="the page to write")
    options = parser.parse_args()
    import torch
    import transformers

    import torchtrt_md as md
    import torchtrt_md.capture.model
    import torchtrt_md.verification  # so that children need not import them

    first, count = map(int, options.part.split("/"))
    chosen = [name for name in models() if not options.only or name in options.only][first - 1 :: count]
    tasks = [(name, ranks) for name in chosen for ranks in options.ranks or [2, 4]]
    outcomes = []
    if options.results and options.results.exists():
        outcomes = [Outcome(**json.loads(line)) for line in options.results.read_text().splitlines()]
    done = {(o.model, o.ranks) for o in outcomes}
    tasks = [task for task in tasks if task not in done]
    with ThreadPoolExecutor(options.jobs) as pool:
        for done_one in as_completed([pool.submit(_in_child, *task) for task in tasks]):
            found = done_one.result()
            outcomes.append(found)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(found)) + "\n")
            print(
                f"{found.model:40} {found.ranks} {found.graphs} graphs {found.seconds:5.1f} s  {_cell(found)}",
                flush=True,
            )
    for ranks in sorted({o.ranks for o in outcomes}):
        of = [o for o in outcomes if o.ranks == ranks]
        print(f"{ranks} ranks: {sum(not o.stage for o in of)} of {len(of)} verify")
    if options.out:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}, torchtrt_md {md.__version__}"
        options.out.write_text(page(outcomes, versions))


if __name__ == "__main__":
    main()
