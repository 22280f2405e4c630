"""The training steps once more, straight from the formulas and as plain as can be, for test_steps.py.

Only f_seg's and the segmenters' forward passes are the project's. G and D are written out on copies of their
weights, by the names in their state dicts; L is summed and differentiated once; no optimiser is fused.
"""

import copy

import torch
import torch.nn.functional as F

IGNORE = 255


def weights_of(net) -> dict:
    """Copies of a network's weights and buffers by name; the weights are leaves, in the default layout."""
    named = dict(net.named_parameters())
    return {k: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_(k in named)
            for k, v in net.state_dict().items()}


def conv(w, name, x, stride=1, pad=0):
    return F.conv2d(F.pad(x, (pad,) * 4, mode="reflect"), w[f"{name}.weight"], w[f"{name}.bias"], stride)


def normalised(x, dims):
    mu = x.mean(dims, keepdim=True)
    return (x - mu) / ((x - mu).square().mean(dims, keepdim=True) + 1e-5).sqrt()


def generator(w, x_s, x_t):
    """decoder(AdaIN(E_s(x_s), MLP(E_t(x_t)))); images are padded at the right and bottom."""
    convs, blocks = (len({k.split(".")[1] for k in w if k.startswith(p)})
                     for p in ("encoder_s.", "decoder_blocks."))
    downs = convs - 1

    def padded(x, multiple):
        return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")

    def block(name, x, gamma, beta):
        y = gamma[0] * normalised(conv(w, f"{name}.conv1", x, 1, 1), (2, 3)) + beta[0]
        return x + gamma[1] * normalised(conv(w, f"{name}.conv2", y.relu(), 1, 1), (2, 3)) + beta[1]

    x = padded(x_s, 2**downs)
    for i in range(downs + 1):
        x = conv(w, f"encoder_s.{3 * i}", x, *((2, 1) if i else (1, 3)))
        x = normalised(x, (2, 3)).relu()
    for i in range(blocks):
        x = block(f"encoder_s_blocks.{i}", x, (1, 1), (0, 0))

    s = padded(x_t, 16)
    for i in range(5):
        s = conv(w, f"encoder_t.{2 * i}", s, *((2, 1) if i else (1, 3))).relu()
    s = s.mean((2, 3)) @ w["encoder_t.12.weight"].T + w["encoder_t.12.bias"]
    for i in range(3):
        s = (s.relu() if i else s) @ w[f"mlp.{2 * i}.weight"].T + w[f"mlp.{2 * i}.bias"]
    s = s.view(len(s), blocks, 2, 2, -1, 1, 1)  # image, block, (gamma - 1, beta), layer, channel
    for i in range(blocks):
        x = block(f"decoder_blocks.{i}", x, 1 + s[:, i, 0].transpose(0, 1), s[:, i, 1].transpose(0, 1))

    for i in range(downs):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = normalised(conv(w, f"decoder.{4 * i + 1}", x, 1, 2), (1, 2, 3))
        scale, shift = (w[f"decoder.{4 * i + 2}.{part}"][:, None, None] for part in ("weight", "bias"))
        x = (x * scale + shift).relu()
    return conv(w, f"decoder.{4 * downs}", x, 1, 3).tanh()[..., : x_s.shape[2], : x_s.shape[3]]


@torch.no_grad()
def power_iteration(w):
    """u = W v / |W v|, v = W^T u / |W^T u|, once, for every convolution of D."""
    for name in [k.removesuffix(".original") for k in w if k.endswith(".original")]:
        matrix, u, v = w[f"{name}.original"].flatten(1), w[f"{name}.0._u"], w[f"{name}.0._v"]
        u.copy_(matrix @ v / (matrix @ v).norm())
        v.copy_(matrix.T @ u / (matrix.T @ u).norm())


def discriminator(w, x):
    """Scores of each scale; every weight divided by u^T W v, its largest singular value."""
    scales, modules = (1 + max(int(k.split(".")[i]) for k in w) for i in (1, 2))
    scores = []
    for scale in range(scales):
        x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False) if scale else x
        y = x
        for i in range(0, modules, 2):
            name = f"patch_gans.{scale}.{i}"
            weight, u, v = (w[f"{name}.parametrizations.weight.{k}"] for k in ("original", "0._u", "0._v"))
            weight = weight / (u @ weight.flatten(1) @ v)
            y = F.conv2d(y, weight, w[f"{name}.bias"], *((2, 1) if i < modules - 1 else (1, 0)))
            y = torch.where(y > 0, y, 0.2 * y) if i < modules - 1 else y
        scores.append(y)
    return scores


def log_softmax(z):
    z = z - z.amax(1, keepdim=True).detach()
    return z - z.exp().sum(1, keepdim=True).log()


def cross_entropy(z, y, weight=None):
    """Sum of -weight[y] log p[y] over the labelled pixels, divided by their number."""
    known = y != IGNORE
    y = torch.where(known, y, 0)
    each = -log_softmax(z).gather(1, y[:, None])[:, 0] * known
    return (each if weight is None else each * weight[y]).sum() / known.sum()


def bilinear(z, scale, size):
    """Pixel p lies at (p + 1/2) / scale - 1/2 among the cells, and beyond the outermost ones takes theirs."""
    for dim, length in zip((2, 3), size, strict=True):
        cells = torch.arange(z.shape[dim], dtype=z.dtype)
        at = ((torch.arange(length, dtype=z.dtype) + 0.5) / scale - 0.5).clamp(0, len(cells) - 1)
        matrix = (1 - (at[:, None] - cells).abs()).clamp(min=0)
        z = (z.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
    return z


def adamw(net, lr, head_lr, decay):
    """The heads' rate is head_lr times the trunk's; no decay of norms' parameters and biases."""
    groups = [{"params": [p], "lr": lr if name.startswith("trunk.") else lr * head_lr,
               "weight_decay": decay if p.ndim == 4 else 0.0} for name, p in net.named_parameters()]
    return torch.optim.AdamW(groups, foreach=False)


class PlainGAN:
    """Stage 1's steps of G and D on copies of the networks."""

    def __init__(self, G, D, f_seg, lr, decay, lambda_sem, lambda_rec):
        self.G, self.D, self.f_seg = weights_of(G), weights_of(D), copy.deepcopy(f_seg)
        self.lambda_sem, self.lambda_rec = lambda_sem, lambda_rec
        leaves = [[v for v in w.values() if v.requires_grad] for w in (self.G, self.D)]
        self.opt_g, self.opt_d = (torch.optim.Adam(p, lr, (0.5, 0.999), weight_decay=decay, foreach=False)
                                  for p in leaves)

    def warm_up(self, x_s, x_t):
        """L_rec = mean |G(x_s, x_s) - x_s| + mean |G(x_t, x_t) - x_t|"""
        L_rec = sum((generator(self.G, x, x) - x).abs().mean() for x in (x_s, x_t))
        self.opt_g.zero_grad()
        L_rec.backward()
        self.opt_g.step()
        return {"L_rec": L_rec}

    def step(self, x_s, x_t, y_s):
        """Returns the losses; the gradients of both updates stay in the weights."""
        x_g = generator(self.G, x_s, x_t)
        power_iteration(self.D)
        real, fake = discriminator(self.D, x_t), discriminator(self.D, x_g.detach())
        L_D = [((r - 1) ** 2).mean() + (f**2).mean() for r, f in zip(real, fake, strict=True)]
        self.opt_d.zero_grad()
        sum(L_D).backward()
        self.opt_d.step()
        L_GAN = sum(((f - 1) ** 2).mean() for f in discriminator(self.D, x_g))
        L_sem = cross_entropy(self.f_seg(x_g), y_s)
        L_rec = (generator(self.G, x_t, x_t) - x_t).abs().mean()
        self.opt_g.zero_grad()
        loss = L_GAN + self.lambda_sem * L_sem + self.lambda_rec * L_rec
        loss.backward(inputs=self.opt_g.param_groups[0]["params"])  # and nothing to D
        self.opt_g.step()
        scales = {f"L_D/scale{k + 1}": L for k, L in enumerate(L_D)}
        return {"L_D": sum(L_D), "L_GAN": L_GAN, "L_sem": L_sem, "L_rec": L_rec} | scales


class PlainSelfEnsembling:
    """Stage 3's step on copies of the student."""

    def __init__(self, student, lr, head_lr, decay, weight):
        self.student, self.teacher, self.weight = copy.deepcopy(student), copy.deepcopy(student), weight
        self.optimiser = adamw(self.student, lr, head_lr, decay)

    def step(self, batch, noise_t, noise_s, delta_con, alpha):
        """batch: as selfens_step's; noise_t, noise_s: what is added to x_t before teacher and student."""
        stride = self.student.stride
        L_sup = sum(cross_entropy(bilinear(self.student(batch[x]), stride, batch[y].shape[1:]), batch[y],
                                  self.weight)
                    for x, y in (("x_s", "y_s"), ("x_g", "y_s"), ("x_l", "y_l")) if x in batch)
        L, terms = L_sup, {"L_sup": L_sup}
        if "x_t" in batch:
            with torch.no_grad():
                p_t = log_softmax(self.teacher(batch["x_t"] + noise_t)).exp()
            p_s = log_softmax(self.student(batch["x_t"] + noise_s)).exp()
            L_con = ((p_s - p_t) ** 2).sum() / p_s[:, 0].numel()
            L, terms = L_sup + delta_con * L_con, terms | {"L_con": L_con, "delta_con": delta_con}
        self.optimiser.zero_grad()
        L.backward()
        self.optimiser.step()
        with torch.no_grad():
            for t, s in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                t.copy_(alpha * t + (1 - alpha) * s)
        return {"L": L} | terms
