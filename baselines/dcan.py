"""DCAN, dual channel-wise alignment networks (Wu, Han, Lin, Uzunbas, Goldstein, Lim, Davis, ECCV 2018).

    python baselines/dcan.py cfg.yaml
    python baselines/dcan.py cfg.yaml --se                     with self-ensembling; the translator is shared
    python baselines/dcan.py cfg.yaml --lambda-style 2         of the translator, 1 by default
    python baselines/dcan.py cfg.yaml --restart                begin anew; the old folder is kept aside

Writes OUTPUT/NAME/baselines/dcan/: translator/; images/, each source image translated, which
augment.method=folder reads; and, or in dcan_se/, what stage 3 writes. A run that was stopped continues.

One operation aligns in image and in feature space, channel by channel:
    align(F_s, F_t) = sigma(F_t) (F_s - mu(F_s)) / sigma(F_s) + mu(F_t)
    translator   x_g = T(x_s, x_t) = decoder(align(encoder(x_s), encoder(x_t))), trained with a fixed ImageNet
                 network's maps phi_l:  min over T of  L_content + lambda_style L_style, which stand below
    segmenter    trunk E, head H:  min over E, H of  CE(H(align(E(x_g), E(x_t))), y_s);  it reads H(E(x_t))

Ours: layers and weights; phi, `fseg.trunk`, was VGG-19; errors are relative to the mean square of what maps
are compared with, content at stride 8, style at 4, 8 and 16. T has stage 1's widths, depth and rates, aligned
shortcuts, and begins as an auto-encoder, as G does there. The segmenter comes after it, with one translation
of each source image, by the guide that augment.py draws. All maps that the head reads are aligned; no
gradient goes to the target's statistics. All else is stage 3's. --se adds its delta_con L_con, nothing else.
"""

import copy
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's modules lie one folder up

from runtime import (  # noqa: E402
    Run, UserError, all_reduce, atomic_write, autocast, average_gradients, command_line,
    random_generator, rank, run_main, seed_torch, world,
)  # fmt: skip

# isort: split
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

from baselines.mcd import build_pair, self_ensembling, update_teacher, write_sheet  # noqa: E402
from datasets import Batches, Scenes, has_labels, make_sheet, some_of, to_float, to_uint8  # noqa: E402
from losses import cross_entropy, linear, poly, set_lr, sigmoid_ramp_up, wide  # noqa: E402
from models import (  # noqa: E402
    VGG16, EfficientNetLite, adain, adamw, load_trunk, pad_to_multiple, reflected, upsample,
)  # fmt: skip

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


def translator_step(nets, x_s: Tensor, x_t: Tensor, warm_up: bool, cast) -> dict:
    """One update of T. nets: T, phi, opt, lambda_style; images (N, 3, H, W) in [-1, 1]."""
    nets.opt.zero_grad()
    if warm_up:  # L_rec = mean |T(x, x) - x|, summed over the domains
        with cast:
            both = [(nets.T(x, x), x) for x in (x_s, x_t)]
        parts = [(x_rec - x).abs().mean() for x_rec, x in both]
        terms = {"L_rec": sum(parts)}
    else:
        with cast:
            x_g = nets.T(x_s, x_t)
            maps_g = nets.phi(x_g)
            with torch.no_grad():
                maps_s, maps_t = nets.phi(x_s), nets.phi(x_t)
        # L_content = |phi(x_g) - align(phi(x_s), phi(x_t))|^2
        L_content = squared_error(maps_g[CONTENT], align(maps_s[CONTENT], maps_t[CONTENT]))
        # L_style = sum over l of |mu(phi_l(x_g)) - mu(phi_l(x_t))|^2 + the same of sigma
        L_style = sum(squared_error(g, t) for l in STYLE
                      for g, t in zip(statistics(maps_g[l]), statistics(maps_t[l]), strict=True))
        parts, terms = [L_content + nets.lambda_style * L_style], {"L_content": L_content, "L_style": L_style}
    for part in parts:
        part.backward()
    average_gradients(nets.T)
    nets.opt.step()
    return {name: term.detach() for name, term in terms.items()}


@torch.inference_mode()
def translator_sheet(run: Run, step: int, T, source: Scenes, target: Scenes) -> None:
    """Sheet of source images, translated, and guides."""
    x_s, x_t = (some_of(scenes, 6, run.device) for scenes in (source, target))
    with autocast(run.device, run.precision):
        x_g = T(x_s, x_t)
    rows = [[*map(to_uint8, images)] for images in zip(x_s, x_g, x_t, strict=True)]
    run.sheet(step, "translated", make_sheet(["source", "translated", "style guide"], rows))


def build_nets(cfg, lambda_style: float, run: Run) -> SimpleNamespace:
    """T, its optimiser, new or as the checkpoint has them, and phi."""
    c, place = cfg.gan, {"device": run.device, "memory_format": torch.channels_last}
    seed_torch(cfg.seed, "dcan translator", "init")
    phi = (VGG16 if cfg.fseg.trunk == "vgg16" else EfficientNetLite)(cfg.fseg.width)
    load_trunk(SimpleNamespace(trunk=phi.requires_grad_(False).to(**place)), cfg, "fseg")
    T = Translator(c.width, c.downsamples, c.res_blocks).to(**place)
    opt = torch.optim.Adam(T.parameters(), c.lr_g, weight_decay=c.weight_decay, fused=True)
    opt.param_groups[0]["base_lr"] = c.lr_g
    run.load({"T": T, "opt": opt})
    return SimpleNamespace(T=T, phi=phi, opt=opt, lambda_style=lambda_style)


def train_translator(cfg, lambda_style: float, data: dict, source: Scenes, target: Scenes) -> nn.Module:
    """Trains T, or loads it, and returns it."""
    c = cfg.gan
    run = Run(cfg, "baselines/dcan/translator", ("", "source", "target", "fseg", "gan"), data, c.steps)
    nets, cast = build_nets(cfg, lambda_style, run), autocast(run.device, run.precision)
    if run.finished():
        return nets.T
    batches = Batches(cfg, "gan", {"source": source, "target": target})
    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        x_s, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        warm_up = step <= c.warmup_steps
        set_lr(nets.opt, c.warmup_lr / max(c.lr_g, 1e-12) if warm_up else linear(step, c.steps))
        run.log(step, translator_step(nets, x_s, x_t, warm_up, cast))
        if run.due("sheet", step):
            translator_sheet(run, step, nets.T, source, target)
        run.save(step, {"T": nets.T, "opt": nets.opt}, classes=list(source.classes))
    run.close()
    return nets.T


def translate(cfg, run: Run, T: nn.Module, source: Scenes, target: Scenes) -> Scenes:
    """The source with its images translated, by the guides that augment.py draws; what is missing is made."""
    files = [Path(cfg.output, cfg.name, "baselines/dcan/images", f"{s.name}.png") for s in source.samples]
    missing = [k for k in range(len(files)) if not files[k].exists()]
    all_reduce(torch.zeros(1))  # no process begins before all have looked
    for k in tqdm(missing[rank() :: world()], "images", mininterval=1, disable=rank() > 0):
        guide = int(random_generator(cfg.seed, "augment", k).integers(len(target)))
        x_s, x_t = (to_float(x[None], run.device) for x in (source.image(k), target.image(guide)))
        with torch.inference_mode(), autocast(run.device, run.precision):
            image = Image.fromarray(to_uint8(T(x_s, x_t)[0]))
        atomic_write(files[k], lambda file, image=image: image.save(file, "PNG"))
    all_reduce(torch.zeros(1))
    translated = copy.copy(source)
    translated.cached = {}
    translated.samples = [s._replace(image=str(f)) for s, f in zip(source.samples, files, strict=True)]
    return translated


def dcan_step(nets, batch: dict, c, delta_con, alpha: float, cast) -> dict:
    """One update of student and teacher. Returns the loss terms. Arguments: mcd.mcd_step's, x_g for x_s."""
    student, (x_g, x_t, y_s) = nets.student, (batch[name] for name in ("x_g", "x_t", "y_s"))
    nets.optimiser.zero_grad()
    # L_sup = CE(H(align(E(x_g), E(x_t))), y_s)
    with cast:
        with torch.no_grad():
            maps_t = student.trunk(x_t)
        maps = {s: align(f, maps_t[s]) for s, f in student.trunk(x_g).items()}
        logits = student.head(maps, x_g.shape)
    L_sup = cross_entropy(upsample(logits, student.stride, y_s.shape[-2:]), y_s, nets.weight)
    L_sup.backward()
    terms = {"L_sup": L_sup.detach()}
    # With --se: + delta_con L_con of H(E(x_t + n)) and the teacher's reading of x_t + n'
    if delta_con is not None:
        L_con = self_ensembling(nets, x_t, c.noise_std, cast)
        (delta_con * L_con).backward()
        terms |= {"L_con": L_con.detach(), "delta_con": delta_con}
    average_gradients(student)
    nets.optimiser.step()
    update_teacher(nets.teacher, student, alpha)
    return terms


def main() -> None:
    switch, number = {"action": "store_true"}, {"type": float, "default": 1.0}
    cfg, args = command_line(("--restart", switch), ("--se", switch), ("--lambda-style", number))
    c, variant = cfg.selfens, "dcan_se" if args.se else "dcan"
    if not c.steps or cfg.gan.steps <= cfg.gan.warmup_steps:
        raise UserError("selfens.steps=0, or gan.steps not above gan.warmup_steps, trains nothing; raise it")
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    data = {"source train": source.digest, "target train": target.digest, "--lambda-style": args.lambda_style}
    sections = ("", "source", "target", "fseg", "gan", "selfens")
    run = Run(cfg, f"baselines/{variant}", sections, data, c.steps, args.restart)
    if run.finished():
        return
    T = train_translator(cfg, args.lambda_style, data, source, target)
    translated = translate(cfg, run, T, source, target)
    nets, cast = build_pair(cfg, "selfens", translated, run), autocast(run.device, run.precision)
    nets.optimiser = adamw(nets.student, c.lr, cfg.head_lr, cfg.weight_decay)
    run.load(parts := {name: getattr(nets, name) for name in ("student", "teacher", "optimiser")})
    batches = Batches(cfg, "selfens", {"source": translated, "target": target}, rare=cfg.rare)
    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        seed_torch(cfg.seed, "dcan", step)  # noise and dropout
        set_lr(nets.optimiser, poly(step, c.steps))
        x_g, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        batch = {"x_g": x_g, "x_t": x_t, "y_s": batch["y_s"].to(run.device).long()}
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps) if args.se else None
        terms = dcan_step(nets, batch, c, delta_con, min(c.ema_decay, 1 - 1 / step), cast)
        run.log(step, terms | {"lr": nets.optimiser.param_groups[0]["lr"]})
        if run.due("sheet", step):
            write_sheet(run, step, nets, val)
        run.save(step, parts, classes=list(val.classes), variant=variant)
    run.close()
    how = "--split val" if val.samples[0].label else f"--images {shlex.quote(cfg.target.root)} --out seen"
    print(f"{variant}: {run.folder} is finished; next: python evaluate.py {args.items} "
          f"--checkpoint {shlex.quote(str(run.path))} {how}")


if __name__ == "__main__":
    run_main(main)
