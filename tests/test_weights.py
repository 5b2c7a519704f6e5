"""The published numbers that real weights must reproduce: `pytest -m weights`.

Models are found in the folder that MINIBOOTH_WEIGHTS names, else in the hub's cache; nothing is
downloaded. Every check that ran is written into weights/report.json (MINIBOOTH_WEIGHTS_REPORT names
another place): measured and published values, versions. weights/README.md says what goes where.
The tests that carry no mark drive the same code with a small random model.
"""

import json
import os
import platform
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import peers
import pytest
import torch

import minibooth
from minibooth.common.errors import UserError

SD14 = "CompVis/stable-diffusion-v1-4"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SIZE = 64  # of the latents; the fake below is content with less
REPORT = Path(__file__).parent.parent / "weights" / "report.json"

PICTURE = [0.38019, 0.28647, 0.27321, 0.40377, 0.38290, 0.35446, 0.39218, 0.38165, 0.42239]
UNET = {  # (seed of the noise, t) → the slice
    (9, 1000): [0.8878, -0.5659, 0.5844, -0.7442, 1.1883, -0.3927, 1.1192, -0.4423],
    (33, 4): [-0.4430, 0.1570, -0.1867, 0.2376, 0.3205, -0.3681, 0.0525, -0.0722],
}
DECODED = [-0.2051, -0.1803, -0.2311, -0.2114, -0.3292, -0.3574, -0.2953, -0.3323]


# ---- what is measured --------------------------------------------------------------------------


def picture_slice(sd):
    """Three DDIM steps from NumPy's noise; the last 3×3 pixels of the last channel, in [0, 1]."""
    noise = np.random.RandomState(0).standard_normal((1, 4, SIZE, SIZE))
    image = sd.generate(
        "a photograph of an astronaut riding a horse",
        steps=3,
        guidance_scale=7.5,
        eta=0.0,
        latents=torch.from_numpy(noise).float(),
        output="pt",
    )
    return image[0, -1, -3:, -3:].flatten().tolist()


@torch.no_grad()
def unet_slice(sd, t, latents, context):
    out = sd.unet(latents, torch.full((len(latents),), t), context)
    return out[-1, -2:, -2:, :2].flatten().tolist()


@torch.no_grad()
def decode_slice(sd, z):
    return sd.vae.decode(z)[-1, -2:, :2, -2:].flatten().tolist()


def gaussian(seed, shape):
    """The noise of the published numbers: its file, or CUDA's generator that made the file."""
    name = f"gaussian_noise_s={seed}_shape={'_'.join(map(str, shape))}.npy"
    path = Path(os.environ.get("MINIBOOTH_WEIGHTS", ".")) / name
    if path.exists():
        return torch.from_numpy(np.load(path)).float()
    if torch.cuda.is_available():
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(shape, generator=generator, device="cuda").cpu()
    return None


# ---- where models are found, where results go --------------------------------------------------


def find(repo_id):
    """The model's folder, or None. MINIBOOTH_WEIGHTS/<name> or /<owner>/<name>, else the cache."""
    if root := os.environ.get("MINIBOOTH_WEIGHTS"):
        for folder in (Path(root) / repo_id, Path(root) / repo_id.split("/")[1]):
            if (folder / "model_index.json").exists():
                return folder
    found = huggingface_hub.try_to_load_from_cache(repo_id, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def public(repo_id):
    folder = find(repo_id)
    if folder is None:
        pytest.skip(f"{repo_id} is neither in MINIBOOTH_WEIGHTS nor in the hub's cache")
    try:
        return minibooth.load(folder)
    except UserError as e:
        pytest.skip(f"{repo_id} is not whole: {e}")


def judge(check, model, measured, published, tolerance):
    """Write the comparison into the report; whether it holds."""
    worst = max(abs(a - b) for a, b in zip(measured, published, strict=True))
    entry = {
        "model": model,
        "holds": worst <= tolerance,
        "worst difference": worst,
        "tolerance": tolerance,
        "measured": measured,
        "published": published,
    }
    path = Path(os.environ.get("MINIBOOTH_WEIGHTS_REPORT", REPORT))
    report = json.loads(path.read_text()) if path.exists() else {"checks": {}}
    report["versions"] = {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    report["checks"][check] = entry
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    return entry["holds"]


# ---- with the public weights -------------------------------------------------------------------


@pytest.mark.weights
def test_stable_diffusion_1_4_draws_the_published_picture():
    measured = picture_slice(public(SD14))
    assert judge("picture of SD 1.4", SD14, measured, PICTURE, 3e-3)


@pytest.mark.weights
@pytest.mark.parametrize("seed, t", UNET)
def test_the_unet_of_stable_diffusion_1_5(seed, t):
    sd = public(SD15)
    latents, context = gaussian(seed, (4, 4, SIZE, SIZE)), gaussian(seed, (4, 77, 768))
    if latents is None or context is None:
        pytest.skip("the noise needs its .npy files in MINIBOOTH_WEIGHTS, or a CUDA device")
    measured = unet_slice(sd, t, latents, context)
    assert judge(f"UNet of SD 1.5 at t = {t}", SD15, measured, UNET[seed, t], 1e-3)


@pytest.mark.weights
def test_the_vae_of_stable_diffusion_1_4_decodes():
    sd, z = public(SD14), gaussian(13, (3, 4, SIZE, SIZE))
    if z is None:
        pytest.skip("the noise needs its .npy file in MINIBOOTH_WEIGHTS, or a CUDA device")
    assert judge("VAE of SD 1.4", SD14, decode_slice(sd, z), DECODED, 1e-3)


# ---- the same code with a fake -----------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """MINIBOOTH_WEIGHTS with a small random model under the public names, and its noise files."""
    folder, pipe = peers.model("sd1")
    (tmp_path / "CompVis").mkdir()
    (tmp_path / SD14).symlink_to(folder)
    (tmp_path / "stable-diffusion-v1-5").symlink_to(folder)
    for seed, shape in ((9, (4, 4, 8, 8)), (9, (4, 77, 768)), (13, (3, 4, 8, 8))):
        name = f"gaussian_noise_s={seed}_shape={'_'.join(map(str, shape))}.npy"
        np.save(tmp_path / name, np.random.RandomState(seed).standard_normal(shape))
    monkeypatch.setattr(sys.modules[__name__], "SIZE", 8)
    monkeypatch.setenv("MINIBOOTH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("MINIBOOTH_WEIGHTS_REPORT", str(tmp_path / "out" / "report.json"))
    return tmp_path, pipe


def test_models_and_noise_are_found_where_the_readme_says(fake, monkeypatch):
    root, _ = fake
    assert find(SD14) == root / SD14
    assert find(SD15) == root / "stable-diffusion-v1-5"
    assert gaussian(9, (4, 77, 768)).shape == (4, 77, 768)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gaussian(1, (4, 77, 768)) is None
    monkeypatch.setenv("MINIBOOTH_WEIGHTS", str(root / "nothing"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root / "no-cache"))
    assert find(SD14) is None
    with pytest.raises(pytest.skip.Exception, match=SD14):
        public(SD14)


def test_the_slices_are_those_of_the_published_tests(fake):
    """Each against diffusers' networks, sliced as the published numbers were."""
    _, pipe = fake
    sd = public(SD14)
    noise = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 4, 8, 8))).float()
    prompt = "a photograph of an astronaut riding a horse"
    image = pipe(
        prompt,
        num_inference_steps=3,
        guidance_scale=7.5,
        latents=noise,
        height=16,
        width=16,
        output_type="np",
    ).images
    assert picture_slice(sd) == pytest.approx(image[0, -3:, -3:, -1].flatten().tolist(), abs=1e-4)

    x, context = gaussian(9, (4, 4, 8, 8)), gaussian(9, (4, 77, 768))[:, :, :32]
    with torch.no_grad():
        out = pipe.unet(x, torch.tensor([1000]), context).sample
        want = pipe.vae.decode(gaussian(13, (3, 4, 8, 8))).sample
    measured = unet_slice(sd, 1000, x, context)
    assert measured == pytest.approx(out[-1, -2:, -2:, :2].flatten().tolist(), abs=1e-5)
    measured = decode_slice(sd, gaussian(13, (3, 4, 8, 8)))
    assert measured == pytest.approx(want[-1, -2:, :2, -2:].flatten().tolist(), abs=1e-5)


def test_other_weights_fail_and_the_report_says_by_how_much(fake):
    root, _ = fake
    with pytest.raises(AssertionError):
        test_stable_diffusion_1_4_draws_the_published_picture()
    with pytest.raises(AssertionError):
        test_the_vae_of_stable_diffusion_1_4_decodes()
    assert judge("a third", "x", [1.0, 2.0], [1.0005, 2.0], 1e-3)
    report = json.loads((root / "out" / "report.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    checks = report["checks"]
    assert list(checks) == ["picture of SD 1.4", "VAE of SD 1.4", "a third"]
    assert [c["holds"] for c in checks.values()] == [False, False, True]
    first = checks["picture of SD 1.4"]
    assert first["published"] == PICTURE and first["model"] == SD14
    gaps = [abs(a - b) for a, b in zip(first["measured"], PICTURE, strict=True)]
    assert first["worst difference"] == max(gaps) > first["tolerance"] == 3e-3
