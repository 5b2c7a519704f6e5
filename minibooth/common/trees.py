"""Dataclasses of tensors, such as a batch, taken as one thing."""

from collections.abc import Callable
from dataclasses import fields

from torch import Tensor


def each(f: Callable[..., Tensor], *trees):
    """f of every tensor of a tensor or a dataclass of such: a thing of the same form.

    Given several of one form, f gets the tensors that stand in the same place of all of them; what
    is None stays None.
    """
    first = trees[0]
    if first is None or isinstance(first, Tensor):
        return None if first is None else f(*trees)
    columns = {field.name: [getattr(tree, field.name) for tree in trees] for field in fields(first)}
    return type(first)(**{name: each(f, *column) for name, column in columns.items()})
