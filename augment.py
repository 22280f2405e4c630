"""Stage 2: repaints every source image with the trained generator, each with a randomly drawn target image as guide.

Reads OUTPUT/NAME/gan/last.pt, the source's images and the target's images; writes OUTPUT/NAME/augmented/styleK/NAME.png
under the source image's name, and augmented/manifest.jsonl with one line per image: file, names of the
source image (whose label is its label, too) and of the style guide, generator digest, seed. Run again, it makes what
is missing and nothing else.

    python augment.py
    python augment.py configs/carla_camvid.yaml augment.styles_per_image=2
"""

import json
from collections import deque
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import Augmented, Scenes, links_out, read_image, to_float
from models import build_generator
from runtime import (
    THREADS, Run, UserError, atomic_write, autocast, command_line, gather, load_checkpoint, load_weights, make_folder,
    make_sheet, prefetch, random_generator, rank, refuse_changes, refuse_data, run_main, shown, stage_config, to_uint8,
    weights_digest, world, write_json, writing,
)  # fmt: skip

SECTIONS = ("", "source", "target", "augment")
ANEW = "python augment.py --restart with this config begins anew"


def planned_files(folder: Path, source: Scenes, styles: int) -> list[Path]:
    """The file of source image i in style s is at position s * len(source) + i."""
    return [folder / f"style{s}" / f"{sample.name}.png" for s in range(styles) for sample in source.samples]


def open_augmented(cfg, source: Scenes) -> Augmented:
    """The finished augmented images, for stage 3. Raises UserError where they are missing, incomplete or of another config."""
    folder = Path(cfg.output, cfg.name, "augmented")
    identity = read_identity(folder / "identity.json")
    if identity is None:
        raise UserError(f"{folder}: no augmented images; run python augment.py with this config first")
    refuse_changes(identity["config"], stage_config(cfg, SECTIONS), folder)
    refuse_data(identity["data"], {"source train": source.digest}, folder)
    files = planned_files(folder, source, cfg.augment.styles_per_image)
    done = read_manifest(folder, identity["generator"])
    missing = [file for file in files if file.relative_to(folder).as_posix() not in done or not file.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: augmented image missing ({len(missing)} of {len(files)}); run augment.py again")
    return Augmented(source, files, identity["generator"])


def read_identity(path: Path) -> dict | None:
    """identity.json: {generator: digest, config: {key: value}, data: {name: digest}}; None where there is no such file.

    Raises UserError for any other content.
    """
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
        if [type(identity[k]) for k in ("generator", "config", "data")] == [str, dict, dict]:
            return identity
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{path}: not what augment.py writes there; {ANEW}")


def read_manifest(folder: Path, generator: str) -> dict:
    """{file: line} of manifest.jsonl. A torn line counts as not written.

    Raises UserError for a line of another generator or of other content, for a file that is not below the folder, and
    where a link in the folder leads out of it. (The folder itself may be one.)
    """
    path, done = folder / "manifest.jsonl", {}
    try:
        texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', 0) or error}); {ANEW}") from None
    for n, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        except RecursionError:
            line = None
        if not isinstance(line, dict) or not all(isinstance(line.get(key), str) for key in ("file", "generator")):
            raise UserError(f"{path}: line {n} is not one of augment.py's; {ANEW}")
        file = Path(line["file"])
        if file.is_absolute() or ".." in file.parts or "\0" in line["file"]:
            raise UserError(f"{path}: line {n}: {shown(line['file'])} is not below {folder}; {ANEW}")
        if line["generator"] != generator:
            raise UserError(f"{path}: {shown(line['file'])} was made by generator {shown(line['generator'])}, not {generator}; "
                            "move the folder away or choose another 'name'")
        done[line["file"]] = line
    inside = (os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))
    for link, real in links_out(inside, folder).items():
        raise UserError(f"{link}: leads to {real}, outside {folder}; remove the link")
    return done


def main() -> None:
    def arguments(parser):
        parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept aside")

    cfg, args = command_line(__doc__, (*SECTIONS, "gan"), arguments)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    checkpoint = Path(cfg.output, cfg.name, "gan", "last.pt")
    state = load_checkpoint(checkpoint, "run train_gan.py with this config first; it continues what was stopped", ("G",))
    data = {"source train": source.digest, "target train": target.digest}
    refuse_changes(state["config"], stage_config(cfg, ("", "source", "target", "gan")), checkpoint)
    refuse_data(state.get("data"), data, checkpoint)
    if state["step"] < cfg.gan.steps:
        raise UserError(f"{checkpoint}: training stopped at step {state['step']} of {cfg.gan.steps}; run train_gan.py again, "
                        "it continues")
    G = build_generator(cfg)
    load_weights(G, state["G"], checkpoint)
    generator = weights_digest(state["G"])

    # Images of another generator, config or other data must not mix with this one's.
    folder = Path(cfg.output, cfg.name, "augmented")
    run = Run(cfg, "augment", folder, SECTIONS, restart=args.restart)
    identity_file = folder / "identity.json"
    identity = {"generator": generator, "config": run.config, "data": data}
    if then := read_identity(identity_file):
        refuse_changes(then["config"] | {"generator": then["generator"]}, run.config | {"generator": generator}, folder)
        refuse_data(then["data"], data, folder)
    files = planned_files(folder, source, cfg.augment.styles_per_image)
    foreign = {*folder.glob("style*/**/*.png")} - {*files}
    if foreign:
        raise UserError(f"{min(foreign)}: does not belong to this run ({len(foreign)} such images); use --restart")

    # Whole batches are made again where one image of them is missing, so that each batch, and with it every bit, is
    # the same whether the run was interrupted or not.
    done = read_manifest(folder, generator)
    size, n = cfg.augment.batch, len(source)
    batches = [range(first, min(first + size, len(files))) for first in range(0, len(files), size)]
    todo = [b for b, some in enumerate(batches, 1)
            if any(files[i].relative_to(folder).as_posix() not in done or not files[i].is_file() for i in some)]
    todo = gather(todo)[0]  # nobody begins before all have looked
    guides = [int(random_generator(cfg.seed, "augment", i).integers(len(target))) for i in range(len(files))]
    sheet_file = folder / "sheets" / f"augmented-{len(batches):07d}.png"
    if not todo and sheet_file.exists():
        print(f"augment: {len(files)} images are there, made by generator {generator}; nothing to do")
        return
    if rank() == 0:
        make_folder(folder)
        write_json(identity_file, identity)
        # A line that was torn when the disk filled up or the power went must not swallow the next one.
        lines = "".join(json.dumps(line) + "\n" for line in done.values())
        atomic_write(folder / "manifest.jsonl", lambda file: file.write(lines.encode()))
    G = G.to(run.device, memory_format=torch.channels_last).eval()
    print(f"augment: {len(files)} images of generator {generator}, {len(todo)} batches of {size} to make")

    def write(file, image):
        make_folder(file.parent)
        atomic_write(file, lambda out: Image.fromarray(image).save(out, "PNG"))

    def read(i):
        return source.image(i % n), target.image(guides[i])

    # Several processes take turns, batch by batch. One that has none in the last round takes part with nothing in hand.
    own = todo[rank() :: world()] + [None] * (len(todo) % world() > 0 and rank() >= len(todo) % world())

    def read_batches():  # two batches ahead of the generator
        ready = prefetch((i for b in own if b for i in batches[b - 1]), read, 2 * size, THREADS)
        for b in own:
            yield (b, *map(torch.stack, zip(*islice(ready, len(batches[b - 1])), strict=True))) if b else (b, None, None)

    def finish(b, written, mean):
        for one in written:
            one.result()
        # The manifest comes last: what it lists is there and logged.
        for number, value in [one for one in gather((b, mean)) if one[0]]:
            some = batches[number - 1]
            run.log(number, images=len(some), mean=value)
            lines = [json.dumps({
                "file": name, "source": source.samples[i % n].name, "style": target.samples[guides[i]].name,
                "generator": generator, "seed": cfg.seed,
            }) + "\n" for i in some if (name := files[i].relative_to(folder).as_posix()) not in done]  # fmt: skip
            if rank() == 0:
                with writing(folder / "manifest.jsonl"), open(folder / "manifest.jsonl", "a", encoding="utf-8") as manifest:
                    manifest.write("".join(lines))

    # A batch is written while the next one is generated, and finished, in order, before the one after that.
    unfinished = deque()
    with ThreadPoolExecutor() as pool:
        for step, (b, x_s, x_t) in run.progress(read_batches(), len(own), "augment", redo={*todo}):
            x_g = []
            if b:
                with torch.inference_mode(), autocast(run.device, run.precision):
                    x_g = [to_uint8(x) for x in G(to_float(x_s, run.device), to_float(x_t, run.device))]
            written = [pool.submit(write, files[i], x) for i, x in zip(batches[b - 1] if b else (), x_g, strict=True)]
            unfinished.append((b, written, np.mean(x_g) / 127.5 - 1 if b else None))
            while len(unfinished) > (step < len(own)):
                finish(*unfinished.popleft())

    rows = [[source.image(i % n).permute(1, 2, 0).numpy(), np.asarray(read_image(str(files[i]))),
             target.image(guides[i]).permute(1, 2, 0).numpy()] for i in range(0, min(len(files), 6 * size), size)]
    run.sheet(len(batches), "augmented", make_sheet(["source", "augmented", "style guide"], rows))
    run.close()
    print(f"augment: {folder} is complete; next: python train_selfens.py {' '.join(args.items)}".rstrip())


if __name__ == "__main__":
    run_main(main)
