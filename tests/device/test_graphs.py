"""Speed and memory change how a result comes about, not the result."""

import pytest
import runs
import torch

from minibooth import UserError, pipeline, train
from minibooth.common import cli
from minibooth.device import graphs, memory

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def trained(folder, on_step=None, **changes):
    sd = runs.model()
    train.train(runs.config(folder, **changes), sd, on_step)
    return runs.flat(sd.unet.state_dict()), (folder / "loss.csv").read_text(), sd


# ---- gradient checkpointing --------------------------------------------------------------------


def test_gradient_checkpointing_leaves_nothing_behind(tmp_path):
    plain, losses, _ = trained(tmp_path / "plain")
    again, same, sd = trained(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert torch.equal(plain, again) and losses == same
    assert not any("forward" in vars(module) for module in sd.unet.modules())


def test_gradient_checkpointing_is_undone_where_the_step_fails():
    unet = runs.model().unet
    with pytest.raises(ZeroDivisionError), memory.checkpoint_gradients(unet):
        assert any("forward" in vars(module) for module in unet.modules())
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in unet.modules())


# ---- the optimizer in the backward pass --------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "lr_warmup_steps": 3}])
def test_the_update_in_the_backward_pass_is_the_plain_one_without_clipping(changes, tmp_path):
    settings = {"max_train_steps": 4, "train_batch_size": 2, **changes}
    plain, losses, _ = trained(tmp_path / "plain", max_grad_norm=1e9, **settings)
    fused, same, _ = trained(tmp_path / "fused", optimizer_in_backward=True, **settings)
    assert torch.equal(plain, fused)
    for a, b in zip(losses.split()[1:], same.split()[1:], strict=True):
        one, other = ([float(x) for x in line.split(",")] for line in (a, b))
        assert one == pytest.approx(other, rel=1e-5)  # the norm is summed in another order


def test_gradients_are_never_all_alive(tmp_path):
    alive = []

    def look(step, result):
        alive.extend(p.grad is not None for p in sd.unet.parameters())

    sd = runs.model()
    train.train(runs.config(tmp_path / "out", optimizer_in_backward=True), sd, look)
    assert alive and not any(alive)
    sd.unet.conv_out.weight.square().sum().backward()  # the returned model updates nothing itself
    assert sd.unet.conv_out.weight.grad is not None


def test_the_update_in_the_backward_pass_goes_on_from_its_state(tmp_path):
    options = {"optimizer_in_backward": True, "gradient_checkpointing": True}
    whole, losses, _ = trained(tmp_path / "whole", max_train_steps=4, **options)
    trained(tmp_path / "out", max_train_steps=2, **options)
    options["resume_from_checkpoint"] = "latest"
    resumed, same, _ = trained(tmp_path / "out", max_train_steps=4, **options)
    assert torch.equal(whole, resumed) and losses == same


def test_a_gradient_that_is_not_finite_stops_the_update_in_the_backward_pass(tmp_path):
    sd = runs.model()

    def spoil(step, result):
        if step == 1:
            sd.unet.conv_in.weight.register_hook(lambda g: g * float("nan"))

    config = runs.config(tmp_path / "out", optimizer_in_backward=True)
    with pytest.raises(UserError, match=r"step 2: the gradient of unet\.conv_in\.weight"):
        train.train(config, sd, spoil)
    assert all(p.isfinite().all() for p in sd.unet.parameters())


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps"),
        ({"mixed_precision": "fp16"}, "--mixed_precision bf16"),
    ],
)
def test_what_cannot_go_with_the_update_in_the_backward_pass_is_refused(changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        trained(tmp_path / "out", optimizer_in_backward=True, **changes)
    assert not (tmp_path / "out").exists()


# ---- captured steps ----------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_captured_and_eager_training_agree_on_a_gpu(precision, tmp_path):
    settings = {"max_train_steps": 20, "mixed_precision": precision, "device": "cuda"}
    settings["learning_rate"] = 1e-5
    start = runs.flat(runs.model().unet.state_dict()).cuda()
    eager, _, _ = trained(tmp_path / "eager", on_step=lambda *_: None, **settings)
    captured, _, _ = trained(tmp_path / "captured", **settings)
    moved = (eager - start).norm()
    assert (eager - captured).norm() < (1e-3 if precision == "no" else 2e-2) * moved


@needs_cuda
def test_captured_and_eager_sampling_agree_on_a_gpu():
    sd = runs.model().to("cuda")
    settings = {"steps": 8, "seed": 3, "height": 32, "width": 32, "output": "latent"}
    eager = sd.generate(["a dog"] * 2, **settings)
    with graphs.captured_unet(sd.unet):
        first = sd.generate(["a dog"] * 2, **settings)
        other = sd.generate(["a cat"] * 2, **settings)
    torch.testing.assert_close(first, eager, rtol=1e-3, atol=1e-4)
    assert (other - eager).norm() > 0.01 * eager.norm()


# ---- sampling ----------------------------------------------------------------------------------


class Counting(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_the_text_is_projected_once_for_every_batch():
    sd = runs.model()
    attention = sd.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k.__class__ = Counting
    settings = {"steps": 5, "batch_size": 2, "height": 32, "width": 32, "output": "latent"}
    drawn = sd.generate(["a dog", "a cat", "a sks dog"], **settings)
    assert attention.to_k.calls == 2
    assert not any("forward" in vars(module) for module in sd.unet.modules())
    one = sd.generate(["a sks dog"], **settings, seed=2)
    torch.testing.assert_close(drawn[2:], one, rtol=1e-4, atol=1e-4)


def test_several_pictures_at_once_through_the_vae_are_the_same_pictures(monkeypatch):
    sd, seen = runs.model(), []
    decode = sd.vae.decode
    monkeypatch.setattr(sd.vae, "decode", lambda z: seen.append(len(z)) or decode(z))
    latents = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    side = 8 * sd.vae.factor
    pictures = []
    for pixels in (1, 2 * side * side, 10**9):
        monkeypatch.setattr(pipeline, "VAE_PIXELS", pixels)
        pictures.append(sd.decode(latents))
    assert seen == [1] * 5 + [2, 2, 1] + [5]
    for other in pictures[1:]:
        torch.testing.assert_close(other, pictures[0], rtol=1e-4, atol=1e-5)


def test_kept_memory_does_no_harm():
    cli.keep_freed_memory()
    assert torch.ones(10**7).sum() == 10**7
