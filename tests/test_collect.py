"""Stage 1: the frame collector, and ppo_collect.py as people run it (real processes, real rendering, real files)."""
import contextlib
import csv
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import run_script
import torch
from mani_skill.utils.sapien_utils import look_at
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env import CAMERA, ROOT, TASK, Pair, find, load_policy, make

import ppo_collect
from ppo_collect import FrameCollector, make_scenes

Args = functools.partial(ppo_collect.Args, meshes="light")  # as on a CPU by default


def make_contract(args, **task):
    return ppo_collect.make_contract(args, find(**task), make(1, **task))


SMALL = ["--num-eval-envs", "2", "--no-capture-video"]


def run(cwd, *args, code=0):
    return run_script.run("ppo_collect", cwd, *SMALL, *args, code=code)


def install_policy(tmp_path):
    """A run's folder with the trained policy as its checkpoint, to be resumed (as global step 1, so that runs are short)."""
    checkpoint = torch.load(ROOT / "tests" / "policy.pt", weights_only=True)
    fresh = torch.optim.Adam(load_policy().parameters(), lr=1e-6)
    folder = tmp_path / "logs" / "trained" / "checkpoints" / "global_step_1"
    folder.mkdir(parents=True)
    torch.save(dict(checkpoint, script="ppo_collect", optimizer=fresh.state_dict(), global_step=1, env_steps=0),
               folder / "checkpoint.pt")
    return folder.parents[1]


def check_folder(data, success, failure, staggered=False, dense=True):
    """Whole 224x224 RGB frames, and index.csv in agreement with the folder; numbered without gaps where none was replaced.

    The time-outs of a run's first episodes are `staggered`: they come before step 50.
    """
    with open(data / "index.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == success + failure
    for label, count in (("success", success), ("failure", failure)):
        files = sorted(p.name for p in (data / label).iterdir())
        assert not dense or files == [f"{n:04d}.png" for n in range(1, count + 1)]
        mine = [row for row in rows if row["label"] == label]
        assert sorted(row["file"] for row in mine) == [f"{label}/{name}" for name in files]
        assert len({(row["episode"], row["step"]) for row in mine}) == count, "a frame was saved twice"
        for row in mine:
            with Image.open(data / row["file"]) as image:
                image.load()
                assert image.size == (224, 224) and image.mode == "RGB"
            placed, static = row["is_obj_placed"] == "1", row["is_robot_static"] == "1"
            assert (label == "success") == (placed and static)
            to_goal = float(row["cube_to_goal"])  # rounded to 0.01 mm
            assert placed == (to_goal <= 0.025) or to_goal == 0.025
            assert not (label == "failure" and placed), "an ambiguous frame was saved"
            if row["step"] == "50" or label == "success" or not staggered:
                assert (row["is_final"] == "1") == (row["step"] == "50" or label == "success")
    return rows


def digest(data):
    return {str(p.relative_to(data)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(data.rglob("*")) if p.is_file() and p.name != "preview.png"}


def test_labels_and_pixels_agree_with_stock_maniskill(tmp_path):
    """Saved frames are rebuilt through index.csv by a second run with the same seed, on stock scenes with a stock camera."""
    args = Args(save_dir=str(tmp_path / "data"), target_success=15, target_failure=25, sample_rate_fail=0.1)
    policy, num_envs, steps = load_policy(), 3, 120

    def drive(photograph):
        """The same scenes, seeds and actions whoever is watching."""
        torch.manual_seed(4)
        pair = Pair(num_envs, 21, CAMERA)
        episode, episode_step = torch.arange(num_envs), torch.zeros(num_envs, dtype=torch.int64)
        noise = torch.Generator().manual_seed(0)
        for t in range(steps):
            with torch.no_grad():
                action = policy.get_mean_action(pair.obs) + 0.2 * torch.randn(num_envs, 8, generator=noise)
            done, info = pair.step(action)
            episode_step += 1
            photograph(pair, info, done, episode, episode_step)
            torch.manual_seed(1000 + t)
            if done.any():
                idx = done.nonzero().squeeze(-1)
                pair.reset(idx)
                episode[idx] += num_envs
                episode_step[idx] = 0

    collector = FrameCollector(args, make_contract(args))
    drive(lambda pair, info, done, episode, step: collector.photograph(
        pair.envs, info, done, 1, 0, episode=episode, step=step))
    collector.folder.file()
    rows = check_folder(tmp_path / "data", **collector.folder.counts, dense=False)
    assert collector.folder.counts["success"] >= 3 and collector.folder.counts["failure"] >= 10

    wanted = {(int(row["episode"]), int(row["step"])): row for row in rows}
    seen = []

    studio = make_scenes(TASK, 1, "physx_cpu", CAMERA).unwrapped
    studio.reset(seed=0)

    def rebuild(pair, info, done, episode, step):
        for i in range(num_envs):
            row = wanted.get((int(episode[i]), int(step[i])))
            if row is None:
                continue
            stock = pair.stock[i].unwrapped
            studio.set_state_dict(stock.get_state_dict())
            truth = stock.evaluate()
            assert (row["label"] == "success") == bool(truth["success"])
            to_goal = (stock.goal_site.pose.p - stock.cube.pose.p)[0]
            assert float(row["cube_to_goal"]) == pytest.approx(float(to_goal.norm()), abs=2e-5)
            assert [float(row[f"to_goal_{axis}"]) for axis in "xyz"] == pytest.approx(to_goal.tolist(), abs=2e-5)
            for key in ("is_obj_placed", "is_robot_static", "is_grasped"):
                assert row[key] == str(int(truth[key])), key
            saved = np.asarray(Image.open(tmp_path / "data" / row["file"])).astype(int)
            stock_picture = studio.render_rgb_array()[0].numpy().astype(int)
            assert np.abs(saved - stock_picture).mean() < 0.01
            seen.append(row["file"])

    drive(rebuild)
    assert sorted(seen) == sorted(row["file"] for row in rows)


def test_cameras():
    """--camera: as named, and by default what the task has."""
    def views(env_id="PickCube-v1", **flags):
        return make_contract(Args(**flags), env_id=env_id)["views"]

    assert views() == views(camera="goal") == ppo_collect.CAMERAS["goal"] != views(camera="workspace")
    assert views("PushCube-v1", camera="workspace") == ppo_collect.CAMERAS["workspace"]
    task, = views("PushCube-v1").values()  # it has no goal_site to move with
    assert task == views("PushCube-v1", camera="task")["render_camera"] and task["fov"] == 1.0
    assert look_at([0.6, 0.7, 0.6], [0, 0, 0.35]).raw_pose[0].tolist() == pytest.approx(task["pose"], abs=1e-5)


@pytest.mark.parametrize("rates, chosen", [
    (dict(sample_rate_success=1.0), lambda success, placed, near, done: success),
    (dict(sample_rate_fail_final=1.0), lambda success, placed, near, done: done & ~placed),
    (dict(sample_rate_near_miss=1.0), lambda success, placed, near, done: near & ~placed),
], ids=["success", "final", "near miss"])
def test_which_frames_are_chosen(tmp_path, rates, chosen):
    """With rates of 0 and 1: exactly the frames of the kind, in an episode that never succeeds and in the policy's."""
    none = dict(sample_rate_success=0.0, sample_rate_fail=0.0, sample_rate_fail_final=0.0, sample_rate_near_miss=0.0)
    args = Args(save_dir=str(tmp_path / "data"), **dict(none, **rates))
    collector, policy, envs = FrameCollector(args, make_contract(args)), load_policy(), make(4, CAMERA)
    torch.manual_seed(0)
    obs, _ = envs.reset(seed=0)
    expected = set()
    for t in range(1, 51):
        with torch.no_grad():
            action = policy.get_mean_action(obs)
        action[0] = 0
        obs, _, terminated, truncated, info = envs.step(action)
        done = terminated | truncated
        mask = chosen(info["success"], info["is_obj_placed"], obs[:, -3:].norm(dim=1) <= 0.05, done)
        expected |= {(i, t) for i in mask.nonzero().squeeze(-1).tolist()}
        collector.photograph(envs, info, done, 1, 4 * t, episode=torch.arange(4), step=torch.full((4,), t))
    assert {(row["episode"], row["step"]) for row, _ in collector.folder.pending} == expected != set()


def test_failures_that_a_picture_shows(tmp_path):
    """A task of one's own, which also wants the gripper open: the cube at the goal and the robot at rest is a failure that can
    be seen; the robot still moving is not."""
    args = Args(save_dir=str(tmp_path / "data"), sample_rate_fail=1.0)
    collector, envs = FrameCollector(args, make_contract(args)), make(4, CAMERA)
    envs.reset(seed=0)
    *_, info = envs.step(torch.zeros(4, 8))
    info |= dict(success=torch.tensor([False, False, False, True]), is_obj_placed=torch.tensor([True, True, False, True]),
                 is_robot_static=torch.tensor([True, False, False, True]))
    counters = dict(episode=torch.arange(4), step=torch.ones(4))
    collector.photograph(envs, info, torch.zeros(4, dtype=torch.bool), 1, 4, **counters)
    assert [(row["episode"], row["label"]) for row, _ in collector.folder.pending] == [
        (0, "failure"), (2, "failure"), (3, "success")]


def test_failures_ahead_of_the_successes(tmp_path):
    """Half of the failures are taken without any success; later ones replace random earlier ones, and fewer are rendered."""
    args = Args(save_dir=str(tmp_path / "data"), target_success=2, target_failure=20, sample_rate_fail=0.5)
    torch.manual_seed(0)
    pair = Pair(2, 0, CAMERA)
    collector = FrameCollector(args, make_contract(args))
    for t in range(1, 41):
        done, info = pair.step(torch.rand(2, 8) * 2 - 1)
        collector.photograph(pair.envs, info, done, (t - 1) // 10 + 1, 2 * t, episode=torch.tensor([0, 1]),
                             step=torch.tensor([t, t]))
        if t % 10 == 0:
            collector.file()
    assert collector.folder.counts == dict(success=0, failure=10) and collector.chosen == 40
    rows = check_folder(tmp_path / "data", 0, 10, dense=False)
    numbers = [int(row["file"][-8:-4]) for row in rows]
    assert len(set(numbers)) == 10 and max(numbers) > 10, "no number is used twice"
    assert {row["global_step"] for row in rows} > {"4"}, "frames of the first and of the last iterations"
    assert collector.failure_share == 10 / 40 and 10 < max(numbers) < 40, "of 40 that the rates chose"


def photograph_failures(tmp_path, steps=6):
    """12 failure frames of two scenes, in a folder that nobody holds any more."""
    args = Args(save_dir=str(tmp_path / "data"), target_success=2, target_failure=24, sample_rate_fail=1.0)
    envs, contract = make(2, CAMERA), make_contract(args)
    envs.reset(seed=0)
    collector = FrameCollector(args, contract)
    for t in range(1, steps + 1):
        obs, _, terminated, truncated, info = envs.step(torch.zeros(2, 8))
        collector.photograph(envs, info, terminated | truncated, 1, 2 * t, episode=torch.tensor([4, 5]),
                             step=torch.tensor([t, t]))
    collector.folder.file()
    collector.folder.lock.close()
    return args, contract


def test_take_over_of_a_damaged_folder(tmp_path):
    """After a crash: a row without its frame goes, and every frame stays what it was, also one without a
    row; numbers go on where they were, episodes keep their own."""
    args, contract = photograph_failures(tmp_path)
    data = tmp_path / "data"
    shutil.copy(data / "failure/0012.png", data / "failure/0020.png")  # as after a crash between pictures and table
    Image.new("RGB", (224, 224)).save(data / "success/by hand.png")
    (data / "failure/0003.png").unlink()
    (data / "failure/0013.png.tmp").write_bytes(b"half a frame")  # is overwritten by the next frame of this number
    (data / "index.csv").write_text((data / "index.csv").read_text().replace("\n", ",a note\n"))  # somebody's column
    before = {file: h for file, h in digest(data).items() if file.endswith(".png")}
    collector = FrameCollector(args, contract)
    again = collector.folder
    assert again.counts == dict(success=1, failure=12) and again.first_episode == 6
    assert {file: h for file, h in digest(data).items() if file.endswith(".png")} == before
    with open(data / "index.csv") as f:
        files = [row["file"] for row in csv.DictReader(f)]
    assert len(files) == 11 and "failure/0003.png" not in files and "failure/0020.png" not in files
    again.targets = dict(success=2, failure=12)  # full: what comes replaces a frame that has a row
    row = dict(label="failure", episode=6, step=1, is_final=0, global_step=2, env_steps=9)
    again.add(torch.zeros(20, 224, 224, 3, dtype=torch.uint8), [row] * 20)
    again.file()
    assert again.counts == dict(success=1, failure=12) and (data / "failure/0020.png").exists()
    assert (data / "failure/0040.png").exists() and (data / "success/by hand.png").exists()


def test_a_folder_without_frames_may_become_any(tmp_path):
    """Stopped before its first frame, or emptied by hand: what its metadata.json says is of nothing."""
    args, contract = Args(save_dir=str(tmp_path / "data")), make_contract(Args())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text(json.dumps(dict(contract, width=64)))
    assert FrameCollector(args, contract).folder.counts == dict(success=0, failure=0)
    assert json.loads((tmp_path / "data/metadata.json").read_text()) == contract


def test_the_table_comes_between_new_and_replaced_frames(tmp_path, monkeypatch):
    """Killed at any file: index.csv names only frames that are there, and no frame is lost that it still names."""
    args, contract = photograph_failures(tmp_path)
    row = dict(label="failure", episode=6, step=1, is_final=0, global_step=2, env_steps=9)
    write, data = ppo_collect.write_file, tmp_path / "data"
    for files_written in range(8):
        folder = FrameCollector(args, contract).folder
        folder.targets = dict(success=2, failure=folder.counts["failure"])
        folder.add(torch.zeros(4, 224, 224, 3, dtype=torch.uint8), [row] * 4)
        written = iter(range(files_written))

        def die(path, content, written=written):
            if next(written, None) is None:
                raise KeyboardInterrupt
            write(path, content)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(ppo_collect, "write_file", die)
            folder.file()
        folder.lock.close()
        with open(data / "index.csv") as f:
            assert all((data / row["file"]).exists() for row in csv.DictReader(f))


def test_one_writer_at_a_time(tmp_path, capsys):
    """A second run is refused by name, also if it knows the folder by another; once the first ends, it may. (Mistakes lie
    in a run's own folder.)"""
    args, contract = photograph_failures(tmp_path, steps=1)
    folder, path = FrameCollector(args, contract).folder, args.save_dir
    os.symlink(path, tmp_path / "link")
    for args.save_dir in (str(tmp_path / "link"), path):
        with pytest.raises(SystemExit) as end:
            FrameCollector(args, contract)
        assert end.value.code == 2 and f"another run writes into {args.save_dir}" in capsys.readouterr().err
    folder.lock.close()
    FrameCollector(args, contract).folder.lock.close()


def test_two_ranks_and_the_same_seed(tmp_path):
    """Two ranks write no duplicate and no gap; the same command gives the same frames byte for byte, also with torchrun."""
    command = ["--num-envs", "16", "--num-steps", "25", "--num-iterations", "5", "--target-success", "12",
               "--target-failure", "15", "--sample-rate-fail", "0.02", "--num-minibatches", "2", "--learning-rate", "1e-6"]
    digests = []
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    for name, launcher, flags in (("alone", (), ("--num-procs", "2")), ("torchrun", torchrun, ())):
        cwd = tmp_path / name
        cwd.mkdir()
        out, _ = run_script.run_process("ppo_collect", cwd, *SMALL, *command, *flags, "--resume-dir", install_policy(cwd),
                                        launcher=launcher)
        assert "12 success and 15 failure frames" in out
        check_folder(cwd / "data", 12, 15, staggered=True, dense=False)
        assert (cwd / "data" / "preview.png").stat().st_size > 10_000
        digests.append(digest(cwd / "data"))
    assert digests[0] == digests[1]


def test_interrupted_and_resumed(tmp_path):
    """SIGTERM ends the run with exit code 130 and a checkpoint; resuming keeps every success frame as it was."""
    policy = install_policy(tmp_path)
    command = ["--num-envs", "16", "--num-steps", "25", "--target-success", "14", "--target-failure", "500",
               "--sample-rate-fail", "0.02", "--num-minibatches", "2", "--learning-rate", "1e-6"]
    process = run_script.start("ppo_collect", tmp_path, *SMALL, *command, "--num-procs", "2", "--resume-dir", policy)
    deadline = time.time() + 120
    while not list(tmp_path.glob("data/success/*.png")) and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err, err
    run_dir, = tmp_path.glob("logs/*-ppo_collect")
    to_go_on = re.search(r"To go on: (.*)", out)[1]
    assert to_go_on == shlex.join(
        ["python", str(ROOT / "ppo_collect.py"), *SMALL, *command, "--num-procs", "2", "--resume-dir", str(policy),
         "--resume-dir", f"{run_dir.relative_to(tmp_path)}"])
    first = digest(tmp_path / "data")
    step = max(int(p.name.rpartition("_")[2]) for p in run_dir.glob("checkpoints/*"))
    assert step > 1
    run(tmp_path, *command, "--num-procs", "1", "--num-iterations", step + 3, "--resume-dir", run_dir)
    second = digest(tmp_path / "data")
    kept = {f: h for f, h in first.items() if f.endswith(".png")}
    assert kept.items() <= second.items() and len(second) > len(first)
    counts = (len(list((tmp_path / "data" / label).iterdir())) for label in ("success", "failure"))
    check_folder(tmp_path / "data", *counts, staggered=True, dense=False)


def test_another_task(tmp_path):
    """Many scenes of it; a reward model of its frames would know whose they are."""
    _, err = run(tmp_path, "--env-id", "PushCube-v1", "--num-envs", "6", "--num-procs", "1", "--num-iterations", "2",
        "--num-minibatches", "2", "--target-failure", "10", "--sample-rate-fail", "0.05", "--capture-video")
    assert len(list((tmp_path / "data/failure").iterdir())) == 5
    contract = json.loads((tmp_path / "data/metadata.json").read_text())
    assert contract["env_id"] == "PushCube-v1" and contract["meshes"] == "light"
    films = list(tmp_path.glob("logs/*/videos/global_step_2.mp4"))
    assert films and films[0].stat().st_size > 1000, err
    assert "--env-id PushCube-v1" in json.loads(next(tmp_path.glob("logs/*/args.json")).read_text())["command"]


@pytest.mark.parametrize("script", ["ppo_collect", "ppo_dense"])
def test_evaluate(tmp_path, script):
    """The shipped policy, as in the README's first command: how well it does, and a film, in which scenes that have succeeded
    stand still under a green bar."""
    out, _ = run_script.run(script, tmp_path, "--resume-dir", ROOT / "tests/policy.pt", "--evaluate", "--num-eval-envs", "32",
                            "--num-procs", "1")
    success, film = re.search(r"eval/success_once ([\d.]+), .*, (.*.mp4)", out).groups()
    assert float(success) >= 0.8
    frames = imageio.v3.imread(tmp_path / film).astype(int)
    assert frames.shape == (51, 224, 4 * 224, 3)
    scenes = frames.reshape(51, 224, 4, 224, 3)
    framed = abs(scenes[:, :7] - [0, 200, 0]).mean((1, 3, 4)) < 30  # (51, 4): the green bar
    assert not framed[0].any() and framed[-1].sum() >= 3 and (framed[1:] >= framed[:-1]).all()
    for k in framed[-1].nonzero()[0]:
        assert abs(scenes[framed[:, k], :, k] - scenes[-1, :, k]).mean() < 3 < abs(scenes[0, :, k] - scenes[-1, :, k]).mean()
    assert not (tmp_path / "data").exists()
    events = EventAccumulator(str((tmp_path / film).parents[1]))
    events.Reload()
    assert events.Scalars("eval/success_once")[0].value == pytest.approx(float(success), abs=1e-3)


def broken_metadata(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{")


def other_metadata(tmp_path):
    frames_without_metadata(tmp_path)
    (tmp_path / "data/metadata.json").write_text(json.dumps(dict(make_contract(Args()), width=64)))


def frames_without_metadata(tmp_path):
    (tmp_path / "data/success").mkdir(parents=True)
    Image.new("RGB", (224, 224)).save(tmp_path / "data/success/0001.png")


def frames_of_before(tmp_path):
    frames_without_metadata(tmp_path)
    (tmp_path / "data/metadata.json").write_text(json.dumps(dict(format_version=2, env_id="PickCube-v1")))


def broken_index(tmp_path):
    other_metadata(tmp_path)
    (tmp_path / "data/metadata.json").write_text(json.dumps(make_contract(Args())))
    (tmp_path / "data/index.csv").write_text("file,label\nsuccess/0001.png,success\n")


def pickled_checkpoint(tmp_path):
    (tmp_path / "ckpt").mkdir()
    torch.save(dict(script=Path("x")), tmp_path / "ckpt/checkpoint.pt")


def truncated_checkpoint(tmp_path):
    folder = install_policy(tmp_path) / "checkpoints/global_step_1"
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[:len(data) // 2])
    shutil.copytree(folder, tmp_path / "ckpt")


def file_for_folder(tmp_path):
    (tmp_path / "data").write_text("a file")


@pytest.mark.parametrize("prepare, args, says", [
    (None, ["--num-envs", "1", "--num-procs", "2"], "too few --num-envs, --num-eval-envs or --num-steps for 2 processes"),
    (None, ["--num-envs", "7", "--num-procs", "4", "--num-minibatches", "20"],
     "too few --num-envs, --num-eval-envs or --num-steps for 4 processes"),
    (None, ["--sample-rate-fail", "1.5"], "--sample-rate-fail 1.5 is not between 0 and 1"),
    (None, ["--num-steps", "0"], "--num-steps 0 is not between 1 and"),
    (None, ["--num-envs", "2", "--num-procs", "1", "--num-steps", "1"], "too few --num-envs, --num-eval-envs or --num-steps"),
    (None, ["--env-id", "NoSuchTask-v1", "--num-procs", "1"], "there is no task NoSuchTask-v1 in ManiSkill"),
    (None, ["--env-id", "StackPyramid-v1", "--num-procs", "1"], "Unsupported reward mode: normalized_dense"),
    (None, ["--control-mode", "by_hand", "--num-procs", "1"], "by_hand not in supported modes"),
    (None, ["--resume-dir", "nowhere"], "--resume-dir nowhere: no checkpoint"),
    (None, ["--resume-dir", str(ROOT / "tests/policy.pt"), "--env-id", "PushCube-v1"], "PickCube-v1"),
    (None, ["--resume-dir", str(ROOT / "tests/policy.pt"), "--control-mode", "pd_joint_pos"], "pd_joint_delta_pos"),
    (pickled_checkpoint, ["--resume-dir", "ckpt"], "--resume-dir ckpt: no checkpoint"),
    (truncated_checkpoint, ["--resume-dir", "ckpt"], "--resume-dir ckpt: no checkpoint"),
    (broken_metadata, ["--num-procs", "1"], "metadata.json"),
    (other_metadata, ["--num-procs", "1"], "width is 64 there and 224 here"),
    (frames_of_before, ["--num-procs", "1"], "format_version is 2 there and 4 here"),
    (frames_without_metadata, ["--num-procs", "1"], "env_id is None there and PickCube-v1 here"),
    (broken_index, ["--num-procs", "1"], "index.csv is damaged"),
    (file_for_folder, ["--num-procs", "1"], "data"),
])
def test_bad_input(tmp_path, prepare, args, says):
    """One line that says what is wrong, exit code 2, no traceback."""
    if prepare:
        prepare(tmp_path)
    out, err = run(tmp_path, *args, code=2)
    lines = [line for line in err.splitlines() if "Warning" not in line and "warn(" not in line]
    assert says in lines[-1] and lines[-1].startswith("ppo_collect: error: "), err
    assert "Traceback" not in err and sum("error:" in line for line in lines) == 1


def test_no_vulkan_device(tmp_path):
    nowhere = dict(VK_DRIVER_FILES="/nonexistent.json", VK_ICD_FILENAMES="/nonexistent.json")
    _, err = run_script.run_process("ppo_collect", tmp_path, *SMALL, "--num-envs", "2", code=2, env=nowhere)
    assert "no Vulkan device? bash tests/install_cpu_renderer.sh" in err.splitlines()[-1]
    code = ("import ppo_collect as p; p.ManiSkillEnvs(p.Args(sim_backend='physx_cuda'), "
            "p.find_task('PickCube-v1', '', 'pd_joint_delta_pos'), 1, p.FILM_CAMERA)")  # on a GPU the first scenes draw already
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ, **nowhere), capture_output=True, text=True)
    assert result.returncode == 2 and "no Vulkan device? bash tests/install_cpu_renderer.sh" in result.stderr.splitlines()[-1]


def test_full_disk(tmp_path):
    """A real full disk: 300 KiB of tmpfs, mounted in a namespace of its own. What was written before stays whole."""
    script = (f"mount -t tmpfs -o size=300k tmpfs {tmp_path}/disk && cd {tmp_path}/disk && "
              f"{sys.executable} {ROOT}/ppo_collect.py {' '.join(SMALL)} --num-procs 1 --num-envs 2 --num-minibatches 2 "
              f"--sample-rate-fail 1 --log-dir {tmp_path}/logs; code=$?; cp -r data {tmp_path}/data; exit $code")
    (tmp_path / "disk").mkdir()
    result = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True,
                            text=True, timeout=300)
    assert result.returncode == 2, result.stderr
    assert "No space left on device" in result.stderr and "what was written before is whole" in result.stderr
    assert "Traceback" not in result.stderr
    frames = sorted((tmp_path / "data/failure").glob("*.png"))
    assert len(frames) >= 3 and json.loads((tmp_path / "data/metadata.json").read_text())["env_id"] == "PickCube-v1"
    for frame in frames:
        with Image.open(frame) as image:
            image.load()
            assert image.size == (224, 224)


def test_a_full_folder_for_temporary_files(tmp_path):
    """Nothing is kept there: the frames are written all the same."""
    (tmp_path / "full").mkdir()
    script = (f"mount -t tmpfs -o size=8k tmpfs {tmp_path}/full && cd {tmp_path} && head -c 20000 /dev/zero > full/file; "
              f"TMPDIR={tmp_path}/full {sys.executable} {ROOT}/ppo_collect.py {' '.join(SMALL)} --num-procs 1 --num-envs 2 "
              "--num-minibatches 2 --num-iterations 1 --sample-rate-fail 1")
    result = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert list((tmp_path / "data/failure").glob("*.png"))


def test_help_names_every_flag():
    help_text, _ = run_script.run("ppo_collect", ".", "--help")
    for name in ppo_collect.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in help_text
