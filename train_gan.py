"""Stage 1, TGCF-DA: trains f_seg on the source, then the generator G and the discriminator D.

    python train_gan.py cfg.yaml
    python train_gan.py configs/carla_camvid.yaml gan.lambda_sem=10 name=strict
    python train_gan.py cfg.yaml --restart                     begin anew; the old folder is kept aside

Reads the labelled source and the unlabelled target; writes OUTPUT/NAME/gan/fseg/ (f_seg) and OUTPUT/NAME/gan/
(G and D): last.pt, log.jsonl, TensorBoard events, image sheets. A run that was stopped continues from its
last checkpoint.
"""

from types import SimpleNamespace

from runtime import (
    Run, UserError, autocast, average_gradients, command_line, rank, run_main, seed_torch, write_json,
)  # fmt: skip

# isort: split
import numpy as np
import torch

from datasets import Batches, Scenes, colourise, make_sheet, measure, some_of, to_float, to_uint8
from losses import (
    class_weights, correlation, cross_entropy, iou_from_confusion, linear, lsgan_d, lsgan_g, poly, set_lr,
    style_statistics,
)  # fmt: skip
from models import adamw, build_discriminator, build_fseg, build_generator, check_sizes, load_net, load_trunk

# ------------------------------------------------------------------------------------------------------ f_seg
def fseg_step(f_seg, optimiser, x_s, y_s, weight, cast) -> dict:
    """One update of f_seg. weight: as in `cross_entropy`; the other arguments as in `gan_step`."""
    # L_fseg = CE(f_seg(x_s), y_s)
    with cast:
        logits = f_seg(x_s)
    L_fseg = cross_entropy(logits, y_s, weight)
    optimiser.zero_grad()
    L_fseg.backward()
    average_gradients(f_seg)
    optimiser.step()
    return {"L_fseg": L_fseg.detach()}


def train_fseg(cfg, source: Scenes, held_out: Scenes):
    """Trains (or loads) f_seg, prints its IoU on held-out source images, returns it frozen, in eval mode."""
    c, classes = cfg.fseg, source.classes
    run = Run(cfg, "gan/fseg", ("", "source", "fseg"), {"source train": source.digest}, c.steps)
    cast = autocast(run.device, run.precision)
    if not c.checkpoint and not run.finished():
        seed_torch(cfg.seed, "fseg", "init")
        f_seg = build_fseg(cfg, len(classes))
        if not run.state:
            load_trunk(f_seg, cfg, "fseg")
        f_seg = f_seg.to(run.device, memory_format=torch.channels_last)
        optimiser = adamw(f_seg, c.lr, cfg.head_lr, cfg.weight_decay)
        run.load(parts := {"f_seg": f_seg, "optimiser": optimiser})
        if cfg.compile:  # in place, so that the names in checkpoints stay
            f_seg.compile(dynamic=False)
        # Jitter makes f_seg judge content rather than colour: trained on the source as it is, it would reject
        # every image that does not look like the source, and G could not leave the source's look.
        batches = Batches(cfg, "fseg", {"source": source}, c.jitter, cfg.rare)
        weight = class_weights(source.pixels, cfg.balance).to(run.device) if cfg.balance else None
        f_seg.train()
        run.begin()
        for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
            seed_torch(cfg.seed, "fseg", step)  # dropout
            set_lr(optimiser, poly(step, c.steps))
            x_s, y_s = to_float(batch["x_s"], run.device), batch["y_s"].to(run.device).long()
            run.log(step, fseg_step(f_seg, optimiser, x_s, y_s, weight, cast))
            run.save(step, parts, classes=list(classes))
        run.close()
    f_seg, _ = load_net(c.checkpoint or run.path, "f_seg", build_fseg, classes, run.device)
    report_fseg(cfg, f_seg, held_out, run)
    return f_seg


def report_fseg(cfg, f_seg, held_out: Scenes, run: Run) -> None:
    """IoU of f_seg on held-out source images, to the screen and gan/fseg/held_out.json."""
    predict = autocast(run.device, run.precision)(f_seg)
    confusion = measure(predict, held_out, cfg.inference_batch, run.device).sum(0)
    iou, share = 100 * iou_from_confusion(confusion), confusion.sum(1) / confusion.sum()
    per_class = {n: float(v) for n, v in zip(held_out.classes, iou, strict=True) if not np.isnan(v)}
    report = {"mIoU": float(np.nanmean(iou)), "per class": per_class,
              "share": dict(zip(held_out.classes, share.tolist(), strict=True))}
    print(f"f_seg on {len(held_out)} held-out source images: mIoU {report['mIoU']:.1f}; "
          + ", ".join(f"{n} {v:.0f}" for n, v in per_class.items()))
    if blind := [n for k, n in enumerate(held_out.classes) if share[k] >= 0.01 and iou[k] < 10]:
        print(f"warning: f_seg hardly reads {', '.join(blind)}; G may repaint that as anything")
    if rank() == 0:
        write_json(run.folder / "held_out.json", report)


# ---------------------------------------------------------------------------------------------------- G and D
def warm_up_step(nets, x_s, x_t, cast) -> dict:
    """One update of G as an auto-encoder in both domains; arguments as in `gan_step`.

    Not in the paper: so that content, style and decoder mean something when D and f_seg begin to pull.
    """
    # L_rec = mean |G(x, x) - x|, one pass per domain
    nets.opt_g.zero_grad()
    terms = {"L_rec": 0}
    for x in (x_s, x_t):
        with cast:
            x_rec = nets.G(x, x)
        L_rec = (x_rec - x).abs().mean()
        L_rec.backward()
        terms["L_rec"] += L_rec.detach()
    average_gradients(nets.G)
    nets.opt_g.step()
    return terms


def gan_step(nets, x_s, x_t, y_s, c, cast) -> dict:
    """One update of D, then one of G, on one batch. Returns the loss terms, scalars.

    nets: G, D, f_seg (frozen, in eval mode), opt_g, opt_d; x_s, x_t: (N, 3, H, W) in [-1, 1]; y_s: (N, H, W)
    train ids; c: the config's `gan` section; cast: the context in which networks run. D is left in eval mode.
    """
    G, D, f_seg = nets.G, nets.D, nets.f_seg
    with cast:
        x_g = G(x_s, x_t)

    # L_D = E[(D(x_t) - 1)^2] + E[D(G(x_s, x_t))^2]
    D.train().requires_grad_(True)  # training mode is what makes spectral norm iterate: here, once a step
    nets.opt_d.zero_grad()
    with cast:
        scores = D(torch.cat([x_t, x_g.detach()]))
    real, fake = zip(*(score.chunk(2) for score in scores), strict=True)
    per_scale = lsgan_d(real, fake)
    L_D = sum(per_scale)
    L_D.backward()
    average_gradients(D)
    nets.opt_d.step()
    D.eval().requires_grad_(False)

    # L = L_GAN + lambda_sem L_sem;  L_GAN = E[(D(G(x_s, x_t)) - 1)^2],  L_sem = CE(f_seg(G(x_s, x_t)), y_s)
    nets.opt_g.zero_grad()
    with cast:
        scores, logits = D(x_g), f_seg(x_g)
    L_GAN, L_sem = lsgan_g(scores), cross_entropy(logits, y_s)
    loss, terms = L_GAN + c.lambda_sem * L_sem, {"L_D": L_D, "L_GAN": L_GAN, "L_sem": L_sem}
    terms |= {f"L_D/scale{k}": L for k, L in enumerate(per_scale, 1)}
    if c.lambda_rec:  # not in the paper: + lambda_rec L_rec;  L_rec = mean |G(x_t, x_t) - x_t|
        with cast:
            x_rec = G(x_t, x_t)
        terms["L_rec"] = (x_rec - x_t).abs().mean()
        loss = loss + c.lambda_rec * terms["L_rec"]
    loss.backward()
    average_gradients(G)
    nets.opt_g.step()
    return {name: term.detach() for name, term in terms.items()}


def build_nets(cfg, f_seg, run: Run) -> SimpleNamespace:
    """New G and D, their optimisers, and f_seg."""
    c = cfg.gan
    seed_torch(cfg.seed, "gan", "init")
    nets = SimpleNamespace(f_seg=f_seg, G=build_generator(cfg), D=build_discriminator(cfg))
    for net, opt, lr in ((nets.G, "opt_g", c.lr_g), (nets.D, "opt_d", c.lr_d)):
        net.to(run.device, memory_format=torch.channels_last)
        group = [{"params": net.parameters(), "base_lr": lr}]
        setattr(nets, opt, torch.optim.Adam(group, lr, (0.5, 0.999), weight_decay=c.weight_decay, fused=True))
        if cfg.compile:
            net.compile(dynamic=False)
    return nets


@torch.inference_mode()
def write_sheet(run: Run, step: int, nets, source: Scenes, target: Scenes) -> float:
    """Sheet of fixed source images under fixed guides. Returns how well style follows the guides, -1 to 1.

    Style is six numbers: mean and deviation of each colour channel. For each of 4 contents and each number,
    the Pearson correlation over 8 guides between the guide's and the repainted image's, then the mean.
    """
    contents, guides = some_of(source, 6, run.device), some_of(target, 8, run.device)
    cast, rows, follows = autocast(run.device, run.precision), [], []
    for x_s, x_t in zip(contents, guides, strict=False):  # two guides are left over
        with cast:
            x_g = nets.G(x_s[None], x_t[None])
            reading = nets.f_seg(x_g)[0].argmax(0).cpu()
        rows.append([to_uint8(x_s), to_uint8(x_g[0]), to_uint8(x_t), colourise(reading, source.classes)])
    for x_s in contents[:4]:
        with cast:
            x_g = torch.cat([nets.G(x_s[None], guide[None]) for guide in guides])
        follows.append(correlation(style_statistics(guides), style_statistics(x_g)))
    columns = ["source", "generated", "style guide", "f_seg of generated"]
    run.sheet(step, "generated", make_sheet(columns, rows))
    return float(np.mean(follows))


def symptoms(logged: list[dict], style_corr: float) -> list[str]:
    """What the last ten lines of the log and `write_sheet` say is wrong with G and D, each with its mend."""
    found, last = [], [line for line in logged[-10:] if "L_D" in line]
    for name in [name for name in (last[-1] if last else ()) if name.startswith("L_D/")]:
        L_D = np.mean([line[name] for line in last])
        if L_D > 0.49:  # D = 1/2 everywhere has 1/4 + 1/4
            found.append(f"{name} is {L_D:.2f}: D is at chance and teaches G nothing; raise gan.lr_d")
        if L_D < 0.05:
            found.append(f"{name} is {L_D:.2f}: D wins, and G learns nothing from it; lower gan.lr_d")
    if style_corr < 0.1:
        found.append(f"style_corr is {style_corr:.2f}: images do not follow guides; lower gan.lambda_sem")
    return found


def check_keys(cfg) -> None:
    """Raises UserError for what could only fail, or come to nothing, after hours of training."""
    check_sizes(cfg)
    if 0 < cfg.gan.steps <= cfg.gan.warmup_steps:
        raise UserError(f"gan.warmup_steps={cfg.gan.warmup_steps}: G would never see D; lower it")
    if not cfg.fseg.steps and not cfg.fseg.checkpoint:
        raise UserError("fseg.steps=0: f_seg would know nothing; raise it, or set fseg.checkpoint")


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}))
    check_keys(cfg)
    c = cfg.gan
    source, held_out = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "source", "val", labels=True)
    target = Scenes(cfg, "target", "train", labels=False)
    data = {"source train": source.digest, "target train": target.digest}
    run = Run(cfg, "gan", ("", "source", "target", "fseg", "gan"), data, c.steps, args.restart)
    if run.finished():
        return
    f_seg = train_fseg(cfg, source, held_out)
    if not c.steps:
        return print("gan.steps=0: only f_seg was trained; augment.py needs a generator")
    nets = build_nets(cfg, f_seg, run)
    run.load(parts := {name: getattr(nets, name) for name in ("G", "D", "opt_g", "opt_d")})
    cast = autocast(run.device, run.precision)
    batches = Batches(cfg, "gan", {"source": source, "target": target})
    sizes = [f"{n} {sum(p.numel() for p in getattr(nets, n).parameters()):,}" for n in ("G", "D", "f_seg")]
    print(f"gan: {len(source)} source and {len(target)} target images, crops of {c.crop or source.size}; by "
          f"scale a score of D sees {nets.D.receptive_field()} pixels; parameters: {', '.join(sizes)}")

    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        x_s, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        y_s = batch["y_s"].to(run.device).long()
        set_lr(nets.opt_g, linear(step, c.steps))
        set_lr(nets.opt_d, linear(step, c.steps))
        if step <= c.warmup_steps:
            set_lr(nets.opt_g, c.warmup_lr / max(c.lr_g, 1e-12))
            terms = warm_up_step(nets, x_s, x_t, cast)
            if step == c.warmup_steps:  # moments of another loss would make G's first updates far too large
                nets.opt_g.state.clear()
        else:
            terms = gan_step(nets, x_s, x_t, y_s, c, cast)
        if run.due("sheet", step):
            terms["style_corr"] = write_sheet(run, step, nets, source, target)
            run.warn(step, symptoms(run.logged, terms["style_corr"]))
        run.log(step, terms)
        run.save(step, parts, classes=list(source.classes))
    run.close()
    print(f"gan: {run.folder} is finished; next: python augment.py {args.items}")


if __name__ == "__main__":
    run_main(main)
