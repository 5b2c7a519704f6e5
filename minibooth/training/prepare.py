"""From a run that can begin to its first step: what the steps read, and the optimizer."""

import torch
from torch import nn

from .. import dreambooth
from ..device import graphs, memory, ranks
from ..device.precision import Precision
from . import by_kernel, class_images, enlarging, methods, parameters, photos, resume, start
from .data import Batches, encode
from .in_backward import UpdateInBackward
from .loss import Loss
from .optimizer import Update
from .settings import TrainConfig
from .start import Run


def gather(run: Run, captured: bool = False) -> tuple[Batches, Loss, dict]:
    """What the steps read: class images, latents, contexts; and the identity with these images.

    The networks go to the device. `captured`: whether the steps will be a CUDA graph.
    """
    config, sd, device = run.config, run.sd, run.device
    found = start.images_of(run)
    drawing = enlarging.base_draws(run, found) if run.second else sd
    methods.place(sd, run.trained, device, run.precision.dtype, run.resting)
    start.try_kernels(run, captured, found)

    identity, class_photos, shown = run.identity, None, (run.shown,)
    if config.uses_prior:  # x_pr: what the model draws for the class before it is trained
        graph = graphs.captured_unet(sd.unet, wanted=not config.saves_memory)
        with graph, memory.by_turns(sd, run.by_turns), run.precision.autocast():
            files = [class_images.ensure(drawing, images, run.on_passes) for images in found]
        of_class = torch.tensor([i for i, those in enumerate(files) for _ in those])
        files = [file for those in files for file in those]
        class_photos = photos.load_photos(files, run.resolution, config.center_crop, run.detail)
        identity = {**identity, "class images": class_photos.content_hash()}
        shown = (run.shown, of_class)
    if run.saved is not None:
        resume.check(run.folder, run.saved.identity, identity)

    with memory.away(sd.unet, run.by_turns):
        instance = encode(sd, run.photos, config.random_flip, "photographs")
        prior = encode(sd, class_photos, False, "class images") if class_photos else None
    T, size = sd.schedule.T, config.train_batch_size * ranks.count()
    prompts, choice = methods.prompts_of(config, run.captions, shown)
    drawn_from = T, config.seed, size, device, choice, shown, ranks.share()
    levels = run.second.levels if run.second else (0, 0)
    batches = Batches(instance, prior, *drawn_from, levels)

    ids = sd.tokenizer(prompts).to(device)  # (prompts, 77)
    with torch.no_grad():
        contexts = None if config.text_changes else sd.encode(ids)
    min_snr, every_t = None, torch.arange(T, device=device)
    if config.snr_gamma is not None:
        min_snr = dreambooth.min_snr_weight(sd.schedule, every_t, config.snr_gamma)  # (T,)
    how = run.precision, config.gradient_checkpointing
    loss = Loss(sd, ids, contexts, config.prior_loss_weight, min_snr, *how, prompts)
    return batches, loss, identity


def make_optimizer(run: Run, captured: bool = False) -> Update:
    """fp32 copies of the weights that train, in their networks, and AdamW over them. `captured`:
    whether the steps will be a CUDA graph."""
    config = run.config
    for network in run.idle:
        network.to("cpu")
    parameters.make_trainable(run.trained, run.device, but=parameters.unread(run.sd))
    methods.attach(run.sd, run.trained)
    of_text = config.learning_rate if config.trains_word else config.text_encoder_learning_rate
    groups = []
    for name, network in run.trained.items():
        rate = config.learning_rate if name == "unet" else of_text
        groups.append((rate, [p for p in network.parameters() if p.requires_grad]))
    networks = [run.sd.networks[name] for name in run.trained]
    return update_of(config, run.precision, groups, networks, captured)


def update_of(
    config: TrainConfig,
    precision: Precision,
    groups: list[tuple[float, list[nn.Parameter]]],
    networks: list[nn.Module],
    captured: bool,
) -> Update:
    """AdamW over {learning rate: weights of these networks}, as `config` says."""
    decay, eight_bit = config.adam_weight_decay, config.use_8bit_adam
    if config.optimizer_in_backward:
        print("the optimizer runs in the backward pass: gradients are not clipped")
        return UpdateInBackward(groups, decay, eight_bit)
    how = decay, config.max_grad_norm, precision.name == "fp16"
    if captured and by_kernel.possible(config) and by_kernel.wanted(groups, precision.dtype):
        return by_kernel.UpdateByKernel(networks, precision.dtype, groups, *how)
    return Update(groups, *how, eight_bit)
