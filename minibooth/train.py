"""python -m minibooth.train: DreamBooth on a folder of photographs.

photographs → latents (mean and std, cached) → noisy latents → UNet → loss → update → pictures.
The loss itself is dreambooth.py's, the batches are data.py's; this is the run around them.
"""

import hashlib
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from . import dreambooth, ops, pipeline, schedule, toybox
from .common import cli
from .common.cli import option
from .common.errors import UserError
from .common.files import gigabytes, require_space, write_json, write_text
from .dreambooth import Step, Term
from .explain import microscope, page
from .pipeline import StableDiffusion
from .toybox import score
from .training import class_images, graphs, memory, photos, report, resume
from .training.data import draw_batch, encode, to_device
from .training.optimizer import Precision, Update, UpdateInBackward, bitsandbytes
from .training.photos import Photos


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. The defaults suit an object or an animal on SD 1.5."""

    model: str | None = option(
        None,
        "base model: folder, single file (.safetensors, .ckpt), hub id, or toybox: the small one "
        "that is shipped, which is trained on a subject of its own where nothing else is said",
        aliases=("pretrained_model_name_or_path",),
    )
    instance_data_dir: str | None = option(None, "folder with 3 to 6 photographs of the subject")
    instance_prompt: str | None = option(None, 'names the subject, say "a sks dog"')
    class_prompt: str | None = option(None, 'names its class, say "a dog"')
    output_dir: str = option("minibooth-out", "where the trained model and all the rest go")

    prior_loss_weight: float = option(
        1.0, "λ of Eq. 2; 0 is plain fine-tuning, without class images"
    )
    num_class_images: int = option(200, "class images to train with; your own in the folder count")
    class_data_dir: str | None = option(None, "folder of class images [<output_dir>/class_images]")
    class_sampler: str = option("ddim", "sampler that draws them", choices=pipeline.SAMPLERS)
    class_steps: int = option(
        50, "its steps; the paper's sampler is ddpm, which wants many, up to 1000"
    )
    class_guidance_scale: float = option(7.5, "its guidance")
    sample_batch_size: int = option(4, "class images drawn at once")

    resolution: int | None = option(None, "side of the training pictures in pixels [the model's]")
    center_crop: bool = option(False, "take only the middle of photographs that are not square")
    random_flip: bool = option(
        False, "also train on mirrored photographs; not for lettering or faces"
    )

    max_train_steps: int = option(800, "updates of the weights")
    learning_rate: float = option(5e-6, "of the UNet")
    lr_warmup_steps: int = option(0, "updates over which the learning rates rise from 0")
    train_text_encoder: bool = option(
        False, "train the text encoder too: helps faces, needs memory"
    )
    text_encoder_learning_rate: float = option(2e-6, "of the text encoder, where it is trained")
    train_batch_size: int = option(1, "photographs per step; as many class images come beside them")
    gradient_accumulation_steps: int = option(1, "batches per update")
    gradient_checkpointing: bool = option(False, "less memory, a third more to compute")
    use_8bit_adam: bool = option(
        False, "less memory: AdamW's averages in 8 bits, by bitsandbytes; no CUDA graph"
    )
    optimizer_in_backward: bool = option(
        False, "less memory: each gradient is used and dropped at once, and none is clipped"
    )
    fit_memory: bool = option(
        True,
        "on a GPU, switch on as many of these three as its free memory asks for, and say so",
    )
    mixed_precision: str = option(
        "auto",
        "what the networks compute in: bf16 or fp16 on a GPU by its age, fp32 elsewhere",
        choices=("auto", "no", "bf16", "fp16"),
    )
    adam_weight_decay: float = option(1e-2, "AdamW's pull on each weight towards 0")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    snr_gamma: float | None = option(None, "γ of Min-SNR loss weights; 5 is usual [plain loss]")
    seed: int = option(0, "of every noise, timestep, order and picture")

    validation_prompt: tuple[str, ...] = option(
        (),
        "for the sample grids; several times for several [class, instance, instance in the snow]",
    )
    num_validation_images: int = option(2, "pictures per prompt in the grids; 0 for no grids")
    validation_steps: int = option(200, "updates between two grids")
    validation_inference_steps: int = option(25, "sampler steps of the grids' pictures")
    validation_guidance_scale: float = option(7.5, "their guidance")
    checkpointing_steps: int = option(200, "updates between two snapshots and resume states")
    checkpoints_total_limit: int | None = option(None, "newest snapshots to keep [all]")
    resume_from_checkpoint: str | None = option(
        None, "go on where the run in output_dir stopped", choices=("latest",)
    )
    explain: bool = option(False, "show the first step in explain.html: tensors, pictures, maps")

    vae: str | None = option(None, "folder, file or hub id of a VAE to use instead")
    tokenizer: str | None = option(None, "folder or hub id of a tokenizer, for single files")
    prediction_type: str | None = option(
        None, "overrides what the model says", choices=("epsilon", "v_prediction")
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    device: str = option("auto", "auto, cuda, mps or cpu")
    kernels: str | None = option(
        None, "for attention and group norm [MINIBOOTH_KERNELS, or torch]", choices=ops.MODES
    )
    config: str | None = option(None, "a config.json of another run; flags override it")

    @property
    def uses_prior(self) -> bool:
        return self.prior_loss_weight > 0

    @property
    def grid_batch_size(self) -> int:
        """Pictures of the grids that are drawn at once: fewer where memory is short."""
        return min(8, self.sample_batch_size) if self.gradient_checkpointing else 8

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before anything is read or written."""
        if self.instance_data_dir is None or self.instance_prompt is None:
            raise UserError(
                'give --instance_data_dir (the photographs) and --instance_prompt ("a sks dog")'
            )
        if self.uses_prior and self.class_prompt is None:
            raise UserError(
                'give --class_prompt ("a dog"), or --prior_loss_weight 0 for plain fine-tuning'
            )
        if self.optimizer_in_backward and self.gradient_accumulation_steps > 1:
            raise UserError(
                "--optimizer_in_backward drops each gradient at once: it cannot go with "
                "--gradient_accumulation_steps; give a larger --train_batch_size"
            )
        cli.check_choices(self)
        at_least_one = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        at_least_one += ("sample_batch_size", "validation_steps", "checkpointing_steps")
        at_least_one += ("class_steps", "validation_inference_steps", "resolution")
        at_least_one += ("checkpoints_total_limit",)
        cli.check_at_least_one(self, at_least_one)
        for name in ("num_class_images", "num_validation_images", "lr_warmup_steps", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"--{name} must be a number from 0 up")
        for name in ("learning_rate", "text_encoder_learning_rate", "max_grad_norm", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise UserError(f"--{name} must be a positive number")
        from_zero = ("prior_loss_weight", "adam_weight_decay")
        from_zero += ("class_guidance_scale", "validation_guidance_scale")
        for name in from_zero:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be a number from 0 up")


# ---- the run -----------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    sd: StableDiffusion | None = None,
    on_step: Callable[[int, Step], None] | None = None,
) -> StableDiffusion:
    """Run DreamBooth as `config` says and write the result into config.output_dir.

    `sd` is trained in place if given, else config.model is loaded. `on_step(step, result)` is
    called after the backward pass of every batch, before the update. Returns the trained model.
    Raises UserError for whatever the user can mend.
    """
    device, run = start(config, sd), Path(config.output_dir)
    state, models = resume.steps(run), [f for f in (run, *report.snapshots(run)) if is_model(f)]
    if (state or models) and config.resume_from_checkpoint is None:
        raise UserError(
            f"{run} already holds a run: give --resume_from_checkpoint latest to go on with it, or "
            "another --output_dir"
        )
    if models and not state:
        raise UserError(
            f"{run} holds a model but no state to resume from: to train it further, give "
            f"--model {models[0]} and another --output_dir"
        )
    if sd is None:
        sd = load(config)
    try:
        job = Run(config, sd, run, device)
        config = job.config  # with the modes that its memory asks for
        sd = job.train(on_step)
        if score.applies(config):
            print(score.after_run(sd, config))
        return sd
    except Exception as error:
        if cli.is_out_of_memory(error):
            raise UserError(memory.advice(sd, config)) from error
        raise


def start(config: TrainConfig, sd: StableDiffusion | None = None) -> torch.device:
    """Refuse what can be refused before a model is loaded; the device to run on."""
    if sd is None and config.model is None:
        raise UserError(
            "give --model: a folder, a single file, a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5, or toybox"
        )
    config.check()
    device = cli.pick_device(config.device)
    if config.use_8bit_adam:
        bitsandbytes(device)
    if config.kernels:
        ops.use(config.kernels)
    photos.image_files(config.instance_data_dir)
    cli.check_folder("--output_dir", config.output_dir)
    if config.class_data_dir and Path(config.class_data_dir).is_file():
        raise UserError(f"--class_data_dir {config.class_data_dir} is a file: give a folder")
    return device


def is_model(folder: Path) -> bool:
    return (folder / "model_index.json").exists()


def load(config: TrainConfig) -> StableDiffusion:
    return pipeline.load(
        config.model,
        tokenizer=config.tokenizer,
        vae=config.vae,
        prediction_type=config.prediction_type,
        revision=config.revision,
    )


class Run:
    """One run: its model, data, optimizer and folder."""

    def __init__(
        self, config: TrainConfig, sd: StableDiffusion, folder: Path, device: torch.device
    ):
        self.config, self.sd, self.folder, self.device = config, sd, folder, device
        if sd.configs["unet"]["in_channels"] != sd.configs["unet"]["out_channels"]:
            raise UserError("an inpainting model cannot be trained here: give its base model")
        self.resolution = config.resolution or sd.image_size
        if self.resolution % sd.vae.factor:
            raise UserError(f"--resolution must be a multiple of {sd.vae.factor}")
        for steps in (config.class_steps, config.validation_inference_steps):
            schedule.timesteps(sd.schedule, steps)  # refuses what the model cannot do
        for name, network in sd.networks.items():
            for key, p in network.named_parameters():
                if not p.isfinite().all():
                    raise UserError(
                        f"the model is damaged: its {name}'s {key} is not finite; get it again"
                    )
        self.trained: dict[str, torch.nn.Module] = {"unet": sd.unet}
        if config.train_text_encoder:
            self.trained["text_encoder"] = sd.text_encoder
        self.idle = [net for name, net in sd.networks.items() if name not in self.trained]
        self.prompts = list(config.validation_prompt) or default_prompts(config)
        self.photos = photos.load_photos(
            config.instance_data_dir, self.resolution, config.center_crop
        )
        self.saved = resume.load(folder) if config.resume_from_checkpoint else None
        if config.fit_memory and device.type == "cuda":
            self.config = config = self.fitted()
        keep_copies = not config.gradient_checkpointing
        self.precision = Precision(config.mixed_precision, device, keep_copies)
        if config.optimizer_in_backward and self.precision.name == "fp16":
            raise UserError(
                "--optimizer_in_backward cannot go with fp16, where gradients that overflow must "
                "be thrown away together: give --mixed_precision bf16 or no"
            )
        self.identity = self.identify()
        if self.saved is not None:
            step, _, identity = self.saved
            resume.check(folder, identity, self.identity)
            if step > config.max_train_steps:
                raise UserError(
                    f"{folder} is already at step {step}: give --max_train_steps {step} or more"
                )
        memory.require(sd, config, device)

    def fitted(self) -> TrainConfig:
        """With the modes that the free memory asks for; a run that goes on keeps those it had."""
        before = self.saved[2] if self.saved else {}
        kept = {name: True for name in memory.LOSSY if before.get(name)}
        precision = Precision(self.config.mixed_precision, self.device).name
        pixels = (self.resolution // self.sd.vae.factor) ** 2
        config, line = memory.fit(
            *(self.sd, replace(self.config, **kept), pixels, precision, self.device),
            resumed=self.saved is not None,
        )
        print(line)
        return config

    def announce(self) -> None:
        """Take the folder: say and write what is about to run."""
        config, sd = self.config, self.sd
        resume.remove_leftovers(self.folder)
        require_space(self.folder, self.disk_needed())
        print(report.describe_prompts(sd.tokenizer, config.instance_prompt, config.class_prompt))
        print(
            f"{len(self.photos.files)} photographs, {len(self.photos)} crops of "
            f"{self.resolution}² pixels; device {self.device}, precision {self.precision.name}"
        )
        set_ = {k: v for k, v in asdict(config).items() if v not in (None, ())}
        text = "settings: " + ", ".join(f"{k} {v}" for k, v in set_.items())
        print(textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False))
        settings = {k: v for k, v in asdict(config).items() if k != "config"}
        settings["resume_from_checkpoint"] = None
        write_json(self.folder / "config.json", settings)
        report.save_image(
            photos.contact_sheet(self.photos), self.folder / "samples" / "photographs.png"
        )

    def disk_needed(self) -> int:
        """Bytes this run may still write: the model, snapshots, a state while the last is there."""
        config = self.config
        need = memory.needed(self.sd, config)
        snapshots = (config.max_train_steps - 1) // config.checkpointing_steps
        snapshots = min(snapshots, config.checkpoints_total_limit or snapshots)
        states = 2 * (need["trained"] + need["averages"])
        whole = need["weights"] + need["weights"] // 2 * snapshots + states
        return max(0, whole - size_of(self.folder))

    # -- before the first step

    def prepare(self) -> None:
        """Class images, latents, contexts: everything that the steps read."""
        config, sd = self.config, self.sd
        # The weights as they came: on the CPU, and in the mapped file where there is one.
        self.start = {key: p.detach() for key, p in self.parameters().items()}
        sd.to(self.device)
        sd.text_encoder.requires_grad_(config.train_text_encoder)
        sd.vae.requires_grad_(False)

        class_photos = self.class_photos() if config.uses_prior else None
        self.instance = encode(sd, self.photos, config.random_flip, "photographs")
        self.prior = encode(sd, class_photos, False, "class images") if class_photos else None
        if class_photos:
            self.identity["class images"] = content_hash(class_photos)
        if self.saved is not None:
            resume.check(self.folder, self.saved[2], self.identity)

        self.ids = sd.tokenizer(self.train_prompts()).to(self.device)
        self.contexts = None if config.train_text_encoder else sd.text_encoder(self.ids)

    def train_prompts(self) -> list[str]:
        """Of the terms of Eq. 2."""
        return [self.config.instance_prompt] + [self.config.class_prompt] * self.config.uses_prior

    def class_photos(self) -> Photos:
        config = self.config
        with graphs.captured_unet(self.sd.unet), self.precision.autocast():
            files = class_images.ensure(
                self.sd,
                Path(config.class_data_dir or self.folder / "class_images"),
                count=config.num_class_images,
                prompt=config.class_prompt,
                sampler=config.class_sampler,
                steps=config.class_steps,
                guidance_scale=config.class_guidance_scale,
                seed=config.seed,
                resolution=self.resolution,
                batch_size=config.sample_batch_size,
            )
        return photos.load_photos(files, self.resolution, config.center_crop)

    def identify(self) -> dict:
        """What must be the same when a run is resumed, but for the class images."""
        names = ("instance_prompt", "class_prompt", "prior_loss_weight", "seed", "learning_rate")
        names += ("lr_warmup_steps", "train_text_encoder", "text_encoder_learning_rate")
        names += ("train_batch_size", "gradient_accumulation_steps", "adam_weight_decay")
        names += ("use_8bit_adam", "optimizer_in_backward", "max_grad_norm", "snr_gamma")
        names += ("random_flip", "num_class_images")
        names += ("class_sampler", "class_steps", "class_guidance_scale")
        # 8-bit averages are in blocks of neighbours in memory, and a GPU lays out weights its way.
        place = {"device": self.device.type} if self.config.use_8bit_adam else {}
        return {
            "model": self.sd.fingerprint()[:16],
            "photographs": content_hash(self.photos),
            "resolution": self.resolution,
            "mixed_precision": self.precision.name,
            **{name: getattr(self.config, name) for name in names},
            **place,
        }

    def make_trainable(self) -> None:
        """fp32 copies of the weights that train, and the optimizer over them."""
        config = self.config
        for network in self.idle:
            network.to("cpu")
        for network in self.trained.values():
            network.requires_grad_(True)
            for p in network.parameters():
                p.data = p.detach().to(self.device, torch.float32, copy=True)
        rates = {"unet": config.learning_rate, "text_encoder": config.text_encoder_learning_rate}
        groups = [(rates[name], list(net.parameters())) for name, net in self.trained.items()]
        if config.optimizer_in_backward:
            print("the optimizer runs in the backward pass: gradients are not clipped")
            self.update = UpdateInBackward(groups, config.adam_weight_decay, config.use_8bit_adam)
        else:
            settings = (config.adam_weight_decay, config.max_grad_norm)
            scaled = self.precision.name == "fp16"
            self.update = Update(groups, *settings, scaled, config.use_8bit_adam)

    def parameters(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": p
            for name, network in self.trained.items()
            for key, p in network.named_parameters()
        }

    # -- one batch

    def draw(self, n: int) -> list[Tensor]:
        """Batch n: x0, eps and t of the photographs, then of the class images."""
        config, latents = self.config, {"instance": self.instance, "class": self.prior}
        drawn = []
        for name in ["instance", "class"][: 1 + config.uses_prior]:
            which = (self.sd.schedule.T, config.seed, name, n, config.train_batch_size)
            drawn += draw_batch(latents[name], *which, self.device)
        return drawn

    def terms(self, drawn: Sequence[Tensor]) -> tuple[Term, Term | None, Tensor | None]:
        """What `draw` gave as the two terms of Eq. 2 and, for Min-SNR, their samples' weights."""
        config, sd = self.config, self.sd
        contexts = sd.text_encoder(self.ids) if self.contexts is None else self.contexts
        c = contexts[:, None].expand(-1, config.train_batch_size, -1, -1)  # (terms, B, 77, D)
        instance = Term(*drawn[:3], c[0])
        prior = Term(*drawn[3:], c[1]) if config.uses_prior else None
        weight = None
        if config.snr_gamma is not None:
            t = torch.cat(drawn[2::3])
            weight = dreambooth.min_snr_weight(sd.schedule, t, config.snr_gamma)
        return instance, prior, weight

    def forward(self, drawn: Sequence[Tensor]) -> Step:
        """What `draw` gave through the model: Eq. 2."""
        sd, weight_of_prior = self.sd, self.config.prior_loss_weight
        with self.precision.autocast(), self.checkpointing():
            instance, prior, weight = self.terms(drawn)
            return dreambooth.step(sd.unet, sd.schedule, instance, prior, weight_of_prior, weight)

    def checkpointing(self) -> AbstractContextManager:
        return memory.checkpoint_gradients(self.sd.unet, self.config.gradient_checkpointing)

    def explain(self) -> Path:
        """Write explain.html: batch 0 as the weights are now. Nothing is updated."""
        config, sd = self.config, self.sd
        names = report.identifiers(config.instance_prompt, config.class_prompt)
        with self.precision.autocast():
            instance, prior, weight = self.terms(self.draw(0))
        with self.checkpointing():
            seen = microscope.look(
                sd,
                instance,
                prior,
                config.prior_loss_weight,
                weight,
                self.parameters(),
                prompt=config.instance_prompt,
                identifier=names[0] if names else None,
                autocast=self.precision.autocast,
                scale=self.update.scale,
            )
        steps, strength = config.validation_inference_steps, config.validation_guidance_scale
        bar = tqdm(total=steps, desc="from noise to a picture", unit="step", leave=False)
        visiting = memory.visiting(self.idle, self.device)
        with bar, visiting, self.precision.autocast():
            strip = microscope.film(
                sd,
                config.instance_prompt,
                steps=steps,
                guidance_scale=strength,
                seed=config.seed,
                resolution=self.resolution,
                on_step=bar.update,
            )
        about = {
            "model": f"{config.model or sd.source}, {self.device}, precision {self.precision.name}",
            "prompts": " and ".join(f"“{prompt}”" for prompt in self.train_prompts()),
            "batch": f"{len(instance.t)} of {len(self.photos)} crops of "
            f"{len(self.photos.files)} photographs, seed {config.seed}",
            "sampling": f"{steps} DDIM steps, guidance {strength:g}",
        }
        path = self.folder / "explain.html"
        page.write(path, seen, strip, about)
        return path

    def step(self, step: Tensor, warm_up: Tensor, *drawn: Tensor) -> Tensor:
        """One update from the batches drawn for it: (4,), the loss, its two terms, the gradients'
        norm. Tensors in, tensor out, and nothing waits for the device, so that it can be captured.
        """
        accumulate, losses = self.config.gradient_accumulation_steps, []
        size = len(drawn) // accumulate
        for first in range(0, len(drawn), size):
            result = self.forward(drawn[first : first + size])
            self.update.start(result.loss, warm_up)
            (result.loss * self.update.scale / accumulate).backward()
            losses.append(
                torch.stack([result.loss, result.loss_instance, result.loss_prior]).detach()
            )
            if self.on_step:
                self.on_step(int(step), result)
        loss = torch.stack(losses).mean(dim=0)  # (3,)
        norm = self.update.apply(step, loss[0], warm_up)
        return torch.cat([loss, norm[None]])

    def captured_step(self) -> Callable[..., Tensor]:
        """On a GPU `step` as one CUDA graph, where its optimizer can be part of one."""
        return graphs.captured(self.step, self.device) if self.update.capturable else self.step

    # -- the loop

    def train(self, on_step: Callable[[int, Step], None] | None) -> StableDiffusion:
        config, sd, self.on_step = self.config, self.sd, on_step
        self.announce()
        self.prepare()
        before = self.samples()
        self.save_grid(0, before)
        self.make_trainable()
        first = self.restore()
        if first and first % config.checkpointing_steps == 0 and first < config.max_train_steps:
            self.save_snapshot(first)  # where the run was stopped between state and snapshot
        if config.explain and first == 0:
            self.explain()
        accumulate, poll = config.gradient_accumulation_steps, steps_between_looks(self.device)
        pending: list[tuple[int, float, Tensor]] = []
        bar = tqdm(
            total=config.max_train_steps, initial=first, desc="training", unit="step", smoothing=0.1
        )
        # Who looks on wants to see what is between the backward pass and the update.
        update = self.step if on_step else self.captured_step()
        for step in range(first + 1, config.max_train_steps + 1):
            warm_up = min(1.0, step / config.lr_warmup_steps) if config.lr_warmup_steps else 1.0
            numbers = (to_device(torch.tensor(float(x)), self.device) for x in (step, warm_up))
            batches = range((step - 1) * accumulate, step * accumulate)
            values = update(*numbers, *(x for n in batches for x in self.draw(n)))
            pending.append((step, config.learning_rate * warm_up, values))

            last = step == config.max_train_steps
            save = step % config.checkpointing_steps == 0
            show = step % config.validation_steps == 0
            if step % poll == 0 or save or show or last:
                self.flush(pending, bar)
            bar.update()
            if show and not last:
                self.save_grid(step, self.samples())
            if save or last:
                self.save_state(step)
            if save and not last:
                self.save_snapshot(step)
        bar.close()
        self.update.release()
        self.finish(before)
        return sd.to(self.device)

    def flush(self, pending: list[tuple[int, float, Tensor]], bar: tqdm) -> None:
        """Bring the numbers of the last steps to the CPU; stop here if one was not finite."""
        values = torch.stack([v for _, _, v in pending]).tolist()
        bad_step = int(self.update.bad_step.item())
        rows = [
            (step, loss, instance, prior, lr, norm)
            for (step, lr, _), (loss, instance, prior, norm) in zip(pending, values, strict=True)
            if bad_step < 0 or step < bad_step
        ]
        report.append_losses(self.folder / "loss.csv", rows)
        pending.clear()
        if bad_step >= 0:
            bar.close()
            raise UserError(self.explain_non_finite(bad_step))
        bar.set_postfix(loss=f"{rows[-1][1]:.4f}", refresh=False)

    def explain_non_finite(self, step: int) -> str:
        """Do the step again with the weights it had; name the first tensor that is not finite."""
        self.update.release()
        accumulate, name = self.config.gradient_accumulation_steps, None
        for key, p in self.parameters().items():
            if name is None and not p.isfinite().all():
                name = key
        for n in range((step - 1) * accumulate, step * accumulate):
            result = self.forward(self.draw(n))
            for field in ("x_t", "prediction", "per_sample", "loss"):
                if name is None and not getattr(result, field).isfinite().all():
                    name = field
            result.loss.backward()
        if name is None:
            bad = (k for k, p in self.parameters().items() if not p.grad.isfinite().all())
            name = f"the gradient of {next(bad, 'the scaled loss')}"
        kept = report.snapshots(self.folder)
        weights = f"with the weights of step {step - 1}"
        if self.config.optimizer_in_backward:
            weights = "with some of the weights already updated"
        return (
            f"step {step}: {name} is not finite, so training stopped {weights}. Start anew in "
            "another --output_dir with a lower --learning_rate or --mixed_precision no"
            + (f"; {kept[-1]} is the last good model" if kept else "")
        )

    # -- saving

    def save_state(self, step: int) -> None:
        tensors = {**self.parameters(), **self.update.state()}
        resume.save(self.folder, step, tensors, self.identity)

    def restore(self) -> int:
        """Take over the state that was found, if any; the number of steps already done."""
        losses = self.folder / "loss.csv"
        if self.saved is None:
            if self.config.resume_from_checkpoint:
                print(f"no state in {self.folder} yet: starting at the first step")
            losses.unlink(missing_ok=True)
            return 0
        (step, tensors, _), self.saved = self.saved, None
        with torch.no_grad():
            for key, p in self.parameters().items():
                p.copy_(tensors[key])
        self.update.load_state(tensors)
        resume.keep_only(self.folder, step)
        report.truncate_losses(losses, step)
        print(f"resumed {self.folder} at step {step}")
        return step

    def save_snapshot(self, step: int) -> None:
        """checkpoint-N: the model alone, in fp16, whole or not there."""
        final = self.folder / f"checkpoint-{step}"
        part = final.with_name(f".{final.name}.tmp")
        if final.exists():
            return
        shutil.rmtree(part, ignore_errors=True)
        try:
            self.sd.save(part, torch.float16)
            write_text(part / "README.md", report.model_card(self.sd, self.config, step))
            os.replace(part, final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        if self.config.checkpoints_total_limit is not None:
            report.remove_old_snapshots(self.folder, self.config.checkpoints_total_limit)

    def samples(self) -> list[list]:
        config = self.config
        if config.num_validation_images == 0:
            return []
        count = len(self.prompts) * config.num_validation_images
        batches = math.ceil(count / config.grid_batch_size)
        total = batches * config.validation_inference_steps
        bar = tqdm(total=total, desc="samples", unit="step", leave=False)
        visiting = memory.visiting(self.idle, self.device)
        with bar, visiting, graphs.captured_unet(self.sd.unet), self.precision.autocast():
            return report.draw_samples(self.sd, self.prompts, config, self.resolution, bar.update)

    def save_grid(self, step: int, rows: list[list]) -> None:
        if self.config.num_validation_images:
            grid = photos.grid(photos.enlarged(rows), labels=self.prompts)
            report.save_image(grid, self.folder / "samples" / f"step-{step:05d}.png")

    def finish(self, before: list[list]) -> None:
        config, sd, run = self.config, self.sd, self.folder
        if config.num_validation_images:
            after = self.samples()
            self.save_grid(config.max_train_steps, after)
            picture = report.before_after(self.prompts, before, after)
            report.save_image(picture, run / "before_after.png")
        rows = report.read_losses(run / "loss.csv")
        if rows:
            report.save_image(report.loss_chart(rows), run / "loss.png")
        # An older model, of a run that now had more steps, must not be half of this one.
        (run / "model_index.json").unlink(missing_ok=True)
        sd.save(run)
        write_text(run / "README.md", report.model_card(sd, config, config.max_train_steps))
        for name in self.trained:
            print(f"the {name}'s weights moved by {self.moved(name):.3%} of their norm")
        options = f'--model {run} --prompt "{config.instance_prompt} in the snow"'
        if config.validation_guidance_scale != TrainConfig.validation_guidance_scale:
            options += f" --guidance_scale {config.validation_guidance_scale:g}"
        print(
            f"done: {run} is the model\n"
            f"  draw:     python -m minibooth.sample {options}\n"
            f"  one file: python -m minibooth.convert --model {run} --output {run}.safetensors\n"
            f"  {run}/state ({gigabytes(size_of(run / 'state'))}) is only needed for more steps"
        )

    @torch.no_grad()
    def moved(self, name: str) -> float:
        """‖w − w_start‖ / ‖w_start‖ over a network."""
        change = norm = 0.0
        for key, p in self.trained[name].named_parameters():
            start = self.start[f"{name}.{key}"].to(p.device, torch.float32)
            change += (p - start).square().sum().item()
            norm += start.square().sum().item()
        return math.sqrt(change / norm)


def default_prompts(config: TrainConfig) -> list[str]:
    prompts = [config.instance_prompt, f"{config.instance_prompt} in the snow"]
    return [config.class_prompt, *prompts] if config.class_prompt else prompts


def steps_between_looks(device: torch.device) -> int:
    """Looking at the losses waits for the device: on a CPU that is free, on a GPU it is not."""
    return 1 if device.type == "cpu" else 10


def size_of(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def content_hash(pictures: Photos) -> str:
    return hashlib.sha256(pictures.images.numpy()).hexdigest()[:16]


def toybox_settings(given: dict) -> dict:
    """What suits the toybox, where it is the model; the whole run, where nothing else is given.

    Photographs without a model are not its business: train() then asks for one.
    """
    chosen = given.get("model", None if "instance_data_dir" in given else "toybox")
    if chosen != "toybox" or "config" in given:
        return {}
    settings = toybox.default_run()
    if "instance_data_dir" in given:
        for name in ("instance_data_dir", "instance_prompt", "class_prompt", "validation_prompt"):
            del settings[name]
    return settings


def main() -> None:
    train(
        cli.parse(
            TrainConfig,
            "minibooth.train",
            "DreamBooth: teach Stable Diffusion a subject from a few photographs of it. Without "
            "options it trains the toybox, a small model that is shipped, in a minute or two. The "
            "defaults below are for Stable Diffusion; the toybox has its own "
            "(minibooth/toybox/__init__.py).",
            defaults=toybox_settings,
        )
    )


if __name__ == "__main__":
    cli.run("minibooth.train", main)
