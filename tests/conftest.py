"""Helpers that the test files share: configs, small images, two tiny data sets on disk, and stages run in-process."""

import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import runtime

REPO = Path(runtime.__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
torch.set_num_threads(1)  # as in the subprocesses: the number of threads may change the last bit of a sum


def make_cfg(**overrides):
    """A config from defaults and overrides, `gan__steps=3` for gan.steps."""
    flat = {key: spec.default for key, spec in runtime.KEYS.items()}
    for key, value in overrides.items():
        flat[key.replace("__", ".")] = runtime.KEYS[key.replace("__", ".")].parse(value)
    return runtime.nested(flat)


def save_image(path: Path, array) -> Path:
    """Writes an array as an image, in the format of the path's suffix, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return path


def rgba_label(ids) -> np.ndarray:
    """CARLA's label format: the id in R, G = B = 0, A = 255."""
    ids = np.asarray(ids, np.uint8)
    return np.stack([ids, np.zeros_like(ids), np.zeros_like(ids), np.full_like(ids, 255)], -1)


def road_scene(rng, size, sky, building, pole, road, car):
    """(h, w) ids of a toy street: sky over building over road, a pole and a car at random places."""
    h, w = size
    ids = np.full(size, sky)
    ids[h // 4 : h // 2] = building
    ids[h // 2 :] = road
    ids[h // 5 : h // 2 + 4, rng.integers(w - 2)] = pole
    left = rng.integers(w - 12)
    ids[h // 2 : h // 2 + 8, left : left + 10] = car
    return ids


def make_carla(root: Path, drives=14, frames=2, size=(40, 56), suffix=".png") -> Path:
    """A tiny data set in CARLA's layout: drives of neighbouring frames, RGBA labels."""
    rng = np.random.default_rng(1)
    for drive in range(drives):
        for frame in range(frames):
            ids = road_scene(rng, size, 13, 1, 5, 7, 10)
            save_image(root / "CameraRGB" / f"{drive * 1000 + frame:06d}{suffix}", np.stack([ids * 15, ids * 7, 200 - ids], -1))
            save_image(root / "CameraMask" / f"{drive * 1000 + frame:06d}.png", rgba_label(ids))
    return root


def make_camvid(root: Path, train=12, val=5, size=(40, 56), suffix=".jpg", bad_train_labels=False) -> Path:
    """A tiny data set in CamVid's layout; bad_train_labels: the training labels are not images at all."""
    rng = np.random.default_rng(2)
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            ids = road_scene(rng, size, 0, 1, 2, 3, 8)
            ids[:, 0], ids[0] = 10, 11  # bicyclist and void: ignored
            image = 90 + np.stack([-6 * ids, 4 * ids, 3 * ids], -1) + rng.integers(-20, 20, (*size, 3))
            save_image(root / split / f"f{i:03d}{suffix}", image)
            label = save_image(root / f"{split}annot" / f"f{i:03d}.png", ids)
            if bad_train_labels and split == "train":
                label.write_text("not a label")
    return root


def digests(folder: Path, *skip: str) -> dict:
    """{relative path: SHA-256} of the files below a folder, those left out whose name starts with one of `skip`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(skip or ("\0",))]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def shell(*words, cwd=REPO) -> subprocess.CompletedProcess:
    """A stage through the real command line: shell("evaluate.py", "CFG", "key=value")."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=400)


@pytest.fixture
def stage(monkeypatch):
    """stage("evaluate", "CFG", "key=value") runs a stage's main() in this process; errors arrive as UserError."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        importlib.import_module(name).main()

    return run
