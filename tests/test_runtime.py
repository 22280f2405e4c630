"""Configuration, seeding, checkpoints and the run folder: whatever a user gets wrong ends in one line that names it."""

import json
import os

import numpy as np
import pytest
import torch
import yaml
from conftest import REPO, make_cfg, shell
from PIL import Image

import runtime
from runtime import KEYS, Run, UserError, load_config

FILES = [REPO / "cfg.yaml", *sorted((REPO / "configs").glob("*.yaml"))]


def written(tmp_path, text, name="mine.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# ---------------------------------------------------------------------------------------------------- config files


def test_cfg_yaml_is_the_key_table_written_out():
    """cfg.yaml is the manual of the keys: every key, its default, its meaning and its range, and nothing else."""
    text = FILES[0].read_text()
    tree, flat = yaml.safe_load(text), {}
    for key, value in tree.items():
        flat |= {f"{key}.{leaf}": v for leaf, v in value.items()} if isinstance(value, dict) else {key: value}
    assert list(flat) == list(KEYS)
    section, described = "", set()
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if not colon or line.startswith("#"):
            continue
        if not rest.strip():
            section = name
            continue
        key = f"{section}.{name.strip()}" if line.startswith(" ") else name
        assert KEYS[key].help in rest and f"({KEYS[key].range()})" in rest, line
        described.add(key)
    assert described == set(KEYS)
    assert load_config(str(FILES[0])).flat == load_config(None).flat


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_config_loads_and_comments_every_key(path):
    """A config that is shipped has to load, and to say why each value is what it is."""
    load_config(str(path))
    for line in path.read_text().splitlines():
        if line.partition("#")[0].partition(":")[2].strip():
            assert len(line.partition("#")[2].strip()) > 3, f"no comment: {line}"


def test_precedence_default_file_override(tmp_path):
    """The nearest word wins: command line over file over default."""
    path = written(tmp_path, "seed: 5\ngan:\n  steps: 7\n  width: 9\n")
    cfg = load_config(path, ["gan.width=11", "name=x"])
    assert (cfg.seed, cfg.gan.steps, cfg.gan.width, cfg.name, cfg.gan.batch) == (5, 7, 11, "x", KEYS["gan.batch"].default)
    assert cfg.flat["gan.width"] == 11


@pytest.mark.parametrize("item, expected", [
    ("gan.lr_g=1e-4", 1e-4), ("gan.lr_g=0", 0.0), ("gan.crop=[64, 32]", [64, 32]), ("gan.crop=null", None),
    ("flip=false", False), ("selfens.ema_decay=1", 1.0),
    ("target.root=/a b=c", "/a b=c"), ("device=cuda:1", "cuda:1"), ("source.images=null", None),
])  # fmt: skip
def test_values_arrive_in_their_own_type(item, expected):
    """YAML 1.1 reads 1e-4 as text, and a whole number is a fine float: both must do what people mean."""
    value = load_config(None, [item]).flat[item.partition("=")[0]]
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("item, range_", [
    ("gan.steps=many", "whole number"), ("gan.steps=1.5", "whole number"), ("gan.steps=true", "whole number"),
    ("gan.steps='3'", "whole number"), ("seed=-1", "whole number, 0 to"), ("gan.batch=0", "1 to 4096"),
    ("gan.lr_g=-1", "0 or more"), ("gan.lr_g=.nan", "number"), ("gan.lr_g=nan", "number"), ("gan.lr_g=.inf", "number"),
    ("gan.lr_g=inf", "number"), ("gan.lr_g=1e999", "number"), ("gan.lr_g=true", "number"), ("gan.lr_g=null", "number"),
    ("gan.lr_g=[1]", "number"), ("selfens.ema_decay=1.01", "0 to 1"), ("flip=1", "true | false"), ("flip='no'", "true | false"),
    ("precision=float16", "float32 | bfloat16"), ("selfens.variant=se", "source_only |"), ("gan.crop=64", "[height, width]"),
    ("gan.crop=[64]", "[height, width]"), ("gan.crop=[64, 4]", "[height, width]"), ("gan.crop=[64, true]", "[height, width]"),
    ("source.size=null", "[height, width]"), ("selfens.aspp_rates=[]", "list of whole numbers"),
    ("name=a/b", "letters, digits"), ("name=..", "letters, digits"), ("name=null", "letters, digits"),
    ("output=3", "text"), ("device=tpu", "cpu"),
    ("gan.lr_g=" + "9" * 400, "number"),
    ("gan.steps=1000000001", "0 to 10^9"), ("gan.steps=0x" + "f" * 5000, "0 to 10^9"),
    ("seed=" + "1:" * 300 + "1", "whole number"),
    ("source.size=[8, 16385]", "each 8 to 16384"), ("selfens.aspp_rates=[" + "1," * 65 + "]", "more than 64"),
    ("output=" + "a" * 256, "255 between"), ("output=" + "a/" * 600, "1024 bytes"), ('output="\\ud800"', "surrogate"),
    ("device=cuda:\u0663", "cuda:N"), ("device=cuda:100", "cuda:N"), ("name=" + "a" * 201, "letters, digits"),
    ("source.exclude=[2020-99-99, 1:2, {a: b}]", "list of texts"), ("source.ids={a: [[[1]]]}", "mapping of names"),
])  # fmt: skip
def test_wrong_values_name_the_key_and_its_range(item, range_):
    """NaN passes every comparison and true is an int in Python: each wrong value must be told with what is right."""
    with pytest.raises(UserError) as error:
        load_config(None, [item])
    assert f"'{item.partition('=')[0]}'" in str(error.value) and range_ in str(error.value)


def test_wrong_value_in_a_file_names_the_file(tmp_path):
    """With several configs about, the key alone is not enough."""
    with pytest.raises(UserError, match=r"mine\.yaml.*'gan\.steps'"):
        load_config(written(tmp_path, "gan:\n  steps: -3\n"))


@pytest.mark.parametrize("key, nearest", [("gan.stepz", "gan.steps"), ("gan.lamda_sem", "gan.lambda_sem"), ("nmae", "name"),
                                          ("variant", "selfens.variant")])  # fmt: skip
def test_unknown_key_names_the_nearest(tmp_path, key, nearest):
    """A misspelt key that is ignored trains with the default: the worst error there is."""
    with pytest.raises(UserError) as error:
        load_config(None, [f"{key}=3"])
    assert "command line" in str(error.value) and repr(key) in str(error.value) and repr(nearest) in str(error.value)
    head, _, leaf = key.rpartition(".")
    with pytest.raises(UserError) as error:
        load_config(written(tmp_path, f"{head}:\n  {leaf}: 3\n" if head else f"{leaf}: 3\n"))
    assert "mine.yaml" in str(error.value) and repr(key) in str(error.value) and repr(nearest) in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("seed: 1\nseed: 2\n", ["'seed' stands twice"]), ("gan:\n  steps: 1\n  steps: 2\n", ["'gan.steps' stands twice"]),
    ("- seed\n- 1\n", ["list"]), ("seed", ["str"]), ("gan: 3\n", ["'gan'", "section"]), ("gan:\n", ["'gan'", "section"]),
    ("seed: [1\n", ["not valid YAML"]), ("name: !!python/object/apply:os.getcwd []\n", ["not valid YAML"]),
    ("? [a]\n: 1\n", ["not valid YAML"]), ("seed:\n  steps: 1\n", ["'seed'"]), ("a: &a [*a]\n", ["mine.yaml"]),
    ("seed: 2020-99-99\n", ["mine.yaml"]), ("1: 2\n", ["unknown key '1'"]), ("seed: \0\n", ["mine.yaml"]),
])  # fmt: skip
def test_malformed_files_are_refused_in_one_line(tmp_path, text, words):
    """A key written twice, a section without keys, text that would build objects: an error, never a guess."""
    with pytest.raises(UserError) as error:
        load_config(written(tmp_path, text))
    assert all(word in str(error.value) for word in [*words, "mine.yaml"]) and "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    """A wrong path, a folder, and a file that is no text."""
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    for name in ("none.yaml", "binary.yaml", ""):
        with pytest.raises(UserError, match=name or tmp_path.name):
            load_config(str(tmp_path / name))
    assert load_config(written(tmp_path, "# nothing\n")).flat == load_config(None).flat


def test_command_line_takes_one_config_and_overrides(tmp_path):
    """File, overrides and options in any order; two files or an unknown option are errors."""
    path = written(tmp_path, "seed: 3\n")
    cfg, args = runtime.command_line("doc", ("",), lambda p: p.add_argument("--restart", action="store_true"),
                                     ["gan.steps=2", path, "--restart", "name=x"])
    assert (cfg.seed, cfg.gan.steps, cfg.name, args.restart) == (3, 2, "x", True)
    for argv in ([path, path], ["--nonsense"]):
        with pytest.raises(UserError, match="command line"):
            runtime.command_line("doc", ("",), None, argv)


def test_user_error_is_one_line_and_status_2(tmp_path):
    """Seen from the shell: status 2, one line on standard error, no traceback, nothing on standard output."""
    result = shell(REPO / "train_gan.py", written(tmp_path, "{}"), "gan.stepz=3")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and "Traceback" not in result.stderr
    assert "gan.stepz" in result.stderr and "gan.steps" in result.stderr


# ------------------------------------------------------------------------------------------------------ randomness


def test_random_draws_are_a_function_of_the_key():
    """Nothing but the key decides a draw: no global state, no order, no process (the hash is not Python's own)."""
    first = runtime.random_generator(0, "gan", 5).random(4)
    np.random.default_rng(1).random()
    torch.rand(1)
    assert (runtime.random_generator(0, "gan", 5).random(4) == first).all()
    assert runtime.key_seed(0, "gan", 5) == 30761868602944000  # published runs stay repeatable
    keys = [(0, "gan", 5), (1, "gan", 5), (0, "fseg", 5), (0, "gan", 6), (0, "gan", "5"), (0, "gan5"), (0, "gan", 5, 0)]
    assert len({runtime.key_seed(*key) for key in keys}) == len(keys)
    assert len({float(runtime.random_generator(*key).random()) for key in keys}) == len(keys)


def test_seed_torch_is_a_function_of_the_key():
    """Dropout and noise of a step do not depend on how many numbers were drawn before it."""
    runtime.seed_torch(0, "selfens", 3)
    first = torch.rand(3)
    torch.rand(100)
    runtime.seed_torch(0, "selfens", 3)
    assert torch.equal(torch.rand(3), first)
    runtime.seed_torch(0, "selfens", 4)
    assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("schedule, factors",
                         [("poly", [1, 0.5**0.9, 0.01**0.9]), ("linear", [1, 1, 0.02]), ("constant", [1, 1, 1])])
def test_schedules(schedule, factors):
    """The first step has the whole rate, the last one is above 0; a run that resumes knows its rate from its step."""
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 99.0)
    rates = []
    for step in (1, 51, 100):
        runtime.set_lr(optimiser, 0.2, schedule, step, 100)
        rates.append(optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2 * f for f in factors])


# ----------------------------------------------------------------------------------------------------------- files


def test_atomic_write_is_all_or_nothing(tmp_path):
    """A crash while writing must leave the last good checkpoint, and no litter."""
    path = tmp_path / "last.pt"
    runtime.atomic_write(path, lambda file: file.write(b"good"))

    def torn(file):
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        runtime.atomic_write(path, torn)
    assert path.read_bytes() == b"good"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    with pytest.raises(UserError, match="last.pt"):
        runtime.atomic_write(path / "below a file", lambda file: file.write(b""))


class Evil:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_checkpoints_run_no_code_and_errors_name_the_file(tmp_path):
    """Checkpoints get passed around: one that holds code is refused, like a torn, a foreign or a missing one."""
    torch.save({"step": 1, "x": Evil(tmp_path / "touched")}, tmp_path / "evil.pt")
    torch.save({"step": 1, "config": {}, "x": torch.zeros(1000)}, tmp_path / "good.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:2000])
    (tmp_path / "empty.pt").touch()
    for name in ("evil.pt", "torn.pt", "empty.pt", "missing.pt"):
        with pytest.raises(UserError, match=f"{name}.*do this"):
            runtime.load_checkpoint(tmp_path / name, "do this")
    assert not (tmp_path / "touched").exists()
    assert runtime.load_checkpoint(tmp_path / "good.pt", "")["step"] == 1


def test_weights_digest_sees_values_and_names():
    """It tells one generator's images from another's, so one changed bit or a swapped name must change it."""
    state = {"a": torch.zeros(3), "b": torch.zeros(3, 2)}
    same = {"b": torch.zeros(3, 2), "a": torch.zeros(3)}
    assert runtime.weights_digest(state) == runtime.weights_digest(same)
    changed = [{**state, "a": torch.tensor([0, 0, 1e-30])}, {"c": state["a"], "b": state["b"]}]
    assert len({runtime.weights_digest(s) for s in [state, *changed]}) == 3


# ------------------------------------------------------------------------------------------------------------- Run


def make_run(tmp_path, **overrides):
    cfg = make_cfg(output=str(tmp_path), name="n", device="cpu", precision="float32", **overrides)
    return Run(cfg, "stage", tmp_path / "n" / "stage", ("", "gan"))


def log_lines(run):
    return [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]


def test_run_folder_says_how_the_result_came_about(tmp_path):
    """The effective config loads back as it was, and commit, versions, device and command stand beside it."""
    run = make_run(tmp_path, gan__steps=7, gan__crop=[16, 24], target__root="/a b/c")
    list(run.progress((), 0, "title"))
    run.close()
    assert load_config(str(run.folder / "config.yaml")).flat == run.cfg.flat
    info = json.loads((run.folder / "run-0000000.json").read_text())
    assert {"commit", "dirty", "command", "time"} <= set(info)
    assert info["torch"] == str(torch.__version__) and info["numpy"] == np.__version__
    assert info["device"].startswith("cpu") and info["precision"] == "float32"


def test_config_yaml_survives_texts_that_yaml_would_read_otherwise(tmp_path):
    """Free text such as a folder called 3, on or '# x' must load back as the text it is."""
    for text in ("3", "on", "null", "# x", "a # b", "'", "[a", "1e3", "é", "a\nb", "\U0001f600", "a\x7f\u2028b"):
        flat = make_cfg(source__root=text, name="on").flat
        path = written(tmp_path, runtime.describe(flat))
        assert load_config(path).flat == flat, text


def test_another_config_in_the_same_folder_is_refused(tmp_path):
    """A run continued under another config is neither; keys that change nothing may change."""
    run = make_run(tmp_path, gan__steps=7)
    list(run.progress((), 2, "title"))
    run.save(2)
    run.close()
    with pytest.raises(UserError, match=r"gan\.steps \(7 then, 8 now\)"):
        make_run(tmp_path, gan__steps=8)
    again = make_run(tmp_path, gan__steps=7, log_every=3, workers=1, fseg__lr=0.5)  # fseg is not of this stage
    assert again.start == 2


def test_resumed_log_drops_what_will_be_computed_again(tmp_path):
    """Steps after the checkpoint are run again: kept lines would stand twice, and a torn line would break readers."""
    run = make_run(tmp_path)
    for step, _ in run.progress(range(5), 5, "title"):
        run.log(step, L=step / 2)
        if step == 3:
            run.save(step)
    run.close()
    assert [line["step"] for line in log_lines(run)] == [1, 2, 3, 4, 5]
    with open(run.folder / "log.jsonl", "a") as file:
        file.write('{"step": 6, "L"')
    again = make_run(tmp_path)
    assert again.start == 3
    steps = [step for step, _ in again.progress(range(again.start, 5), 5, "title")]
    again.log(4, L=0.25)
    again.close()
    assert steps == [4, 5]
    assert log_lines(again) == [{"step": k, "L": k / 2} for k in (1, 2, 3)] + [{"step": 4, "L": 0.25}]


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(float("inf"))])
def test_non_finite_scalar_stops_the_run(tmp_path, value):
    """Training on after a NaN wastes the night: the error names the term and the step."""
    run = make_run(tmp_path)
    list(run.progress(range(1), 1, "title"))
    with pytest.raises(UserError, match=r"L_con.*step 17"):
        run.log(17, L_sup=1.0, L_con=value)
    run.close()


@pytest.mark.parametrize("what, due", [("sheet", [3, 6, 7]), ("save", [5, 7]), ("log", [2, 4, 6, 7])])
def test_due(tmp_path, what, due):
    """The last step always logs, draws and saves, and the three cadences do not touch each other."""
    run = make_run(tmp_path, log_every=2, sheet_every=3, save_every=5)
    assert [step for step in range(1, 8) if run.due(what, step, 7)] == due


def test_restart_keeps_the_old_folder(tmp_path):
    """--restart must never destroy results."""
    run = make_run(tmp_path)
    list(run.progress((), 2, "title"))
    run.save(2)
    run.close()
    again = Run(run.cfg, "stage", run.folder, ("", "gan"), restart=True)
    assert again.start == 0 and not (run.folder / "last.pt").exists()
    assert len(list(run.folder.parent.glob("stage.*/last.pt"))) == 1


def test_device_and_precision_errors():
    """A device that is not there is told in one line, not by CUDA."""
    with pytest.raises(UserError, match="device=cuda:99"):
        runtime.get_device(make_cfg(device="cuda:99"))
    assert runtime.get_precision(make_cfg(precision="float32"), torch.device("cpu")) == "float32"


def test_sheet_holds_every_picture_in_its_cell():
    """Sheets are what people look at: pictures of other sizes are fitted, none is cut or lost."""
    red, green = np.zeros((60, 200, 3), np.uint8), np.zeros((30, 100, 3), np.uint8)
    red[..., 0] = green[..., 1] = 255
    sheet = np.asarray(runtime.make_sheet(["a", "b"], [[red, green], [green, red]]))
    cells = [sheet[16 + r * 64 : 76 + r * 64, c * 204 : c * 204 + 200] for r in (0, 1) for c in (0, 1)]
    assert [cell.reshape(-1, 3).min(0).tolist() for cell in cells] == [[255, 0, 0], [0, 255, 0], [0, 255, 0], [255, 0, 0]]
    assert isinstance(runtime.make_sheet(["a"], [[red]]), Image.Image)
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0]).expand(3, 1, 4)
    assert runtime.to_uint8(x)[0, :, 0].tolist() == [0, 0, 128, 255]
