"""Every private name of Dynamo that the ``torch.compile`` backend needs, and what breaks without it.

Tests in ``tests/capture/test_dynamo_graphs.py`` name the feature that goes when one of these moves.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import FSDPNNModuleSource, is_from_unspecialized_param_buffer_source
from torch._guards import ChainedSource, tracing
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node

from torchtrt_md.errors import MDError

# The function that torch.compile puts in place of another, and the methods of a module that are its whole forward.
_WRAPPER = ("torch._dynamo.eval_frame", "compile_wrapper")
_COMPILING = "torch._dynamo.convert_frame"
_INLINING = "torch._dynamo.external_utils"  # which has Dynamo compile the whole call, of modules that are PyTorch's own
_CALLING = ("torch.nn.modules.module", "torch.fx.graph_module")  # between a call and forward
_FORWARDS = ("forward", "_call_impl", "_wrapped_call_impl")


class CallInProgress(NamedTuple):
    """The call that is being compiled."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def is_weight(placeholder: Node) -> bool:
    """Is this input of a Dynamo graph a parameter or a registered buffer of a module, there from call to call?

    Without it, weights could not be told from what the user passes, and engines would take them as inputs.  Those of
    FSDP come and go: it gathers them before each call of a module, and lets go of them behind it.
    """
    source = placeholder.meta["grapharg"].source
    return bool(is_from_unspecialized_param_buffer_source(source)) and not _of_fsdp(source)


def _of_fsdp(source: Any) -> bool:
    """Is it an attribute of a module that FSDP manages, or of one in it?"""
    while isinstance(source, ChainedSource):
        source = source.base
        if isinstance(source, FSDPNNModuleSource):
            return True
    return False


def source_path(placeholder: Node) -> tuple[str, ...]:
    """Where an input comes from, outermost first: ("args", "0"), ("self", "_modules", "up", "_parameters", "weight").

    Empty where it is neither an argument nor an attribute of one.  Without it, errors could not name inputs.
    """
    name = placeholder.meta["grapharg"].source.name
    text = name() if callable(name) else name  # a method before torch 2.12
    if not text.startswith("L["):
        return ()
    return tuple(quoted or plain for quoted, plain in re.findall(r"\['([^']*)'\]|[\[.](\w+)", text))


def graph_break(graph: GraphModule) -> str | None:
    """Why Dynamo ended this graph before the function's end; None where it did not.

    Without it, a part of a model could be taken for the whole.
    """
    reason: Any = graph.compile_subgraph_reason
    return str(reason.reason) if reason.graph_break else None


@contextmanager
def outside_dynamo() -> Iterator[None]:
    """Work that a backend does as if no compilation were under way.

    Without it, a graph could not be traced on fake tensors of our own, nor could Inductor be called on a part of it:
    both would meet Dynamo's fake tensors.
    """
    with tracing(None):
        yield


def passed_on(error: MDError) -> MDError:
    """The error in a form that Dynamo hands to the user as it is, of a subclass of its class.

    Without it, each would be a ``BackendCompilerFailed`` with the message inside, which no ``except MDError`` catches.
    """
    kind = type(error)
    frame = inspect.currentframe()
    text = str(error)  # Dynamo adds to the arguments of what passes it that it should be reported to PyTorch
    body = {"__module__": kind.__module__, "__str__": lambda self: text}
    both: Any = type(kind.__name__, (kind, ShortenTraceback), body)
    # Not by its __init__: the two classes' take different arguments.
    raised = both.__new__(both, text)
    # Dynamo cuts the traceback before the caller of this function.
    raised.__dict__.update(error.__dict__, first_useful_frame=frame.f_back if frame is not None else None)
    return cast(MDError, raised.with_traceback(error.__traceback__))


def call_in_progress() -> CallInProgress | None:
    """The module that ``torch.compile`` was given, and the arguments of its call that is being compiled.

    None where a function was compiled.  Without it, a plan could not be applied to a dense model: a Dynamo graph has
    no modules that the plan could name.
    """
    frame = inspect.currentframe()
    while frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) != _WRAPPER:
        frame = frame.f_back
    if frame is None:
        return None
    function, args, kwargs = (frame.f_locals.get(name) for name in ("fn", "args", "kwargs"))
    caller = frame.f_back.f_locals.get("self") if frame.f_back is not None else None
    if isinstance(caller, OptimizedModule):
        module: object = caller._orig_mod
    elif getattr(function, "__name__", "") in _FORWARDS:  # model.compile(), or torch.compile(model.forward)
        module = getattr(function, "__self__", None)
    else:
        return None
    if not isinstance(module, nn.Module) or not isinstance(args, tuple) or not isinstance(kwargs, dict):
        return None
    return CallInProgress(module, args, kwargs)


def runs_outside(model: nn.Module) -> str | None:
    """What of the model's call Dynamo leaves to Python, around the function that it compiles; None where nothing.

    Without it, what runs there would be done twice: the program is of the whole call.
    """
    frame, innermost = inspect.currentframe(), ""
    while frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) != _WRAPPER:
        name = str(frame.f_globals.get("__name__"))
        if name == _COMPILING:
            innermost = ""
        elif not innermost and name not in _CALLING and not name.startswith("torch._dynamo."):
            innermost = f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"
        frame = frame.f_back
    function = None if frame is None else frame.f_locals.get("fn")
    inlined = getattr(function, "__globals__", {}).get("__name__") == _INLINING
    if not inlined and (model._forward_hooks or model._forward_pre_hooks):
        return "hooks of its own"
    return innermost if innermost and frame is not None else None


def group_ranks(name: str) -> Sequence[int]:
    """The ordered global ranks of a process group, by the name that graphs have for it.

    Without it, a group in a graph could not be recognised as an axis of the mesh.
    """
    group: Any = name  # typed as a str of its own
    return dist.get_process_group_ranks(_resolve_process_group(group))


def memory_of(tensor: Tensor) -> int:
    """A number that two tensors, fake ones too, have in common where they share memory.

    Without it, a result that is a view of an input would be a tensor of its own.
    """
    return int(tensor.untyped_storage()._cdata)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, without a view; any other tensor as it is.

    Without it, each call of a compiled model would make a view of every weight to see that it did not change.
    """
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
