"""The figures, drawn from what the stages left in their run folders. Nothing is trained here.

    python figures.py share RUN ...                 self-ensembling's gain per class over the class's share
    python figures.py variants CFG key=value ...    target image, label, and what each trained variant reads
    python figures.py styles CFG key=value ...      sources repainted under several guides

RUN: run folders of several seeds. CFG and overrides select one run, as for the stages. `--out FILE.png` says
where the figure goes. Sheets show images of the data: mind their licence before you publish one.
"""

import argparse
import io
import sys
from pathlib import Path

from runtime import (
    UserError, atomic_write, autocast, command_line, get_device, get_precision, make_sheet, read_json,
    run_main, to_uint8,
)  # fmt: skip

# isort: split
import matplotlib
import numpy as np
import torch
from PIL import Image

from datasets import Scenes, classify, colourise, predictions, to_float
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


def read_result(run: Path, variant: str) -> dict:
    """What evaluate.py wrote on a variant's teacher on val."""
    path = run / "eval" / f"{variant}_teacher_val.json"
    return read_json(path, {"per_class": dict, "confusion": list, "classes": list}, "run evaluate.py first")


def share(runs: list[Path]):
    """Each class's gain in IoU by self-ensembling, with and without repainted images, over its share."""
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for after, before, marker in (("self_ensembling", "source_only", "s"), ("tgcf_da_se", "tgcf_da", "o")):
        pairs = [[read_result(run, variant) for variant in (after, before)] for run in runs]
        rows = dict(zip(pairs[0][0]["classes"], np.sum(pairs[0][0]["confusion"], 1), strict=True))
        names = [n for n, iou in pairs[0][0]["per_class"].items() if iou is not None]
        gains = [[100 * (a["per_class"][n] - b["per_class"][n]) for n in names] for a, b in pairs]
        x = [100 * rows[n] / sum(rows.values()) for n in names]
        bars, label = np.std(gains, 0, ddof=len(runs) > 1), f"{LABELS[after]} over {LABELS[before]}"
        axes.errorbar(x, np.mean(gains, 0), bars, fmt=marker, lw=0.8, label=label)
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
    images = [scenes.image(i).permute(1, 2, 0).numpy() for i in shown]
    rows = [[x, colourise(scenes.label(i), scenes.classes)] for x, i in zip(images, shown, strict=True)]
    for variant in LABELS:
        path = Path(cfg.output, cfg.name, "selfens", variant, "last.pt")
        if path.exists():
            net, _ = load_net(path, "teacher", build_segmenter, scenes.classes, device)
            columns.append(LABELS[variant])
            for k, z in predictions(net, lambda k: scenes.image(shown[k]), len(shown), 1, device):
                z = upsample(z[None], net.stride, scenes.size)[0]
                rows[k].append(colourise(classify(z, scenes.size).cpu(), scenes.classes))
    return make_sheet(columns, rows)


@torch.inference_mode()
def styles(cfg, count: int = 4) -> Image.Image:
    """A row per source image, a column per guide."""
    device, source = get_device(cfg), Scenes(cfg, "source", "train", labels=True)
    target, cast = Scenes(cfg, "target", "train", labels=False), autocast(device, get_precision(cfg, device))
    path = Path(cfg.output, cfg.name, "gan", "last.pt")
    G, _ = load_net(path, "G", build_generator, source.classes, device)
    contents, guides = (to_float(torch.stack([scenes.image(i) for i in spread(len(scenes), count)]), device)
                        for scenes in (source, target))  # fmt: skip
    rows = [[np.full((*source.size, 3), 255, np.uint8), *map(to_uint8, guides)]]
    for x_s in contents:
        with cast:
            rows.append([to_uint8(x_s), *(to_uint8(G(x_s[None], x_t[None])[0]) for x_t in guides)])
    return make_sheet(["source", *(f"guide {k + 1}" for k in range(len(guides)))], rows)


def main() -> None:
    sheets = {"variants": variants, "styles": styles}
    figure = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if figure not in ("share", *sheets):
        raise UserError("command line: figures.py share, variants or styles; --help explains them")
    if figure == "share":
        parser = argparse.ArgumentParser()
        parser.add_argument("runs", nargs="+", type=Path)
        parser.add_argument("--out", type=Path, default=Path("share.png"))
        args = parser.parse_args()
        return write(args.out, share(args.runs))
    cfg, args = command_line(("--out", {}))
    write(Path(args.out or Path(cfg.output, cfg.name, f"{figure}.png")), sheets[figure](cfg))


if __name__ == "__main__":
    run_main(main)
