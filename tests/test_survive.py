"""A run that survives: stopped in whatever way, the same command ends with the bits that it would have had.

Here every way once, most of them in this process; tests/survive.py has the long form with real kills by the dozen.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ENV, REPO, make_cfg
from survive import command, outcome, prepare

import augment
import datasets
import runtime
import train_gan
import train_selfens
from runtime import Run, UserError, load_checkpoint

FEW = {"fseg": {"width": 0.03, "steps": 8, "batch": 2, "crop": None},
       "gan": {"steps": 8, "warmup_steps": 2, "batch": 2, "width": 4, "style_dim": 4, "mlp_dim": 8, "res_blocks": 1,
               "d_width": 4, "d_layers": 2, "crop": None},
       "augment": {"batch": 5, "styles_per_image": 1},
       "selfens": {"width": 0.03, "steps": 8, "batch": 2, "aspp_rates": [1, 2], "delta_con": 10.0, "ramp_up": 0.4},
       "sheet_every": 4}  # fmt: skip
PARTS = {"train_gan": ("gan/fseg", "gan"), "augment": ("augmented",), "train_selfens": ("selfens/tgcf_da_se",)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, run folder) of three stages that nobody disturbed."""
    root = tmp_path_factory.mktemp("survive")
    config = prepare(root, **FEW)
    for module in (train_gan, augment, train_selfens):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [module.__name__, str(config)])
            module.main()
    return config, root / "out" / "run"


@pytest.fixture
def fresh(finished, tmp_path):
    """begin(stage): the folder and arguments of a run in which the stages before `stage` are finished, and no other."""
    config, run = finished

    def begin(name):
        for before, parts in PARTS.items():
            if before == name:
                break
            shutil.copytree(run / parts[-1], tmp_path / "run" / parts[-1])
        return tmp_path / "run", [config, f"output={tmp_path}"]

    return begin


def assert_equal(finished, folder: Path, name: str):
    for part in PARTS[name]:
        ours, theirs = outcome(folder / part), outcome(finished[1] / part)
        assert ours.keys() == theirs.keys()
        for file in ours:
            assert ours[file] == theirs[file], f"{part}/{file} differs"


def cut_after(monkeypatch, steps: int):
    """Lets the loop in progress end like a crash after so many steps, checkpoints of every `save_every` steps written."""
    original = Run.progress

    def progress(self, *args, **kwargs):
        for k, item in enumerate(original(self, *args, **kwargs)):
            if k == steps and self.stage != "fseg":
                raise InterruptedError("power cut")
            yield item

    monkeypatch.setattr(Run, "progress", progress)


# ------------------------------------------------------------------------------------------------ signals and locks


@pytest.mark.parametrize("name, number",
                         [("train_selfens", signal.SIGTERM), ("train_gan", signal.SIGINT), ("augment", signal.SIGINT)])
def test_signals_finish_the_step_and_save(finished, fresh, stage, name, number):
    """A pre-empted job has seconds: the step ends, it is saved although no checkpoint is due, and nothing is lost."""
    folder, args = fresh(name)
    process = command(f"{name}.py", *args, "save_every=1000")
    log = folder / PARTS[name][-1] / "log.jsonl"
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 30
    assert process.returncode == 128 + number and "Traceback" not in errors, errors
    if name != "augment":
        done = load_checkpoint(log.parent / "last.pt", "")["step"]
        assert 2 <= done < 8 and done == json.loads(log.read_text().splitlines()[-1])["step"]
    assert "the same command continues" in errors
    stage(name, *args)
    assert_equal(finished, folder, name)


def test_a_signal_outside_of_a_loop_ends_at_once():
    """Reading headers or evaluating may take minutes, and there is nothing to save: the status alone says what happened."""
    code = "import os, runtime, time\nruntime.run_main(lambda: os.kill(os.getpid(), 15) or time.sleep(30))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, env=ENV, capture_output=True, text=True, timeout=60)
    assert result.returncode == 143 and "Traceback" not in result.stderr


def test_one_process_per_folder_and_no_lock_after_a_crash(tmp_path):
    """Two processes would write one log; a lock file that a crash leaves behind would stop the run that should continue."""
    code = f"import runtime, pathlib, time\nruntime.lock_folder(pathlib.Path({str(tmp_path)!r}, 'gan'))\n" \
           "print('held', flush=True)\ntime.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env=ENV, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"gan.*process {holder.pid} "):
        runtime.lock_folder(tmp_path / "gan")
    runtime.lock_folder(tmp_path / "selfens")  # another stage's folder is free
    holder.kill()
    holder.wait()
    runtime.lock_folder(tmp_path / "gan")


# --------------------------------------------------------------------------------------------- checkpoints and logs


@pytest.mark.parametrize("damage", ["cut short", "one bit", "missing", "empty"])
def test_a_torn_checkpoint_is_told_and_the_one_before_it_used(finished, fresh, stage, monkeypatch, capsys, damage):
    """The disk's last minute must not cost the run: one checkpoint back, a warning, and the same bits in the end."""
    folder, args = fresh("train_selfens")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        cut_after(patch, 7)
        stage("train_selfens", *args)
    last = folder / "selfens/tgcf_da_se/last.pt"
    assert load_checkpoint(last, "")["step"] == 6 and load_checkpoint(last.with_name("previous.pt"), "")["step"] == 3
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "missing":
        last.unlink()
    else:
        last.write_bytes({"cut short": data[: len(data) // 2], "one bit": data, "empty": b""}[damage])
    capsys.readouterr()
    if damage != "missing":  # the other stages do not take an earlier state for the finished one
        with pytest.raises(UserError, match="last.pt: torn"):
            stage("evaluate", *args)
    stage("train_selfens", *args)
    warning = capsys.readouterr().err
    assert "warning" in warning and "last.pt" in warning and "step 3" in warning
    if damage != "missing":
        assert last.with_suffix(".torn").exists()
        last.with_suffix(".torn").unlink()
    assert load_checkpoint(last.with_name("previous.pt"), "")["step"] == 6  # never the torn one
    assert_equal(finished, folder, "train_selfens")


def test_two_torn_checkpoints_are_an_error(finished, tmp_path):
    """Beginning anew in silence would throw away days."""
    shutil.copytree(finished[1] / "gan", tmp_path / "gan")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "gan" / name).write_bytes((tmp_path / "gan" / name).read_bytes()[:-500])
    with pytest.raises(UserError, match=r"previous\.pt: torn.*--restart"):
        Run(make_cfg(device="cpu"), "gan", tmp_path / "gan", ("gan",))


def test_no_flipped_bit_goes_unnoticed(finished, tmp_path):
    """torch reads its archives without looking at their checksums: a bit that flips in a weight would train on."""
    good = (finished[1] / "selfens/tgcf_da_se/last.pt").read_bytes()
    (tmp_path / "good.pt").write_bytes(good)
    expected, dice, refused = outcome(tmp_path)["good.pt"], random.Random(0), 0
    (tmp_path / "good.pt").unlink()
    for _ in range(100):
        data = bytearray(good)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        (tmp_path / "x.pt").write_bytes(data)
        try:
            load_checkpoint(tmp_path / "x.pt", "")
        except UserError:
            refused += 1
        else:  # in the padding between records
            assert outcome(tmp_path)["x.pt"] == expected
    assert refused > 80


@pytest.mark.parametrize("change", [
    {"step": "3"}, {"step": float("nan")}, {"step": torch.tensor(3)}, {"step": -3}, {"step": 10**30}, {"config": None},
    {"config": [1]}, {"config": {1: 2}}, {"student": None}, {"student": {"a": 1}}, {"teacher": [torch.zeros(2)]},
    {"optimiser": {}}, {"optimiser": None}, {"data": None}, {"data": {"source train": ["x"] * 9999}}, {"versions": "none"},
    {"config": {"seed": [["x" * 1000] * 1000] * 1000}},
])  # fmt: skip
def test_checkpoints_of_other_content_are_refused_in_one_line(finished, fresh, stage, change, capsys):
    """A file that torch can read need not be one of ours: no traceback, and no page of text either."""
    folder, args = fresh("train_selfens")
    last = folder / "selfens/tgcf_da_se/last.pt"
    last.parent.mkdir(parents=True)
    torch.save(load_checkpoint(finished[1] / "selfens/tgcf_da_se/last.pt", "") | {"step": 3} | change, last)
    if "versions" in change:  # only a remark would have come of it
        stage("train_selfens", *args)
        return
    with pytest.raises(UserError, match=r"last\.pt") as error:
        stage("train_selfens", *args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 3000


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """200 kilobytes that become 200 megabytes, or gigabytes: ours are stored as they are."""
    torch.save({"step": 1, "config": {}, "x": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, \
            zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert load_checkpoint(tmp_path / "plain.pt", "")["step"] == 1
    with pytest.raises(UserError, match=r"small\.pt: torn or damaged"):
        load_checkpoint(tmp_path / "small.pt", "")


def test_checkpoints_hold_what_a_run_depends_on(finished):
    """Networks, optimiser, step, config, data and versions; learning rates and random draws are functions of the step."""
    for part, nets in (("gan/fseg", ["f_seg", "optimiser"]), ("gan", ["G", "D", "opt_g", "opt_d"]),
                       ("selfens/tgcf_da_se", ["student", "teacher", "optimiser"])):  # fmt: skip
        state = load_checkpoint(finished[1] / part / "last.pt", "", tuple(nets))
        assert state["step"] == 8 and state["config"]["seed"] == 0 and state["versions"]["torch"] == str(torch.__version__)
        assert state["data"]["source train"].startswith("60 samples ")
        assert zipfile.ZipFile(finished[1] / part / "last.pt").testzip() is None
    assert state["data"].keys() == {"source train", "target train", "augmented"}


def test_logs_hold_every_step_once(finished, fresh, stage, monkeypatch):
    """Two interruptions, one of them after steps that no checkpoint holds, and a log line that was torn."""
    folder, args = fresh("train_selfens")
    for steps in (5, 3):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            cut_after(patch, steps)
            stage("train_selfens", *args)
        with open(folder / "selfens/tgcf_da_se/log.jsonl", "a") as log:
            log.write('{"step": 7, "L": 0.3')
    stage("train_selfens", *args)
    steps = [json.loads(line)["step"] for line in (folder / "selfens/tgcf_da_se/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))
    assert_equal(finished, folder, "train_selfens")


def test_what_a_killed_writer_left_is_removed(finished, fresh, stage):
    """A temporary file may be as large as a checkpoint: a run that is killed often must not fill the disk with them."""
    folder, args = fresh("augment")
    litter = folder / "augmented/style0/.000000.png.123.tmp"
    litter.parent.mkdir(parents=True)
    litter.write_bytes(b"half a picture")
    stage("augment", *args)
    assert not litter.exists()
    assert_equal(finished, folder, "augment")


# ------------------------------------------------------------------------------------------- what may change, and what not


def test_workers_change_nothing(finished, fresh, stage):
    """Draws are a function of (seed, stage, step, sample), not of the process that makes them."""
    for workers in (1, 3):
        folder, args = fresh("train_selfens")
        stage("train_selfens", *args, f"workers={workers}")
        assert_equal(finished, folder, "train_selfens")
        shutil.rmtree(folder)


@pytest.mark.parametrize("name, items", [
    ("train_gan", ["fseg.steps=2", "gan.schedule=constant", "gan.steps={}"]),
    ("train_selfens", ["selfens.variant=source_only", "selfens.schedule=constant", "selfens.steps={}"]),
])  # fmt: skip
def test_steps_may_be_raised_where_the_schedule_allows_it(fresh, stage, tmp_path, name, items):
    """With a constant learning rate 3 steps and 3 more are 6 steps; with a falling one they are not, and are refused."""
    folder, args = fresh("train_gan")  # neither reads what another stage has made
    part = PARTS[name][-1].replace("tgcf_da_se", "source_only")
    for run, counts in (("once", [6]), ("raised", [3, 6])):
        for steps in counts:
            stage(name, *args, f"name={run}", "sheet_every=3", *(item.format(steps) for item in items))
    once, raised = (outcome(tmp_path / run / part) for run in ("once", "raised"))
    for both in (once, raised):  # the one that was raised records its new config as well
        both["last.pt"].pop("config")
    assert once == raised
    with pytest.raises(UserError, match=r"steps \(6 then, 4 now\)"):
        stage(name, *args, "name=once", *(item.format(4) for item in items))
    falling = [item.replace("=constant", "=linear") for item in items]
    stage(name, *args, "name=falling", *(item.format(3) for item in falling))
    with pytest.raises(UserError, match=r"steps \(3 then, 6 now\)"):
        stage(name, *args, "name=falling", *(item.format(6) for item in falling))


def test_ramp_up_ties_the_steps():
    """delta_con rises over a part of the steps: with L_con, a constant learning rate alone does not allow more of them."""
    flat = make_cfg(selfens__schedule="constant").flat
    for variant, ramp_up, allowed in (("tgcf_da_se", 0.5, False), ("tgcf_da_se", 0.0, True), ("tgcf_da", 0.5, True)):
        then = flat | {"selfens.variant": variant, "selfens.ramp_up": ramp_up}
        now = then | {"selfens.steps": flat["selfens.steps"] + 1}
        if allowed:
            runtime.refuse_changes(then, now, "x", "selfens")
        else:
            with pytest.raises(UserError, match="selfens.steps"):
                runtime.refuse_changes(then, now, "x", "selfens")


def test_other_data_are_refused_and_moved_data_are_not(finished, fresh, stage, monkeypatch, tmp_path):
    """With one image more every later draw is another; a copy of the data on a faster disk is the same data."""
    folder, args = fresh("train_selfens")
    root = finished[0].parent
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        cut_after(patch, 4)
        stage("train_selfens", *args)
    for part in ("carla", "camvid"):
        shutil.copytree(root / part, tmp_path / part)
    moved = [f"source.root={tmp_path / 'carla'}", f"target.root={tmp_path / 'camvid'}"]
    victim = tmp_path / "camvid/train/f003.jpg"
    data = victim.read_bytes()
    victim.unlink()
    with pytest.raises(UserError, match=r"other data: target train was 30 samples .*, is 29 samples"):
        stage("train_selfens", *args, *moved)
    victim.write_bytes(data)
    stage("train_selfens", *args, *moved)
    assert_equal(finished, folder, "train_selfens")


def test_other_libraries_are_told(finished, fresh, stage, monkeypatch, capsys):
    """A new torch may round otherwise: the run goes on, and says so."""
    folder, args = fresh("train_selfens")
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        cut_after(patch, 4)
        patch.setattr(runtime, "versions", lambda: {"torch": "0.4.1"})
        stage("train_selfens", *args)
    capsys.readouterr()
    stage("train_selfens", *args)
    assert "torch 0.4.1 then" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name, limit", [("train_gan", 30_000), ("train_gan", 2_000), ("augment", 1_000), ("augment", 300),
                                         ("train_selfens", 60_000), ("train_selfens", 4_000)])  # fmt: skip
def test_a_full_disk_stops_with_one_line_and_loses_nothing(finished, fresh, stage, name, limit):
    """A limit on the size of a file stands for the disk: checkpoint, log, events or image, whichever meets it first."""
    folder, args = fresh(name)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises((UserError, OSError)) as error:
            stage(name, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert isinstance(error.value, UserError) and "cannot be written" in str(error.value) and "\n" not in str(error.value)
    for path in folder.rglob("*.pt"):
        load_checkpoint(path, "")
    stage(name, *args)
    assert_equal(finished, folder, name)


def test_a_full_disk_under_the_log_is_one_line(tmp_path):
    """The log is the one file that is appended to: /dev/full is a disk without room for one line."""
    run = Run(make_cfg(device="cpu", output=str(tmp_path)), "gan", tmp_path / "gan", ("gan",))
    list(run.progress((), 0, "title"))
    run._log = open("/dev/full", "w")
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written \(No space left"):
        run.log(1, L=0.5)
    with contextlib.suppress(OSError):  # it tries to write what is buffered once more
        run._log.close()


def test_a_non_finite_loss_keeps_the_state_before_it(finished, fresh, stage):
    """What led to a NaN is gone with the next update: the networks before it and the batch must be there to look at."""
    folder, args = fresh("train_selfens")
    args = [*args, "selfens.variant=self_ensembling", "selfens.lr=1e30", "save_every=1000", "log_every=1000"]
    with pytest.raises(UserError, match=r"selfens: L_sup is (nan|inf) at step (\d).*non-finite\.pt") as error:
        stage("train_selfens", *args)
    step = int(str(error.value).split("at step ")[1].split(";")[0])
    kept = torch.load(folder / "selfens/self_ensembling/non-finite.pt", weights_only=True)
    assert kept["step"] == step - 1 and kept["term"] == "L_sup" and {"x_s", "y_s", "x_t"} == kept["batch"].keys()
    assert not (folder / "selfens/self_ensembling/last.pt").exists()  # save_every was not reached
    net = train_selfens.build_segmenter(make_cfg(selfens__width=0.03, selfens__aspp_rates=[1, 2]), 10).train()
    net.load_state_dict(kept["student"])
    assert not torch.isfinite(net(datasets.to_float(kept["batch"]["x_s"], "cpu"))).all()


@pytest.mark.parametrize("name, workers", [("train_selfens", 0), ("train_selfens", 2), ("train_gan", 0), ("augment", 0)])
def test_an_image_that_breaks_in_mid_run(finished, fresh, stage, monkeypatch, tmp_path, name, workers):
    """The night's work up to it is saved, the file named; once it is mended the run goes on to the same bits."""
    folder, args = fresh(name)
    shutil.copytree(finished[0].parent / "carla", tmp_path / "carla")
    args = [*args, f"source.root={tmp_path / 'carla'}", f"workers={workers}"]
    monkeypatch.setattr(datasets, "CACHE_BYTES", 0)  # or these few images would all have been read before the first step
    victims, original = {}, Run.progress

    def progress(self, *args, **kwargs):
        for step, item in original(self, *args, **kwargs):
            yield step, item
            if step == 2 and self.stage != "fseg" and not victims:
                for path in (tmp_path / "carla/CameraRGB").iterdir():
                    victims[path] = path.read_bytes()
                    path.write_bytes(victims[path][:60])

    monkeypatch.setattr(Run, "progress", progress)
    with pytest.raises(UserError, match=r"CameraRGB/\d+\.png: not a readable image"):
        stage(name, *args, "save_every=1000")
    for path, data in victims.items():
        path.write_bytes(data)
    if name != "augment":
        step = load_checkpoint(folder / PARTS[name][-1] / "last.pt", "")["step"]
        assert 2 <= step < 8  # a few batches had been read ahead
    stage(name, *args)
    assert_equal(finished, folder, name)


def test_a_reading_process_that_dies_is_one_line(finished, fresh, stage, monkeypatch, capsys):
    """The kernel's out-of-memory killer takes a worker first; the run must say so and keep its steps."""
    folder, args = fresh("train_selfens")
    original = datasets.Batches.__getitem__

    def deadly(self, step):
        if step == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(datasets.Batches, "__getitem__", deadly)
        patch.setattr(runtime.SIGNALS, "install", lambda: None)
        runtime.run_main(lambda: stage("train_selfens", *args, "workers=1"))
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "a process that reads images died" in errors[0] and "workers" in errors[0]
    stage("train_selfens", *args, "workers=1")
    assert_equal(finished, folder, "train_selfens")
