"""The figures, drawn from what the stages left in their run folders. Nothing is trained here.

    python figures.py curve RUN ...                     mIoU against training step, from eval/curves (evaluate.py --curve)
    python figures.py share RUN ...                     self-ensembling's gain per class against the class's share of pixels
    python figures.py variants CFG key=value ...        target image, label, Source Only, TGCF-DA, TGCF-DA + SE
    python figures.py training CFG key=value ...        student, teacher and their inconsistency over the training steps
    python figures.py styles CFG key=value ...          sources under guides, with style and content numbers

RUN: run folders of several seeds. CFG and overrides: as for the stages; they select one run. `--out FILE.png` says where the
figure goes; without it, it goes to OUTPUT/NAME/figures/ (of the first RUN). Sheets show images of the data: mind their
licence before you publish one.
"""

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw

from augment import build_translator
from datasets import Scenes, class_list, colourise, to_float
from evaluate import classify, load_fseg, load_network, predictions, read_result
from losses import IGNORE
from runtime import (
    UserError, atomic_write, autocast, command_line, get_device, get_precision, make_folder, make_sheet,
    nested, run_main, to_uint8,
)  # fmt: skip
from train_gan import style_correlation

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {"source_only": "Source Only", "self_ensembling": "Self-Ensembling", "tgcf_da": "TGCF-DA",
          "tgcf_da_se": "TGCF-DA + SE", "target_only": "Target Only"}  # fmt: skip
# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {"self_ensembling": "#d55e00", "tgcf_da_se": "#0072b2"}


def write(path: Path, figure) -> None:
    """A matplotlib figure or an image to PNG, all or nothing; an image of more than 300 kB with 256 colours."""
    make_folder(path.parent)
    content = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(content, "PNG")
        if content.tell() > 300_000:
            content = io.BytesIO()
            figure.quantize(256).save(content, "PNG", optimize=True)
    else:
        figure.savefig(content, format="png", dpi=110)
    atomic_write(path, lambda file: file.write(content.getvalue()))
    print(f"written: {path}")


# ---------------------------------------------------------------------------------------------------------- plots


def curve(runs: list[Path]):
    """mIoU on val of the kept teachers: each run as a thin line, the mean over the runs as a thick one."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for variant, colour in COLOURS.items():
        mend = f"run evaluate.py --curve with selfens.variant={variant} on this run first"
        curves = [read_result(run / "eval" / "curves" / f"{variant}_val.json", {"step", "miou"}, mend) for run in runs]
        if any(c["step"] != curves[0]["step"] for c in curves):
            raise UserError(f"{runs[0]} ... {runs[-1]}: {variant}: teachers of different steps; compare runs of one config")
        steps, mious = curves[0]["step"], 100 * np.array([c["miou"] for c in curves])
        for miou in mious[: len(mious) * (len(mious) > 1)]:
            axes.plot(steps, miou, color=colour, lw=0.8, alpha=0.5)
        mean, peak = mious.mean(0), int(mious.mean(0).argmax())
        axes.plot(steps, mean, color=colour, lw=2.4, label=LABELS[variant])
        axes.plot(steps[peak], mean[peak], "o", color=colour)
        print(f"{LABELS[variant]}: highest at step {steps[peak]} ({mean[peak]:.2f}), last step {steps[-1]} ({mean[-1]:.2f})")
    axes.set(xlabel="student updates", ylabel="mIoU of the teacher on val, %",
             title=f"mean of {len(runs)} runs; dots: highest mean" if len(runs) > 1 else "one run; dots: highest")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def share(runs: list[Path]):
    """Gain in IoU by self-ensembling, with and without augmented images, of each class, over its share of val's pixels."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for after, before, marker in (("self_ensembling", "source_only", "s"), ("tgcf_da_se", "tgcf_da", "o")):
        gains, shares = [], []
        for run in runs:
            a, b = (read_result(run / "eval" / f"{variant}_teacher_val.json") for variant in (after, before))
            names = a["classes"]
            gains.append([np.nan if None in (a["per_class"][n], b["per_class"][n]) else
                          100 * (a["per_class"][n] - b["per_class"][n]) for n in names])
            pixels = np.asarray(a["confusion"]).sum(1)
            shares.append(100 * pixels / pixels.sum())
        x, y, spread = np.mean(shares, 0), np.mean(gains, 0), np.std(gains, 0, ddof=len(runs) > 1)
        axes.errorbar(x, y, spread if len(runs) > 1 else None, fmt=marker, color=COLOURS[after], capsize=2, lw=0.8,
                      label=f"{LABELS[after]} over {LABELS[before]}")
        if after == "tgcf_da_se":
            for turn, k in enumerate(np.argsort(x)):  # above and below in turns: neighbours' names would overlap
                axes.annotate(names[k], (x[k], y[k]), (4, -11 if turn % 2 else 4), textcoords="offset points", fontsize=8)
        there = ~np.isnan(y) & (x > 0)
        order = [np.argsort(np.argsort(v[there])) for v in (x, y)]
        rank = np.corrcoef(*order)[0, 1] if there.sum() > 2 else np.nan
        print(f"{LABELS[after]} over {LABELS[before]}: Spearman's rank correlation of share and gain {rank:.2f}; "
              + ", ".join(f"{n} {g:+.1f}" for n, g in zip(names, y, strict=True) if not np.isnan(g)))
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="share of val's labelled pixels, %", ylabel="gain in IoU, points",
             title=f"{len(runs)} runs, mean ± deviation" if len(runs) > 1 else "one run")
    ticks = [v for v in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if x[x > 0].min() / 2 < v]
    axes.set_xticks(ticks, [str(v) for v in ticks])
    axes.minorticks_off()
    axes.margins(x=0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


# ---------------------------------------------------------------------------------------------------------- sheets


def spread(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly."""
    return [int(i) for i in np.unique(np.linspace(0, n - 1, count).astype(int))]


def variants(cfg, count: int = 6) -> Image.Image:
    """Target image, label, and what Source Only, TGCF-DA and TGCF-DA + SE read there."""
    device = get_device(cfg)
    _, classes = class_list(cfg)
    scenes = Scenes(cfg, "target", "val", labels=True)
    shown = spread(len(scenes), count)
    rows = [[scenes.image(i).permute(1, 2, 0).numpy(), colourise(scenes.label(i), classes)] for i in shown]
    names = ("source_only", "tgcf_da", "tgcf_da_se")
    for variant in names:
        one = nested(cfg.flat | {"selfens.variant": variant})
        predict, _ = load_network(one, "teacher", classes, device, get_precision(cfg, device))
        read = predictions(predict, lambda i: (scenes.image(i), None), shown, 4, device, variant, True)
        for row, (_, z, _) in zip(rows, read, strict=True):
            row.append(colourise(classify(z, scenes.size).cpu(), classes))
    return make_sheet(["target image (val)", "label", *(LABELS[v] for v in names)], rows)


def training(cfg, steps: int = 5) -> Image.Image:
    """One image's row of the consistency sheets that train_selfens.py wrote (sheet_every), top to bottom in time."""
    folder = Path(cfg.output, cfg.name, "selfens", cfg.selfens.variant, "sheets")
    paths = sorted(folder.glob("consistency-*.png"))
    if not paths:
        raise UserError(f"{folder}: no sheets; run train_selfens.py with this config first")
    rows = []
    for path in [paths[i] for i in spread(len(paths), steps)]:
        # make_sheet's geometry: columns of equal width, rows of equal height under a line of captions.
        sheet = np.asarray(Image.open(path).convert("RGB"))
        width = sheet.shape[1] // 5 - 4
        height = round(cfg.target.size[0] * width / cfg.target.size[1])
        row = [sheet[16 : 16 + height, c * (width + 4) : c * (width + 4) + width] for c in range(5)]
        picture, step = Image.fromarray(row[0]), int(path.stem.rpartition("-")[2])
        ImageDraw.Draw(picture).text((3, 2), f"step {step}", "white", stroke_width=1, stroke_fill="black")
        rows.append([np.asarray(picture), *row[1:]])
    return make_sheet(["target (val)", "student", "teacher", "inconsistency", "label"], rows)


@torch.inference_mode()
def styles(cfg, count: int = 4) -> Image.Image:
    """A row per source image, a column per guide. Prints how style follows the guide and how content stays.

    Style: train_gan.py's style_corr for each source, over 12 guides, of which the sheet shows some. Content: of the pixels
    that this run's f_seg reads rightly on the source, the share that it reads rightly on the generated image.
    """
    device = get_device(cfg)
    precision = get_precision(cfg, device)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    translate, ready, _ = build_translator(cfg, source, {"source train": source.digest, "target train": target.digest})
    if ready:
        raise UserError("styles: augment.method=folder has images already; choose another method")
    f_seg, _ = load_fseg(Path(cfg.output, cfg.name, "gan", "fseg", "last.pt"), source.classes, device)

    contents, guides = spread(len(source), count), spread(len(target), 12)
    x_t = to_float(torch.stack([target.image(i) for i in guides]), device)
    shown = spread(len(guides), count)
    rows, follows, kept = [[np.full((*source.size, 3), 255, np.uint8), *(to_uint8(x_t[k]) for k in shown)]], [], []
    for i in contents:
        x_s, y_s = to_float(source.image(i)[None], device), source.label(i).to(device)
        with autocast(device, precision):
            follows.append(style_correlation(translate, x_s, x_t))
            x_g = torch.cat([translate(x_s, guide[None]) for guide in x_t])
            right = (f_seg(x_s)[0].argmax(0) == y_s) & (y_s != IGNORE)
            still = f_seg(x_g).argmax(1) == y_s
        kept.append(float(still[:, right].float().mean()))
        rows.append([to_uint8(x_s[0]), *(to_uint8(x_g[k]) for k in shown)])
        print(f"source {source.samples[i].name}: style correlation {follows[-1]:.2f}, content kept {100 * kept[-1]:.1f} %")
    print(f"mean: style correlation {np.mean(follows):.2f}, content kept {100 * np.mean(kept):.1f} %")
    guides = [f"guide {k + 1}" for k in range(len(shown))]
    return make_sheet([f"style {np.mean(follows):.2f} content {100 * np.mean(kept):.0f} %", *guides], rows)


PLOTS, SHEETS = {"curve": curve, "share": share}, {"variants": variants, "training": training, "styles": styles}


def main() -> None:
    def arguments(parser):
        parser.add_argument("--out", metavar="FILE.png", help="where the figure goes")

    figure, *rest = sys.argv[1:] or [""]
    if figure in PLOTS:
        out = rest.index("--out") if "--out" in rest else len(rest)
        runs, out = [Path(run) for run in rest[:out] + rest[out + 2 :]], rest[out + 1 : out + 2]
        missing = next((run for run in runs if not run.is_dir()), None)
        if missing or not runs:
            raise UserError(f"figures.py {figure}: {f'{missing}: no such run folder' if missing else 'name the run folders'}")
        return write(Path(out[0]) if out else runs[0] / "figures" / f"{figure}.png", PLOTS[figure](runs))
    if figure not in SHEETS and figure not in ("-h", "--help"):
        raise UserError(f"command line: figures.py {' | '.join([*PLOTS, *SHEETS])}; --help explains them")
    cfg, args = command_line(__doc__, ("", "source", "target", "gan", "augment", "selfens"), arguments,
                             rest if figure in SHEETS else ["--help"])
    write(Path(args.out or Path(cfg.output, cfg.name, "figures", f"{figure}.png")), SHEETS[figure](cfg))


if __name__ == "__main__":
    run_main(main)
