"""Stage 2: repaints every source image with the trained generator, each with a randomly drawn target image as guide.

Reads OUTPUT/NAME/gan/last.pt, the source's images and the target's images; writes OUTPUT/NAME/augmented/styleK/NAME.png
under the source image's name, and augmented/manifest.jsonl with one line per image: file, names of the source image (whose
label is its label, too) and of the style guide, generator digest, seed. Run again, it makes what is missing and nothing else.

    python augment.py
    python augment.py configs/carla_camvid.yaml augment.styles_per_image=2

In place of G, to compare with, augment.method takes translators that need no training: reinhard (colour statistics of the
guide), fda (low frequencies' amplitudes of the guide), and folder: images that any other tool has translated.

    python augment.py name=fda augment.method=fda augment.fda_beta=0.01
    python augment.py name=cyclegan augment.method=folder augment.folder=DIR augment.styles_per_image=1
"""

import hashlib
import json
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datasets import SUFFIXES, Augmented, Scenes, links_out, read_image, to_float
from models import build_generator
from runtime import (
    THREADS, Run, UserError, atomic_write, autocast, command_line, gather, get_device, load_checkpoint, load_weights,
    make_folder, make_sheet, prefetch, random_generator, rank, refuse_changes, refuse_data, run_main, shown, stage_config,
    to_uint8, weights_digest, world, write_json, writing,
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
    return Augmented(source, files, identity["generator"], folder)


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


# ------------------------------------------------------------------------------------- translators that are not trained

# Reinhard, Ashikhmin, Gooch, Shirley 2001, "Color Transfer between Images": RGB -> LMS, logarithm, -> l alpha beta.
LMS = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=torch.float64)
LAB = torch.tensor([[1, 1, 1], [1, 1, -2], [1, -1, 0]], dtype=torch.float64) / torch.tensor([[3], [6], [2]]).double().sqrt()


def reinhard(x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """x_s with each channel's mean and deviation of x_t, in l alpha beta. (N, 3, H, W) in [-1, 1] both -> the same."""
    def to_lab(x):  # black has no logarithm: a grey level is the least
        lms = torch.einsum("ij,njhw->nihw", LMS.to(x.device), ((x.double() + 1) / 2).clamp(min=1 / 255)).log10()
        return torch.einsum("ij,njhw->nihw", LAB.to(x.device), lms)

    s, t = to_lab(x_s), to_lab(x_t)
    (var_s, mean_s), (var_t, mean_t) = (torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (s, t))
    lab = (s - mean_s) * (var_t / var_s.clamp(min=1e-12)).sqrt() + mean_t
    lms = 10 ** torch.einsum("ij,njhw->nihw", LAB.inverse().to(x_s.device), lab)
    return (torch.einsum("ij,njhw->nihw", LMS.inverse().to(x_s.device), lms) * 2 - 1).clamp(-1, 1).to(x_s.dtype)


def fda(x_s: torch.Tensor, x_t: torch.Tensor, beta: float) -> torch.Tensor:
    """Fourier domain adaptation (Yang & Soatto 2020): x_s with the low frequencies' amplitudes of x_t, phases kept.

    x_s: (N, 3, H, W) in [-1, 1]; x_t: (N, 3, H', W'), resized to x_s's size first; beta: the block of frequencies reaches
    floor(beta min(H, W)) to each side of frequency 0, in both directions -> (N, 3, H, W), clipped to [-1, 1].
    """
    if x_t.shape != x_s.shape:
        x_t = torch.nn.functional.interpolate(x_t, x_s.shape[-2:], mode="bilinear", antialias=True)
    s, t = (torch.fft.fftshift(torch.fft.fft2(x.double() + 1), dim=(-2, -1)) for x in (x_s, x_t))
    h, w, b = s.shape[-2] // 2, s.shape[-1] // 2, int(beta * min(s.shape[-2:]))
    block = (..., slice(max(0, h - b), h + b + 1), slice(max(0, w - b), w + b + 1))
    amplitude, phase = s.abs(), s.angle()
    amplitude[block] = t.abs()[block]
    x = torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude, phase), dim=(-2, -1))).real - 1
    return x.clamp(-1, 1).to(x_s.dtype)


def ready_images(cfg, source: Scenes) -> list[Path]:
    """`augment.folder`'s file for each image, in the order of `planned_files`. Raises UserError where one is missing."""
    if cfg.augment.folder is None or not Path(cfg.augment.folder).is_dir():
        raise UserError(f"augment.folder={cfg.augment.folder}: no such folder; set it to where the translated images lie")
    root, styles = Path(cfg.augment.folder), cfg.augment.styles_per_image
    stems = [root / (f"style{s}" if styles > 1 else "") / sample.name for s in range(styles) for sample in source.samples]
    found = [next((p for p in (stem.with_name(stem.name + end) for end in SUFFIXES) if p.is_file()), None) for stem in stems]
    if None in found:
        raise UserError(f"{stems[found.index(None)]}.png: no such translated image ({found.count(None)} of {len(stems)} are "
                        "missing); each has the name of its source image")
    for link, real in links_out(map(str, found), root).items():
        raise UserError(f"{link}: leads to {real}, outside {root}; copy the file there")
    return found


def build_translator(cfg, source: Scenes, data: dict):
    """(translate, ready, digest): `augment.method` as a function, and what tells its images from others'.

    translate(x_s, x_t), both (N, 3, H, W) in [-1, 1] on the device -> (N, 3, H, W); ready: for `folder`, the files that
    take the place of the source images, else None. data: digests of what a generator must have been trained on.
    Raises UserError where a generator is not trained to its end, or was trained with another config or other data.
    """
    method = cfg.augment.method
    if method == "reinhard":
        return reinhard, None, method
    if method == "fda":
        return partial(fda, beta=cfg.augment.fda_beta), None, f"fda {cfg.augment.fda_beta:g}"
    if method == "folder":
        ready = ready_images(cfg, source)
        sizes = hashlib.sha256(json.dumps([[p.name, p.stat().st_size] for p in ready]).encode()).hexdigest()[:16]
        return (lambda x_s, x_t: x_s), ready, f"folder {sizes}"
    checkpoint = Path(cfg.output, cfg.name, "gan", "last.pt")
    state = load_checkpoint(checkpoint, "run train_gan.py with this config first; it continues what was stopped", ("G",))
    refuse_changes(state["config"], stage_config(cfg, ("", "source", "target", "gan")), checkpoint)
    refuse_data(state.get("data"), data, checkpoint)
    if state["step"] < cfg.gan.steps:
        raise UserError(f"{checkpoint}: training stopped at step {state['step']} of {cfg.gan.steps}; run train_gan.py again, "
                        "it continues")
    G = build_generator(cfg)
    load_weights(G, state["G"], checkpoint)
    return G.to(get_device(cfg), memory_format=torch.channels_last).eval(), None, weights_digest(state["G"])


def main() -> None:
    def arguments(parser):
        parser.add_argument("--restart", action="store_true", help="begin anew; the old folder is kept aside")

    cfg, args = command_line(__doc__, (*SECTIONS, "gan"), arguments)
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    data = {"source train": source.digest, "target train": target.digest}
    translate, ready, generator = build_translator(cfg, source, data)

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
    print(f"augment: {len(files)} images of generator {generator}, {len(todo)} batches of {size} to make")

    def write(file, image):
        make_folder(file.parent)
        atomic_write(file, lambda out: Image.fromarray(image).save(out, "PNG"))

    def read(i):
        if ready:  # in place of the source image
            image = read_image(str(ready[i])).resize(source.size[::-1], Image.BILINEAR)
            return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), target.image(guides[i])
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
                    x_g = [to_uint8(x) for x in translate(to_float(x_s, run.device), to_float(x_t, run.device))]
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
