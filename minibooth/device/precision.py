"""What the networks compute in: fp32, or 16 bits where a GPU is faster with them."""

from contextlib import AbstractContextManager

import torch


class Precision:
    """The one rule: weights, gradients and optimizer in fp32; the networks compute in `name`.

    "auto" is bf16 on a GPU that has it, fp16 on an older one, "no" (fp32) elsewhere. fp16 needs its
    loss scaled up, or small gradients vanish. Noise mixing and loss are fp32 always.

    `keep_copies`: the weights' 16-bit copies stay until autocast ends, and need not be made anew
    for the next call of a network; half of what the weights take.
    """

    def __init__(self, name: str, device: torch.device, keep_copies: bool = True):
        if name == "auto":
            name = "no"
            if device.type == "cuda":
                has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
                name = "bf16" if has_bf16 else "fp16"
        self.name, self.device_type = name, device.type
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[name]
        self.keep_copies = keep_copies

    def autocast(self) -> AbstractContextManager:
        on, cached = self.dtype is not None, self.keep_copies
        return torch.autocast(self.device_type, self.dtype, enabled=on, cache_enabled=cached)
