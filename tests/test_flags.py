"""What people type: numbers out of range, paths that mean something else, two runs at once."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_script import ROOT, run
from run_script import start as start_process

import ppo_collect
import ppo_dense
import ppo_resnet_reward
import train_reward_resnet

SCRIPTS = {module.__name__: module for module in (ppo_collect, train_reward_resnet, ppo_dense, ppo_resnet_reward)}
SMALL = ["--num-envs", "4", "--num-eval-envs", "4", "--num-steps", "10", "--num-minibatches", "2", "--num-procs", "1",
         "--num-iterations", "1", "--no-capture-video"]


def numbers(module):
    """(name, int or float) of the flags that are numbers."""
    for field in dataclasses.fields(module.Args):
        kind = next((kind for kind in (int, float) if kind.__name__ in str(field.type)), None)
        if kind:
            yield field.name, kind


def refused(module, monkeypatch, capsys, *flags):
    """The one line with which parse_args() ends the script, exit code 2."""
    monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *flags])
    with pytest.raises(SystemExit) as end:
        module.parse_args()
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("script", SCRIPTS)
def test_numbers_out_of_range(script, monkeypatch, capsys):
    """Every flag that is a number has a range, and neither NaN nor an infinity is in it."""
    module, checked = SCRIPTS[script], 0
    monkeypatch.setattr(module, "SCRIPT", script)
    for name, kind in numbers(module):
        low, high = module.RANGES.get(name, (1, 10**9) if kind is int else (0, 1))
        flag = f"--{name.replace('_', '-')}"
        for value in [low - 1, high + 1] + ["nan", "inf", "-inf"] * (kind is float):
            assert f"{script}: error: {flag} {value}" in refused(module, monkeypatch, capsys, flag, str(value)).replace(
                f"{float(value)}", str(value))
            checked += 1
    assert checked > 40


@pytest.mark.parametrize("script", SCRIPTS)
def test_ranges_are_of_flags_and_hold_the_defaults(script, monkeypatch):
    module = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    module.parse_args()
    assert set(module.RANGES) <= {name for other in SCRIPTS.values() for name, _ in numbers(other)}


@pytest.mark.parametrize("script, flags", [
    ("ppo_dense", ["--seed", "-1"]), ("ppo_collect", ["--learning-rate", "nan"]), ("ppo_dense", ["--learning-rate", "-1"]),
    ("train_reward_resnet", ["--lr", "inf"])])
def test_a_number_out_of_range_is_refused_before_anything_is_done(tmp_path, script, flags):
    _, err = run(script, tmp_path, *flags, code=2)
    assert err.splitlines()[-1].startswith(f"{script}: error: {flags[0]} ") and not list(tmp_path.iterdir())


def test_a_pattern_that_matches_two_runs(tmp_path, monkeypatch, capsys):
    err = refused(ppo_dense, monkeypatch, capsys, "--resume-dir", "logs/1-ppo_dense", "logs/2-ppo_dense", "--evaluate")
    assert "--resume-dir names several: logs/1-ppo_dense, logs/2-ppo_dense; name one" in err
    monkeypatch.setattr(sys, "argv", ["train_reward_resnet.py", "--data-path", "data", "mistakes"])
    assert train_reward_resnet.parse_args().data_path == ("data", "mistakes")


def test_two_runs_of_the_same_second(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_dense.time, "strftime", lambda _: "20260102-030405")
    folders = [ppo_dense.make_run_dir(ppo_dense.Args(log_dir=str(tmp_path))) for _ in range(3)]
    assert [folder.name for folder in folders] == [f"20260102-030405{again}-ppo_dense" for again in ("", "_2", "_3")]
    assert folders == sorted(tmp_path.glob("*-ppo_dense"))


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    """--resume-dir takes a checkpoint's file, --reward-checkpoint and stage 2's --evaluate the folder of a reward model."""
    run("ppo_dense", tmp_path, *SMALL)
    [file] = tmp_path.glob("logs/*-ppo_dense/checkpoints/global_step_1/checkpoint.pt")
    args = ppo_dense.Args(resume_dir=str(file))
    assert ppo_dense.load_checkpoint(args)[1] == file.parents[2]
    model = ppo_resnet_reward.RewardModel("resnet18", 256, 112)
    args = ppo_resnet_reward.Args(image_size=224, meshes="light")
    (tmp_path / "reward_checkpoints").mkdir()
    torch.save(dict(model=model.state_dict(), arch="resnet18", hidden_dim=256, input_size=112,
                    contract=ppo_resnet_reward.make_contract(args)), tmp_path / "reward_checkpoints/best_model.pt")
    for load in (ppo_resnet_reward.load_reward_model, train_reward_resnet.load_reward_model):
        loaded, contract = load(str(tmp_path / "reward_checkpoints"), torch.device("cpu"))
        assert contract["image_size"] == [3, 224, 224] and loaded.input_size == 112
    _, err = run("ppo_resnet_reward", tmp_path, *SMALL, "--resume-dir", str(file), "--reward-checkpoint",
                 "reward_checkpoints")
    assert "without --resume-dir" not in err
    shutil.rmtree(tmp_path / "reward_checkpoints")
    _, err = run("ppo_resnet_reward", tmp_path, *SMALL, "--oracle")
    assert err.count("warning: without --resume-dir the policy starts from nothing") == 1


def test_usable_cores(tmp_path):
    """Affinity, and quotas of cgroup v2 and v1, in the process's own group or one around it."""
    cores = len(os.sched_getaffinity(0))

    def count(group, files):
        root = tmp_path / f"root{len(list(tmp_path.iterdir()))}"
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (tmp_path / "cgroup").write_text(group)
        return ppo_dense.usable_cores(str(tmp_path / "cgroup"), str(root))

    assert count("0::/\n", {}) == cores
    assert count("0::/\n", {"cpu.max": "max 100000\n"}) == cores
    assert count("0::/\n", {"cpu.max": f"{100000 * (cores + 3)} 100000\n"}) == cores
    assert count("0::/\n", {"cpu.max": "150000 100000\n"}) == 1
    assert count("0::/\n", {"cpu.max": "50000 100000\n"}) == 1
    assert count("0::/a.slice/b.scope\n", {"a.slice/cpu.max": "100000 100000\n"}) == 1
    assert count("0::/a.slice/b.scope\n", {"another.slice/cpu.max": "100000 100000\n"}) == cores
    for quota, expected in (("-1", cores), ("100000", 1)):
        v1 = {"cpu/box/cpu.cfs_quota_us": quota, "cpu/box/cpu.cfs_period_us": "100000"}
        assert count("4:cpu,cpuacct:/box\n0::/\n", v1) == expected
    assert ppo_dense.usable_cores(str(tmp_path / "nowhere"), str(tmp_path)) == cores


def test_a_rank_has_sixteen_scenes_or_more(monkeypatch):
    monkeypatch.setattr(ppo_dense, "usable_cores", lambda: 64)
    assert ppo_dense.check_args(ppo_dense.Args(cuda=False, num_envs=256)) == 16
    assert ppo_dense.check_args(ppo_dense.Args(cuda=False)) == 4  # of 64 scenes
    assert ppo_dense.check_args(ppo_dense.Args(cuda=False, num_envs=8)) == 1
    assert ppo_dense.check_args(ppo_dense.Args(cuda=False, num_envs=64, num_procs=64)) == 64


def test_two_runs_at_once(tmp_path, all_cores):
    """Beside a second run, a run keeps a fair part of its speed: waiting threads do not spin for long."""
    def start(name):
        return start_process("ppo_dense", tmp_path, *SMALL, "--num-envs", "32", "--num-steps", "50", "--num-minibatches", "8",
                             "--num-iterations", "3", "--exp-name", name)

    def env_steps_per_s(process):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        return float(err.rpartition(" env steps/s")[0].rpartition(" ")[2])

    alone = env_steps_per_s(start("alone"))
    both = [start("first"), start("second")]
    assert min(map(env_steps_per_s, both)) > 0.25 * alone


def test_set_up_on_python_3_13(tmp_path):
    """The README's two commands find a wheel of everything there: the first leaves ManiSkill, whose mplib has none,
    to the second. Nothing else is installed."""
    python = next(Path.home().glob(".pyenv/versions/3.13.*/bin/python"), None) or shutil.which("python3.13")
    if python is None:
        pytest.skip("this machine has no Python 3.13")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    python, dry = str(tmp_path / "venv/bin/python"), dict(os.environ, PIP_DRY_RUN="1", PIP_NO_DEPS="1")
    first = subprocess.run([python, "-m", "pip", "install", "-q", "--ignore-installed", "--report", tmp_path / "report.json",
                            "-r", ROOT / "requirements.txt"], env=dry)
    names = {package["metadata"]["name"] for package in json.loads((tmp_path / "report.json").read_text())["install"]}
    assert first.returncode == 0 and "torch" in names and "mani_skill" not in names
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "mani_skill"], check=True)
    script = subprocess.run(["bash", ROOT / "tests/install_cpu_renderer.sh", python], env=dry, capture_output=True, text=True)
    assert script.returncode == 2 and "has no sapien" in script.stderr and "No matching" not in script.stderr, script.stderr
