"""Stage 4: per-class IoU of the last step's teacher on the target's labelled val split.

Reads OUTPUT/NAME/selfens/VARIANT/last.pt and the target data set; writes OUTPUT/NAME/eval/VARIANT_MODEL_SPLIT.json
and a sheet of images, labels and predictions beside it. Logits are up-sampled to each label's own size.

    python evaluate.py --split val                                     the teacher of selfens.variant
    python evaluate.py configs/carla_camvid.yaml selfens.variant=source_only --model student
    python evaluate.py --table runs/streets-0 runs/streets-1           mean and deviation over finished runs
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from datasets import Scenes, class_list, colourise, to_float
from losses import IGNORE
from models import build_segmenter
from runtime import (
    UserError, VARIANTS, autocast, command_line, environment, get_device, get_precision, load_checkpoint, load_weights,
    make_folder, make_sheet, refuse_changes, run_main, stage_config, to_uint8, write_json,
)  # fmt: skip


def confusion_matrix(label: torch.Tensor, prediction: torch.Tensor, classes: int) -> torch.Tensor:
    """label, prediction: integer tensors of one shape -> (classes, classes) int64, row = label, column = prediction.

    Pixels whose label is IGNORE do not count.
    """
    counted = label != IGNORE
    pairs = label[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou_from_confusion(confusion) -> np.ndarray:
    """(C, C) counts -> (C,) float64 IoU = TP / (TP + FP + FN); NaN for a class in neither label nor prediction."""
    confusion = np.asarray(confusion, np.int64)
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


@torch.inference_mode()
def evaluate_model(predict, scenes: Scenes, batch: int, device, title: str) -> torch.Tensor:
    """Confusion matrix of predict(x: (N, 3, h, w) in [-1, 1]) -> logits (N, C, h, w) over all scenes.

    The logits are resized bilinearly (align_corners=False) to each label's own size before the argmax.
    """
    classes = len(scenes.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    for first in tqdm(range(0, len(scenes), batch), title, mininterval=1, leave=False):
        indices = range(first, min(first + batch, len(scenes)))
        logits = predict(to_float(torch.stack([scenes.image(i) for i in indices]), device)).float()
        for i, z in zip(indices, logits, strict=True):
            label = torch.from_numpy(scenes.native_label(i)).to(device)
            if z.shape[-2:] != label.shape:
                z = F.interpolate(z[None], label.shape, mode="bilinear", align_corners=False)[0]
            confusion += confusion_matrix(label, z.argmax(0), classes)
    return confusion.cpu()


def print_table(result: dict) -> None:
    """Fixed-width per-class table and the line that says how the numbers came about."""
    print(f"\n{'class':<14}{'IoU %':>8}{'pixels %':>10}")
    rows = np.asarray(result["confusion"]).sum(1)
    for (name, iou), pixels in zip(result["per_class"].items(), rows, strict=True):
        print(f"{name:<14}{'absent' if iou is None else f'{100 * iou:.2f}':>8}{100 * pixels / max(rows.sum(), 1):>10.2f}")
    print(f"{'mIoU':<14}{100 * result['miou']:>8.2f}")
    absent = [name for name, iou in result["per_class"].items() if iou is None]
    if absent:
        print(f"excluded from the mean, in neither label nor prediction: {', '.join(absent)}")
    print(f"protocol: {result['protocol']}\n")


def table(folders: list[str]) -> None:
    """Prints mean and sample deviation over run folders for each variant, model and split found in their eval/."""
    rows, names = {}, []
    for folder in folders:
        found = sorted(Path(folder, "eval").glob("*.json"))
        if not found:
            raise UserError(f"{folder}: no eval/*.json in it; run evaluate.py with its config first")
        for path in found:
            result = json.loads(path.read_text())
            rows.setdefault((result["split"], result["model"], result["variant"]), []).append(result)
            names = names or result["classes"]
            if result["classes"] != names:
                raise UserError(f"{path}: other classes than in {folders[0]}; tabulate runs of one class list")
    print(f"\nIoU in %, mean ± sample deviation over runs\n{'variant':<16}{'model':<8}{'split':<6}{'runs':>4}{'mIoU':>14}"
          + "".join(f"{name[:10]:>11}" for name in names))
    for key in sorted(rows, key=lambda k: (k[0], k[1], VARIANTS.index(k[2]))):
        miou = [100 * r["miou"] for r in rows[key]]
        spread = f"{np.std(miou, ddof=1):.2f}" if len(miou) > 1 else "–"
        cells = []
        for name in names:
            ious = [r["per_class"][name] for r in rows[key] if r["per_class"][name] is not None]
            cells.append(f"{100 * np.mean(ious):>11.2f}" if ious else f"{'absent':>11}")
        print(f"{key[2]:<16}{key[1]:<8}{key[0]:<6}{len(miou):>4}{np.mean(miou):>8.2f} ±{spread:>5}" + "".join(cells))


def main() -> None:
    def arguments(parser):
        parser.add_argument("--split", choices=("val", "train"), default="val", help="target split (default val)")
        parser.add_argument("--model", choices=("teacher", "student"), default="teacher", help="default teacher")
        parser.add_argument("--table", nargs="+", metavar="RUN", help="print mean and deviation over these run folders")

    cfg, args = command_line(__doc__, ("", "source", "target", "selfens", "eval"), arguments)
    if args.table:
        return table(args.table)
    folder, variant = Path(cfg.output, cfg.name), cfg.selfens.variant
    device = get_device(cfg)
    precision = get_precision(cfg, device)
    list_name, classes = class_list(cfg)
    scenes = Scenes(cfg, "target", args.split, labels=True)

    path = folder / "selfens" / variant / "last.pt"
    state = load_checkpoint(path, f"train it first: python train_selfens.py CFG selfens.variant={variant}")
    if state.get("classes") != list(classes):
        raise UserError(f"{path}: trained on other classes ({state.get('classes')}) than the config's ({list(classes)})")
    refuse_changes(state["config"], stage_config(cfg, ("selfens",)), path)
    model = build_segmenter(cfg, len(classes)).to(device, memory_format=torch.channels_last).eval()
    load_weights(model, state[args.model], path)

    def predict(x):
        with autocast(device, precision):
            return model(x, full_size=True)

    confusion = evaluate_model(predict, scenes, cfg.eval.batch, device, "evaluate")
    iou = iou_from_confusion(confusion)
    if np.isnan(iou).all():
        raise UserError(f"{cfg.target.root}: no labelled pixel in the {args.split} split; nothing to evaluate")
    size = scenes.native_label(0).shape
    result = {
        "miou": float(np.nanmean(iou)),
        "per_class": {name: None if np.isnan(v) else float(v) for name, v in zip(classes, iou, strict=True)},
        "confusion": confusion.tolist(), "classes": list(classes), "variant": variant, "model": args.model,
        "split": args.split, "step": state["step"], "images": len(scenes),
        "protocol": f"mIoU over {len(classes)} classes ({list_name}), {cfg.target.dataset} {args.split}, {len(scenes)} images, "
                    f"{args.model} of the last step ({state['step']}), input {scenes.size[1]}x{scenes.size[0]}, logits "
                    f"up-sampled bilinearly (align_corners=False) to the label's own size ({size[1]}x{size[0]}), "
                    f"label {IGNORE} ignored, one scale, no flip",
        "config": cfg.flat, "environment": environment(cfg, device, precision),
    }  # fmt: skip
    out = make_folder(folder / "eval") / f"{variant}_{args.model}_{args.split}.json"
    write_json(out, result)

    rows = []
    for i in np.unique(np.linspace(0, len(scenes) - 1, 6).astype(int)):
        x = to_float(scenes.image(i)[None], device)
        with torch.inference_mode():
            prediction = predict(x)[0].argmax(0).cpu()
        rows.append([to_uint8(x[0]), colourise(scenes.label(i), classes), colourise(prediction, classes)])
    make_sheet(["target image", "label", f"{variant} {args.model}"], rows).save(out.with_suffix(".png"))
    print_table(result)
    print(f"written: {out} and {out.with_suffix('.png')}")


if __name__ == "__main__":
    run_main(main)
