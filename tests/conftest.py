"""Helpers that the test files share: configs, two tiny data sets on disk, stages run in-process."""

import copy
import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import runtime

REPO = Path(runtime.__file__).resolve().parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
TINY = {
    "name": "run", "device": "cpu", "precision": "float32", "workers": 0, "log_every": 1,
    "save_every": 2, "inference_batch": 5, "balance": 0.5, "rare": 0.1,
    "source": {"dataset": "carla", "size": [32, 48], "images": 12},
    "target": {"dataset": "camvid", "size": [32, 48], "images": 10},
    "fseg": {"width": 0.2, "pretrained": "none", "steps": 4, "batch": 2, "crop": [24, 32]},
    "gan": {"steps": 4, "warmup_steps": 1, "batch": 2, "width": 4, "style_dim": 4, "mlp_dim": 8,
            "res_blocks": 1, "d_width": 4, "d_layers": 2, "crop": [24, 32], "lambda_sem": 5.0,
            "lambda_rec": 1.0},
    "augment": {"styles_per_image": 2},
    "selfens": {"width": 0.2, "pretrained": "none", "steps": 4, "batch": 2, "delta_con": 10.0,
                "ramp_up": 0.4},
}  # fmt: skip
torch.set_num_threads(1)  # as in the subprocesses: the number of threads may change the last bit of a sum


def make_cfg(**overrides):
    """A config from defaults and overrides, `gan__steps=3` for gan.steps."""
    flat = dict(runtime.schema()[0])
    for key, value in overrides.items():
        key = key.replace("__", ".")
        flat[key] = runtime.parse(key, str(value) if isinstance(value, Path) else value, "test")
    return runtime.nested(flat)


def write_config(folder: Path, **changes) -> Path:
    """TINY as folder/tiny.yaml, with runs in folder/out; changes: `gan__steps=3` for gan.steps."""
    tree = copy.deepcopy(TINY) | {"output": str(folder / "out")}
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def save_image(path: Path, array) -> Path:
    """Writes an array as an image, in the format of the path's suffix, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"quality": 95} if path.suffix == ".jpg" else {}
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)
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
            name = f"{drive * 1000 + frame:06d}"
            save_image(root / "CameraRGB" / (name + suffix), np.stack([ids * 15, ids * 7, 200 - ids], -1))
            save_image(root / "CameraMask" / f"{name}.png", rgba_label(ids))
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
    """{relative path: SHA-256} of the files below a folder, but for names that start with one of `skip`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(skip or ("\0",))]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def shell(*words, cwd=REPO, timeout=300) -> subprocess.CompletedProcess:
    """A stage through the real command line: shell("evaluate.py", "CFG", "key=value")."""
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def stage(monkeypatch):
    """stage("evaluate", "CFG", "key=value") runs a stage's main() in this process, which may raise."""

    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
        importlib.import_module(name).main()

    return run
