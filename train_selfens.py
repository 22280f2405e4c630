"""Stage 3, self-ensembling: a student and its mean teacher learn from source, augmented and target images.

    python train_selfens.py
    python train_selfens.py cfg.yaml selfens.variant=source_only seed=1
    python train_selfens.py cfg.yaml --restart                 begin anew; the old folder is kept aside
    python train_selfens.py cfg.yaml target.labelled=16        learn from 16 labelled target images, too

Reads the labelled source, the unlabelled target, OUTPUT/NAME/augmented/ (variants tgcf_da and tgcf_da_se) and
the target's training labels (variant target_only, the upper bound; N of them where target.labelled=N). Writes
OUTPUT/NAME/selfens/VARIANT/: last.pt, log.jsonl, TensorBoard events and image sheets. A run that was stopped
continues from its last checkpoint.

The log has the teacher's mIoU on the target's val split, where that has labels; nothing is chosen by it.

The variants differ in the terms of one objective, L = L_sup + delta_con L_con:
    source_only        L_sup = CE(f_S(x_s), y_s)
    self_ensembling    L_sup = CE(f_S(x_s), y_s),                      with L_con
    tgcf_da            L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s)
    tgcf_da_se         L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s),  with L_con
    target_only        L_sup = CE(f_S(x_t), y_t)
Not in the paper: with target.labelled, L_sup has CE(f_S(x_l), y_l), too.
"""

import copy
import shlex
from types import SimpleNamespace

from runtime import (
    Run, UserError, all_reduce, autocast, average_gradients, command_line, run_main, seed_torch,
)  # fmt: skip

# isort: split
import numpy as np
import torch

from datasets import Augmented, Batches, Scenes, colourise, evenly, has_labels, make_sheet, measure, to_float
from datasets import to_uint8
from losses import (
    class_weights, consistency, cross_entropy, iou_from_confusion, poly, set_lr, sigmoid_ramp_up,
)  # fmt: skip
from models import adamw, build_segmenter, load_trunk, upsample


@torch.no_grad()
def update_teacher(teacher, student, alpha: float) -> None:
    """t_i = alpha t_(i-1) + (1 - alpha) s_i for every weight; the trunk's fixed statistics are equal."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - alpha)


def selfens_step(nets, batch: dict, c, delta_con: float, alpha: float, cast) -> dict:
    """One update of the student and of the teacher. Returns the loss terms, scalars.

    nets: student, teacher, optimiser and weight (of the classes, or None); batch: {x_s, and as the variant
    has them x_g, x_t and x_l: (N, 3, H, W) in [-1, 1], y_s, y_l: (N, H, W) train ids}; c: the config's
    `selfens` section; alpha: the teacher's part in its average; cast: the context in which networks run. Each
    domain has its own forward and backward pass.
    """
    student, teacher = nets.student, nets.teacher
    nets.optimiser.zero_grad()

    # L_sup = CE(f_S(x_s), y_s) + CE(f_S(x_g), y_s);  not in the paper: + CE(f_S(x_l), y_l)
    terms = {"L_sup": 0}
    for x, y in [(x, y) for x, y in (("x_s", "y_s"), ("x_g", "y_s"), ("x_l", "y_l")) if x in batch]:
        with cast:
            logits = student(batch[x])
        logits = upsample(logits, student.stride, batch[y].shape[-2:])
        L_sup = cross_entropy(logits, batch[y], nets.weight)
        L_sup.backward()
        terms["L_sup"] += L_sup.detach()

    # L_con = mean over cells, sum over classes, of (softmax f_S(x_t + n) - softmax f_T(x_t + n'))^2
    if "x_t" in batch:
        x_t = batch["x_t"]
        with torch.no_grad(), cast:
            teacher_logits = teacher(x_t + c.noise_std * torch.randn_like(x_t))
        with cast:
            logits = student(x_t + c.noise_std * torch.randn_like(x_t))
        L_con = consistency(logits, teacher_logits)
        (delta_con * L_con).backward()
        terms |= {"L_con": L_con.detach(), "delta_con": delta_con}

    average_gradients(student)
    nets.optimiser.step()
    update_teacher(teacher, student, alpha)
    # L = L_sup + delta_con L_con
    return {"L": terms["L_sup"] + delta_con * terms.get("L_con", 0)} | terms


def build_nets(cfg, labelled: Scenes, run: Run) -> SimpleNamespace:
    """A new student, its teacher and optimiser, and the weight of each class."""
    c = cfg.selfens
    seed_torch(cfg.seed, "selfens", "init")
    student = build_segmenter(cfg, len(labelled.classes))
    if not run.state:
        load_trunk(student, cfg, "selfens")
    student = student.to(run.device, memory_format=torch.channels_last)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimiser = adamw(student, c.lr, cfg.head_lr, cfg.weight_decay)
    weight = class_weights(labelled.pixels, cfg.balance).to(run.device) if cfg.balance else None
    nets = SimpleNamespace(student=student, teacher=teacher, optimiser=optimiser, weight=weight)
    for net in (student, teacher):
        net.train()  # dropout is one of the perturbations, of both
        if cfg.compile:  # in place, so that the names in checkpoints stay
            net.compile(dynamic=False)
    return nets


@torch.inference_mode()
def write_sheet(run: Run, step: int, nets, val: Scenes) -> float:
    """Sheet of target images with what student and teacher read there; returns the part read differently."""
    shown = evenly(len(val), 4)
    x_t = to_float(torch.stack([val.image(i) for i in shown]), run.device)
    probabilities = []
    for net in (nets.student, nets.teacher):
        net.eval()
        with autocast(run.device, run.precision):
            logits = net(x_t + run.cfg.selfens.noise_std * torch.randn_like(x_t))
        net.train()
        probabilities.append(upsample(logits, net.stride, x_t.shape[-2:]).softmax(1))
    # Half the squared distance of two softmaxes lies in [0, 1]; the root makes small ones visible.
    p_s, p_t = probabilities
    gap = ((p_s - p_t).square().sum(1) / 2).sqrt()
    rows = []
    for k, i in enumerate(shown):
        readings = [p[k].argmax(0).cpu() for p in (p_s, p_t)]
        student, teacher, label = (colourise(y, val.classes) for y in (*readings, val.label(i)))
        rows.append([to_uint8(x_t[k]), student, teacher, to_uint8(gap[k].expand(3, -1, -1) * 2 - 1), label])
    columns = ["target (val)", "student", "teacher", "inconsistency", "label"]
    run.sheet(step, "consistency", make_sheet(columns, rows))
    return float((p_s.argmax(1) != p_t.argmax(1)).float().mean())


def read_val(run: Run, teacher, val: Scenes) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, C) confusion matrix as evaluate.py counts it, 0 without labels; (C,) pixels read as each class."""
    predict = autocast(run.device, run.precision)(lambda x: upsample(teacher(x), teacher.stride, val.size))

    def count(_i, y):
        read.add_(torch.bincount(y.flatten(), minlength=len(read)).cpu())

    read = torch.zeros(len(val.classes)).long()
    teacher.eval()
    confusion = measure(predict, val, run.cfg.inference_batch, run.device, seen=count).sum(0)
    teacher.train()
    return confusion, all_reduce(read)


def symptoms(read, labelled: Scenes, differ: float) -> list[str]:
    """What is wrong with the teacher, each with its mend. read: of `read_val`; differ: of `write_sheet`."""
    share, found = labelled.pixels.sum(0) / labelled.pixels.sum(), []
    if lost := [name for k, name in enumerate(labelled.classes) if share[k] >= 0.01 and not read[k]]:
        found.append(f"the teacher reads nothing in val as {', '.join(lost)}; raise balance")
    if differ > 0.3:
        found.append(f"student and teacher differ in {100 * differ:.0f} % of the pixels; lower selfens.lr")
    return found


def open_domains(cfg) -> dict:
    """{source, and as the variant has them augmented, target: Scenes}. For target_only source is target."""
    variant = cfg.selfens.variant
    # Target labels are read by target_only, N of them by target.labelled, and by nobody else.
    labelled = Scenes(cfg, "target" if variant == "target_only" else "source", "train", labels=True)
    domains = {"source": labelled}
    if variant in ("tgcf_da", "tgcf_da_se"):
        domains["augmented"] = Augmented(cfg, labelled)
    if variant in ("self_ensembling", "tgcf_da_se"):
        domains["target"] = Scenes(cfg, "target", "train", labels=False)
    if cfg.target.labelled and variant != "target_only":
        domains["labelled"] = Scenes(cfg, "target", "train", labels=True)
    return domains


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}))
    c = cfg.selfens
    if not c.steps:
        raise UserError("selfens.steps=0: nothing would be trained; raise it")
    domains = open_domains(cfg)
    val = Scenes(cfg, "target", "val", labels=has_labels(cfg, "target", "val"))  # for the sheets
    sections = ("", "source", "target", *["augment"] * ("augmented" in domains), "selfens")
    data = {f"{name} train": scenes.digest for name, scenes in domains.items()}
    run = Run(cfg, f"selfens/{c.variant}", sections, data, c.steps, args.restart)
    if run.finished():
        return
    nets, cast = build_nets(cfg, domains["source"], run), autocast(run.device, run.precision)
    run.load(parts := {name: getattr(nets, name) for name in ("student", "teacher", "optimiser")})
    batches = Batches(cfg, "selfens", domains, rare=cfg.rare)
    counts = ", ".join(f"{len(scenes)} {name}" for name, scenes in domains.items())
    print(f"selfens: {counts} images, {c.steps} steps of "
          f"{c.batch} per domain, {sum(p.numel() for p in nets.student.parameters()):,} parameters")

    run.begin()
    for step, batch in enumerate(batches.loader(run.start, c.steps, cfg.workers), run.start + 1):
        seed_torch(cfg.seed, "selfens", step)  # noise and dropout
        set_lr(nets.optimiser, poly(step, c.steps))
        batch = {name: to_float(x, run.device) if name[0] == "x" else x.to(run.device).long()
                 for name, x in batch.items()}
        delta_con = c.delta_con * sigmoid_ramp_up(step, c.ramp_up * c.steps)
        # The true mean over the first steps, as in Mean Teacher: the start does not linger in the teacher.
        alpha = min(c.ema_decay, 1 - 1 / step)
        terms = selfens_step(nets, batch, c, delta_con, alpha, cast)
        terms["lr"] = nets.optimiser.param_groups[0]["lr"]
        if run.due("sheet", step):
            differ = write_sheet(run, step, nets, val)
            confusion, read = read_val(run, nets.teacher, val)
            run.warn(step, symptoms(read, domains["source"], differ))
            if confusion.any():
                terms["val_mIoU"] = 100 * np.nanmean(iou_from_confusion(confusion))
        run.log(step, terms)
        run.save(step, parts, classes=[*val.classes], colours=[*val.classes.values()], variant=c.variant)
    run.close()
    how = "--split val" if val.samples[0].label else f"--images {shlex.quote(cfg.target.root)} --out seen"
    print(f"selfens: {run.folder} is finished; next: python evaluate.py {args.items} {how}")


if __name__ == "__main__":
    run_main(main)
