"""The check of the kernels on a GPU: what can be said of it without one."""

import torch
import torch.nn.functional as F

from minibooth.bench import check
from minibooth.device.trial import make_inputs, results
from minibooth.ops import Case


def test_exact_attention_is_computed_a_few_heads_at_a_time():
    """All heads of SD 1.5's largest are matrices of 2.1 GB in fp64."""
    case, heads = Case("attention", (2, 7, 12, 9, 16), "float32", True), []
    inputs, upstream = make_inputs(case, torch.device("cpu"))

    def attention(q, k, v):
        heads.append(q.shape[1])
        return F.scaled_dot_product_attention(q, k, v)

    parts = check.in_fp64(attention, inputs, upstream, case)
    assert heads == [2, 2, 2, 1]
    whole = results(attention, [x.double() for x in inputs], upstream.double(), True)
    for part, exact in zip(parts, whole, strict=True):
        assert part.dtype == torch.float64
        torch.testing.assert_close(part, exact)
