"""Evaluation: its numbers by other means, exported files, tables, comparisons, photos, and what is refused.

`cityscapes` is a tiny Cityscapes, with val images of two sizes, and a run on it that stands at step 40 of 60.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ENV, REPO, TINY, save_image
from PIL import Image

import evaluate
import runtime
import train_selfens
from evaluate import Segmenter
from losses import iou_from_confusion
from models import build_segmenter
from runtime import UserError, load_checkpoint

labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
EVALUATED = sorted((label for label in labels if not label.ignoreInEval), key=lambda label: label.trainId)
NAMES, IDS = [label.name for label in EVALUATED], np.array([label.id for label in EVALUATED])
ABSENT, UNLABELLED = "train", "bus"  # the first is in neither labels nor predictions, the second in no label


def make_cityscapes(root):
    """Blocks of all ids but two, in the labels' colours."""
    rng, colours = np.random.default_rng(3), np.array([label.color for label in labels if label.id >= 0])
    ids = [label.id for label in labels if label.id >= 0 and label.name not in (ABSENT, UNLABELLED)]
    for split, count in (("train", 8), ("val", 9), ("test", 2)):
        for i in range(count):
            size = (40, 72) if split == "val" and i % 3 == 0 else (32, 64)
            label = np.kron(rng.choice(ids, (3, 5)), np.ones((16, 16), int))[: size[0], : size[1]]
            label[:3] = i % 5  # the ego vehicle, the border, ...: regions that do not count
            city = "aachen" if split == "val" and i > 5 else "bonn"
            frame = f"{split}/{city}/{city}_{i:06d}_000019"
            save_image(root / f"leftImg8bit/{frame}_leftImg8bit.png", colours[label])
            if split != "test":  # servers keep those
                save_image(root / f"gtFine/{frame}_gtFine_labelIds.png", label)
                save_image(root / f"gtFine/{frame}_gtFine_instanceIds.png", label)


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """root, data, args, checkpoint (its path), folder of the run, result() and where val was exported."""
    root = tmp_path_factory.mktemp("cityscapes")
    make_cityscapes(root / "data")
    part = {"dataset": "cityscapes", "root": str(root / "data"), "size": [24, 40]}
    selfens = {"width": 0.2, "pretrained": "none", "steps": 60, "batch": 4, "dropout": 0.0, "lr": 0.01,
               "variant": "source_only"}  # fmt: skip
    config, folder = root / "tiny.yaml", root / "out/run"
    config.write_text(yaml.safe_dump(TINY | {
        "output": str(root / "out"), "classes": "cityscapes19", "source": part, "target": part, "seed": 3,
        "save_every": 40, "log_every": 20, "selfens": selfens, "rare": 0.0, "balance": 0.0}))  # fmt: skip
    path = folder / "selfens/source_only/last.pt"
    with pytest.MonkeyPatch.context() as patch:  # a run that broke off after its checkpoint of step 40
        poly = train_selfens.poly
        patch.setattr(train_selfens, "poly", lambda step, steps: poly(step, steps) if step <= 40 else 1 / 0)
        patch.setattr("sys.argv", ["train_selfens.py", str(config)])
        with pytest.raises(ZeroDivisionError):
            train_selfens.main()
        state = load_checkpoint(path, "")
        for name, x in state["teacher"].items():
            if name.endswith("bias") and x.shape == (19,):
                x[NAMES.index(ABSENT)] = -1e6  # is never predicted
        torch.save(state, path)
        patch.setattr("sys.argv", ["evaluate.py", str(config), "seed=7", "--export", str(root / "export")])
        evaluate.main()
    result = folder / "eval/source_only_teacher_val.json"
    return SimpleNamespace(data=root / "data", args=[config], checkpoint=path, folder=folder, file=result,
                           export=root / "export", result=lambda: json.loads(result.read_text()))  # fmt: skip


def test_the_result_is_complete_and_adds_up(cityscapes):
    """A number without model, split, step and protocol is none; config and seed are the checkpoint's."""
    result = cityscapes.result()
    expected = {"variant": "source_only", "model": "teacher", "split": "val", "step": 40, "steps": 60,
                "images": 9, "seed": 3, "classes": NAMES}  # fmt: skip
    assert {k: result[k] for k in expected} == expected and result["config"]["seed"] == 3
    for word in ("19 classes", "cityscapes val", "9 images", "teacher of step 40 of 60", "40x24", "others"):
        assert word in result["protocol"]
    confusion, ious = np.array(result["confusion"]), {}
    for k, name in enumerate(NAMES):
        union = confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]
        ious[name] = confusion[k, k] / union if union else None
    assert result["per_class"] == ious and ious[ABSENT] is None
    assert result["miou"] == pytest.approx(np.mean([v for v in ious.values() if v is not None]), abs=1e-12)
    assert {"torch", "device", "commit"} <= set(result["environment"])
    parts = result["sequences"]
    assert [(name, part["images"]) for name, part in parts.items()] == [("aachen", 3), ("bonn", 6)]
    assert np.array_equal(sum(np.array(part["confusion"]) for part in parts.values()), confusion)
    for part in parts.values():
        assert part["miou"] == pytest.approx(np.nanmean(iou_from_confusion(part["confusion"])))


def test_the_counts_by_a_loop_of_its_own(cityscapes):
    """The input, network, two up-samplings and counting are the stated ones, at each label's own size."""
    cfg = runtime.load_config(*cityscapes.args)
    net = build_segmenter(cfg, 19).eval()
    net.load_state_dict(load_checkpoint(cityscapes.checkpoint, "")["teacher"])
    confusion, table = np.zeros((19, 19), int), np.full(256, 255)
    table[IDS] = range(19)
    for path in sorted((cityscapes.data / "leftImg8bit/val").glob("*/*")):
        image = np.asarray(Image.open(path).resize((40, 24), Image.BILINEAR), np.float32)
        label = path.name.replace("leftImg8bit", "gtFine_labelIds")
        label = table[np.asarray(Image.open(cityscapes.data / "gtFine/val" / path.parent.name / label))]
        with torch.no_grad():
            logits = net(torch.tensor(image / 127.5 - 1).permute(2, 0, 1)[None])
            for size in ((24, 40), label.shape):
                logits = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
        prediction = logits[0].argmax(0).numpy()
        np.add.at(confusion, (label[label < 19], prediction[label < 19]), 1)
    stated = np.array(cityscapes.result()["confusion"])
    assert np.abs(stated - confusion).sum() <= 0.001 * confusion.sum()  # rounding may turn a tie
    assert stated.sum() == confusion.sum() and (stated.sum(0) > 0).sum() > 5  # no constant prediction


def test_the_official_script_agrees_on_the_exported_files(cityscapes, tmp_path):
    """Cityscapes' own script finds in the exported files what was printed: equal counts, equal IoU."""
    code = ("import numpy; numpy.in1d = numpy.isin  # in1d, which the script calls, is gone\n"
            "import cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling as script; script.main()")
    env = ENV | {"CITYSCAPES_DATASET": str(cityscapes.data), "CITYSCAPES_RESULTS": str(cityscapes.export),
                 "CITYSCAPES_EXPORT_DIR": str(tmp_path)}  # fmt: skip
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    theirs = json.loads((tmp_path / "resultPixelLevelSemanticLabeling.json").read_text())
    ours, matrix = cityscapes.result(), np.array(theirs["confMatrix"])
    assert (matrix[np.ix_(IDS, IDS)] == ours["confusion"]).all()
    assert matrix[IDS].sum() == np.sum(ours["confusion"]) < matrix.sum()  # the 19 alone are predicted
    for name, iou in ours["per_class"].items():
        score = theirs["classScores"][name]
        assert np.isnan(score) if iou is None else abs(iou - score) <= 1e-12
    assert abs(ours["miou"] - theirs["averageScoreClasses"]) <= 1e-12


def test_exported_files_are_what_a_server_takes(stage, cityscapes, tmp_path, capsys):
    """PNGs of label ids, named and sized like the images; of a test split, no labels need be there."""
    images = sorted((cityscapes.data / "leftImg8bit/val").rglob("*.png"))
    files = sorted(cityscapes.export.rglob("*.png"))
    assert [p.name for p in files] == [p.name for p in images]
    for image, path in zip(images, files, strict=True):
        picture = Image.open(path)
        assert picture.mode == "L" and picture.size == Image.open(image).size
        assert {*np.unique(picture)} <= {*IDS}
    stage("evaluate", *cityscapes.args, "--split", "test", "--export", tmp_path / "test")
    assert len([*(tmp_path / "test").rglob("bonn_*.png")]) == 2 and "mIoU" not in capsys.readouterr().out
    assert not (cityscapes.folder / "eval/source_only_teacher_test.json").exists()


def test_an_export_into_the_data_is_refused(stage, cityscapes):
    """Predictions of the names of images, written over them, would be the end of a data set."""
    for folder in (cityscapes.data / "leftImg8bit/val", cityscapes.data):
        with pytest.raises(UserError, match="overwrite"):
            stage("evaluate", *cityscapes.args, "--export", folder)


def test_the_student_has_a_result_of_its_own(stage, cityscapes):
    """--model student: another file and other weights, so other counts. So has a network that was sent."""
    stage("evaluate", *cityscapes.args, "--model", "student")
    student = json.loads((cityscapes.folder / "eval/source_only_student_val.json").read_text())
    assert student["model"] == "student" and "student of step 40" in student["protocol"]
    assert student["confusion"] != cityscapes.result()["confusion"]
    stage("evaluate", *cityscapes.args, "name=mine", "--checkpoint", cityscapes.checkpoint)
    assert (cityscapes.folder.parent / f"mine/eval/checkpoint_{cityscapes.file.name}").exists()


@pytest.fixture
def runs(cityscapes, tmp_path):
    """runs("a-0", 0.5, seed=0, ...) writes a run folder with a result of that mIoU; returns the folder."""
    def write(name, miou, variant="source_only", step=60, **config):
        result = cityscapes.result()
        config = result["config"] | {"name": name, "seed": 0, "selfens.pretrained": f"4-01/{name}"} | config
        per_class = dict.fromkeys(NAMES) | {"road": miou / 2}
        result |= {"miou": miou, "per_class": per_class, "variant": variant, "step": step, "config": config}
        path = tmp_path / name / f"eval/{variant}_teacher_val.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))
        return tmp_path / name

    return write


def test_the_table_is_mean_sample_deviation_and_gap(stage, runs, capsys):
    """Over seeds, n - 1; a folder given twice counts once; runs are compared with those given before them."""
    folders = [runs(f"a-{k}", miou, "tgcf_da", seed=k) for k, miou in enumerate((0.1, 0.2, 0.6))]
    for k in range(3):
        runs(f"a-{k}", 0.2, seed=k)
        runs(f"a-{k}", 0.6, "target_only", seed=k)
        folders.append(runs(f"A-{k}", 0.4, "tgcf_da", seed=k))
    stage("evaluate", "--table", *folders, folders[0])
    shown = capsys.readouterr().out
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("a ")}
    assert list(rows) == ["source_only", "tgcf_da", "target_only"]
    assert re.match(r"a +tgcf_da +teacher +val +60/60 +3 +30\.00 ±26\.46 +25 +15\.00 ", rows["tgcf_da"])
    assert re.search(r"60/60 +3 +20\.00 ± 0\.00 +0 ", rows["source_only"])
    assert re.search(r"3 +60\.00 ± 0\.00 +100 ", rows["target_only"])
    half = 4.30 * np.std([-10, 0, 40], ddof=1) / 3**0.5  # of the interval of differences paired by seed
    assert f"a tgcf_da over source_only, val, teacher: +10.00 ± {half:.2f} (3 seeds, not resolved)" in shown
    assert "a target_only over source_only, val, teacher: +40.00 ± 0.00 (3 seeds)" in shown
    assert "A tgcf_da over a, val, teacher: +10.00 ± " in shown


def test_runs_that_differ_are_not_averaged(stage, runs):
    """A mean over two learning rates, or over half and whole trainings, is a number of nothing."""
    first = [runs("b-0", 0.5, variant) for variant in ("source_only", "tgcf_da")][0]
    for seed, change in ((1, {"selfens.lr": 0.02}), (2, {"step": 40}), (3, {"precision": "bfloat16"}),
                         (4, {"gan.steps": 9, "variant": "tgcf_da"})):
        other = runs(f"b-{seed}", 0.5, seed=seed, **change)
        with pytest.raises(UserError, match=rf"{other}/eval/\S+: {[*change][0]} is .* but .* in another run"):
            stage("evaluate", "--table", first, other)
    stage("evaluate", "--table", first, runs("b-3", 0.5, seed=3, **{"gan.steps": 9}))  # it has no GAN
    with pytest.raises(UserError, match="the same seed"):
        stage("evaluate", "--table", first, shutil.copytree(first, first.with_name("copy")))
    with pytest.raises(UserError, match="nothing_here"):
        stage("evaluate", "--table", first.parent / "nothing_here")


def test_a_stale_result_and_an_unfinished_run_show(stage, cityscapes, tmp_path, capsys):
    """Numbers that are older than the checkpoint, or of a run that broke off, must not pass for the end's."""
    shutil.copytree(cityscapes.folder, tmp_path / "run")
    path, result = tmp_path / "run/selfens/source_only/last.pt", tmp_path / f"run/eval/{cityscapes.file.name}"
    for seconds in (-10, 10):
        os.utime(path, (os.path.getmtime(result) + seconds,) * 2)
        stage("evaluate", "--table", tmp_path / "run")
        shown = capsys.readouterr().out
        assert ("warning" in shown and str(path) in shown) == (seconds > 0)
    assert re.search(r"source_only +teacher +val +40/60 ", shown)


def test_two_results_side_by_side(stage, runs, capsys):
    """What changed, with its sign; other splits or classes, and files that are no results, are refused."""
    a, b = (runs(f"c-{k}", miou) / "eval/source_only_teacher_val.json" for k, miou in enumerate((0.5, 0.4)))
    stage("evaluate", "--compare", a, b)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mIoU", "50.00", "40.00", "-10.00"] in rows and ["road", "25.00", "20.00", "-5.00"] in rows
    assert [ABSENT, "absent", "absent"] in rows
    result = json.loads(b.read_text())
    for change in ({"split": "train"}, {"classes": NAMES[:16]}):
        b.write_text(json.dumps(result | change))
        with pytest.raises(UserError, match=f"c-1/eval.*: {[*change][0]} "):
            stage("evaluate", "--compare", a, b)
    for content in ("", "{}", "[1]", '{"miou": 0.5}'):
        b.write_text(content)
        with pytest.raises(UserError, match="c-1/eval.*not what belongs there"):
            stage("evaluate", "--compare", a, b)


def test_photos_of_a_folder_and_one_alone(stage, cityscapes, tmp_path, capsys):
    """Sub-folders and sizes are kept, unreadable files listed at the end, macOS' ._ files skipped."""
    photo = next((cityscapes.data / "leftImg8bit/val").rglob("*.png"))
    folder, out = tmp_path / "photos", tmp_path / "out"
    (folder / "day 1").mkdir(parents=True)
    shutil.copy(photo, folder / "day 1/a.png")
    save_image(folder / "b.JPG", np.random.default_rng(0).integers(0, 255, (50, 30, 3)))
    (folder / "broken.png").write_bytes(photo.read_bytes()[:60])
    (folder / "._b.jpg").write_bytes(b"macOS")
    stage("evaluate", *cityscapes.args, "--images", folder, "--out", out)
    *_, before, last = capsys.readouterr().out.strip().splitlines()
    assert "broken.png" in last and last.startswith("left out: ") and not before.startswith("left out: ")
    for kind in ("train_ids", "colour", "overlay"):
        files = sorted(p.relative_to(out / kind).as_posix() for p in (out / kind).rglob("*.*"))
        assert files == ["b.png", "day 1/a.png"]
        assert Image.open(out / kind / "b.png").size == (30, 50)
    ids = np.asarray(Image.open(out / "train_ids/day 1/a.png"))
    exported = np.asarray(Image.open(next(cityscapes.export.rglob(photo.name))))
    assert (IDS[ids] == exported).mean() > 0.99  # the same image, predicted another way
    colours = np.array([label.color for label in EVALUATED])
    assert (colours[ids] == np.asarray(Image.open(out / "colour/day 1/a.png"))).all()
    stage("evaluate", *cityscapes.args, "--images", folder / "day 1/a.png", "--out", tmp_path / "one")
    assert (np.asarray(Image.open(tmp_path / "one/train_ids/a.png")) == ids).all()
    with pytest.raises(UserError, match="overwrite"):
        stage("evaluate", *cityscapes.args, "--images", folder, "--out", folder / "predicted")


def test_sequences_are_what_names_tell():
    """Frames of one drive score alike: a mean over drives must not take one for another, or invent any."""
    for names, expected in (("0001TP_008550 0001TP_8580 Seq05VD_f00000", ["0001TP", "Seq05VD"]),
                            ("a/1 b/1 b/2", ["a", "b"]), ("0001 0002", ["all"]), ("x_1 x_2", ["all"])):
        scenes = [SimpleNamespace(name=name) for name in names.split()]
        found, numbers = evaluate.sequences(SimpleNamespace(samples=scenes))
        assert found == expected and len(numbers) == len(scenes) and max(numbers) == len(expected) - 1


def test_a_checkpoint_that_was_sent_predicts_a_video(stage, cityscapes, tmp_path, capsys):
    """No config, data or run folder but the file: each frame has the colours of its prediction over it."""
    frames = [np.random.default_rng(k).integers(0, 255, (32, 64, 3)).astype(np.uint8) for k in range(5)]
    writer = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 32))
    for frame in frames:
        writer.write(frame)
    writer.release()
    sent = shutil.copy(cityscapes.checkpoint, tmp_path / "sent.pt")
    stage("evaluate", "--checkpoint", sent, "--images", tmp_path / "v.mp4", "--out", tmp_path / "out")
    assert "v-overlay.mp4, 5 frames" in capsys.readouterr().out
    before, after = (cv2.VideoCapture(str(tmp_path / name)) for name in ("v.mp4", "out/v-overlay.mp4"))
    net = Segmenter(sent)
    for _ in frames:
        x, y = (video.read()[1][..., ::-1].astype(float) for video in (before, after))
        assert np.abs((x + net.colour(net(x.astype(np.uint8)))) / 2 - y).mean() < 25  # it is compressed
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(UserError, match="bad.mp4: not a video"):
        stage("evaluate", "--checkpoint", sent, "--images", tmp_path / "bad.mp4", "--out", tmp_path / "out")


def test_readme_s_python_runs_as_printed(cityscapes, tmp_path):
    """The first lines that people copy; in another folder, beside others' modules of the same names."""
    blocks = re.findall(r"```python\n(.*?)```", (REPO / "README.md").read_text(), re.S)
    photo = next((cityscapes.data / "leftImg8bit/val").rglob("*.png"))
    for name in ("datasets", "evaluate"):
        (tmp_path / f"{name}.py").write_text("theirs = True")
    env = ENV | {"PYTHONPATH": str(tmp_path)}
    assert len(blocks) == 2
    for block, folder in zip(blocks, (REPO, tmp_path), strict=True):
        for word, path in (("runs/streets", cityscapes.folder), ("photo.jpg", photo), ("tgcf-da", REPO)):
            block = block.replace(f'"{word}"', repr(str(path)))
        code = f"{block}\nprint(ids.shape, ids.dtype, getattr(sys.modules.get('datasets'), 'theirs', None))"
        run = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], cwd=folder, env=env,
                             capture_output=True, text=True)
        shape = Image.open(photo).size[::-1]
        assert run.stdout.splitlines()[-1:] == [f"{shape} uint8 {folder == tmp_path or None}"], run.stderr
    ids = Segmenter(cityscapes.folder)(Image.open(photo))
    assert np.array_equal(ids, Segmenter(cityscapes.checkpoint)(np.asarray(Image.open(photo))))


def test_onnx_gives_the_same_classes(stage, cityscapes, tmp_path):
    """Another program that reads the file, and its metadata alone, must see what this one sees."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    stage("evaluate", *cityscapes.args, "--onnx", tmp_path / "net.onnx")
    session, net = onnxruntime.InferenceSession(tmp_path / "net.onnx"), Segmenter(cityscapes.checkpoint)
    meta = session.get_modelmeta().custom_metadata_map
    h, w = int(meta["height"]), int(meta["width"])
    image = np.random.default_rng(0).integers(0, 255, (h, w, 3)).astype(np.uint8)
    x = (image / 127.5 - 1).astype(np.float32).transpose(2, 0, 1)[None]
    (logits,) = session.run(None, {meta["input"]: x})
    assert (logits[0].argmax(0) == net(image)).mean() >= 0.999 and json.loads(meta["classes"]) == NAMES


def test_a_network_of_other_classes_or_size_is_refused(stage, cityscapes):
    """The numbers would stand beside the wrong names, or under another run's size."""
    with pytest.raises(UserError, match=f"{cityscapes.checkpoint}.*classes"):
        stage("evaluate", *cityscapes.args, "classes=cityscapes16")
    with pytest.raises(UserError, match=f"size=.40, 56.: {cityscapes.checkpoint} was trained at"):
        stage("evaluate", *cityscapes.args, "target.size=[40, 56]")
