"""Evaluation: agreement with the official tools, exported files, folders of images, comparisons, and what is refused.

`cityscapes` is a tiny Cityscapes with two trained runs, one of 19 and one of 16 classes; its val images differ in size.
cityscapesScripts runs as it is published, in a process of its own.
"""

import errno
import json
import re
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official
from cityscapesscripts.helpers.labels import labels as LABELS
from conftest import ENV, REPO, digests, make_camvid, make_carla, save_image, shell
from PIL import Image
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

import evaluate
import runtime
import train_selfens
from datasets import CLASS_LISTS
from evaluate import classify, confusion_matrix, iou_from_confusion
from losses import IGNORE
from models import build_segmenter
from runtime import UserError, load_checkpoint

EVALUATED = [label for label in LABELS if not label.ignoreInEval]  # in the order of the train ids
ABSENT, NEVER_LABELLED = "train", "bus"  # the first in neither labels nor predictions
TINY = {"name": "run", "device": "cpu", "precision": "float32", "selfens": {
    "variant": "source_only", "width": 0.03, "steps": 80, "batch": 4, "aspp_rates": [1], "dropout": 0, "lr": 0.01}}  # fmt: skip


def make_cityscapes(root, val=24, size=(32, 64)):
    """Blocks of all 34 ids but two; the license plate, id -1, is never drawn into labelIds by the official tools."""
    rng = np.random.default_rng(3)
    colours = np.array([label.color for label in LABELS if label.id >= 0])
    left_out = [label.id for label in LABELS if label.name in (ABSENT, NEVER_LABELLED)]
    ids = np.setdiff1d(np.arange(34), left_out)
    for split, city, first, count in (("train", "aachen", 0, 8), ("val", "lindau", 0, val // 2), ("val", "ulm", val // 2, val),
                                      ("test", "bonn", 0, 2)):  # fmt: skip
        for i in range(first, count):
            h, w = size if split == "train" or i % 3 else (40, 72)  # val images of two sizes
            label = np.kron(rng.choice(ids, (-(-h // 16), -(-w // 16))), np.ones((16, 16), int))[:h, :w]
            label[:3] = i % 5  # the ego vehicle, the border, ...: regions that do not count
            frame = f"{city}/{city}_{i:06d}_000019"
            save_image(root / f"leftImg8bit/{split}/{frame}_leftImg8bit.png", colours[label])
            if split != "test":  # servers keep those
                save_image(root / f"gtFine/{split}/{frame}_gtFine_labelIds.png", label)
                save_image(root / f"gtFine/{split}/{frame}_gtFine_instanceIds.png", label)
    return root


def train(config, *items):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_selfens.py", str(config), *items])
        train_selfens.main()


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """root, config, out (the folder of the runs "run" with 19 and "run16" with 16 classes), and result(name)."""
    root = tmp_path_factory.mktemp("cityscapes")
    make_cityscapes(root / "data")
    part = {"dataset": "cityscapes", "root": str(root / "data"), "size": [32, 64]}
    config = root / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY | {"output": str(root / "out"), "classes": "cityscapes19", "source": part,
                                             "target": part, "eval": {"batch": 5}}))  # fmt: skip
    train(config)
    train(config, "name=run16", "classes=cityscapes16")
    path = root / "out/run/selfens/source_only/last.pt"
    state = load_checkpoint(path, "")
    absent, never_labelled, favourite = ([label.name for label in EVALUATED].index(n) for n in (ABSENT, NEVER_LABELLED, "sky"))
    for model in ("student", "teacher"):
        for name, value in state[model].items():
            if re.fullmatch(r"aspp\.\d+\.6\.(weight|bias)", name):
                value[never_labelled] = value[favourite]
                if name.endswith("bias"):
                    value[never_labelled] += 1e-4  # is predicted for sky
                    value[absent] = -1e6  # is never predicted
    torch.save(state, path)

    def result(name="run"):
        return json.loads((root / "out" / name / "eval/source_only_teacher_val.json").read_text())

    return SimpleNamespace(root=root, data=root / "data", config=config, out=root / "out", result=result)


@pytest.fixture(scope="module")
def exported(cityscapes):
    """evaluate.py --export through the real command line: its folder, and what it printed."""
    run = shell("evaluate.py", cityscapes.config, "--split", "val", "--export", cityscapes.root / "export")
    assert run.returncode == 0, run.stderr[-3000:]
    return SimpleNamespace(folder=cityscapes.root / "export", stdout=run.stdout)


def official_run(data, predictions, out) -> dict:
    """The published script on a val folder and a folder of predictions: the JSON that it writes.

    Its instance-level scores, on by default, call numpy.in1d, which newer numpy has removed; isin is its successor.
    """
    out.mkdir(exist_ok=True)
    code = ("import sys, numpy; numpy.in1d = getattr(numpy, 'in1d', numpy.isin); sys.argv = ['script']; from "
            "cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as script; script.main()")
    env = ENV | {"CITYSCAPES_DATASET": str(data), "CITYSCAPES_RESULTS": str(predictions), "CITYSCAPES_EXPORT_DIR": str(out)}
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return json.loads((out / "resultPixelLevelSemanticLabeling.json").read_text())


def refused(capsys, *argv) -> str:
    """Runs evaluate.py's command in this process: exit status 2 and one line on standard error, which is returned."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
        runtime.run_main(evaluate.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(error) == 1
    return error[0]


# ---------------------------------------------------------------------------------------- agreement with other tools


def test_cityscapes_scripts_agree_on_the_exported_folder(cityscapes, exported, tmp_path):
    """The number that the benchmark's own script gives for the exported files is the one that was printed, exactly."""
    theirs, ours = official_run(cityscapes.data, exported.folder, tmp_path / "official"), cityscapes.result()
    assert ours["images"] == 24 and "one of 2 sizes" in ours["protocol"]
    ids = [label.id for label in EVALUATED]
    matrix = np.array(theirs["confMatrix"])
    assert (matrix.sum(1) > 0).sum() == 32 and (matrix.sum(0) > 0).sum() > 8  # all ids but two, and no constant prediction
    assert ours["classes"] == [label.name for label in EVALUATED]
    assert (matrix[np.ix_(ids, ids)] == np.array(ours["confusion"])).all()
    assert matrix[ids].sum() == np.sum(ours["confusion"]) < matrix.sum()  # nothing but the 19 is ever predicted
    for name, iou in ours["per_class"].items():
        score = theirs["classScores"][name]
        assert np.isnan(score) if iou is None else abs(iou - score) <= 1e-12
    assert ours["per_class"][ABSENT] is None and ours["per_class"][NEVER_LABELLED] == 0
    assert abs(ours["miou"] - theirs["averageScoreClasses"]) <= 1e-12
    printed = re.search(r"^mIoU +(\S+)$", exported.stdout, re.M).group(1)
    assert printed == f"{100 * theirs['averageScoreClasses']:.2f}" and float(printed) > 1
    assert "mIoU*" not in exported.stdout and "miou13" not in ours


def test_cityscapes_scripts_count_predictions_of_ignored_ids_as_misses():
    """Why an export may hold evaluated ids alone: an ignored one predicted on a counted pixel is a miss all the same."""
    args = official.args
    matrix = official.generateMatrix(args)
    matrix[7, 7], matrix[7, 4], matrix[4, 7] = 6, 2, 9  # road as road, road as "static", "static" as road
    assert official.getIouScoreForLabel(7, matrix, args) == 6 / 8


def test_torchmetrics_agrees_on_camvid(tmp_path, stage):
    """The same counts and IoUs from a second, independent implementation, on CamVid's classes."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY | {
        "output": str(tmp_path / "out"), "source": {"dataset": "carla", "root": str(make_carla(tmp_path / "carla"))},
        "target": {"dataset": "camvid", "root": str(make_camvid(tmp_path / "camvid", val=20)), "size": [32, 48]}}))
    train(config)
    stage("evaluate", config, "--export", tmp_path / "export")
    ours = json.loads((tmp_path / "out/run/eval/source_only_teacher_val.json").read_text())
    matrix = MulticlassConfusionMatrix(10, ignore_index=255)
    jaccard = MulticlassJaccardIndex(10, average=None, ignore_index=255)
    for path in sorted((tmp_path / "camvid/valannot").iterdir()):
        label = torch.tensor(np.asarray(Image.open(path)))
        prediction = torch.tensor(np.asarray(Image.open(tmp_path / "export" / path.name)))  # CamVid's ids are train ids
        label = torch.where(label < 10, label, 255).long()
        matrix.update(prediction.long(), label)
        jaccard.update(prediction.long(), label)
    assert matrix.compute().tolist() == ours["confusion"] and np.sum(ours["confusion"]) > 0
    present = [k for k, iou in enumerate(ours["per_class"].values()) if iou is not None]  # it scores absent classes as 0
    assert len(present) > 3
    scores = [list(ours["per_class"].values())[k] for k in present]
    assert jaccard.compute()[present].tolist() == pytest.approx(scores, abs=1e-6)  # it computes in float32
    assert ours["miou"] == pytest.approx(np.mean(scores), abs=1e-12)


@pytest.mark.parametrize("dtypes", [(torch.uint8, torch.uint8), (torch.int64, torch.int64), (torch.uint8, torch.int64)])
@pytest.mark.parametrize("classes", [1, 19, 127, 128, 255])
def test_confusion_does_not_overflow(classes, dtypes):
    """Pairs are packed into two bytes where they fit: also next to that limit the counts are those of a plain loop."""
    rng = np.random.default_rng(classes)
    label, prediction = rng.integers(0, classes, (2, 40, 50))
    label[rng.random(label.shape) < 0.2] = IGNORE
    expected = np.zeros((classes, classes), int)
    np.add.at(expected, (label[label != IGNORE], prediction[label != IGNORE]), 1)
    given = confusion_matrix(torch.tensor(label).to(dtypes[0]), torch.tensor(prediction).to(dtypes[1]), classes)
    assert given.dtype == torch.int64 and (given.numpy() == expected).all()
    assert np.nansum(iou_from_confusion(given)) > 0


def test_classify_takes_pixel_centres_at_half_integers():
    """The corner convention that the protocol states: twice as many pixels interpolate 1/4 of a cell beside its centre."""
    z = torch.stack([torch.zeros(1, 4), torch.tensor([[-4.0, 1.0, 1.0, 1.0]])])  # class 1 wins where it is above 0
    assert classify(z, (1, 8)).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1]]  # of -4 -2.75 -0.25 1; corner to corner: -4 -1.9 0.3
    assert classify(z, (1, 4)).dtype == torch.uint8 and classify(z, (1, 4)).tolist() == [[0, 1, 1, 1]]


def test_memory_does_not_grow_with_the_number_of_images(cityscapes, tmp_path, stage):
    """500 images of a val set must not be kept: 24 of them take no more memory than 6."""
    shutil.copytree(cityscapes.out / "run", tmp_path / "run")
    few, peaks = make_cityscapes(tmp_path / "few", val=6), []
    for root in (few, few, cityscapes.data):  # the first call pays for what is imported and cached once
        tracemalloc.start()
        stage("evaluate", cityscapes.config, f"output={tmp_path}", f"target.root={root}", "target.size=[256, 512]",
              "eval.batch=1")  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 3 * 256 * 512  # the bytes of one image


# ------------------------------------------------------------------------------------------------ 16 and 13 classes


def test_the_mean_over_13_classes_stands_beside_the_mean_over_16(cityscapes, stage, capsys):
    """Papers on SYNTHIA report both; mixing them up is the commonest mistake in tables."""
    stage("evaluate", cityscapes.config, "name=run16", "classes=cityscapes16")
    shown, result = capsys.readouterr().out, cityscapes.result("run16")
    assert len(result["classes"]) == 16 and "16 classes (cityscapes16)" in result["protocol"]
    assert not {"terrain", "truck", "train"} & set(result["classes"])
    kept = [name for name in result["classes"] if name not in ("wall", "fence", "pole")]
    assert len(kept) == 13
    ious = [result["per_class"][name] for name in kept if result["per_class"][name] is not None]
    assert result["miou13"] == pytest.approx(np.mean(ious), abs=1e-12) and result["miou13"] != result["miou"]
    assert re.search(rf"^mIoU\* +{100 * result['miou13']:.2f} +over 13 classes, without wall, fence, pole$", shown, re.M)
    stage("evaluate", "--table", cityscapes.out / "run16")
    header, row = capsys.readouterr().out.splitlines()[-2:]
    assert "mIoU*" in header and f"{100 * result['miou13']:.2f} ±" in row


# ---------------------------------------------------------------------------------------------------------- exports


def test_exported_files_are_what_the_test_server_takes(cityscapes, exported):
    """One 8-bit one-channel PNG of Cityscapes' label ids per image, in its size, CITY_SEQUENCE_FRAME*.png, once."""
    images = sorted((cityscapes.data / "leftImg8bit/val").rglob("*.png"))
    files = sorted(exported.folder.rglob("*.*"))
    assert [p.name for p in files] == [p.name for p in images] and "written: 24 label-id PNGs" in exported.stdout
    for image, path in zip(images, files, strict=True):
        picture = Image.open(path)
        assert picture.mode == "L" and picture.size == Image.open(image).size
        assert set(np.unique(picture)) <= {label.id for label in EVALUATED}
        assert re.match(r"[a-z]+_\d{6}_\d{6}.*\.png$", path.name)


def test_the_test_split_is_exported_without_labels(cityscapes, stage, tmp_path, capsys):
    """A server's test labels are not there: files are written, and no number is invented."""
    stage("evaluate", cityscapes.config, "--split", "test", "--export", tmp_path / "export")
    assert len(list((tmp_path / "export/bonn").glob("bonn_*.png"))) == 2
    assert "mIoU" not in capsys.readouterr().out
    assert not (cityscapes.out / "run/eval/source_only_teacher_test.json").exists()


def test_streets_have_no_test_split(spoiled, capsys):
    """The drawn scenes have a train and a val split; asking for another must not end in a traceback."""
    net = build_segmenter(runtime.load_config(spoiled.args[0]), 10).state_dict()
    torch.save(spoiled.state | {"classes": list(CLASS_LISTS["streets"]), "teacher": net}, spoiled.path)
    items = ["source.dataset=streets", "target.dataset=streets", "classes=auto", "--split", "test"]
    assert "no test split" in refused(capsys, *spoiled.args, *items)


def test_an_export_beside_the_labels_is_refused(cityscapes, capsys):
    """--export into the data set could overwrite labels of the same names."""
    before = digests(cityscapes.data)
    error = refused(capsys, cityscapes.config, "--export", cityscapes.data / "gtFine/val")
    assert "--export" in error and "overwrite" in error and digests(cityscapes.data) == before


def test_classes_of_several_ids_are_exported_as_the_smallest():
    """A data set whose classes join ids has no one id to give back; the choice is stated, and colours are refused."""
    table = np.full(256, -1, np.int16)
    table[[3, 9, 5]] = 0, 0, 1
    scenes = SimpleNamespace(classes=["a", "b"], table=table, dataset="own")
    assert evaluate.label_ids(scenes).tolist() == [3, 5]
    with pytest.raises(UserError, match="own.*'c'"):
        evaluate.label_ids(SimpleNamespace(classes=["a", "b", "c"], table=table, dataset="own"))
    with pytest.raises(UserError, match="own.*'a'"):
        evaluate.label_ids(SimpleNamespace(classes=["a"], table=np.eye(1, 70000, 65793, dtype=int)[0] - 1, dataset="own"))


# ------------------------------------------------------------------------------------------------ folders of images


def test_a_folder_of_images_is_predicted(cityscapes, exported, tmp_path):
    """Any images: nested, of several sizes and formats. The predictions are those of the evaluation; names are kept."""
    folder, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(cityscapes.data / "leftImg8bit/val", folder / "day 1")
    rng = np.random.default_rng(0)
    save_image(folder / "wide.jpg", rng.integers(0, 255, (30, 90, 3)))
    save_image(folder / "day 2/grey.PNG", rng.integers(0, 255, (25, 17)))
    (folder / "notes.txt").write_text("not an image")
    run = shell("evaluate.py", cityscapes.config, "target.root=nowhere", "--images", folder, "--out", out)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "26 images; 1 files" in run.stdout and "0 road, 1 sidewalk" in run.stdout
    names = {p.relative_to(folder).with_suffix(".png") for p in folder.rglob("*.*") if p.suffix.lower() in (".png", ".jpg")}
    palette = np.array([label.color for label in EVALUATED], np.uint8)
    for name in names:
        ids, colour, overlay = (np.asarray(Image.open(out / kind / name)) for kind in ("train_ids", "colour", "overlay"))
        path = next(p for p in folder.rglob("*.*") if p.relative_to(folder).with_suffix(".png") == name)
        image = np.asarray(Image.open(path).convert("RGB"))
        assert ids.shape == image.shape[:2] and ids.dtype == np.uint8 and ids.max() < 19
        assert (colour == palette[ids]).all()
        assert np.abs(overlay.astype(int) - (image.astype(int) + colour) / 2).max() <= 1
        if name.parts[0] == "day 1":
            label_ids = np.array([label.id for label in EVALUATED])[ids]
            assert (label_ids == np.asarray(Image.open(exported.folder / name.relative_to("day 1")))).mean() > 0.999
    for kind in ("train_ids", "colour", "overlay"):
        assert {p.relative_to(out / kind) for p in (out / kind).rglob("*.*")} == names


def test_folders_that_cannot_be_predicted_are_refused(cityscapes, capsys, tmp_path):
    """Each with what is wrong: no folder, nothing in it, two files for one name, results among the images, half a command."""
    config, folder = cityscapes.config, tmp_path / "images"
    assert "no such folder" in refused(capsys, config, "--images", folder, "--out", tmp_path / "out")
    folder.mkdir()
    assert "no PNG or JPEG" in refused(capsys, config, "--images", folder, "--out", tmp_path / "out")
    for name in ("a.png", "a.jpg"):
        save_image(folder / name, np.zeros((8, 8, 3)))
    error = refused(capsys, config, "--images", folder, "--out", tmp_path / "out")
    assert "a.png" in error and "a.jpg" in error
    (folder / "a.jpg").unlink()
    assert "overwrite" in refused(capsys, config, "--images", folder, "--out", folder / "out")
    assert "--out" in refused(capsys, config, "--images", folder)
    assert "--images" in refused(capsys, config, "--out", tmp_path / "out")
    assert "not allowed" in refused(capsys, config, "--images", folder, "--out", tmp_path / "out", "--export", tmp_path / "e")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.png", "images"]  # and nothing was written
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    assert "b.png" in refused(capsys, config, "--images", folder, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def two(cityscapes, exported, tmp_path):
    """Paths of two results, 19 classes, that differ by 0.1 in road and in the mean."""
    result = cityscapes.result()
    other = result | {"miou": result["miou"] - 0.1, "model": "student",
                      "per_class": result["per_class"] | {"road": result["per_class"]["road"] - 0.1}}
    paths = tmp_path / "a.json", tmp_path / "b.json"
    for path, content in zip(paths, (result, other), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_two_results_side_by_side(two, stage, capsys):
    """What changed, per class and with its sign, under both protocols; an absent class has no difference."""
    stage("evaluate", "--compare", *two)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(two[0].read_text())
    rows = {line[:14].strip(): line[14:].split() for line in lines}
    road = 100 * result["per_class"]["road"]
    assert rows["road"] == [f"{road:.2f}", f"{road - 10:.2f}", "-10.00"]
    assert rows["mIoU"][2] == "-10.00" and rows["sky"][2] == "+0.00" and rows[ABSENT] == ["absent", "absent"]
    assert sum(result["protocol"] in line for line in lines) == 2


@pytest.mark.parametrize("change, named", [
    ({"classes": ["road"]}, "classes"), ({"split": "train"}, "split"),
    ({"config": {"target.dataset": "camvid"}}, "target.dataset"),
])  # fmt: skip
def test_results_that_do_not_measure_the_same_are_refused(two, capsys, change, named):
    """16 against 19 classes, val against train: a difference of those is no difference between two networks."""
    two[1].write_text(json.dumps(json.loads(two[1].read_text()) | change))
    error = refused(capsys, "--compare", *two)
    assert named in error and "b.json" in error


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", "\x00\xff"])
def test_files_that_are_no_results_are_named(two, capsys, content):
    """A wrong path or another JSON must not end in a KeyError."""
    two[1].unlink() if content is None else two[1].write_text(content)
    assert "b.json" in refused(capsys, "--compare", *two)


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture
def spoiled(cityscapes, tmp_path):
    """A copy of the run: its checkpoint's path and state, and the arguments that select it."""
    shutil.copytree(cityscapes.out / "run", tmp_path / "run")
    path = tmp_path / "run/selfens/source_only/last.pt"
    return SimpleNamespace(path=path, state=load_checkpoint(path, ""), args=[cityscapes.config, f"output={tmp_path}"])


def test_another_class_list_than_the_checkpoints_is_refused(spoiled, capsys):
    """16 against 19 classes: the numbers would be of other classes than their names."""
    error = refused(capsys, *spoiled.args, "classes=cityscapes16")
    assert str(spoiled.path) in error and "terrain" in error and "'classes'" in error


def test_another_architecture_is_refused(spoiled, capsys):
    """By the config's key where the config tells, and by the weight where only the file does."""
    assert "selfens.width" in refused(capsys, *spoiled.args, "selfens.width=0.05")
    for spoil in ("shape", "name"):
        state = spoiled.state | {"teacher": dict(spoiled.state["teacher"])}
        name, value = next((n, v) for n, v in state["teacher"].items() if n.startswith("aspp.0.0"))
        if spoil == "name":
            del state["teacher"][name]
        else:
            state["teacher"][name] = value[:-1]
        torch.save(state, spoiled.path)
        error = refused(capsys, *spoiled.args)
        assert str(spoiled.path) in error and "another architecture" in error and name in error


@pytest.mark.parametrize("spoil", ["another stage's", "torn", "empty", "missing"])
def test_no_checkpoint_of_this_stage_is_refused(spoiled, capsys, spoil):
    """A file of another stage, half a file, none: each names the file and the command that makes it."""
    if spoil == "missing":
        spoiled.path.unlink()
    elif spoil == "another stage's":
        torch.save({"step": 3, "config": {}, "G": {}}, spoiled.path)
    else:
        spoiled.path.write_bytes(spoiled.path.read_bytes()[: 1000 * (spoil == "torn")])
    error = refused(capsys, *spoiled.args)
    assert str(spoiled.path) in error and "train_selfens.py" in error


def test_folders_that_cannot_be_written_are_refused_before_the_work(spoiled, capsys, tmp_path, monkeypatch):
    """Nothing is predicted, let alone lost, where the result could not be kept; the mend names the right option."""
    monkeypatch.setattr(evaluate, "classify", lambda *_: pytest.fail("predicted before the folder was tried"))
    save_image(tmp_path / "images/a.png", np.zeros((8, 8, 3)))
    (tmp_path / "file").write_text("not a folder")
    for options in (["--export", tmp_path / "file/x"], ["--images", tmp_path / "images", "--out", tmp_path / "file"]):
        error = refused(capsys, *spoiled.args, *options)
        assert str(options[-1]) in error and "cannot be written" in error and options[-2] in error
    shutil.rmtree(tmp_path / "run/eval", ignore_errors=True)
    (tmp_path / "run/eval").write_text("not a folder")
    error = refused(capsys, *spoiled.args)
    assert str(tmp_path / "run/eval") in error and "'output'" in error
    assert (tmp_path / "file").read_text() == (tmp_path / "run/eval").read_text() == "not a folder"

    def read_only(dir):  # for whoever runs the tests as root, whom no permission stops
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "run/eval").unlink()
    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert "Permission denied" in refused(capsys, *spoiled.args)


def test_refusals_have_no_traceback(spoiled):
    """Through the real command line once: one line and exit status 2."""
    run = shell("evaluate.py", *spoiled.args, "--split", "val", "selfens.width=0.05")
    assert run.returncode == 2 and run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------------------------ speed


def test_the_speed_comparison_runs(tmp_path):
    """The command behind RESULTS' numbers must not rot; here on small files, whose times say nothing."""
    run = shell("tests/bench_metric.py", "--size", 64, 128, "--input", 32, 64, "--width", 0.03, "--files", 1, "--repeats", 1,
                "--json", tmp_path / "bench.json")
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "bench.json").read_text())
    assert len(result["ratios"]) == 3 and all(v > 0 for v in result["ratios"].values())
    assert run.stdout.split()[0] == f"{next(iter(result['ratios'].values())):.4f}"
