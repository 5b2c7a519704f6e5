"""The functions of bitsandbytes that are used, for where it is not installed."""

import importlib.machinery
import types

import torch
import torch.nn.functional as F


class Functional:
    """Written down from the paper, with other codes."""

    @staticmethod
    def create_dynamic_map(signed):
        sizes = torch.logspace(-7, 0, 127 if signed else 255)
        return torch.cat([-sizes.flip(0), torch.zeros(2), sizes] if signed else [sizes[:1], sizes])

    @staticmethod
    def optimizer_update_32bit(
        name, g, p, m, beta1, eps, step, lr, v, beta2, *, weight_decay, gnorm_scale
    ):
        assert name == "adam" and isinstance(step, int)
        assert all(isinstance(x, float) for x in (lr, weight_decay, gnorm_scale))
        g = g * gnorm_scale
        m.lerp_(g, 1 - beta1)
        v.lerp_(g * g, 1 - beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + eps
        p.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))

    @classmethod
    def optimizer_update_8bit_blockwise(cls, name, g, p, m, v, beta1, beta2, *rest, **numbers):
        beta3, alpha, eps, step, lr, *scales = rest
        assert beta3 == alpha == 0 and m.dtype == v.dtype == torch.uint8
        averages = [
            codes[x.long()] * absmax.repeat_interleave(256)[: len(x)]
            for x, codes, absmax in zip((m, v), scales[:2], scales[2:], strict=True)
        ]
        arguments = (g, p, averages[0], beta1, eps, step, lr, averages[1], beta2)
        cls.optimizer_update_32bit(name, *arguments, **numbers)
        for x, average, codes, absmax in zip((m, v), averages, scales[:2], scales[2:], strict=True):
            blocks = F.pad(average, (0, -len(x) % 256)).view(-1, 256)
            absmax.copy_(blocks.abs().amax(dim=1))
            scaled = (blocks / absmax[:, None].clamp(min=1e-30)).flatten()[: len(x)]
            x.copy_(torch.searchsorted(codes[:-1] + codes.diff() / 2, scaled))


MODULE = types.ModuleType("bitsandbytes")
MODULE.functional = Functional
MODULE.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)  # diffusers looks for it
