"""The figures, drawn from what the stages left in their run folders. Nothing is trained here.

    python figures.py page RUN                      RUN/index.html: all that a run left, on one page
    python figures.py curve RUN ...                 the teachers' mIoU on val over the steps, band over seeds
    python figures.py over KEY RUN ...              mIoU over the values of a key, such as target.labelled
    python figures.py share RUN ...                 self-ensembling's gain per class over the class's share
    python figures.py variants CFG key=value ...    target image, label, and what each trained variant reads
    python figures.py styles CFG key=value ...      sources repainted under several guides

RUN: run folders of several seeds. CFG and overrides select one run, as for the stages. `--out FILE.png` says
where the figure goes. Sheets show images of the data: mind their licence before you publish one.
"""

import argparse
import base64
import contextlib
import html
import io
import json
import sys
from pathlib import Path

from runtime import (
    UserError, atomic_write, autocast, command_line, get_device, get_precision, read_json, run_main, schema,
)  # fmt: skip

# isort: split
import matplotlib
import numpy as np
import torch
from PIL import Image

from datasets import Scenes, colourise, evenly, make_sheet, some_of, to_uint8
from evaluate import Segmenter, percent, read_result
from models import build_generator, load_net

matplotlib.use("Agg")  # files only
matplotlib.rcParams["figure.constrained_layout.use"] = True
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {"source_only": "Source Only", "self_ensembling": "Self-Ensembling", "tgcf_da": "TGCF-DA",
          "tgcf_da_se": "TGCF-DA + SE", "target_only": "Target Only"}  # fmt: skip


def png(figure) -> bytes:
    """A matplotlib figure or an image as PNG; an image of more than 300 kB with 256 colours."""
    content = io.BytesIO()
    if isinstance(figure, Image.Image):
        figure.save(content, "PNG")
        if content.tell() > 300_000:
            figure.quantize(256).save(content := io.BytesIO(), "PNG", optimize=True)
    else:
        figure.savefig(content, format="png", dpi=110)
        plt.close(figure)
    return content.getvalue()


def read_log(path: Path) -> list[dict]:
    """The lines of a log.jsonl that are whole; [] if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curve(runs: list[Path]):
    """The teachers' mIoU on val over the steps, of each variant: mean, least and greatest of the runs."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for variant, label in LABELS.items():
        logs = [read_log(run / "selfens" / variant / "log.jsonl") for run in runs]
        points = [{line["step"]: line["val_mIoU"] for line in log if "val_mIoU" in line} for log in logs]
        points = [point for point in points if point]
        steps = sorted(set.intersection(*map(set, points))) if points else []
        if steps:
            values = np.array([[point[step] for step in steps] for point in points])
            (line,) = axes.plot(steps, values.mean(0), marker=".", label=f"{label} ({len(points)})")
            axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    if not axes.lines:
        raise UserError(f"{runs[0]}: no mIoU on val in selfens/*/log.jsonl; run train_selfens.py first")
    axes.set(xlabel="step", ylabel="mIoU on val, %")
    axes.legend(fontsize=8, title="(seeds)", title_fontsize=8)
    return figure


def over(key: str, runs: list[Path]):
    """mIoU of each variant's teacher over the values of a config key, mean and deviation over seeds."""
    if not isinstance(schema()[0].get(key), (int, float, str)):
        raise UserError(f"over {key}: no key of cfg.yaml that holds one number or word")
    results = {}
    for run in runs:
        found = [read_result(path) for path in sorted(run.glob("eval/*_teacher_*.json"))]
        for r in found:
            if np.sum(r["confusion"]) == max(np.sum(o["confusion"]) for o in found):  # val+test
                rows = results.setdefault(f"{LABELS.get(r['variant'], r['variant'])}, {r['split']}", {})
                rows.setdefault(r["config"].get(key), []).append(100 * r["miou"])
    if not results:
        raise UserError(f"{runs[0]}: no eval/*_teacher_*.json in it; run evaluate.py first")
    figure, axes = plt.subplots(figsize=(6.4, 4))
    curves = {k: rows for k, rows in results.items() if len(rows) > 1} or results
    for label, rows in curves.items():
        values = sorted(rows, key=lambda v: (isinstance(v, str), v or 0))
        means = [np.mean(rows[v]) for v in values]
        bars = [np.std(rows[v], ddof=len(rows[v]) > 1) for v in values]
        axes.errorbar([str(v) for v in values], means, bars, marker="o", lw=0.8, label=label)
    axes.set(xlabel=key, ylabel="mIoU, %")
    axes.legend(fontsize=8)
    return figure


def losses(log: list[dict], title: str):
    """Each term of a log.jsonl over the steps, in a small picture of its own."""
    names = [name for name in {name: 0 for line in log for name in line} if name not in ("step", "lr")]
    rows = max(1, -(-len(names) // 4))
    figure, axes = plt.subplots(rows, 4, figsize=(10, 2 * rows), squeeze=False)
    figure.suptitle(title, fontsize=10)
    for name, ax in zip(names, axes.flat, strict=False):
        ax.plot(*zip(*((line["step"], line[name]) for line in log if name in line), strict=True), lw=0.8)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    return figure


def confusion(result: dict):
    """Which class (row) is read as which (column), % of the row's pixels."""
    counts, names = np.array(result["confusion"], float), result["classes"]
    parts = 100 * counts / counts.sum(1, keepdims=True).clip(min=1)
    figure, ax = plt.subplots(figsize=(1.5 + 0.42 * len(names), 1.2 + 0.4 * len(names)))
    ax.imshow(parts, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(parts):
        if value >= 0.5:
            ink = "white" if value > 60 else "black"
            ax.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlabel="read as", ylabel="label")
    return figure


HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em }
img { max-width: 100%; height: auto } figure { margin: 1em 0 } figcaption { overflow-wrap: anywhere }
.wide { overflow-x: auto } td, th { padding: .1em .6em; text-align: right }
:first-child { text-align: left }</style>"""


def table(head: list, rows: list[list]) -> str:
    cells = [[f"<td>{html.escape(str(cell))}</td>" for cell in row] for row in rows]
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in cells)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def picture(figure, caption: str) -> str:
    data, caption = base64.b64encode(png(figure)).decode(), html.escape(caption)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def page_results(run: Path) -> list[str]:
    """What evaluate.py measured: IoU per class, shares of classes in labels and predictions, confusion."""
    results = map(read_result, sorted(run.glob("eval/*_teacher_*.json")))
    results = sorted(results, key=lambda r: [*LABELS, r["variant"]].index(r["variant"]))
    if not results:
        return ["<p>Not evaluated yet: python evaluate.py</p>"]
    heads = [f"{LABELS.get(r['variant'], r['variant'])}, {r['split']}" for r in results]
    names, held_out, shares = results[0]["classes"], run / "gan/fseg/held_out.json", {}
    if held_out.exists() and (share := read_json(held_out, {}, "train_gan.py writes it").get("share")):
        shares["source labels (held out)"] = [share.get(name, 0) for name in names]
    for head, result in zip(heads, results, strict=True):
        shares |= {f"{result['split']} labels": np.sum(result["confusion"], 1)}
        shares |= {f"read by {head}": np.sum(result["confusion"], 0)}
    iou = [[name, *(percent(r["per_class"][name]) for r in results)] for name in names]
    iou.append(["mIoU", *(percent(r["miou"]) for r in results)])
    of_class = [[n, *(f"{100 * v[k] / sum(v):.2f}" for v in shares.values())] for k, n in enumerate(names)]
    caption, protocol = "% of a class's pixels by what they are read as", html.escape(results[-1]["protocol"])
    return ["<h2>IoU, %</h2>", table(["class", *heads], iou), f"<p>{protocol}</p>",
            "<h2>Share of the pixels, %</h2>", table(["class", *shares], of_class), "<h2>Confusion</h2>",
            *(picture(confusion(r), f"{head}: {caption}") for head, r in zip(heads, results, strict=True))]


def page(run: Path) -> str:
    """One HTML page with all pictures in it: results, curves, and sheets over time."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; give a run's, OUTPUT/NAME")
    parts, name = [*page_results(run), "<h2>Training</h2>"], html.escape(run.resolve().name)
    with contextlib.suppress(UserError):  # where val has no labels
        parts.append(picture(curve([run]), "mIoU of the teachers on val; nothing is chosen by it"))
    for stage in ("gan/fseg", "gan", "augmented", *(f"selfens/{variant}" for variant in LABELS)):
        log, sheets = read_log(run / stage / "log.jsonl"), sorted((run / stage).glob("sheets/*.png"))
        if log:
            parts.append(picture(losses(log, stage), f"{stage}: loss terms over steps"))
        for k in evenly(len(sheets), 4) if sheets else ():
            parts.append(picture(Image.open(sheets[k]), f"{stage}/sheets/{sheets[k].name}"))
    return "".join([HEAD, f"<title>{name}</title><h1>{name}</h1>", *parts])


def share(runs: list[Path]):
    """Each class's gain in IoU by self-ensembling, with and without repainted images, over its share."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for after, before, marker in (("self_ensembling", "source_only", "s"), ("tgcf_da_se", "tgcf_da", "o")):
        pairs = [[read_result(run / f"eval/{v}_teacher_val.json") for v in (after, before)] for run in runs]
        rows = dict(zip(pairs[0][0]["classes"], np.sum(pairs[0][0]["confusion"], 1), strict=True))
        names = [n for n in rows if all(r["per_class"][n] is not None for pair in pairs for r in pair)]
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


def variants(cfg, count: int = 5) -> Image.Image:
    """Target image, label, and what the teacher of each trained variant reads there."""
    scenes, columns = Scenes(cfg, "target", "val", labels=True), ["target image (val)", "label"]
    rows = [[scenes.image(i).permute(1, 2, 0).numpy(), colourise(scenes.label(i), scenes.classes)]
            for i in evenly(len(scenes), count)]
    for variant in LABELS:
        path = Path(cfg.output, cfg.name, "selfens", variant, "last.pt")
        if path.exists():
            net = Segmenter(path, cfg.device, cfg.precision)
            columns.append(LABELS[variant])
            rows = [[*row, net.colour(net(row[0]))] for row in rows]
    return make_sheet(columns, rows)


@torch.inference_mode()
def styles(cfg, count: int = 4) -> Image.Image:
    """A row per source image, a column per guide."""
    device, source = get_device(cfg), Scenes(cfg, "source", "train", labels=True)
    target, cast = Scenes(cfg, "target", "train", labels=False), autocast(device, get_precision(cfg, device))
    path = Path(cfg.output, cfg.name, "gan", "last.pt")
    G, _ = load_net(path, "G", build_generator, source.classes, device)
    contents, guides = (some_of(scenes, count, device) for scenes in (source, target))
    rows = [[np.full((*source.size, 3), 255, np.uint8), *map(to_uint8, guides)]]
    for x_s in contents:
        with cast:
            rows.append([to_uint8(x_s), *(to_uint8(G(x_s[None], x_t[None])[0]) for x_t in guides)])
    return make_sheet(["source", *(f"guide {k + 1}" for k in range(len(guides)))], rows)


def main() -> None:
    sheets, of_runs = {"variants": variants, "styles": styles}, {"share": share, "curve": curve, "over": over}
    figure = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if figure not in ("page", *of_runs, *sheets):
        raise UserError("command line: figures.py page, curve, over, share, variants or styles; see --help")
    if figure in sheets:
        cfg, args = command_line(("--out", {}))
        written = {args.out or Path(cfg.output, cfg.name, f"{figure}.png"): png(sheets[figure](cfg))}
    else:
        key = [sys.argv.pop(1)] if figure == "over" and len(sys.argv) > 1 else []
        parser = argparse.ArgumentParser()
        parser.add_argument("runs", nargs="+", type=Path)
        parser.add_argument("--out", type=Path)
        args = parser.parse_args()
        if figure == "page":
            written = {args.out or run / "index.html": page(run).encode() for run in args.runs}
        else:
            written = {args.out or f"{figure}.png": png(of_runs[figure](*key, args.runs))}
    for path, content in written.items():
        atomic_write(Path(path), lambda file, content=content: file.write(content))
        print(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
