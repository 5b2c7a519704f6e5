"""A Look and a film as one HTML page without anything outside it: explain.html."""

import base64
import io
from html import escape
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.files import write_text
from ..training import photos
from . import microscope
from .microscope import Attended, Entry, Frame, Gradient, Look, LowRank, Sample

SIDE = 256  # pixels; larger pictures are reduced
CORNER = 64  # rows and columns of a matrix that are drawn
STYLE = """
:root { --subject: #cc5500; --class: #005ab5; --faint: #6b6b6b; --line: #ddd }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1100px; padding: 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
     padding-top: 1rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
p { margin: .4rem 0; max-width: 46rem }
code { font-size: .85em; background: #f4f4f4; padding: 0 .2em; white-space: nowrap }
sub, sup { line-height: 0 }
.faint { color: var(--faint); font-size: .85rem }
.subject { color: var(--subject) } .class { color: var(--class) }
.equation { font: 1.15rem/2 "DejaVu Serif", Georgia, serif; overflow-wrap: anywhere }
.equation span { white-space: nowrap }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 600; vertical-align: bottom }
th, td { padding: .25rem .7rem .25rem 0; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right } td.n { white-space: nowrap }
td small { color: var(--faint); display: block; min-width: 8rem }
.letter { font-family: "DejaVu Serif", Georgia, serif; white-space: nowrap }
.sample { display: grid; grid-template-columns: repeat(6, 1fr); gap: .5rem;
          border-left: 4px solid; padding-left: .6rem; margin: .8rem 0 }
.sample.subject { border-color: var(--subject) } .sample.class { border-color: var(--class) }
.sample p { grid-column: 1 / -1; margin: 0 }
figure { margin: 0; color: #222; min-width: 0 }
figcaption { font-size: .8rem; line-height: 1.3; margin-top: .2rem; overflow-wrap: anywhere }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: 3px }
.strip { display: flex; gap: .4rem; overflow-x: auto; padding-bottom: .5rem }
.strip figure { flex: 1 0 104px }
.strip img + img { margin-top: .4rem }
.product { max-width: 20rem }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: .5rem;
        max-width: 720px; margin: .5rem 0 }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem;
        align-items: center; max-width: 46rem; font-size: .85rem }
.bars i { display: block; height: .7rem; min-width: 1px; background: #999 }
.bars i.named { background: var(--subject) }
td .bar { display: block; height: .4rem; min-width: 1px }
td .bar.subject { background: var(--subject) } td .bar.class { background: var(--class) }
td.norms { min-width: 9rem; width: 40% }
@media (max-width: 600px) {
  body { padding: .8rem; font-size: 15px }
  .sample { grid-template-columns: repeat(3, 1fr) }
  .sample .latent { order: 1 }
  th, td { padding-right: .45rem }
  .tensors tr, .gradients tr { display: flex; flex-wrap: wrap; gap: 0 .55rem; padding: .3rem 0;
                               border-bottom: 1px solid var(--line) }
  .tensors th, .gradients th { display: none }
  .tensors td, .gradients td { border: 0; padding: 0; text-align: left }
  .tensors td:nth-child(2) { flex: 1 0 calc(100% - 2.7rem) }
  .tensors td small { display: inline; margin-left: .4em }
  .tensors td:last-child::before { content: "norm "; color: var(--faint) }
  .gradients td:first-child { flex: 1 0 55% }
  td.norms { min-width: 5rem; align-self: center }
  [data-of]::before { content: attr(data-of) " "; color: var(--faint) }
  .maps { grid-template-columns: repeat(3, 1fr) }
}
"""
EQUATION = (
    '<p class="equation">E[ <span class="subject">w_t ‖x̂_θ(α_t x + σ_t ε, c) − x‖²</span> + '
    "<span class=\"class\">λ w_t' ‖x̂_θ(α_t' x_pr + σ_t' ε', c_pr) − x_pr‖²</span> ]</p>"
)


def write(path: str | Path, seen: Look, strip: list[Frame], about: dict[str, str]) -> None:
    """Write the page. `about` are the lines of its head, by name: model, prompts, settings."""
    write_text(path, render(seen, strip, about))


def render(seen: Look, strip: list[Frame], about: dict[str, str]) -> str:
    step, weight = seen.step, seen.prior_loss_weight
    loss = f'<b>{step.loss.item():.4f}</b> = <span class="subject">{step.loss_instance.item():.4f}'
    loss += "</span>"
    if seen.prior:
        loss += f' + {weight:g} · <span class="class">{step.loss_prior.item():.4f}</span>'
    head = "".join(f"<br>{escape(k)}: {escape(v)}" for k, v in about.items())
    sections = [
        f"""<h1>One training step under the microscope</h1>
<p class="faint">Nothing is trained here: this is what the first step of a run with this model
computes.{head}</p>
{letters(EQUATION)}
<p>DreamBooth's Eq. 2. <span class="subject">The first term</span> shows the model the subject,
<span class="class">the second</span> pictures that the model drew itself for the class. This step's
loss: {loss}.</p>""",
        f"""<h2>What the two terms look at</h2>
<p>The picture, its latent (four channels, one square each), the latent with noise mixed in, and
what the UNet's prediction makes of that: its estimate x̂ of the clean latent. The more noise, the
less there is left to see, and the more of x̂ is guessed from the prompt.</p>
{samples(seen)}""",
        f"""<h2>From error to loss</h2>
<p>w<sub>t</sub> is what the error of x̂ is multiplied with in Eq. 2. For a network that predicts
noise and is trained by the plain squared error of that, it is α<sub>t</sub>²/σ<sub>t</sub>², the
ratio of signal to noise; for v it is one more. So
<span class="letter">w<sub>t</sub> ‖x̂ − x‖²</span> is the squared error of the prediction, and
steps with much noise do not drown the others.</p>
<div class="wide">{loss_table(seen)}</div>""",
        f"""<h2>Every tensor in the loss</h2>
<div class="wide tensors">{tensor_table(seen.entries)}</div>""",
        f"""<h2>Who looks at the identifier</h2>{attention(seen)}""",
        f"""<h2>What the loss asks of the weights</h2>
<p>The norm of the gradient, block by block: of <span class="subject">the first term</span> and of
<span class="class">λ times the second</span>. A cosine near 0 says that the two terms ask for
unrelated changes, below 0 that what serves the subject costs the class. The prompt enters the UNet
through the keys and values of its cross-attention alone; the last column is their part.</p>
<div class="wide gradients">{gradient_table(seen.gradients, bool(seen.prior))}</div>""",
        f"<h2>What LoRA makes of it</h2>{low_rank(seen.low_rank)}" if seen.low_rank else "",
        f"""<h2>From noise to a picture</h2>
<p>The model as it is draws the instance prompt: above x<sub>t</sub>, decoded although it is still
noisy, below the x̂<sub>0</sub> that the UNet sees in it, with guidance. The last is the picture.</p>
{film(strip)}""",
    ]
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>One training step</title><style>{STYLE}</style></head>
<body>
{"".join(sections)}
</body></html>
"""


# ---- pieces ------------------------------------------------------------------------------------


def letters(text: str) -> str:
    """α_t' x_pr → with the indices set as indices."""
    text = text.replace("_t'", "<sub>t'</sub>")
    for index in ("t", "θ", "pr"):
        text = text.replace(f"_{index}", f"<sub>{index}</sub>")
    return text


def number(x: float, digits: int = 4) -> str:
    return f"{x:.{digits}g}".replace("-", "−").replace("e−0", "e−")


def img(image: Image.Image, alt: str) -> str:
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def picture(pixels: Tensor, alt: str) -> str:
    """(3, H, W) in [0, 1]."""
    return img(photos.to_pil(2 * pixels[None] - 1)[0], alt)


def channels(latent: Tensor, alt: str) -> str:
    """(4, h, w) as four grey squares, 2 × 2: −3 is black, 3 is white."""
    grey = F.pad(latent.detach().float().cpu() / 3, (0, 1, 0, 1), value=1.0)  # a line between
    top, bottom = torch.cat([*grey[:2]], dim=1), torch.cat([*grey[2:]], dim=1)
    square = torch.cat([top, bottom])[:-1, :-1]  # (2h + 1, 2w + 1)
    return img(photos.to_pil(square.expand(1, 3, -1, -1))[0], alt)


def figure(image: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def samples(seen: Look) -> str:
    out = []
    for kind, pr, group in (("subject", "", seen.instance), ("class", "_pr", seen.prior)):
        for i, sample in enumerate(group):
            if sample.pictures is None:
                out.append(f'<p class="faint">… and {len(group) - i} more.</p>')
                break
            out.append(one_sample(sample, kind, letters(f"x{pr}")))
    return "".join(out)


def one_sample(sample: Sample, kind: str, x: str) -> str:
    clean, noisy, estimate = sample.pictures
    share = sample.alpha_bar
    latents = [channels(latent, "as a latent") for latent in sample.latents]
    figures = [
        figure(picture(clean, "the picture"), f"<b>{x}</b>, decoded"),
        figure(latents[0], f"<b>{x}</b>, the latent", "latent"),
        figure(latents[1], "<b>x<sub>t</sub></b>, with noise", "latent"),
        figure(picture(noisy, "with noise, decoded"), "<b>x<sub>t</sub></b>, decoded"),
        figure(latents[2], "<b>x̂</b>, estimated", "latent"),
        figure(picture(estimate, "the estimate"), "<b>x̂</b>, decoded"),
    ]
    return f"""<div class="sample {kind}"><p>t = {sample.t}: {share:.1%} of the variance is picture,
{1 - share:.1%} noise. Loss {sample.loss:.4f}</p>{"".join(figures)}</div>"""


def loss_table(seen: Look) -> str:
    group = [("subject", s) for s in seen.instance] + [("class", s) for s in seen.prior]
    weighted = any(s.weight != 1 for _, s in group)
    heads = ["", "t", "α_t", "σ_t", *["own weight"] * weighted, "w_t", "‖x̂ − x‖²"]
    rows = []
    for kind, s in group:
        numbers = [s.t, s.alpha_bar**0.5, (1 - s.alpha_bar) ** 0.5, *[s.weight] * weighted]
        numbers += [s.w_t, s.x_error, s.loss]
        cells = "".join(f'<td class="n">{number(x, 3)}</td>' for x in numbers)
        rows.append(f'<tr><td class="{kind}">{kind}</td>{cells}</tr>')
    return table([letters(head) for head in [*heads, "w_t ‖x̂ − x‖²"]], rows, plain=1)


def table(heads: list[str], rows: list[str], plain: int) -> str:
    """The first `plain` columns hold text, the rest numbers."""
    cells = "".join(
        f"<th{' class=n' if i >= plain else ''}>{head}</th>" for i, head in enumerate(heads)
    )
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def tensor_table(entries: list[Entry]) -> str:
    rows = []
    for e in entries:
        x = e.tensor.detach().float()
        shape = " × ".join(map(str, e.tensor.shape))
        rows.append(
            f'<tr><td class="letter">{letters(e.letter)}</td><td><code>{escape(e.name)}</code>'
            f"<small>{escape(e.about)}</small></td>"
            f'<td class="n">{shape}<small>{str(e.tensor.dtype).removeprefix("torch.")}</small></td>'
            f'<td class="n">{number(x.min().item())} … {number(x.max().item())}</td>'
            f'<td class="n">{number(x.norm().item())}</td></tr>'
        )
    return table(["in Eq. 2", "in the code", "shape, dtype", "range", "norm"], rows, plain=2)


def attention(seen: Look) -> str:
    a: Attended = seen.attended
    named = " ".join(a.tokens[i] for i in a.identifier)
    bars = "".join(
        f"<span>{escape(token)}</span>"
        f'<i class="{"named" if i in a.identifier else ""}" style="width:{share:.2%}"></i>'
        f"<span>{share:.1%}</span>"
        for i, (token, share) in enumerate(zip(a.tokens, a.share, strict=True))
    )
    text = f"""<p>In every cross-attention each pixel of the feature map divides its attention,
which sums to 1, among the 77 tokens of the prompt. Mean over layers, heads, pixels and the
subject's samples:</p><div class="bars">{bars}</div>"""
    if not a.identifier:
        return text + "<p>No word of the prompt names the subject, so there is no map of it.</p>"
    text += f"""<p>Where <b class="subject">{escape(named)}</b> is attended, mean over heads: light
is much, dark is little, each map over its own largest value. To a model that was not trained on it
the word means nothing in particular; compare with one that was.</p>"""
    for i, sample in enumerate(seen.instance[: microscope.SHOWN]):
        clean = sample.pictures[0]
        size = clean.shape[-2:]
        over = [microscope.over_picture(m[i : i + 1], *size) for m in a.maps.values()]
        whole = torch.stack(over).mean(dim=0)
        whole = whole / whole.max()
        lit = clean * (0.15 + 0.85 * whole)
        figures = [figure(picture(lit, "attention"), "all sizes")]
        for side, m in a.maps.items():
            grey = m[i].float() / m[i].max().clamp(min=1e-12)
            top = m[i].max().item()
            image = picture(grey.expand(3, -1, -1), f"map of {side}²")
            figures.append(figure(image, f"{side}²: up to {top:.1%}"))
        text += f'<h3>t = {sample.t}</h3><div class="maps">{"".join(figures)}</div>'
    return text


def gradient_table(gradients: list[Gradient], prior: bool) -> str:
    most = max(max(g.instance, g.prior) for g in gradients) or 1.0

    def bar(kind: str, x: float) -> str:
        return f'<span class="bar {kind}" style="width:{min(x / most, 1):.2%}"></span>'

    heads = ["first term", *["λ second", "cosine"] * prior, "both", "of the text"]
    rows = []
    for g in gradients:
        bars = bar("subject", g.instance) + (bar("class", g.prior) if prior else "")
        numbers = [number(g.instance)]
        if prior:
            numbers += [number(g.prior), f"{g.cosine:.2f}".replace("-", "−")]
        numbers += [number(g.both), number(g.reads_text) if g.reads_text else "–"]
        cells = "".join(
            f'<td class="n" data-of="{head}">{x}</td>'
            for head, x in zip(heads, numbers, strict=True)
        )
        rows.append(
            f"<tr><td>{escape(g.block)}<small>{g.weights:,} weights</small></td>"
            f'<td class="norms">{bars}</td>{cells}</tr>'
        )
    heads[-1] = "to<sub>k</sub>, to<sub>v</sub> of the text"
    return table(["block", "", *heads], rows, plain=2)


def low_rank(seen: LowRank) -> str:
    (r, c_in), c_out = seen.A.shape, len(seen.dB)
    of_A, of_B = (number(d.norm().item()) for d in (seen.dA, seen.dB))
    largest = seen.spectrum[0] or 1.0
    values = ", ".join(f"{s / largest:.1%}" for s in seen.spectrum[:r])
    rest = number(max(seen.spectrum[r:], default=0.0) / largest, 1)
    caption = f"The first {CORNER} rows and columns, each of the three over its own largest value."
    return f"""<p>W stays. In {seen.layers} layers, which compute W x + (α/r) B A x with r = {r}, A
and B are trained, and the norms above are theirs. Most is asked of
<code>{escape(seen.layer)}</code>: its W has {c_out * c_in:,} numbers, A and B have
{r * (c_out + c_in):,}.</p>
<p>B is zero before the first step. So ∂L/∂A is, too (its norm is {of_A}), and ∂L/∂B is not
({of_B}). A step of gradient descent changes ΔW = (α/r) B A by −η (α/r) ∂L/∂B A: a product of ∂L/∂B,
on the left here, and A, above. However large W is, its rank is {r}: the singular values, over the
largest, are {values}; the next is {rest}.</p>
{figure(product(seen), caption, "product")}"""


def product(seen: LowRank) -> str:
    """A above, ∂L/∂B on the left, between them the update: black is negative, white positive."""

    def scaled(x: Tensor) -> Tensor:
        x = x[:CORNER, :CORNER]
        return x / x.abs().max().clamp(min=1e-30)

    A, dB, update = scaled(seen.A), scaled(seen.dB), scaled(seen.update)
    r = len(A)
    whole = torch.ones(r + 1 + len(update), r + 1 + update.shape[1])  # a white line between
    whole[:r, r + 1 :], whole[r + 1 :, :r], whole[r + 1 :, r + 1 :] = A, dB, update
    return img(photos.to_pil(whole.expand(1, 3, -1, -1))[0], "the update is a product")


def film(strip: list[Frame]) -> str:
    out = []
    for frame in strip:
        caption = "<b>x<sub>0</sub></b>" if frame.t is None else f"t = {frame.t}"
        below = "" if frame.x0 is None else picture(frame.x0, "estimate")
        out.append(figure(picture(frame.x_t, "x_t") + below, caption))
    return f'<div class="strip">{"".join(out)}</div>'
