"""Solutions of exercises/, and for each a mistake that its check has to notice."""

import torch

from minibooth.tokenizer import BOS, EOS


def crossing(alpha_bar):
    return int((alpha_bar >= 0.5).sum()) - 1


def one_step(x, eps, beta):
    return (1 - beta) ** 0.5 * x + beta**0.5 * eps


def latent_shape(height, width, factor=8):
    return 4, height // factor, width // factor


def sample_latent(mean, std, noise, scaling_factor):
    return (mean + std * noise) * scaling_factor


def rare_words(tokenizer, count):
    words = [t.removesuffix("</w>") for t in tokenizer.vocab if t.endswith("</w>")]
    words = [w for w in words if 1 < len(w) <= 3 and w + "</w>" not in (BOS, EOS)]
    return sorted(words, key=lambda w: -tokenizer.vocab[w + "</w>"])[:count]


def up_channels(widths, layers):
    skips = [widths[0]]
    for i, width in enumerate(widths):
        skips += [width] * (layers + (i < len(widths) - 1))
    below, out = widths[-1], []
    for width in reversed(widths):
        level = []
        for _ in range(layers + 1):
            level.append(below + skips.pop())
            below = width
        out.append(level)
    return out


def guide(without, towards, scale):
    return without + scale * (towards - without)


def ddim(x_t, eps_hat, alpha_bar_t, alpha_bar_prev):
    x0 = (x_t - (1 - alpha_bar_t).sqrt() * eps_hat) / alpha_bar_t.sqrt()
    return alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev).sqrt() * eps_hat


def eq2(x_hat, x, w, x_hat_pr, x_pr, w_pr, lam):
    def term(x_hat, x, w):
        return (w * (x_hat - x).square().mean(dim=(1, 2, 3))).mean()

    return term(x_hat, x, w) + lam * term(x_hat_pr, x_pr, w_pr)


def min_snr(alpha_bar_t, gamma):
    snr = alpha_bar_t / (1 - alpha_bar_t)
    return snr.clamp(max=gamma) / snr


def decayed(weight, learning_rate, weight_decay, steps):
    return weight * (1 - learning_rate * weight_decay) ** steps


def adapted(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T) @ B.T


def merged(W, A, B, alpha):
    return W + alpha / len(A) * B @ A


def trained_numbers(shapes, rank):
    return sum(rank * (c_out + c_in) for c_out, c_in in shapes)


def online_attention(q, k, v, block):
    m = torch.full((len(q), 1), -torch.inf, dtype=q.dtype)
    total, out = torch.zeros_like(m), torch.zeros(len(q), v.shape[1], dtype=q.dtype)
    for start in range(0, len(k), block):
        S = q @ k[start : start + block].T / q.shape[1] ** 0.5
        m_next = torch.maximum(m, S.amax(dim=1, keepdim=True))
        shrink, P = (m - m_next).exp(), (S - m_next).exp()
        total = total * shrink + P.sum(dim=1, keepdim=True)
        out, m = out * shrink + P @ v[start : start + block], m_next
    return out / total


def merge(n, mean, M2, n_b, mean_b, M2_b):
    delta, total = mean_b - mean, n + n_b
    return total, mean + delta * n_b / total, M2 + M2_b + delta**2 * n * n_b / total


SOLUTIONS = {
    "noise": [crossing, one_step],
    "latents": [latent_shape, sample_latent],
    "text": [rare_words],
    "unet": [up_channels],
    "sampling": [guide, ddim],
    "dreambooth_loss": [eq2, min_snr, decayed],
    "low_rank": [adapted, merged, trained_numbers],
    "kernels": [online_attention, merge],
}


def online_without_rescaling(q, k, v, block):
    S = (q @ k.T / q.shape[1] ** 0.5).exp()
    return S @ v / S.sum(dim=1, keepdim=True)


MISTAKES = {
    "crossing": lambda alpha_bar: int((alpha_bar.sqrt() >= 0.5).sum()) - 1,
    "one_step": lambda x, eps, beta: (1 - beta) * x + beta * eps,
    "latent_shape": lambda height, width, factor=8: (4, width // factor, height // factor),
    "sample_latent": lambda mean, std, noise, f: mean * f + std * noise,
    "rare_words": lambda tokenizer, count: sorted(tokenizer.vocab, key=tokenizer.vocab.get)[
        -count:
    ],
    "up_channels": lambda widths, layers: [[2 * w] * (layers + 1) for w in reversed(widths)],
    "guide": lambda without, towards, scale: towards + scale * (towards - without),
    "ddim": lambda x, eps, a, a_prev: (a_prev / a).sqrt() * x + (1 - a_prev).sqrt() * eps,
    "eq2": lambda x_hat, x, w, y_hat, y, w_y, lam: (
        (x_hat - x).square().mean() + lam * (y_hat - y).square().mean()
    ),
    "min_snr": lambda alpha_bar_t, gamma: (alpha_bar_t / (1 - alpha_bar_t)).clamp(max=gamma),
    "decayed": lambda weight, learning_rate, weight_decay, steps: (
        weight * (1 - weight_decay) ** steps
    ),
    "adapted": lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T) @ B.T,
    "merged": lambda W, A, B, alpha: W + B @ A,
    "trained_numbers": lambda shapes, rank: sum(rank * c_out * c_in for c_out, c_in in shapes),
    "online_attention": online_without_rescaling,
    "merge": lambda n, mean, M2, n_b, mean_b, M2_b: (n + n_b, (mean + mean_b) / 2, M2 + M2_b),
}

CLAIMS = [False, True, False, True, False, True, False, True, False, False, False, False]
