"""Models on meta through the doors: the ranks of a launch read their parts of a checkpoint, and so does an export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from command_line import Run
from rank_processes import Ranks
from safetensors.torch import save_file
from torch import Tensor

import torchtrt_md as md
from torchtrt_md.verification.compare import relative_error

ROOT = Path(__file__).resolve().parents[2]
PARALLEL = md.TensorParallel("tp", plan={"up": "colwise", "down": "rowwise"})
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "timeout": 120.0}


def checkpoint(folder: Path, seed: int = 0) -> tuple[models.MLP, Tensor]:
    """A model, what it is called with, and its checkpoint of two files and an index in a folder."""
    torch.manual_seed(seed)
    model = models.MLP().eval()
    placed: dict[str, str] = {}
    folder.mkdir(exist_ok=True)
    for name in ("up", "down"):
        held = {key: t for key, t in model.state_dict().items() if key.startswith(name)}
        save_file(held, folder / f"{name}.safetensors")
        placed |= dict.fromkeys(held, f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return model, torch.randn(2, 8, 32)


def on_meta() -> models.MLP:
    with torch.device("meta"):
        return models.MLP().eval()


def run_compiled(model: models.MLP, weights: str | None, x: Tensor) -> Tensor:
    with md.compile(model, (x,), mesh=md.Mesh(tp=2), parallel=PARALLEL, weights=weights, **OPTIONS) as runner:
        result: Tensor = runner(x)
        return result.clone()


def compile_and_run(rank: int, folders: list[str | None], x: Tensor) -> Tensor:
    model = on_meta()
    result = run_compiled(model, folders[rank], x)
    assert all(p.is_meta for p in model.parameters()), "the model is as it was"
    return result


def load_and_run(rank: int, bundle: str, weights: str | None, x: Tensor) -> Tensor:
    with md.load(bundle, timeout=60.0, weights=weights) as runner:
        result: Tensor = runner(x)
        return result.clone()


def test_each_rank_compiles_with_its_part_of_the_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    model, x = checkpoint(tmp_path / "a")
    with torch.no_grad():
        expected = model(x)
    for outcome in ranks(compile_and_run, [str(tmp_path / "a")] * 2, x):
        assert not outcome.error, outcome.message
        assert relative_error(outcome.value, expected) < 1e-6


def test_what_is_wrong_on_one_rank_is_refused_on_all(ranks: Ranks, tmp_path: Path) -> None:
    good, other, damaged, more = (tmp_path / name for name in ("good", "other", "damaged", "more"))
    for folder, seed in ((good, 0), (other, 1), (damaged, 0), (more, 0)):
        _, x = checkpoint(folder, seed)
    (damaged / "up.safetensors").write_bytes(b"no weights")
    for index in more.glob("*.json"):
        index.unlink()
    save_file({"lora": torch.ones(2)}, more / "lora.safetensors")
    for second, kind, message in (
        (damaged, "WeightsError", "rank 1: .*up.safetensors is not a whole safetensors file"),
        (more, "WeightsError", "rank 1: .* has 'lora', and MLP has no weight of that name"),
        (None, "CaptureError", "rank 1: the weight 'up.weight' and 3 more of the model is on meta and has no value"),
        (other, "RankMismatchError", "the weight 'down.bias' is not the same on ranks that hold the same part of it"),
    ):
        outcomes = ranks(compile_and_run, [str(good), second and str(second)], x)
        assert [outcome.error for outcome in outcomes] == [kind] * 2
        for outcome in outcomes:
            assert re.search(message, outcome.message), outcome.message


def test_checkpoints_that_differ_only_in_what_each_rank_has_a_part_of(ranks: Ranks, tmp_path: Path) -> None:
    """As those of two finetunings that left the norms as they were."""
    model, x = checkpoint(tmp_path / "a")
    stripped = md.export(
        model,
        (x,),
        mesh=md.Mesh(tp=2),
        parallel=PARALLEL,
        compute="inductor",
        out=tmp_path / "bare",
        strip_weights=True,
    )
    assert {value.name for value in stripped.manifest.given if not value.sharding} == {"down.bias"}
    checkpoint(tmp_path / "b")
    other = {"up.weight": model.up.weight * 2, "up.bias": model.up.bias}
    save_file(other, tmp_path / "b" / "up.safetensors")
    folders = [str(tmp_path / name) for name in "ab"]
    for outcomes in (
        ranks(compile_and_run, folders, x),
        ranks(compile_own_model, x),
        ranks(load_with_own_weights, str(tmp_path / "bare"), folders, x),
    ):
        for outcome in outcomes:
            assert outcome.error == "RankMismatchError", outcome
            assert "the weight 'up.weight' is not the same" in outcome.message


def compile_on_one_rank_and_read_on_the_other(rank: int, folder: str, factor: float, x: Tensor) -> Tensor:
    """Rank 0 alone has the dense model, with which it verifies; of it the first weight times ``factor``."""
    torch.manual_seed(0)
    model, weights = (on_meta(), folder) if rank else (models.MLP().eval(), None)
    if not rank:
        with torch.no_grad():
            model.up.weight.mul_(factor)
    return run_compiled(model, weights, x)


def test_the_dense_model_on_one_rank_and_its_checkpoint_on_the_other(ranks: Ranks, tmp_path: Path) -> None:
    model, x = checkpoint(tmp_path / "a")
    with torch.no_grad():
        expected = model(x)
    for outcome in ranks(compile_on_one_rank_and_read_on_the_other, str(tmp_path / "a"), 1.0, x):
        assert not outcome.error, outcome.message
        assert relative_error(outcome.value, expected) < 1e-6
    for outcome in ranks(compile_on_one_rank_and_read_on_the_other, str(tmp_path / "a"), 2.0, x):
        assert outcome.error == "RankMismatchError"
        assert "the weight 'up.weight' is not the same on all ranks, by some of its rows" in outcome.message


def compile_own_model(rank: int, x: Tensor) -> None:
    """Dense models of which the ranks' parts of one weight differ, and all that both hold is equal."""
    torch.manual_seed(0)
    model = models.MLP().eval()
    with torch.no_grad():
        model.up.weight.mul_(rank + 1)
    md.compile(model, (x,), mesh=md.Mesh(tp=2), parallel=PARALLEL, **OPTIONS)


def load_with_own_weights(rank: int, bundle: str, folders: list[str], x: Tensor) -> None:
    md.load(bundle, timeout=60.0, weights=folders[rank])


def test_a_bundle_of_a_model_on_meta(ranks: Ranks, tmp_path: Path) -> None:
    model, x = checkpoint(tmp_path / "a")
    how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": PARALLEL, "compute": "inductor"}
    whole = md.export(on_meta(), (x,), weights=tmp_path / "a", out=tmp_path / "whole", **how)
    real = md.export(model, (x,), out=tmp_path / "real", **how)
    assert whole.manifest == real.manifest, "files are named by their hashes: the weights are the same"
    assert whole.report is not None
    assert "is on meta: the whole of it was compared" in whole.report.notes[-1]
    bare = md.export(on_meta(), (x,), out=tmp_path / "bare", strip_weights=True, check=False, **how)
    assert {value.name for value in bare.manifest.given} == set(model.state_dict())
    with torch.no_grad():
        expected = model(x)
    for bundle, weights in (("whole", None), ("bare", str(tmp_path / "a"))):
        for outcome in ranks(load_and_run, str(tmp_path / bundle), weights, x):
            assert not outcome.error, outcome.message
            assert relative_error(outcome.value, expected) < 1e-6


def test_an_export_without_what_it_needs_writes_nothing(tmp_path: Path) -> None:
    _, x = checkpoint(tmp_path / "a")
    how: dict[str, Any] = {"mesh": md.Mesh(tp=2), "parallel": PARALLEL, "compute": "inductor", "out": tmp_path / "out"}
    every: list[dict[str, Any]] = [{}, {"check": False}, {"strip_weights": True}]
    for options in every:
        with pytest.raises(
            md.CaptureError, match=r"'up.weight' and 3 more of the model is on meta(?s:.*)pass weights="
        ):
            md.export(on_meta(), (x,), **how, **options)
    with pytest.raises(md.OptionError, match="'weights' cannot be 3"):
        md.export(on_meta(), (x,), weights=3, **how)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_the_folder(run: Run, tmp_path: Path) -> None:
    model = models.llama()[0]
    model.save_pretrained(tmp_path / "llama", max_shard_size="200KB")  # type: ignore[operator]
    file = tmp_path / "llama.py"
    file.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import torch\n"
        "from accelerate import init_empty_weights\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "def model():\n"
        "    with init_empty_weights():\n"
        f"        made = LlamaForCausalLM(LlamaConfig.from_pretrained({str(tmp_path / 'llama')!r})).eval()\n"
        "    return made, (torch.randint(0, 128, (1, 24)),), {'use_cache': False}\n"
    )

    command = ("export", file, "--mesh", "tp=2", "--dry-run")
    code, said, wrong = run(*command, "--weights", tmp_path / "llama")
    assert code == 0, said + wrong
    assert "LlamaForCausalLM is on meta: the whole of it was compared, its weights read one at a time" in said
    code, _, wrong = run(*command)
    assert code == 1
    assert "CaptureError: the weight 'model.embed_tokens.weight' and" in wrong
