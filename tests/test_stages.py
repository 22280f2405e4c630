"""The stages through their command lines on tiny data: what they write, read, repeat, refuse and resume.

`pipeline` runs each stage once as a process, by the commands that they print. Its target's training labels
are not even images: all of it also shows that they are not read. Other runs are made in this process.
"""

import errno
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENV, REPO, digests, make_camvid, make_carla, save_image, shell, write_config
from PIL import Image

import augment
import runtime
import train_gan
import train_selfens
from losses import poly
from runtime import Run, UserError, load_checkpoint, refuse_changes, weights_digest

STAGES = ("train_gan", "augment", "train_selfens", "evaluate")
NOISE = "selfens.noise_std=0.1"  # an override that all runs have
NETS = {"gan/fseg": ("f_seg", "optimiser"), "gan": ("G", "D", "opt_g", "opt_d"),
        "selfens/tgcf_da_se": ("student", "teacher", "optimiser")}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The four stages as processes, with two readers each, by the command that the one before printed."""
    root = tmp_path_factory.mktemp("the user's folder")
    make_carla(root / "carla")
    make_camvid(root / "camvid", bad_train_labels=True)
    config = write_config(root, source__root=str(root / "carla"), target__root=str(root / "camvid"))
    words, shown = ["python", "train_gan.py", str(config), "workers=2", NOISE], {}
    for name in STAGES:
        assert words[:2] == ["python", f"{name}.py"]
        run = shell(*words[1:])
        assert run.returncode == 0, f"{name}: {run.stderr[-3000:]}"
        shown[name] = run.stdout
        words = shlex.split(run.stdout.rstrip().rpartition("next: ")[2]) if name != "evaluate" else words
    return SimpleNamespace(root=root, args=[config, NOISE], out=root / "out",
                           folder=root / "out/run", shown=shown, last=words)  # fmt: skip


@pytest.fixture
def duplicate(pipeline, tmp_path):
    """A copy of the run that a test may spoil: its folder, and the arguments that select it."""
    shutil.copytree(pipeline.folder, tmp_path / "run")
    return SimpleNamespace(folder=tmp_path / "run", args=[*pipeline.args, f"output={tmp_path}"])


@pytest.fixture
def refused(stage, capsys):
    """refused("augment", ...) runs a stage that must end with status 2 and one line, which it returns."""

    def run(name, *argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runtime.run_main(lambda: stage(name, *argv))
        errors = capsys.readouterr().err
        lines = re.findall(r"\berror: .*", errors)  # maybe behind a progress bar
        assert end.value.code == 2 and len(lines) == 1 and "Traceback" not in errors, errors
        return lines[0]

    return run


def tensors(tree, prefix="") -> dict:
    """{path: tensor} of a checkpoint's part, optimiser states and all."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    items = tree.items() if isinstance(tree, dict) else ()
    return {path: x for key, value in items for path, x in tensors(value, f"{prefix}/{key}").items()}


def same_nets(a: Path, b: Path, part: str) -> bool:
    """Whether two run folders hold the same last step of a stage, bit for bit, and the same log."""
    states = [load_checkpoint(folder / part / "last.pt", "", NETS[part]) for folder in (a, b)]
    one, two = ({k: v for net in NETS[part] for k, v in tensors(state[net], net).items()} for state in states)
    logs = [(folder / part / "log.jsonl").read_text() for folder in (a, b)]
    return len(one) > 20 and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one) \
        and states[0]["step"] == states[1]["step"] and logs[0] == logs[1]


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


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_run_folder_has_the_documented_layout(pipeline):
    """Scripts and people find results by these paths; the last printed command is the one that evaluates."""
    files = set(digests(pipeline.folder))
    for part in ("gan/fseg", "gan", "augmented", "selfens/tgcf_da_se"):
        assert {f"{part}/config.yaml", f"{part}/log.jsonl", f"{part}/run-0000000.json"} <= files
        assert any(f.startswith(f"{part}/events") for f in files)
    assert {"gan/fseg/last.pt", "gan/fseg/held_out.json", "gan/last.pt", "gan/previous.pt",
            "gan/sheets/generated-0000004.png", "augmented/manifest.jsonl", "augmented/identity.json",
            "selfens/tgcf_da_se/last.pt", "selfens/tgcf_da_se/sheets/consistency-0000004.png",
            "eval/tgcf_da_se_teacher_val.json",
            "eval/tgcf_da_se_teacher_val.png"} <= files  # fmt: skip
    assert not [f for f in files if f.endswith(".tmp")]
    assert pipeline.last[2:] == [str(pipeline.args[0]), "workers=2", NOISE, "--split", "val"]
    assert "mIoU" in pipeline.shown["evaluate"]


def test_logs_hold_every_step_and_the_papers_terms(pipeline):
    """One line a step under the paper's names, and L is the sum that the paper says it is."""
    terms = {"gan/fseg": {"L_fseg"}, "gan": {"L_D", "L_D/scale1", "L_GAN", "L_sem", "L_rec"},
             "selfens/tgcf_da_se": {"L", "L_sup", "L_con", "delta_con", "lr"}}  # fmt: skip
    for part, names in terms.items():
        lines = log_lines(pipeline.folder / part)
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(names <= set(line) for line in lines[part == "gan" :])  # the warm-up step has L_rec alone
        assert all(np.isfinite(list(line.values())).all() for line in lines)
    for line in lines:
        assert line["L"] == pytest.approx(line["L_sup"] + line["delta_con"] * line["L_con"], rel=1e-5)
        assert line["delta_con"] == pytest.approx(10 * np.exp(-5 * (1 - min(line["step"] / 1.6, 1)) ** 2))
        assert line["lr"] == pytest.approx(3e-4 * poly(line["step"], 4))


def test_augmented_images_and_their_manifest(pipeline):
    """Two images for each source image, of its size and name, and a line that tells their guide."""
    folder = pipeline.folder / "augmented"
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [*map(str, sorted(folder.glob("style*/*.png")))] == sorted(str(folder / x["file"]) for x in lines)
    assert len(lines) == 24 and len({line["style"] for line in lines}) > 3  # guides are drawn
    for line in lines:
        assert Path(line["file"]).stem == line["source"]
        assert Image.open(folder / line["file"]).size == (48, 32)
        assert (pipeline.root / f"camvid/train/{line['style']}.jpg").is_file()


def test_a_finished_stage_does_nothing_even_by_its_own_config(stage, duplicate, capsys):
    """A second start neither computes nor changes a thing; a run's own config.yaml stands for it."""
    before = digests(duplicate.folder, ".")
    for name, part in zip(STAGES, ("gan", "augmented", "selfens/tgcf_da_se"), strict=False):
        stage(name, duplicate.folder / part / "config.yaml", f"output={duplicate.folder.parent}")
        assert "nothing to do" in capsys.readouterr().out
    assert digests(duplicate.folder, ".") == before


def test_target_only_alone_of_the_variants_reads_target_labels(stage, duplicate, pipeline, refused):
    """Five rows of the table: the labels here cannot be read, so a variant that ends has not used them."""
    ends = {}
    for variant in ("source_only", "self_ensembling", "tgcf_da", "tgcf_da_se"):
        folder = duplicate.folder / "selfens" / variant
        stage("train_selfens", *duplicate.args, f"selfens.variant={variant}")
        ends[variant] = weights_digest(load_checkpoint(folder / "last.pt", "")["student"])
        assert ("L_con" in log_lines(folder)[-1]) == (variant in ("self_ensembling", "tgcf_da_se"))
    assert len(set(ends.values())) == 4  # each term changes the weights
    args = [*duplicate.args, "selfens.variant=target_only"]
    assert "trainannot/f000.png" in refused("train_selfens", *args)
    stage("train_selfens", *args, f"target.root={make_camvid(pipeline.root / 'readable')}")
    assert log_lines(duplicate.folder / "selfens/target_only")[-1]["step"] == 4


# ----------------------------------------------------------------------------------------------- resumed runs


def test_an_interrupted_run_ends_with_the_same_bits(stage, pipeline, monkeypatch):
    """Every stage breaks off in its third step, without reading processes, and is started again.

    Weights, optimisers, images and logs are the pipeline's, which ran undisturbed and with two workers.
    """
    args = [*pipeline.args, "name=resumed"]
    plan = [(train_gan, "fseg_step", 3), (train_gan, "gan_step", 2), (augment, "to_uint8", 8),
            (train_selfens, "selfens_step", 3)]  # fmt: skip
    for module, function, call in plan:
        with monkeypatch.context() as patch:
            cut_power(patch, module, function, call)
            with pytest.raises(PowerCut):
                stage(module.__name__, *args)
        if function != "fseg_step":  # the same command, as the next one of the plan
            stage(module.__name__, *args)
    resumed = pipeline.out / "resumed"
    for part in NETS:
        assert (resumed / part / "run-0000002.json").exists()
        assert same_nets(pipeline.folder, resumed, part), part
    assert digests(pipeline.folder / "augmented", "events", "run-", "config", "identity") == \
        digests(resumed / "augmented", "events", "run-", "config", "identity")


def test_signals_end_after_the_step_and_lose_nothing(stage, pipeline, tmp_path):
    """SIGTERM is a batch system's, for the reading processes as well; SIGHUP a closed terminal's."""
    code = ("import os, signal, sys; signal.signal(1, signal.SIG_DFL)\nimport runtime, train_selfens as t\n"
            "step, calls = t.selfens_step, []\ndef stepping(*args):\n    calls.append(1)\n"
            "    if len(calls) == 3: os.killpg(0, int(os.environ['SEND']))\n    return step(*args)\n"
            "t.selfens_step = stepping\nsys.argv[0] = 't'\nruntime.run_main(t.main)")  # fmt: skip
    processes = {}
    for number in (15, 1):
        (tmp_path / f"by{number}").mkdir()
        (tmp_path / f"by{number}/gan").symlink_to(pipeline.folder / "gan")
        (tmp_path / f"by{number}/augmented").symlink_to(pipeline.folder / "augmented")
        args = [*pipeline.args, f"output={tmp_path}", f"name=by{number}"]
        words = [sys.executable, "-c", code, *map(str, args), "workers=2"]
        env = ENV | {"SEND": str(number), "PYTHONPATH": str(REPO)}
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        processes[number] = args, subprocess.Popen(words, cwd=REPO, env=env, start_new_session=True, **pipes)
    for number, (args, process) in processes.items():
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 128 + number and "the same command continues" in errors, errors[-2000:]
        folder = tmp_path / f"by{number}"
        assert load_checkpoint(folder / "selfens/tgcf_da_se/last.pt", "")["step"] == 3
        stage("train_selfens", *args)
        assert same_nets(pipeline.folder, folder, "selfens/tgcf_da_se")


def test_a_lost_image_is_made_again_bit_for_bit(stage, duplicate, refused):
    """Stage 3 names what is missing and stage 2 makes it again: another image would make another set."""
    before = digests(duplicate.folder / "augmented", "events", "run-", "config", "log", "identity")
    lost = sorted((duplicate.folder / "augmented/style1").iterdir())[5]
    lost.unlink()
    args = [*duplicate.args, "selfens.variant=tgcf_da"]
    assert f"{lost}: repainted image missing (1 of 24); run augment.py" in refused("train_selfens", *args)
    stage("augment", *duplicate.args)
    assert digests(duplicate.folder / "augmented", "events", "run-", "config", "log", "identity") == before


def test_restart_moves_the_old_folder_aside_each_time(pipeline, tmp_path):
    """Twice in a second: the second must not overwrite, or fail on, what the first has kept."""
    cfg = runtime.load_config(pipeline.args[0], [f"output={tmp_path}"])
    for k in range(3):
        (tmp_path / "run/gan").mkdir(parents=True)
        (tmp_path / "run/gan/mine.txt").write_text(f"run {k}")
        assert Run(cfg, "gan", ("",), {}, 4, restart=True).state is None
        time.sleep(0.01)
    kept = sorted((tmp_path / "run").glob("gan.*/mine.txt"))
    assert [p.read_text() for p in kept] == ["run 0", "run 1", "run 2"]
    assert not (tmp_path / "run/gan").exists()


# ------------------------------------------------------------------------------------- what must not be mixed


def test_another_config_or_other_data_are_refused(duplicate, refused, tmp_path):
    """A finished run must not pass for the result of another config; key and both values are named."""
    assert "gan.lambda_sem (5.0 then, 3.0 now)" in refused("train_gan", *duplicate.args, "gan.lambda_sem=3")
    assert "selfens.lr (0.0003 then, 0.1 now)" in refused("train_selfens", *duplicate.args, "selfens.lr=0.1")
    with pytest.raises(UserError, match="class_colours"):  # the same classes under other train ids
        refuse_changes({"class_colours": {"a": 0, "b": 1}}, {"class_colours": {"b": 1, "a": 0}}, "run")
    line = refused("train_selfens", *duplicate.args, "augment.styles_per_image=1")
    assert "augment.styles_per_image (2 then, 1 now)" in line
    other = make_carla(tmp_path / "other", size=(44, 60))
    for name in ("train_gan", "augment", "train_selfens"):
        line = refused(name, *duplicate.args, f"source.root={other}")
        assert re.search(r"source train \('12 samples \w+' then, '12 samples \w+' now\)", line)


def test_stage_3_takes_the_images_of_the_generator_that_is_there_alone(stage, duplicate, refused):
    """A new generator without new images: what stage 3 learned from would not be what the folder says."""
    args = [*duplicate.args, "gan.lambda_sem=50"]
    stage("train_gan", *args, "--restart")
    line = refused("train_selfens", *args, "selfens.variant=tgcf_da")
    assert str(duplicate.folder / "augmented") in line and "generator (" in line
    assert "generator (" in refused("augment", *args)
    shutil.rmtree(duplicate.folder / "gan")
    assert "gan/last.pt: missing" in refused("train_selfens", *args, "selfens.variant=tgcf_da")


def test_stages_that_have_not_run_are_named(refused, pipeline, duplicate, tmp_path):
    """Stages run in order: what is missing, or not finished, is an error that gives the command."""
    args = [*pipeline.args, f"output={tmp_path / 'new'}"]
    assert "gan/last.pt: missing" in refused("augment", *args)
    assert re.search(r"augmented.*augment\.py", refused("train_selfens", *args))
    assert "selfens/tgcf_da_se/last.pt: missing" in refused("evaluate", *args)
    path = duplicate.folder / "gan/last.pt"
    torch.save(load_checkpoint(path, "") | {"step": 2}, path)
    assert "step 2 of 4; run train_gan.py again" in refused("augment", *duplicate.args)


def test_a_second_process_in_the_same_folder_is_refused(duplicate, refused):
    """Two jobs that write one checkpoint would leave a mixture; the second one says so."""
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()

    def hold():
        runtime.lock_folder(duplicate.folder / "selfens/tgcf_da_se")
        held.set()
        done.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert held.wait(30)
        assert "in use by another process" in refused("train_selfens", *duplicate.args)
    finally:
        done.set()
        other.join()


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_in_a_checkpoint_runs_and_torn_ones_are_told(duplicate, refused, tmp_path):
    """A stranger's checkpoint must not run a program, and half of one must not be a traceback."""
    path = duplicate.folder / "selfens/tgcf_da_se/last.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name in ("train_selfens", "evaluate"):
        assert f"{path}: missing, or not a readable" in refused(name, *duplicate.args)
    path = duplicate.folder / "gan/last.pt"
    torch.save(load_checkpoint(path, "") | {"G": Evil(f"touch {shlex.quote(str(tmp_path / 'ran'))}")}, path)
    for name in ("augment", "train_gan"):
        assert f"{path}: missing, or not a readable" in refused(name, *duplicate.args)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_with_an_optimiser_of_other_shapes_is_refused(duplicate, refused):
    """A fused optimiser reads past the end of such tensors and takes the process with it."""
    parts = ("selfens/tgcf_da_se", "optimiser", "train_selfens"), ("gan", "opt_g", "train_gan")
    for part, key, name in parts:
        path = duplicate.folder / part / "last.pt"
        state = load_checkpoint(path, "") | {"step": 2}
        state[key]["state"][0]["exp_avg"] = torch.zeros(3)
        torch.save(state, path)
        assert f"{path}: optimiser of another architecture" in refused(name, *duplicate.args)


def test_a_torn_augmented_image_is_named(duplicate, refused):
    """Half a file, from a full disk or a copy: stage 3 says which."""
    for path in (duplicate.folder / "augmented").glob("style*/*.png"):
        path.write_bytes(path.read_bytes()[:200])
    line = refused("train_selfens", *duplicate.args, "selfens.variant=tgcf_da")
    assert re.search(r"augmented/style\d/\d{6}\.png: not a readable PNG", line)


def test_training_that_does_nothing_does_not_pass(stage, refused, pipeline, tmp_path):
    """No step, or none in which G sees D: an evening later the numbers would be those of a random start."""
    args = [*pipeline.args, f"output={tmp_path}"]
    assert "gan.warmup_steps=4" in refused("train_gan", *args, "gan.warmup_steps=4")
    assert "fseg.steps=0" in refused("train_gan", *args, "fseg.steps=0")
    assert not list(tmp_path.rglob("*.pt"))
    stage("train_gan", *args, "gan.steps=0", "fseg.steps=2")  # f_seg alone
    assert (tmp_path / "run/gan/fseg/last.pt").exists()
    assert "gan/last.pt: missing" in refused("augment", *args, "gan.steps=0", "fseg.steps=2")


@pytest.mark.parametrize("section", ["fseg", "gan", "selfens"])
def test_a_crop_larger_than_the_images_is_refused_by_every_stage(refused, pipeline, tmp_path, section):
    """Found by the third stage, it would cost the hours of the two before it."""
    for name in STAGES[:3]:
        line = refused(name, *pipeline.args, f"output={tmp_path}", f"{section}.crop=[32, 56]")
        assert f"{section}.crop" in line
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_and_spoils_nothing(stage, pipeline, refused, monkeypatch):
    """One line with term and step; the checkpoint before it is whole, and from it the run goes on."""
    args = [*pipeline.args, "name=diverged", "selfens.variant=self_ensembling"]
    with monkeypatch.context() as patch:
        patch.setattr(train_selfens, "poly", lambda step, steps: 1e30 if step == 3 else poly(step, steps))
        assert re.search(r"self_ensembling: L\w* is (nan|inf) at step 4", refused("train_selfens", *args))
    path = pipeline.out / "diverged/selfens/self_ensembling/last.pt"
    state = load_checkpoint(path, "")
    assert state["step"] == 2 and all(torch.isfinite(x).all() for x in tensors(state).values())
    stage("train_selfens", *args)
    assert load_checkpoint(path, "")["step"] == 4


@pytest.mark.parametrize("what", ["checkpoint", "log"])
def test_a_full_disk_is_one_line_and_the_checkpoint_stays(pipeline, refused, monkeypatch, tmp_path, what):
    """Disks fill up at night: last.pt is the one of step 2, whole, and no half file lies about."""
    saved, sync, begin = [], os.fsync, Run.begin

    def full(file):
        name = os.readlink(f"/proc/self/fd/{file}")
        saved.extend([name] * (".last.pt" in name))
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    def begin_on_a_full_disk(run):
        begin(run)
        run.log_file = open("/dev/full", "w")  # every write fails as on a full disk

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Run, "begin", begin_on_a_full_disk if what == "log" else begin)
    args = [*pipeline.args, f"output={tmp_path}", "selfens.variant=source_only"]
    assert "No space left" in refused("train_selfens", *args)
    folder = tmp_path / "run/selfens/source_only"
    assert not list(folder.glob(".*.tmp"))
    if what == "checkpoint":
        assert load_checkpoint(folder / "last.pt", "")["step"] == 2


@pytest.mark.parametrize("changes, words", [
    (["fseg.steps=1"], "warning: f_seg hardly reads"),
    (["gan.lr_d=0"], r"L_D/scale1 is \d\.\d+: D is at chance"),
    (["gan.lr_d=0.05", "gan.lr_g=0", "gan.steps=40"], r"L_D/scale1 is 0\.0\d: D wins.*lower gan.lr_d"),
    (["gan.lr_g=0", "gan.warmup_lr=0"], "style_corr is -?0.0.*do not follow guides"),
])  # fmt: skip
def test_stage_1_says_what_goes_wrong(stage, pipeline, tmp_path, capsys, changes, words):
    """An hour in, the sheets show it to those who look; each of these runs is made to fail in its way."""
    ready = [] if "fseg" in changes[0] else [f"fseg.checkpoint={pipeline.folder / 'gan/fseg/last.pt'}"]
    stage("train_gan", *pipeline.args, f"output={tmp_path}", "save_every=40", *ready, *changes)
    shown = capsys.readouterr()
    assert re.search(words, shown.out + shown.err), shown.err


@pytest.mark.parametrize("changes, words", [
    (["selfens.steps=12", "selfens.lr=0.003", "balance=0"], "teacher reads nothing.*raise balance"),
    (["selfens.lr=0.3", "selfens.steps=8"], r"student and teacher differ in \d+ % of the pixels; lower"),
])  # fmt: skip
def test_stage_3_says_what_goes_wrong(stage, pipeline, tmp_path, capsys, changes, words):
    """A class that dies, and a student that the teacher cannot follow, look like training in the log."""
    stage("train_selfens", *pipeline.args, f"output={tmp_path}", "selfens.variant=source_only", *changes)
    assert re.search(f"warning: selfens/source_only, step .*{words}", capsys.readouterr().err)


def test_the_page_of_a_run_stands_alone(stage, pipeline, duplicate):
    """One file to send: every picture is in it, and nothing is fetched from anywhere."""
    stage("figures", "page", duplicate.folder)
    page = (duplicate.folder / "index.html").read_text()
    assert page.count("<img") == page.count('src="data:image/png;base64,') > 8 and "<script" not in page
    assert not re.findall(r"https?://", page)
    for words in ("building", "TGCF-DA + SE, val", "gan/sheets/generated-0000004.png", "source labels"):
        assert words in page
    stage("figures", "curve", duplicate.folder, "--out", duplicate.folder / "curve.png")
    stage("figures", "over", "target.labelled", duplicate.folder, "--out", duplicate.folder / "over.png")
    assert all(Image.open(duplicate.folder / f"{name}.png").width > 500 for name in ("curve", "over"))


# --------------------------------------------------------------------------- translators that are not trained


def smooth(seed: int, size=(24, 32)) -> torch.Tensor:
    """Smooth random images in the middle of [-1, 1], so that nothing is clipped."""
    x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.6 - 0.3
    return torch.nn.functional.interpolate(x, size, mode="bilinear", align_corners=True)


def l_alpha_beta(x: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3), as Reinhard et al. print it, pixel by pixel."""
    rgb = (x.permute(1, 2, 0).numpy() + 1) / 2
    lms = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
    lms = np.log10(lms @ rgb[..., None])
    scale = np.diag([1 / np.sqrt(3), 1 / np.sqrt(6), 1 / np.sqrt(2)])
    return (scale @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]]) @ lms)[..., 0]


def test_reinhard_gives_the_guides_statistics():
    """Mean and deviation of l, alpha, beta are the guide's, all else the source's; black is no infinity."""
    x_s, x_t = smooth(0), smooth(1, (40, 30))
    for images in zip(x_s, x_t, augment.reinhard(x_s, x_t), strict=True):
        s, t, o = map(l_alpha_beta, images)
        np.testing.assert_allclose(o.mean((0, 1)), t.mean((0, 1)), atol=1e-9)
        np.testing.assert_allclose(o.std((0, 1)), t.std((0, 1)), atol=1e-9)
        np.testing.assert_allclose(*[(x - x.mean((0, 1))) / x.std((0, 1)) for x in (s, o)], atol=1e-8)
    black = augment.reinhard(torch.full((2, 3, 24, 32), -1.0), x_t.float())
    assert torch.isfinite(black).all() and black.abs().max() <= 1


@pytest.mark.parametrize("beta, reach", [(0.0, 0), (0.09, 2), (0.5, 12)])
def test_fda_swaps_the_low_frequencies_amplitudes(beta, reach):
    """Inside of the block the amplitudes are the guide's; all others, and the phases, are the source's."""
    x_s, x_t = smooth(0), smooth(1)
    s, t = (np.fft.fft2(x.numpy() + 1) for x in (x_s, x_t))
    fy, fx = np.fft.fftfreq(24, 1 / 24), np.fft.fftfreq(32, 1 / 32)
    inside = (np.abs(fy)[:, None] <= reach) & (np.abs(fx)[None] <= reach)
    expected = np.fft.ifft2(np.where(inside, np.abs(t), np.abs(s)) * np.exp(1j * np.angle(s))).real - 1
    np.testing.assert_allclose(augment.fda(x_s, x_t, beta).numpy(), expected.clip(-1, 1), atol=1e-9)


def test_images_of_another_tool_train_and_can_be_judged(stage, pipeline, refused, tmp_path, capsys):
    """augment.method=folder takes NAME.png or .jpg, names a missing one, and needs no generator.

    By construction the judge's agreement is 1 on the source's own images; on their negatives it is not.
    """
    args = [*pipeline.args, f"output={tmp_path}", "augment.method=folder", "augment.styles_per_image=1"]
    judge, own = pipeline.folder / "gan/fseg/last.pt", pipeline.root / "carla/CameraRGB"
    stage("augment", *args, f"augment.folder={own}")
    stage("augment", *args, f"augment.folder={own}", "--judge", judge)
    result = json.loads((tmp_path / "run/eval/augmented_folder.json").read_text())
    assert result["agreement"] == 1 and {*result["agreement per class"].values()} == {1.0}
    assert result["images"] == 12
    assert result["style distance"] == pytest.approx(result["style distance of the source"])
    assert "agreement: 1.0" in capsys.readouterr().out
    stage("train_selfens", *args, f"augment.folder={own}", "selfens.variant=tgcf_da", "selfens.steps=1")

    for k, path in enumerate(sorted(own.iterdir())):
        negative = 255 - np.asarray(Image.open(path))
        save_image((tmp_path / "jpg" / path.name).with_suffix(".jpg" if k % 2 else ".png"), negative)
    args += ["name=jpg", f"augment.folder={tmp_path / 'jpg'}"]
    stage("augment", *args)
    stage("augment", *args, "--judge", judge)
    assert json.loads((tmp_path / "jpg/eval/augmented_folder.json").read_text())["agreement"] < 1
    (tmp_path / "jpg/000001.jpg").unlink()
    assert "000001.png: no such image in augment.folder" in refused("augment", *args, "name=fewer")


def test_jitter_repaints_without_a_target(stage, pipeline, tmp_path):
    """The control for all translators: other light and colour, the same for equal seeds, the style unused."""
    args = [*pipeline.args, "augment.method=jitter", "augment.styles_per_image=1"]
    for name in ("a", "b"):
        stage("augment", *args, f"output={tmp_path / name}")
    first, again = (sorted((tmp_path / name).rglob("style0/*.png")) for name in ("a", "b"))
    assert len(first) == 12 and [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    own = Image.open(next((pipeline.root / "carla/CameraRGB").iterdir())).resize((48, 32), Image.BILINEAR)
    assert np.abs(np.asarray(own, int) - np.asarray(Image.open(first[0]))).mean() > 3
