"""The GAN's and self-ensembling's steps once more, straight from the formulas and as plain as can be.

Nothing of models.py or losses.py is used: weights come by their names in the networks' state dicts, normalisations and
losses are written out, D sees real, generated and G's images in a pass each, the domains pass the student one after the
other, and there is no autocast, no channels-last layout, no fused optimiser. What it computes the project must compute as well
(test_speed.py), and faster (bench.py).
"""

import torch
import torch.nn.functional as F

IGNORE = 255
VGG = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]


def weights_of(net) -> dict:
    """Copies of a network's weights and buffers by name; float ones are leaves of their own, in the default layout."""
    named = dict(net.named_parameters())
    return {k: v.detach().clone(memory_format=torch.contiguous_format).requires_grad_(k in named)
            for k, v in net.state_dict().items()}


def conv(w, name, x, stride=1, pad=0, dilation=1, mode=None):
    if mode and pad:
        x, pad = F.pad(x, (pad,) * 4, mode=mode), 0
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, pad, dilation)


def pad_right_and_bottom(x, multiple):
    return F.pad(x, (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple), mode="replicate")


# -------------------------------------------------------------------------------------------------------- networks


def normalised(x, dims, eps=1e-5):
    mu = x.mean(dims, keepdim=True)
    return (x - mu) / ((x - mu).square().mean(dims, keepdim=True) + eps).sqrt()


def generator(w, x_s, x_t):
    downs, blocks = (len({k.split(".")[1] for k in w if k.startswith(f"{part}.")}) for part in ("encoder_s", "decoder_blocks"))
    downs -= 1

    x = pad_right_and_bottom(x_s, 2**downs)
    for i in range(downs + 1):
        x = conv(w, f"encoder_s.{3 * i}", x, 2 if i else 1, 1 if i else 3, mode="reflect")
        x = normalised(x, (2, 3)).relu()

    def block(name, x, gamma, beta):
        y = x
        for i in range(2):
            y = gamma[i] * normalised(conv(w, f"{name}.conv{i + 1}", y, 1, 1, mode="reflect"), (2, 3)) + beta[i]
            y = y if i else y.relu()
        return x + y

    for i in range(blocks):
        x = block(f"encoder_s_blocks.{i}", x, (1, 1), (0, 0))

    s = pad_right_and_bottom(x_t, 16)
    for i in range(5):
        s = conv(w, f"encoder_t.{2 * i}", s, 2 if i else 1, 1 if i else 3, mode="reflect").relu()
    s = s.mean((2, 3)) @ w["encoder_t.12.weight"].T + w["encoder_t.12.bias"]
    for i in range(3):
        s = (s if i == 0 else s.relu()) @ w[f"mlp.{2 * i}.weight"].T + w[f"mlp.{2 * i}.bias"]
    s = s.view(len(s), blocks, 2, 2, -1, 1, 1)
    for i in range(blocks):
        x = block(f"decoder_blocks.{i}", x, 1 + s[:, i, 0].transpose(0, 1), s[:, i, 1].transpose(0, 1))

    for i in range(downs):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = normalised(conv(w, f"decoder.{4 * i + 1}", x, 1, 2, mode="reflect"), (1, 2, 3))
        x = (x * w[f"decoder.{4 * i + 2}.weight"][:, None, None] + w[f"decoder.{4 * i + 2}.bias"][:, None, None]).relu()
    return conv(w, f"decoder.{4 * downs}", x, 1, 3, mode="reflect").tanh()[..., : x_s.shape[2], : x_s.shape[3]]


def power_iteration(w):
    """u = W v / |W v|, v = W^T u / |W^T u|, once, for every convolution of D."""
    with torch.no_grad():
        for name in [k.removesuffix(".original") for k in w if k.endswith(".original")]:
            matrix = w[f"{name}.original"].flatten(1)
            w[f"{name}.0._u"] = F.normalize(matrix @ w[f"{name}.0._v"], dim=0, eps=1e-12)
            w[f"{name}.0._v"] = F.normalize(matrix.T @ w[f"{name}.0._u"], dim=0, eps=1e-12)


def discriminator(w, x):
    scales, layers = (1 + max(int(k.split(".")[i]) for k in w) for i in (1, 2))
    scores = []
    for s in range(scales):
        if s:
            x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        y = x
        for i in range(0, layers, 2):
            name = f"patch_gans.{s}.{i}"
            weight, u, v = (w[f"{name}.parametrizations.weight.{part}"] for part in ("original", "0._u", "0._v"))
            weight, last = weight / (u @ weight.flatten(1) @ v), i == layers - 1
            y = F.conv2d(y, weight, w[f"{name}.bias"], 1 if last else 2, 0 if last else 1)
            y = y if last else F.leaky_relu(y, 0.2)
        scores.append(y)
    return scores


def vgg(w, x, training, dilated=False):
    """Features after each pooling. In training mode, batch norm's running statistics in `w` follow."""
    mean, std = (torch.tensor(v).to(x.dtype).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x, i, pooled = ((x + 1) / 2 - mean) / std, 0, []
    for c in VGG:
        if c == "M":
            x = F.max_pool2d(x, 3, 1, 1) if dilated and len(pooled) > 2 else F.max_pool2d(x, 2)
            pooled.append(x)
            i += 1
            continue
        d = 2 if dilated and len(pooled) == 4 else 1
        x, i = conv(w, f"features.{i}", x, 1, d, d), i + 1
        if f"features.{i}.running_mean" in w:
            if training:
                mu = x.mean((0, 2, 3))
                var = (x - mu[:, None, None]).square().mean((0, 2, 3))
                n = x.numel() / len(mu)
                for name, value in (("mean", mu), ("var", var * n / (n - 1))):
                    running = w[f"features.{i}.running_{name}"]
                    w[f"features.{i}.running_{name}"] = 0.9 * running + 0.1 * value.detach()
            else:
                mu, var = w[f"features.{i}.running_mean"], w[f"features.{i}.running_var"]
            scale = w[f"features.{i}.weight"] / (var + 1e-5).sqrt()
            x, i = (x - mu[:, None, None]) * scale[:, None, None] + w[f"features.{i}.bias"][:, None, None], i + 1
        x, i = x.relu(), i + 1
    return pooled


def fcn8s(w, x):
    """f_seg in eval mode."""
    height, width = x.shape[-2:]
    _, _, pool3, pool4, pool5 = vgg(w, pad_right_and_bottom(x, 32), False)
    y = conv(w, "fc7", conv(w, "fc6", pool5, 1, 3).relu()).relu()

    def up(name, x, s):
        return F.conv_transpose2d(x, w[f"{name}.weight"], None, s, s // 2)

    y = up("up7", conv(w, "score7", y), 2) + conv(w, "score4", pool4)
    return up("up3", up("up4", y, 2) + conv(w, "score3", pool3), 8)[..., :height, :width]


def deeplab(w, x, rates):
    """Student or teacher in training mode, without dropout."""
    x = vgg(w, pad_right_and_bottom(x, 8), True, dilated=True)[-1]
    logits = 0
    for k, rate in enumerate(rates):
        y = conv(w, f"aspp.{k}.0", x, 1, rate, rate).relu()
        logits = logits + conv(w, f"aspp.{k}.6", conv(w, f"aspp.{k}.3", y).relu())
    return logits


# ----------------------------------------------------------------------------------------------------------- losses


def softmax(z):
    e = (z - z.amax(1, keepdim=True)).exp()
    return e / e.sum(1, keepdim=True)


def cross_entropy(z, y):
    shifted = z - z.amax(1, keepdim=True).detach()
    log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
    known = y != IGNORE
    return -(log_p.gather(1, torch.where(known, y, 0)[:, None])[:, 0] * known).sum() / known.sum()


def optimised(w) -> list:
    return [v for v in w.values() if v.requires_grad]


def gradients(w) -> dict:
    return {k: v.grad.clone() for k, v in w.items() if v.requires_grad}


# ------------------------------------------------------------------------------------------------------------ steps


class PlainGAN:
    """The GAN's step on copies of G's, D's and f_seg's weights."""

    def __init__(self, G, D, f_seg, lr_g, lr_d, weight_decay, lambda_sem):
        self.G, self.D, self.f_seg, self.lambda_sem = *map(weights_of, (G, D, f_seg)), lambda_sem
        for v in self.f_seg.values():
            v.requires_grad_(False)
        self.opt_g, self.opt_d = (torch.optim.Adam(optimised(w), lr, (0.5, 0.999), weight_decay=weight_decay, foreach=False)
                                  for w, lr in ((self.G, lr_g), (self.D, lr_d)))

    def step(self, x_s, x_t, y_s):
        """Returns the losses; the gradients of the last update are left in the weights."""
        x_g = generator(self.G, x_s, x_t)
        power_iteration(self.D)
        real, fake = discriminator(self.D, x_t), discriminator(self.D, x_g.detach())
        L_D = sum(((r - 1) ** 2).mean() + (f**2).mean() for r, f in zip(real, fake, strict=True))
        self.opt_d.zero_grad()
        L_D.backward()
        self.opt_d.step()
        self.gradients_d = gradients(self.D)

        L_GAN = sum(((f - 1) ** 2).mean() for f in discriminator(self.D, x_g))
        L_sem = cross_entropy(fcn8s(self.f_seg, x_g), y_s)
        self.opt_g.zero_grad()
        (L_GAN + self.lambda_sem * L_sem).backward()
        self.opt_g.step()
        return {"L_D": L_D, "L_GAN": L_GAN, "L_sem": L_sem}


class PlainSelfEnsembling:
    """Self-ensembling's step on copies of the student's weights, without dropout and with the noise it is given."""

    def __init__(self, student, rates, lr, weight_decay):
        self.student, self.teacher, self.rates = weights_of(student), weights_of(student), rates
        for v in self.teacher.values():
            v.requires_grad_(False)
        self.optimiser = torch.optim.Adam(optimised(self.student), lr, weight_decay=weight_decay, foreach=False)

    def step(self, x_s, x_g, x_t, noise_s, noise_t, y_s, delta_con, alpha):
        def up(z):
            z = F.interpolate(z, scale_factor=8, mode="bilinear", align_corners=False)
            return z[..., : y_s.shape[1], : y_s.shape[2]]

        L_sup = 0
        for x in (x_s, x_g):
            before = {k: v for k, v in self.student.items() if "running" in k}
            L_sup = L_sup + cross_entropy(up(deeplab(self.student, x, self.rates)), y_s)
            self.student |= before  # only the target moves the running statistics
        z_s = deeplab(self.student, x_t + noise_s, self.rates)
        before = dict(self.teacher)
        with torch.no_grad():
            z_t = deeplab(self.teacher, x_t + noise_t, self.rates)
        self.teacher = before
        L_con = ((softmax(z_s) - softmax(z_t)) ** 2).mean()
        self.optimiser.zero_grad()
        (L_sup + delta_con * L_con).backward()
        self.optimiser.step()
        with torch.no_grad():
            self.teacher = {k: alpha * t + (1 - alpha) * self.student[k] if t.is_floating_point() else t
                            for k, t in self.teacher.items()}
        return {"L_sup": L_sup, "L_con": L_con}
