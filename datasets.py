"""Scenes, the images and labels of a domain and split at training size, and the batches drawn from them.

What lies on disk, and how it is read, is in pairs.py.
"""

import hashlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from losses import IGNORE, confusion_matrix
from pairs import (  # noqa: F401  the stages import from here
    SUFFIXES, Sample, class_list, find_samples, get_block, has_labels, id_table, open_image, read_image,
    read_label,
)  # fmt: skip
from runtime import (
    UserError, all_reduce, load_checkpoint, random_generator, rank, read_json, refuse_changes, stage_config,
    weights_digest, world,
)  # fmt: skip

CACHE_BYTES = 2 << 30  # resized images that one data set keeps in memory, over all of its loader's processes


def resized(image: Image.Image, size) -> Tensor:
    """An RGB image as (3, h, w) uint8, resized with an antialiasing bilinear filter."""
    return torch.from_numpy(np.asarray(image.resize(size[::-1], Image.BILINEAR)).transpose(2, 0, 1).copy())


def some_labelled(samples: list[Sample], count: int) -> list[Sample]:
    """`count` of those that have a label, evenly over the drives. Raises UserError where there are fewer."""
    there = [s for s in samples if s.label.startswith("streets:") or all(map(os.path.exists, s[1:]))]
    if len(there) < count:
        raise UserError(f"target.labelled={count}: only {len(there)} images of train have labels; lower it")
    return [there[i] for i in np.linspace(0, len(there) - 1, count).round().astype(int)]


class Scenes:
    """The images of a role and split, resized, and labels as train ids; none is opened without `labels`.

    At the start every file's header is read, and `decode` files as a whole: `whole`, their numbers, and
    `counts`, (256,) pixels per train id. problems: [(sample name, what is wrong)], by `strict` a UserError.
    """

    def __init__(self, cfg, role: str, split: str, labels: bool, decode: int = 16, strict: bool = True):
        self.read, self.size = get_block(cfg, role).read, getattr(cfg, role).size
        (self.class_list, self.classes), self.table = class_list(cfg), id_table(cfg, role)
        self.cached, self.room = {}, CACHE_BYTES
        self.samples, self.unused = find_samples(cfg, role, split, labels)
        if labels and (role, split) == ("target", "train") and cfg.target.labelled:
            self.samples = some_labelled(self.samples, cfg.target.labelled)
        self.whole = {*evenly(len(self), decode)}
        with ThreadPoolExecutor(max(8, os.cpu_count())) as pool:  # a network disk is a matter of waiting
            texts, counts = zip(*pool.map(self._examine, range(len(self))), strict=True)
        self.problems = [(s.name, text) for s, text in zip(self.samples, texts, strict=True) if text]
        self.counts = sum(counts)
        if strict and self.problems:
            (name, text), count = self.problems[0], len(self.problems)
            raise UserError(f"{text}; or list {json.dumps(name)} in {role}.exclude ({count} problems; "
                            "check.py names them)")

    def _examine(self, i: int) -> tuple[str, np.ndarray]:
        """(what is wrong with sample i, or "", (256,) pixels per train id); see the class."""
        (_, image, label), sizes, counts = self.samples[i], [], np.zeros(256, np.int64)
        try:
            if i in self.whole:
                sizes = [read_image(image).size]
                if label:
                    ids = self.native_label(i)
                    sizes.append(ids.shape[::-1])
                    counts = np.bincount(ids.ravel(), minlength=256)
            elif not image.startswith("streets:"):  # headers; a photo may be stored on its side
                sizes = [sorted(open_image(path, decode=False).size) for path in (image, label) if path]
        except UserError as error:
            return str(error), counts
        fits = not sizes or sizes[0] == sizes[-1]
        return "" if fits else f"{image}: {sizes[0]} pixels, but its label {label} has {sizes[1]}", counts

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def digest(self) -> str:
        """Number of samples and SHA-256 of names and file sizes: what a resumed run must find again."""
        files = [(name, *(os.path.getsize(p) if p and os.path.exists(p) else p for p in paths))
                 for name, *paths in self.samples]
        return f"{len(self)} samples {hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"

    @cached_property
    def pixels(self) -> np.ndarray:
        """(images, classes) number of labelled pixels, at the size of training. Reads every label."""
        bar = tqdm(range(len(self)), "labels", mininterval=1, leave=False, disable=rank() > 0)
        counts = [np.bincount(self.label(i).flatten(), minlength=IGNORE + 1) for i in bar]
        return np.array(counts)[:, : len(self.classes)]

    def _keep(self, key: tuple, make) -> Tensor:
        """make(), or what it gave the last time, as far as there is room."""
        if key not in self.cached:
            value, worker = make(), torch.utils.data.get_worker_info()
            self.room -= value.nbytes * (worker.num_workers if worker else 1)
            if self.room < 0:
                return value
            self.cached[key] = value
        return self.cached[key]

    def image(self, i: int) -> Tensor:
        """(3, h, w) uint8, by `resized`."""
        return self._keep(("image", i), lambda: resized(read_image(self.samples[i].image), self.size))

    def native_label(self, i: int) -> np.ndarray:
        """(H, W) uint8 train ids at the label's own size; without a label all IGNORE, of `size`."""
        if self.samples[i].label is None:
            return np.full(self.size, IGNORE, np.uint8)
        return read_label(self.samples[i].label, self.read, self.table)

    def label(self, i: int) -> Tensor:
        """(h, w) uint8 train ids, resized by nearest neighbour."""
        def make():
            label = Image.fromarray(self.native_label(i)).resize(self.size[::-1], Image.NEAREST)
            return torch.from_numpy(np.array(label))

        return self._keep(("label", i), make)


class Augmented(Scenes):
    """augment.py's images, in the order of `planned_files`. Raises UserError where they are missing,
    incomplete, of another config, or not of the generator in gan/.
    """

    def __init__(self, cfg, source: Scenes):
        self.folder, mend = Path(cfg.output, cfg.name, "augmented"), "run augment.py with this config first"
        self.size, self.cached, self.room = source.size, {}, CACHE_BYTES
        identity = read_json(self.folder / "identity.json", {"generator": str, "config": dict}, mend)
        now = stage_config(cfg, ("", "source", "target", "augment")) | {"source train": source.digest}
        refuse_changes(identity["config"] | identity, now, self.folder)
        if cfg.augment.method == "gan":
            path = Path(cfg.output, cfg.name, "gan", "last.pt")
            state = load_checkpoint(path, "it made the images; put it back", ("G",))
            refuse_changes(identity, {"generator": weights_digest(state["G"])}, self.folder)
        files = planned_files(self.folder, source, cfg.augment.styles_per_image)
        if missing := [file for file in files if not file.is_file()]:
            raise UserError(f"{missing[0]}: repainted image missing ({len(missing)} of {len(files)}); {mend}")
        self.samples = [Sample(file.stem, str(file), None) for file in files]
        self.digest = f"{len(files)} samples of generator {identity['generator']}"


def planned_files(folder: Path, source: Scenes, styles: int) -> list[Path]:
    """The file of source image i in style s is at position s * len(source) + i."""
    return [folder / f"style{s}" / f"{sample.name}.png" for s in range(styles) for sample in source.samples]


# ------------------------------------------------------------------------------------------------- batches
def photometric_jitter(x: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """(3, H, W) in [0, 1] -> the same with other colour, light, sharpness and texture, never geometry."""
    # It is strong, as a generator makes use of whatever f_seg has never been shown. strength: 1 is full.
    def factor(spread):
        return float(np.exp(rng.uniform(-spread, spread) * strength))

    x = TF.adjust_hue(x, float(rng.uniform(-0.1, 0.1) * min(strength, 1)))  # of the colour circle
    x = TF.adjust_saturation(x, float(1 + rng.uniform(-1, 1) * min(strength, 1)))
    x = x * torch.tensor([factor(0.35) for _ in range(3)]).view(3, 1, 1)
    x = TF.adjust_gamma(x.clamp(0, 1), factor(0.7))
    x = TF.adjust_contrast(x, factor(0.7))
    x = TF.adjust_brightness(x, factor(0.5))
    if rng.random() < 0.5 * min(strength, 1):
        x = TF.gaussian_blur(x, 5, float(rng.uniform(0.1, 1.2)))
    for cells in (2, 8, 3 * x.shape[-2] // 8, x.shape[-2]):  # broad shade, blotches, texture, grain
        amplitude = rng.uniform(0, 0.12) * strength
        field = torch.from_numpy(rng.standard_normal((1, rng.choice([1, 3]), cells, 2 * cells), np.float32))
        x = x + amplitude * F.interpolate(field, x.shape[-2:], mode="bilinear", align_corners=False)[0]
    return x.clamp(0, 1)


def images_by_class(source: Scenes, rare: float) -> tuple[np.ndarray, list[np.ndarray]]:
    """Rare-class sampling (Hoyer, Dai, Van Gool 2022, DAFormer): a class is drawn, then one of its images.

    rare: T of P(c) ~ exp((1 - f_c) / T), f_c the class's share of the labelled pixels -> (P (C,), 0 without
    images; each class's images, those with 1 pixel of it in 1,000 or more).
    """
    images = [np.flatnonzero(some >= source.size[0] * source.size[1] / 1000) for some in source.pixels.T]
    there = np.array([len(some) > 0 for some in images])
    if not there.any():
        raise UserError("rare: no source image has a class in 1 pixel of 1,000; set it to 0")
    share = source.pixels.sum(0) / source.pixels.sum()
    p = there * np.exp(np.minimum(0, share[there].min() - share) / rare)  # over the greatest: no overflow
    return p / p.sum(), images


class Batches(torch.utils.data.Dataset):
    """Item `step` (0, 1, ...) is this process's batch of that step, a function of (seed, section, step):

        x_s (N, 3, h, w), y_s (N, h, w)   source images, jittered by `jitter`, and labels, all uint8
        x_g (N, 3, h, w)                  an augmented version of the same images, flipped and cropped alike
        x_t (N, 3, h, w)                  target images
        x_l, y_l                          of the few labelled target images, as x_s and y_s

    domains: {"source", and maybe "augmented", "target", "labelled": Scenes}, each in a new random order each
    epoch; with `rare`, source images are drawn by class. section: that of batch and crop.
    """

    def __init__(self, cfg, section: str, domains: dict, jitter: float = 0.0, rare: float = 0.0):
        part = getattr(cfg, section)
        self.key, self.batch, self.crop, self.flip = (cfg.seed, section), part.batch, part.crop, cfg.flip
        names = ("source", "augmented", "target", "labelled")
        self.source, self.augmented, self.target, self.labelled = map(domains.get, names)
        self.jitter, self.rank, self.world = jitter, rank(), world()
        self.by_class = images_by_class(self.source, rare) if rare else None

    def _index(self, domain: str, position: int, n: int) -> int:
        if domain == "source" and self.by_class:
            rng, (p, images) = random_generator(*self.key, "rare", position), self.by_class
            return int(rng.choice(images[rng.choice(len(p), p=p)]))
        return int(random_generator(*self.key, domain, position // n).permutation(n)[position % n])

    def _geometry(self, rng, position: int, *tensors: Tensor) -> list[Tensor]:
        """One flip and one crop for all of the tensors; the crop lies at the same place in every domain."""
        if rng.random() < 0.5 and self.flip:
            tensors = [t.flip(-1) for t in tensors]
        if self.crop:
            (h, w), (H, W) = self.crop, tensors[0].shape[-2:]
            u, v = random_generator(*self.key, "crop", position).random(2)
            top, left = int(u * (H - h + 1)), int(v * (W - w + 1))
            tensors = [t[..., top : top + h, left : left + w] for t in tensors]
        return list(tensors)

    def _images(self, position: int) -> dict[str, Tensor]:
        n, rng = len(self.source), random_generator(*self.key, "source", position)
        i = self._index("source", position, n)
        tensors = [self.source.image(i), self.source.label(i)]
        if self.augmented:
            tensors.append(self.augmented.image(int(rng.integers(len(self.augmented) // n)) * n + i))
        tensors = self._geometry(rng, position, *tensors)
        if self.jitter:
            tensors[0] = (photometric_jitter(tensors[0] / 255, self.jitter, rng) * 255).round().byte()
        images = dict(zip(("x_s", "y_s", "x_g"), tensors, strict=False))
        if self.target:
            rng = random_generator(*self.key, "target", position)
            x_t = self.target.image(self._index("target", position, len(self.target)))
            images["x_t"] = self._geometry(rng, position, x_t)[0]
        if self.labelled:
            rng, i = random_generator(*self.key, "labelled", position), len(self.labelled)
            i = self._index("labelled", position, i)
            tensors = self.labelled.image(i), self.labelled.label(i)
            images["x_l"], images["y_l"] = self._geometry(rng, position, *tensors)
        return images

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker process: the last bits of the jitter's sums depend on it
        first = (step * self.world + self.rank) * self.batch
        images = [self._images(position) for position in range(first, first + self.batch)]
        torch.set_num_threads(threads)
        return {name: torch.stack([some[name] for some in images]) for name in images[0]}

    def loader(self, start: int, steps: int, workers: int) -> torch.utils.data.DataLoader:
        """Batches of steps start ... steps - 1, in order, two read ahead by each of the worker processes."""
        return torch.utils.data.DataLoader(
            self, None, sampler=range(start, steps), num_workers=workers, worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available())


def ignore_signals(_worker: int) -> None:
    """A signal to the whole group must not end the readers: the training process first finishes its step."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which it then ends them


@torch.inference_mode()
def predictions(predict, read, count: int, batch: int, device):
    """Yields (i, logits (C, h, w)) of each of `count` images. Several processes take turns, batch by batch.

    predict(x: (N, 3, h, w) in [-1, 1]) -> each image's logits; read(i) -> (3, h, w) uint8.
    """
    firsts = range(0, count, batch)[rank() :: world()]
    for first in tqdm(firsts, "predict", mininterval=1, leave=False, disable=rank() > 0):
        some = range(first, min(first + batch, count))
        yield from zip(some, predict(to_float(torch.stack([read(i) for i in some]), device)), strict=True)


def measure(predict, scenes: Scenes, batch: int, device, groups=None, seen=None) -> Tensor:
    """Confusion matrices (groups, C, C) int64 of `predictions`, each image at its label's own size.

    groups: each image's, 0, 1, ...; by default all are of one. seen(i, prediction (H, W)), where given, is
    called for each image of this process.
    """
    groups, classes = groups or [0] * len(scenes), len(scenes.classes)
    total = torch.zeros(max(groups) + 1, classes, classes, dtype=torch.int64, device=device)
    for i, z in predictions(predict, scenes.image, len(scenes), batch, device):
        label = torch.from_numpy(scenes.native_label(i)).to(device)
        prediction = classify(z, label.shape)
        total[groups[i]] += confusion_matrix(label, prediction, classes)
        if seen:
            seen(i, prediction)
    return all_reduce(total).cpu()


def classify(z: Tensor, size) -> Tensor:
    """(C, h, w) logits -> (H, W) uint8 train ids: resized bilinearly (align_corners=False), then argmax."""
    z = F.interpolate(z[None].float(), tuple(size), mode="bilinear", align_corners=False)
    return z[0].argmax(0).byte()


def to_float(x: Tensor, device) -> Tensor:
    """(N, 3, h, w) uint8 -> float32 in [-1, 1] on the device, channels last."""
    return x.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last).float() / 127.5 - 1


def evenly(n: int, count: int) -> list[int]:
    """`count` of n indices, evenly; all n where there are fewer."""
    return np.unique(np.linspace(0, n - 1, min(n, count)).astype(int)).tolist()


def to_uint8(x: Tensor) -> np.ndarray:
    """x: (3, H, W) float in [-1, 1] -> (H, W, 3) uint8, rounded."""
    return (x.float().clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 0).cpu().numpy()


def some_of(scenes: Scenes, count: int, device) -> Tensor:
    """Images for a sheet, evenly over the scenes: (count, 3, h, w) in [-1, 1]."""
    numbers = np.linspace(0, len(scenes) - 1, count).astype(int)
    return to_float(torch.stack([scenes.image(i) for i in numbers]), device)


def colourise(ids, classes: dict) -> np.ndarray:
    """(H, W) train ids -> (H, W, 3) uint8 in the class colours; IGNORE is black."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = list(classes.values())
    return palette[np.asarray(ids, np.uint8)]


def make_sheet(columns: list[str], rows: list[list[np.ndarray]]) -> Image.Image:
    """Rows of (h, w, 3) uint8 pictures under column captions, each fitted to the first one's size."""
    h, w = rows[0][0].shape[:2]
    w, h = max(w, 120), round(h * max(w, 120) / w)
    sheet = Image.new("RGB", ((w + 4) * len(columns), (h + 4) * len(rows) + 16), "white")
    for c, caption in enumerate(columns):
        ImageDraw.Draw(sheet).text((c * (w + 4) + 2, 2), caption, "black")
        for r, row in enumerate(rows):
            picture = Image.fromarray(row[c]).resize((w, h), Image.NEAREST)
            sheet.paste(picture, (c * (w + 4), r * (h + 4) + 16))
    return sheet
