"""From a drawn batch to Eq. 2: the prompts encoded, in the run's precision, with its memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import dreambooth
from ..common.trees import each
from ..device import memory
from ..device.precision import Precision
from ..dreambooth import Step, Term
from ..pipeline import StableDiffusion
from ..text_encoder import Condition
from ..upscaler import seeing
from .data import Batch


@dataclass(frozen=True)
class Loss:
    """Called with what `Batches.draw` gave, it is `dreambooth.step` of it."""

    sd: StableDiffusion
    ids: Tensor  # (prompts, 77) tokens, SDXL's (prompts, 2, 77); the instance prompt and, with a
    # prior, the class prompt, unless the batches say which of more they drew
    contexts: Condition | None  # of all prompts, encoded once; None where training changes them
    prior_loss_weight: float  # λ
    min_snr: Tensor | None  # (T,) a weight for each timestep; None for the plain loss
    precision: Precision
    gradient_checkpointing: bool
    prompts: Sequence[str] = ()  # that `ids` are of, for those who look

    def __call__(self, batch: Batch) -> Step:
        unet, schedule = self.unet_for(batch), self.sd.schedule
        with self.precision.autocast(), self.checkpointing():
            instance, prior, weight = self.terms(batch)
            weight_of_prior = self.prior_loss_weight
            return dreambooth.step(unet, schedule, instance, prior, weight_of_prior, weight)

    def unet_for(self, batch: Batch) -> Callable[..., Tensor]:
        """The UNet; an upscaler's has the batch's small pictures already, with their noise."""
        if batch.instance.small is None:
            return self.sd.unet
        small = [self.sd.noised(x.small, x.level, x.eta) for x in batch.terms]
        return seeing(self.sd.unet, torch.cat(small))

    def terms(self, batch: Batch) -> tuple[Term, Term | None, Tensor | None]:
        """The two terms of Eq. 2 and, for Min-SNR, their samples' weights."""
        terms = []
        for x, c in zip(batch.terms, self.encoded(batch), strict=True):
            c = replace(c, sizes=x.sizes, level=x.level)
            terms.append(Term(x.x0, x.eps, x.t, c))
        weight, t = None, torch.cat([term.t for term in terms])
        if self.min_snr is not None:
            weight = self.min_snr[t]
        return terms[0], (terms[1] if len(terms) == 2 else None), weight

    def encoded(self, batch: Batch) -> list[Condition]:
        """The prompts of a batch, for each term B; what belongs to a picture is not in it yet."""
        B, terms = len(batch.instance.x0), batch.terms
        if batch.instance.prompt is None:  # one for each term
            found = self.sd.encode(self.ids) if self.contexts is None else self.contexts
            found = [found[i : i + 1] for i in range(len(terms))]
            return [each(lambda x: x.expand(B, *x.shape[1:]), c) for c in found]
        which = torch.cat([term.prompt for term in terms])  # (terms · B,)
        found = self.sd.encode(self.ids[which]) if self.contexts is None else self.contexts[which]
        return [found[i * B : (i + 1) * B] for i in range(len(terms))]

    def prompts_of(self, batch: Batch) -> list[str]:
        """Of the photographs of a batch."""
        drawn = batch.instance
        if drawn.prompt is None:
            return [self.prompts[0]] * len(drawn.x0)
        return [self.prompts[i] for i in drawn.prompt.tolist()]

    def checkpointing(self) -> AbstractContextManager:
        return memory.checkpoint_gradients(self.sd.unet, self.gradient_checkpointing)
