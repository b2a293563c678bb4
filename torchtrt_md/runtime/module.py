"""``as_module``: a runner in the place of the model that it was compiled from, as in a diffusers pipeline.

The module is of a class made for it, below the model's own, and has the model's parameters, buffers and submodules.
So ``config``, ``dtype``, ``isinstance`` and the model's methods are as they were, and a method that calls
``self(...)`` runs the runner.  What would change the program, which is compiled, is refused.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Never, Self, TypeVar

import torch
from torch import Tensor, nn

from torchtrt_md.capture.arguments import comparable
from torchtrt_md.errors import InputError, MDError

if TYPE_CHECKING:
    from torchtrt_md.runtime.runner import Runner

M = TypeVar("M", bound=nn.Module)

# What of nn.Module's own state the module has in common with the model.  Hooks on calls are not among it: the model's
# were captured with it.
_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
)
# Methods of diffusers' and transformers' models that change what a model computes, which engines would not notice.
_CHANGES = (
    "add_adapter",
    "compile_repeated_blocks",
    "delete_adapters",
    "dequantize",
    "disable_adapters",
    "disable_lora",
    "enable_adapters",
    "enable_cache",
    "enable_forward_chunking",
    "enable_gradient_checkpointing",
    "enable_group_offload",
    "enable_layerwise_casting",
    "enable_lora",
    "enable_parallelism",
    "fuse_lora",
    "fuse_qkv_projections",
    "gradient_checkpointing_enable",
    "init_weights",
    "load_adapter",
    "load_lora_adapter",
    "resize_token_embeddings",
    "set_adapter",
    "set_adapters",
    "set_attention_backend",
    "set_attn_implementation",
    "set_attn_processor",
    "set_default_attn_processor",
    "set_input_embeddings",
    "set_output_embeddings",
    "unfuse_lora",
    "unfuse_qkv_projections",
)


def as_module(runner: Runner, model: M) -> M:
    """See :meth:`torchtrt_md.runtime.runner.Runner.as_module`."""
    if isinstance(model, RunnerModule):  # another runner takes the place of the first
        return as_module(runner, model._torchtrt_md.model)  # type: ignore[return-value]
    if not isinstance(model, nn.Module):
        raise InputError(f"a {type(model).__name__} is no model", fix="pass the nn.Module that was compiled")
    call = _AsRunnerCall(runner, model)
    own = type(model)
    made = types.new_class(own.__name__, (RunnerModule, own), exec_body=lambda names: names.update(_namespace(own)))
    module: M = object.__new__(made)
    nn.Module.__init__(module)
    state, given = vars(module), vars(model)
    # An attribute of the name of a method was put in its place on this one object, as hooks do with forward.
    state.update({name: value for name, value in given.items() if name not in state and not hasattr(nn.Module, name)})
    state.update({name: given[name] for name in _SHARED})
    state.update(training=False, _torchtrt_md=call)
    return module


class RunnerModule(nn.Module):
    """What all modules of :func:`as_module` have in front of their model's class."""

    _torchtrt_md: _AsRunnerCall

    __call__ = nn.Module.__call__  # a model's own was captured with it

    @property
    def device(self) -> torch.device:
        """Where inputs must be; the model's weights may be elsewhere."""
        return self._torchtrt_md.runner.device

    def to(self, *args: Any, **kwargs: Any) -> Self:
        for asked in (*args, *kwargs.values()):
            self._check_conversion(asked)
        return self

    def cuda(self, device: int | torch.device | None = None) -> Self:
        return self.to("cuda" if device is None else device)

    def cpu(self) -> Self:
        return self.to("cpu")

    def half(self) -> Self:
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        return self.to(torch.float32)

    def double(self) -> Self:
        return self.to(torch.float64)

    def _apply(self, *args: Any, **kwargs: Any) -> Never:  # every other way to convert a module
        _refuse(self, "a conversion", "engines hold its weights", "convert the model, and compile it again")

    def train(self, mode: bool = True) -> Self:
        if mode:
            _refuse(self, "train()", "engines compute no gradients", "train the model itself")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            _refuse(self, "requires_grad_(True)", "engines compute no gradients", "train the model itself")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Never:
        _refuse(self, "load_state_dict()", "engines hold its weights", "load them into the model, and compile it again")

    def compile(self, *args: Any, **kwargs: Any) -> Never:
        _refuse(self, "compile()", "it is compiled already", "leave compile() out")

    def __setattr__(self, name: str, value: Any) -> None:
        held = any(name in vars(self)[kind] for kind in ("_parameters", "_buffers", "_modules"))
        if held or isinstance(value, (nn.Parameter, nn.Module)):
            _refuse(self, f"another {name!r}", "engines hold its weights", "change the model, and compile it again")
        super().__setattr__(name, value)

    def __copy__(self) -> Never:
        _refuse(self, "a copy", "a runner belongs to its launch", "use the same module in both places")

    def __deepcopy__(self, memo: dict[int, Any]) -> Never:
        self.__copy__()

    def __reduce_ex__(self, protocol: Any) -> Never:
        _refuse(
            self, "pickling", "a runner belongs to its launch", "save the model, or make a bundle of it with md.export"
        )

    def _check_conversion(self, asked: object) -> None:
        """Refuse a device or a dtype that is not the compiled one; for one that is, nothing has to be moved."""
        if isinstance(asked, Tensor):
            self._check_conversion(asked.device)
            self._check_conversion(asked.dtype)
        elif isinstance(asked, torch.dtype):
            dtypes = {p.dtype for p in self.parameters() if p.is_floating_point()}
            dtype = getattr(self, "dtype", None)
            if asked != dtype and dtypes and dtypes != {asked}:
                found = dtype or ", ".join(sorted(map(str, dtypes)))
                _refuse(self, f"to({asked})", f"it is in {found}", "convert the model, and compile it again")
        elif isinstance(asked, (str, int, torch.device)) and not isinstance(asked, bool):
            device, own = torch.device(asked), self.device
            if device.type != own.type or device.index not in (None, own.index):
                _refuse(self, f"to({str(device)!r})", f"it runs on {own}", f"leave it there; inputs go to {own}, too")


class _AsRunnerCall:
    """A call of the model as a call of its runner.

    Pipelines pass every argument, also at its default, and the example arguments may have left it out.  So what the
    runner does not know is dropped if it is the default, which was built in, and what is left out is the default, for
    the runner to compare.  All refusals are the runner's: the ranks vote on them.
    """

    def __init__(self, runner: Runner, model: nn.Module) -> None:
        self.runner, self.model = runner, model
        self.signature = inspect.signature(model.forward)
        parameters = self.signature.parameters
        self.variadic = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
        self.defaults = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
        self.constants = runner.manifest.constants
        if runner.manifest.opaque:
            name = runner.manifest.opaque[0]
            raise InputError(
                f"the runner was compiled with a value of {name!r} that no call can be compared with, whether it passes"
                f" {_argument(name)} or leaves it out",
                fix=f"leave {_argument(name)} out of the example arguments and compile again; where the default of"
                f" {type(model).__name__}.forward will not do, set the value on the model",
            )
        inputs = {_argument(tensor.name) for tensor in runner.manifest.inputs}
        self.built = inputs | set(map(_argument, self.constants))
        # Built in with other values than a call has that leaves them out.
        self.not_default = {
            name: self.defaults[name]
            for name in sorted(self.built - inputs)
            if name in self.defaults and not self._is_default(name, self.constants.get(name, _Nested))
        }
        unknown = sorted(self.built - set(parameters)) if self.variadic is None else []
        if unknown:
            raise InputError(
                f"{type(model).__name__}.forward takes no {', '.join(map(repr, unknown))}, with which the runner was"
                " compiled",
                fix="pass the model that was compiled or exported",
            )

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        try:
            given = self.signature.bind(*args, **kwargs).arguments
        except TypeError:  # the runner says what it takes
            return self.runner(*args, **kwargs)
        given |= given.pop(self.variadic, {}) if self.variadic is not None else {}
        known = {name: v for name, v in given.items() if name in self.built or not self._is_default(name, v)}
        left_out = {name: default for name, default in self.not_default.items() if name not in given}
        try:
            return self.runner(**known, **left_out)
        except InputError as error:
            if not left_out:
                raise
            name, default = next(iter(left_out.items()))
            raise InputError(
                f"{name} is left out, which is {default!r} to {type(self.model).__name__}, and the runner was compiled"
                f" with {self.constants.get(name, 'another value')!r}",
                fix=f"pass {name} as it was compiled, or compile with the default",
            ) from error

    def _is_default(self, name: str, value: object) -> bool:
        if name not in self.defaults:
            return False
        default = self.defaults[name]
        if not comparable(value) or not comparable(default):
            return value is default
        return isinstance(value, bool) == isinstance(default, bool) and value == default  # 1 == True in Python


class _Nested:
    """In place of the value of an argument of which leaves are built in."""


def _argument(name: str) -> str:
    """The argument of which this is a leaf."""
    return name.partition(".")[0]


def _namespace(own: type[nn.Module]) -> dict[str, Any]:
    """What is of the one model's class in the class of its module."""

    @functools.wraps(own.forward)  # pipelines look at its parameters
    def forward(self: RunnerModule, *args: Any, **kwargs: Any) -> Any:
        return self._torchtrt_md(args, kwargs)

    # pipelines write the names of their models' classes into their configs
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return {**{name: _refused(name) for name in _CHANGES if hasattr(own, name)}, **names, "forward": forward}


def _refused(name: str) -> Any:
    def method(self: RunnerModule, *args: Any, **kwargs: Any) -> Never:
        _refuse(
            self, f"{name}()", "it changes the model, not the engines", "call it on the model, and compile it again"
        )

    method.__name__ = name
    return method


def _refuse(module: nn.Module, what: str, why: str, fix: str) -> Never:
    raise MDError(f"{what} is refused of a compiled {type(module).__name__}: {why}", fix=fix)
