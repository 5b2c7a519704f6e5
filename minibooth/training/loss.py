"""From a drawn batch to Eq. 2: the prompts encoded, in the run's precision, with its memory."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import dreambooth
from ..dreambooth import Step, Term
from ..pipeline import StableDiffusion
from . import memory
from .optimizer import Precision


@dataclass(frozen=True)
class Loss:
    """Called with what `Batches.draw` gave, it is `dreambooth.step` of it."""

    sd: StableDiffusion
    ids: Tensor  # (terms, 77) tokens of the instance prompt and, with a prior, the class prompt
    contexts: Tensor | None  # (terms, 77, D) encoded once; None where the text encoder is trained
    prior_loss_weight: float  # λ
    snr_gamma: float | None  # γ of Min-SNR; None for the plain loss
    precision: Precision
    gradient_checkpointing: bool

    def __call__(self, drawn: Sequence[Tensor]) -> Step:
        unet, schedule = self.sd.unet, self.sd.schedule
        with self.precision.autocast(), self.checkpointing():
            instance, prior, weight = self.terms(drawn)
            weight_of_prior = self.prior_loss_weight
            return dreambooth.step(unet, schedule, instance, prior, weight_of_prior, weight)

    def terms(self, drawn: Sequence[Tensor]) -> tuple[Term, Term | None, Tensor | None]:
        """The two terms of Eq. 2 and, for Min-SNR, their samples' weights."""
        contexts = self.sd.text_encoder(self.ids) if self.contexts is None else self.contexts
        c = contexts[:, None].expand(-1, len(drawn[0]), -1, -1)  # (terms, B, 77, D)
        instance = Term(*drawn[:3], c[0])
        prior = Term(*drawn[3:], c[1]) if len(c) == 2 else None
        weight = None
        if self.snr_gamma is not None:
            weight = dreambooth.min_snr_weight(
                self.sd.schedule, torch.cat(drawn[2::3]), self.snr_gamma
            )
        return instance, prior, weight

    def checkpointing(self) -> AbstractContextManager:
        return memory.checkpoint_gradients(self.sd.unet, self.gradient_checkpointing)
