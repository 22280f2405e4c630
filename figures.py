"""The figures, drawn from what the stages left in their run folders. Nothing is trained here.

    python figures.py curve RUN ...                  the loss terms of stage 3 over its steps, from log.jsonl
    python figures.py share RUN ...                  self-ensembling's gain per class over the class's share of pixels
    python figures.py variants CFG key=value ...     target image, label, and what each trained variant reads there
    python figures.py training CFG key=value ...     student, teacher and their inconsistency over the steps
    python figures.py styles CFG key=value ...       sources repainted under several guides

RUN: run folders of several seeds. CFG and overrides select one run, as for the stages. `--out FILE.png` says where the
figure goes. Sheets show images of the data: mind their licence before you publish one.
"""

import io
import json
import sys
from pathlib import Path

from runtime import HERE, UserError, atomic_write, autocast, command_line, get_device, get_precision, make_sheet
from runtime import read_json, run_main, to_uint8

# isort: split
import matplotlib
import numpy as np
import torch
from PIL import Image

from datasets import Scenes, class_list, classify, colourise, predictions, to_float
from models import build_generator, build_segmenter, load_net, upsample

matplotlib.use("Agg")  # files only
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {"source_only": "Source Only", "self_ensembling": "Self-Ensembling", "tgcf_da": "TGCF-DA",
          "tgcf_da_se": "TGCF-DA + SE", "target_only": "Target Only"}  # fmt: skip


def write(path: Path, figure) -> None:
    """A matplotlib figure or an image to PNG; an image of more than 300 kB with 256 colours."""
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


def curve(runs: list[Path]):
    """L_sup and L_con of every variant that has a log, each run a line."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant, colour in zip(LABELS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        for k, run in enumerate(runs):
            log = run / "selfens" / variant / "log.jsonl"
            lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            for term, axes in zip(("L_sup", "L_con"), panels, strict=True):
                points = [(line["step"], line[term]) for line in lines if term in line]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, lw=1, label=None if k else LABELS[variant])
    for term, axes in zip(("L_sup", "L_con"), panels, strict=True):
        axes.set(xlabel="student updates", ylabel=term, yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def share(runs: list[Path]):
    """Gain in IoU by self-ensembling, with and without repainted images, of each class, over its share of val."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for after, before, marker in (("self_ensembling", "source_only", "s"), ("tgcf_da_se", "tgcf_da", "o")):
        pairs = [[read_json(run / "eval" / f"{v}_teacher_val.json", {"per_class": dict, "confusion": list},
                            "run evaluate.py first") for v in (after, before)] for run in runs]  # fmt: skip
        names = [n for n, iou in pairs[0][0]["per_class"].items() if iou is not None]
        gains = [[100 * (a["per_class"][n] - b["per_class"][n]) for n in names] for a, b in pairs]
        pixels = np.asarray(pairs[0][0]["confusion"]).sum(1) / np.sum(pairs[0][0]["confusion"])
        x = [100 * pixels[list(pairs[0][0]["per_class"]).index(n)] for n in names]
        spread = np.std(gains, 0, ddof=1) if len(runs) > 1 else None
        axes.errorbar(x, np.mean(gains, 0), spread, fmt=marker, lw=0.8, label=f"{LABELS[after]} over {LABELS[before]}")
    for name, at, gain in zip(names, x, np.mean(gains, 0), strict=True):
        axes.annotate(name, (at, gain), (4, 4), textcoords="offset points", fontsize=8)
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="share of val's labelled pixels, %", ylabel="gain in IoU, points")
    axes.legend(fontsize=8)
    return figure


def spread(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly."""
    return [int(i) for i in np.unique(np.linspace(0, n - 1, count).astype(int))]


def variants(cfg, count: int = 5) -> Image.Image:
    """Target image, label, and what the teacher of each trained variant reads there."""
    device, scenes = get_device(cfg), Scenes(cfg, "target", "val", labels=True)
    shown, columns = spread(len(scenes), count), ["target image (val)", "label"]
    rows = [[scenes.image(i).permute(1, 2, 0).numpy(), colourise(scenes.label(i), scenes.classes)] for i in shown]
    for variant in LABELS:
        path = Path(cfg.output, cfg.name, "selfens", variant, "last.pt")
        if path.exists():
            net, _ = load_net(path, "teacher", build_segmenter, scenes.classes, device)
            columns.append(LABELS[variant])
            for k, z in predictions(net, lambda k: scenes.image(shown[k]), len(shown), 1, device):
                z = upsample(z[None], net.stride, scenes.size)[0]
                rows[k].append(colourise(classify(z, scenes.size).cpu(), scenes.classes))
    return make_sheet(columns, rows)


def training(cfg, steps: int = 5) -> Image.Image:
    """The first row of the consistency sheets that train_selfens.py wrote (sheet_every), top to bottom in time."""
    folder = Path(cfg.output, cfg.name, "selfens", cfg.selfens.variant, "sheets")
    paths = sorted(folder.glob("consistency-*.png"))
    if not paths:
        raise UserError(f"{folder}: no sheets; run train_selfens.py with this config first")
    sheets = [np.asarray(Image.open(paths[i]).convert("RGB")) for i in spread(len(paths), steps)]
    height = (sheets[0].shape[0] - 16) // 4  # of one of four rows, under a line of captions
    return Image.fromarray(np.concatenate([sheets[0][:16], *(s[16 : 16 + height] for s in sheets)]))


@torch.inference_mode()
def styles(cfg, count: int = 4) -> Image.Image:
    """A row per source image, a column per guide."""
    device, source = get_device(cfg), Scenes(cfg, "source", "train", labels=True)
    target, cast = Scenes(cfg, "target", "train", labels=False), autocast(device, get_precision(cfg, device))
    G, _ = load_net(Path(cfg.output, cfg.name, "gan", "last.pt"), "G", build_generator, source.classes, device)
    contents, guides = (to_float(torch.stack([scenes.image(i) for i in spread(len(scenes), count)]), device)
                        for scenes in (source, target))  # fmt: skip
    rows = [[np.full((*source.size, 3), 255, np.uint8), *map(to_uint8, guides)]]
    for x_s in contents:
        with cast:
            rows.append([to_uint8(x_s), *(to_uint8(G(x_s[None], x_t[None])[0]) for x_t in guides)])
    return make_sheet(["source", *(f"guide {k + 1}" for k in range(len(guides)))], rows)


def main() -> None:
    plots, sheets = {"curve": curve, "share": share}, {"variants": variants, "training": training, "styles": styles}
    figure = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if figure in plots:
        out = Path(sys.argv[sys.argv.index("--out") + 1]) if "--out" in sys.argv else HERE / "runs" / f"{figure}.png"
        runs = [Path(word) for word in sys.argv[1:] if word not in ("--out", str(out))]
        return write(out, plots[figure](runs))
    if figure not in sheets:
        raise UserError(f"command line: figures.py {' | '.join([*plots, *sheets])}; --help explains them")
    cfg, args = command_line(("--out", {}))
    class_list(cfg)
    write(Path(args.out or Path(cfg.output, cfg.name, "figures", f"{figure}.png")), sheets[figure](cfg))


if __name__ == "__main__":
    run_main(main)
