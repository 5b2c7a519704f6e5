"""A card that is not there: within `card`, tensors may be on CUDA, and networks run on them, with
any build of PyTorch and without a compiler.

They are PyTorch's fake tensors, with a shape, a layout and a device but no values. They do by
themselves all that wants no gradients. Autograd, autocast and a few who look for a real card, or
for plain tensors, are helped along here.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .. import ops
from ..common.errors import UserError

CARD = torch.device("cuda")
CAPABILITY = 90  # an H100, as far as the kernels ask


@contextmanager
def card(kernels: str = "torch") -> Iterator[None]:
    """Within it CARD is there, and `ops` chooses these kernels. Raises UserError where PyTorch does
    not let itself be helped."""
    before = ops.mode()
    stand_ins = {
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.is_bf16_supported": lambda **_: True,
        "torch.nn.utils.clip_grad._has_foreach_support": lambda *_: True,
        "torch.nn.functional.scaled_dot_product_attention": flash_attention,
        "torch.autograd._engine_run_backward": walk_backward,
        "torch._C._current_graph_task_id": lambda: 0,  # checkpoints ask which backward pass it is
    }
    if ops.attention_kernels:
        stand_ins["minibooth_kernels.card.capability"] = lambda device: CAPABILITY
        stand_ins["minibooth_kernels.card.shared_memory"] = lambda device: float("inf")
    with ExitStack() as stack:
        stack.enter_context(device_guard())
        for name, stand_in in stand_ins.items():
            stack.enter_context(mock.patch(name, stand_in))
        silu = "aten::silu_backward"  # PyTorch takes it apart where a build has no kernel for it
        if not torch._C._dispatch_has_kernel_for_dispatch_key(silu, "CUDA"):
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            library.impl("silu_backward", lambda *_: None, "CUDA")  # fakes never come to it
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.callback(ops.use, before)
        ops.use(kernels)
        yield


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *_, scale: float | None = None, **__
) -> Tensor:
    """What scaled_dot_product_attention comes to for 16-bit tensors without a mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


@contextmanager
def device_guard() -> Iterator[None]:
    """Autograd notes for every operator on CUDA which stream is current, and asks the device's
    guard. A build for CPUs has none; in its place stands that of the device "meta", which does
    nothing."""
    torch._C._ensureCUDADeviceGuardSet()  # the same, of a build for CUDA that finds no card
    if torch.backends.cuda.is_built():
        yield
        return
    try:
        (library,) = (Path(torch.__file__).parent / "lib").glob("libc10.*")
        name = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
        registry = (ctypes.c_void_p * 15).in_dll(ctypes.CDLL(str(library)), name)
    except (OSError, ValueError):
        raise UserError("this needs Linux, macOS, or a PyTorch that is built for CUDA") from None
    cuda, meta = 1, 14  # c10/core/DeviceType.h
    registry[cuda] = registry[meta]
    try:
        yield
    finally:
        registry[cuda] = None


# ---- the backward pass -------------------------------------------------------------------------


def walk_backward(roots: Sequence[Tensor], gradients: Sequence[Tensor], *_, **__) -> None:
    """What autograd's engine does, which asks a GPU for its streams: nodes in the reverse order of
    their making, gradients added up where branches meet, the weights last."""
    received, todo = {}, [root.grad_fn for root in roots]
    while todo:
        node = todo.pop()
        if node not in received:
            received[node] = [None] * len(node._input_metadata)
            todo += [after for after, _ in node.next_functions if after]

    def receive(node, i: int, gradient: Tensor) -> None:
        meta, before = node._input_metadata[i], received[node][i]
        if tuple(gradient.shape) != tuple(meta.shape):  # what came in was broadcast
            gradient = gradient.sum_to_size(meta.shape)
        received[node][i] = gradient if before is None else before + gradient

    with torch.no_grad():
        for root, gradient in zip(roots, gradients, strict=True):
            receive(root.grad_fn, root.output_nr, gradient)
        weights = [node for node in received if hasattr(node, "variable")]
        for node in sorted(received.keys() - set(weights), key=lambda n: -n._sequence_nr()):
            for (after, i), gradient in edges(node, received.pop(node)):
                if after and gradient is not None:
                    receive(after, i, gradient)
        for node in weights:
            accumulate(node.variable, *received[node])


def edges(node, gradients: list[Tensor | None]) -> Iterable:
    """Where a node's results go, and what they are."""
    in_python = hasattr(node, "apply")
    results = node.apply(*gradients) if in_python else node(*gradients)
    results = results if isinstance(results, tuple) else (results,)
    if not in_python:
        return zip(node.next_functions, results, strict=True)
    # One that is written in Python has a result for each argument, tensor or not.
    wanted = [y for y, needed in zip(results, node.needs_input_grad, strict=True) if needed]
    return zip([edge for edge in node.next_functions if edge[0]], wanted, strict=True)


def accumulate(weight: Tensor, gradient: Tensor) -> None:
    """As autograd: a first gradient is kept as it is if it lies in memory as its weight does."""
    if weight.grad is not None:
        weight.grad += gradient
    elif strides(gradient) == strides(weight):
        weight.grad = gradient
    else:
        weight.grad = torch.empty_like(weight).copy_(gradient)
    for hook in (weight._post_accumulate_grad_hooks or {}).values():
        hook(weight)


def strides(x: Tensor) -> list[int]:
    return [stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1]
