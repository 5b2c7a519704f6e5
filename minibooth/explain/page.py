"""One view of a step, or two of the same, as an HTML page without anything outside it."""

import base64
import io
from html import escape
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.files import write_text
from ..common.pictures import to_pil
from . import microscope
from .microscope import Entry, Frame, Gradient, Look, LowRank, Sample

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
.sample.two { grid-template-columns: repeat(8, 1fr) }
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
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 2rem }
.pair .maps { grid-template-columns: repeat(auto-fill, minmax(90px, 1fr)) }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem;
        align-items: center; max-width: 46rem; font-size: .85rem }
.bars i { display: block; height: .7rem; min-width: 1px; background: #999 }
.bars i.named { background: var(--subject) }
.bars i.before { opacity: .45 }
td .bar { display: block; height: .4rem; min-width: 1px }
td .bar.subject { background: var(--subject) } td .bar.class { background: var(--class) }
td.norms { min-width: 9rem; width: 40% }
.when td { border-bottom: 0; padding-bottom: 0 }
@media (max-width: 600px) {
  body { padding: .8rem; font-size: 15px }
  .sample { grid-template-columns: repeat(3, 1fr) }
  .sample.two { grid-template-columns: repeat(4, 1fr) }
  .sample .latent { order: 1 }
  th, td { padding-right: .45rem }
  .tensors tr, .gradients tr { display: flex; flex-wrap: wrap; gap: 0 .55rem; padding: .3rem 0;
                               border-bottom: 1px solid var(--line) }
  .tensors th, .gradients th { display: none }
  .tensors td, .gradients td { border: 0; padding: 0; text-align: left }
  .tensors td:nth-child(2) { flex: 1 0 calc(100% - 2.7rem) }
  .tensors td small { display: inline; margin-left: .4em }
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


class View(NamedTuple):
    """A step as it was seen once."""

    when: str  # "before"; empty where there is but one
    seen: Look
    strip: list[Frame]  # the model's way from noise to a picture


def write(path: str | Path, views: list[View], about: dict[str, str]) -> None:
    """Write the page. `about` are the lines of its head, by name: model, prompts, settings. Two
    views are of the same pictures, noises and timesteps."""
    write_text(path, render(views, about))


def render(views: list[View], about: dict[str, str]) -> str:
    adapted = views[0].seen.low_rank
    head = "".join(f"<br>{escape(k)}: {escape(v)}" for k, v in about.items())
    what = "Nothing is trained here: this is what the first step of a run with this model computes."
    if len(views) == 2:
        what = f"""The first step of a run as the model computes it {views[0].when} training and
{views[1].when}: with the same pictures, noises and timesteps, so that only the weights differ."""
    sections = [
        f"""<h1>One training step under the microscope</h1>
<p class="faint">{what}{head}</p>
{letters(EQUATION)}
<p>DreamBooth's Eq. 2. <span class="subject">The first term</span> shows the model the subject,
<span class="class">the second</span> pictures that the model drew itself for the class. This step's
{"; ".join(loss(view) for view in views)}.</p>""",
        f"""<h2>What the two terms look at</h2>
<p>The picture, its latent (four channels, one square each), the latent with noise mixed in, and
what the UNet's prediction makes of that: its estimate x̂ of the clean latent. The more noise, the
less there is left to see, and the more of x̂ is guessed from the prompt.</p>
{samples(views)}""",
        f"""<h2>From error to loss</h2>
<p>w<sub>t</sub> is what the error of x̂ is multiplied with in Eq. 2. For a network that predicts
noise and is trained by the plain squared error of that, it is α<sub>t</sub>²/σ<sub>t</sub>², the
ratio of signal to noise; for v it is one more. So
<span class="letter">w<sub>t</sub> ‖x̂ − x‖²</span> is the squared error of the prediction, and
steps with much noise do not drown the others.</p>
<div class="wide">{loss_table(views)}</div>""",
        f"""<h2>Every tensor in the loss</h2>
<div class="wide tensors">{tensor_table(views)}</div>""",
        f"""<h2>Who looks at the identifier</h2>{attention(views)}""",
        f"""<h2>What the loss asks of the weights</h2>
<p>The norm of the gradient, block by block: of <span class="subject">the first term</span> and of
<span class="class">λ times the second</span>. A cosine near 0 says that the two terms ask for
unrelated changes, below 0 that what serves the subject costs the class. The prompt enters the UNet
through the keys and values of its cross-attention alone; the last column is their part.</p>
<div class="wide gradients">{gradient_table(views)}</div>""",
        f"<h2>What LoRA makes of it</h2>{low_rank(adapted)}" if adapted else "",
        f"""<h2>From noise to a picture</h2>
<p>The model draws the instance prompt: above x<sub>t</sub>, decoded although it is still noisy,
below the x̂<sub>0</sub> that the UNet sees in it, with guidance. The last is the picture.</p>
{"".join(title(view) + film(view.strip) for view in views)}""",
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


def title(view: View) -> str:
    return f"<h3>{view.when}</h3>" if view.when else ""


def loss(view: View) -> str:
    step, weight = view.seen.step, view.seen.prior_loss_weight
    text = f"loss{view.when and ' ' + view.when}: <b>{step.loss.item():.4f}</b> = "
    text += f'<span class="subject">{step.loss_instance.item():.4f}</span>'
    if view.seen.prior:
        text += f' + {weight:g} · <span class="class">{step.loss_prior.item():.4f}</span>'
    return text


def img(image: Image.Image, alt: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def picture(pixels: Tensor, alt: str) -> str:
    """(3, H, W) in [0, 1]."""
    return img(to_pil(2 * pixels[None] - 1)[0], alt)


def channels(latent: Tensor, alt: str) -> str:
    """(4, h, w) as four grey squares, 2 × 2: −3 is black, 3 is white."""
    grey = F.pad(latent.detach().float().cpu() / 3, (0, 1, 0, 1), value=1.0)  # a line between
    top, bottom = torch.cat([*grey[:2]], dim=1), torch.cat([*grey[2:]], dim=1)
    square = torch.cat([top, bottom])[:-1, :-1]  # (2h + 1, 2w + 1)
    return img(to_pil(square.expand(1, 3, -1, -1))[0], alt)


def figure(image: str, caption: str, kind: str = "") -> str:
    return f'<figure class="{kind}">{image}<figcaption>{caption}</figcaption></figure>'


def samples(views: list[View]) -> str:
    out = []
    for kind, pr in (("subject", ""), ("class", "_pr")):
        groups = [v.seen.prior if pr else v.seen.instance for v in views]
        for i, of_views in enumerate(zip(*groups, strict=True)):
            if of_views[0].pictures is None:
                out.append(f'<p class="faint">… and {len(groups[0]) - i} more.</p>')
                break
            out.append(one_sample(views, of_views, kind, letters(f"x{pr}")))
    return "".join(out)


def one_sample(views: list[View], of_views: tuple[Sample, ...], kind: str, x: str) -> str:
    sample, share = of_views[0], of_views[0].alpha_bar
    clean, noisy, _ = sample.pictures
    latents = [channels(latent, "as a latent") for latent in sample.latents[:2]]
    figures = [
        figure(picture(clean, "the picture"), f"<b>{x}</b>, decoded"),
        figure(latents[0], f"<b>{x}</b>, the latent", "latent"),
        figure(latents[1], "<b>x<sub>t</sub></b>, with noise", "latent"),
        figure(picture(noisy, "with noise, decoded"), "<b>x<sub>t</sub></b>, decoded"),
    ]
    for view, at in zip(views, of_views, strict=True):
        how = f"{view.when and ' '}{view.when}"
        latent = channels(at.latents[2], "the estimate as a latent")
        figures += [
            figure(latent, f"<b>x̂</b>{how}, estimated", "latent"),
            figure(picture(at.pictures[2], "the estimate"), f"<b>x̂</b>{how}, decoded"),
        ]
    losses = " → ".join(f"{at.loss:.4f}" for at in of_views)
    two = " two" * (len(views) == 2)
    return f"""<div class="sample {kind}{two}"><p>t = {sample.t}: {share:.1%} of the variance is
picture, {1 - share:.1%} noise. Loss {losses}</p>{"".join(figures)}</div>"""


def loss_table(views: list[View]) -> str:
    first = views[0].seen
    group = [("subject", s) for s in first.instance] + [("class", s) for s in first.prior]
    of_views = zip(*([*v.seen.instance, *v.seen.prior] for v in views), strict=True)
    weighted = any(s.weight != 1 for _, s in group)
    heads = ["", "t", "α_t", "σ_t", *["own weight"] * weighted, "w_t"]
    for name in ("‖x̂ − x‖²", "w_t ‖x̂ − x‖²"):
        heads += [f"{name} {v.when}".strip() for v in views]
    rows = []
    for (kind, s), seen in zip(group, of_views, strict=True):
        numbers = [s.t, s.alpha_bar**0.5, (1 - s.alpha_bar) ** 0.5, *[s.weight] * weighted, s.w_t]
        numbers += [at.x_error for at in seen] + [at.loss for at in seen]
        cells = "".join(f'<td class="n">{number(x, 3)}</td>' for x in numbers)
        rows.append(f'<tr><td class="{kind}">{kind}</td>{cells}</tr>')
    return table([letters(head) for head in heads], rows, plain=1)


def table(heads: list[str], rows: list[str], plain: int) -> str:
    """The first `plain` columns hold text, the rest numbers."""
    cells = "".join(
        f"<th{' class=n' if i >= plain else ''}>{head}</th>" for i, head in enumerate(heads)
    )
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def tensor_table(views: list[View]) -> str:
    heads = ["in Eq. 2", "in the code", "shape, dtype"]
    for view in views:
        heads += [f"range {view.when}".strip(), f"norm {view.when}".strip()]
    rows = []
    for of_views in zip(*(v.seen.entries for v in views), strict=True):
        e: Entry = of_views[0]
        shape = " × ".join(map(str, e.tensor.shape))
        cells = ""
        for view, at in zip(views, of_views, strict=True):
            if view is not views[0] and torch.equal(at.tensor, e.tensor):
                cells += '<td class="n faint" colspan="2">the same</td>'
                continue
            x, norm = at.tensor.float(), f"norm {view.when}".strip()
            cells += f'<td class="n">{number(x.min().item())} … {number(x.max().item())}</td>'
            cells += f'<td class="n" data-of="{norm}">{number(x.norm().item())}</td>'
        rows.append(
            f'<tr><td class="letter">{letters(e.letter)}</td><td><code>{escape(e.name)}</code>'
            f"<small>{escape(e.about)}</small></td>"
            f'<td class="n">{shape}<small>{str(e.tensor.dtype).removeprefix("torch.")}</small></td>'
            f"{cells}</tr>"
        )
    return table(heads, rows, plain=2)


def attention(views: list[View]) -> str:
    first = views[0].seen.attended
    named = escape(" ".join(first.tokens[i] for i in first.identifier))
    last = len(views) - 1
    bars = ""
    for i, token in enumerate(first.tokens):
        shares = [v.seen.attended.share[i] for v in views]
        kind = "named" * (i in first.identifier)
        lines = (
            f'<i class="{kind}{" before" * (n < last)}" style="width:{share:.2%}"></i>'
            for n, share in enumerate(shares)
        )
        said = " → ".join(f"{share:.1%}" for share in shares)
        bars += f"<span>{escape(token)}</span><div>{''.join(lines)}</div><span>{said}</span>"
    also = f" {views[0].when.capitalize()} (pale) and {views[1].when}." if last else ""
    text = f"""<p>In every cross-attention each pixel of the feature map divides its attention,
which sums to 1, among the 77 tokens of the prompt. Mean over layers, heads, pixels and the
subject's samples.{also}</p><div class="bars">{bars}</div>"""
    if not first.identifier:
        return text + "<p>No word of the prompt names the subject, so there is no map of it.</p>"
    compare = " To a model that was not trained on it the word means nothing in particular"
    compare += "." if last else "; compare with one that was."
    text += f"""<p>Where <b class="subject">{named}</b> is attended, mean over heads: light is much,
dark is little, each map over its own largest value.{compare}</p>"""
    for i in range(len(next(iter(first.maps.values())))):
        rows = "".join(maps(view, i) for view in views)
        text += f'<h3>t = {views[0].seen.instance[i].t}</h3><div class="pair">{rows}</div>'
    return text


def maps(view: View, i: int) -> str:
    """Those of the subject's sample i."""
    clean = view.seen.instance[i].pictures[0]
    found = view.seen.attended.maps
    over = [microscope.over_picture(m[i : i + 1], *clean.shape[-2:]) for m in found.values()]
    whole = torch.stack(over).mean(dim=0)
    lit = clean * (0.15 + 0.85 * whole / whole.max())
    figures = [figure(picture(lit, "attention"), f"{view.when or 'all sizes'}")]
    for side, m in found.items():
        top = m[i].max().item()
        grey = m[i].float() / max(top, 1e-12)
        image = picture(grey.expand(3, -1, -1), f"map of {side}²")
        figures.append(figure(image, f"{side}²: up to {top:.1%}"))
    return f'<div class="maps">{"".join(figures)}</div>'


def gradient_table(views: list[View]) -> str:
    of_views = [[microscope.of_all(v.seen.gradients), *v.seen.gradients] for v in views]
    most = max(max(g.instance, g.prior) for blocks in of_views for g in blocks[1:]) or 1.0
    prior = bool(views[0].seen.prior)

    def bar(kind: str, x: float) -> str:
        return f'<span class="bar {kind}" style="width:{x / most:.2%}"></span>'

    heads = ["first term", *["λ second", "cosine"] * prior, "both", "of the text"]

    def row(g: Gradient, when: str, first: bool, last: bool) -> str:
        bars = bar("subject", g.instance) + (bar("class", g.prior) if prior else "")
        bars = "" if g.block == "all" else bars
        numbers = [number(g.instance)]
        if prior:
            numbers += [number(g.prior), f"{g.cosine:.2f}".replace("-", "−")]
        numbers += [number(g.both), number(g.reads_text) if g.reads_text else "–"]
        cells = "".join(
            f'<td class="n" data-of="{head}">{x}</td>'
            for head, x in zip(heads, numbers, strict=True)
        )
        name = f"{escape(g.block)}<small>{g.weights:,} weights</small>" if first else ""
        if when:
            name += f"<small>{when}</small>"
        kind = "" if last else ' class="when"'
        return f'<tr{kind}><td>{name}</td><td class="norms">{bars}</td>{cells}</tr>'

    rows = []
    for blocks in zip(*of_views, strict=True):
        for n, (view, g) in enumerate(zip(views, blocks, strict=True)):
            rows.append(row(g, view.when, first=n == 0, last=n == len(views) - 1))
    names = [*heads[:-1], "to<sub>k</sub>, to<sub>v</sub> of the text"]
    return table(["block", "", *names], rows, plain=2)


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
    return img(to_pil(whole.expand(1, 3, -1, -1))[0], "the update is a product")


def film(strip: list[Frame]) -> str:
    out = []
    for frame in strip:
        caption = "<b>x<sub>0</sub></b>" if frame.t is None else f"t = {frame.t}"
        below = "" if frame.x0 is None else picture(frame.x0, "estimate")
        out.append(figure(picture(frame.x_t, "x_t") + below, caption))
    return f'<div class="strip">{"".join(out)}</div>'
