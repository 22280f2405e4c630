"""Config, command line and the rules of the code: what a user gets wrong ends in one line that names it."""

import ast
import io
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ENV, REPO

import runtime
from datasets import class_list
from runtime import UserError, load_config, parse, schema

SOURCES = sorted(REPO.glob("*.py"))
STAGES = ("train_gan", "augment", "train_selfens", "evaluate")
CONFIGS = sorted(REPO.glob("configs/*.yaml"))


def test_cfg_yaml_is_a_whole_schema():
    """A default gives a key its type, and its comment is the only manual: no key may lack them."""
    defaults, rules = schema()
    assert None not in defaults.values() and len(defaults) <= 80
    for line in runtime.SCHEMA.read_text().splitlines():
        if re.match(r" *\w+:", line):
            assert re.search(r"  ?# .{3,}", line), f"no comment: {line}"
    for key, value in defaults.items():  # or the brackets hold a typing error
        assert parse(key, value, "cfg.yaml") == value and key in rules


@pytest.mark.parametrize("path", [runtime.SCHEMA, *CONFIGS], ids=lambda p: p.name)
def test_every_shipped_config_loads(path):
    """A config that the README names has to load, and its two data sets have to share a class list."""
    assert class_list(load_config(path))[1]


BAD = {  # what stands in mine.yaml -> what the one line has to say, as a regular expression
    "gan: {stpes: 3}": "'gan.stpes'; did you mean 'gan.steps'", "nmae: x": "'nmae'; did you mean 'name'",
    "variant: tgcf_da": "'variant'; did you mean 'selfens.variant'", "1: 2": "unknown key '1'",
    "gan: {steps: many}": "'gan.steps' must.* int .*'many'", "gan: {steps: true}": "'gan.steps' must.* int",
    "gan: {steps: null}": "'gan.steps' must.* int", "flip: 1": "'flip' must.* bool",
    "seed: -1": "'seed' must.*0 or more", "gan: {batch: 0}": "'gan.batch' must.*1 or more",
    "gan: {lr_g: .nan}": "'gan.lr_g' must.*0 or more", "gan: {d_layers: 9}": "'gan.d_layers' must.*1 to 8",
    "selfens: {ema_decay: 1.01}": "'selfens.ema_decay' must.*0 to 1", "gan: 3": "'gan'", "gan:": "'gan'",
    "selfens: {variant: tgcf_da_es}": "'selfens.variant' must.* mean tgcf_da_se",
    "source: {size: [96]}": r"'source.size' must.*width\)", "source: {ids: [1]}": "'source.ids' must.* dict",
    "gan: {crop: [64, 4]}": r"'gan.crop' must.*height, width, or \[\]",
    "gan: {crop: 64}": "'gan.crop' must", "gan: {steps: ": "cannot be read as YAML.*line 1",
    "name: !!python/object/apply:os.getcwd []": "cannot be read as YAML", "flip: 1\nflip: 1": "line 2: flip",
}


@pytest.mark.parametrize("text", BAD)
def test_a_wrong_config_is_one_line_that_names_file_and_key(tmp_path, text):
    """A misspelt key that is ignored trains with the default, and a wrong value fails hours later."""
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=BAD[text]) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    """The nearest word wins; and values arrive as people mean them, though YAML 1.1 reads 1e-4 as text."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 5\noutput: ~/runs\ngan: {steps: 7, width: 9, lr_g: 1e-4}\nsource: {root: ~/x}\n")
    cfg = load_config(path, ["gan.width=11", "gan.lr_d=2e-5", "selfens.ema_decay=1", "target.root=~/a b=c"])
    assert (cfg.seed, cfg.gan.steps, cfg.gan.width, cfg.gan.batch) == (5, 7, 11, schema()[0]["gan.batch"])
    assert (cfg.gan.lr_g, cfg.gan.lr_d, cfg.selfens.ema_decay) == (1e-4, 2e-5, 1.0)
    assert type(cfg.selfens.ema_decay) is float and cfg.flat["gan.width"] == 11
    homes = [os.path.expanduser(path) for path in ("~/runs", "~/x", "~/a b=c")]
    assert [cfg.output, cfg.source.root, cfg.target.root] == homes
    for item, words in (("gan.steps=-3", "command line: 'gan.steps' must"), ("name=a/b", "'name'.*letters"),
                        ("gan.crop=[64", "command line: 'gan.crop' must.*'.64'")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            load_config(path, [item])


def test_shipped_files_are_found_from_another_folder(tmp_path, monkeypatch):
    """`python ~/repo/train_gan.py configs/x.yaml` is typed anywhere; an own file of that name wins."""
    def command_line(*argv):
        monkeypatch.setattr(sys, "argv", ["train_gan.py", *argv])
        return runtime.command_line(("--restart", {"action": "store_true"}))

    monkeypatch.chdir(tmp_path)
    assert command_line(f"configs/{CONFIGS[0].name}")[0].flat == load_config(CONFIGS[0]).flat
    assert command_line()[0].flat == schema()[0]
    (tmp_path / "cfg.yaml").write_text("seed: 3")
    cfg, args = command_line("gan.steps=2", "cfg.yaml", "--restart")
    assert (cfg.seed, cfg.gan.steps, args.restart) == (3, 2, True)
    (tmp_path / "a=b.yaml").write_text("seed: 4")
    assert command_line("a=b.yaml")[0].seed == 4
    for argv in (["cfg.yaml", "a=b.yaml"], ["--nonsense"], ["none.yaml"], [str(tmp_path)]):
        with pytest.raises(UserError, match=argv[-1]):
            command_line(*argv)


def bash(script, cwd, **env):
    """Runs a line as a user types it in a shell."""
    return subprocess.run(["bash", "-c", script], cwd=cwd, env=ENV | env, capture_output=True, text=True)


def test_a_wrong_key_is_status_2_and_one_line(tmp_path):
    """As a cron job that knows ASCII alone sees it: the status, one line, nothing written."""
    line = f"PYTHONIOENCODING=ascii {sys.executable} {REPO}/train_gan.py gan.stéps=3"
    result = bash(line, tmp_path, LC_ALL="C.UTF-8")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: command line: unknown key 'gan.st?ps'; did you mean 'gan.steps'?\n"
    assert not [*tmp_path.iterdir()]


def test_help_prints_the_manual_without_torch(tmp_path):
    """--help has to be there at once, with every key, and even where the installation of torch is broken."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    for name in (*STAGES, "check"):
        start = time.monotonic()
        result = bash(f"{sys.executable} {REPO}/{name}.py --help", "/", PYTHONPATH=str(tmp_path))
        assert (result.returncode, result.stderr) == (0, "")
        assert runtime.SCHEMA.read_text() in result.stdout and f"python {name}.py" in result.stdout
        assert time.monotonic() - start < 2


def test_output_survives_ascii_terminals_and_closed_pipes(tmp_path, stage, monkeypatch):
    """A cron job knows ASCII alone and `| head` closes the pipe: neither may end hours of work."""
    result = {"miou": 0.5, "per_class": {"straße": 0.5}, "classes": ["straße"], "split": "val", "model": "",
              "variant": "tgcf_da", "step": 1, "steps": 1, "protocol": "", "config": {}, "confusion": [[1]]}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/x.json").write_text(json.dumps(result))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    runtime.run_main(lambda: stage("evaluate", "--table", tmp_path))
    assert re.search(rb"stra\?e\n.* 50\.00 \?", sys.stdout.buffer.getvalue())
    words = ("check.py --help | head -1", "check.py --help | true", "evaluate.py --table . | true")
    piped = bash("".join(f"{sys.executable} {REPO}/{w}; echo ${{PIPESTATUS[0]}}\n" for w in words), tmp_path)
    assert piped.stderr == "" and piped.stdout.splitlines()[1:] == ["0", "0", "0"]


def test_stages_import_the_four_shared_files_and_nothing_of_each_other():
    """A stage can be read and changed alone; losses can be used anywhere; streets is one data set of many."""
    found, baselines = {}, [*REPO.glob("baselines/*.py")]
    for path in (*SOURCES, *baselines):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        names = {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        names |= {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        found[path.stem] = names & {path.stem for path in SOURCES}
    alone = *STAGES, *(path.stem for path in baselines)
    assert all(found[name] <= {"models", "losses", "datasets", "runtime"} for name in alone), found
    assert not found["losses"] and [name for name in found if "streets" in found[name]] == ["pairs"]


def test_the_code_stays_small():
    """A method that fits on a few pages can be read in one sitting: what this repository is for."""
    code = {path.name: path.read_text() for path in SOURCES}
    wrong = {name: text.count("\n") for name, text in code.items() if text.count("\n") > 500}
    whole, tests = "".join(code.values()), "".join(path.read_text() for path in REPO.glob("tests/*.py"))
    sums = {"lines": whole.count("\n") / 3840, "bytes": len(whole.encode()) / 209_000,
            "lines of tests": tests.count("\n") / 3240}  # fmt: skip
    assert not wrong | {what: f"{part:.1%} of what is allowed" for what, part in sums.items() if part > 1}
