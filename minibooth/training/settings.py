"""Every setting of a run, as a dataclass that is also the command line, and which cannot work."""

import math
from dataclasses import dataclass

from .. import hypernetwork, lora, ops, textual_inversion
from ..common import cli
from ..common.cli import option
from ..common.errors import UserError
from ..formats import checks
from ..hypernetwork import Form
from . import subjects
from .elsewhere import ELSEWHERE
from .subjects import Subject

METHODS = ("dreambooth", "lora", "textual_inversion", "hypernetwork")
PROPERTIES = (*textual_inversion.TEMPLATES, "prompt")

WEIGHT_DECAY = 1e-2  # AdamW's pull on each weight towards 0: at the usual rates 4e-5 of it in a run

# Settings that there were, as they still are in old config files → what to do now.
REMOVED = {
    "adam_weight_decay": f"it is {WEIGHT_DECAY} in every run",
    "tokenizer": "minibooth.convert writes a model with another one, which --tokenizer names there",
}


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run. The defaults suit an object or an animal on SD 1.5."""

    elsewhere, removed = ELSEWHERE, REMOVED  # no settings: these have no types
    adam_weight_decay = WEIGHT_DECAY

    model: str | None = option(
        None,
        "base model: folder, single file (.safetensors, .ckpt), hub id, or toybox: the small one "
        "that is shipped, which is trained on a subject of its own where nothing else is said",
        aliases=("pretrained_model_name_or_path",),
        place="source",
        topic="what most runs need",
    )
    instance_data_dir: str | None = option(
        None, "folder with 3 to 6 photographs of the subject", place="path"
    )
    instance_prompt: str | None = option(None, 'names the subject, say "a sks dog"')
    class_prompt: str | None = option(None, 'names its class, say "a dog"')
    output_dir: str = option(
        "minibooth-out", "where the trained model and all the rest go", place="path"
    )
    method: str = option(
        "dreambooth",
        "what is trained: dreambooth all weights; lora low-rank differences of some layers (small "
        "files beside the model; learning rates 1e-4 and 5e-5 where none is given); "
        "textual_inversion one new word (5e-4, 3000 steps, no prior term); hypernetwork small "
        "networks before keys and values (1e-5, 10,000 steps)",
        choices=METHODS,
    )
    max_train_steps: int = option(800, "updates of the weights")
    learning_rate: float = option(5e-6, "of the UNet, or of the new word")
    resume_from_checkpoint: str | None = option(
        None, "go on where the run in output_dir stopped", choices=("latest",)
    )
    config: str | None = option(
        None, "a config.json of another run; flags override it", place="path"
    )

    caption_extension: str | None = option(
        None,
        "of texts beside photographs, say .txt: the first line of 1.txt replaces the instance "
        "prompt for 1.jpg [none are read]",
        topic="photographs (captions, subjects, crops)",
    )
    caption_column: str | None = option(
        None,
        "captions as Hugging Face's data sets have them instead: the name, say text, under which "
        "metadata.jsonl in the photographs' folder has them beside their file_name",
    )
    concepts_list: str | None = option(
        None,
        "JSON file with several subjects, in place of the one that instance_data_dir, "
        "instance_prompt and class_prompt give: a list of objects with these three and, if it has "
        "one, class_data_dir",
        place="path",
    )
    resolution: int | None = option(None, "side of the training pictures in pixels [the model's]")
    center_crop: bool = option(False, "take only the middle of photographs that are not square")
    random_flip: bool = option(
        False, "also train on mirrored photographs; not for lettering or faces"
    )

    rank: int = option(4, "of LoRA's matrices", topic="method (LoRA, word, hypernetwork)")
    lora_alpha: float | None = option(None, "LoRA's α, as in (α/rank) B A [the rank]")
    lora_targets: str = option(
        "attention",
        "layers that get a LoRA: diffusers' choice, kohya's, or every linear layer",
        choices=tuple(lora.TARGETS),
    )
    placeholder_token: str | None = option(None, "Textual Inversion's new word, say <my-dog>")
    initializer_token: str | None = option(None, "the word that it starts as, say dog")
    num_vectors: int = option(1, "of the new word; it counts as so many tokens")
    learnable_property: str = option(
        "object",
        "what the word is for, which chooses the prompts it is trained with: the paper's for an "
        "object or a style, or the instance prompt alone",
        choices=PROPERTIES,
    )
    hypernetwork_sizes: str | None = option(
        None, "widths that get a pair of networks, with commas between, say 768,320 [the model's]"
    )
    layer_structure: str = option(
        "1,2,1", "widths of these networks' layers, times the width that they are for"
    )
    activation_func: str = option(
        "linear", "between these layers; linear is none", choices=tuple(hypernetwork.OFFERED)
    )
    weight_init: str = option(
        "zero",
        "of these layers: zero begins with the model itself, normal is as AUTOMATIC1111's",
        choices=hypernetwork.STARTS,
    )

    prior_loss_weight: float = option(
        1.0,
        "λ of Eq. 2, their weight in the loss; 0 is plain fine-tuning, without class images",
        topic="class images",
    )
    num_class_images: int = option(200, "class images to train with; your own in the folder count")
    class_data_dir: str | None = option(
        None, "folder of class images [<output_dir>/class_images]", place="path"
    )
    class_sampler: str = option(
        "ddim",
        "sampler that draws them; dpm++ wants fewer steps, say 20: on the toybox nothing is lost, "
        "on the public weights nobody has looked (docs/class_images.md)",
        choices=checks.SAMPLERS,
    )
    class_steps: int = option(
        50, "its steps; the paper's sampler is ddpm, which wants many, up to 1000"
    )
    class_guidance_scale: float = option(7.5, "its guidance")
    sample_batch_size: int = option(4, "class images drawn at once")

    train_text_encoder: bool = option(
        False, "train the text encoder too: helps faces, needs memory", topic="training"
    )
    text_encoder_learning_rate: float = option(2e-6, "of the text encoder, where it is trained")
    lr_scheduler: str = option(
        "constant",
        "the learning rates after their warm-up: constant, or falling to 0 with the last update",
        choices=("constant", "linear", "cosine"),
    )
    lr_warmup_steps: int = option(0, "updates over which the learning rates rise from 0")
    train_batch_size: int = option(
        1, "photographs per step, of each rank; as many class images come beside them"
    )
    gradient_accumulation_steps: int = option(1, "batches per update")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    snr_gamma: float | None = option(None, "γ of Min-SNR loss weights; 5 is usual [plain loss]")
    seed: int = option(0, "of every noise, timestep, order and picture")

    gradient_checkpointing: bool = option(
        False, "less memory, a third more to compute", topic="memory"
    )
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

    validation_prompt: tuple[str, ...] = option(
        (),
        "for the sample grids; several times for several [class, instance, instance in the snow]",
        empty=True,
        topic="pictures and snapshots",
    )
    num_validation_images: int = option(2, "pictures per prompt in the grids; 0 for no grids")
    validation_steps: int = option(200, "updates between two grids")
    validation_inference_steps: int = option(25, "sampler steps of the grids' pictures")
    validation_guidance_scale: float = option(7.5, "their guidance")
    checkpointing_steps: int = option(200, "updates between two snapshots and resume states")
    checkpoints_total_limit: int | None = option(None, "newest snapshots to keep [all]")
    save_state: str = option(
        "full",
        "the state that a run goes on from: full, bit for bit; half, rounded to 16 bits; or none",
        choices=("full", "half", "none"),
    )
    report_to: str | None = option(
        None,
        "also write losses, gradient norm and grids as TensorBoard's event files, into "
        "<output_dir>/logs; wants the library, pip install tensorboard",
        choices=("tensorboard",),
    )
    explain: bool = option(
        False, "show the first step, before and after training, in explain.html: tensors, maps, …"
    )

    noise_level: tuple[int, int] | None = option(
        None,
        "of an upscaler that is trained: the lowest level and the highest of the noise on small "
        "pictures; the public one was made with 0 349, and less keeps more of the subject's detail "
        "(our reading of DreamBooth's paper, see minibooth/upscaler.py) [0 20]",
        topic="second stage",
    )
    base_model: str | None = option(
        None,
        "the model that draws what the upscaler is to enlarge: the class images are what both make "
        "of the class prompt, and the grids show its drawings, too; it draws as class images are "
        "drawn, and the upscaler enlarges as grids are",
        place="source",
    )

    vae: str | None = option(
        None,
        "folder, file or hub id of a VAE to use instead",
        place="source",
        topic="model",
    )
    prediction_type: str | None = option(
        None, "overrides what the model says", choices=("epsilon", "v_prediction")
    )
    revision: str | None = option(None, "branch, tag or commit on the hub")
    ema: str = option(
        "no",
        "yes takes the averaged weights of a single file that has them beside the plain ones",
        choices=("no", "yes"),
    )

    device: str = option("auto", "auto, cuda, mps or cpu", topic="device")
    mixed_precision: str = option(
        "auto",
        "what the networks compute in: bf16 or fp16 on a GPU by its age, fp32 elsewhere",
        choices=("auto", "no", "bf16", "fp16"),
    )
    kernels: str | None = option(
        None,
        "for attention, norms, gates and AdamW [MINIBOOTH_KERNELS, or auto: right and faster here]",
        choices=ops.MODES,
    )

    @property
    def uses_prior(self) -> bool:
        return self.prior_loss_weight > 0 and not self.trains_word

    @property
    def reads_captions(self) -> bool:
        return self.caption_extension is not None or self.caption_column is not None

    @property
    def trains_word(self) -> bool:
        return self.method == "textual_inversion"

    @property
    def trains_hypernetwork(self) -> bool:
        return self.method == "hypernetwork"

    @property
    def hypernetwork_form(self) -> Form:
        """Raises UserError for a --layer_structure that is none."""
        structure = cli.numbers("--layer_structure", self.layer_structure, float)
        return Form(structure, self.activation_func)

    @property
    def hypernetwork_widths(self) -> tuple[int, ...]:
        """Of its pairs; empty for all. Raises UserError for a --hypernetwork_sizes that is none."""
        return cli.numbers("--hypernetwork_sizes", self.hypernetwork_sizes or "", int)

    @property
    def subjects(self) -> list[Subject]:
        """Whom the run is taught. Raises UserError where the list of them is none."""
        if self.concepts_list:
            return subjects.read_list(self.concepts_list)
        one = (self.instance_data_dir, self.instance_prompt, self.class_prompt)
        return [Subject(*one, self.class_data_dir)]

    @property
    def text_changes(self) -> bool:
        """Whether training changes what a prompt is encoded to."""
        return self.train_text_encoder or self.trains_word

    @property
    def prompts(self) -> list[str]:
        """Of the terms of Eq. 2, subject by subject; of Textual Inversion all that a photograph can
        come under."""
        if self.trains_word and self.learnable_property != "prompt":
            templates = textual_inversion.TEMPLATES[self.learnable_property]
            return [template.format(self.placeholder_token) for template in templates]
        prompts = [s.instance_prompt for s in self.subjects]
        return prompts + [s.class_prompt for s in self.subjects] * self.uses_prior

    @property
    def grid_pictures(self) -> int:
        """Of a sample grid of a model that draws."""
        return len(self.grid_prompts) * self.num_validation_images

    @property
    def grid_prompts(self) -> list[str]:
        """Of the sample grids."""
        if self.validation_prompt:
            return list(self.validation_prompt)
        named = [s.instance_prompt for s in self.subjects]
        named += [f"{named[0]} in the snow"] * (len(named) == 1)
        classes = [s.class_prompt for s in self.subjects if s.class_prompt]
        return list(dict.fromkeys(classes + named))

    @property
    def saves_memory(self) -> bool:
        """Whether any mode is on that trades speed or exactness for memory."""
        return self.gradient_checkpointing or self.use_8bit_adam or self.optimizer_in_backward

    @property
    def grid_batch_size(self) -> int:
        """Pictures of the grids that are drawn at once: fewer where memory is short."""
        return min(8, self.sample_batch_size) if self.saves_memory else 8

    def check_word(self) -> None:
        if self.placeholder_token is None or self.initializer_token is None:
            raise UserError(
                "--method textual_inversion wants --placeholder_token (the new word, say <my-dog>) "
                "and --initializer_token (the word that it starts as, say dog)"
            )
        if self.placeholder_token not in (self.instance_prompt or self.placeholder_token):
            raise UserError(
                f"--instance_prompt {self.instance_prompt!r} does not have the word that is "
                f"trained, {self.placeholder_token}"
            )
        if self.train_text_encoder:
            raise UserError("--method textual_inversion trains no network: no --train_text_encoder")

    def check_list(self) -> None:
        for name in ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name} is of one subject: with --concepts_list it stands there")
        if self.trains_word:
            raise UserError("--method textual_inversion learns one word: no --concepts_list")
        for subject in self.subjects:
            if self.uses_prior and subject.class_prompt is None:
                raise UserError(
                    f"--concepts_list {self.concepts_list}: {subject.instance_prompt!r} lacks "
                    "class_prompt; --prior_loss_weight 0 does without"
                )

    def check(self) -> None:
        """Raise UserError for settings that cannot work, before anything is read or written."""
        if self.trains_word:
            self.check_word()
        if self.concepts_list:
            self.check_list()
        elif self.instance_data_dir is None or self.instance_prompt is None:
            raise UserError(
                'give --instance_data_dir (the photographs) and --instance_prompt ("a sks dog")'
            )
        elif self.uses_prior and self.class_prompt is None:
            raise UserError(
                'give --class_prompt ("a dog"; minibooth.classify finds the noun), or '
                "--prior_loss_weight 0 for plain fine-tuning"
            )
        if self.caption_extension is not None and self.caption_column is not None:
            raise UserError("--caption_extension and --caption_column exclude each other")
        if self.optimizer_in_backward and self.gradient_accumulation_steps > 1:
            raise UserError(
                "--optimizer_in_backward drops each gradient at once: it cannot go with "
                "--gradient_accumulation_steps; give a larger --train_batch_size"
            )
        cli.check_choices(self)
        if self.trains_hypernetwork:
            _ = self.hypernetwork_form, self.hypernetwork_widths
            if self.train_text_encoder:
                raise UserError("a hypernetwork stands in the UNet alone: no --train_text_encoder")
        at_least_one = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        at_least_one += ("sample_batch_size", "validation_steps", "checkpointing_steps")
        at_least_one += ("class_steps", "validation_inference_steps", "resolution")
        at_least_one += ("checkpoints_total_limit", "rank", "num_vectors")
        cli.check_at_least_one(self, at_least_one)
        for name in ("num_class_images", "num_validation_images", "lr_warmup_steps", "seed"):
            if not 0 <= getattr(self, name) < 2**63:
                raise UserError(f"--{name} must be a number from 0 up")
        for name in (
            "learning_rate",
            "text_encoder_learning_rate",
            "max_grad_norm",
            "snr_gamma",
            "lora_alpha",
        ):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise UserError(f"--{name} must be a positive number")
        levels = list(self.noise_level or (0, 0))  # how high they may be, the upscaler says
        if len(levels) != 2 or sorted([0, *levels]) != [0, *levels]:
            said = " ".join(map(str, levels))
            raise UserError(f"--noise_level {said}: give the lowest, from 0 up, then the highest")
        for name in ("prior_loss_weight", "class_guidance_scale", "validation_guidance_scale"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} must be a number from 0 up")
