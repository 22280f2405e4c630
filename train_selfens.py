"""Stage 3, self-ensembling: a student and its mean teacher learn from source, augmented and target images.

Reads the labelled source, the unlabelled target, OUTPUT/NAME/augmented/ (variants tgcf_da and tgcf_da_se) and the
target's training labels (variant target_only, the upper bound, alone). Writes OUTPUT/NAME/selfens/VARIANT/: last.pt,
log.jsonl, TensorBoard events and image sheets. A run that was stopped continues from its last checkpoint.

    python train_selfens.py
    python train_selfens.py cfg.yaml selfens.variant=source_only seed=1

The variants differ in the terms of one objective, L = L_sup + delta_con * L_con:
    source_only        L_sup = CE(f_S(x_s), y_s)
    self_ensembling    L_sup = CE(f_S(x_s), y_s),                      with L_con
    tgcf_da            L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s)
    tgcf_da_se         L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s),  with L_con
    target_only        L_sup = CE(f_S(x_t), y_t)
"""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from augment import build_translator, open_augmented
from datasets import Batches, Scenes, colourise, has_labels, images_like, to_float
from evaluate import class_shares, load_fseg
from losses import class_weights, consistency, cross_entropy, labelled_pixels, sigmoid_ramp_up
from models import DeepLabVGG16, build_segmenter, own_fseg, synchronised
from runtime import (
    Run, UserError, autocast, command_line, heat, load_optimiser, load_weights, make_sheet, own_part, parallel, run_main,
    seed_torch, set_lr, silent, to_uint8, whole_batch,
)  # fmt: skip

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class MovingAverage:
    """The teacher: t_i = alpha * t_(i-1) + (1 - alpha) * s_i over weights and batch-norm statistics; counters are copied.

    Without the statistics the teacher would normalise by those of a network that it no longer is. The lists of tensors
    are made once (collecting them takes longer than averaging them), so both networks must keep their storage.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module):
        ours, theirs = teacher.state_dict(), student.state_dict()
        assert ours.keys() == theirs.keys()
        pairs = [(t, theirs[name]) for name, t in ours.items()]
        self.averaged = [*zip(*((t, s) for t, s in pairs if t.is_floating_point()), strict=True)]
        self.copied = [*zip(*((t, s) for t, s in pairs if not t.is_floating_point()), strict=True)]

    @torch.no_grad()
    def update(self, ema_decay: float) -> None:
        """One step with alpha = ema_decay, 0 to 1: a kernel over all tensors where the device has one."""
        torch._foreach_lerp_(*self.averaged, 1 - ema_decay)
        if self.copied:  # batch norm's
            torch._foreach_copy_(*self.copied)


def track_statistics(model: nn.Module, on: bool) -> None:
    """Whether a pass in training mode moves batch norm's running statistics; it normalises by the batch's own either way."""
    for m in model.modules():
        if isinstance(m, BATCH_NORMS):
            m.momentum = 0.1 if on else 0.0


class DomainPasses(nn.Module):
    """The student's passes of one step as one module, so that whatever wraps it sees one forward and one backward.

    With batch norm each domain is normalised by its own batch statistics. The running ones, which the teacher and the
    evaluation use, are those of the last domain: of target images wherever there are any. Domains of one size pass
    together, the normalisation alone being divided, which is faster, most of all at batch 1 (README, Speed). Others pass
    one after the other.

    borrows: the last domain is normalised by the running statistics, and these are those of the domain before it.
    """

    def __init__(self, net: nn.Module, borrows: bool = False):
        super().__init__()
        self.net, self.layers, self.borrows = net, [m for m in net.modules() if hasattr(m, "domains")], borrows
        self.norms = [m for m in net.modules() if isinstance(m, BATCH_NORMS)]
        for m in self.norms:
            m.borrows = borrows

    def forward(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """One (N, 3, H, W) batch per domain -> the logits of each, (N, classes, ceil(H/8), ceil(W/8))."""
        if len({x.shape for x in batches}) > 1:
            return self.one_by_one(batches)
        for m in self.layers:
            m.domains = len(batches)
        logits = self.net(torch.cat(batches)).chunk(len(batches))
        for m in self.layers:
            m.domains = 1
        return [*logits]

    def one_by_one(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        """The same from a pass per domain."""
        logits = []
        for k, x in enumerate(batches, 1):
            last = k == len(batches)
            track_statistics(self.net, k == len(batches) - self.borrows)
            for m in self.norms:
                m.train(not (self.borrows and last))
            logits.append(self.net(x))
        for m in self.norms:
            m.train()
        return logits


@torch.compiler.set_stance("force_eager")  # once per checkpoint
@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: list[torch.Tensor], autocast_context) -> None:
    """Sets batch norm's running statistics to their mean over these batches of (N, 3, H, W) images, without dropout.

    Averaged weights are a network of their own, whose activations no running average of the student's describes exactly
    (Izmailov et al. 2018, stochastic weight averaging); and the student's come from images with noise added.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)]
    if not norms:
        return
    model.eval()
    for m in norms:
        m.train()
        m.reset_running_stats()
        m.momentum = None  # a cumulative mean
    with autocast_context:
        for x in batches:
            model(x)
    model.train()
    track_statistics(model, False)


def selfens_step(passes, teacher, average, optimiser, x, y_s, noise_std, delta_con, ema_decay, cast, check,
                 accumulate=1, consistency=consistency, weight=None) -> dict:
    """One update of the student and of its mean. Returns {L, L_sup} and, with target images, L_con and delta_con.

    passes: DomainPasses of the student; teacher: in training mode, statistics not tracked; average: MovingAverage of
    the two; x: {x_s, and as the variant has them x_g, x_t: (N, 3, H, W) in [-1, 1] on the networks' device}; y_s: (N, H,
    W) train ids; cast: the context in which networks run; check(terms): called with the losses before the update, to
    raise where one is not finite; accumulate: parts in which the batch passes (batch norm's statistics are the parts');
    consistency: L_con of the student's and the teacher's logits; weight: of the classes in L_sup, as in `cross_entropy`.
    """
    def noisy(x_t):
        noise = whole_batch(x_t)
        noise.permute(0, 2, 3, 1).normal_()  # in memory's order, which takes a CPU a ninth of the time
        return x_t + noise_std * own_part(noise)

    pixels, L_sup, L_con = labelled_pixels(y_s), 0, 0
    x = x | ({"x_t": noisy(x["x_t"]), "seen_by_teacher": noisy(x["x_t"])} if "x_t" in x else {})
    parts = [dict(zip(x, part, strict=True)) for part in zip(*(images.chunk(accumulate) for images in x.values()), strict=True)]
    optimiser.zero_grad()
    for k, (part, y) in enumerate(zip(parts, y_s.chunk(accumulate), strict=True), 1):
        seen_by_teacher = part.pop("seen_by_teacher", None)
        with silent(passes, k < len(parts)):
            with cast:
                logits = dict(zip(part, passes([*part.values()]), strict=True))

            # L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s)
            sup = sum(cross_entropy(DeepLabVGG16.upsample(logits[name], y.shape[-2:]), y, pixels, weight)
                      for name in part if name != "x_t")
            loss, L_sup = sup, L_sup + sup.detach()

            # L = L_sup + delta_con * L_con;  L_con = mean (softmax f_S(x_t + n) - softmax f_T(x_t + n'))^2
            if "x_t" in part:
                with torch.inference_mode(), cast:
                    teacher_logits = teacher(seen_by_teacher)
                # A copy, because autograd refuses tensors of inference mode.
                con = consistency(logits["x_t"], teacher_logits.clone()) / accumulate
                loss, L_con = loss + delta_con * con, L_con + con.detach()
            loss.backward()

    terms = {"L_sup": L_sup} | ({"L_con": L_con, "delta_con": delta_con} if "x_t" in x else {})
    check(terms)
    optimiser.step()
    average.update(ema_decay)
    return {"L": L_sup + delta_con * L_con, **terms}


def main() -> None:
    def arguments(parser):
        parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept aside")

    cfg, args = command_line(__doc__, ("", "source", "target", "augment", "selfens"), arguments)
    c = cfg.selfens
    variant = c.variant
    use_augmented, use_consistency = variant in ("tgcf_da", "tgcf_da_se"), variant in ("self_ensembling", "tgcf_da_se")

    # Target labels are read by target_only and by nobody else.
    labelled = Scenes(cfg, "target" if variant == "target_only" else "source", "train", labels=True)
    repaint, like_target = use_augmented and c.repaint, c.content and variant != "target_only"
    augmented = open_augmented(cfg, labelled) if use_augmented and not repaint else None
    target_images = Scenes(cfg, "target", "train", labels=False) if use_consistency or repaint or like_target else None
    target = target_images if use_consistency else None
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    classes = labelled.classes

    data = {f"{labelled.role} train": labelled.digest} | ({"augmented": augmented.digest} if augmented else {}) \
        | ({"target train": target_images.digest} if target_images else {})
    if repaint:
        translate, ready, data["generator"] = build_translator(cfg, labelled, data)
        if ready:
            raise UserError("selfens.repaint=true: augment.method=folder has no translator; set it to false")
    if like_target:
        f_seg, data["f_seg"] = load_fseg(own_fseg(cfg, "selfens.content reads the target by f_seg")[0], classes, "cpu")
    run = Run(cfg, "selfens", Path(cfg.output, cfg.name, "selfens", variant),
              ("", "source", "target", *["augment"] * use_augmented, "selfens"), data, args.restart)
    if run.finished(c.steps):
        return
    seed_torch(cfg.seed, "selfens", "init")
    student = build_segmenter(cfg, len(classes), "none" if run.state else c.pretrained)
    student = synchronised(student.to(run.device, memory_format=torch.channels_last), run.device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.Adam(student.parameters(), c.lr, weight_decay=c.weight_decay, fused=True)
    if run.state:
        load_weights(student, run.state.get("student"), run.checkpoint)
        load_weights(teacher, run.state.get("teacher"), run.checkpoint)
        load_optimiser(optimiser, run.state.get("optimiser"), run.checkpoint)
    if cfg.compile:  # in place, so that the names in checkpoints stay; after copying, each for itself
        student.compile(dynamic=False)
        teacher.compile(dynamic=False)
    borrows = c.statistics == "labelled" and use_consistency  # target images are normalised as the labelled ones are
    passes, cast = parallel(DomainPasses(student, borrows), run.device), autocast(run.device, run.precision)
    average = MovingAverage(teacher, student)
    L_con = partial(consistency, confidence=c.con_confidence, balance=c.con_balance)
    weight = class_weights(labelled.pixels, c.sup_balance).to(run.device) if c.sup_balance else None
    print(f"selfens: {variant}: {len(labelled)} labelled"
          + (f", {len(augmented)} augmented" if augmented else ", repainted in each step" if repaint else "")
          + (f", {len(target)} target" if target else "")
          + f" images, {c.steps} steps of {c.batch} per domain, {sum(p.numel() for p in student.parameters()):,} parameters")

    weights = None
    if like_target:
        shares = class_shares(f_seg.to(run.device), target_images, cfg.eval.batch, run.device, run.precision)
        weights = images_like(labelled, shares, c.content)
        print("selfens: content, source / target as f_seg reads it / source as drawn: " + ", ".join(
            f"{name} {100 * a:.1f} / {100 * b:.1f} / {100 * d:.1f} %" for name, a, b, d in
            zip(classes, labelled.shares.mean(0), shares, weights @ labelled.shares, strict=True)))
    drawn = {"weights": weights, "guides": target_images if repaint else None}
    domains = {"source": labelled, "augmented": augmented, "target": target}
    batches = Batches(cfg, "selfens", c.batch, c.crop, **domains, **drawn, jitter=c.jitter)

    def paint(batch):
        """Adds x_g, (N, 3, h, w) uint8 as augment.py would have stored it, on the device."""
        if "content" in batch:
            with torch.no_grad(), cast:
                x_g = translate(to_float(batch["content"], run.device), to_float(batch["style"], run.device))
            batch["x_g"] = (x_g.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
        return batch

    # The images that batch norm's statistics are estimated on, not jittered.
    if c.statistics == "target" and not target:
        domains = {"target": Scenes(cfg, "target", "train", labels=False)}
    elif c.statistics == "labelled":
        domains = domains | {"target": None}
    elif c.statistics != "all" and target:
        domains = {"target": target}
    of_last = "x_t" if domains.get("target") else "x_g" if use_augmented else "x_s"
    used = ("x_s", "x_g", "x_t") if c.statistics == "all" else (of_last,)
    few = Batches(cfg, "selfens", c.batch, c.crop, **domains, **drawn)
    sample = [x.cpu() for k in range(32) for name, x in paint(few[k]).items() if name in used]

    def readable_teacher():
        """Whenever its running statistics are used they are made anew, so that nothing depends on when that was last.

        With `borrows` every step uses them: they stay the average of the student's, which are of clean images there.
        """
        if not borrows:
            estimate_statistics(teacher, [to_float(x, run.device) for x in sample], cast)
        return teacher

    def training_mode():
        """Of both: dropout is one of the perturbations, and a teacher that normalises by running statistics while the student
        uses the batch's disagrees with it for no good reason; L_con then flattens the rare classes."""
        student.train()
        teacher.train()
        track_statistics(teacher, False)  # they are averaged from the student's
        for m in teacher.modules():
            if borrows and isinstance(m, BATCH_NORMS):
                m.eval()  # as the student's for target images

    def state():
        return {"student": student.state_dict(), "teacher": readable_teacher().state_dict(),
                "optimiser": optimiser.state_dict(), "classes": list(classes), "variant": variant}

    def check(terms):  # of the loop's current step
        run.check(step, c.steps, terms, state, batch)

    shown = np.linspace(0, len(val) - 1, 4).astype(int)

    @torch.compiler.set_stance("force_eager")
    @torch.inference_mode()
    def write_sheet(step):
        x_t = to_float(torch.stack([val.image(i) for i in shown]), run.device)
        student.eval()
        readable_teacher().eval()
        with cast:
            z_s = student(x_t + c.noise_std * torch.randn_like(x_t))
            z_t = teacher(x_t + c.noise_std * torch.randn_like(x_t))
        training_mode()
        size = x_t.shape[-2:]
        # Half the squared distance of two softmaxes lies in [0, 1]; the root makes small ones visible.
        gap = ((z_s.float().softmax(1) - z_t.float().softmax(1)).square().sum(1, keepdim=True) / 2).sqrt()
        gap = student.upsample(gap, size)[:, 0]
        readings = [student.upsample(z, size).argmax(1).cpu() for z in (z_s, z_t)]
        rows = [[to_uint8(x_t[k]), colourise(readings[0][k], classes), colourise(readings[1][k], classes), heat(gap[k]),
                 colourise(val.label(i), classes)] for k, i in enumerate(shown)]
        run.sheet(step, "consistency", make_sheet(["target (val)", "student", "teacher", "inconsistency", "label"], rows))

    training_mode()
    for step, batch in run.progress(batches.loader(run.start, c.steps, cfg.workers), c.steps, variant, state):
        seed_torch(cfg.seed, "selfens", step)  # noise and dropout
        set_lr(optimiser, c.lr, c.schedule, step, c.steps)
        batch = paint(batch)
        x = {name: to_float(batch[name], run.device) for name in ("x_s", "x_g", "x_t") if name in batch}
        y_s = batch["y_s"].to(run.device, non_blocking=True).long()
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps)
        # The true mean over the first steps, as in Mean Teacher: the random start does not linger in the teacher.
        alpha = min(c.ema_decay, 1 - 1 / step)
        terms = selfens_step(passes, teacher, average, optimiser, x, y_s, c.noise_std, delta_con, alpha, cast, check,
                             c.accumulate, L_con, weight)

        if run.due("sheet", step, c.steps):
            write_sheet(step)
        if c.snapshot_every and step % c.snapshot_every == 0:
            run.snapshot(step, "teacher", teacher=readable_teacher().state_dict(), classes=list(classes), variant=variant)
        if run.due("log", step, c.steps):
            run.log(step, **terms, lr=optimiser.param_groups[0]["lr"])
    run.close()
    print(f"selfens: {variant} finished; next: python evaluate.py {' '.join([*args.items, '--split', 'val'])}")


if __name__ == "__main__":
    run_main(main)
