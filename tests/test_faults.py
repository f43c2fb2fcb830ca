"""Interruptions, crashes and damaged files: real processes, real signals, real files.

    python -m pytest -q tests/test_faults.py                   # 2 kills of every stage
    FAULT_KILLS=10 python -m pytest -q -s tests/test_faults.py    # 30: 10 of each of the three stages
"""
import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from run_script import ROOT, run, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_collect import install_policy
from test_resnet_reward import dense_checkpoint, random_reward_model

KILLS = int(os.environ.get("FAULT_KILLS", 2))
PPO = ["--num-procs", "2", "--num-envs", "8", "--num-eval-envs", "2", "--num-minibatches", "2", "--num-steps", "25",
       "--learning-rate", "1e-6", "--save-interval", "1", "--eval-freq", "1000", "--no-capture-video"]


@pytest.fixture
def seed():
    """Another one in every run."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    return seed


def ranks_of(process):
    """Process ids of the ranks that `process` has started."""
    found = []
    for status in os.listdir("/proc"):
        try:
            if status.isdigit() and open(f"/proc/{status}/stat").read().rpartition(")")[2].split()[1] == str(process.pid):
                found.append(int(status))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


def kill_and_resume(rng, folder, begin, resume, has_begun):
    """Start with `begin()`, or `resume()` once `has_begun()`, and kill -9 the launcher or a rank at a random moment; KILLS
    times: every third while it starts, the others soon after it has written a checkpoint in `folder`. Nothing may survive
    the kill. Ends with a run that completes."""
    def checkpoints():
        return {(f, f.stat().st_mtime_ns) for f in folder.glob("**/*.pt")}

    for kill in range(KILLS):
        before, begun = checkpoints(), time.time()
        process = resume() if has_begun() else begin()
        training, victim = kill % 3 > 0, rng.choice(["launcher", "rank"])
        wait = 120 if training else rng.uniform(0, 12)  # for a checkpoint: it has begun
        while checkpoints() == before and time.time() < begun + wait:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        ranks = ranks_of(process)
        target = process.pid if victim == "launcher" or not ranks else rng.choice(ranks)
        os.kill(target, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        print(f"kill {kill + 1}: {victim} {time.time() - begun:.1f} s after the start")
        assert not training or checkpoints() != before
        assert process.returncode != 0
        deadline = time.time() + 10
        while any(os.path.exists(f"/proc/{rank}") for rank in ranks) and time.time() < deadline:
            time.sleep(0.1)
        assert not any(os.path.exists(f"/proc/{rank}") for rank in ranks), "a rank outlived its launcher"
        yield
    process = resume() if has_begun() else begin()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in err, out + err


def digests(folder, pattern):
    return {hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.glob(pattern)}


def newest_step(folder):
    """Over the runs in <folder>/logs; every checkpoint must be whole."""
    steps = [0]
    for file in folder.glob("logs/*/checkpoints/*/checkpoint.pt"):
        steps.append(torch.load(file, weights_only=True)["global_step"])
        assert file.parent.name == f"global_step_{steps[-1]}"
    return max(steps)


def runs(folder, script):
    """The flag that goes on with the newest of a script's runs, as a shell expands it."""
    return ["--resume-dir", *sorted(map(str, folder.glob(f"logs/*-{script}")))]


def check_events(folder, script, first, last):
    """Of all runs together TensorBoard shows every global step, each run its own in order."""
    seen = set()
    for run_dir in folder.glob(f"logs/*-{script}"):
        events = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0))
        events.Reload()
        steps = [e.step for e in events.Scalars("charts/env_steps")] if "charts/env_steps" in events.Tags()["scalars"] else []
        assert steps == sorted(set(steps))
        seen |= set(steps)
    assert seen >= set(range(first, last + 1)) or len(set(range(first, last + 1)) - seen) <= KILLS, sorted(seen)


def test_kill_stage_1(tmp_path, seed):
    """Whatever is killed when: no frame is lost or damaged, no step runs backwards, and the last run completes."""
    rng, policy, frames_dir = random.Random(seed), install_policy(tmp_path), tmp_path / "data"
    iterations = 6 + 6 * KILLS
    args = [*PPO, "--target-success", 20 + 10 * KILLS, "--target-failure", 10_000, "--sample-rate-fail", "0.05",
            "--num-iterations", iterations]
    seen, step = set(), 1

    def go_on():
        started = any(tmp_path.glob("logs/*-ppo_collect/checkpoints/*/checkpoint.pt"))
        return start("ppo_collect", tmp_path, *args, *(runs(tmp_path, "ppo_collect") if started else ["--resume-dir", policy]))

    for _ in kill_and_resume(rng, tmp_path, None, go_on, lambda: True):
        now = digests(frames_dir, "*/*.png")
        assert seen <= now, f"a frame was lost (seed {seed})"
        for file in frames_dir.glob("*/*.png"):
            with Image.open(file) as image:
                image.load()
                assert image.size == (224, 224)
        seen, before, step = now, step, max(newest_step(tmp_path), 1)
        assert step >= before
    assert seen <= digests(frames_dir, "*/*.png")
    with open(frames_dir / "index.csv") as f:
        rows = {row["file"]: row for row in csv.DictReader(f)}
    episodes = {}  # of a picture and its vector; in one episode it may come twice, with the cube at rest and out of reach
    without_row = 0
    for file in frames_dir.glob("*/*.png"):
        row = rows.pop(str(file.relative_to(frames_dir)), None)
        without_row += row is None  # killed between the pictures and the table: its folder is its label
        if row:
            with Image.open(file) as image:
                state = (np.asarray(image).tobytes(), row["to_goal_x"], row["to_goal_y"], row["to_goal_z"])
            episodes.setdefault(state, set()).add(row["episode"])
    assert not rows and max(map(len, episodes.values())) == 1, f"an episode was collected twice (seed {seed})"
    assert without_row <= 16 * KILLS
    last = newest_step(tmp_path)
    assert last == iterations or len(list((frames_dir / "success").iterdir())) >= 20 + 10 * KILLS
    check_events(tmp_path, "ppo_collect", 2, last)


def test_kill_stage_2(data, tmp_path, seed):
    """Killed and resumed again and again, the training ends with the very weights of one that was left alone."""
    args = ["--input-size", "32", "--epoch-frames", "1", "--batch-size", "16", "--lr", "1e-3", "--val-split", "0.2",
            "--early-stopping-patience", "99", "--epochs", 4 + 4 * KILLS]
    whole = start("train_reward_resnet", tmp_path, *args, "--save-dir", "whole")
    out, err = whole.communicate(timeout=600)
    assert whole.returncode == 0, err
    parts, epoch = tmp_path / "parts", 0
    for _ in kill_and_resume(random.Random(seed), tmp_path,
                             lambda: start("train_reward_resnet", tmp_path, *args, "--save-dir", "parts"),
                             lambda: start("train_reward_resnet", tmp_path, *args, "--save-dir", "parts", "--resume"),
                             (parts / "last_model.pt").exists):
        if (parts / "last_model.pt").exists():
            now = torch.load(parts / "last_model.pt", weights_only=True)["state"]["epoch"]
            assert now >= epoch
            epoch = now
            assert torch.load(parts / "best_model.pt", weights_only=True)["script"] == "train_reward_resnet"
    a, b = (torch.load(tmp_path / name / "last_model.pt", weights_only=True) for name in ("whole", "parts"))
    assert a["state"]["epoch"] == b["state"]["epoch"] == 4 + 4 * KILLS
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"]), f"seed {seed}"
    assert (parts / "report.json").exists() and (parts / "mistakes.png").exists()


def test_kill_stage_4(tmp_path, seed):
    rng = random.Random(seed)
    iterations = 6 + 6 * KILLS
    args = [*PPO, "--reward-checkpoint", random_reward_model(tmp_path / "model.pt"), "--save-mistakes",
            "--num-iterations", iterations]
    first = dense_checkpoint(tmp_path)

    def begun():
        return any(tmp_path.glob("logs/*/checkpoints/*/checkpoint.pt"))

    seen, step = set(), 0
    for _ in kill_and_resume(rng, tmp_path, lambda: start("ppo_resnet_reward", tmp_path, *args, "--resume-dir", first),
                             lambda: start("ppo_resnet_reward", tmp_path, *args, *runs(tmp_path, "ppo_resnet_reward")), begun):
        now = digests(tmp_path, "logs/*/mistakes/*/*.png")
        assert seen <= now, f"a frame was lost (seed {seed})"
        seen, before, step = now, step, newest_step(tmp_path)
        assert step >= before
        for index in tmp_path.glob("logs/*/mistakes/index.csv"):
            with open(index) as f:
                assert all((index.parent / row["file"]).exists() for row in csv.DictReader(f))
    assert newest_step(tmp_path) == iterations
    check_events(tmp_path, "ppo_resnet_reward", 1, iterations)


def test_torchrun_starts_a_killed_rank_anew(tmp_path):
    """torchrun --max-restarts: a rank is killed, and the given command starts anew, in a run's folder of its own."""
    process = start("ppo_dense", tmp_path, *PPO, "--num-iterations", "8", launcher=[
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"])
    try:
        deadline = time.time() + 120
        while len(list(tmp_path.glob("logs/*/checkpoints/*/checkpoint.pt"))) < 3 and time.time() < deadline:
            time.sleep(0.1)
        os.kill(random.choice(ranks_of(process)), signal.SIGKILL)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert len(list(tmp_path.glob("logs/*-ppo_dense"))) == 2 and newest_step(tmp_path) == 8


@pytest.mark.parametrize("script, signum", [
    ("ppo_dense", signal.SIGINT), ("ppo_dense", signal.SIGTERM), ("ppo_dense", signal.SIGHUP),
    ("ppo_resnet_reward", signal.SIGTERM), ("train_reward_resnet", signal.SIGINT)])  # the handler is the same text
def test_a_signal_ends_a_run_in_order(data, tmp_path, script, signum):
    """Exit code 130, so that && begins nothing else, a checkpoint, and a printed command that really goes on, once. (Stage 1:
    test_collect.py.)"""
    if script == "train_reward_resnet":
        args = ["--input-size", "32", "--epoch-frames", "1", "--epochs", "12"]
    else:
        args = [*PPO, "--num-iterations", "12"]
    if script == "ppo_resnet_reward":
        args += ["--reward-checkpoint", random_reward_model(tmp_path / "model.pt")]
    process = start(script, tmp_path, *args)
    done = "reward_checkpoints/last_model.pt" if script == "train_reward_resnet" else "logs/*/checkpoints/*/checkpoint.pt"
    deadline = time.time() + 120
    while not list(tmp_path.glob(done)) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    path, *to_go_on = shlex.split(re.search(r"To go on: python (.*)", out)[1])
    assert path == str(ROOT / f"{script}.py")
    if script != "train_reward_resnet":
        to_go_on[to_go_on.index("--num-procs") + 1] = "1"  # in this process, which is faster
    run(script, tmp_path, *to_go_on)
    if script == "train_reward_resnet":
        assert torch.load(tmp_path / "reward_checkpoints/last_model.pt", weights_only=True)["state"]["epoch"] == 12
    else:
        assert newest_step(tmp_path) == 12
        _, err = run(script, tmp_path, *to_go_on[:-1], max(tmp_path.glob(f"logs/*-{script}")), code=2)
        assert "global_step_12/checkpoint.pt is at the end of --num-iterations: give more" in err.splitlines()[-1]


def test_a_signal_to_torchrun_ends_a_run_in_order(tmp_path):
    """torchrun hands the signal on: the ranks leave a checkpoint and say how to go on. (torchrun's own exit code is 1.)"""
    args = [*PPO[2:], "--num-iterations", "1000", "--save-interval", "1000"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = start("ppo_dense", tmp_path, *args, launcher=launcher)
    deadline = time.time() + 120
    while not list(tmp_path.glob("logs/*/events*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "To go on: python" in out, err
    check_events(tmp_path, "ppo_dense", 1, newest_step(tmp_path))


def test_nobody_reads_the_output(tmp_path):
    """`| tee log` and Ctrl-C: tee dies, the checkpoint is written all the same, also where tee alone is gone."""
    process = start("ppo_dense", tmp_path, *PPO[2:], "--num-procs", "1", "--num-iterations", "1000", "--save-interval", "1000")
    deadline = time.time() + 120
    while not list(tmp_path.glob("logs/*/events*")) and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    process.stdout.close()
    process.stderr.close()
    time.sleep(2)
    assert process.poll() is None, "nobody reads its progress, and it goes on"
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert newest_step(tmp_path) > 0


@pytest.mark.parametrize("output", [">/dev/full 2>&1", ">&- 2>&-"])
def test_output_that_cannot_be_written(tmp_path, output):
    """A log on a full disk, nothing to write to at all: the checkpoint is written all the same."""
    args = ["--num-envs", "8", "--num-eval-envs", "2", "--num-procs", "1", "--num-iterations", "1", "--no-capture-video"]
    command = shlex.join([sys.executable, str(ROOT / "ppo_dense.py"), *args])
    result = subprocess.run(["sh", "-c", f"{command} {output}"], cwd=tmp_path, timeout=120)
    assert result.returncode == 0 and newest_step(tmp_path) == 1


def test_ctrl_c_ends_an_evaluation_at_once(tmp_path):
    """There is nothing to lose: within 2 seconds, without a word."""
    process = start("ppo_dense", tmp_path, "--resume-dir", ROOT / "tests/policy.pt", "--evaluate", "--num-procs", "1")
    deadline = time.time() + 60
    while not list(tmp_path.glob("logs/*/events*")) and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=2)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_a_film_that_fails_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nonexistent/ffmpeg")
    out, _ = run("ppo_dense", tmp_path, "--num-procs", "1", "--num-envs", "8", "--num-eval-envs", "2", "--num-iterations", "1")
    assert "warning: no film" in out and newest_step(tmp_path) == 1


def flip_bytes(content, rng):
    """The content with a few bytes changed, cut off, doubled or replaced by something that parsers dislike."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(5), rng.randrange(len(content) + 1)
        if kind == 0 and at < len(content):
            content[at] = rng.randrange(256)
        elif kind == 1:
            del content[at:at + rng.randint(1, 200)]
        elif kind == 2:
            content[at:at] = content[at:at + rng.randint(1, 200)]
        elif kind == 3:
            content[at:at] = rng.choice([b"\0", b"-1", b"1e999", b'"', b"[" * 5000, b"\xff\xfe", b"../x", b"9" * 5000, b","])
        else:
            content = content[:at]
    return bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_fuzzed_files_of_stage_2(data, tmp_path, seed):
    """metadata.json, index.csv, PNGs and checkpoints with damaged bytes: read well, or refused with one line. In one process,
    with the functions that the script calls first; nothing outside the folder changes."""
    import train_reward_resnet as stage_2

    (tmp_path / "out").mkdir()
    stage_2.save_model(tmp_path / "out/model.pt", stage_2.RewardModel("resnet18", 32),
                       json.loads((data / "metadata.json").read_text()), stage_2.Args(input_size=32))
    files = [data / "metadata.json", data / "index.csv", data / "success/0001.png", tmp_path / "out/model.pt"]
    originals = {f: f.read_bytes() for f in files}
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    rng, refused = random.Random(seed), 0
    for _ in range(60):
        file = rng.choice(files)
        file.write_bytes(flip_bytes(originals[file], rng))
        try:
            _, contract = stage_2.read_data([str(data)])
            model, _ = stage_2.load_reward_model(tmp_path / "out/model.pt", torch.device("cpu"))
            stage_2.load_frames([str(data / "success/0001.png")], contract, model, "decoding")
        except SystemExit as stop:
            assert stop.code == 2
            refused += 1
        file.write_bytes(originals[file])
    assert 10 < refused < 60
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_fuzzed_checkpoints_of_ppo(tmp_path):
    import ppo_dense as stage_3

    folder = dense_checkpoint(tmp_path)
    original, rng, refused = (folder / "checkpoint.pt").read_bytes(), random.Random(0), 0
    for _ in range(60):
        (folder / "checkpoint.pt").write_bytes(flip_bytes(original, rng))
        try:
            stage_3.load_checkpoint(stage_3.Args(resume_dir=(str(folder),)))
        except SystemExit as stop:
            assert stop.code == 2
            refused += 1
    assert refused > 20


def test_odd_folders(data, tmp_path):
    """Spaces in paths, a data folder that is a link, and a save folder that cannot be written."""
    odd = tmp_path / "odd name"
    odd.mkdir()
    shutil.move(data, odd / "the data")
    os.symlink(odd / "the data", tmp_path / "link")
    args = ["--epochs", "1", "--epoch-frames", "1", "--input-size", "32", "--data-path", "link", "--log-dir", "my logs"]
    run("train_reward_resnet", tmp_path, *args, "--save-dir", "my model")
    assert (tmp_path / "my model/best_model.pt").exists()
    (tmp_path / "taken").write_text("a file")
    _, err = run("train_reward_resnet", tmp_path, *args, "--save-dir", "taken/here", code=2)
    assert "Not a directory" in err


def test_read_only_data(data, tmp_path):
    """On a mount of its own that is really read-only: stage 2 learns from it, stage 1 says that it cannot add to it."""
    read_only = f"mount --bind {data} {data} && mount -o remount,ro,bind {data} && cd {tmp_path} && {sys.executable} {ROOT}/"
    for command, code in (("train_reward_resnet.py --epochs 1 --epoch-frames 1 --input-size 32", 0),
                          ("ppo_collect.py --num-procs 1 --num-envs 2 --num-eval-envs 2 --num-minibatches 2", 2)):
        result = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", read_only + command],
                                capture_output=True, text=True, timeout=120)
        assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert "Read-only file system" in result.stderr
    assert (tmp_path / "reward_checkpoints/best_model.pt").exists() and len(list(data.glob("success/*.png"))) == 64


def test_losses_that_are_not_finite_reach_no_checkpoint(tmp_path):
    folder = dense_checkpoint(tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["agent"]["critic.6.weight"].fill_(1e30)  # finite, and the square of its error is not
    torch.save(checkpoint, folder / "checkpoint.pt")
    written = set(tmp_path.rglob("checkpoint.pt"))
    process = start("ppo_dense", tmp_path, *PPO, "--num-iterations", "102", "--resume-dir", str(folder))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "no longer finite" in err and "Traceback" not in err
    assert set(tmp_path.rglob("checkpoint.pt")) == written
