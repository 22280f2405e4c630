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

from datasets import (
    class_list, colourise, examine, find_samples, get_block, has_labels, id_table, read_image, read_label,
)  # fmt: skip
from losses import IGNORE

SAMPLE = 64  # files of each split that are decoded without --full


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).astype(int))] if items else []


def check_split(cfg, role: str, split: str, labels: bool, full: bool) -> tuple[list, list, np.ndarray]:
    """Prints a line on one split. Returns ([(name, what is wrong)], sound samples, (256,) pixels per train id)."""
    samples, problems, missed = find_samples(cfg, role, split, labels)
    block = get_block(cfg, role)
    look = partial(examine, read=block.read, table=id_table(block, *class_list(cfg)) if labels else None)
    few = samples if full else spread(samples, SAMPLE)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(partial(look, decode=False), samples, chunksize=64))
        decoded = list(pool.map(partial(look, decode=True), few, chunksize=8))
    problems += [(s.name, text) for s, (text, _) in zip(samples + few, found + decoded, strict=True) if text]
    problems = list(dict.fromkeys(problems))
    print(f"{role} {split:<7}{len(samples):>6} images{'' if labels else ', labels not looked at'}, {len(few)} decoded, "
          f"{len(problems)} problems")
    if missed:
        print(f"note: {len(missed)} image files are not used, such as {missed[0]}: they do not match {role}.files")
    pixels = sum((counts for _, counts in decoded if counts is not None), np.zeros(256, np.int64))
    bad = {name for name, _ in problems}
    return problems, [s for s in few if s.name not in bad], pixels


def overlay(cfg, role: str, sample, height: int = 180) -> list[np.ndarray]:
    """[image, image with its label over it, ignored pixels dark], both (height, at most 4 height, 3) uint8."""
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
    shares = {role: 100 * p[: len(classes)] / max(1, p[: len(classes)].sum()) for role, p in pixels.items()}
    for k, name in enumerate(classes):
        print(f"{name:<30}" + "".join(f"{share[k]:>8.2f}" for share in shares.values()))
    ignored = [100 * p[IGNORE] / max(1, p.sum()) for p in pixels.values()]
    print(f"{'ignored, of all pixels':<30}" + "".join(f"{share:>8.2f}" for share in ignored))
    for role, p in pixels.items():
        absent = [name for k, name in enumerate(classes) if not p[k]]
        if absent:
            print(f"note: {role} has no labelled pixel of {', '.join(absent) if p.any() else 'any class'}")


def main() -> None:
    cfg, args = command_line(("--full", {"action": "store_true"}))
    name, classes = class_list(cfg)
    print(f"classes: {len(classes)} of {name}")
    problems, pixels, good, seen = [], {}, {}, {}
    for role in ("source", "target"):
        pixels[role], good[role] = np.zeros(256, np.int64), []
        for split in ("train", "val"):
            labels = role == "source" or (cfg.selfens.variant == "target_only" if split == "train"
                                          else has_labels(cfg, role, split))
            try:
                found, samples, counts = check_split(cfg, role, split, labels, args.full)
            except UserError as error:
                found, samples, counts = [(None, str(error))], [], 0
            problems += [(role, *one) for one in found]
            good[role] += samples
            pixels[role] += counts
            for sample in samples:
                if seen.setdefault(os.path.realpath(sample.image), f"{role} {split}") != f"{role} {split}":
                    problems.append((role, sample.name, f"{sample.image}: is in {seen[os.path.realpath(sample.image)]}, "
                                     f"too; each image belongs to one role and split"))
    print_shares(classes, pixels)
    columns = [f"{role}: {word}" for role in good for word in ("image", "label over it")]
    picks = [spread([s for s in samples if s.label] or samples, 5) for samples in good.values()]
    if all(picks):
        rows = [sum((overlay(cfg, role, some[i % len(some)]) for role, some in zip(good, picks, strict=True)), [])
                for i in range(max(map(len, picks)))]
        path = Path(cfg.output, cfg.name, "check", "sheet.png")
        atomic_write(path, lambda file: make_sheet(columns, rows).save(file, "PNG"))
        print(f"\nwritten: {path}")
    for role, _, text in dict.fromkeys(problems):
        print(f"{role}: {text}")
    for role in good:
        if names := sorted({name for r, name, _ in problems if r == role and name}):
            print(f"to leave out what cannot be mended: {role}.exclude: {json.dumps(names)}")
    if problems:
        raise UserError("data check: problems, each named above")
    print(f"data check: no problem{'' if args.full else ' in the sample'}")


if __name__ == "__main__":
    run_main(main)
