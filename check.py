"""Checks the data before anything is trained on it.

    python check.py CFG            reads every file's header, and the pixels of a sample
    python check.py CFG --full     decodes every file, on all cores

Counts the pairs, names every file that cannot be used (exit status 2 if there is one), says what is not used,
prints each class's share of the pixels, and writes OUTPUT/NAME/check/sheet.png, images with their labels over
them. It reads what training reads: the target's training labels for selfens.variant=target_only alone.
"""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from runtime import UserError, atomic_write, command_line, make_sheet, run_main

# isort: split
import numpy as np
from PIL import Image

from datasets import colourise
from losses import IGNORE
from pairs import (
    class_list, examine, find_samples, get_block, has_labels, id_table, read_image, read_label,
)  # fmt: skip


def check_split(cfg, role: str, split: str, full: bool, seen: dict) -> tuple[list, list, np.ndarray]:
    """Prints a line on a split -> ([(name, what is wrong)], sound samples, (256,) pixels per train id).

    The last two are of the decoded ones. seen: {image file: (role, split)}, to which this split is added.
    """
    labels = role == "source" or has_labels(cfg, role, split)
    if (role, split) == ("target", "train"):
        labels = cfg.selfens.variant == "target_only"
    try:
        samples, problems, unused = find_samples(cfg, role, split, labels)
    except UserError as error:
        return [("", str(error))], [], np.zeros(256, np.int64)
    block, n = get_block(cfg, role), len(samples)
    look = partial(examine, read=block.read, table=id_table(block, *class_list(cfg)) if labels else None)
    decode = np.isin(np.arange(n), np.linspace(0, n - 1, n if full else 64).astype(int))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        texts, counts = zip(*pool.map(look, samples, decode, chunksize=16), strict=True)
    problems += [(s.name, text) for s, text in zip(samples, texts, strict=True) if text]
    note = "" if labels else ", labels not looked at"
    print(f"{role} {split:<7}{n:>6} images{note}, {decode.sum()} decoded, {len(problems)} problems")
    if unused:
        print(f"note: {len(unused)} image files are not used, such as {unused[0]}: not in {role}.files")
    for s in samples:
        first = seen.setdefault(os.path.realpath(s.image), (role, split))
        if first != (role, split):
            problems.append((s.name, f"{s.image}: is in {' '.join(first)}, too; leave it out of one"))
    bad = dict(problems)
    return problems, [s for s, d in zip(samples, decode, strict=True) if d and s.name not in bad], sum(counts)


def overlay(cfg, role: str, sample, height: int = 180) -> list[np.ndarray]:
    """[image, image with label over it, ignored pixels dark], both (height, at most 4 height, 3) uint8."""
    image = read_image(sample.image)
    image = np.asarray(image.resize((min(4 * height, max(1, image.width * height // image.height)), height)))
    if sample.label is None:
        return [image, np.full_like(image, 255)]
    block, (name, classes) = get_block(cfg, role), class_list(cfg)
    label = Image.fromarray(read_label(sample.label, block.read, id_table(block, name, classes)))
    colours = colourise(label.resize(image.shape[1::-1], Image.NEAREST), classes)
    return [image, (0.4 * image + 0.6 * colours).astype(np.uint8)]


def print_shares(classes: dict, pixels: dict) -> None:
    """Each class's share of the labelled pixels of each role, and notes on what has none."""
    print(f"\n{'share of labelled pixels, %':<30}" + "".join(f"{role:>8}" for role in pixels))
    known = {role: p[: len(classes)] for role, p in pixels.items()}
    for k, name in enumerate(classes):
        print(f"{name:<30}" + "".join(f"{100 * p[k] / max(1, p.sum()):>8.2f}" for p in known.values()))
    ignored = [100 * p[IGNORE] / max(1, p.sum()) for p in pixels.values()]
    print(f"{'ignored, of all pixels':<30}" + "".join(f"{share:>8.2f}" for share in ignored))
    for role, p in known.items():
        absent = [name for k, name in enumerate(classes) if not p[k]]
        if absent:
            print(f"note: {role} has no labelled pixel of {', '.join(absent) if p.any() else 'any class'}")


def main() -> None:
    cfg, args = command_line(("--full", {"action": "store_true"}))
    name, classes = class_list(cfg)
    print(f"classes: {len(classes)} of {name}")
    problems, pixels, shown, seen = {}, {}, {}, {}
    for role in ("source", "target"):
        train, val = (check_split(cfg, role, split, args.full, seen) for split in ("train", "val"))
        problems[role], good, pixels[role] = (a + b for a, b in zip(train, val, strict=True))
        good = [s for s in good if s.label] or good
        shown[role] = good[:: max(1, len(good) // 5)][:5]
    print_shares(classes, pixels)
    if all(shown.values()):
        columns = [f"{role}: {word}" for role in shown for word in ("image", "label over it")]
        pairs = zip(shown["source"], shown["target"], strict=False)
        rows = [overlay(cfg, "source", s) + overlay(cfg, "target", t) for s, t in pairs]
        path = Path(cfg.output, cfg.name, "check", "sheet.png")
        atomic_write(path, lambda file: make_sheet(columns, rows).save(file, "PNG"))
        print(f"\nwritten: {path}")
    for role, found in problems.items():
        for text in dict.fromkeys(text for _, text in found):
            print(f"{role}: {text}")
    for role, found in problems.items():
        if names := sorted({name for name, _ in found if name}):
            print(f"to leave out what cannot be mended: {role}.exclude: {json.dumps(names)}")
    if any(problems.values()):
        raise UserError("data check: problems, each named above")
    print(f"data check: no problem{'' if args.full else ' in the sample'}")


if __name__ == "__main__":
    run_main(main)
