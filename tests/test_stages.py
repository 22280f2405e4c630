"""The four stages through their command lines on tiny data: what they write, read, repeat, refuse and resume.

`pipeline` runs each stage once as a process of its own. The target's training labels there are not even images, so all
of it also shows that they are not read. Every other run is in this process, in a copy or under another name.
"""

import contextlib
import copy
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import digests, make_camvid, make_carla, shell
from PIL import Image

import datasets
import train_selfens
from evaluate import confusion_matrix, iou_from_confusion, print_table
from losses import IGNORE
from models import DeepLabVGG16
from runtime import VARIANTS, UserError, load_checkpoint, run_main, weights_digest

SIZE = [32, 48]
TINY = {
    "name": "run", "device": "cpu", "precision": "float32", "log_every": 1, "sheet_every": 4, "save_every": 2,
    "source": {"dataset": "carla", "size": SIZE, "images": 12}, "target": {"dataset": "camvid", "size": SIZE, "images": 10},
    "fseg": {"width": 0.03, "steps": 4, "batch": 2, "crop": None},
    "gan": {"steps": 4, "warmup_steps": 1, "batch": 2, "width": 4, "style_dim": 4, "mlp_dim": 8, "res_blocks": 1, "d_width": 4,
            "d_layers": 2, "crop": None, "lambda_sem": 5.0},
    "augment": {"batch": 5, "styles_per_image": 1}, "eval": {"batch": 3},
    "selfens": {"width": 0.03, "steps": 4, "batch": 2, "aspp_rates": [1, 2], "delta_con": 10.0, "ramp_up": 0.4},
}  # fmt: skip
STAGES = ("train_gan", "augment", "train_selfens", "evaluate")
VOLATILE = ("events", "run-", "config.yaml")  # say when and by whom, and are written at every start


def write_config(folder: Path, **changes) -> Path:
    tree = copy.deepcopy(TINY) | {"output": str(folder / "out")}
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        if leaf:
            tree[section][leaf] = value
        else:
            tree[key] = value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The four stages as processes, tgcf_da_se. Holds the config's path, the run folder and each stage's output."""
    root = tmp_path_factory.mktemp("pipeline")
    make_carla(root / "carla")
    make_camvid(root / "camvid", bad_train_labels=True)
    config = write_config(root, source__root=str(root / "carla"), target__root=str(root / "camvid"))
    shown = {}
    for name in STAGES:
        result = shell(f"{name}.py", config)
        assert result.returncode == 0, f"{name}: {result.stderr[-3000:]}"
        shown[name] = result.stdout
    return SimpleNamespace(root=root, config=config, out=root / "out", folder=root / "out" / "run", shown=shown)


@pytest.fixture
def duplicate(pipeline, tmp_path):
    """A copy of the run that a test may spoil: its folder, and the arguments that select it."""
    shutil.copytree(pipeline.folder, tmp_path / "run")
    return SimpleNamespace(folder=tmp_path / "run", args=[pipeline.config, f"output={tmp_path}"])


@pytest.fixture(scope="module")
def trained(pipeline):
    """train(variant): the run folder of a variant trained in this process, once per module."""
    def train(variant, name="run", *items):
        folder = pipeline.out / name / "selfens" / variant
        if not (folder / "last.pt").exists():
            argv = ["train_selfens.py", str(pipeline.config), f"selfens.variant={variant}", f"name={name}", *items]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", argv)
                train_selfens.main()
        return folder

    return train


def state_of(path, *parts):
    state = load_checkpoint(path, "")
    return {part: state[part] for part in parts}


def same_weights(a: dict, b: dict) -> bool:
    return all(weights_digest(a[part]) == weights_digest(b[part]) for part in a)


def optimiser_tensors(state: dict) -> dict:
    return {f"{i}.{k}": torch.as_tensor(v) for i, moments in state["state"].items() for k, v in moments.items()}


# ------------------------------------------------------------------------------------------------------ the layout


def test_the_output_folder_has_the_documented_layout(pipeline):
    """Scripts and people find results by these paths."""
    files = set(digests(pipeline.folder))
    for stage in ("gan/fseg", "gan", "augmented", "selfens/tgcf_da_se"):
        assert {f"{stage}/config.yaml", f"{stage}/log.jsonl", f"{stage}/run-0000000.json"} <= files
        assert any(f.startswith(f"{stage}/events") for f in files)
    assert {"gan/fseg/last.pt", "gan/last.pt", "selfens/tgcf_da_se/last.pt", "augmented/manifest.jsonl",
            "augmented/identity.json", "gan/sheets/generated-0000004.png",
            "selfens/tgcf_da_se/sheets/consistency-0000004.png", "eval/tgcf_da_se_teacher_val.json",
            "eval/tgcf_da_se_teacher_val.png"} <= files  # fmt: skip
    assert not [f for f in files if f.endswith(".tmp")]


@pytest.mark.parametrize("stage, terms", [
    ("gan/fseg", {"L_fseg"}), ("gan", {"L_D", "L_GAN", "L_sem"}),
    ("selfens/tgcf_da_se", {"L", "L_sup", "L_con", "delta_con", "lr"}),
])  # fmt: skip
def test_logs_hold_every_step_and_the_papers_terms(pipeline, stage, terms):
    """One JSON line per logged step under the paper's names; L must be the sum that it says it is."""
    lines = [json.loads(line) for line in (pipeline.folder / stage / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    if stage == "gan":  # the warm-up has a loss of its own
        assert "L_rec" in lines[0]
        lines = lines[1:]
    assert all(terms <= set(line) and np.isfinite(list(line.values())).all() for line in lines)
    if "L_con" in terms:
        for line in lines:
            assert line["L"] == pytest.approx(line["L_sup"] + line["delta_con"] * line["L_con"], rel=1e-5)
            assert line["delta_con"] == pytest.approx(10 * np.exp(-5 * (1 - min(line["step"] / 1.6, 1)) ** 2))
        assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (1 - k / 4) ** 0.9 for k in range(4)])


def test_stages_print_the_next_command(pipeline):
    """Each stage ends with what to type next, so that the README is not needed for it."""
    for name, following in zip(STAGES[:3], STAGES[1:], strict=True):
        assert f"python {following}.py" in pipeline.shown[name].splitlines()[-1]


@pytest.mark.parametrize("name", STAGES)
def test_help_lists_the_stages_keys(stage, capsys, name):
    """--help is the manual: it needs no config file and explains the stage's own keys."""
    with pytest.raises(SystemExit) as end:
        stage(name, "--help")
    assert end.value.code == 0
    text = capsys.readouterr().out
    own = {"train_gan": ("fseg.lr", "gan.lambda_sem"), "augment": ("augment.styles_per_image", "--restart"),
           "train_selfens": ("selfens.delta_con", "--restart"), "evaluate": ("eval.batch", "--table", "--model")}
    assert all(word in text for word in (*own[name], "seed", "source.root", "target.size"))


# ------------------------------------------------------------------------------------------------------ evaluation


def test_evaluation_json_is_complete_and_consistent(pipeline):
    """A number without variant, model, split, step and protocol is no result; and all of it must add up."""
    result = json.loads((pipeline.folder / "eval" / "tgcf_da_se_teacher_val.json").read_text())
    assert {"miou", "per_class", "confusion", "classes", "protocol"} <= set(result)
    expected = {"variant": "tgcf_da_se", "model": "teacher", "split": "val", "step": 4, "images": 5}
    assert {k: result[k] for k in expected} == expected
    assert all(word in result["protocol"] for word in ("10 classes", "camvid10", "teacher", "56x40", "48x32", "5 images"))
    labels = np.stack([np.asarray(Image.open(p)) for p in sorted((pipeline.root / "camvid/valannot").iterdir())])
    confusion = np.array(result["confusion"])
    assert confusion.sum() == (labels < 10).sum() < labels.size
    assert confusion.sum(1).tolist() == [(labels == k).sum() for k in range(10)]  # rows are labels
    ious = {}
    for k, name in enumerate(result["classes"]):
        union = sum(confusion[k]) + sum(confusion[:, k]) - confusion[k, k]
        ious[name] = confusion[k, k] / union if union else None
    assert result["per_class"] == pytest.approx(ious)
    assert result["miou"] == pytest.approx(np.mean([v for v in ious.values() if v is not None]))


def test_evaluation_is_the_teacher_at_the_labels_own_size(pipeline):
    """Recomputed with nothing of evaluate.py: its input, its network, its up-sampling and its counting are as stated."""
    net = DeepLabVGG16(10, 0.03, True, 0.3, (1, 2)).eval()
    net.load_state_dict(state_of(pipeline.folder / "selfens/tgcf_da_se/last.pt", "teacher")["teacher"])
    confusion = np.zeros((10, 10), int)
    for path in sorted((pipeline.root / "camvid/val").iterdir()):
        image = np.asarray(Image.open(path).resize((48, 32), Image.BILINEAR), np.float32)
        label = np.asarray(Image.open(pipeline.root / "camvid/valannot" / f"{path.stem}.png"))
        with torch.no_grad():
            logits = net(torch.tensor(image / 127.5 - 1).permute(2, 0, 1)[None])
            for scale in (dict(scale_factor=8), dict(size=label.shape)):
                logits = torch.nn.functional.interpolate(logits, **scale, mode="bilinear", align_corners=False)
        prediction = logits[0].argmax(0).numpy()
        np.add.at(confusion, (label[label < 10], prediction[label < 10]), 1)
    stated = np.array(json.loads((pipeline.folder / "eval/tgcf_da_se_teacher_val.json").read_text())["confusion"])
    assert np.abs(stated - confusion).sum() <= 0.005 * confusion.sum()  # a rounding may turn a tie


def test_confusion_and_iou():
    """IoU = TP / (TP + FP + FN); ignored pixels do not count; a class in neither label nor prediction has none."""
    label, prediction = torch.tensor([[0, 0, 1, IGNORE], [1, 1, IGNORE, 0]]), torch.tensor([[0, 1, 1, 3], [1, 3, 0, 0]])
    confusion = confusion_matrix(label, prediction, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    iou = iou_from_confusion(confusion)
    assert iou[[0, 1, 3]].tolist() == pytest.approx([2 / 3, 2 / 4, 0])
    assert np.isnan(iou[2])


def test_table_of_an_absent_class(capsys):
    """An excluded class is said to be excluded, not shown as 0."""
    print_table({"miou": 0.5, "per_class": {"a": 0.5, "b": None}, "confusion": [[1, 0], [0, 0]], "protocol": "p"})
    shown = capsys.readouterr().out
    assert "absent" in shown and "excluded from the mean" in shown and "50.00" in shown


def test_table_over_runs_is_mean_and_sample_deviation(stage, pipeline, tmp_path, capsys):
    """Results are reported over seeds: mean, deviation with n - 1, and each variant in a row of its own."""
    result = json.loads((pipeline.folder / "eval/tgcf_da_se_teacher_val.json").read_text())
    for k, miou in enumerate((0.10, 0.20, 0.60)):
        (tmp_path / f"r{k}" / "eval").mkdir(parents=True)
        per_class = dict.fromkeys(result["per_class"]) | {"sky": miou / 2}
        (tmp_path / f"r{k}/eval/x.json").write_text(json.dumps(result | {"miou": miou, "per_class": per_class}))
    stage("evaluate", pipeline.config, "--table", *[tmp_path / f"r{k}" for k in range(3)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tgcf_da_se"))
    assert "30.00 ±26.46" in row and "15.00" in row and "absent" in row
    assert row.split()[1:4] == ["teacher", "val", "3"]
    with pytest.raises(UserError, match="nothing_here"):
        stage("evaluate", pipeline.config, "--table", tmp_path / "nothing_here")


def test_student_can_be_evaluated_and_differs_from_the_teacher(stage, pipeline):
    """--model student goes to a file of its own; equal confusions would mean that the flag has no effect on the weights."""
    stage("evaluate", pipeline.config, "--model", "student")
    result = json.loads((pipeline.folder / "eval/tgcf_da_se_student_val.json").read_text())
    assert result["model"] == "student" and "student" in result["protocol"]
    state = state_of(pipeline.folder / "selfens/tgcf_da_se/last.pt", "student", "teacher")
    assert weights_digest(state["student"]) != weights_digest(state["teacher"])


# ----------------------------------------------------------------------------------------------------- augmentation


def test_augmented_images_and_manifest(pipeline):
    """One image per source image at source.size, and a manifest that says from what and by whom each was made."""
    folder = pipeline.folder / "augmented"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    generator = weights_digest(state_of(pipeline.folder / "gan/last.pt", "G")["G"])
    assert len(lines) == len({line["file"] for line in lines}) == 12
    for line in lines:
        assert Image.open(folder / line["file"]).size == tuple(SIZE[::-1])
        assert Path(line["file"]).stem == line["source"]  # the names that source and target have below their roots
        assert (pipeline.root / "carla/CameraRGB" / f"{line['source']}.png").is_file()
        assert (pipeline.root / "camvid/train" / f"{line['style']}.jpg").is_file()
        assert (line["generator"], line["seed"]) == (generator, 0)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("style*/*.png")} == {line["file"] for line in lines}
    assert len({line["style"] for line in lines}) > 3  # guides are drawn, not one for all


@pytest.mark.parametrize("lost", ["image", "image and manifest's last line"])
def test_a_lost_augmented_image_is_made_again_bit_for_bit(stage, duplicate, lost):
    """A restored image that differed would silently make another training set."""
    folder = duplicate.folder / "augmented"
    before = digests(folder, *VOLATILE, "log.jsonl", "augmented-")
    manifest = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / json.loads(manifest[-1])["file"]).unlink()
    if lost != "image":
        (folder / "manifest.jsonl").write_text("".join(manifest[:-1]) + manifest[-1][:30])
    stage("augment", *duplicate.args)
    after = digests(folder, *VOLATILE, "log.jsonl", "augmented-")
    if lost != "image":  # a torn line is left or replaced, the others and the images are as before
        before.pop("manifest.jsonl"), after.pop("manifest.jsonl")
    assert after == before
    stage("train_selfens", *duplicate.args, "selfens.variant=tgcf_da", "selfens.steps=1")


def test_images_of_another_generator_are_refused(stage, duplicate):
    """Images of two generators in one folder would be one training set without a name."""
    path = duplicate.folder / "gan/last.pt"
    state = load_checkpoint(path, "")
    next(iter(state["G"].values())).add_(0.1)
    torch.save(state, path)
    before = digests(duplicate.folder / "augmented", *VOLATILE, "log.jsonl")
    with pytest.raises(UserError, match="augmented.*generator"):
        stage("augment", *duplicate.args)
    assert digests(duplicate.folder / "augmented", *VOLATILE, "log.jsonl") == before


def test_foreign_and_missing_augmented_images_are_named(stage, duplicate):
    """Stage 3 must not train on a part of the images, and stage 2 not leave strangers among its own."""
    folder = duplicate.folder / "augmented"
    victim = sorted(folder.rglob("style0/*.png"))[3]
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=rf"{victim.name}.*1 of 12.*augment\.py"):
        stage("train_selfens", *duplicate.args, "selfens.variant=tgcf_da")
    victim.write_bytes(data)
    (folder / "style0" / "stranger.png").write_bytes(data)
    with pytest.raises(UserError, match="stranger.png"):
        stage("augment", *duplicate.args)


def test_augmented_images_of_another_config_are_refused(stage, duplicate):
    """open_augmented promises it: images that were made at another source.size are not this config's."""
    with pytest.raises(UserError, match="augment"):
        stage("train_selfens", *duplicate.args, "selfens.variant=tgcf_da", "source.size=[24, 40]", "target.size=[24, 40]")


def test_several_styles_per_image(stage, pipeline, duplicate):
    """styles_per_image makes a second image of each source image, by another draw of its guide."""
    args = [*duplicate.args, "augment.styles_per_image=2"]
    with pytest.raises(UserError, match="styles_per_image"):
        stage("augment", *args)
    stage("augment", *args, "--restart")
    assert len(list(duplicate.folder.glob("augmented/style*/*.png"))) == 24
    assert len(list(duplicate.folder.glob("augmented.*/style0/*.png"))) == 12  # --restart keeps the old ones aside
    first = digests(duplicate.folder / "augmented/style0")
    assert first != digests(duplicate.folder / "augmented/style1")
    assert first.keys() == digests(pipeline.folder / "augmented/style0").keys()


# ----------------------------------------------------------------------------------------- again, resumed, reseeded


@pytest.mark.parametrize("name", STAGES[:3])
def test_a_second_run_does_nothing(stage, duplicate, capsys, name):
    """Running a finished stage again must neither compute nor change anything, its log included."""
    before = digests(duplicate.folder, ".")  # all but the lock files
    stage(name, *duplicate.args)
    assert "nothing to do" in capsys.readouterr().out
    assert digests(duplicate.folder, ".") == before


def test_a_second_evaluation_gives_the_same_result(stage, duplicate):
    """Evaluation has no randomness: all but the time stays."""
    path = duplicate.folder / "eval/tgcf_da_se_teacher_val.json"
    before = json.loads(path.read_text())
    stage("evaluate", *duplicate.args)
    after = json.loads(path.read_text())
    assert {k: v for k, v in before.items() if k not in ("environment", "config")} == \
           {k: v for k, v in after.items() if k not in ("environment", "config")}


class PowerCut(Exception):
    pass


def cut_power(monkeypatch, module, function, call):
    """Makes `module.function` raise at its call number `call`."""
    original, calls = getattr(module, function), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise PowerCut
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, failing)


def test_interrupted_and_resumed_equals_undisturbed(stage, pipeline, monkeypatch):
    """Each stage is stopped in its third step and continues from step 2: weights, images and logs equal the pipeline's.

    The pipeline ran as processes of their own, so this also shows that equal seeds give equal runs, bit for bit.
    """
    args = [pipeline.config, "name=resumed"]
    plan = [("train_gan", "cross_entropy", 3), ("train_gan", "lsgan_d", 3), ("augment", "to_uint8", 8),
            ("train_selfens", "cross_entropy", 2 * 3)]  # fmt: skip
    for name, function, call in plan:
        with monkeypatch.context() as patch:
            cut_power(patch, importlib.import_module(name), function, call)
            with pytest.raises(PowerCut):
                stage(name, *args)
        if (name, function) != plan[0][:2]:
            stage(name, *args)
    resumed = pipeline.out / "resumed"
    assert (resumed / "gan/fseg/run-0000002.json").exists() and (resumed / "gan/run-0000002.json").exists()
    assert (resumed / "selfens/tgcf_da_se/run-0000002.json").exists()
    for path, parts, optimisers in (("gan/fseg", ["f_seg"], ["optimiser"]), ("gan", ["G", "D"], ["opt_g", "opt_d"]),
                                    ("selfens/tgcf_da_se", ["student", "teacher"], ["optimiser"])):  # fmt: skip
        a, b = (state_of(folder / path / "last.pt", *parts, *optimisers) for folder in (pipeline.folder, resumed))
        for part in optimisers:
            a[part], b[part] = optimiser_tensors(a[part]), optimiser_tensors(b[part])
        assert same_weights(a, b), path
        assert (pipeline.folder / path / "log.jsonl").read_text() == (resumed / path / "log.jsonl").read_text()
    images = [digests(folder / "augmented" / "style0") for folder in (pipeline.folder, resumed)]
    assert images[0] == images[1] and len(images[0]) == 12


def test_another_seed_gives_another_run(trained):
    """A seed that reaches nothing would make a deviation over seeds of 0."""
    weights = [state_of(trained("source_only", name, f"seed={seed}") / "last.pt", "student", "teacher")
               for name, seed in (("a", 3), ("b", 3), ("c", 4))]
    assert same_weights(weights[0], weights[1])
    assert not same_weights(weights[0], weights[2])


def test_another_config_is_refused(stage, duplicate):
    """A finished run under a changed key must not pass for the new config's result."""
    with pytest.raises(UserError, match=r"gan\.lambda_sem \(5\.0 then, 3\.0 now\)"):
        stage("train_gan", *duplicate.args, "gan.lambda_sem=3")
    with pytest.raises(UserError, match=r"selfens\.delta_con"):
        stage("train_selfens", *duplicate.args, "selfens.delta_con=3")


def test_unfinished_gan_is_not_used(stage, duplicate):
    """Augmenting with a half-trained generator would go unnoticed for the rest of the pipeline."""
    path = duplicate.folder / "gan/last.pt"
    torch.save(load_checkpoint(path, "") | {"step": 2}, path)
    with pytest.raises(UserError, match="step 2 of 4.*train_gan.py"):
        stage("augment", *duplicate.args)


# --------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("variant", VARIANTS[:4])
def test_no_variant_but_target_only_reads_target_train_labels(trained, variant):
    """The labels here cannot be read, so that a variant which finishes has not used them. Its log shows its own terms."""
    line = json.loads((trained(variant) / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 4
    assert ("L_con" in line) == (variant in ("self_ensembling", "tgcf_da_se"))


def test_the_variants_learn_different_things(trained):
    """Four rows of the table from one seed: each term must change the weights."""
    assert len({weights_digest(state_of(trained(v) / "last.pt", "student")["student"]) for v in VARIANTS[:4]}) == 4


def test_target_only_reads_them_and_says_which_is_broken(stage, pipeline, monkeypatch, capsys):
    """The upper bound does need target labels: unreadable, they are named with status 2; readable, it trains."""
    args = [pipeline.config, "selfens.variant=target_only", "name=upper"]
    with pytest.raises(SystemExit) as end:
        run_main(lambda: stage("train_selfens", *args))
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "trainannot/f000.png" in error[0]
    make_camvid(pipeline.root / "readable")
    args.append(f"target.root={pipeline.root / 'readable'}")
    stage("train_selfens", *args)
    stage("evaluate", *args)
    assert (pipeline.out / "upper/eval/target_only_teacher_val.json").is_file()


def test_missing_checkpoints_are_named_with_the_command(stage, pipeline, tmp_path):
    """Stages run in order: a missing one is an error that gives the command to run."""
    args = [pipeline.config, f"output={tmp_path}"]
    with pytest.raises(UserError, match=r"gan/last\.pt.*train_gan\.py"):
        stage("augment", *args)
    with pytest.raises(UserError, match=r"augmented.*augment\.py"):
        stage("train_selfens", *args)
    with pytest.raises(UserError, match=r"selfens/tgcf_da/last\.pt.*train_selfens\.py.*selfens\.variant=tgcf_da"):
        stage("evaluate", *args, "selfens.variant=tgcf_da")


@pytest.mark.parametrize("item, named", [("selfens.width=0.05", "last.pt"), ("selfens.aspp_rates=[1, 6]", "aspp_rates")])
def test_evaluation_under_another_network_is_refused(stage, duplicate, item, named):
    """Another dilation rate fits the same weights and gives another number: both must be refused, not computed."""
    with pytest.raises(UserError, match=named):
        stage("evaluate", *duplicate.args, item)


def test_warm_up_is_saved_like_every_other_step(stage, pipeline, monkeypatch):
    """A run stopped in the warm-up must continue from its checkpoint, and one that is all warm-up must leave one."""
    args = [pipeline.config, "name=warm", "fseg.steps=0", "gan.warmup_steps=4"]
    with monkeypatch.context() as patch:
        cut_power(patch, importlib.import_module("train_gan"), "to_float", 2 + 2 * 2 + 1)  # examples, two steps, the third
        with pytest.raises(PowerCut):
            stage("train_gan", *args)
    assert load_checkpoint(pipeline.out / "warm/gan/last.pt", "")["step"] == 2
    stage("train_gan", *args)
    assert load_checkpoint(pipeline.out / "warm/gan/last.pt", "")["step"] == 4


def test_ready_fseg_checkpoint_is_used(stage, pipeline):
    """fseg.checkpoint saves stage 1 its first half: the weights are the given ones, untouched, in the new run folder."""
    given = pipeline.folder / "gan/fseg/last.pt"
    stage("train_gan", pipeline.config, "name=given", f"fseg.checkpoint={given}", "gan.steps=2")
    assert same_weights(state_of(given, "f_seg"), state_of(pipeline.out / "given/gan/fseg/last.pt", "f_seg"))


@pytest.mark.parametrize("item, named", [("gan.d_layers=6", "gan.d_"), ("gan.d_scales=6", "gan.d_"),
                                         ("gan.downsamples=5", "gan.downsamples")])  # fmt: skip
def test_networks_too_deep_for_the_image_are_an_error(stage, pipeline, item, named):
    """Values within a key's stated range must train or be refused with the key's name, not end in torch's own words."""
    with pytest.raises(UserError, match=named):
        stage("train_gan", pipeline.config, "name=deep", "fseg.steps=0", "gan.steps=1", "gan.warmup_steps=0", item)


def test_source_and_target_of_different_sizes(stage, pipeline):
    """One batch holds both domains, so sizes that do not match either work or are an error with a mend, not a traceback."""
    for items in (["target.size=[40, 56]"], ["target.size=[40, 56]", "selfens.crop=[24, 32]"]):
        try:
            stage("train_selfens", pipeline.config, f"name=sizes{len(items)}", "selfens.variant=self_ensembling", *items)
        except UserError as error:
            assert len(items) == 1 and "size" in str(error)


def test_a_diverged_run_leaves_a_usable_checkpoint(stage, pipeline):
    """The error says that the last checkpoint is from before the NaN, also when saving is more frequent than logging."""
    with pytest.raises(UserError, match="step"):
        stage("train_selfens", pipeline.config, "name=nan", "selfens.variant=source_only", "selfens.lr=1e30", "log_every=4",
              "save_every=1")  # fmt: skip
    path = pipeline.out / "nan/selfens/source_only/last.pt"
    for weights in state_of(path, "student", "teacher").values() if path.exists() else ():
        assert all(torch.isfinite(v).all() for v in weights.values())


def test_streets_need_no_data_and_run_through_all_stages(stage, tmp_path, monkeypatch):
    """The built-in job is what everybody runs first: four stages from nothing, with crops and two styles."""
    monkeypatch.setattr(datasets, "STREETS_VAL", 4)
    config = write_config(tmp_path, source={"size": SIZE, "images": 6}, target={"size": SIZE, "images": 5}, precision="auto",
                          fseg__crop=[24, 32], gan__crop=[24, 32], selfens__crop=[16, 40], augment__styles_per_image=2)
    for name in STAGES:
        stage(name, config)
    result = json.loads((tmp_path / "out/run/eval/tgcf_da_se_teacher_val.json").read_text())
    assert len(result["classes"]) == 10 and np.sum(result["confusion"]) == 4 * 96 * 160


# ----------------------------------------------------------------------------------------------------------- teacher


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_teacher_is_the_moving_average(alpha):
    """t = alpha t + (1 - alpha) s over weights and batch-norm statistics; counters are copied; the student stays."""
    torch.manual_seed(0)
    teacher, student = (DeepLabVGG16(3, 0.03, True, rates=(1,)) for _ in range(2))
    student.train()
    for _ in range(3):
        student(torch.randn(2, 3, 16, 16))  # moves the running statistics and their counters
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    theirs = {k: v.clone() for k, v in student.state_dict().items()}
    train_selfens.MovingAverage(teacher, student).update(alpha)
    seen = set()
    for name, t in teacher.state_dict().items():
        kind = name.rpartition(".")[2]
        seen.add(kind)
        if kind == "num_batches_tracked":
            assert int(t) == int(theirs[name]) == 3
        else:
            expected = alpha * before[name].double() + (1 - alpha) * theirs[name].double()
            torch.testing.assert_close(t.double(), expected, atol=1e-6, rtol=1e-6)
    assert {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"} <= seen
    assert all(torch.equal(v, theirs[k]) for k, v in student.state_dict().items())


def test_teacher_starts_as_the_true_mean_of_the_students(stage, pipeline, monkeypatch):
    """While 1 - 1/step is below alpha the teacher is the plain mean of all students so far: nothing of the random start."""
    students = []

    class Recorded(train_selfens.MovingAverage):
        def __init__(self, teacher, student):
            super().__init__(teacher, student)
            self.student = student

        def update(self, alpha):
            students.append({k: v.detach().double().clone() for k, v in self.student.named_parameters()})
            super().update(alpha)

    monkeypatch.setattr(train_selfens, "MovingAverage", Recorded)
    stage("train_selfens", pipeline.config, "name=mean", "selfens.variant=self_ensembling", "selfens.lr=0.1")
    teacher = state_of(pipeline.out / "mean/selfens/self_ensembling/last.pt", "teacher")["teacher"]
    assert len(students) == 4
    for name in students[0]:
        mean = sum(s[name] for s in students) / 4
        torch.testing.assert_close(teacher[name].double(), mean, atol=1e-5, rtol=1e-4)


def test_statistics_move_only_where_they_are_tracked():
    """Source batches must not move the running statistics that describe the target; normalisation is the batch's anyway."""
    net = DeepLabVGG16(3, 0.03, True, rates=(1,), dropout=0.0).train()
    norm = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    x = torch.randn(2, 3, 16, 16)
    before = norm.running_mean.clone()
    train_selfens.track_statistics(net, False)
    quiet = net(x)
    assert torch.equal(norm.running_mean, before)
    train_selfens.track_statistics(net, True)
    assert torch.equal(net(x), quiet)
    assert not torch.equal(norm.running_mean, before)



def test_estimated_statistics_are_the_mean_over_the_batches():
    """Averaged weights need statistics of their own: the plain mean over the batches, taken without dropout or noise."""
    torch.manual_seed(0)
    net = DeepLabVGG16(3, 0.03, True, dropout=0.9, rates=(1,)).train()
    first = next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d))
    batches = [torch.randn(2, 3, 16, 24) * (k + 1) for k in range(3)]
    seen = []
    handle = first.register_forward_pre_hook(lambda _, x: seen.append(x[0].double()))
    train_selfens.estimate_statistics(net, batches, contextlib.nullcontext())
    handle.remove()
    for ours, formula in ((first.running_mean, torch.mean), (first.running_var, torch.var)):
        mean = torch.stack([formula(x, (0, 2, 3)) for x in seen]).mean(0)
        torch.testing.assert_close(ours.double(), mean, atol=1e-5, rtol=1e-4)
    assert net.training and first.momentum == 0.0
