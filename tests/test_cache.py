"""Caches and overlap: they may change the time that a run takes, and nothing else."""

import itertools
import json
import multiprocessing
import os
import sys
import threading
import time
import types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import digests, make_camvid, make_carla, make_cfg, rgba_label, road_scene, save_image
from PIL import Image

import augment
import datasets
import evaluate
import train_gan
from datasets import Batches, DiskCache, Scenes
from evaluate import classify, confusion_matrix, evaluate_model
from runtime import FREE_KEYS, UserError, behind, prefetch


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with a tiny CARLA (7 training images) and a tiny CamVid."""
    monkeypatch.setattr(DiskCache, "unwritable", set())
    make_carla(tmp_path / "carla", 8, 1)
    make_camvid(tmp_path / "camvid", 4, 2)
    return tmp_path


def cfg_of(root, **overrides):
    base = {"source__dataset": "carla", "source__root": str(root / "carla"), "source__size": [20, 28], "source__images": None,
            "target__dataset": "camvid", "target__root": str(root / "camvid"), "target__size": [20, 28],
            "target__images": None, "cache": str(root / "cache")}  # fmt: skip
    return make_cfg(**(base | overrides))


def source_of(root, **overrides):
    return Scenes(cfg_of(root, **overrides), "source", "train", labels=True)


def values(scenes):
    return [value for i in range(len(scenes)) for value in (scenes.image(i), scenes.label(i))]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files(root):
    return sorted(p for p in (root / "cache").rglob("*") if p.is_file())


# ----------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_no_cache_cold_and_warm_cache_give_the_same_bits(root, workers):
    """Whatever is kept, and whoever reads it, a step's batch is the same."""
    def run(**overrides):
        cfg = cfg_of(root, **overrides)
        source, target = Scenes(cfg, "source", "train", labels=True), Scenes(cfg, "target", "train", labels=False)
        batches = Batches(cfg, "test", 3, [16, 16], source=source, target=target, jitter=1.0)
        return [batch[name] for batch in batches.loader(0, 6, workers) for name in ("x_s", "y_s", "x_t")]

    plain = run(cache=None)
    assert not (root / "cache").exists()
    assert equal(run(), plain)
    assert len(files(root)) == 7 + 7 + 4
    assert equal(run(), plain)


def test_a_warm_cache_decodes_nothing(root, monkeypatch):
    """That is what it is for; streets, which are painted, included."""
    def open_both(cache):
        return source_of(root, cache=cache), Scenes(make_cfg(source__images=3, cache=cache), "source", "train", labels=True)

    def fail(*_):
        raise AssertionError("decoded")

    cold, warm = open_both(str(root / "cache")), open_both(str(root / "cache"))
    plain = [values(scenes) for scenes in open_both(None)]
    assert all(equal(values(a), b) for a, b in zip(cold, plain, strict=True))
    for name in ("read_image", "read_label", "streets_scene"):
        monkeypatch.setattr(datasets, name, fail)
    assert all(equal(values(a), b) for a, b in zip(warm, plain, strict=True))


def test_the_cache_is_as_large_as_documented(root):
    """Someone has to find room for it: height * width * 3 bytes an image, a third of that a label, 4 bytes each."""
    values(source_of(root))
    assert sum(p.stat().st_size for p in files(root)) == 7 * (20 * 28 * 4 + 2 * 4)


@pytest.mark.parametrize("kind", ["image", "label"])
def test_a_changed_file_of_the_same_name_size_and_time_is_noticed(root, kind):
    """rsync -t and cp -p set times, and a script may write twice within a clock tick: only the bytes tell."""
    def write(path, car):
        ids = road_scene(np.random.default_rng(0), (40, 56), 13, 1, 5, 7, car)
        array = np.stack([ids, ids, ids], -1) if kind == "image" else rgba_label(ids)
        Image.fromarray(array.astype(np.uint8)).save(path, "PNG", compress_level=0)  # equal sizes
        os.utime(path, ns=(10**18, 10**18))
        return path.stat()

    path = root / "carla" / ("CameraRGB" if kind == "image" else "CameraMask") / "000000.png"
    before = write(path, 10)
    old = values(source_of(root))
    after = write(path, 4)
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    new = values(source_of(root))
    assert equal(new, values(source_of(root, cache=None))) and not equal(new, old)
    assert [k for k, (a, b) in enumerate(zip(old, new, strict=True)) if not torch.equal(a, b)] == [kind == "label"]


def test_a_file_that_is_replaced_while_it_is_read_is_not_kept(root):
    """Its old bytes were hashed and its new ones decoded: the old file's name must not get the new file's pixels."""
    path = root / "carla/CameraRGB/000000.png"
    old = path.read_bytes()
    scenes = source_of(root)
    cache, seen = scenes._disk, []

    def make():
        save_image(path, np.zeros((40, 56, 3)))
        seen.append(1)
        return torch.zeros(3, 20, 28, dtype=torch.uint8)

    cache.get("image", str(path), make)
    assert seen and not files(root)
    path.write_bytes(old)
    assert equal(values(source_of(root)), values(source_of(root, cache=None)))


@pytest.mark.parametrize("change", ["size", "same area", "labels' table", "code", "Pillow"])
def test_other_settings_do_not_mix(root, change, monkeypatch):
    """Another size, another class for an id, another reader: each must be made anew, and the old one stays usable."""
    old = values(source_of(root))
    ids = {"road": [6, 7], "car": [10, 4, 13], "sky": 1}
    overrides = {"size": {"source__size": [12, 16]}, "same area": {"source__size": [28, 20]},
                 "labels' table": {"source__ids": ids, "classes": "camvid10"}}.get(change, {})  # fmt: skip
    with monkeypatch.context() as patch:
        if change == "code":
            original = datasets.read_image
            patch.setattr(datasets, "read_image", lambda path: original(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
            patch.setattr(datasets, "_code", lambda *_: "other")
        if change == "Pillow":
            patch.setattr(datasets.PIL, "__version__", "0.0")
        plain, new = values(source_of(root, cache=None, **overrides)), values(source_of(root, **overrides))
    assert equal(new, plain) and (change == "Pillow" or not equal(new, old))
    assert len(files(root)) == {"labels' table": 21}.get(change, 28)
    assert equal(values(source_of(root)), old) and len(files(root)) == {"labels' table": 21}.get(change, 28)


@pytest.mark.parametrize("damage", ["empty", "short", "long", "one bit", "text", "zeros", "folder"])
def test_a_torn_or_foreign_file_is_made_again(root, damage):
    """A power cut, a bad disk or another program's file must cost a decoding, not a crash or a wrong pixel."""
    plain = values(source_of(root))
    before = digests(root / "cache")
    for path in files(root):
        data = path.read_bytes()
        path.unlink()
        if damage == "folder":
            path.mkdir()
        else:
            path.write_bytes({"empty": b"", "short": data[:-1], "long": data + b"\0", "text": b"PK not an image",
                              "one bit": data[:99] + bytes([data[99] ^ 4]) + data[100:], "zeros": bytes(len(data))}[damage])
    assert equal(values(source_of(root)), plain)
    assert damage == "folder" or digests(root / "cache") == before


def test_a_kill_while_writing_leaves_nothing_wrong(root, monkeypatch):
    """The next start finds whole files only, and in time removes what the kill left."""
    plain = values(source_of(root, cache=None))

    def killed(path, data):
        with open(path, "wb") as file:
            file.write(data[:50])
        raise KeyboardInterrupt

    scenes = source_of(root)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", killed)
        patch.setattr(Path, "unlink", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            scenes.image(0)
    assert [p.suffix for p in files(root)] == [".tmp"]
    assert equal(values(source_of(root)), plain)
    left = [p for p in files(root) if p.suffix == ".tmp"]
    assert len(left) == 1  # it might be another process's that is being written
    os.utime(left[0], (1, 1))
    source_of(root)
    assert not left[0].exists() and len(files(root)) == 14


def test_a_full_disk_costs_the_cache_and_nothing_else(root, monkeypatch, capsys):
    """One warning for all data sets and files; hours of training are not thrown away for what may be left out."""
    plain = values(source_of(root, cache=None))
    real, calls = os.replace, []

    def full(*_):
        calls.append(1)
        raise OSError(28, "No space left on device")

    for fail in (None, full, None):
        monkeypatch.setattr(os, "replace", fail or real)
        assert equal(values(source_of(root, source__size=[20, 28] if fail is None else [12, 16])),
                     plain if fail is None else values(source_of(root, source__size=[12, 16], cache=None)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and str(root / "cache") in lines[0] and "No space left" in lines[0]
    assert calls == [1] and len(files(root)) == 14


def test_a_cache_that_cannot_be_made_names_its_key(root):
    """At the start, where it is cheap to mend."""
    (root / "file").write_text("")
    with pytest.raises(UserError, match=r"cache=.*file/below: cannot be made \(Not a directory\).*'cache'"):
        source_of(root, cache=str(root / "file/below"))


def test_errors_stay_errors(root):
    """A cache must not hide a missing file, nor an unknown id behind an older label."""
    scenes = source_of(root)
    scenes.label(0)
    ids = np.full((40, 56), 7)
    ids[:3, :4] = 77
    save_image(root / "carla/CameraMask/000000.png", rgba_label(ids))
    with pytest.raises(UserError, match=r"000000\.png: unknown label id 77 \(12 pixels\)"):
        source_of(root)
    (root / "carla/CameraRGB/001000.png").unlink()
    with pytest.raises(UserError, match=r"001000\.png: no such file"):
        scenes.image(1)


def read_all(root):
    return [value.clone() for value in values(source_of(root))]


def test_two_processes_share_a_cache(root):
    """Started at once on an empty folder, both read what is right, and every file is there once."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        found = [[v.numpy() for v in one] for one in pool.map(read_all, [root] * 2)]
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert len(files(root)) == 14
    assert equal(values(source_of(root)), values(source_of(root, cache=None)))


def test_memory_is_bounded_whoever_reads(root, monkeypatch):
    """Room for 5 images: 7 images read over and over by 8 threads keep 5, and the bits are right."""
    plain = [v for v in values(source_of(root, cache=None)) if v.ndim == 3]
    monkeypatch.setattr(datasets, "CACHE_BYTES", 5 * 20 * 28 * 3)
    scenes = source_of(root)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(scenes.image, [*range(7)] * 8))
    assert equal(found, plain * 8)
    assert sum(v.nbytes for v in scenes._cache.values()) == datasets.CACHE_BYTES and scenes._room == 0


def test_the_code_that_decides_on_pixels_is_part_of_the_key(tmp_path, monkeypatch):
    """A reader that is mended must not be answered with the old reader's pixels: its functions are in the hashed part."""
    whole = Path(datasets.__file__).read_text()
    part = whole.split("- reading\n")[1].split("- batches\n")[0]
    assert all(f"\ndef {name}(" in part for name in ("_open", "_orientation", "read_image", "read_label"))
    assert all(f"\n    def {name}(" in part for name in ("image", "native_label", "label")) and "TABLES =" not in part
    module = types.ModuleType("module")
    monkeypatch.setitem(sys.modules, "module", module)
    found = []
    for k, text in enumerate((whole, whole.replace("Image.NEAREST", "Image.BOX"), "# another table\n" + whole)):
        module.__file__ = str(tmp_path / f"{k}.py")
        Path(module.__file__).write_text(text)
        datasets._code.cache_clear()
        found.append(datasets._code("module", "reading", "batches"))
    assert found[0] != found[1] and found[0] == found[2]


def test_the_cache_may_change_between_starts():
    """It cannot change a result: a run that continues, and a checkpoint that is evaluated, may have another."""
    assert "cache" in FREE_KEYS and "workers" in FREE_KEYS


# ---------------------------------------------------------------------------------------------------------- overlap


def test_prefetch_keeps_the_order_and_its_bound():
    """Slow items must not be overtaken, and reading must not run away from a slow consumer."""
    begun = []

    def work(i):
        begun.append(i)
        time.sleep(0.02 * (i % 3 == 0))
        return i

    for count, i in enumerate(prefetch(itertools.count(), work, 4, 3), 1):
        assert i == count - 1
        time.sleep(0.001)
        assert max(begun) < count + 4
        if i == 30:
            break
    assert list(prefetch(range(3), work, 9)) == [0, 1, 2] and list(prefetch([], work, 2)) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_ahead_waits_for_its_own_turn(threads):
    """What was read before a bad file is used, and the error is the first in order, not in time."""
    def work(i):
        if i in (5, 6):
            time.sleep(0.05 * (i == 5))
            raise UserError(f"bad {i}")
        return i

    got = []
    with pytest.raises(UserError, match="bad 5"):
        for i in prefetch(range(9), work, 4, threads):
            time.sleep(0.01)  # the error is there by now
            got.append(i)
    assert got == [0, 1, 2, 3, 4]


def test_leaving_early_ends_the_threads():
    """A loop that raises must not go on reading behind the error message."""
    before, begun = threading.active_count(), []
    reader = prefetch(range(1000), begun.append, 3, 2)
    next(reader)
    reader.close()
    assert threading.active_count() == before and len(begun) <= 4


def test_calls_behind_are_bounded_and_none_is_lost():
    """A slow disk must not fill the memory with pictures, nor a finished stage leave some unwritten."""
    running, peak, done = [], [], []

    def work(i):
        running.append(i)
        time.sleep(0.005)
        done.append(running.pop())

    with behind(3) as submit:
        for i in range(20):
            submit(work, i)
            peak.append(i + 1 - len(done))
    assert len(done) == 20 and max(peak) <= 3


def test_what_a_call_behind_raises_is_raised_in_front():
    """At the next submit or at the end: a full disk must not end in a result that looks whole."""
    def work(i):
        if i == 2:
            raise UserError("disk")

    for last in (3, 40):
        with pytest.raises(UserError, match="disk"), behind(2) as submit:
            for i in range(last):
                submit(work, i)
                time.sleep(0.001)
    with pytest.raises(KeyError), behind(2) as submit:
        submit(work, 2)
        raise KeyError  # the first error is the one that is told


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_bad_file_stops_at_its_own_step(root, workers):
    """The steps before it are done, so that they can be saved; the file is named in one line."""
    scenes = source_of(root, cache=None)
    batches = Batches(cfg_of(root), "test", 1, None, source=scenes)
    step = 4
    path = Path(scenes.samples[batches._index("source", step, 7)].image)
    path.write_bytes(path.read_bytes()[:-100])
    got = []
    with pytest.raises(UserError, match=path.name) as error:
        for batch in batches.loader(0, 7, workers):
            time.sleep(0.01)
            got.append(batch["x_s"])
    assert len(got) == step and str(error.value).startswith(str(path))
    assert equal(got, [batches[k]["x_s"] for k in range(step)])


def test_jitter_does_not_depend_on_the_number_of_threads(root):
    """Sums over more than 32768 pixels have other last bits on two threads; a worker process has one."""
    cfg = cfg_of(root, source__size=[256, 256])
    batches = Batches(cfg, "test", 4, None, source=source_of(root, source__size=[256, 256]), jitter=1.0)
    before, found = torch.get_num_threads(), []
    try:
        for threads, workers in ((1, 0), (2, 0), (2, 1)):
            torch.set_num_threads(threads)
            for batch in batches.loader(0, 4, workers):
                found.append(batch["x_s"])
                assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert equal(found[:4], found[4:8]) and equal(found[:4], found[8:])


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """Arguments for a tiny run whose generator was made, and never trained."""
    root = tmp_path_factory.mktemp("generator")
    make_carla(root / "carla", 8, 1)
    make_camvid(root / "camvid", 4, 2)
    args = ["cfg.yaml", "source.dataset=carla", f"source.root={root}/carla", "source.size=[24,32]", "target.dataset=camvid",
            f"target.root={root}/camvid", "target.size=[24,32]", f"output={root}/runs", "name=a", "precision=float32",
            "fseg.steps=0", "fseg.width=0.02", "fseg.crop=null", "gan.steps=0", "gan.warmup_steps=0", "gan.crop=null",
            "gan.width=4", "gan.d_scales=1", "gan.d_layers=2", "augment.batch=3", "augment.styles_per_image=2",
            "selfens.steps=0", "selfens.width=0.05", "selfens.variant=self_ensembling", "eval.batch=2"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_gan.py", *args])
        train_gan.main()
    return root / "runs/a", args


def test_augmented_batches_are_finished_in_order(generator, stage, monkeypatch):
    """Images on disk, then the log's line, then the manifest's, batch after batch, however long each file takes."""
    folder, args = generator
    folder = folder.parent / "order/augmented"
    (folder.parent / "gan").mkdir(parents=True)
    (folder.parent / "gan/last.pt").write_bytes((generator[0] / "gan/last.pt").read_bytes())
    real_write, real_log, late, missing = augment.atomic_write, augment.Run.log, [], []

    def slow(path, write):
        if path.suffix == ".png" and path.parent.name.startswith("style"):
            late.append(path)
            time.sleep(0.03 * (len(late) % 3 == 1))
        real_write(path, write)

    def log(run, step, **scalars):
        lines = (folder / "manifest.jsonl").read_text().splitlines()
        assert len(lines) == 3 * (step - 1)  # all of those before, none of this one
        drives = [0, 1, 2, 4, 5, 6, 7]  # the fourth is held out
        names = [f"style{k // 7}/{drives[k % 7] * 1000:06d}.png" for k in range(3 * step - 3, min(3 * step, 14))]
        missing.extend(name for name in names if not (folder / name).is_file())
        real_log(run, step, **scalars)

    monkeypatch.setattr(augment, "atomic_write", slow)
    monkeypatch.setattr(augment.Run, "log", log)
    stage("augment", *args, "name=order")
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    names = [json.loads(line)["file"] for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5] and not missing
    assert names == [p.relative_to(folder).as_posix() for p in sorted(folder.glob("style*/*.png"))] and len(names) == 14


def test_a_full_disk_while_augmenting_lists_finished_batches_alone(generator, stage, monkeypatch):
    """One line; then the same command makes the rest, with the bits of a run that never stopped."""
    folder, args = generator
    real, calls = augment.atomic_write, []

    def full(path, write):
        if path.parent.name.startswith("style"):
            calls.append(path)
            if len(calls) == 8:
                raise UserError(f"{path}: cannot be written (No space left on device)")
        real(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(augment, "atomic_write", full)
        with pytest.raises(UserError, match="No space left"):
            stage("augment", *args)
    listed = [json.loads(line)["file"] for line in (folder / "augmented/manifest.jsonl").read_text().splitlines()]
    assert len(listed) == 6 and all((folder / "augmented" / name).is_file() for name in listed)
    stage("augment", *args)
    again = [p for p in digests(folder / "augmented") if p.startswith("style")]
    assert len(again) == 14
    other = folder.parent / "whole"
    (other / "gan").mkdir(parents=True)
    (other / "gan/last.pt").write_bytes((folder / "gan/last.pt").read_bytes())
    stage("augment", *args, "name=whole", f"cache={folder.parent}/cache", "workers=3")
    for name in (*again, "log.jsonl", "manifest.jsonl"):
        assert (folder / "augmented" / name).read_bytes() == (other / "augmented" / name).read_bytes(), name


def test_overlapped_evaluation_equals_the_serial_one(root, monkeypatch):
    """The same images in the same order, the same logits, the same counts; the next images are read meanwhile."""
    cfg = cfg_of(root, target__size=[16, 24])
    scenes = Scenes(cfg, "target", "val", labels=True, cache=False)
    scenes.samples = scenes.samples * 4
    weights = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))

    def predict(x):
        yield from torch.einsum("kc,nchw->nkhw", weights, x)

    serial, expected = torch.zeros(10, 10, dtype=torch.int64), []
    for first in range(0, 8, 3):
        images = [scenes.image(i) for i in range(first, min(first + 3, 8))]
        for i, z in enumerate(predict(torch.stack(images).float() / 127.5 - 1), first):
            label = torch.from_numpy(scenes.native_label(i))
            expected.append((i, classify(z, label.shape)))
            serial += confusion_matrix(label, expected[-1][1], 10)
    seen = []
    counts = evaluate_model(predict, scenes, 3, torch.device("cpu"), "test", lambda *item: seen.append(item))
    assert torch.equal(counts, serial) and [i for i, _ in seen] == [*range(8)]
    assert equal([p for _, p in seen], [p for _, p in expected])


def test_errors_of_reading_and_writing_end_an_evaluation(generator, stage, monkeypatch, tmp_path):
    """Both come from threads, and both stay the one line that names the file."""
    folder, args = generator
    stage("train_selfens", *args)
    images = tmp_path / "images"
    for i in range(7):
        save_image(images / f"{i}.png", np.full((30, 40, 3), 30 * i))
    stage("evaluate", *args, "--images", images, "--out", tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 21
    with monkeypatch.context() as patch:
        def full(path, _):
            raise UserError(f"{path}: cannot be written (No space left on device)")

        patch.setattr(evaluate, "atomic_write", full)
        with pytest.raises(UserError, match=r"0\.png: cannot be written"):
            stage("evaluate", *args, "--images", images, "--out", tmp_path / "full")
    bad = images / "5.png"
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"5\.png: not a readable image"):
        stage("evaluate", *args, "--images", images, "--out", tmp_path / "bad")
