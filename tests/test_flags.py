"""What people type: numbers out of range, paths that mean something else, two runs at once."""
import dataclasses
import itertools
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
from test_resnet_reward import random_reward_model

import ppo_collect
import ppo_dense
import ppo_resnet_reward
import train_reward_resnet

SCRIPTS = {module.__name__: module for module in (ppo_collect, train_reward_resnet, ppo_dense, ppo_resnet_reward)}
SMALL = ["--num-envs", "4", "--num-eval-envs", "4", "--num-steps", "10", "--num-minibatches", "2", "--num-procs", "1",
         "--num-iterations", "1", "--no-capture-video"]


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
    """Every number is finite and not negative, every count at least 1, every share at most 1; defaults are."""
    module, checked = SCRIPTS[script], 0
    monkeypatch.setattr(module, "SCRIPT", script)
    for field in dataclasses.fields(module.Args):
        low = 1 if field.type is int and field.name not in ("seed", "critic_warmup") else 0
        high = 1 if field.type is module.Share else 10**9
        flag = f"--{field.name.replace('_', '-')}"
        wrong = [low - 1, high + 1] + ["nan", "inf", "-inf"] * (field.type is not int)
        for value in wrong if field.type in (int, float, module.Share) else ():
            err = refused(module, monkeypatch, capsys, flag, str(value))
            assert f"{script}: error: {flag} {value}" in err.replace(f"{float(value)}", str(value))
            checked += 1
    assert checked > 30
    monkeypatch.setattr(sys, "argv", [f"{script}.py"])
    module.parse_args()


@pytest.mark.parametrize("script, flags", [
    ("ppo_dense", ["--seed", "-1"]), ("ppo_collect", ["--learning-rate", "nan"]), ("ppo_dense", ["--learning-rate", "-1"]),
    ("train_reward_resnet", ["--lr", "inf"])])
def test_a_number_out_of_range_is_refused_before_anything_is_done(tmp_path, script, flags):
    _, err = run(script, tmp_path, *flags, code=2)
    assert err.splitlines()[-1].startswith(f"{script}: error: {flags[0]} ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ppo_dense", "my_ppo2", "step_3"])
def test_a_pattern_that_matches_several_runs(tmp_path, capsys, name):
    """The newest that holds a checkpoint is taken, by timestamp and step, and said in one line; also of somebody's copy."""
    content = torch.load(ROOT / "tests/policy.pt", weights_only=True)
    for run_dir, steps in ((f"20260102-230405-000001-{name}", (20, 100)), (f"20260103-030406-000001-{name}", (9, 10)),
                           (f"20260103-030407-000001-{name}", ())):
        for step in steps:
            (tmp_path / run_dir / f"checkpoints/global_step_{step}").mkdir(parents=True)
            torch.save(content | dict(global_step=step), tmp_path / run_dir / f"checkpoints/global_step_{step}/checkpoint.pt")
        (tmp_path / run_dir).mkdir(exist_ok=True)
    args = ppo_dense.Args(resume_dir=tuple(map(str, sorted(tmp_path.iterdir()))))
    assert ppo_dense.load_checkpoint(args)["global_step"] == 10
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and f"20260103-030406-000001-{name}/checkpoints/global_step_10/checkpoint.pt" in out
    args.resume_dir = (str(tmp_path / f"20260102-230405-000001-{name}"),)
    assert ppo_dense.load_checkpoint(args)["global_step"] == 100


def test_runs_of_the_same_second(tmp_path):
    folders = [ppo_dense.make_run_dir(ppo_dense.Args(log_dir=str(tmp_path)))[0] for _ in range(5)]
    assert len(set(folders)) == 5 and folders == sorted(tmp_path.glob("*-ppo_dense"))


def test_a_file_for_a_folder_and_a_folder_for_a_file(tmp_path):
    """--resume-dir takes a checkpoint's file, --reward-checkpoint and stage 2's --evaluate the folder of a reward model."""
    run("ppo_dense", tmp_path, *SMALL)
    [file] = tmp_path.glob("logs/*-ppo_dense/checkpoints/global_step_1/checkpoint.pt")
    assert ppo_dense.load_checkpoint(ppo_dense.Args(resume_dir=(str(file),)))["global_step"] == 1
    (tmp_path / "reward_checkpoints").mkdir()
    random_reward_model(tmp_path / "reward_checkpoints/best_model.pt")
    for load in (ppo_resnet_reward.load_reward_model, train_reward_resnet.load_reward_model):
        loaded, contract = load(str(tmp_path / "reward_checkpoints"), torch.device("cpu"))
        assert contract["width"] == 224 and loaded.input_size == 64
    out, _ = run("ppo_resnet_reward", tmp_path, *SMALL, "--resume-dir", file, "--reward-checkpoint", "reward_checkpoints")
    assert "without --resume-dir" not in out
    out, _ = run("ppo_resnet_reward", tmp_path, *SMALL, "--reward-checkpoint", "reward_checkpoints")
    assert out.count("warning: without --resume-dir the policy") == 1


@pytest.mark.parametrize("script", ["ppo_collect", "ppo_dense", "ppo_resnet_reward"])
def test_no_two_seeds_or_ranks_see_the_same_scenes(tmp_path, monkeypatch, script):
    """Nor does a run that goes on: with 2 seeds, 2 ranks and 2 global steps, 8 different first observations."""
    module, seen = SCRIPTS[script], []

    class Seen(Exception):
        pass

    class Envs(module.ManiSkillEnvs):
        def reset(self, seed=None, options=None):
            obs, info = super().reset(seed, options)
            if seed not in (None, 0, 1_000_000, 1_000_001):  # not the trial's, nor an evaluation's
                seen.append(obs)
                raise Seen
            return obs, info

    monkeypatch.setattr(module, "ManiSkillEnvs", Envs)
    monkeypatch.setattr(module, "sum_over_ranks", lambda sums: sums)
    if script == "ppo_collect":  # what rank 0 says of an empty folder
        monkeypatch.setattr(module, "gather", lambda value: [value if value == [] else (dict(success=0, failure=0), 0)])
    checkpoint = torch.load(ROOT / "tests/policy.pt", weights_only=True)
    more = dict(reward_model=None, contract=None) if script == "ppo_resnet_reward" else {}
    oracle = dict(oracle=True) if more else {}
    for seed, rank, step in itertools.product((1, 2), (0, 1), (0, 1)):
        monkeypatch.setattr(module, "RANK", rank)
        args = module.Args(seed=seed, num_envs=1, num_eval_envs=1, capture_video=False, log_dir=str(tmp_path), **oracle)
        if script == "ppo_collect":
            args.save_dir = str(tmp_path / f"{len(seen)}")
        with pytest.raises(Seen):
            module.train(args, checkpoint["task"], checkpoint | dict(script=script, global_step=step), **more)
    assert len(seen) == len(torch.cat(seen).unique(dim=0)) == 8


def test_usable_cores(tmp_path, monkeypatch):
    """Affinity, and the container's quota (cgroup v2)."""
    cores, file = len(os.sched_getaffinity(0)), tmp_path / "cpu.max"
    monkeypatch.setattr(ppo_dense, "Path", lambda path: file if path == "/sys/fs/cgroup/cpu.max" else Path(path))
    assert ppo_dense.usable_cores() == cores
    for text, expected in (("max 100000", cores), (f"{100000 * (cores + 3)} 100000", cores), ("150000 100000", 1),
                           ("50000 100000", 1)):
        file.write_text(text + "\n")
        assert ppo_dense.usable_cores() == expected


@pytest.mark.parametrize("variables", [dict(WORLD_SIZE=""), dict(RANK="1"), dict(WORLD_SIZE="2", RANK="0"),
                                       dict(SLURM_PROCID="1", WORLD_SIZE="2", LOCAL_RANK="1")])
def test_variables_of_batch_systems(tmp_path, variables):
    """Ranks are torchrun's when all of its variables are there; otherwise the script is alone."""
    code = "import ppo_dense; print(ppo_dense.RANK, ppo_dense.WORLD_SIZE, bool(ppo_dense.TORCHRUN))"
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in names} | variables
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.stdout == "0 1 False\n", out.stderr


@pytest.mark.parametrize("script", ["ppo_collect", "ppo_dense", "ppo_resnet_reward"])
def test_a_process_of_ppo_computes_with_one_thread(tmp_path, monkeypatch, script):
    """More would spin while they wait, and take a second run's cores."""
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    run(script, tmp_path, "--seed", "-1", code=2)
    assert threads[0] == 1


def test_two_runs_at_once(tmp_path, all_cores):
    """Beside a second run, a run keeps a fair part of its speed: waiting threads do not spin for long."""
    def start(name):
        return start_process("ppo_dense", tmp_path, *SMALL, "--num-envs", "32", "--num-steps", "50", "--num-minibatches", "8",
                             "--num-iterations", "3", "--log-dir", name)

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
