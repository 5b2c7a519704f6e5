"""One training step under the microscope: what explain.html shows, as tensors and numbers.

The step is dreambooth.step itself; the rest is looked at from outside. Hooks compute the text's
attention again from what goes into its layers, and autograd is asked for the gradient of each term
of Eq. 2 on its own.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dreambooth, schedule
from ..device import graphs, memory
from ..dreambooth import Half, Step, Term
from ..pipeline import StableDiffusion
from ..schedule import Schedule
from ..text_encoder import Condition
from ..tokenizer import Tokenizer
from ..unet import Attention, UNet

SHOWN = 4  # samples of each term whose pictures are kept
FRAMES = 9  # of the film of a sampling
SIDE = 256  # pixels; larger pictures are reduced
BLOCK = re.compile(
    r"unet\.(?:(?:\w+_blocks|pairs)\.\d+|\w+)|text_encoder(?:_2)?\.(?:encoder\.layers\.\d+|\w+)"
)
READS_TEXT = re.compile(r"\.attn2\.to_[kv]\.")  # the UNet's only weights that the prompt enters


@dataclass(frozen=True)
class Entry:
    """A tensor of the loss."""

    letter: str  # in Eq. 2
    name: str  # in dreambooth.py
    about: str
    tensor: Tensor


@dataclass(frozen=True)
class Sample:
    """One sample's way through the loss. Its pictures are missing beyond the first SHOWN."""

    t: int
    alpha_bar: float
    weight: float  # what the loss was multiplied with: 1, or Min-SNR's
    w_t: float  # of Eq. 2: the plain loss's, times `weight`
    x_error: float  # mean of (x̂ − x)²
    loss: float  # per_sample: w_t · x_error
    latents: tuple[Tensor, Tensor, Tensor]  # x, x_t and x̂, each (4, h, w) scaled
    pictures: Tensor | None  # (3, 3, H, W) in [0, 1]: the three decoded, reduced


@dataclass(frozen=True)
class Gradient:
    """Of the weights of one block, by term of Eq. 2."""

    block: str
    weights: int
    instance: float  # norm of the first term's gradient
    prior: float  # of the second's, times λ
    both: float  # of their sum, which the optimizer gets
    cosine: float  # between the two; below 0 they pull apart
    reads_text: float  # norm of the part of `both` in the attention's keys and values of the text


@dataclass(frozen=True)
class LowRank:
    """Of the layer with an adapter that the loss asks to change most."""

    layer: str
    layers: int  # that have an adapter which trains
    A: Tensor  # (r, c_in)
    dA: Tensor  # ∂L/∂A, (r, c_in): zero as long as B is
    dB: Tensor  # ∂L/∂B, (c_out, r)
    update: Tensor  # (c_out, c_in): of ΔW, by gradient descent at a rate of 1, to first order
    spectrum: list[float]  # the singular values of `update`, the largest first


@dataclass(frozen=True)
class Attended:
    """Cross-attention of the first SHOWN samples of the subject, mean over the heads."""

    tokens: list[str]  # of the instance prompt; the last stands for all the padding
    share: list[float]  # of the attention that each gets, mean over layers and pixels; sum 1
    identifier: list[int]  # where in `tokens` the word stands that names the subject
    maps: dict[int, Tensor]  # side of a feature map → (n, side, side): what the identifier gets


@dataclass(frozen=True)
class Frame:
    """A moment of a sampling: x_t and the x̂0 seen in it, each (3, H, W) in [0, 1], reduced."""

    t: int | None  # None at the end
    x_t: Tensor
    x0: Tensor | None


@dataclass(frozen=True)
class Look:
    """All that is seen of a step."""

    step: Step  # without its gradient
    prior_loss_weight: float  # λ
    entries: list[Entry]
    instance: list[Sample]
    prior: list[Sample]  # empty without prior preservation
    gradients: list[Gradient]
    attended: Attended
    low_rank: LowRank | None  # where adapters are trained


def look(
    sd: StableDiffusion,
    instance: Term,
    prior: Term | None,
    prior_loss_weight: float,
    weight: Tensor | None,
    parameters: dict[str, nn.Parameter],
    prompt: str,
    identifier: str | None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    scale: Tensor | float = 1.0,
    alike: int | None = None,
    adapters: dict[str, nn.ModuleDict] | None = None,
) -> Look:
    """Do a step's forward and backward pass and keep what there is to see. Nothing is updated.

    The four arguments after `sd` are as in dreambooth.step. `parameters` are those that
    train, by the names "unet.…" and "text_encoder.…"; `prompt` is the one that instance.c encodes,
    at least for the first `alike` samples, `identifier` its word for the subject. The loss is
    multiplied by `scale` for the backward pass.
    `adapters` are those of each network whose weights the parameters are, if they are a LoRA's.
    """
    with autocast(), cross_attention(sd.unet) as attention:
        step = dreambooth.step(sd.unet, sd.schedule, instance, prior, prior_loss_weight, weight)
    if prior_loss_weight == 0:
        prior = None
    # Before the pictures: then what the backward pass needs is not kept beside the VAE's work.
    whole: dict[str, Tensor] = {}

    def keep(name: str, gradient: Tensor) -> None:
        if adapters:  # they are small
            whole[name] = gradient.cpu()

    by_block = gradients(step, prior_loss_weight, parameters, scale, keep)
    step = replace(step, **{k: x.detach() for k, x in vars(step).items() if torch.is_tensor(x)})
    first = slice(None, step.n_instance)
    weight = torch.ones_like(step.per_sample) if weight is None else weight
    rest = slice(step.n_instance, None)
    terms = [("", instance, step.instance, weight[first])]
    if prior is not None:
        terms.append(("'", prior, step.prior, weight[rest]))
    samples = [of_term(sd, term, half, w) for _, term, half, w in terms]
    # On the CPU, where those of another look are that are read from a file.
    entries = [
        replace(e, tensor=e.tensor.cpu())
        for mark, term, half, w in terms
        for e in tensors(sd, mark, term, half, w)
    ]
    return Look(
        step=step,
        prior_loss_weight=prior_loss_weight,
        entries=entries,
        instance=samples[0],
        prior=samples[1] if prior is not None else [],
        gradients=by_block,
        attended=attended(sd.tokenizer, attention, prompt, identifier, alike or step.n_instance),
        low_rank=low_rank(adapters, whole) if adapters else None,
    )


# ---- the loss ----------------------------------------------------------------------------------


def estimate(noise: Schedule, half: Half, t: Tensor) -> Tensor:
    """x̂, (B, 4, h, w): the clean latent that the UNet's prediction stands for."""
    return schedule.split(half.x_t, half.prediction, noise.alpha_bar[t], noise.prediction_type)[0]


@torch.no_grad()
def tensors(sd: StableDiffusion, mark: str, term: Term, half: Half, weight: Tensor) -> list[Entry]:
    """One term's tensors in the order in which they come about; `mark` is the prime of Eq. 2."""
    alpha_bar = sd.schedule.alpha_bar[term.t]
    says = "v" if sd.schedule.prediction_type == "v_prediction" else "ε"
    pr, of = ("_pr", "prior") if mark else ("", "instance")
    what = "class images" if mark else "photographs"
    w_t = weight * dreambooth.plain_weight(sd.schedule, term.t)
    return [
        Entry(f"x{pr}", f"{of}.x0", f"the {what} as latents, scaled", term.x0),
        Entry(f"ε{mark}", f"{of}.eps", "Gaussian noise", term.eps),
        Entry(f"t{mark}", f"{of}.t", "how much of it: 0 little, 999 almost only noise", term.t),
        *encoded(term.c, f"c{pr}", f"{of}.c"),
        Entry(f"α_t{mark}", "alpha_bar_t.sqrt()", "share of the latent", alpha_bar.sqrt()),
        Entry(f"σ_t{mark}", "(1 - alpha_bar_t).sqrt()", "share of noise", (1 - alpha_bar).sqrt()),
        Entry(f"α_t{mark} x{pr} + σ_t{mark} ε{mark}", f"{of}.x_t", "what the UNet sees", half.x_t),
        Entry(f"{says}̂_θ", f"{of}.prediction", "what it says", half.prediction),
        Entry(f"{says}{mark}", f"{of}.target", "what it should say", half.target),
        Entry(
            "x̂_θ", "schedule.split", "its answer as a latent", estimate(sd.schedule, half, term.t)
        ),
        Entry(f"w_t{mark}", "dreambooth.plain_weight", "times the sample's own weight", w_t),
        Entry(
            f"w_t{mark} ‖x̂_θ − x{pr}‖²",
            f"{of}.per_sample",
            "the error, mean over a latent",
            half.per_sample,
        ),
    ]


def encoded(c: Tensor | Condition, letter: str, name: str) -> list[Entry]:
    if isinstance(c, Tensor) or c.pooled is None:
        context = c if isinstance(c, Tensor) else c.context
        return [Entry(letter, name, "the encoded prompt", context.detach())]
    return [
        Entry(letter, f"{name}.context", "the encoded prompt", c.context.detach()),
        Entry(letter, f"{name}.pooled", "as one vector", c.pooled.detach()),
        Entry(letter, f"{name}.sizes", "of picture, crop's corner, crop", c.sizes),
    ]


@torch.no_grad()
def of_term(sd: StableDiffusion, term: Term, half: Half, weight: Tensor) -> list[Sample]:
    x0_hat = estimate(sd.schedule, half, term.t)
    x_error = (x0_hat - term.x0).square().mean(dim=(1, 2, 3))  # (B,)
    w_t = weight * dreambooth.plain_weight(sd.schedule, term.t)
    out = []
    for i, t in enumerate(term.t.tolist()):
        latents = term.x0[i].float(), half.x_t[i], x0_hat[i]
        out.append(
            Sample(
                t=t,
                alpha_bar=sd.schedule.alpha_bar[t].item(),
                weight=weight[i].item(),
                w_t=w_t[i].item(),
                x_error=x_error[i].item(),
                loss=half.per_sample[i].item(),
                latents=latents,
                pictures=reduced(sd.decode(torch.stack(latents))) if i < SHOWN else None,
            )
        )
    return out


def reduced(pictures: Tensor) -> Tensor:
    """(N, 3, H, W), on the CPU, of SIDE pixels at most."""
    scale = SIDE / max(pictures.shape[-2:])
    if scale < 1:
        pictures = F.interpolate(pictures, scale_factor=scale, mode="bilinear", antialias=True)
    return pictures.cpu()


# ---- gradients ---------------------------------------------------------------------------------


def gradients(
    step: Step,
    prior_loss_weight: float,
    parameters: dict[str, nn.Parameter],
    scale: Tensor | float = 1.0,
    on_sum: Callable[[str, Tensor], None] = lambda name, gradient: None,
) -> list[Gradient]:
    """The norms of the gradients by block, in the order of `parameters`.

    One gradient at a time is on the device. The first term's wait on the CPU for the second's.
    `on_sum` is called with the gradient of both terms for each weight.
    """
    both_terms, waiting = step.loss_prior.requires_grad, {}
    measured: dict[str, Tensor] = {}  # squared norms: instance, prior, both, text; the dot product

    def measure(name: str, a: Tensor, b: Tensor) -> None:
        a, b = a.float() / scale, b.float() / scale
        on_sum(name, a + b)
        both = (a + b).square().sum()
        text = both if READS_TEXT.search(name) else torch.zeros_like(both)
        measured[name] = torch.stack(
            [a.square().sum(), b.square().sum(), both, text, (a * b).sum()]
        )

    def first(name: str, a: Tensor) -> None:
        if both_terms:
            waiting[name] = put_aside(a)
        else:
            measure(name, a, torch.zeros_like(a))

    def second(name: str, b: Tensor) -> None:
        measure(name, waiting.pop(name).to(b.device), b)

    with memory.each_gradient(parameters, first):
        (step.loss_instance * scale).backward(retain_graph=both_terms)
    if both_terms:
        with memory.each_gradient(parameters, second):
            (prior_loss_weight * step.loss_prior * scale).backward()
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for name, p in parameters.items():
        block = BLOCK.match(name).group()
        sums[block] = sums.get(block, 0) + measured[name]
        counts[block] = counts.get(block, 0) + p.numel()
    out = []
    for block, total in sums.items():
        instance, prior, both, text = total[:4].sqrt().tolist()
        cosine = total[4].item() / (instance * prior) if instance and prior else 0.0
        out.append(Gradient(block, counts[block], instance, prior, both, cosine, text))
    return out


def put_aside(gradient: Tensor) -> Tensor:
    return gradient.cpu()


def of_all(blocks: list[Gradient]) -> Gradient:
    """Of the weights of all blocks together."""

    def norm(of: Callable[[Gradient], float]) -> float:
        return sum(of(g) ** 2 for g in blocks) ** 0.5

    instance, prior = norm(lambda g: g.instance), norm(lambda g: g.prior)
    dot = sum(g.cosine * g.instance * g.prior for g in blocks)
    return Gradient(
        block="all",
        weights=sum(g.weights for g in blocks),
        instance=instance,
        prior=prior,
        both=norm(lambda g: g.both),
        cosine=dot / (instance * prior) if instance and prior else 0.0,
        reads_text=norm(lambda g: g.reads_text),
    )


@torch.no_grad()
def low_rank(adapters: dict[str, nn.ModuleDict], gradients: dict[str, Tensor]) -> LowRank:
    """`gradients` of A and B, by the names of `parameters` in look."""
    each = {f"{name}.{a.layer}": a for name, of_it in adapters.items() for a in of_it.values()}
    each = {name: a for name, a in each.items() if f"{name}.B" in gradients}
    layer = max(each, key=lambda name: gradients[f"{name}.B"].norm().item())
    a, dA, dB = each[layer], gradients[f"{layer}.A"], gradients[f"{layer}.B"]
    A, B = a.A.cpu(), a.B.cpu()
    update = -a.scale * (dB @ A + B @ dA)  # of ΔW = scale · B A, to first order
    return LowRank(layer, len(each), A, dA, dB, update, torch.linalg.svdvals(update).tolist())


# ---- attention ---------------------------------------------------------------------------------


@torch.no_grad()
def attention_weights(layer: Attention, x: Tensor, context: Tensor) -> Tensor:
    """softmax(QKᵀ/√d) of a layer for its inputs (B, N, C) and (B, M, D): (B, heads, N, M) fp32."""
    q, k = (
        y.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()  # (B, heads, N, d)
        for y in (layer.to_q(x), layer.to_k(context))
    )
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)


@contextmanager
def cross_attention(unet: UNet) -> Iterator[dict[str, Tensor]]:
    """While it is open, each pass of the UNet leaves (B, N, 77) here for every layer that reads
    the text: what each of N pixels takes from each token, mean over the heads."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, layer: Attention):
        def record(_, inputs: tuple[Tensor, Tensor]) -> None:
            seen[name] = attention_weights(layer, *inputs).mean(dim=1)

        return layer.register_forward_pre_hook(record)

    layers = [(name, layer) for name, layer in unet.named_modules() if name.endswith(".attn2")]
    handles = [watch(name, layer) for name, layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def find(word: Sequence, text: Sequence) -> list[int]:
    """The indices at which `word` first stands in `text`; none if it does not."""
    for i in range(len(text) - len(word) + 1):
        if text[i : i + len(word)] == word:
            return list(range(i, i + len(word)))
    return []


def attended(
    tokenizer: Tokenizer,
    attention: dict[str, Tensor],
    prompt: str,
    identifier: str | None,
    n_instance: int,
) -> Attended:
    """`attention` as cross_attention gives it, of a batch whose first samples have `prompt`."""
    pieces = tokenizer.pieces(prompt)[: tokenizer.max_length - 2]
    place = find(tokenizer.pieces(identifier), pieces) if identifier else []
    place = [1 + i for i in place]  # behind the start token
    tokens = ["start", *(piece.removesuffix("</w>") for piece, _ in pieces), "end", "padding"]
    maps: dict[int, list[Tensor]] = {}
    for weights in attention.values():
        side = round(weights.shape[1] ** 0.5)  # training pictures are square
        some = weights[: min(n_instance, SHOWN), :, place].sum(dim=-1)  # (n, N)
        maps.setdefault(side, []).append(some.unflatten(1, (side, side)))
    mean = torch.stack([w[:n_instance].mean(dim=(0, 1)) for w in attention.values()]).mean(dim=0)
    last = len(tokens) - 1
    share = [*mean[:last].tolist(), mean[last:].sum().item()]
    found = {side: torch.stack(layers).mean(dim=0).cpu() for side, layers in maps.items()}
    return Attended(tokens, share, place, dict(sorted(found.items(), reverse=True)))


def over_picture(maps: Tensor, height: int, width: int) -> Tensor:
    """(n, side, side) → (n, height, width), each map over its largest value."""
    large = F.interpolate(maps[:, None], size=(height, width), mode="bilinear")[:, 0]
    return large / large.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)


# ---- sampling ----------------------------------------------------------------------------------


@torch.no_grad()
def film(
    sd: StableDiffusion,
    prompt: str,
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    resolution: int,
    captured: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> list[Frame]:
    """FRAMES moments on the way of sd.generate([prompt], …) from noise to a picture, by DDIM;
    `captured` by a CUDA graph, on a GPU."""
    shape = sd.latent_shape(1, resolution, resolution, None)  # (4, h, w)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None].to(sd.device)
    c = sd.encode_guided([prompt], "", guidance_scale).whole(resolution, resolution)
    visited = schedule.trajectory(sd.schedule, steps, "ddim")
    shown = {round(i * (steps - 1) / (FRAMES - 2)) for i in range(FRAMES - 1)}
    kept = []  # decoded in the end, when what the graph works in is free again
    with graphs.captured_unet(sd.unet, wanted=captured):
        for i, (t, t_prev) in enumerate(visited):
            prediction = sd.predict(x, t, c, guidance_scale)
            if i in shown:
                kind = sd.schedule.prediction_type
                x0, _ = schedule.split(x, prediction, sd.schedule.alpha_bar[t], kind)
                kept.append((t, torch.cat([x, x0])))
            x = schedule.ddim_step(x, prediction, t, t_prev, sd.schedule)
            on_step()
    frames = [Frame(t, *reduced(sd.decode(both))) for t, both in kept]
    return [*frames, Frame(None, reduced(sd.decode(x))[0], None)]
