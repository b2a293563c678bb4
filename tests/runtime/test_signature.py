"""Arguments and outputs against the manifest."""

import re
from typing import Any

import pytest
import quantized
import torch
from bundle import bundle_samples
from rank_processes import Ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from torchtrt_md.errors import InputError, VerificationError
from torchtrt_md.mesh import Mesh
from torchtrt_md.program import Sharding, Value, part
from torchtrt_md.runtime.signature import Signature, prepared

CPU = torch.device("cpu")
X = torch.randn(2, 8)  # this rank's chunk
MASK = torch.ones(4, dtype=torch.bool)


@pytest.fixture(scope="module")
def signature() -> Signature:
    return Signature(bundle_samples.manifest())


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X, [MASK, None]), {}),
        ((X,), {"mask": [MASK, None]}),
        ((), {"mask": (MASK, None), "x": X, "return_dict": False}),
        ((X,), {"mask.0": MASK}),
    ],
)
def test_by_position_and_by_name(signature: Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound = signature.bind(args, kwargs, CPU)
    assert list(bound) == ["x", "mask.0"]
    assert bound["x"] is X
    assert bound["mask.0"] is MASK


def test_constants_by_position() -> None:
    signature = Signature(bundle_samples.manifest(positional=["x", "return_dict", "mask"]))
    for args in ((X, False, [MASK, None]), (X, False, (MASK, None))):
        assert list(signature.bind(args, {}, CPU)) == ["x", "mask.0"]
    with pytest.raises(InputError, match="return_dict is True, and the program was built with return_dict=False"):
        signature.bind((X, True, [MASK, None]), {}, CPU)
    with pytest.raises(InputError, match=r"2 positional arguments, and the program takes 0\n"):
        Signature(bundle_samples.manifest(positional=[])).bind((X, [MASK, None]), {}, CPU)


REFUSED: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "input 'mask.0' is missing": ((X,), {}),
    "inputs 'x', 'mask.0' are missing": ((), {}),
    "no input 'guidance'": ((X, [MASK, None]), {"guidance": X}),
    "no input 'mask.2'": ((X, [MASK, None, X]), {}),
    "3 positional arguments, and the program takes 2: x, mask": ((X, [MASK, None], False), {}),
    "argument 'x' is given twice": ((X, [MASK, None]), {"x": X}),
    "argument 'mask.0' is given twice": ((X,), {"mask": [MASK, None], "mask.0": MASK}),
    "return_dict is device(type='cpu'), and the program was built with": ((X, [MASK, None]), {"return_dict": CPU}),
    "guidance is a device, which cannot be compared": ((X, [MASK, None]), {"guidance": CPU}),
    "return_dict is True, and the program was built with return_dict=False": ((X, [MASK, None]), {"return_dict": True}),
    "return_dict is 0, and": ((X, [MASK, None]), {"return_dict": 0}),
    "mask.1 is a tensor of shape [2, 8], and the program was built with mask.1=None": ((X, [MASK, X]), {}),
    "x is a list, and the program was built with x, which it lacks": (([X], [MASK, None]), {}),
    "input 'x' is a NoneType, and the program takes a tensor": ((None, [MASK, None]), {}),
    "input 'x' is torch.float16 and the program takes torch.float32": ((X.half(), [MASK, None]), {}),
    "input 'x' is on meta and the program runs on cpu": ((X.to("meta"), [MASK, None]), {}),
    "input 'x' requires a gradient": ((X.clone().requires_grad_(), [MASK, None]), {}),
    "input 'mask.0' has shape [3] and the program takes [4]": ((X, [MASK[:3], None]), {}),
    "input 'x' has shape [4, 8] and the program takes [2, 8]: this rank's chunk of [4, 8], split on dim 0 over the 2"
    " ranks of 'cp'": ((torch.randn(4, 8), [MASK, None]), {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(signature: Signature, message: str) -> None:
    args, kwargs = REFUSED[message]
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        signature.bind(args, kwargs, CPU)
    assert raised.value.fix


def test_what_cannot_be_compared_is_left_out_of_a_list_too() -> None:
    """To pass it is refused, so to leave it out must not be."""
    signature = Signature(bundle_samples.manifest(opaque=["mask.2"]))
    signature.bind((X, [MASK, None]), {}, CPU)
    with pytest.raises(InputError, match=r"mask\.2 is a device, which cannot be compared") as raised:
        signature.bind((X, [MASK, None, CPU]), {}, CPU)
    assert "leave mask.2 out" in raised.value.fix


def pass_a_dtensor(rank: int) -> None:
    placed = DTensor.from_local(X, init_device_mesh("cpu", (2,)))
    Signature(bundle_samples.manifest()).bind((placed, [MASK, None]), {}, CPU)


def test_a_dtensor_is_refused(ranks: Ranks) -> None:
    for outcome in ranks(pass_a_dtensor):
        assert outcome.error == "InputError"
        assert "input 'x' is a DTensor" in outcome.message


def test_a_quantized_tensor_is_refused(signature: Signature) -> None:
    scaled = quantized.mlp("int8 weights")[0].up.weight
    with pytest.raises(InputError, match="input 'x' is a Int8Tensor") as raised:
        signature.bind((scaled, [MASK, None]), {}, CPU)
    assert "dequantize()" in raised.value.fix


def test_a_gradient_is_no_matter_where_none_is_asked_for(signature: Signature) -> None:
    with torch.no_grad():
        signature.bind((X.clone().requires_grad_(), [MASK, None]), {}, CPU)


def test_float_constants() -> None:
    signature = Signature(bundle_samples.manifest(constants={"scale": 0.5, "steps": 2, "mode": "ring"}))
    signature.bind((X, [MASK]), {"scale": 0.5, "steps": 2, "mode": "ring"}, CPU)
    with pytest.raises(InputError, match=r"steps is 2\.0, and the program was built with steps=2"):
        signature.bind((X, [MASK]), {"steps": 2.0}, CPU)  # what is computed with it may be of another dtype
    with pytest.raises(InputError, match="mode is 'ulysses', and the program was built with mode='ring'"):
        signature.bind((X, [MASK]), {"mode": "ulysses"}, CPU)


def test_an_empty_list_is_not_what_was_built_in() -> None:
    signature = Signature(bundle_samples.manifest(constants={"residual": None}))
    signature.bind((X, [MASK]), {"residual": None}, CPU)
    empties: list[object] = [[], {}, ()]
    for empty in empties:
        with pytest.raises(InputError, match=r"residual is .*, and the program was built with residual"):
            signature.bind((X, [MASK]), {"residual": empty}, CPU)


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({"sizes": [1, 2]}, "sizes.2"),
        ({"sizes": []}, "sizes.0, sizes.1, sizes.2"),
        ({"joint": {"scale": 0.5}}, "joint.parts.0"),
        ({"joint": {"parts": [], "scale": 0.5}}, "joint.parts.0"),
        ({"sizes": 1}, "sizes.0, sizes.1, sizes.2"),
        ({"kind": {}}, "kind.dtype"),  # which a manifest has the name of alone
    ],
)
def test_a_list_or_dict_that_lacks_what_was_built_in_is_refused(given: dict[str, Any], lacking: str) -> None:
    """The program would compute with the rest of the former one."""
    built = {"sizes.0": 1, "sizes.1": 2, "sizes.2": 3, "joint.parts.0": 4, "joint.scale": 0.5}
    signature = Signature(bundle_samples.manifest(constants=built, opaque=["kind.dtype"]))
    signature.bind((X, [MASK]), {"sizes": [1, 2, 3], "joint": {"parts": [4], "scale": 0.5}}, CPU)
    signature.bind((X, [MASK]), {}, CPU)
    with pytest.raises(InputError, match=rf"and the program was built with {lacking}, which it lacks"):
        signature.bind((X, [MASK]), given, CPU)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (X.to_sparse(), "sparse_coo"),
        (torch.nested.nested_tensor([X[0], X[1]], layout=torch.jagged), "nested"),
    ],
)
def test_a_tensor_that_is_not_dense_is_refused_in_the_vote(
    signature: Signature, tensor: torch.Tensor, kind: str
) -> None:
    with pytest.raises(InputError, match=f"input 'x' is a {kind} tensor, and the program takes a dense one"):
        signature.bind((tensor, [MASK, None]), {}, CPU)


def test_outputs_nest_and_flatten() -> None:
    outputs = [Value("a", (1,), torch.float32), Value("b", (1,), torch.float32)]
    result = {"dict": {"sample": {"output": 1}, "rest": {"tuple": [{"constant": 3}, {"list": [{"output": 0}]}]}}}
    signature = Signature(bundle_samples.manifest(outputs=outputs, result=result))
    a, b = torch.zeros(1), torch.ones(1)
    nested = signature.nest({"a": a, "b": b})
    assert nested == {"sample": b, "rest": (3, [a])}
    flat = signature.flat(nested)
    assert flat["a"] is a
    assert flat["b"] is b
    for other in ((a, b), {"sample": b}, {"sample": b, "rest": (3, [])}, a):
        with pytest.raises(VerificationError, match="is not what the bundle returns"):
            signature.flat(other)


def test_parts() -> None:
    whole = torch.arange(16).reshape(4, 4)
    mesh = Mesh(cp=2, tp=2)
    assert part(whole, [Sharding(0, "cp"), Sharding(1, "tp")], mesh, 2).tolist() == [[8, 9], [12, 13]]
    assert part(whole, [], mesh, 2) is whole


def test_prepared_only_copies_what_an_engine_cannot_read() -> None:
    storage = torch.arange(1024.0)
    start = (-storage.data_ptr() % 256) // 4
    aligned = storage[start : start + 256]
    assert prepared(aligned).data_ptr() == aligned.data_ptr()
    for view in (storage[start + 1 : start + 257], aligned.view(16, 16).t(), torch._neg_view(aligned)):
        ready = prepared(view)
        assert torch.equal(ready, view)
        assert ready.is_contiguous()
        assert not ready.is_neg()
        assert ready.data_ptr() != view.data_ptr()
