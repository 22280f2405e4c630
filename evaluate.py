"""Stage 4: per-class IoU of the last step's teacher on the target's labelled val split; predictions as files.

    python evaluate.py --split val                                 the teacher of selfens.variant
    python evaluate.py CFG selfens.variant=source_only --model student
    python evaluate.py --split val --export DIR                    and label-id PNGs, as benchmark servers take them
    python evaluate.py --split test --export DIR                   the same without labels, which servers keep
    python evaluate.py --images PATH --out DIR                     predict a photo, or a folder of them
    python evaluate.py --compare A.json B.json                     two results side by side, per class
    python evaluate.py --table runs/streets-0 runs/streets-1       mean and deviation over finished runs

Reads OUTPUT/NAME/selfens/VARIANT/last.pt and the target data set; writes
OUTPUT/NAME/eval/VARIANT_MODEL_SPLIT.json and a sheet of images, labels and predictions beside it. The network
sees images resized to target.size; its logits are up-sampled bilinearly (align_corners=False) to that, and
then to each label's, or image's, own size.
"""

import os
from pathlib import Path

from runtime import (
    UserError, atomic_write, autocast, command_line, environment, get_device, get_precision, make_sheet, rank,
    read_json, run_main, write_json,
)  # fmt: skip

# isort: split
import numpy as np
from PIL import Image

from datasets import SUFFIXES, Scenes, class_list, classify, colourise, measure, predictions, read_image, resized
from losses import IGNORE, iou_from_confusion
from models import build_segmenter, load_net, upsample

NOT_IN_13 = ("wall", "fence", "pole")  # of cityscapes16, left out of mIoU*, which papers on SYNTHIA report, too
VARIANTS = ("source_only", "self_ensembling", "tgcf_da", "tgcf_da_se", "target_only")
RESULT = {"miou": float, "per_class": dict, "classes": list, "split": str, "model": str, "variant": str, "step": int,
          "steps": int, "protocol": str, "config": dict, "confusion": list}  # fmt: skip

# -------------------------------------------------------------------------------------------------- measuring


def save_png(path: Path, picture) -> None:
    """(H, W) or (H, W, 3) uint8 array, or an image, to a PNG, all or nothing."""
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    atomic_write(path, lambda file: picture.save(file, "PNG"))


def label_ids(scenes: Scenes) -> np.ndarray:
    """(C,) uint8: for each train id the data set's own label id, the smallest where a class is made up of several."""
    table = np.full(1, -1) if scenes.table is None else scenes.table
    ids = [next(iter(np.flatnonzero(table == k)), 256) for k in range(len(scenes.classes))]
    if max(ids) > 255:  # a class that the target's labels never have, or labels that are colours
        raise UserError(f"--export: target.ids has no label id of 8 bits for '{[*scenes.classes][np.argmax(ids)]}', "
                        "which may be predicted; choose another class list with 'classes', or use --images")
    return np.array(ids, np.uint8)


def check_folder(path: str, data: str, option: str) -> Path:
    """The folder, if it does not lie in `data`, whose files it could overwrite."""
    if data and Path(path).resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{option} {path}: lies in {data}, whose files it could overwrite; choose another folder")
    return Path(path)


def evaluate(cfg, args, predict, state: dict, device) -> None:
    """Measures and exports one split, as args say."""
    labels, c = not (args.split == "test" and args.export), state["config"]
    scenes = Scenes(cfg, "target", args.split, labels)
    raw_ids = label_ids(scenes) if args.export else None
    folder = check_folder(args.export, cfg.target.root, "--export") if args.export else None
    sizes = set()

    def seen(i, prediction):
        sizes.add(tuple(prediction.shape))
        if folder:
            save_png(folder / f"{scenes.samples[i].name}.png", raw_ids[prediction.cpu().numpy()])

    if not labels:
        for i, z in predictions(predict, scenes.image, len(scenes), cfg.inference_batch, device):
            seen(i, classify(z, read_image(scenes.samples[i].image).size[::-1]))
    else:
        confusion = measure(predict, scenes, cfg.inference_batch, device, seen)
    if folder:
        print(f"written: {len(scenes)} label-id PNGs below {folder}")
    if not labels or rank():
        return
    iou = iou_from_confusion(confusion)
    if np.isnan(iou).all():
        raise UserError(f"{cfg.target.root}: no labelled pixel in the {args.split} split; nothing to evaluate")
    variant, (height, width) = state["variant"], min(sizes)
    result = {
        "miou": float(np.nanmean(iou)), "variant": variant, "model": args.model, "split": args.split,
        "step": state["step"], "steps": c["selfens.steps"], "seed": c["seed"], "images": len(scenes),
        "per_class": {n: None if np.isnan(v) else float(v) for n, v in zip(scenes.classes, iou, strict=True)},
        "confusion": confusion.tolist(), "classes": list(scenes.classes),
        "protocol": f"mIoU over {len(scenes.classes)} classes ({scenes.class_list}), {cfg.target.dataset} {args.split}, "
                    f"{len(scenes)} images, {args.model} of step {state['step']} of {c['selfens.steps']}, input "
                    f"{scenes.size[1]}x{scenes.size[0]}, logits up-sampled bilinearly (align_corners=False) to the "
                    f"label's own size ({width}x{height}{', and others' * (len(sizes) > 1)}), label {IGNORE} ignored, "
                    "one scale, no flip",
        "config": c, "environment": environment(device, get_precision(cfg, device)),
    }  # fmt: skip
    if scenes.class_list == "cityscapes16":
        starred = [v for n, v in result["per_class"].items() if v is not None and n not in NOT_IN_13]
        result["miou13"] = float(np.mean(starred)) if starred else None
    out = Path(cfg.output, cfg.name, "eval", f"{variant}_{args.model}_{args.split}.json")
    write_json(out, result)
    shown, rows = np.unique(np.linspace(0, len(scenes) - 1, 6).astype(int)), []
    for k, z in predictions(predict, lambda k: scenes.image(shown[k]), len(shown), 1, device):
        picture, label = scenes.image(shown[k]).permute(1, 2, 0).numpy(), scenes.label(shown[k])
        rows.append([picture, *(colourise(y, scenes.classes) for y in (label, classify(z, scenes.size).cpu()))])
    save_png(out.with_suffix(".png"), make_sheet(["target image", "label", f"{variant} {args.model}"], rows))
    print_result(result)
    print(f"written: {out} and {out.with_suffix('.png')}")


def predict_images(cfg, path: str, out: str, predict, classes: dict, device) -> None:
    """A photo, or every PNG and JPEG below a folder -> OUT/train_ids/, OUT/colour/ and OUT/overlay/, under its name."""
    root, unreadable = Path(path), []
    if not root.exists():
        raise UserError(f"--images {path}: no such file or folder")
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    paths = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith("._") and p.is_file()]
    root = root if root.is_dir() else root.parent
    names = [p.relative_to(root).with_suffix(".png") for p in paths]
    if not paths or len({*names}) < len(names):
        raise UserError(f"--images {path}: {'two of its images differ only in suffix' if paths else 'no PNG or JPEG'}")
    check_folder(out, path if Path(path).is_dir() else "", "--out")
    for i, name in enumerate(names):
        try:
            picture = read_image(str(paths[i]))
        except UserError as error:
            unreadable.append(str(error))
            continue
        image = resized(picture, cfg.target.size)
        for _, z in predictions(predict, lambda _, image=image: image, 1, 1, device):
            ids = classify(z, picture.size[::-1]).cpu().numpy()
        colour = colourise(ids, classes)
        save_png(Path(out, "train_ids", name), ids)
        save_png(Path(out, "colour", name), colour)
        save_png(Path(out, "overlay", name), Image.blend(picture, Image.fromarray(colour), 0.5))
    print(f"written: train_ids, colour and overlay of {len(paths) - len(unreadable)} images below {out}")
    print("train ids: " + ", ".join(f"{k} {name}" for k, name in enumerate(classes)))
    print("".join(f"left out: {line}\n" for line in unreadable), end="")


# -------------------------------------------------------------------------------------------------- reporting


def percent(iou: float | None) -> str:
    return "absent" if iou is None else f"{100 * iou:.2f}"


def print_result(result: dict) -> None:
    """Fixed-width per-class table and the line that says how the numbers came about."""
    print(f"\n{'class':<16}{'IoU %':>8}{'pixels %':>10}")
    rows = np.asarray(result["confusion"]).sum(1)
    for (name, iou), pixels in zip(result["per_class"].items(), rows, strict=True):
        print(f"{name:<16}{percent(iou):>8}{100 * pixels / max(rows.sum(), 1):>10.2f}")
    print(f"{'mIoU':<16}{percent(result['miou']):>8}")
    if "miou13" in result:
        print(f"{'mIoU*':<16}{percent(result['miou13']):>8}   over 13 classes, without {', '.join(NOT_IN_13)}")
    absent = [name for name, iou in result["per_class"].items() if iou is None]
    if absent:
        print(f"not in the mean, because in neither label nor prediction: {', '.join(absent)}")
    print(f"protocol: {result['protocol']}\n")


def read_result(path) -> dict:
    """A JSON that this file wrote."""
    return read_json(path, RESULT, "give a JSON that evaluate.py wrote to RUN/eval/")


def compare(paths: list[str]) -> None:
    """Prints two results side by side with the difference. Raises UserError where they do not measure the same."""
    a, b = map(read_result, paths)
    for key in ("classes", "split"):
        if a[key] != b[key]:
            raise UserError(f"{paths[1]}: {key} {b[key]}, but {a[key]} in {paths[0]}; compare results of one {key}")
    print(f"\nA: {paths[0]}\n   {a['protocol']}\nB: {paths[1]}\n   {b['protocol']}\n")
    print(f"{'IoU %':<16}{'A':>8}{'B':>8}{'B - A':>8}")
    rows = [(name, a["per_class"][name], b["per_class"][name]) for name in a["classes"]]
    for name, x, y in [*rows, ("mIoU", a["miou"], b["miou"])]:
        print(f"{name:<16}{percent(x):>8}{percent(y):>8}{'' if None in (x, y) else f'{100 * (y - x):+.2f}':>8}")
    differ = [name for name, x, y in rows if (x is None) != (y is None)]
    if differ:
        print(f"the means are over different classes: only one of A and B has {', '.join(differ)}")


def collect(folders: list[str]) -> dict:
    """{(split, model, run without its seed, variant): [result]} of run folders, each counted once.

    Raises UserError where results that would be averaged differ in config (but for the seed) or step.
    """
    rows, alike = {}, {}
    for folder in dict.fromkeys(Path(f).resolve() for f in folders):
        paths = sorted(p for p in folder.glob("eval/*.json") if not p.name.startswith("augmented"))
        if not paths:
            raise UserError(f"{folder}: no eval/*.json in it; run evaluate.py with its config first")
        for path in paths:
            result = read_result(path)
            config, variant = result["config"], result["variant"]
            run = str(config.get("name")).removesuffix(f"-{config.get('seed')}")
            key = (result["split"], result["model"], run, variant)
            same = {k: v for k, v in config.items() if k not in ("seed", "name", "output", "device", "workers")}
            same |= {"step": result["step"], "classes": result["classes"]}
            for k, v in alike.setdefault(key, same).items():
                if same.get(k) != v:
                    raise UserError(f"{path}: {k} is {same.get(k)!r}, but {v!r} in another run of the same name; "
                                    "tabulate runs that differ in the seed alone")
            rows.setdefault(key, []).append(result)
            checkpoint = folder / "selfens" / variant / "last.pt"
            if checkpoint.exists() and os.path.getmtime(checkpoint) > os.path.getmtime(path):
                print(f"warning: {checkpoint} is newer than {path}; run evaluate.py again")
    return rows


def table(folders: list[str]) -> None:
    """Prints mean and sample deviation over runs for each variant, model and split. Runs NAME-SEED are one row.

    gap: the share, in %, of the way from the same run's source_only to its target_only.
    """
    rows = collect(folders)
    names = next(iter(rows.values()))[0]["classes"]
    if any(result["classes"] != names for results in rows.values() for result in results):
        raise UserError("--table: runs of different class lists; give those of one")
    wide = max(len(key[2]) for key in rows) + 2
    print("\nIoU in %, mean ± sample deviation over runs\n" + "run".ljust(wide) + f"{'variant':<17}{'model':<9}"
          f"{'split':<6}{'step':>11}{'runs':>5}{'mIoU':>14}{'gap':>6}" + "".join(f"{n[:10]:>11}" for n in names))

    def mean(key):
        return np.mean([100 * r["miou"] for r in rows[key]]) if key in rows else np.nan

    for key in sorted(rows, key=lambda k: (k[2], k[0], k[1], VARIANTS.index(k[3]))):
        results, (split, model, run, variant) = rows[key], key
        values = [100 * r["miou"] for r in results]
        spread = f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else "–"
        low, high = (mean((*key[:3], end)) for end in ("source_only", "target_only"))
        gap = f"{100 * (mean(key) - low) / (high - low):.0f}" if high > low else ""
        print(run.ljust(wide) + f"{variant:<17}{model:<9}{split:<6}{results[0]['step']:>5}/{results[0]['steps']:<5}"
              f"{len(results):>5}{mean(key):>8.2f} ±{spread:>5}{gap:>6}", end="")
        for n in names:
            ious = [100 * r["per_class"][n] for r in results if r["per_class"][n] is not None]
            print(f"{np.mean(ious):>11.2f}" if ious else f"{'absent':>11}", end="")
        print()


# ------------------------------------------------------------------------------------------------------- main


def main() -> None:
    cfg, args = command_line(
        ("--split", {"choices": ("val", "train", "test"), "default": "val"}),
        ("--model", {"choices": ("teacher", "student"), "default": "teacher"}),
        ("--export", {}), ("--images", {}), ("--out", {}), ("--compare", {"nargs": 2}), ("--table", {"nargs": "+"}),
    )  # fmt: skip
    if args.table:
        return table(args.table)
    if args.compare:
        return compare(args.compare)
    if (args.images is None) != (args.out is None):
        raise UserError("command line: --images PATH and --out DIR go together")
    device = get_device(cfg)
    cast = autocast(device, get_precision(cfg, device))
    path = Path(cfg.output, cfg.name, "selfens", cfg.selfens.variant, "last.pt")
    classes = class_list(cfg)[1]
    net, state = load_net(path, args.model, build_segmenter, classes, device)

    def predict(x):
        with cast:
            logits = net(x)
        for z in logits:  # one at a time: up-sampled logits of a batch of large images would take gigabytes
            yield upsample(z[None], net.stride, x.shape[-2:])[0]

    if args.images:
        return predict_images(cfg, args.images, args.out, predict, classes, device)
    evaluate(cfg, args, predict, state, device)


if __name__ == "__main__":
    run_main(main)
