"""``as_module`` on two real ranks: a runner that is called, read and refused as the model in whose place it is."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from rank_processes import Outcome, Ranks
from torch import Tensor, nn

import torchtrt_md as md
from torchtrt_md.verification.compare import relative_error

MLP: dict[str, Any] = {
    "mesh": md.Mesh(tp=2),
    "parallel": md.TensorParallel("tp", plan={"mlp.up": "colwise", "mlp.down": "rowwise"}),
}
OPTIONS: dict[str, Any] = {"compute": "inductor", "report": False, "check": False, "timeout": 120.0}


class Scaled(nn.Module):
    """Arguments of all kinds, a default that is not built in, and a call that does more than ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP()
        self.register_buffer("offset", torch.ones(()), persistent=False)
        self.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1

    def forward(
        self, x: Tensor, /, scale: float = 1.0, power: int = 1, *others: Tensor, flag: bool = False, **more: Tensor
    ) -> Tensor:
        result: Tensor = self.mlp(x) * scale**power + more["bias"] + self.offset
        return result + sum(others)

    def twice(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self(self(x, *args, **kwargs), *args, **kwargs)


def scaled() -> models.Call:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 32)
    return Scaled().eval(), (x, 3.0, 1, x.flip(1)), {"bias": torch.randn(32)}


class Typed(nn.Module):
    """An argument that no call can be compared with."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = models.MLP()

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.mlp(x).to(dtype)  # type: ignore[no-any-return]


def typed(*given: torch.dtype) -> models.Call:
    return Typed().eval(), (torch.ones(2, 8, 32), *given), {}


CASES: dict[str, tuple[Callable[[], models.Call], dict[str, Any]]] = {
    "flux": (models.flux, {"mesh": md.Mesh(cp=2), "parallel": md.ContextParallel("cp")}),
    "scaled": (scaled, MLP),
    "typed": (functools.partial(typed, torch.bfloat16), MLP),
    "default dtype": (typed, MLP),
    "llama": (models.llama, {"mesh": md.Mesh(tp=2), "parallel": md.TensorParallel("tp")}),
}
_compiled: dict[str, md.Runner] = {}  # in each rank's process


def compile_once(rank: int, name: str) -> None:
    make, options = CASES[name]
    (model, args, kwargs) = make()
    _compiled[name] = md.compile(model, args, kwargs, **OPTIONS, **options)


def close_all(rank: int) -> None:
    while _compiled:
        _compiled.popitem()[1].close()


@pytest.fixture(scope="module", autouse=True)
def compiled(ranks: Ranks) -> Iterator[None]:
    for name in CASES:
        for outcome in ranks(compile_once, name):
            assert not outcome.error, outcome.message
    yield
    ranks(close_all)


def values(outcomes: list[Outcome]) -> list[Any]:
    for outcome in outcomes:
        assert not outcome.error, outcome.message
    return [outcome.value for outcome in outcomes]


# --- calls ---


class Calls:
    """How often a module's submodules were called: never, where a runner does their work."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        for child in module.children():
            child.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


def call_as_a_pipeline(rank: int, how: str) -> tuple[float, int]:
    model, _, kwargs = models.flux()
    module: Any = _compiled["flux"].as_module(model)
    with torch.no_grad():
        want = model(**kwargs)[0]
        calls = Calls(model)
        by_name = {"joint_attention_kwargs": None, "guidance": None, "controlnet_blocks_repeat": False}
        with module.cache_context("cond"):
            if how == "by name":
                found = module(**kwargs, **by_name)[0]
            elif how == "by position":
                names = list(inspect.signature(model.forward).parameters)[:6]
                found = module(*(kwargs[name] for name in names), None, None, None, None, False)[0]
            else:
                found = module(**kwargs)[0]
    return relative_error(found, want), calls.count


@pytest.mark.parametrize("how", ["as compiled", "by name", "by position"])
def test_defaults_that_a_pipeline_passes_are_accepted(how: str, ranks: Ranks) -> None:
    for error, calls in values(ranks(call_as_a_pipeline, how)):
        assert error < 1e-5
        assert calls == 0, "the model ran, not the runner"


def call_with_all_kinds_of_arguments(rank: int, loaded: bool) -> tuple[float, float, int]:
    made, args, kwargs = scaled()
    model: Any = made
    runner = _compiled["scaled"]
    if loaded:  # as md.load makes it, which knows of the model what the manifest says
        runner = copy.copy(runner)
        runner._nest = runner.signature.nest
    module: Any = runner.as_module(model)
    with torch.no_grad():
        want, want_twice = model(*args, **kwargs), model.twice(*args, **kwargs)
        calls = Calls(model)
        found = module(*args, **kwargs, flag=False)
        return relative_error(found, want), relative_error(module.twice(*args, **kwargs), want_twice), calls.count


@pytest.mark.parametrize("loaded", [False, True])
def test_what_surrounds_forward_runs_once(loaded: bool, ranks: Ranks) -> None:
    """The model's hooks and its own ``__call__`` are in the program; its other methods call the runner."""
    for error, error_of_method, calls in values(ranks(call_with_all_kinds_of_arguments, loaded)):
        assert error < 1e-5
        assert error_of_method < 1e-5
        assert calls == 0


# What is changed in a call -> the error on both ranks.
WRONG: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "left out": ("flux", {}, ("return_dict",), "return_dict is left out, which is True to FluxTransformer2DModel"),
    "another constant": ("flux", {"return_dict": True}, (), "return_dict is True"),
    "not the default": (
        "flux",
        {"joint_attention_kwargs": {"scale": 2.0}},
        (),
        "no input 'joint_attention_kwargs.scale'",
    ),
    "not a constant": ("flux", {"guidance": torch.ones(1)}, (), "no input 'guidance'"),
    "no argument": ("flux", {"foo": 1}, (), "no input 'foo'"),
    "a missing tensor": ("flux", {}, ("timestep",), "input 'timestep' is missing"),
    "1 for True": ("scaled", {"flag": 0}, (), "no input 'flag'"),
    "another dtype": ("scaled", {"bias": torch.ones(32).double()}, (), "'bias' is torch.float64"),
}


def call_changed(rank: int, name: str, changed: dict[str, Any], without: tuple[str, ...], only: int | None) -> None:
    model, args, kwargs = CASES[name][0]()
    module: Any = _compiled[name].as_module(model)
    if only is None or rank == only:
        kwargs = {k: v for k, v in {**kwargs, **changed}.items() if k not in without}
    module(*args, **kwargs)


@pytest.mark.parametrize("what", WRONG)
def test_other_arguments_are_refused(what: str, ranks: Ranks) -> None:
    name, changed, without, message = WRONG[what]
    for outcome in ranks(call_changed, name, changed, without, None):
        assert outcome.error == "InputError"
        assert message in outcome.message


def test_a_default_that_was_not_compiled_on_one_rank_is_refused_on_both(ranks: Ranks) -> None:
    first, second = ranks(call_changed, "flux", {}, ("return_dict",), 1)
    assert first.error == second.error == "InputError"
    assert "rank 1: return_dict is True" in first.message
    assert "return_dict is left out" in second.message


def in_place_of_typed(rank: int, name: str, *given: torch.dtype) -> torch.dtype:
    model, args, _ = typed(*given)
    dtype: torch.dtype = _compiled[name].as_module(model)(*args).dtype
    return dtype


def test_what_no_call_can_be_compared_with_is_refused_by_name_unless_it_is_the_default(ranks: Ranks) -> None:
    """A call that leaves it out means the default, and one that passes it may mean another value."""
    for given in ((), (torch.bfloat16,)):
        for outcome in ranks(in_place_of_typed, "typed", *given):
            assert outcome.error == "InputError"
            assert "compiled with a value of 'dtype' that no call can be compared with" in outcome.message
    assert values(ranks(in_place_of_typed, "default dtype")) == [torch.float32] * 2
    assert values(ranks(in_place_of_typed, "default dtype", torch.float32)) == [torch.float32] * 2
    for outcome in ranks(in_place_of_typed, "default dtype", torch.bfloat16):
        assert outcome.error == "InputError"


def call_without_a_positional_default(rank: int) -> None:
    model, args, kwargs = scaled()
    _compiled["scaled"].as_module(model)(args[0], **kwargs)


def test_a_constant_is_not_filled_in_where_the_model_has_another_default(ranks: Ranks) -> None:
    for outcome in ranks(call_without_a_positional_default):
        assert outcome.error == "InputError"


def generate(rank: int) -> None:
    model, args, _ = models.llama()
    module: Any = _compiled["llama"].as_module(model)
    module.generate(*args, max_new_tokens=2)


def test_generate_runs_the_runner_which_says_what_it_takes(ranks: Ranks) -> None:
    for outcome in ranks(generate):
        assert outcome.error == "InputError"
        assert "the program has no input" in outcome.message
        assert "it takes input_ids" in outcome.message


# --- the model's own ---


def look(rank: int) -> dict[str, bool]:
    made, _, kwargs = models.flux()
    model: Any = made
    before = dict(vars(model))
    module: Any = _compiled["flux"].as_module(model)
    odd, odd_module = (m := scaled()[0]), _compiled["scaled"].as_module(m)
    module.noted = 1
    return {
        "is a model": isinstance(module, type(model)),
        "is registered under its name": f"{type(module).__module__}.{type(module).__name__}"
        == f"{type(model).__module__}.{type(model).__name__}",
        "config": module.config is model.config,
        "dtype": module.dtype is torch.float32,
        "device": module.device == _compiled["flux"].device,
        "parameters": all(a is b for a, b in zip(module.parameters(), model.parameters(), strict=True)),
        "submodules": module.transformer_blocks[0] is model.transformer_blocks[0],
        "state": list(odd_module.state_dict()) == list(odd.state_dict()) and "offset" not in odd_module.state_dict(),
        "forward's arguments": inspect.signature(module.forward) == inspect.signature(model.forward),
        "no other attributes": not hasattr(module, "no_such_name") and not hasattr(odd_module, "enable_cache"),
        "in evaluation": not module.training,
        "the model is left alone": dict(vars(model)) == before and model(**kwargs)[0].isfinite().all().item(),
        "another runner takes its place": _compiled["flux"].as_module(module)(**kwargs)[0].isfinite().all().item(),
    }


def test_all_but_forward_is_the_models(ranks: Ranks) -> None:
    for found in values(ranks(look)):
        assert [what for what, holds in found.items() if not holds] == []


HARMLESS: dict[str, Callable[[Any], Any]] = {
    "to the same device": lambda m: m.to("cpu"),
    "to the same device and dtype": lambda m: m.to(torch.device("cpu"), torch.float32, non_blocking=True),
    "to nothing": lambda m: m.to(None, None),
    "as a tensor": lambda m: m.to(torch.ones(())),
    "cpu": lambda m: m.cpu(),
    "float": lambda m: m.float(),
    "eval": lambda m: m.eval(),
    "train(False)": lambda m: m.train(False),
    "requires_grad_(False)": lambda m: m.requires_grad_(False),
}
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another dtype": (lambda m: m.to(torch.float16), "to(torch.float16)"),
    "another dtype by name": (lambda m: m.to(dtype=torch.float16), "to(torch.float16)"),
    "a tensor's dtype": (lambda m: m.to(torch.ones((), dtype=torch.float16)), "to(torch.float16)"),
    "half": (lambda m: m.half(), "to(torch.float16)"),
    "bfloat16": (lambda m: m.bfloat16(), "to(torch.bfloat16)"),
    "double": (lambda m: m.double(), "to(torch.float64)"),
    "type": (lambda m: m.type(torch.float16), "a conversion"),
    "another device": (lambda m: m.to("meta"), "to('meta')"),
    "cuda": (lambda m: m.cuda(), "to('cuda')"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "a conversion"),
    "train": (lambda m: m.train(), "train()"),
    "requires_grad_": (lambda m: m.requires_grad_(), "requires_grad_(True)"),
    "load_state_dict": (lambda m: m.load_state_dict(m.state_dict()), "load_state_dict()"),
    "compile": (lambda m: m.compile(), "compile()"),
    "another weight": (lambda m: setattr(m, "proj_out", None), "another 'proj_out'"),
    "a new module": (lambda m: setattr(m, "lora", nn.Identity()), "another 'lora'"),
    "enable_cache": (lambda m: m.enable_cache(None), "enable_cache()"),
    "fuse_qkv_projections": (lambda m: m.fuse_qkv_projections(), "fuse_qkv_projections()"),
    "load_lora_adapter": (lambda m: m.load_lora_adapter({}), "load_lora_adapter()"),
    "copy": (copy.copy, "a copy"),
    "deepcopy": (copy.deepcopy, "a copy"),
    "pickle": (pickle.dumps, "pickling"),
    "save": (lambda m: torch.save(m, io.BytesIO()), "pickling"),
}


def do_what_is_harmless(rank: int, what: str) -> bool:
    model, _, kwargs = models.flux()
    module: Any = _compiled["flux"].as_module(model)
    return HARMLESS[what](module) is module and module(**kwargs)[0].isfinite().all().item()


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless(what: str, ranks: Ranks) -> None:
    assert values(ranks(do_what_is_harmless, what)) == [True, True]


def do_what_is_refused(rank: int, what: str) -> None:
    model, _, _ = models.flux()
    REFUSED[what][0](_compiled["flux"].as_module(model))


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, ranks: Ranks) -> None:
    for outcome in ranks(do_what_is_refused, what):
        assert outcome.error == "MDError"
        assert outcome.message.startswith(f"{REFUSED[what][1]} is refused of a compiled FluxTransformer2DModel: ")


def take_another_model(rank: int, what: str) -> None:
    _compiled["flux"].as_module(models.MLP() if what == "another model" else models.mlp)  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("another model", "MLP.forward takes no 'encoder_hidden_states', 'hidden_states', 'img_ids'"),
        ("no model", "a function is no model"),
    ],
)
def test_a_model_that_was_not_compiled(what: str, message: str, ranks: Ranks) -> None:
    for outcome in ranks(take_another_model, what):
        assert outcome.error == "InputError"
        assert message in outcome.message
