"""What is refused and decided before the first file is written."""

import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import ops, pipeline, schedule
from ..common import cli
from ..common.errors import Stopped, UserError
from ..common.files import alone_in, folder_size, require_space
from ..device import memory, ranks, settle
from ..device.precision import Precision
from ..formats import folders, hub
from ..formats.checkpoint import NETWORKS, skeleton
from ..formats.configs import what_else_it_sees
from ..pipeline import StableDiffusion
from ..upscaler import Upscaler
from . import (
    by_kernel,
    class_images,
    events,
    fit,
    methods,
    on_cpu,
    passes,
    photos,
    plan,
    report,
    resume,
    second_stage,
    snapshots,
    subjects,
)
from .eight_bit import bitsandbytes
from .photos import Photos
from .resume import State
from .settings import TrainConfig

SMALLEST = 0.75  # of the side that a model was trained at, for what it is trained on and draws


class Run:
    """A run that can begin: its settings hold for its model, photographs, device and folder."""

    config: TrainConfig  # with the modes that the device's memory asks for
    sd: StableDiffusion  # on the CPU still, or where it was given
    device: torch.device
    folder: Path
    resolution: int  # side of the training pictures in pixels
    photos: Photos
    shown: Tensor  # (P,): which of the subjects each photograph shows
    captions: list[str | None]  # of each photograph
    precision: Precision
    saved: State | None  # where an earlier run of the same settings stopped
    fingerprint: str  # of the model
    identity: dict  # what must be the same when a run goes on, but for the class images
    trained: dict[str, nn.Module]  # by network: itself, its adapters, or a word for it
    second: second_stage.SecondStage | None  # where an upscaler is trained
    events: events.Events  # for TensorBoard
    on_passes: Callable[[int], None]  # is told after a step how many samples the UNet has seen

    def __init__(self, config: TrainConfig, sd: StableDiffusion, device: torch.device):
        """Read the photographs and, for a run that goes on, its state. Raises UserError where the
        model cannot be trained as `config` says, or another run is in its folder."""
        folder, side = Path(config.output_dir), config.resolution or sd.image_size
        found = [photos.photographs(subject.instance_data_dir) for subject in config.subjects]
        shown = [i for i, files in enumerate(found) for _ in files]
        files = [file for files in found for file in files]
        check_model(sd, side, (config.class_steps, config.validation_inference_steps))
        self.second = second_stage.of_run(sd, config, side, len(files))
        if config.trains_word:
            config = methods.spelled(config, sd.tokenizer)
        if self.second:
            config = self.second.settled(config)
        self.photos = photos.load_photos(files, side, config.center_crop, self.detail)
        self.captions = subjects.captions(files, config.caption_extension, config.caption_column)
        saved = resume.load(folder) if config.resume_from_checkpoint else None
        if config.resume_from_checkpoint and saved is None:
            print(f"no state in {folder} yet: starting at the first step")
        memory.keep_to_what_is_free(device)
        if config.fit_memory and device.type == "cuda":
            base = self.second and self.second.base
            config = fitted(config, sd, side, device, saved, base)
        precision = Precision(config.mixed_precision, device, not config.gradient_checkpointing)
        if config.optimizer_in_backward and precision.name == "fp16":
            raise UserError(
                "--optimizer_in_backward cannot go with fp16, where gradients that overflow must "
                "be thrown away together: give --mixed_precision bf16 or no"
            )
        self.fingerprint = sd.fingerprint()
        of_run = self.fingerprint, self.photos, side, precision.name, device
        self.identity = resume.identify(config, *of_run)
        self.identity["prompts"] = subjects.identity(config.subjects, shown, self.captions)
        if self.second:
            self.identity |= self.second.identity(config)
        if saved is not None:
            resume.check(folder, saved.identity, self.identity)
            if saved.step > config.max_train_steps:
                raise UserError(
                    f"{folder} is already at step {saved.step}: give --max_train_steps "
                    f"{saved.step} or more"
                )
        fit.require(sd, config, device, half=precision.dtype is not None)
        self.trained = methods.to_train(sd, config)
        self.config, self.sd, self.device, self.folder = config, sd, device, folder
        self.resolution, self.precision, self.saved = side, precision, saved
        self.shown = torch.tensor(shown)
        logging = bool(config.report_to) and ranks.rank() == 0
        self.events = events.Events(folder, logging, saved.step if saved else 0)
        self.on_passes = lambda n: None

    @property
    def resting(self) -> tuple[str, ...]:
        """The networks that stay on the CPU."""
        return plan.resting(self.sd, self.config)

    @property
    def by_turns(self) -> bool:
        """Whether the UNet makes room for the VAE."""
        return plan.by_turns(self.sd, self.config, self.pixels)

    @property
    def pixels(self) -> int:
        """Of the latents of a training picture."""
        return (self.resolution // self.sd.vae.factor) ** 2

    @property
    def detail(self) -> int | None:
        """How large photographs are of which an upscaler is shown pieces: see load_photos."""
        return self.second.detail if self.second else None

    @property
    def pictures(self) -> int:
        """Of a grid."""
        return self.second.pictures if self.second else self.config.grid_pictures

    @property
    def idle(self) -> list[nn.Module]:
        """The networks that have no part in training, but visit the device."""
        out = {"unet", *self.trained, *self.resting}
        return [net for name, net in self.sd.networks.items() if name not in out]


def check(config: TrainConfig, has_model: bool) -> torch.device:
    """Refuse what can be refused before a model is loaded; the device to run on."""
    if not has_model and config.model is None:
        raise UserError(
            "give --model: a folder, a single file, a hub id such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5, or toybox"
        )
    config.check()
    events.require(config.report_to)
    device = ranks.own_device(config.device)
    if config.use_8bit_adam:
        bitsandbytes(device)
    if config.kernels:
        ops.use(config.kernels)
    if config.optimizer_in_backward and ranks.count() > 1:
        raise UserError(
            "--optimizer_in_backward updates a weight before its gradient has been averaged over "
            "the ranks: leave it out, or train on one rank"
        )
    for subject in config.subjects:
        photos.photographs(subject.instance_data_dir)
        if config.uses_prior and subject.class_data_dir:
            class_images.check_folder(subject.class_data_dir, config.num_class_images)
    cli.check_folder("--output_dir", config.output_dir)
    subjects.check_folders(config.subjects, config.output_dir)
    return device


def images_of(run: Run) -> list[class_images.Images]:
    """The class images of each subject; none without a prior term."""
    config, drawn_by = run.config, run.fingerprint
    if run.second:
        drawn_by += f", {run.second.drawn_by(config)}"
        config = run.second.enlarging(config)
    of_run = run.resolution, drawn_by
    return [class_images.find(config, s, *of_run) for s in config.subjects * config.uses_prior]


def look_ahead(config: TrainConfig, device: torch.device) -> None:
    """Refuse what would not fit a GPU's memory before a model on the hub is downloaded: its configs
    alone, a few kilobytes, say how large it is."""
    source = str(config.model)
    if device.type != "cuda" or Path(source).exists() or not hub.is_repo_id(source):
        return
    file = folders.file_getter(source, config.revision)
    names = NETWORKS.keys() & folders.require_kind(file, source).keys()
    files = {name: file(f"{name}/config.json") for name in names}
    configs = {name: folders.read_config(files[name], source) for name in names}
    networks = {name: skeleton(name, configs[name]) for name in names}
    sd = StableDiffusion(None, schedule=None, configs=configs, **networks)
    if sd.unet.class_embedding is not None:
        second_stage.check_method(config)  # which the plan knows no others of
    pixels = ((config.resolution or sd.image_size) // sd.vae.factor) ** 2
    fit.refuse(sd, config, pixels, Precision(config.mixed_precision, device).name, device)


def load(config: TrainConfig) -> StableDiffusion:
    return pipeline.load(
        config.model,
        vae=config.vae,
        prediction_type=config.prediction_type,
        revision=config.revision,
        ema=config.ema == "yes",
    )


@contextmanager
def folder_of(config: TrainConfig) -> Iterator[None]:
    """Within it the run has its folder to itself. Raises UserError where another is in it, or was;
    Ctrl-C and SIGTERM say how to go on."""
    folder = Path(config.output_dir)
    with alone_in(folder) if ranks.rank() == 0 else nullcontext():
        check_folder(folder, goes_on=config.resume_from_checkpoint is not None)
        try:
            yield
        except KeyboardInterrupt as e:
            raise Stopped(how_to_go_on(folder), getattr(e, "status", 130)) from None


def how_to_go_on(folder: Path) -> str:
    """One line for who stopped a run."""
    if states := resume.steps(folder):
        step = int(states[0].name.removeprefix("step-"))
        return (
            f"stopped; {folder} keeps the state after step {step}: the same command with "
            "--resume_from_checkpoint latest goes on from there"
        )
    if made := snapshots.found(folder):
        return (
            f"stopped; --save_state none keeps no state to go on from: to train the last snapshot "
            f"further, give --model {made[-1]} and another --output_dir"
        )
    return "stopped before there was anything to go on from: the same command starts again"


def check_folder(folder: Path, goes_on: bool) -> None:
    """Raise UserError where `folder` holds a run, unless that one goes on."""
    state = resume.steps(folder)
    models = [f for f in (folder, *snapshots.found(folder)) if snapshots.is_model(f)]
    if (state or models) and not goes_on:
        raise UserError(
            f"{folder} already holds a run: give --resume_from_checkpoint latest to go on with it, "
            "or another --output_dir"
        )
    if models and not state:
        raise UserError(
            f"{folder} holds a model but no state to resume from (--save_state none keeps none): "
            f"to train it further, give --model {models[0]} and another --output_dir"
        )


def check_model(sd: StableDiffusion, resolution: int, sampler_steps: tuple[int, ...]) -> None:
    unet, draws = sd.configs["unet"], not isinstance(sd, Upscaler)
    if unet["in_channels"] != unet["out_channels"] and draws:
        sees = what_else_it_sees(unet)
        raise UserError(f"{sees}: it cannot be trained here, give its base model")
    if resolution % sd.vae.factor:
        raise UserError(f"--resolution must be a multiple of {sd.vae.factor}")
    if resolution < SMALLEST * sd.image_size and draws:
        warnings.warn(
            f"--resolution {resolution}: this model draws pictures of {sd.image_size}², and so "
            "much smaller ones break; without --resolution it is trained at its own size",
            stacklevel=2,
        )
    for steps in sampler_steps:
        schedule.timesteps(sd.schedule, steps)  # refuses what the model cannot do
    for name, network in sd.networks.items():
        for key, p in network.named_parameters():
            if not p.isfinite().all():
                raise UserError(
                    f"the model is damaged: its {name}'s {key} is not finite; get it again"
                )


def fitted(
    config: TrainConfig,
    sd: StableDiffusion,
    resolution: int,
    device: torch.device,
    saved: State | None,
    base: StableDiffusion | None = None,
) -> TrainConfig:
    """With the modes that the free memory asks for; a run that goes on keeps those it had."""
    before = saved.identity if saved else {}
    kept = {name: True for name in fit.LOSSY if before.get(name)}
    precision = Precision(config.mixed_precision, device).name
    pixels = (resolution // sd.vae.factor) ** 2
    given, resumed = replace(config, **kept), saved is not None
    config, line = fit.choose(sd, given, pixels, precision, device, resumed, base)
    print(line)
    return config


def try_kernels(run: Run, captured: bool, found: list[class_images.Images]) -> None:
    """On a GPU, find out which kernels are the right ones for what this run will replay there from
    CUDA graphs: its drawing, class images among it, and, if `captured`, its steps."""
    config, sd, side = run.config, run.sd, run.resolution
    drawing, training = [], 0
    wanted = settle.wanted(run.device)
    if wanted and not config.saves_memory:
        strength = config.validation_guidance_scale
        drawing += settle.batches(run.pictures, config.grid_batch_size, strength)
        strength = config.class_guidance_scale
        missing = [len(images.batch(first)) for images in found for first in images.missing]
        drawing += [n for size in missing for n in settle.batches(size, size, strength)]
    if wanted and captured:
        training = config.train_batch_size * (1 + config.uses_prior)
    met = settle.met(
        sd,
        side,
        side,
        drawing=drawing,
        training=training,
        adapted=methods.frozen_beside(sd, run.trained),
        text_changes=config.text_changes,
        autocast=run.precision.autocast,
    )
    if training and by_kernel.possible(config):
        met.append(ops.adamw_case(run.precision.dtype or torch.float32))
    settle.settle(met, run.device)


def disk_needed(
    sd: StableDiffusion, config: TrainConfig, resumed: bool = False, finished: bool = False
) -> int:
    """Bytes of weights and states that a run has on disk at most.

    A state is written while the one before is there, the model beside the last. A run that is
    `resumed` has a state already and, where it was `finished`, a model, which is replaced file by
    file.
    """
    networks = [plan.size_of(network) for network in sd.networks.values()]
    if config.method != "dreambooth":
        files = 1 if config.trains_hypernetwork else 2
        networks = files * [sum(plan.size(p) for p in plan.trainable(sd, config))]
    written = (config.max_train_steps - 1) // config.checkpointing_steps
    kept = min(written, config.checkpoints_total_limit or written)
    state = resume.size(sd, config)
    before = state if written or resumed else 0
    last = sum(networks) + max(before, *networks) if finished else max(before, sum(networks))
    return kept * (sum(networks) // 2) + state + last


@ranks.by_first
def announce(run: Run) -> None:
    """Take the folder: say and write what is about to run."""
    config, folder = run.config, run.folder
    on_cpu.refuse(run.sd, config, run.resolution, run.device)
    resume.remove_leftovers(folder)
    finished = snapshots.is_model(folder)
    need = disk_needed(run.sd, config, resumed=run.saved is not None, finished=finished)
    require_space(folder, max(0, need - folder_size(folder, "*.safetensors")))
    tokenizer = run.sd.tokenizer
    for subject in config.subjects:
        noun = None if config.trains_word else subject.class_prompt  # the word stands alone
        print(report.describe_prompts(tokenizer, subject.instance_prompt, noun))
    tokenizer(methods.prompts_of(config, run.captions, (run.shown,))[0])  # warns of what it cuts
    counts = [caption and tokenizer.within(caption) for caption in run.captions]
    report.check_captions(config.subjects, run.shown.tolist(), counts)
    if config.trains_word:
        subjects.require_word(run.photos.files, counts, config.placeholder_token)
    report.check_captions(config.subjects, run.shown.tolist(), run.captions)
    for subject in config.subjects:
        if line := photos.left_out(subject.instance_data_dir):
            print(line)
    if config.lr_warmup_steps > config.max_train_steps:
        share = config.max_train_steps / config.lr_warmup_steps
        warnings.warn(
            f"--lr_warmup_steps {config.lr_warmup_steps} is longer than the run: the learning rate "
            f"ends at {share:.0%} of what it is to be",
            stacklevel=2,
        )
    if line := subjects.about_captions(run.photos.files, run.captions, config.reads_captions):
        print(line)
    if config.trains_word:
        print("Textual Inversion changes no weight, so no class can drift: there is no prior term")
    print(
        f"{len(run.photos.files)} photographs, {len(run.photos)} crops of "
        f"{run.resolution}² pixels; device {run.device}, precision {run.precision.name}"
    )
    if (n := ranks.count()) > 1:
        print(f"{n} ranks: {n} × {config.train_batch_size} photographs per batch; no CUDA graphs")
    given = ", ".join(f"{k} {v}" for k, v in asdict(config).items() if v not in (None, ()))
    print(textwrap.fill(f"settings: {given}", 100, break_long_words=False, break_on_hyphens=False))
    cli.write_config(folder / "config.json", replace(config, resume_from_checkpoint=None))
    missing = sum(len(images.batch(i)) for images in images_of(run) for i in images.missing)
    done = run.saved.step if run.saved else 0
    of_images = run.second.enlarging(config) if run.second else config
    to_come = passes.to_come(of_images, missing, done, run.pictures)
    run.on_passes = passes.Forecast(to_come, config, run.device)
    report.save_image(photos.contact_sheet(run.photos), folder / "samples" / "photographs.png")
