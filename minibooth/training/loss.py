"""From a drawn batch to Eq. 2: the prompts encoded, in the run's precision, with its memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dreambooth
from ..device import memory
from ..device.precision import Precision
from ..dreambooth import Step, Term
from ..pipeline import StableDiffusion


@dataclass(frozen=True)
class Loss:
    """Called with what `Batches.draw` gave, it is `dreambooth.step` of it."""

    sd: StableDiffusion
    ids: Tensor  # (prompts, 77) tokens; the instance prompt and, with a prior, the class prompt,
    # unless the batches say which of more they drew
    contexts: Tensor | None  # (prompts, 77, D) encoded once; None where they change with training
    prior_loss_weight: float  # λ
    min_snr: Tensor | None  # (T,) a weight for each timestep; None for the plain loss
    precision: Precision
    gradient_checkpointing: bool
    prompts: Sequence[str] = ()  # that `ids` are of, for those who look

    def __call__(self, drawn: Sequence[Tensor]) -> Step:
        unet, schedule = self.sd.unet, self.sd.schedule
        with self.precision.autocast(), self.checkpointing():
            instance, prior, weight = self.terms(drawn)
            weight_of_prior = self.prior_loss_weight
            return dreambooth.step(unet, schedule, instance, prior, weight_of_prior, weight)

    def terms(self, drawn: Sequence[Tensor]) -> tuple[Term, Term | None, Tensor | None]:
        """The two terms of Eq. 2 and, for Min-SNR, their samples' weights."""
        c = self.encoded(drawn)  # (terms, B, 77, D)
        instance = Term(*drawn[:3], c[0])
        prior = Term(*drawn[3:6], c[1]) if len(c) == 2 else None
        weight = None if self.min_snr is None else self.min_snr[torch.cat(drawn[2::3])]
        return instance, prior, weight

    def encoded(self, drawn: Sequence[Tensor]) -> Tensor:
        """The prompts of a batch: (terms, B, 77, D)."""
        encode, batch = self.sd.text_encoder, len(drawn[0])
        if len(drawn) % 3 == 0:  # one for each term
            contexts = encode(self.ids) if self.contexts is None else self.contexts
            return contexts[:, None].expand(-1, batch, -1, -1)
        which = drawn[-1]  # (terms · B,)
        contexts = encode(self.ids[which]) if self.contexts is None else self.contexts[which]
        return contexts.unflatten(0, (-1, batch))

    def prompts_of(self, drawn: Sequence[Tensor]) -> list[str]:
        """Of the photographs of a batch."""
        batch = len(drawn[0])
        if len(drawn) % 3 == 0:
            return [self.prompts[0]] * batch
        return [self.prompts[i] for i in drawn[-1][:batch].tolist()]

    def checkpointing(self) -> AbstractContextManager:
        return memory.checkpoint_gradients(self.sd.unet, self.gradient_checkpointing)
