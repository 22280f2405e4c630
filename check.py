"""Checks the data before anything is trained on it.

    python check.py CFG            reads every file's header, and the pixels of a sample
    python check.py CFG --full     decodes every file, on all cores

Counts the pairs, names every file that cannot be used (exit status 2 if there is one), says what is not used,
prints each class's share of the pixels, and writes OUTPUT/NAME/check/sheet.png, images with their labels over
them. It reads what training reads: the target's training labels for selfens.variant=target_only alone.
"""

import json
import math
import os
from pathlib import Path

from runtime import UserError, atomic_write, command_line, make_sheet, run_main

# isort: split
import numpy as np

from datasets import Scenes, class_list, colourise, has_labels
from losses import IGNORE


def check_split(cfg, role: str, split: str, full: bool, seen: dict) -> Scenes:
    """Prints a line on a split. seen: {image file: (role, split)}, to which this split is added."""
    labels = role == "source" or has_labels(cfg, role, split)
    if (role, split) == ("target", "train"):
        labels = cfg.selfens.variant == "target_only"
    scenes = Scenes(cfg, role, split, labels, math.inf if full else 64, strict=False)
    for name, image, _ in scenes.samples:
        first = seen.setdefault(os.path.realpath(image), (role, split))
        if first != (role, split):
            scenes.problems.append((name, f"{image}: is in {' '.join(first)}, too; leave it out of one"))
    note = "" if labels else ", labels not looked at"
    print(f"{role} {split:<7}{len(scenes):>6} images{note}, {len(scenes.whole)} decoded, "
          f"{len(scenes.problems)} problems")
    if unused := scenes.unused:
        print(f"note: {len(unused)} image files are not used, such as {unused[0]}: not in {role}.files")
    return scenes


def overlays(splits: list[Scenes]) -> list[list[np.ndarray]]:
    """[image, image with its label over it, ignored pixels dark] of 5 sound samples."""
    rows, bad = [], {name for scenes in splits for name, _ in scenes.problems}
    whole = [(scenes, i) for scenes in splits for i in sorted(scenes.whole)]
    sound = [(scenes, i) for scenes, i in whole if scenes.samples[i].name not in bad]
    sound = [(scenes, i) for scenes, i in sound if scenes.samples[i].label] or sound
    for scenes, i in sound[:: max(1, len(sound) // 5)][:5]:
        image, label = scenes.image(i).permute(1, 2, 0).numpy(), colourise(scenes.label(i), scenes.classes)
        rows.append([image, (0.4 * image + 0.6 * label).astype(np.uint8)])
    return rows


def print_shares(classes: dict, pixels: dict) -> None:
    """Each class's share of the labelled pixels of each role, and notes on what has none."""
    print(f"\n{'share of labelled pixels, %':<30}" + "".join(f"{role:>8}" for role in pixels))
    known = [p[: len(classes)] for p in pixels.values()]
    for k, name in enumerate(classes):
        print(f"{name:<30}" + "".join(f"{100 * p[k] / max(1, p.sum()):>8.2f}" for p in known))
    ignored = [100 * p[IGNORE] / max(1, p.sum()) for p in pixels.values()]
    print(f"{'ignored, of all pixels':<30}" + "".join(f"{share:>8.2f}" for share in ignored))
    for role, p in zip(pixels, known, strict=True):
        if absent := [name for name, count in zip(classes, p, strict=True) if not count]:
            print(f"note: {role} has no labelled pixel of {', '.join(absent) if p.any() else 'any class'}")


def main() -> None:
    cfg, args = command_line(("--full", {"action": "store_true"}))
    name, classes = class_list(cfg)
    print(f"classes: {len(classes)} of {name}")
    seen = {}
    splits = {role: [check_split(cfg, role, split, args.full, seen) for split in ("train", "val")]
              for role in ("source", "target")}  # fmt: skip
    print_shares(classes, {role: train.counts + val.counts for role, (train, val) in splits.items()})
    rows = [s + t for s, t in zip(overlays(splits["source"]), overlays(splits["target"]), strict=False)]
    if rows:
        columns = [f"{role}: {word}" for role in splits for word in ("image", "label over it")]
        path = Path(cfg.output, cfg.name, "check", "sheet.png")
        atomic_write(path, lambda file: make_sheet(columns, rows).save(file, "PNG"))
        print(f"\nwritten: {path}")
    problems = {role: train.problems + val.problems for role, (train, val) in splits.items()}
    for role, found in problems.items():
        for text in dict.fromkeys(text for _, text in found):
            print(f"{role}: {text}")
        if found:
            names = sorted({name for name, _ in found})
            print(f"to leave out what cannot be mended: {role}.exclude: {json.dumps(names)}")
    if any(problems.values()):
        raise UserError("data check: problems, each named above")
    print(f"data check: no problem{'' if args.full else ' in the sample'}")


if __name__ == "__main__":
    run_main(main)
