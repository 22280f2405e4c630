"""Stage 2: repaints every source image with the trained generator, each with a randomly drawn target image as guide.

Reads OUTPUT/NAME/gan/last.pt, the source's images and the target's images; writes OUTPUT/NAME/augmented/styleK/NAME.png
under the source image's name, and augmented/manifest.jsonl with one line per image: file, source image, label (the
source's own), style guide, generator digest, seed. Run again, it makes what is missing and nothing else.

    python augment.py
    python augment.py configs/carla_camvid.yaml augment.styles_per_image=2
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import Augmented, Scenes, to_float
from models import build_generator
from runtime import (
    Run, UserError, atomic_write, autocast, command_line, get_device, get_precision, load_checkpoint, load_weights,
    make_folder, make_sheet, random_generator, refuse_changes, run_main, set_aside, stage_config,
    to_uint8, weights_digest, write_json,
)  # fmt: skip

SECTIONS = ("", "source", "target", "augment")


def planned_files(folder: Path, source: Scenes, styles: int) -> list[Path]:
    """The file of source image i in style s is at position s * len(source) + i."""
    return [folder / f"style{s}" / f"{sample.name}.png" for s in range(styles) for sample in source.samples]


def open_augmented(cfg, source: Scenes) -> Augmented:
    """The finished augmented images, for stage 3. Raises UserError where they are missing, incomplete or of another config."""
    folder = Path(cfg.output, cfg.name, "augmented")
    try:
        identity = json.loads((folder / "identity.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder}: no augmented images; run python augment.py with this config first") from None
    refuse_changes(identity["config"], stage_config(cfg, SECTIONS), folder)
    files = planned_files(folder, source, cfg.augment.styles_per_image)
    done = read_manifest(folder, identity["generator"])
    missing = [file for file in files if file.relative_to(folder).as_posix() not in done or not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: augmented image missing ({len(missing)} of {len(files)}); run augment.py again")
    return Augmented(source, files)


def read_manifest(folder: Path, generator: str) -> dict:
    """{file: line} of manifest.jsonl. A torn last line counts as not written; a line of another generator is an error."""
    path, done = folder / "manifest.jsonl", {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if line["generator"] != generator:
            raise UserError(f"{path}: {line['file']} was made by generator {line['generator']}, not {generator}; "
                            "move the folder away or choose another 'name'")
        done[line["file"]] = line
    return done


def main() -> None:
    def arguments(parser):
        parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept aside")

    cfg, args = command_line(__doc__, (*SECTIONS, "gan"), arguments)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    checkpoint = Path(cfg.output, cfg.name, "gan", "last.pt")
    state = load_checkpoint(checkpoint, "train it first: python train_gan.py with this config")
    if state["step"] < state["config"]["gan.steps"]:
        raise UserError(f"{checkpoint}: training stopped at step {state['step']} of {state['config']['gan.steps']}; "
                        "run train_gan.py again, it continues")
    refuse_changes(state["config"], stage_config(cfg, ("", "source", "target", "gan")), checkpoint)
    G = build_generator(cfg)
    load_weights(G, state["G"], checkpoint)
    generator = weights_digest(state["G"])

    # Images of another generator or config must not mix with this one's.
    folder = Path(cfg.output, cfg.name, "augmented")
    if args.restart:
        set_aside(folder)
    precision = get_precision(cfg, get_device(cfg))
    identity = {"generator": generator, "config": stage_config(cfg, SECTIONS) | {"precision": precision}}
    identity_file = folder / "identity.json"
    if identity_file.exists():
        then = json.loads(identity_file.read_text())
        refuse_changes(then["config"] | {"generator": then["generator"]}, identity["config"] | {"generator": generator}, folder)
    files = planned_files(folder, source, cfg.augment.styles_per_image)
    foreign = {*folder.glob("style*/**/*.png")} - {*files}
    if foreign:
        raise UserError(f"{min(foreign)}: does not belong to this run ({len(foreign)} such images); use --restart")

    # Whole batches are made again where one image of them is missing, so that each batch, and with it every bit, is
    # the same whether the run was interrupted or not.
    done = read_manifest(folder, generator)
    size, n = cfg.augment.batch, len(source)
    todo = [b for b in range(-(-len(files) // size))
            if any(f.relative_to(folder).as_posix() not in done or not f.is_file() for f in files[b * size : (b + 1) * size])]
    if not todo:
        print(f"augment: {len(files)} images are there, made by generator {generator}; nothing to do")
        return
    run = Run(cfg, "augment", folder, SECTIONS, redo={b + 1 for b in todo})
    write_json(identity_file, identity)
    # A line that was torn when the disk filled up or the power went must not swallow the next one.
    lines = "".join(json.dumps(line) + "\n" for line in done.values())
    atomic_write(folder / "manifest.jsonl", lambda file: file.write(lines.encode()))
    G = G.to(run.device, memory_format=torch.channels_last).eval()
    print(f"augment: {len(files)} images of generator {generator}, {len(todo)} batches of {size} to make")

    def write(file, image):
        make_folder(file.parent)
        atomic_write(file, lambda out: Image.fromarray(image).save(out, "PNG"))

    sheet = []
    with open(folder / "manifest.jsonl", "a", encoding="utf-8") as manifest, ThreadPoolExecutor() as pool:
        for _, b in run.progress(todo, len(todo), "augment", start=0):
            indices = range(b * size, min((b + 1) * size, len(files)))
            guides = [int(random_generator(cfg.seed, "augment", i).integers(len(target))) for i in indices]
            x_s = to_float(torch.stack([source.image(i % n) for i in indices]), run.device)
            x_t = to_float(torch.stack([target.image(j) for j in guides]), run.device)
            with torch.inference_mode(), autocast(run.device, run.precision):
                x_g = [to_uint8(x) for x in G(x_s, x_t)]
            list(pool.map(write, [files[i] for i in indices], x_g))  # PNG compression leaves the interpreter lock
            for i, j in zip(indices, guides, strict=True):
                name = files[i].relative_to(folder).as_posix()
                if name not in done:
                    print(json.dumps({
                        "file": name, "source": source.samples[i % n].image, "label": source.samples[i % n].label,
                        "style": target.samples[j].image, "generator": generator, "seed": cfg.seed,
                    }), file=manifest, flush=True)  # fmt: skip
            if len(sheet) < 6:
                sheet.append([to_uint8(x_s[0]), x_g[0], to_uint8(x_t[0])])
            run.log(b + 1, images=len(indices), mean=np.mean(x_g) / 127.5 - 1)
    run.sheet(todo[-1] + 1, "augmented", make_sheet(["source", "augmented", "style guide"], sheet))
    run.close()
    print(f"augment: {folder} is complete; next: python train_selfens.py {' '.join(args.items)}".rstrip())


if __name__ == "__main__":
    run_main(main)
