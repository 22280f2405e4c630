"""The four networks: generator, discriminator, FCN-8s (f_seg) and DeepLab VGG-16 (student and teacher).

Images are (N, 3, H, W) float in [-1, 1] everywhere; the segmentation networks turn them into ImageNet's normalisation
themselves. Any H and W are accepted: each network pads at the right and bottom to what its strides divide and crops
its output again, so that pixel (i, j) of the output always belongs to pixel (i, j) of the input. Up-sampling uses the
half-pixel convention (align_corners=False): cell i of a map with stride s covers pixels s*i to s*i + s - 1.

"""

import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.models.vgg import cfgs, make_layers

from losses import wide
from runtime import UserError, load_checkpoint, load_weights, nested


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """x: (N, C, H, W) -> (N, C, H', W') with H', W' the next multiples; edge pixels repeated at the right and bottom."""
    # Not F.pad(mode="replicate"): compiled in channels last, its backward pass fails (torch 2.15, CPU).
    for dim in (-2, -1):
        if more := -x.shape[dim] % multiple:
            shape = [*x.shape]
            shape[dim] = more
            edge = x.narrow(dim, x.shape[dim] - 1, 1).expand(shape)
            x = torch.cat([x, edge.contiguous(memory_format=torch.channels_last)], dim)
    return x


def dropped(ones: Tensor, p: float) -> Tensor:
    """F.dropout(ones, p) for (N, C, H, W) on the CPU, in a fourth of the time; p in steps of 1/65536.

    torch draws and compares one number in double precision for each element; this draws 64 bits for each four. In a
    self-ensembling step it is the difference between a fifth and a twentieth of the time.
    """
    n, c, h, w = ones.shape
    bits = torch.empty(-(-ones.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[: ones.numel()]
    threshold = round(p * 2**16)
    kept = bits.view(n, h, w, c).permute(0, 3, 1, 2) >= threshold - 2**15  # in memory's order, channels last
    return kept.to(ones.dtype).mul_(2**16 / (2**16 - threshold))


class Dropout(nn.Dropout):
    """torch's, where a process's draws are its part of the draws for the whole batch; `domains` as in `BatchNorm`."""

    domains = 1

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        return x * dropped(torch.empty_like(x), self.p)


class Divided:
    """Batch norm of batches that hold several domains, one after the other and of one size.

    In training mode the batch is `domains` equal parts, each normalised by its own statistics; the running ones follow
    the last part's. With `borrows`, the last part is normalised by the running ones instead, which follow the part before.
    """

    domains, borrows = 1, False

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) -> the same."""
        if self.domains == 1 or not self.training:
            return super().forward(x)
        *others, last = x.chunk(self.domains)
        if self.borrows:
            *others, before = others
            before = super().forward(before)
            last = F.batch_norm(last, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
            return torch.cat([*map(self.by_its_own, others), before, last])
        return torch.cat([*map(self.by_its_own, others), super().forward(last)])

    def by_its_own(self, x: Tensor) -> Tensor:
        """Normalised by x's own statistics, without a trace in the running ones."""
        momentum, self.momentum = self.momentum, 0.0
        x = super().forward(x)
        self.momentum = momentum
        self.num_batches_tracked -= 1
        return x


class BatchNorm(Divided, nn.BatchNorm2d):
    """torch's, divided."""

    def by_its_own(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


# ------------------------------------------------------------------------------------------------------- generator


class AdaIN(torch.autograd.Function):
    """gamma * (c - mu) / sigma + beta with gamma, beta (N or 1, C, 1, 1) in float32; see `adain`.

    Left to autograd, the formula takes five times as long on a CPU and keeps its steps in float32. F.group_norm with a group
    per channel is no faster; F.instance_norm copies channels-last images, and for a batch of one its gradient of them is
    wrong (torch 2.15, CPU).
    """

    @staticmethod
    def forward(ctx, c, gamma, beta, eps):
        x = wide(c)
        mean = x.mean((2, 3), keepdim=True)
        x = x - mean
        rstd = torch.rsqrt(x.square().mean((2, 3), keepdim=True) + eps)
        ctx.save_for_backward(c, gamma, mean, rstd)
        return torch.addcmul(beta, x, gamma * rstd).to(c.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        c, gamma, mean, rstd = ctx.saved_tensors
        g, x, n = wide(g), wide(c) - mean, c[0, 0].numel()
        sum_g, sum_gx = g.sum((2, 3), keepdim=True), (g * x).sum((2, 3), keepdim=True) * rstd
        # gamma / sigma * (g - mean(g) - x/sigma * mean(g x/sigma))
        grad_c = torch.addcmul(g - sum_g / n, x, sum_gx * rstd / -n).mul_(gamma * rstd).to(c.dtype)
        return grad_c, sum_gx.sum_to_size(gamma.shape), sum_g.sum_to_size(gamma.shape), None


def adain(content: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """AdaIN(c; gamma, beta) = gamma * (c - mu(c)) / sigma(c) + beta (Huang & Belongie 2017), statistics in float32.

    content: (N, C, H, W); gamma, beta: (N or 1, C). mu and sigma are taken over H and W, for each image and channel.
    """
    gamma, beta = (p.to(torch.promote_types(content.dtype, torch.float32))[..., None, None] for p in (gamma, beta))
    if torch.compiler.is_compiling():  # it finds a good backward pass itself, and torch 2.11 loses AdaIN's
        c = wide(content)
        var, mean = torch.var_mean(c, (2, 3), correction=0, keepdim=True)
        return torch.addcmul(beta, c - mean, gamma * torch.rsqrt(var + eps)).to(content.dtype)
    return AdaIN.apply(content, gamma, beta, eps)


class InstanceNorm(nn.Module):
    """Instance norm without parameters: AdaIN with gamma = 1 and beta = 0."""

    def forward(self, x: Tensor) -> Tensor:
        return adain(x, x.new_ones(1, x.shape[1]), x.new_zeros(1, x.shape[1]))


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, pad: int | None = None) -> nn.Conv2d:
    """Convolution that keeps the size at stride 1, with reflection padding as in MUNIT."""
    pad = kernel // 2 if pad is None else pad
    layer = nn.Conv2d(c_in, c_out, kernel, stride, pad, padding_mode="reflect")
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)
    return layer


class ResBlock(nn.Module):
    """x + norm(conv(relu(norm(conv(x))))): instance norm, or AdaIN where the caller passes its parameters."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels, 3), conv(channels, channels, 3)

    def forward(self, x: Tensor, gammas: Tensor | None = None, betas: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W); gammas, betas: (N, 2, C) for the two AdaIN layers, or None for plain instance norm."""
        if gammas is None:
            gammas, betas = x.new_ones(1, 2, x.shape[1]), x.new_zeros(1, 2, x.shape[1])
        y = F.relu(adain(self.conv1(x), gammas[:, 0], betas[:, 0]))
        return x + adain(self.conv2(y), gammas[:, 1], betas[:, 1])


class Generator(nn.Module):
    """G(x_s, x_t) = decoder(AdaIN(E_s(x_s), E_t(x_t))): repaints a source image in the style of a target image.

    width: channels of the first layer; style_dim: length of the style vector; mlp_dim: hidden units from style to
    AdaIN parameters; downsamples: strided convolutions of E_s; res_blocks: residual blocks of E_s, and of the decoder.
    Widths follow MUNIT (Huang et al. 2018), the method's ancestor: 64, 8, 256, 2, 4.
    """

    def __init__(self, width=64, style_dim=8, mlp_dim=256, downsamples=2, res_blocks=4):
        super().__init__()
        self.multiple, self.res_blocks = 2**downsamples, res_blocks
        c = width
        down = [conv(3, c, 7), InstanceNorm(), nn.ReLU()]
        for _ in range(downsamples):
            down += [conv(c, 2 * c, 4, 2, 1), InstanceNorm(), nn.ReLU()]
            c *= 2
        self.channels = c
        self.encoder_s = nn.Sequential(*down)
        self.encoder_s_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))

        # The style keeps its means and variances, so E_t has no normalisation.
        s, style = width, [conv(3, width, 7), nn.ReLU()]
        for _ in range(4):
            s_out = min(2 * s, 4 * width)
            style += [conv(s, s_out, 4, 2, 1), nn.ReLU()]
            s = s_out
        self.encoder_t = nn.Sequential(*style, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(s, style_dim))
        self.mlp = nn.Sequential(nn.Linear(style_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, mlp_dim), nn.ReLU(),
                                 nn.Linear(mlp_dim, 2 * 2 * c * res_blocks))

        self.decoder_blocks = nn.ModuleList(ResBlock(c) for _ in range(res_blocks))
        up = []
        for _ in range(downsamples):
            # Normalisation over all channels together keeps the channel statistics that AdaIN has just set.
            up += [nn.Upsample(scale_factor=2), conv(c, c // 2, 5), nn.GroupNorm(1, c // 2), nn.ReLU()]
            c //= 2
        self.decoder = nn.Sequential(*up, conv(c, 3, 7))

    def encode_content(self, x_s: Tensor) -> Tensor:
        """x_s: (N, 3, H, W) -> content (N, C, ceil(H/m), ceil(W/m)), m = 2**downsamples."""
        content = self.encoder_s(pad_to_multiple(x_s, self.multiple))
        for block in self.encoder_s_blocks:
            content = block(content)
        return content

    def encode_style(self, x_t: Tensor) -> Tensor:
        """x_t: (N, 3, H, W) -> style (N, style_dim)."""
        return self.encoder_t(pad_to_multiple(x_t, 16))

    def decode(self, content: Tensor, style: Tensor, size) -> Tensor:
        """content, style -> image (N, 3, *size) in [-1, 1]."""
        parameters = wide(self.mlp(style)).view(len(style), self.res_blocks, 2, 2, self.channels)
        for i, block in enumerate(self.decoder_blocks):
            content = block(content, 1 + parameters[:, i, 0], parameters[:, i, 1])
        return torch.tanh(wide(self.decoder(content)))[..., : size[0], : size[1]]

    def forward(self, x_s: Tensor, x_t: Tensor) -> Tensor:
        """x_s: (N, 3, H, W) content; x_t: (N, 3, H', W') style -> (N, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode_content(x_s), self.encode_style(x_t), x_s.shape[-2:])


def build_generator(cfg) -> Generator:
    """The generator that the config's `gan.*` keys describe."""
    c = cfg.gan
    return Generator(c.width, c.style_dim, c.mlp_dim, c.downsamples, c.res_blocks)


# --------------------------------------------------------------------------------------------------- discriminator


class MultiScaleDiscriminator(nn.Module):
    """PatchGANs on an image pyramid, in the manner of pix2pixHD (Wang et al. 2018), spectral norm on every convolution.

    width: channels of the first layer; layers: strided convolutions per scale; scales: images, each half the last;
    spectral: False leaves spectral norm out, to see what it is good for.
    """

    def __init__(self, width=64, layers=4, scales=3, spectral=True):
        super().__init__()
        norm = spectral_norm if spectral else nn.Identity()
        self.patch_gans = nn.ModuleList(self._patch_gan(width, layers, norm) for _ in range(scales))

    @staticmethod
    def _patch_gan(width: int, layers: int, norm) -> nn.Sequential:
        c, modules = 3, []
        for i in range(layers):
            c_out = width * min(2**i, 8)
            modules += [norm(nn.Conv2d(c, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
            c = c_out
        return nn.Sequential(*modules, norm(nn.Conv2d(c, 1, 1)))

    def forward(self, x: Tensor, *more: Tensor) -> list:
        """x: (N, 3, H, W) -> one (N, 1, h, w) map of scores per scale, finest first; no sigmoid (LSGAN).

        With more images, a list of such lists, one for each. Nothing here mixes the images of a batch, so those of one
        size pass as one batch: fewer kernels, and one power iteration for all of them in training mode.
        """
        if more:
            images = [x, *more]
            if len({image.shape[1:] for image in images}) > 1:
                return [self(image) for image in images]
            parts = [scores.split([len(image) for image in images]) for scores in self(torch.cat(images))]
            return [list(scores) for scores in zip(*parts, strict=True)]
        scores = []
        for i, patch_gan in enumerate(self.patch_gans):
            if i:
                x = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
            scores.append(patch_gan(x))
        return scores


def build_discriminator(cfg) -> MultiScaleDiscriminator:
    """The discriminator that the config's `gan.*` keys describe."""
    c = cfg.gan
    return MultiScaleDiscriminator(c.d_width, c.d_layers, c.d_scales, c.spectral_norm)


# ---------------------------------------------------------------------------------------------------------- VGG-16


def vgg16_state(pretrained: str, batch_norm: bool) -> dict:
    """torchvision's VGG-16 state dict: `imagenet` by torchvision's own API, else from the file `pretrained`.

    Raises UserError, saying where the file belongs, when there is neither network nor file.
    """
    weights = torchvision.models.get_model_weights("vgg16_bn" if batch_norm else "vgg16").IMAGENET1K_V1
    if pretrained == "imagenet":
        try:
            return weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
            path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
            raise UserError(f"pretrained=imagenet: the weights cannot be downloaded ({error}); put {weights.url} at "
                            f"{path}, or give its path as 'pretrained'") from None
    if not os.path.isfile(pretrained):
        raise UserError(f"pretrained={pretrained}: no such file; use none, imagenet, or the path of {weights.url}")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on a foreign file: the error is one line
            state = torch.load(pretrained, map_location="cpu", weights_only=True)  # code in it is not run
    except Exception as error:  # torch raises half a dozen types for a torn or foreign file
        raise UserError(f"pretrained={pretrained}: not a readable state dict ({type(error).__name__}); "
                        f"use the file {weights.url}") from None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"pretrained={pretrained}: not a state dict; use the file {weights.url}")
    return state


class VGGSegmenter(nn.Module):
    """What both segmentation networks share: torchvision's VGG-16 convolutions, and ImageNet's normalisation."""

    def __init__(self, width: float, batch_norm: bool):
        super().__init__()
        plan = [c if c == "M" else max(1, round(c * width)) for c in cfgs["D"]]
        self.features = make_layers(plan, batch_norm)
        for i, m in enumerate(self.features):
            if isinstance(m, nn.Conv2d):  # torchvision's own initialisation of VGG
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(m.bias)
            elif isinstance(m, nn.BatchNorm2d):
                self.features[i] = BatchNorm(m.num_features)
        self.batch_norm = batch_norm
        self.trunk_channels = [c for c in plan if c != "M"]
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def load_trunk(self, pretrained: str) -> dict:
        """Loads the trunk from torchvision's weights (see `vgg16_state`) and returns the whole state dict."""
        state = vgg16_state(pretrained, self.batch_norm)
        trunk = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
        load_weights(self.features, trunk, f"pretrained={pretrained}")
        return state

    def normalise(self, x: Tensor) -> Tensor:
        """[-1, 1] -> the normalisation of torchvision's ImageNet weights."""
        return ((x + 1) / 2 - self.mean) / self.std


def bilinear_(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Initialises a transposed convolution of kernel 2s, stride s, padding s/2 to bilinear up-sampling by s."""
    s = layer.stride[0]
    ramp = 1 - (torch.arange(2 * s) - s + 0.5).abs() / s
    with torch.no_grad():
        layer.weight.zero_()
        for c in range(layer.in_channels):
            layer.weight[c, c] = ramp[:, None] * ramp[None, :]
    return layer


class FCN8s(VGGSegmenter):
    """FCN-8s (Long, Shelhamer, Darrell 2015) on VGG-16: fc6 and fc7 as convolutions, skips from pool3 and pool4.

    classes: number of classes; width: channels relative to the published ones; dropout: after fc6 and fc7.
    The published net pads its input by 100 pixels; here fc6 pads its own 7x7 window instead, which keeps every map
    aligned with the input. pretrained: none, imagenet or a file; at width 1 fc6 and fc7 are then loaded as well.
    """

    def __init__(self, classes: int, width=1.0, batch_norm=False, dropout=0.5, pretrained="none"):
        super().__init__(width, batch_norm)
        (c3, c4, c5), hidden = (self.trunk_channels[i] for i in (6, 9, 12)), max(1, round(4096 * width))
        self.fc6, self.fc7 = nn.Conv2d(c5, hidden, 7, padding=3), nn.Conv2d(hidden, hidden, 1)
        for layer in (self.fc6, self.fc7):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.dropout = nn.Dropout2d(dropout)
        self.score7, self.score4, self.score3 = (nn.Conv2d(c, classes, 1) for c in (hidden, c4, c3))
        for layer in (self.score7, self.score4, self.score3):  # the published net starts from scores of 0, too
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        up = [nn.ConvTranspose2d(classes, classes, 2 * s, s, s // 2, bias=False) for s in (2, 2, 8)]
        self.up7, self.up4, self.up3 = map(bilinear_, up)
        ends = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        self.pool3, self.pool4 = ends[2] + 1, ends[3] + 1
        if pretrained != "none":
            state = self.load_trunk(pretrained)
            if width == 1.0 and "classifier.0.weight" in state:
                try:
                    for layer, name in ((self.fc6, "classifier.0"), (self.fc7, "classifier.3")):
                        layer.weight.data.copy_(state[f"{name}.weight"].view_as(layer.weight))
                        layer.bias.data.copy_(state[f"{name}.bias"])
                except (KeyError, AttributeError, TypeError, RuntimeError):
                    raise UserError(f"pretrained={pretrained}: not VGG-16's classifier; use torchvision's file") from None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, 3, H, W) in [-1, 1] -> logits (N, classes, H, W)."""
        height, width = x.shape[-2:]
        pool3 = self.features[: self.pool3](self.normalise(pad_to_multiple(x, 32)))
        pool4 = self.features[self.pool3 : self.pool4](pool3)
        pool5 = self.features[self.pool4 :](pool4)
        # Of fc6's kernel only what can meet the map: the rest meets padding alone, costs time, and for a map of 1 or 2 rows
        # it has memory's old content for a gradient (torch 2.15, CPU, bfloat16).
        r, c = (min(3, n - 1) for n in pool5.shape[-2:])
        fc6 = F.conv2d(pool5, self.fc6.weight[:, :, 3 - r : 4 + r, 3 - c : 4 + c], self.fc6.bias, padding=(r, c))
        fc7 = self.dropout(F.relu(self.fc7(self.dropout(F.relu(fc6)))))
        score = self.up7(self.score7(fc7)) + self.score4(pool4)
        score = self.up4(score) + self.score3(pool3)
        return self.up3(score)[..., :height, :width]


class DeepLabVGG16(VGGSegmenter):
    """DeepLab on VGG-16 with ASPP (Chen et al. 2017, DeepLab-v2), output stride 8.

    pool4 and pool5 keep the size and conv5 is dilated by 2; four ASPP branches (3x3 dilated by `rates` -> 1x1 -> 1x1
    classifier, 1024 channels at width 1, dropout after the first two) are summed.
    """

    STRIDE = 8

    def __init__(self, classes: int, width=1.0, batch_norm=False, dropout=0.5, rates=(6, 12, 18, 24), pretrained="none"):
        super().__init__(width, batch_norm)
        pools = [i for i, m in enumerate(self.features) if isinstance(m, nn.MaxPool2d)]
        for i in pools[3:]:
            self.features[i] = nn.MaxPool2d(3, 1, 1)
        for m in self.features[pools[3] :]:
            if isinstance(m, nn.Conv2d):
                m.dilation = m.padding = (2, 2)
        c5, hidden = self.trunk_channels[12], max(1, round(1024 * width))
        self.aspp = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c5, hidden, 3, padding=r, dilation=r), nn.ReLU(), Dropout(dropout),
                          nn.Conv2d(hidden, hidden, 1), nn.ReLU(), Dropout(dropout), nn.Conv2d(hidden, classes, 1))
            for r in rates)
        for branch in self.aspp:
            for m in branch:
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                    nn.init.zeros_(m.bias)
            nn.init.normal_(branch[-1].weight, std=0.01)
        if pretrained != "none":
            self.load_trunk(pretrained)

    def forward(self, x: Tensor, full_size: bool = False) -> Tensor:
        """x: (N, 3, H, W) in [-1, 1] -> logits (N, classes, ceil(H/8), ceil(W/8)), or (N, classes, H, W) float32."""
        features = self.features(self.normalise(pad_to_multiple(x, self.STRIDE)))
        logits = sum(branch(features) for branch in self.aspp)
        return self.upsample(logits, x.shape[-2:]) if full_size else logits

    @classmethod
    def upsample(cls, logits: Tensor, size) -> Tensor:
        """Logits before up-sampling (N, C, ceil(H/8), ceil(W/8)) -> (N, C, H, W), bilinear, in float32 or wider."""
        full = F.interpolate(wide(logits), scale_factor=cls.STRIDE, mode="bilinear", align_corners=False)
        return full[..., : size[0], : size[1]]


def build_fseg(cfg, classes: int, pretrained: str = "none") -> FCN8s:
    """The FCN-8s that the config's `fseg.*` keys describe."""
    c = cfg.fseg
    return FCN8s(classes, c.width, c.batch_norm, c.dropout, pretrained)


def build_segmenter(cfg, classes: int, pretrained: str = "none") -> DeepLabVGG16:
    """The segmentation network that the config's `selfens.*` keys describe.

    pretrained: as in VGGSegmenter, or fseg: the trunk of the f_seg that this run's train_gan.py trained. Raises UserError
    where there is none, it is not finished or has another width.
    """
    c = cfg.selfens
    net = DeepLabVGG16(classes, c.width, c.batch_norm, c.dropout, c.aspp_rates, "none" if pretrained == "fseg" else pretrained)
    if pretrained == "fseg":
        path = Path(cfg.output, cfg.name, "gan", "fseg", "last.pt")
        state = load_checkpoint(path, "selfens.pretrained=fseg takes f_seg's trunk: run train_gan.py first", ("f_seg",))
        trunk = {k.removeprefix("features."): v for k, v in state["f_seg"].items() if k.startswith("features.")}
        load_weights(net.features, trunk, f"{path} (selfens.width and selfens.batch_norm must be fseg's)")
    return net


# ---------------------------------------------------------------------------------------- networks from checkpoints


def load_generator(path, device) -> tuple[Generator, dict]:
    """The trained G in evaluation mode, and its checkpoint."""
    state = load_checkpoint(path, "run train_gan.py with this config first; it continues what was stopped", ("G",))
    G = build_generator(nested(state["config"]))
    load_weights(G, state["G"], path)
    return G.to(device, memory_format=torch.channels_last).eval(), state


def load_fseg(path, classes, device) -> tuple[FCN8s, dict]:
    """A trained f_seg, frozen, in evaluation mode, and its checkpoint. Raises UserError for one of other classes."""
    state = load_checkpoint(path, "f_seg is the last.pt of a gan/fseg folder, which train_gan.py writes", ("f_seg",))
    if state["classes"] != list(classes):
        raise UserError(f"{path}: f_seg of classes {state['classes']}, not the config's {list(classes)}")
    f_seg = build_fseg(nested(state["config"]), len(classes))
    load_weights(f_seg, state["f_seg"], path)
    return f_seg.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), state


def load_segmenter(path, which: str, classes, device) -> tuple[DeepLabVGG16, dict]:
    """The trained student or teacher in evaluation mode, and its checkpoint. Raises UserError for other classes."""
    state = load_checkpoint(path, "run train_selfens.py with this config and selfens.variant first", (which,))
    if state["classes"] != list(classes):
        raise UserError(f"{path}: trained on classes {state['classes']}, not the config's {list(classes)}")
    net = build_segmenter(nested(state["config"]), len(classes))
    load_weights(net, state[which], path)
    return net.to(device, memory_format=torch.channels_last).eval(), state
