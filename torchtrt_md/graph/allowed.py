"""What a graph of a bundle may call: the ops that lowering can produce, and no other.

A graph comes from a file, and whoever made the file chose its ops.  The ops of PyTorch read and write files
(``aten.from_file``, ``aten.save``), set the state of the process (``aten.manual_seed``), write to their operands, some
of which their schema does not admit (``aten._no_grad_embedding_renorm_``), and read beyond them
(``aten._nested_view_from_buffer``).  So an op is refused unless something speaks for it:

    its tag core or pointwise       PyTorch states what it is, and its compilers rely on that
    it has a decomposition          PyTorch states it in terms of others
    the rules of sharding know it   lowering carries it from the whole to the shard
    it is of the collective IR      as it is after lowering
    it is in ``_KERNELS``           products, transforms and linear algebra of models that have none of these

Whatever speaks for an op, its properties may speak against it: that it mutates, that its results depend on random
numbers or their sizes on values, that it gives what is no tensor, that it takes what is no data of a graph.  A string
is a word of the few arguments that are one of several words, never text.

Lowering itself gives nothing else (models are functional by then, in eval mode, with static shapes), and what it gives
in a model yet to come is refused when the graph is written, with the user's line.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tag
from torch.fx import Node

from torchtrt_md.errors import BundleError
from torchtrt_md.graph.private import decomposition_table
from torchtrt_md.lowering.ops import COLLECTIVES
from torchtrt_md.lowering.sharding_rules import RULES

aten, md = torch.ops.aten, torch.ops.torchtrt_md
NAMESPACES = ("aten", "prims", "torchtrt_md")

_IR = COLLECTIVES | {md.attention.default, md.ring_attention.default, md.grouped_mm.default}
_KERNELS = frozenset(
    getattr(aten, name)
    for name in (
        # products
        *("addbmm", "_int_mm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "_weight_int8pack_mm", "_trilinear"),
        *("_convolution", "_conv_depthwise2d", "conv_depthwise3d"),
        # transforms, windows and resampling
        *("_fft_c2c", "fft_fftfreq", "fft_rfftfreq"),
        *("bartlett_window", "blackman_window", "hamming_window", "kaiser_window"),
        *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_3d"),
        # linear algebra
        *("cholesky_inverse", "cholesky_solve", "triangular_solve", "lu_unpack", "geqrf", "ormqr"),
        *("linalg_cholesky_ex", "linalg_eig", "linalg_householder_product", "linalg_inv_ex", "linalg_lu"),
        *("linalg_lu_factor_ex", "linalg_lu_solve", "linalg_matrix_exp", "linalg_qr", "linalg_solve_triangular"),
        *(
            "_linalg_det",
            "_linalg_eigh",
            "_linalg_eigvals",
            "_linalg_slogdet",
            "_linalg_solve_ex",
            "_linalg_svd",
            "linalg_pinv",
        ),
        # searching
        *("searchsorted", "histc", "nanmedian", "index_reduce", "range", "native_norm", "_logcumsumexp", "_stack"),
        # what functionalization leaves in place of views
        *("slice_copy", "select_copy", "split_copy", "detach_copy", "view_as_complex_copy", "view_as_real_copy"),
        *("_conj_copy", "_neg_view_copy", "_reshape_alias_copy"),
    )
    if hasattr(aten, name)  # not every version has them all
)
# They give nothing and do nothing but raise.
_ASSERTIONS = frozenset({aten._assert_tensor_metadata.default, aten._linalg_check_errors.default})
# Their results hold what was in the memory before.  Lowering fills them.
_UNINITIALIZED = frozenset(
    {aten.empty, aten.empty_like, aten.empty_strided, aten.empty_permuted, aten.new_empty, aten.new_empty_strided}
    | {aten.resize_as}
)
# Compiled, they read and write wherever their indices say.
_UNCHECKED = frozenset(
    {aten._unsafe_index, aten._unsafe_index_put, aten._unsafe_masked_index, aten._unsafe_masked_index_put_accumulate}
)
_BAD_TAGS = {
    Tag.nondeterministic_seeded: "draws random numbers",
    Tag.inplace_view: "changes its operand in place",
    Tag.data_dependent_output: "returns a value that is no tensor",
    Tag.dynamic_output_shape: "returns a tensor whose size depends on values",
}
_BY_INDICES = aten.index.Tensor  # the size depends on values where indices are masks; see check_call
_MASKS = (torch.bool, torch.uint8)
# Types of arguments and results, as schemas print them.
_DATA = {"Tensor", "int", "float", "bool", "number", "complex", "str", "Device"}
_RESULTS = {"Tensor", "List[Tensor]"}
_WRAPPED = re.compile(r"^(?:Optional|List)\[(.*)\]$")
# Arguments that are one of a few words.
_WORDS = {
    *("rounding_mode", "approximate", "reduce", "op", "axis", "norm", "indexing", "side", "mode", "UPLO", "driver"),
    "api_name",  # of an assertion: "linalg.inv"
    "exchange_dtype",
}
_DEVICES = ("cpu", "cuda")
_OTHER = "compute it outside of the model, or another way; if it is a function of tensors, report the model"


def find_op(name: str) -> torch._ops.OpOverload[Any, Any] | None:
    """The op ``namespace.name.overload``, or None where there is none."""
    namespace, *rest = name.split(".")
    if namespace not in NAMESPACES or len(rest) != 2:
        return None
    found: object = getattr(torch.ops, namespace)
    for part in rest:
        found = getattr(found, part, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def check_op(op: torch._ops.OpOverload[Any, Any]) -> None:
    """Refuse an op that no graph of a bundle may call.

    Raises:
        BundleError: saying why.
    """
    reason = _against(op)
    if reason:
        raise BundleError(
            f"calls {op}, which {reason}, and a graph of a bundle has no such op",
            fix=_OTHER,
        )


def check_call(node: Node, value_of: Callable[[Node], Any]) -> None:
    """Refuse a call of an allowed op with arguments that no graph of a bundle has.

    Args:
        value_of: what a node before it gives.

    Raises:
        BundleError: naming the argument.
    """
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = {a.name: a for a in node.target._schema.arguments}
    given: dict[str, Any] = dict(zip(schema, node.args, strict=False)) | dict(node.kwargs)
    if len(node.args) > len(schema) or not given.keys() <= schema.keys() or len(given) < len(node.args):
        raise BundleError(f"calls {node.target} with arguments that it does not take", fix="report the model")
    for name, value in given.items():
        for leaf in _leaves(value):
            if isinstance(leaf, str) and not (
                name in _WORDS and leaf is value and leaf.replace(".", "_").isidentifier()
            ):
                raise BundleError(
                    f"calls {node.target} with {name}={leaf[:80]!r}, and a graph of a bundle has no text",
                    fix=f"of words there are those of {', '.join(sorted(_WORDS))}",
                )
            if isinstance(leaf, torch.device) and leaf.type not in _DEVICES:
                raise BundleError(
                    f"calls {node.target} with {name}={leaf}, and a bundle runs on {' and '.join(_DEVICES)}",
                    fix="trace the model there",
                )
    indices = given["indices"] if node.target is _BY_INDICES else ()
    if any(isinstance(leaf, Node) and value_of(leaf).dtype in _MASKS for leaf in _leaves(indices)):
        raise BundleError(
            f"calls {node.target} with a mask, which returns a tensor whose size depends on values, and a graph of a"
            " bundle has no such op",
            fix="keep the size, by torch.where in place of x[mask]",
        )
    if node.target in _IR and "src" in given and given["src"] not in range(given.get("size", 0)):
        raise BundleError(f"calls {node.target} with src={given['src']}, which is no rank of it", fix=_OTHER)
    # Batch norms write to their running statistics in training, whatever their schemas say.
    if given.get("training") and any(given.get(name) is not None for name in ("running_mean", "running_var")):
        raise BundleError(
            f"calls {node.target} in training, where it changes its running statistics in place",
            fix="call model.eval() before the capture",
        )


@functools.cache
def _against(op: torch._ops.OpOverload[Any, Any]) -> str:
    """Why a graph of a bundle may not call this op, or ""."""
    if op in _IR or op in _ASSERTIONS:
        return ""
    schema, packet = op._schema, op.overloadpacket
    if schema.is_mutable:
        return "writes to its operands"
    for tag, reason in _BAD_TAGS.items():
        if tag in op.tags and op is not _BY_INDICES:
            return reason
    if packet in _UNINITIALIZED:
        return "returns memory as it was left"
    if packet in _UNCHECKED:
        return "does not check its indices"
    if not schema.returns or not all(str(r.type) in _RESULTS for r in schema.returns):
        return "returns what is no tensor"
    for argument in schema.arguments:
        if _unwrapped(str(argument.type)) not in _DATA:
            return f"takes a {argument.type} ({argument.name})"
    known = (
        Tag.core in op.tags
        or Tag.pointwise in op.tags
        or op in decomposition_table
        or (op.namespace == "aten" and packet in RULES)
        or packet in _KERNELS
    )
    return "" if known else "neither PyTorch nor lowering states to be a function of tensors"


def _unwrapped(kind: str) -> str:
    while inner := _WRAPPED.match(kind):
        kind = inner[1]
    return kind


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
