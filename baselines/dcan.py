"""DCAN, dual channel-wise alignment networks (Wu, Han, Lin, Uzunbas, Goldstein, Lim, Davis, ECCV 2018).

    python baselines/dcan.py cfg.yaml
    python baselines/dcan.py cfg.yaml --se                     with self-ensembling; the translator is shared
    python baselines/dcan.py cfg.yaml --restart                begin anew; the old folder is kept aside

Reads the labelled source and the unlabelled target; writes OUTPUT/NAME/baselines/dcan/translator/; images/,
each source image translated, which augment.method=folder reads; and OUTPUT/NAME/baselines/dcan/ (dcan_se),
what stage 3 writes. A run that was stopped continues, in each part.

One operation aligns in image and in feature space, channel by channel:
    align(F_s, F_t) = sigma(F_t) (F_s - mu(F_s)) / sigma(F_s) + mu(F_t)
    translator   x_g = T(x_s, x_t) = decoder(align(encoder(x_s), encoder(x_t))), trained with a fixed ImageNet
                 network's maps phi_l:  min over T of  L_content + lambda_style L_style, which stand below
    segmenter    trunk E, head H:  min over E, H of  CE(H(align(E(x_g), E(x_t))), y_s);  it reads H(E(x_t))

Ours: layers and weights; phi, `fseg.trunk`, was VGG-19; errors on it are relative to the mean square of what
they are compared with, as its maps differ in scale; content is compared at stride 8, style at 4, 8 and 16. T
has stage 1's widths, depth and rates, aligned shortcuts, and begins as an auto-encoder, as G does there, but
keeps Adam's moments then. The segmenter comes after it, with one translation of each source image, by the
guide that augment.py draws. All maps that the head reads are aligned; no gradient goes to the target's
statistics. All else of segmenter and teacher is stage 3's. --se adds its delta_con L_con, nothing else.
"""

import copy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from runtime import (  # noqa: E402
    Run, UserError, all_reduce, autocast, average_gradients, command_line, load_weights, make_sheet,
    random_generator, rank, run_main, seed_torch, to_uint8, world,
)  # fmt: skip

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from augment import repaint  # noqa: E402
from datasets import Batches, Scenes, has_labels, to_float  # noqa: E402
from losses import linear, poly, set_lr, sigmoid_ramp_up, wide  # noqa: E402
from models import VGG16, EfficientNetLite, adain, load_trunk, pad_to_multiple, reflected  # noqa: E402
from train_gan import warm_up_step  # noqa: E402
from train_selfens import build_nets, selfens_step, write_sheet  # noqa: E402

CONTENT, STYLE, EPS = 8, (4, 8, 16), 1e-5  # strides of phi's maps; added to variances


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """mu and sigma of each image and channel: (N, C, H, W) -> (N, C) twice, in float32 or wider."""
    var, mean = torch.var_mean(wide(x), (2, 3), correction=0)
    return mean, (var + EPS).sqrt()


def align(f_s: Tensor, f_t: Tensor) -> Tensor:
    """f_s with the statistics of f_t: (N, C, H, W), (N, C, H', W') -> (N, C, H, W)."""
    mean, deviation = statistics(f_t)
    return adain(f_s, deviation, mean, EPS)


class Translator(nn.Module):
    """T(x_s, x_t). The encoder has no normalisation, so that its maps have statistics to be aligned."""
    def __init__(self, width: int, downsamples: int, blocks: int):
        super().__init__()
        c = [width * 2**i for i in range(downsamples + 1)]
        self.down = nn.ModuleList([reflected(3, c[0], 7)])
        self.down.extend(reflected(a, b, 4, 2) for a, b in zip(c, c[1:], strict=False))
        self.blocks = nn.ModuleList(nn.Sequential(
            reflected(c[-1], c[-1], 3), nn.ReLU(), reflected(c[-1], c[-1], 3)) for _ in range(blocks))
        self.up = nn.ModuleList(reflected(2 * a, a, 5) for a in reversed(c[:-1]))
        self.last = reflected(c[0], 3, 7)

    def encode(self, x: Tensor) -> list[Tensor]:
        maps = [pad_to_multiple(x, 2 ** (len(self.down) - 1))]
        for layer in self.down:
            maps.append(F.relu(layer(maps[-1])))
        return maps[1:]

    def forward(self, x_s: Tensor, x_t: Tensor) -> Tensor:
        """x_s: (N, 3, H, W); x_t: (N, 3, H', W') -> (N, 3, H, W) in [-1, 1]."""
        *shortcuts, x = map(align, self.encode(x_s), self.encode(x_t))
        for block in self.blocks:
            x = x + block(x)
        for layer in self.up:
            x = F.relu(layer(F.interpolate(x, scale_factor=2))) + shortcuts.pop()
        return torch.tanh(wide(self.last(x)))[..., : x_s.shape[-2], : x_s.shape[-1]]


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Mean of (x - y)^2, relative to that of y^2 -> scalar."""
    return (wide(x) - wide(y)).square().mean() / wide(y).square().mean().clamp(min=EPS)


def translator_step(nets, x_s: Tensor, x_t: Tensor, cast) -> dict:
    """One update of T. nets: G, which is T, phi, opt_g, lambda_style; images (N, 3, H, W) in [-1, 1]."""
    with cast:
        x_g = nets.G(x_s, x_t)
        maps_g = nets.phi(x_g)
        with torch.no_grad():
            maps_s, maps_t = nets.phi(x_s), nets.phi(x_t)
    # L_content = |phi(x_g) - align(phi(x_s), phi(x_t))|^2
    L_content = squared_error(maps_g[CONTENT], align(maps_s[CONTENT], maps_t[CONTENT]))
    # L_style = sum over l of |mu(phi_l(x_g)) - mu(phi_l(x_t))|^2 + |sigma(phi_l(x_g)) - sigma(phi_l(x_t))|^2
    L_style = sum(squared_error(g, t) for l in STYLE
                  for g, t in zip(statistics(maps_g[l]), statistics(maps_t[l]), strict=True))
    nets.opt_g.zero_grad()
    (L_content + nets.lambda_style * L_style).backward()
    average_gradients(nets.G)
    nets.opt_g.step()
    return {"L_content": L_content.detach(), "L_style": L_style.detach()}


@torch.inference_mode()
def translator_sheet(run: Run, step: int, T, source: Scenes, target: Scenes) -> None:
    """Sheet of source images, translated, and guides."""
    x_s, x_t = (torch.stack([scenes.image(i * (len(scenes) - 1) // 5) for i in range(6)])
                for scenes in (source, target))
    x_s, x_t = to_float(x_s, run.device), to_float(x_t, run.device)
    with autocast(run.device, run.precision):
        x_g = T(x_s, x_t)
    rows = [[*map(to_uint8, images)] for images in zip(x_s, x_g, x_t, strict=True)]
    run.sheet(step, "translated", make_sheet(["source", "translated", "style guide"], rows))


def train_translator(cfg, lambda_style: float, data: dict, source: Scenes, target: Scenes) -> nn.Module:
    """Trains T, or loads it, and returns it."""
    c, sections = cfg.gan, ("", "source", "target", "fseg", "gan")
    run = Run(cfg, "baselines/dcan/translator", sections, data, c.steps)
    seed_torch(cfg.seed, "dcan translator", "init")
    phi = (VGG16 if cfg.fseg.trunk == "vgg16" else EfficientNetLite)(cfg.fseg.width)
    T = Translator(c.width, c.downsamples, c.res_blocks)
    load_trunk(SimpleNamespace(trunk=phi), cfg, "fseg")
    for net in (phi.requires_grad_(False), T):
        net.to(run.device, memory_format=torch.channels_last)
    optimiser = torch.optim.Adam(T.parameters(), c.lr_g, weight_decay=c.weight_decay, fused=True)
    optimiser.param_groups[0]["base_lr"] = c.lr_g
    nets = SimpleNamespace(G=T, phi=phi, opt_g=optimiser, lambda_style=lambda_style)
    for part, name in ((T, "T"), (optimiser, "opt")) if run.state else ():
        load_weights(part, run.state.get(name), run.path)
    if run.finished():
        return T
    batches = Batches(cfg, "gan", {"source": source, "target": target})
    cast = autocast(run.device, run.precision)
    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        x_s, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        warm_up = step <= c.warmup_steps
        set_lr(optimiser, c.warmup_lr / max(c.lr_g, 1e-12) if warm_up else linear(step, c.steps))
        run.log(step, (warm_up_step if warm_up else translator_step)(nets, x_s, x_t, cast))
        if run.due("sheet", step):
            translator_sheet(run, step, T, source, target)
        if run.due("save", step):
            run.save(step, T=T.state_dict(), opt=optimiser.state_dict(), classes=list(source.classes))
    run.close()
    return T


def translate(cfg, T: nn.Module, source: Scenes, target: Scenes) -> Scenes:
    """The source with its images translated; those that are missing are made."""
    numbers, size = range(len(source)), cfg.inference_batch
    batches = [numbers[first:][:size] for first in numbers[::size]]
    run = Run(cfg, "baselines/dcan/images", (), {}, len(batches))
    files = [run.folder / f"{sample.name}.png" for sample in source.samples]
    missing = [batch for batch in batches if not all(files[k].exists() for k in batch)]
    all_reduce(torch.zeros(1))  # no process begins before all have looked

    def read(k):  # the guide is the one that augment.py draws
        guide = int(random_generator(cfg.seed, "augment", k).integers(len(target)))
        return source.image(k), target.image(guide)

    if missing:
        run.begin()
        repaint(run, T, read, files, missing[rank() :: world()])
        all_reduce(torch.zeros(1))
        run.close()
    translated = copy.copy(source)
    translated.cached = {}
    translated.samples = [s._replace(image=str(f)) for s, f in zip(source.samples, files, strict=True)]
    return translated


class Maps(dict):
    """A trunk's maps {stride: map} as a head's input, with the `shape` of the image, to which it cuts."""


class Aligning(nn.Module):
    """The segmenter: H(E(x)) of an image x, and of a pair (x_g, x_t) H(align(E(x_g), E(x_t)))."""

    def __init__(self, segmenter: nn.Module):
        super().__init__()
        self.segmenter, self.stride = segmenter, segmenter.stride

    def forward(self, x) -> Tensor:
        if isinstance(x, Tensor):
            return self.segmenter(x)
        x_g, x_t = x
        with torch.no_grad():
            maps_t = self.segmenter.trunk(x_t)
        maps = Maps({s: align(f, maps_t[s]) for s, f in self.segmenter.trunk(x_g).items()})
        head, maps.shape = copy.copy(self.segmenter), x_g.shape
        head._modules = self.segmenter._modules | {"trunk": nn.Identity()}  # the head alone
        return head(maps)


def main() -> None:
    switch, number = {"action": "store_true"}, {"type": float, "default": 1.0}
    cfg, args = command_line(("--restart", switch), ("--se", switch), ("--lambda-style", number))
    c, variant = cfg.selfens, "dcan_se" if args.se else "dcan"
    if not c.steps or not cfg.gan.steps:
        raise UserError("selfens.steps, gan.steps: 0 would train nothing; raise it")
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    data = {"source train": source.digest, "target train": target.digest, "--lambda-style": args.lambda_style}
    sections = ("", "source", "target", "fseg", "gan", "selfens")
    run = Run(cfg, f"baselines/{variant}", sections, data, c.steps, args.restart)
    if run.finished():
        return
    T = train_translator(cfg, args.lambda_style, data, source, target)
    translated = translate(cfg, T, source, target)
    nets, cast = build_nets(cfg, translated, run), autocast(run.device, run.precision)
    student, nets.student = nets.student, Aligning(nets.student).train()
    batches = Batches(cfg, "selfens", {"source": translated, "target": target}, rare=cfg.rare)

    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        seed_torch(cfg.seed, "dcan", step)  # noise and dropout
        set_lr(nets.optimiser, poly(step, c.steps))
        y_s = batch.pop("y_s").to(run.device).long()
        x_g, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        # L_sup = CE(H(align(E(x_g), E(x_t))), y_s); with --se + delta_con L_con, which is of x_t alone
        batch = {"x_s": (x_g, x_t), "y_s": y_s} | ({"x_t": x_t} if args.se else {})
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps)
        terms = selfens_step(nets, batch, c, delta_con, min(c.ema_decay, 1 - 1 / step), cast)
        run.log(step, terms | {"lr": nets.optimiser.param_groups[0]["lr"]})
        if run.due("sheet", step):
            write_sheet(run, step, nets, val)
        if run.due("save", step):
            states = {name: getattr(nets, name).state_dict() for name in ("teacher", "optimiser")}
            run.save(step, student=student.state_dict(), **states, classes=list(val.classes), variant=variant)
    run.close()
    how = "--split val" if val.samples[0].label else f"--images {shlex.quote(cfg.target.root)} --out seen"
    print(f"{variant}: {run.folder} is finished; next: python evaluate.py {args.items} "
          f"--checkpoint {shlex.quote(str(run.path))} {how}")


if __name__ == "__main__":
    run_main(main)
