"""Stage 2: repaints every source image with the trained generator, each with a drawn target image as guide.

    python augment.py
    python augment.py configs/carla_camvid.yaml augment.styles_per_image=2
    python augment.py --restart                        begin anew; the old folder is kept aside
    python augment.py CFG --judge JUDGE.pt             do images keep their labels and follow their guides?

Reads OUTPUT/NAME/gan/last.pt and the images of source and target; writes OUTPUT/NAME/augmented/:
styleK/NAME.png under the source image's name (whose label is its label, too), and manifest.jsonl, each
image's source and guide. Run again, it makes what is missing and nothing else.

In place of G, to compare with, augment.method takes translators that need no training: reinhard (the guide's
colour statistics), fda (the guide's amplitudes of low frequencies), jitter (f_seg's photometric jitter, a
control that knows no target), and folder (images of any other tool):

    python augment.py name=fda augment.method=fda augment.fda_beta=0.01
    python augment.py name=cyclegan augment.method=folder augment.folder=DIR augment.styles_per_image=1

JUDGE.pt is an f_seg of another seed than the one that G was trained with, the last.pt of a gan/fseg folder.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

from runtime import (
    Run, UserError, all_reduce, atomic_write, autocast, command_line, get_device, get_precision,
    random_generator, rank, read_json, refuse_changes, run_main, stage_config, weights_digest, world,
    write_json,
)  # fmt: skip

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from datasets import SUFFIXES, Augmented, Scenes, photometric_jitter, planned_files, read_image, resized
from datasets import make_sheet, to_float, to_uint8
from losses import IGNORE, correlation, style_statistics
from models import build_fseg, build_generator, load_net

SECTIONS = ("", "source", "target", "augment")

# --------------------------------------------------------------------------- translators that are not trained
# Reinhard et al. 2001, "Color Transfer between Images": RGB -> LMS -> logarithm -> l alpha beta.
LMS = [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
LMS = torch.tensor(LMS, dtype=torch.float64)
LAB = torch.tensor([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) / torch.tensor([[3], [6], [2]]).double().sqrt()


def reinhard(x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """x_s with x_t's mean and deviation of each channel of l alpha beta; (N, 3, H, W) in [-1, 1] each."""
    def times(matrix, x):
        return torch.einsum("ij,njhw->nihw", matrix.to(x.device), x)

    # Black has no logarithm: a grey level is the least.
    s, t = (times(LAB, times(LMS, ((x.double() + 1) / 2).clamp(min=1 / 255)).log10()) for x in (x_s, x_t))
    (var_s, mean_s), (var_t, mean_t) = (torch.var_mean(x, (2, 3), correction=0, keepdim=True) for x in (s, t))
    lab = (s - mean_s) * (var_t / var_s.clamp(min=1e-12)).sqrt() + mean_t
    return (times(LMS.inverse(), 10 ** times(LAB.inverse(), lab)) * 2 - 1).clamp(-1, 1).to(x_s.dtype)


def fda(x_s: torch.Tensor, x_t: torch.Tensor, beta: float) -> torch.Tensor:
    """Fourier domain adaptation (Yang & Soatto 2020): x_s with x_t's amplitudes of low frequencies.

    x_s: (N, 3, H, W) in [-1, 1]; x_t: (N, 3, H', W'), resized to x_s's size; beta: the frequencies reach
    floor(beta min(H, W)) to each side of 0, in both directions -> (N, 3, H, W), clipped to [-1, 1].
    """
    if x_t.shape != x_s.shape:
        x_t = F.interpolate(x_t, x_s.shape[-2:], mode="bilinear", antialias=True)
    s, t = (torch.fft.fftshift(torch.fft.fft2(x.double() + 1), dim=(-2, -1)) for x in (x_s, x_t))
    h, w, b = s.shape[-2] // 2, s.shape[-1] // 2, int(beta * min(s.shape[-2:]))
    block = (..., slice(max(0, h - b), h + b + 1), slice(max(0, w - b), w + b + 1))
    amplitude, phase = s.abs(), s.angle()
    amplitude[block] = t.abs()[block]
    x = torch.fft.ifft2(torch.fft.ifftshift(torch.polar(amplitude, phase), dim=(-2, -1))).real - 1
    return x.clamp(-1, 1).to(x_s.dtype)


def ready_images(cfg, source: Scenes) -> list[Path]:
    """`augment.folder`'s files in the order of `planned_files`. Raises UserError where one is missing."""
    root, styles, found = Path(cfg.augment.folder), cfg.augment.styles_per_image, []
    for path in planned_files(root, source, styles):
        path = path if styles > 1 else root / path.relative_to(root / "style0")
        there = [p for p in map(path.with_suffix, SUFFIXES) if p.is_file()]
        if not there:
            raise UserError(f"{path}: no such image in augment.folder; it needs the name of its source image")
        found.append(there[0])
    return found


def build_translator(cfg, source: Scenes, data: dict, device):
    """(translate, ready, digest): `augment.method` as a function, and what tells its images from others'.

    translate(x_s, x_t), both (N, 3, H, W) in [-1, 1] -> (N, 3, H, W); ready: `folder`'s files, in place of
    source images. Raises UserError where G is not trained to its end, by this config, on `data` (digests).
    """
    if cfg.augment.method == "reinhard":
        return reinhard, None, "reinhard"
    if cfg.augment.method == "fda":
        return partial(fda, beta=cfg.augment.fda_beta), None, f"fda {cfg.augment.fda_beta:g}"
    if cfg.augment.method == "jitter":  # of the contents, as they are read
        return (lambda x_s, x_t: x_s), None, f"jitter {cfg.fseg.jitter:g}"
    if cfg.augment.method == "folder":
        ready = ready_images(cfg, source)
        sizes = hashlib.sha256(json.dumps([[p.name, p.stat().st_size] for p in ready]).encode()).hexdigest()
        return (lambda x_s, x_t: x_s), ready, f"folder {sizes[:16]}"
    path = Path(cfg.output, cfg.name, "gan", "last.pt")
    G, state = load_net(path, "G", build_generator, source.classes, device)
    now = stage_config(cfg, ("", "source", "target", "gan")) | data
    refuse_changes(state["config"] | state.get("data", {}), now, path)
    if state["step"] < cfg.gan.steps:
        raise UserError(f"{path}: G is at step {state['step']} of {cfg.gan.steps}; run train_gan.py again")
    return G, None, weights_digest(state["G"])


def repaint(run: Run, translate, read, files: list[Path], batches: list[range]) -> None:
    """Makes the images of these batches. read(k): (content, guide), (3, H, W) uint8 each, of image k."""
    for batch in batches:
        contents, guides = zip(*map(read, batch), strict=True)
        x_s, x_t = (to_float(torch.stack(x), run.device) for x in (contents, guides))
        with torch.inference_mode(), autocast(run.device, run.precision):
            x_g = translate(x_s, x_t)
        for k, x in zip(batch, x_g, strict=True):
            atomic_write(files[k], lambda file, x=x: Image.fromarray(to_uint8(x)).save(file, "PNG"))
        run.bar.update()
        run.stop_if_asked()


def write_manifest(folder: Path, files: list[Path], source: Scenes, guides: list[str]) -> None:
    """Names each image's source and guide, one JSON object a line."""
    text = ""
    for k, (file, guide) in enumerate(zip(files, guides, strict=True)):
        name, source_name = file.relative_to(folder).as_posix(), source.samples[k % len(source)].name
        text += json.dumps({"file": name, "source": source_name, "style": guide}) + "\n"
    atomic_write(folder / "manifest.jsonl", lambda file: file.write(text.encode()))


def sheet(files: list[Path], source: Scenes, target: Scenes, guides: list[int]) -> Image.Image:
    """Six of the images between their source images and guides."""
    rows = []
    for k in range(0, len(files), -(-len(files) // 6)):
        images = source.image(k % len(source)), target.image(guides[k])
        content, guide = (x.permute(1, 2, 0).numpy() for x in images)
        rows.append([content, np.asarray(read_image(str(files[k]))), guide])
    return make_sheet(["source", "augmented", "style guide"], rows)


def main() -> None:
    cfg, args = command_line(("--restart", {"action": "store_true"}), ("--judge", {"metavar": "JUDGE.pt"}))
    source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
    if args.judge:
        return judge(cfg, args.judge, source, target)
    data = {"source train": source.digest, "target train": target.digest}
    count, size = len(source) * cfg.augment.styles_per_image, cfg.inference_batch
    batches = [range(count)[first : first + size] for first in range(0, count, size)]
    run = Run(cfg, "augmented", SECTIONS, {}, len(batches), args.restart)
    translate, ready, generator = build_translator(cfg, source, data, run.device)
    path, data = run.folder / "identity.json", data | {"generator": generator}
    if path.exists():  # images of another generator, config or other data must not mix with this one's
        then = read_json(path, {"generator": str, "config": dict}, "use --restart to make the images anew")
        refuse_changes(then["config"] | then, stage_config(cfg, SECTIONS) | data, run.folder)
    files = planned_files(run.folder, source, cfg.augment.styles_per_image)
    guides = [int(random_generator(cfg.seed, "augment", k).integers(len(target))) for k in range(count)]
    # A batch of which an image is missing is made again as a whole: its bits do not depend on what was there.
    missing = [batch for batch in batches if not all(files[k].exists() for k in batch)]
    if not missing and path.exists():
        return print(f"augment: {count} images of generator {generator} are there; nothing to do")

    run.begin()
    all_reduce(torch.zeros(1))  # no process writes before all have looked, and process 0 has tidied up
    if rank() == 0:
        write_json(path, {"generator": generator, "config": run.config} | data)
        write_manifest(run.folder, files, source, [target.samples[i].name for i in guides])

    def read(k):
        content = resized(read_image(str(ready[k])), source.size) if ready else source.image(k % len(source))
        if cfg.augment.method == "jitter":
            rng = random_generator(cfg.seed, "augment jitter", k)
            content = (photometric_jitter(content / 255, cfg.fseg.jitter, rng) * 255).round().byte()
        return content, target.image(guides[k])

    repaint(run, translate, read, files, missing[rank() :: world()])
    all_reduce(torch.zeros(1))
    run.sheet(run.steps, "augmented", sheet(files, source, target, guides))
    run.close()
    print(f"augment: {count} images in {run.folder}; next: python train_selfens.py {args.items}")


# ------------------------------------------------------------------------------------------------------ judge
@torch.inference_mode()
def look(f_seg, images: Augmented, source: Scenes, target: Scenes, device, cast) -> tuple:
    """(right, kept, styles): (256,) pixels per class that f_seg reads rightly on source images, and of these
    on repainted ones; style statistics (3, images, 6) of source images, repainted ones and guides.
    """
    lines = [json.loads(line) for line in (images.folder / "manifest.jsonl").read_text().splitlines()]
    number, n = {sample.name: i for i, sample in enumerate(target.samples)}, len(source)
    right, kept, styles = np.zeros(256, np.int64), np.zeros(256, np.int64), []
    for k in tqdm(range(len(images)), "judge", mininterval=1, leave=False):
        y_s, guide = source.label(k % n), number[lines[k]["style"]]
        pictures = source.image(k % n), images.image(k), target.image(guide)
        x = [to_float(picture[None], device) for picture in pictures]
        with cast:
            hits = [(f_seg(image)[0].argmax(0).cpu() == y_s) & (y_s != IGNORE) for image in x[:2]]
        right += np.bincount(y_s[hits[0]], minlength=256)
        kept += np.bincount(y_s[hits[0] & hits[1]], minlength=256)
        styles.append(torch.cat([style_statistics(image).double().cpu() for image in x]))
    return right, kept, torch.stack(styles, 1)


def judge(cfg, checkpoint: str, source: Scenes, target: Scenes) -> None:
    """How images keep their labels and follow their guides, to eval/augmented_METHOD.json and the screen.

    agreement: kept / right of `look`; style: its statistics' distance from the guide's, and correlation.
    """
    device = get_device(cfg)
    f_seg, state = load_net(checkpoint, "f_seg", build_fseg, source.classes, device)
    own = Path(cfg.fseg.checkpoint or Path(cfg.output, cfg.name, "gan", "fseg", "last.pt"))
    if own.is_file() and own.samefile(checkpoint):
        print(f"attention: G was trained with {checkpoint}; an f_seg of another seed is a fairer judge")
    images, cast = Augmented(cfg, source), autocast(device, get_precision(cfg, device))
    right, kept, (s, g, t) = look(f_seg, images, source, target, device, cast)
    per_class = {c: float(kept[k] / right[k]) for k, c in enumerate(source.classes) if right[k]}
    result = {
        "method": cfg.augment.method, "judge": weights_digest(state["f_seg"]), "images": len(images),
        "agreement": float(kept.sum() / right.sum()), "agreement per class": per_class,
        "agreement, mean over classes": float(np.mean([*per_class.values()])),
        "style distance": float((g - t).abs().mean()),
        "style distance of the source": float((s - t).abs().mean()), "style correlation": correlation(g, t),
        "style correlation of the source": correlation(s, t), "config": cfg.flat,
    }  # fmt: skip
    path = Path(cfg.output, cfg.name, "eval", f"augmented_{cfg.augment.method}.json")
    write_json(path, result)
    print(*(f"{key}: {value}" for key, value in result.items() if key != "config"), sep="\n")
    print(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
