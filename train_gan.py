"""Stage 1, TGCF-DA: trains f_seg on the source, then the generator G and the discriminator D.

Reads the labelled source and the unlabelled target; writes OUTPUT/NAME/gan/fseg/ (f_seg) and OUTPUT/NAME/gan/ (G, D):
last.pt, log.jsonl, TensorBoard events and image sheets. A run that was stopped continues from its last checkpoint.

    python train_gan.py cfg.yaml
    python train_gan.py configs/carla_camvid.yaml gan.lambda_sem=10 name=strict
"""

import json
from pathlib import Path

import numpy as np
import torch

from datasets import Batches, Scenes, colourise, images_like, photometric_jitter, to_float
from evaluate import class_shares, correlation, evaluate_model, iou_from_confusion
from losses import class_weights, cross_entropy, labelled_pixels, lsgan_d, lsgan_g, style_loss, style_statistics
from models import FCN8s, Generator, build_discriminator, build_generator, synchronised
from runtime import (
    Run, UserError, agree, autocast, bare, command_line, load_checkpoint, load_optimiser, load_weights, make_sheet, parallel,
    random_generator, rank, run_main, seed_torch, set_lr, shown, silent, to_uint8, write_json,
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- f_seg


def fseg_step(f_seg, optimiser, x_s, y_s, cast, check, accumulate=1, weight=None) -> dict:
    """One update of f_seg, in training mode. Returns {L_fseg}; arguments as in `gan_step`, weight as in `cross_entropy`."""
    pixels, parts, L_fseg = labelled_pixels(y_s), [*zip(x_s.chunk(accumulate), y_s.chunk(accumulate), strict=True)], 0
    optimiser.zero_grad()
    for k, (x, y) in enumerate(parts, 1):
        with silent(f_seg, k < len(parts)):
            with cast:
                logits = f_seg(x)
            loss = cross_entropy(logits, y, pixels, weight)
            loss.backward()
        L_fseg = L_fseg + loss.detach()
    check({"L_fseg": L_fseg})
    optimiser.step()
    return {"L_fseg": L_fseg}


def train_fseg(cfg, source: Scenes, held_out: Scenes) -> FCN8s:
    """Trains (or loads) f_seg, prints its IoU on held-out source images, and returns it frozen, in eval mode."""
    c, classes = cfg.fseg, source.classes
    run = Run(cfg, "fseg", Path(cfg.output, cfg.name, "gan", "fseg"), ("", "source", "fseg"), {"source train": source.digest})
    seed_torch(cfg.seed, "fseg", "init")
    f_seg = FCN8s(len(classes), c.width, c.batch_norm, c.dropout, c.pretrained if not run.state else "none")
    f_seg = synchronised(f_seg.to(run.device, memory_format=torch.channels_last), run.device)
    optimiser = torch.optim.Adam(f_seg.parameters(), c.lr, fused=True)
    if run.state:
        load_weights(f_seg, run.state.get("f_seg"), run.checkpoint)
        load_optimiser(optimiser, run.state.get("optimiser"), run.checkpoint)
    elif c.checkpoint:
        mend = "fseg.checkpoint is the last.pt of a gan/fseg folder; null trains one"
        given = load_checkpoint(c.checkpoint, mend, ("f_seg",))
        if given.get("classes") != list(classes):
            raise UserError(f"{c.checkpoint}: f_seg of classes {shown(given.get('classes'))}, not the config's {list(classes)}")
        load_weights(f_seg, given["f_seg"], c.checkpoint)
    if cfg.compile:  # in place, so that the names in checkpoints stay; shapes are constant in the steps
        f_seg.compile(dynamic=False)
    steps, cast = 0 if c.checkpoint else c.steps, autocast(run.device, run.precision)

    def state():
        return {"f_seg": f_seg.state_dict(), "optimiser": optimiser.state_dict(), "classes": list(classes)}

    def check(terms):  # of the loop's current step
        run.check(step, steps, terms, state, batch)

    if not run.finished(steps):
        # Photometric jitter makes f_seg judge content rather than colour: trained on the source as it is, it would reject
        # every image that does not look like the source, and G could not leave the source's look.
        batches = Batches(cfg, "fseg", c.batch, c.crop, source=source, jitter=c.jitter)
        weight = class_weights(source.pixels, c.sup_balance).to(run.device) if c.sup_balance else None
        f_seg.train()
        shared = parallel(f_seg, run.device)
        for step, batch in run.progress(batches.loader(run.start, steps, cfg.workers), steps, "f_seg", state):
            seed_torch(cfg.seed, "fseg", step)  # dropout
            set_lr(optimiser, c.lr, c.schedule, step, steps)
            x_s, y_s = to_float(batch["x_s"], run.device), batch["y_s"].to(run.device, non_blocking=True).long()
            terms = fseg_step(shared, optimiser, x_s, y_s, cast, check, c.accumulate, weight)
            if run.due("log", step, steps):
                run.log(step, **terms)
        run.close()

    f_seg.eval().requires_grad_(False)
    report = run.folder / "held_out.json"
    if agree(not report.exists())[0]:
        ious = judge_fseg(cfg, f_seg, held_out, run)
        if rank() == 0:
            write_json(report, ious)
    else:
        ious = json.loads(report.read_text())
    print(f"f_seg on {len(held_out)} held-out source images, mIoU: "
          + ", ".join(f"{ious[name]['mIoU']:.1f} {name}" for name in ious))
    print("  per class as it is: " + ", ".join(f"{name} {iou:.0f}" for name, iou in ious["as it is"]["per class"].items()))
    return f_seg


@torch.compiler.set_stance("force_eager")  # other shapes than the steps', a few times: not worth compiling
def judge_fseg(cfg, f_seg: FCN8s, held_out: Scenes, run: Run) -> dict:
    """IoU in % of f_seg on held-out source images, as they are and jittered: {as it is: {mIoU, per class}, jittered: ...}."""
    def predict(x):
        with autocast(run.device, run.precision):
            return f_seg(x)

    def predict_jittered(x):
        rng = random_generator(cfg.seed, "fseg", "held-out jitter")
        return predict(torch.stack([photometric_jitter((i + 1) / 2, 1.0, rng) * 2 - 1 for i in x.cpu()]).to(x))

    result = {}
    for name, p in (("as it is", predict), ("jittered", predict_jittered)):
        iou = 100 * iou_from_confusion(evaluate_model(p, held_out, cfg.eval.batch, run.device, "f_seg, held-out source"))
        result[name] = {"mIoU": float(np.nanmean(iou)),
                        "per class": {n: float(v) for n, v in zip(held_out.classes, iou, strict=True) if not np.isnan(v)}}
    return result


# ------------------------------------------------------------------------------------------------- how style follows


def style_correlation(generate, contents: torch.Tensor, guides: torch.Tensor) -> float:
    """How well a generated image follows its guide's style, -1 to 1; 1 follows, 0 does not depend on it.

    generate(x_s, x_t): the generator; contents: (M, 3, H, W); guides: (K, 3, H, W), K > 2. Style is six numbers: mean
    and deviation of each colour channel over the image. For every content and number, the Pearson correlation over
    the K guides between the guide's and the generated image's is taken, then the mean over contents and numbers. A
    number that does not vary over the guides counts as correlation 0.
    """
    wanted = style_statistics(guides)
    return float(np.mean([
        correlation(wanted, style_statistics(torch.cat([generate(content[None], guide[None]) for guide in guides])))
        for content in contents]))


# ---------------------------------------------------------------------------------------------------------- G and D


def warm_up_step(G, opt_g, x_s, x_t, cast, check, accumulate=1) -> dict:
    """One update of G as an auto-encoder, G(x, x) = x in both domains. Returns {L_rec}, their sum; arguments as in `gan_step`.

    Not in the paper: so that content, style and decoder mean something when D and f_seg begin to pull.
    """
    opt_g.zero_grad()
    parts, L_rec = [*x_s.chunk(accumulate), *x_t.chunk(accumulate)], 0
    for k, x in enumerate(parts, 1):  # one forward and backward pass at a time: the domains' sizes may differ
        with silent(G, k < len(parts)):
            with cast:
                x_rec = G(x, x)
            loss = (x_rec - x).abs().mean() / accumulate
            loss.backward()
        L_rec = L_rec + loss.detach()
    check({"L_rec": L_rec})
    opt_g.step()
    return {"L_rec": L_rec}


def gan_step(G, D, f_seg, opt_g, opt_d, x_s, x_t, y_s, lambda_sem, cast, check, accumulate=1, lambda_style=0.0,
             lambda_rec=0.0) -> dict:
    """One update of D, then one of G, on one batch. Returns {L_D, L_GAN, L_sem}, scalars, and L_style and L_rec if weighted.

    f_seg: frozen, in eval mode; x_s, x_t: (N, 3, H, W) in [-1, 1] on the networks' device; y_s: (N, H, W) train ids;
    cast: the context in which networks run; check(terms): called with the losses before each update, to raise where
    one is not finite; accumulate: parts in which the batch passes. D is left frozen and in eval mode.
    """
    parts = [*zip(x_s.chunk(accumulate), x_t.chunk(accumulate), y_s.chunk(accumulate), strict=True)]
    pixels, generated = labelled_pixels(y_s), []

    # L_D = E[(D(x_t) - 1)^2] + E[D(G(x_s, x_t))^2]
    D.train().requires_grad_(True)  # training mode is what makes spectral norm iterate: here, once a step
    opt_d.zero_grad()
    L_D = 0
    for k, (s, t, _) in enumerate(parts, 1):
        # Generated once: D's update sees it detached, G's goes back through it. Only where memory is so short that the
        # batch is divided, G's activations are not kept for that, and it passes again.
        with cast, torch.set_grad_enabled(accumulate == 1):
            x_g = G(s, t)
        generated.append(x_g)
        with silent(D, k < len(parts)):
            with cast:
                real, fake = D(t, x_g.detach())
            loss = lsgan_d(real, fake) / accumulate
            loss.backward()
        D.train(False)
        L_D = L_D + loss.detach()
    check({"L_D": L_D})
    opt_d.step()

    # L = L_GAN + lambda_sem * L_sem;  L_GAN = E[(D(G(x_s, x_t)) - 1)^2],  L_sem = CE(f_seg(G(x_s, x_t)), y_s)
    # and, not in the paper, + lambda_style * L_style + lambda_rec * L_rec;  L_rec = mean |G(x_t, x_t) - x_t|
    D.requires_grad_(False)
    opt_g.zero_grad()
    L_GAN = L_sem = L_style = L_rec = 0
    for k, (s, t, y) in enumerate(parts, 1):
        with silent(G, k < len(parts)):
            with cast:
                x_g = generated[0] if accumulate == 1 else G(s, t)
                scores, logits = bare(D)(x_g), f_seg(x_g)
            gan, sem = lsgan_g(scores) / accumulate, cross_entropy(logits, y, pixels)
            loss = gan + lambda_sem * sem
            if lambda_style:
                style = style_loss(x_g, t) / accumulate
                loss, L_style = loss + lambda_style * style, L_style + style.detach()
            if lambda_rec:
                with cast:
                    x_rec = bare(G)(t, t)  # one pass per step is the wrapper's; gradients are shared all the same
                rec = (x_rec - t).abs().mean() / accumulate
                loss, L_rec = loss + lambda_rec * rec, L_rec + rec.detach()
            loss.backward()
        L_GAN, L_sem = L_GAN + gan.detach(), L_sem + sem.detach()
    terms = {"L_GAN": L_GAN, "L_sem": L_sem} | ({"L_style": L_style} if lambda_style else {}) \
        | ({"L_rec": L_rec} if lambda_rec else {})
    check(terms)
    opt_g.step()
    return {"L_D": L_D, **terms}


def check_depth(cfg) -> None:
    """Raises UserError where G or D has more strided layers than the training images have pixels for."""
    c, size = cfg.gan, cfg.gan.crop or [min(sides) for sides in zip(cfg.source.size, cfg.target.size, strict=True)]
    with torch.device("meta"):  # shapes without numbers: costs nothing at any width
        x, nets = torch.empty(1, 3, *size), {
            f"gan.downsamples={c.downsamples}": build_generator(cfg),
            f"gan.d_layers={c.d_layers}, gan.d_scales={c.d_scales}": build_discriminator(cfg),
        }
        for keys, net in nets.items():
            try:
                net(*[x] * (2 if isinstance(net, Generator) else 1))
            except (RuntimeError, ValueError):  # instance norm has its own word for a single pixel
                raise UserError(f"{keys}: too deep for images of {size[0]}x{size[1]} pixels; lower it, or raise the "
                                "size or crop") from None


def main() -> None:
    def arguments(parser):
        parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept aside")

    cfg, args = command_line(__doc__, ("", "source", "target", "fseg", "gan"), arguments)
    source, held_out = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "source", "val", labels=True)
    target = Scenes(cfg, "target", "train", labels=False)
    classes, c = source.classes, cfg.gan
    check_depth(cfg)

    run = Run(cfg, "gan", Path(cfg.output, cfg.name, "gan"), ("", "source", "target", "fseg", "gan"),
              {"source train": source.digest, "target train": target.digest}, args.restart)
    if run.finished(c.steps):
        return
    f_seg = train_fseg(cfg, source, held_out)
    seed_torch(cfg.seed, "gan", "init")
    G, D = build_generator(cfg), build_discriminator(cfg)
    G, D = (net.to(run.device, memory_format=torch.channels_last) for net in (G, D))
    opt_g = torch.optim.Adam(G.parameters(), c.lr_g, (0.5, 0.999), weight_decay=c.weight_decay, fused=True)
    opt_d = torch.optim.Adam(D.parameters(), c.lr_d, (0.5, 0.999), weight_decay=c.weight_decay, fused=True)
    if run.state:
        for name, part in (("G", G), ("D", D)):
            load_weights(part, run.state.get(name), run.checkpoint)
        for name, optimiser in (("opt_g", opt_g), ("opt_d", opt_d)):
            load_optimiser(optimiser, run.state.get(name), run.checkpoint)
    if cfg.compile:
        G.compile(dynamic=False)
        D.compile(dynamic=False)
    print(f"gan: {len(source)} source and {len(target)} target images, {c.steps} steps of {c.batch}, parameters: "
          + ", ".join(f"{n} {sum(p.numel() for p in m.parameters()):,}" for n, m in (("G", G), ("D", D), ("f_seg", f_seg))))

    def state():
        return {"G": G.state_dict(), "D": D.state_dict(), "opt_g": opt_g.state_dict(), "opt_d": opt_d.state_dict(),
                "classes": list(classes)}

    def spread(scenes, count):  # fixed examples, evenly over the data set
        return to_float(torch.stack([scenes.image(i) for i in np.linspace(0, len(scenes) - 1, count).astype(int)]), run.device)

    contents, guides = spread(source, 6), spread(target, 8)
    cast = autocast(run.device, run.precision)

    @torch.compiler.set_stance("force_eager")
    @torch.inference_mode()
    def generate(x_s, x_t):
        with cast:
            return G(x_s, x_t)

    @torch.compiler.set_stance("force_eager")
    @torch.inference_mode()
    def write_sheet(step):
        rows = []
        for x_s, x_t in zip(contents, guides):  # noqa: B905  two guides are left over
            x_g = generate(x_s[None], x_t[None])
            with cast:
                reading = f_seg(x_g)[0].argmax(0).cpu()
            rows.append([to_uint8(x_s), to_uint8(x_g[0]), to_uint8(x_t), colourise(reading, classes)])
        run.sheet(step, "generated", make_sheet(["source", "generated", "style guide", "f_seg of generated"], rows))

    def check(terms):  # of the loop's current step
        run.check(step, c.steps, terms, state, batch)

    shared_G, shared_D = (parallel(net, run.device) for net in (G, D))
    weights = None
    if c.content:  # D would tell the domains by their content
        weights = images_like(source, class_shares(f_seg, target, cfg.eval.batch, run.device, run.precision), c.content)
    batches = Batches(cfg, "gan", c.batch, c.crop, source=source, target=target, weights=weights)
    for step, batch in run.progress(batches.loader(run.start, c.steps, cfg.workers), c.steps, "gan", state):
        x_s, x_t = to_float(batch["x_s"], run.device), to_float(batch["x_t"], run.device)
        set_lr(opt_g, c.lr_g, c.schedule, step, c.steps)
        set_lr(opt_d, c.lr_d, c.schedule, step, c.steps)
        if step <= c.warmup_steps:
            if c.warmup_lr is not None:
                set_lr(opt_g, c.warmup_lr, "constant", step, c.steps)
            terms = warm_up_step(shared_G, opt_g, x_s, x_t, cast, check, c.accumulate)
        else:
            y_s = batch["y_s"].to(run.device, non_blocking=True).long()
            terms = gan_step(shared_G, shared_D, f_seg, opt_g, opt_d, x_s, x_t, y_s, c.lambda_sem, cast, check, c.accumulate,
                             c.lambda_style, c.lambda_rec)
        if run.due("sheet", step, c.steps):
            terms["style_corr"] = style_correlation(generate, contents[:4], guides)
            write_sheet(step)
        if "style_corr" in terms or run.due("log", step, c.steps):
            run.log(step, **terms)
    run.close()
    print(f"gan: finished; next: python augment.py {' '.join(args.items)}".rstrip())


if __name__ == "__main__":
    run_main(main)
