"""Several processes of one run, a rank each, as torchrun starts them:

    torchrun --nproc_per_node 4 -m minibooth.train …

All have the same weights and go through the same run. They differ in their device, in their part of
each batch and in the pictures they draw; DistributedDataParallel averages their gradients in the
backward pass, so that all take the same step. Rank 0 alone writes and speaks.

Everything that is distributed stands here. Where there is one rank, all of it does nothing.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..common import cli
from ..common.errors import UserError, first_line

# How long ranks wait for each other, say while one draws its last class images on a slow device.
# A rank that ends, however it does, is noticed at once; this is for one that hangs.
PATIENCE = timedelta(hours=2)
GONE = (
    "another rank of this run is gone (torchrun says which below); what was saved is whole: give "
    "the same command with --resume_from_checkpoint latest"
)


@contextmanager
def joined() -> Iterator[None]:
    """Within it this process is a rank of its run, if torchrun started several.

    An error is raised on the rank that it befalls; the others leave with exit status 2, silently.
    Raises UserError where another rank is gone, or the ranks do not find each other.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    try:
        # Gradients go by NCCL where they are on a GPU; all that is on the CPU goes by gloo.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    except RuntimeError as error:
        raise UserError(f"the ranks do not find each other: {first_line(error)}") from error
    try:
        wait()  # or one could fail, and leave, before another has found it
        with silence() if rank() else nullcontext():
            yield
            wait()  # for whatever rank 0 still writes
    except (Exception, KeyboardInterrupt) as error:
        if not fails_first(store):
            raise SystemExit(getattr(error, "status", 2)) from error
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(GONE) from error
        raise
    dist.destroy_process_group()


@contextmanager
def silence() -> Iterator[None]:
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield


def fails_first(store: "dist.Store") -> bool:
    """Whether no other rank has failed: what follows from the first failure is not worth a word."""
    with suppress(RuntimeError):  # torchrun, which keeps the store, is gone, too
        return store.add("failed", 1) == 1
    return True


def count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if count() > 1 else 0


def share() -> tuple[int, int]:
    """(rank, count): which of how many equal parts of a batch is this one's."""
    return rank(), count()


def own_device(name: str) -> torch.device:
    """The device of this rank, by what --device says. Raises UserError where there are more ranks
    than GPUs."""
    gpus = torch.cuda.device_count()
    if count() > 1 and (name == "cuda" or (name == "auto" and gpus)):
        number = int(os.environ["LOCAL_RANK"])
        if number >= gpus > 0:
            raise UserError(f"GPUs here: {gpus}, for one rank each: give --nproc_per_node {gpus}")
        name = f"cuda:{number}"
    elif count() > 1 and cli.pick_device(name).type != "cpu":
        raise UserError("several ranks want --device cuda, a GPU for each, or --device cpu")
    return cli.pick_device(name)


# ---- work that is divided -----------------------------------------------------------------------


def mine(items: Sequence) -> Sequence:
    """This rank's: every count()-th."""
    return items[rank() :: count()]


def together(results: list) -> list:
    """What all ranks made of `mine`, in the order of the whole; tensors must be on the CPU."""
    if count() == 1:
        return results
    parts = [[] for _ in range(count())]
    dist.all_gather_object(parts, results)
    total = sum(map(len, parts))
    return [parts[i % count()][i // count()] for i in range(total)]


def wait() -> None:
    """Until all ranks are here."""
    any_of(False)


def any_of(flag: bool) -> bool:
    """Whether it is true on any rank."""
    if count() > 1:
        found = torch.tensor(float(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)
    return flag


def by_first(function: Callable) -> Callable:
    """Rank 0 alone calls the function; the others wait until it is done, and have None of it."""

    @functools.wraps(function)
    def call(*args, **options):
        result = function(*args, **options) if rank() == 0 else None
        wait()
        return result

    return call


def require_same(what: dict) -> None:
    """Raise UserError unless all ranks have found the same."""
    first, *others = together([what])
    if different := {key for other in others for key in first if other[key] != first[key]}:
        raise UserError(
            f"the ranks differ in: {', '.join(sorted(different))}. They must see the same files: "
            "keep photographs, class images and --output_dir in folders that all machines share"
        )


# ---- the step -----------------------------------------------------------------------------------


class Averaged(nn.Module):
    """A loss as DistributedDataParallel wants it: a module that holds what is trained."""

    def __init__(self, loss: Callable, trained: dict[str, nn.Module]):
        super().__init__()
        self.loss, self.trained = loss, nn.ModuleDict(trained)

    def forward(self, batch):
        return self.loss(batch)


def averaged(loss: Callable, trained: dict[str, nn.Module]) -> Callable:
    """The loss; after its backward pass the gradients are the means over the ranks."""
    if count() == 1:
        return loss
    # Gradients lie in the buckets in which they travel: there is no second copy of them.
    return DistributedDataParallel(Averaged(loss, trained), gradient_as_bucket_view=True)


def each(loss: Callable, batches: list) -> Iterator:
    """The batches of an update, one by one; gradients travel with the last."""
    for batch in batches[:-1]:
        with loss.no_sync() if count() > 1 else nullcontext():
            yield batch
    yield batches[-1]


def mean(x: Tensor) -> Tensor:
    """Over the ranks."""
    if count() > 1:
        dist.all_reduce(x)
        x = x / count()
    return x
