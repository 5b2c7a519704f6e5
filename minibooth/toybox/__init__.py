"""The toybox: a small pretrained Stable Diffusion of a drawn world, shipped with the package.

It has the same networks, formats and code path as the big one, and on it a whole DreamBooth takes
a minute or two on two CPU cores. world.py draws the world, pretrain.py trains the model from
nothing and pretrain_upscaler.py its upscaler, by which enlarged.py makes the default run's picture;
judge.py measures pictures, drift.py shows what prior preservation does, gallery.py what a subject
can be put to.
May import training and what one reads, no program.
"""

from ..formats import hub
from . import world


def default_run() -> dict:
    """The settings of `python -m minibooth.train` without any: one dog, with prior preservation."""
    folder, subject = hub.toybox(), world.SUBJECTS["spotted_dog"]
    name, noun = subject.instance_prompt, subject.class_prompt
    return {
        "model": "toybox",
        "instance_data_dir": str(folder / "subjects" / "spotted_dog"),
        "instance_prompt": name,
        "class_prompt": noun,
        "num_class_images": 96,
        "class_sampler": "dpm++",
        "class_steps": 10,  # as good as 25 of DDIM here (docs/class_images.md)
        "class_guidance_scale": 4.0,
        "sample_batch_size": 32,
        "max_train_steps": 240,
        "learning_rate": 7e-4,
        "lr_scheduler": "cosine",
        "train_batch_size": 4,
        "validation_prompt": (
            *(noun, name, f"{name} in the snow", f"{name} at night"),
            *(f"{name} wearing a red hat", "a cat"),
        ),
        "num_validation_images": 3,
        "validation_steps": 240,
        "validation_inference_steps": 12,
        "validation_guidance_scale": 4.0,
        "checkpointing_steps": 240,
    }


# Of Textual Inversion: the prompts of the paper's list have words that this world does not know.
WORD = {
    "learnable_property": "prompt",
    "num_vectors": 4,
    "learning_rate": 1e-2,
    "max_train_steps": 600,
    "validation_steps": 600,
    "checkpointing_steps": 600,
}


# How the toybox's upscaler enlarges pictures: more steps bring specks into what is even.
UPSCALING = {"steps": 1, "guidance_scale": 1.0}

# How it is trained, on photographs of 256².
UPSCALER = {
    "base_model": "toybox",
    "num_class_images": 24,
    "class_sampler": "dpm++",
    "class_steps": 10,
    "class_guidance_scale": 4.0,
    "max_train_steps": 200,
    "learning_rate": 2e-4,
    "train_batch_size": 2,
    "validation_steps": 200,
    "validation_inference_steps": UPSCALING["steps"],
    "validation_guidance_scale": UPSCALING["guidance_scale"],
    "checkpointing_steps": 200,
}


def train_settings(given: dict) -> dict:
    """What suits the toybox, where it is the model; the whole run, where nothing else is given.

    Photographs without a model are not its business: training then asks for one.
    """
    own = {"instance_data_dir", "concepts_list"} & set(given)
    chosen = given.get("model", None if own else "toybox")
    if chosen == "toybox-x4" and "config" not in given:
        return UPSCALER
    if chosen != "toybox" or "config" in given:
        return {}
    suitable = default_run()
    if given.get("method") == "lora":
        suitable |= {"rank": 16, "learning_rate": 4e-3}
    if given.get("method") == "hypernetwork":
        suitable |= {"learning_rate": 4e-3}
    if given.get("method") == "textual_inversion":
        word = {"placeholder_token": "<sks>", "initializer_token": "dog"} | given
        name, common = f"a {word['placeholder_token']}", suitable["instance_prompt"]
        prompts = tuple(p.replace(common, name) for p in suitable["validation_prompt"])
        suitable |= {"instance_prompt": name, "validation_prompt": prompts} | WORD
        suitable |= {k: word[k] for k in ("placeholder_token", "initializer_token")}
    if own:
        for name in ("instance_data_dir", "instance_prompt", "class_prompt", "validation_prompt"):
            del suitable[name]
    return suitable
