"""What the operators of a network cost on a card: kernels launched, bytes moved, FLOP.

An operator is one launch that moves its arguments and its results once, or what its rule here says.
What CUDA's libraries do to layouts is done here, too. Not counted: what cuDNN launches within a
convolution (pixels in NCHW and 16 bits it turns around itself), and that what was just written may
still be in a cache. FLOP are those of the formulas; the Triton backward of attention to many keys
makes seven products where five do.
"""

from collections import defaultdict
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .. import ops

aten = torch.ops.aten


def nbytes(x: Tensor) -> int:
    """That it takes in memory: what is only expanded is there once."""
    sizes = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0]
    return torch.Size(sizes).numel() * x.element_size()


def total(x) -> int:
    """The bytes of all tensors in it."""
    return sum(nbytes(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor))


# Operators of several kernels: how many, and the bytes beyond arguments and results once each.
# ATen/native/cuda: group_norm_kernel.cu, layer_norm_kernel.cu; flash_bwd_launch_template.h.
SEVERAL = {
    # moments; a scale and a shift per channel; y, from x again
    aten.native_group_norm.default: (3, lambda x, *_: nbytes(x)),
    # two sums per channel; γ · rstd; two terms per group; dx, from dy and x again; dγ and dβ
    aten.native_group_norm_backward.default: (5, lambda dy, x, *_: total((dy, x))),
    # dx; dγ and dβ, from dy and x again
    aten.native_layer_norm_backward.default: (2, lambda dy, x, *_: total((dy, x))),
    # delta, from dO; the gradients; dQ rounded, which was cleared, read, written and read in fp32
    aten._scaled_dot_product_flash_attention_backward.default: (
        3,
        lambda do, q, *_: nbytes(do) + 4 * 4 * q.numel(),
    ),
    # zeros, then a part of them
    aten.slice_backward.default: (2, lambda dy, *_: nbytes(dy)),
    aten.select_backward.default: (2, lambda dy, *_: nbytes(dy)),
}
OVERWRITING = {aten.copy_.default, aten.fill_.Scalar, aten.fill_.Tensor, aten.zero_.default}
NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh", "aten._unsafe_view")
KINDS = {  # of operators, by a part of the name: the first that is in it
    "_foreach": "AdamW",
    "_fused": "AdamW",
    "adamw": "AdamW",
    "convolution": "convolutions",
    "attention": "attention",
    "group_norm": "norms",
    "layer_norm": "norms",
    "mm": "products",
    "_to_copy": "casts",
    "copy": "copies",
    "clone": "copies",
    "": "others",  # elementwise, nearly all
}

# Operators on lists of tensors cut them into chunks. One launch takes so many tensors, by how many
# lists there are, and so many chunks (ATen/native/cuda/MultiTensorApply.cuh); a norm's chunks are
# added up for so many tensors at once (foreach_reduce.cuh). CUDA 13, with which PyPI has torch,
# passes more to a kernel than CUDA 12.
CHUNK, LIST_TENSORS, LIST_CHUNKS, NORM_TENSORS = 65536, (110, 64, 48, 36, 30), 320, 400
if int((torch.version.cuda or "13").split(".")[0]) >= 13:
    LIST_TENSORS, LIST_CHUNKS, NORM_TENSORS = (770, 448, 336, 252, 210), 2240, 3200
CAT_TENSORS = 128  # that one launch puts together (ATen/native/cuda/Shape.cu)


def list_launches(tensors: list[Tensor], lists: int) -> int:
    """Of an operator on so many lists of tensors like these."""
    launches = chunks = held = 0
    for x in tensors:
        held += 1
        for left in reversed(range(-(-x.numel() // CHUNK))):
            chunks += 1
            if chunks == LIST_CHUNKS or (held == LIST_TENSORS[lists - 1] and left == 0):
                launches, chunks, held = launches + 1, 0, int(left > 0)
    return launches + (chunks > 0)


def launches_of(func, args: tuple) -> int:
    name = str(func)
    if func in (aten.cat.default, aten.stack.default):
        return -(-len(args[0]) // CAT_TENSORS)
    if "_foreach" in name or "_fused" in name:
        lists = [x for x in args if isinstance(x, list | tuple) and x]
        launches = list_launches(lists[0], len(lists) - ("_fused" in name))  # but for the steps'
        if "_norm" in name:  # two lists of zeros before, and the sums over chunks
            launches += 2 + -(-len(args[0]) // NORM_TENSORS)
        return launches
    return SEVERAL[func][0] if func in SEVERAL else 1


def moved_by(func, args: tuple, kwargs: dict, out) -> int:
    """Bytes: what is given is read, what is made or overwritten is written."""
    writes = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    if "_fused_adamw" in str(func) and kwargs.get("grad_scale") is None:
        writes[1] = False  # gradients are written back only where they are scaled
    written = [x for x, write in zip(args, writes, strict=False) if write]
    moved = total((args, kwargs)) + total(written or out)
    if func in OVERWRITING:
        moved -= nbytes(args[0])
    return moved + (SEVERAL[func][1](*args) if func in SEVERAL else 0)


class Counter(TorchDispatchMode):
    """Within it, what the operators on a card cost is added up in `costs` by phase and kind."""

    def __init__(self):
        super().__init__()
        self.phase = "forward"
        self.costs = defaultdict(lambda: [0, 0, 0])  # (phase, kind) → launches, bytes, FLOP

    def add(self, name: str, moved: int, launches: int = 1, flops: int = 0) -> None:
        cost = self.costs[self.phase, next(kind for part, kind in KINDS.items() if part in name)]
        cost[:] = (a + b for a, b in zip(cost, (launches, moved, flops), strict=True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(func)
        if func.namespace == "minibooth":
            return self.launch_code(func, args)
        if func is aten.convolution.default:
            return self.convolution(*args)
        if func is aten.convolution_backward.default:
            return self.convolution_backward(*args)
        out = None if "_fused_adamw" in name else func(*args, **kwargs)
        if "group_norm" in name:  # CUDA's knows NCHW alone; its arguments were copied on the way
            out = (out[0].contiguous(), *out[1:])
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        on_card = any(x.is_cuda for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        if on_card and not view and func.namespace == "aten" and not name.startswith(NO_KERNEL):
            flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)
            flops = flops(*args, **kwargs, out_val=out)
            self.add(name, moved_by(func, args, kwargs, out), launches_of(func, args), flops)
        return out

    def ordered(self, *xs: Tensor) -> tuple[torch.memory_format, list[Tensor]]:
        """(dy,) x and weight as cuDNN has them: in channels_last if x or the weight is. What is in
        another layout is copied."""
        last, plain = torch.channels_last, torch.contiguous_format
        mixed = (x.is_contiguous(memory_format=last) and not x.is_contiguous() for x in xs[-2:])
        order = last if any(mixed) else plain
        for x in xs:
            if not x.is_contiguous(memory_format=order):
                self.add("copy", 2 * nbytes(x))
        return order, [x.contiguous(memory_format=order) for x in xs]

    def convolution(self, x, weight, bias, *settings):
        order, (x, weight) = self.ordered(x, weight)
        y = aten.convolution.default(x, weight, bias, *settings)
        flops = flop_registry[aten.convolution](x, weight, bias, *settings, out_val=y)
        self.add("convolution", total((x, weight, y)), 1, flops)
        if bias is not None:  # a kernel of its own
            self.add("convolution", 2 * nbytes(y) + nbytes(bias))
        return y.contiguous(memory_format=order)

    def convolution_backward(self, dy, x, weight, *settings):
        order, (dy, x, weight) = self.ordered(dy, x, weight)
        out = aten.convolution_backward.default(dy, x, weight, *settings)
        flops = flop_registry[aten.convolution_backward](dy, x, weight, *settings, out_val=out)
        self.add("convolution", 0, 0, flops)
        for gradient, other in zip(out, (weight, x, None), strict=True):
            if gradient is not None:
                self.add("convolution", total((dy, other, gradient)))
        *out, db = out
        return *(y if y is None else y.contiguous(memory_format=order) for y in out), db

    def launch_code(self, func, args):
        """An operator of minibooth_kernels. Its own launch code runs and decides what to launch;
        each kernel moves its arguments once, AdamW's what its table leads to."""
        name = func.overloadpacket.__name__
        attends, by_table = name.startswith("attention"), name.startswith("adamw")
        of = "adamw" if by_table else name.removesuffix("_backward")
        kernels = getattr(ops, f"{of}_kernels")

        def launch(kernel, *arguments, **options):
            self.add(name, 0 if by_table else total(arguments))

        with (
            mock.patch("triton.runtime.jit.JITFunction.run", launch),
            mock.patch.object(Tensor, "data_ptr", lambda x: 0),  # aligned, as what is allocated is
            self,
        ):
            out = getattr(kernels, f"_{name}")._init_fn.__wrapped__(*args)
        if by_table:
            names = [argument.name for argument in func._schema.arguments]
            overwritten = dict(zip(names, args, strict=True)).get("copies")
            self.add(name, moved_by(func, args, {}, out) - total(overwritten), 0)
        if attends:
            backward = "backward" in name
            flops = sdpa_backward_flop_count if backward else sdpa_flop_count
            self.add(name, 0, 0, flops(*(x.shape for x in args[: 3 + backward])))
        return out
