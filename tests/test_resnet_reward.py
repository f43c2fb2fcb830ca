"""Stages 3 and 4 as people run them: real processes, real rendering, real checkpoints."""
import csv
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import run_script
import torch
from mani_skill.envs.sapien_env import BaseEnv
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_env import CAMERA, TASK, load_policy, make

import ppo_dense
import ppo_resnet_reward
import train_reward_resnet
from ppo_resnet_reward import Args, RewardModel, resnet_reward

CONTRACT = dict(format_version=4, **TASK, **CAMERA, mani_skill_version=importlib.metadata.version("mani_skill"))
SMALL = ["--num-procs", "1", "--num-envs", "8", "--num-eval-envs", "2", "--num-minibatches", "4", "--no-capture-video"]


def run(script, cwd, *args, code=0):
    return run_script.run(script, cwd, *SMALL, *args, code=code)


def scalars(run_dir):
    events = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def random_reward_model(path, **wrong):
    """A ResNet that has learned nothing, for frames of the default contract; `wrong` fields of it may differ."""
    torch.manual_seed(0)
    model = RewardModel("resnet18", 64)
    torch.save(dict(arch="resnet18", input_size=64, model=model.state_dict(), contract=CONTRACT | wrong), path)
    return path


def dense_checkpoint(tmp_path):
    """The trained policy as a checkpoint of stage 3, with the optimizer of that many updates."""
    folder = tmp_path / "dense" / "checkpoints" / "global_step_100"
    folder.mkdir(parents=True)
    agent = load_policy()
    optimizer = torch.optim.Adam(agent.parameters(), lr=0.1)
    for p in agent.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].fill_(1000)
    torch.save(dict(script="ppo_dense", task=TASK, agent=load_policy().state_dict(), optimizer=optimizer.state_dict(),
                    global_step=100, env_steps=0), folder / "checkpoint.pt")
    return folder


@pytest.fixture(scope="module")
def scenes():
    """Six scenes at the end of an episode of the trained policy, some of them successful."""
    torch.manual_seed(0)
    envs, policy = make(6, CAMERA), load_policy()
    obs, _ = envs.reset(seed=0)
    for _ in range(40):
        with torch.no_grad():
            obs, reward, _, _, info = envs.step(policy.get_mean_action(obs))
    assert info["success"].any()
    return envs, reward, info["success"]


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("alpha, threshold, soft", [(1.0, 0.5, False), (0.5, None, False), (2.0, 0.5, True)])
def test_reward(scenes, mode, alpha, threshold, soft):
    """The numbers that the formula gives for the frames of known scenes; scenes that are not scored get nothing."""
    envs, env_reward, success = scenes
    torch.manual_seed(1)
    model, scored = RewardModel("resnet18", 64).eval(), torch.tensor([5, 0, 2, 3])
    pictures = model.scale(envs.render_frames(scored))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=ppo_resnet_reward.fast_bf16("cpu")):
        probs = model(pictures)[0].sigmoid()
    torch.testing.assert_close(probs, model(pictures)[0].sigmoid().detach(), atol=5e-3, rtol=0)
    threshold = probs.sort()[0][1:3].mean().item() if threshold is None else threshold  # two above, two below
    args = Args(reward_mode=mode, alpha=alpha, threshold=threshold, use_soft_reward=soft)
    reward, said, frames = resnet_reward(model, envs, env_reward, success, scored, args)
    expected = env_reward.clone() if mode == "add" else torch.zeros(6)
    for k, i in enumerate(scored.tolist()):
        expected[i] += alpha * probs[k] if soft else alpha * (probs[k] > threshold)
    torch.testing.assert_close(reward, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(said, probs, atol=1e-6, rtol=0)
    assert frames.shape == (4, 224, 224, 3) and frames.dtype == torch.uint8
    nothing, said, _ = resnet_reward(model, envs, env_reward, success, scored[:0], args)
    assert len(said) == 0 and torch.equal(nothing, env_reward if mode == "add" else torch.zeros(6))
    oracle, _, frames = resnet_reward(None, envs, env_reward, success, scored, Args(oracle=True))
    assert frames is None and torch.equal(oracle[scored].bool(), success[scored])


def run_dirs(folder):
    return sorted(folder.glob("logs/*"))


def test_dense_stops_and_continues_exactly(tmp_path):
    """Stage 3 leaves the checkpoint that stage 4 reads; two runs that go on from the same one do the same, bit for bit, in
    folders of their own: what they read stays as it is."""
    out, _ = run("ppo_dense", tmp_path, "--num-iterations", "3", "--save-interval", "2")
    run_dir, = run_dirs(tmp_path)
    assert sorted(p.name for p in run_dir.glob("checkpoints/*")) == ["global_step_2", "global_step_3"]
    assert f"{run_dir.relative_to(tmp_path)}\n" in out, "what --resume-dir takes"
    assert {"eval/success_once", "env/episode_len", "losses/value_loss", "charts/SPS"} <= scalars(run_dir).keys()
    source, before = run_dir / "checkpoints/global_step_2", sorted(run_dir.rglob("*"))

    results = []
    for _ in "ab":
        run("ppo_dense", tmp_path, "--num-iterations", "4", "--resume-dir", source)
        again = run_dirs(tmp_path)[-1]
        metrics = scalars(again)
        assert sorted(metrics["losses/value_loss"]) == [3, 4] and again != run_dir
        checkpoint = torch.load(again / "checkpoints/global_step_4/checkpoint.pt", weights_only=True)
        assert checkpoint["env_steps"] == 4 * 8 * 25
        results.append((checkpoint, {k: v for k, v in metrics.items() if k.partition("/")[0] in ("env", "eval", "losses")}))
    (a, a_metrics), (b, b_metrics) = results
    assert len(run_dirs(tmp_path)) == 3 and sorted(run_dir.rglob("*")) == before
    assert a_metrics == b_metrics and all(torch.equal(a["agent"][k], b["agent"][k]) for k in a["agent"])
    first = torch.load(source / "checkpoint.pt", weights_only=True)
    assert a["optimizer"]["state"][0]["step"] > first["optimizer"]["state"][0]["step"], "Adam's moments were taken over"


def test_an_older_checkpoint_leaves_no_abandoned_branch(tmp_path):
    """Back to global_step_1 of a run of three, one step, on from there: the newest run goes on, not the older one's later
    steps. An evaluation has a folder that logs/*-ppo_dense does not match, and hides nothing of what it evaluates."""
    run("ppo_dense", tmp_path, "--num-iterations", "3", "--save-interval", "1")
    first, = run_dirs(tmp_path)
    run("ppo_dense", tmp_path, "--num-iterations", "2", "--resume-dir", first / "checkpoints/global_step_1")
    out, _ = run("ppo_dense", tmp_path, "--num-iterations", "3", "--resume-dir", *tmp_path.glob("logs/*-ppo_dense"))
    assert f"from {run_dirs(tmp_path)[1]}/checkpoints/global_step_2" in out
    run("ppo_dense", tmp_path, "--evaluate", "--resume-dir", first / "checkpoints/global_step_1")
    assert len(list(tmp_path.glob("logs/*-ppo_dense"))) == 3 and len(list(tmp_path.glob("logs/*-ppo_dense-evaluate"))) == 1
    assert sorted(scalars(first)["losses/value_loss"]) == [1, 2, 3]


def test_a_copied_checkpoint_writes_nothing_beside_itself(tmp_path):
    file = shutil.copy(dense_checkpoint(tmp_path / "somewhere") / "checkpoint.pt", tmp_path / "mine.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("ppo_dense", elsewhere, "--resume-dir", file, "--num-iterations", "101")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "mine.pt", "somewhere"]
    assert list(elsewhere.glob("logs/*/checkpoints/global_step_101/checkpoint.pt"))


def test_dense_stops_once_it_succeeds(tmp_path):
    """With the first evaluation that is good enough, like a complete run; it can be continued, with another step size."""
    start = dense_checkpoint(tmp_path)
    for flag, last in (("0.5", 101), ("1", 103)):
        out, _ = run("ppo_dense", tmp_path, "--resume-dir", start, "--num-iterations", "103", "--eval-freq", "1",
                     "--learning-rate", "1e-6", "--stop-at-success", flag)
        assert f"global step {last} after " in out and "To go on" not in out
        file = run_dirs(tmp_path)[-1] / f"checkpoints/global_step_{last}/checkpoint.pt"
        optimizer = torch.load(file, weights_only=True)["optimizer"]
        assert [group["lr"] for group in optimizer["param_groups"]] == pytest.approx([1e-6])


@pytest.mark.parametrize("script, flags", [
    ("ppo_dense", ["--num-iterations", "102", "--stop-at-success", "1"]),
    ("ppo_resnet_reward", ["--num-iterations", "2", "--oracle", "--critic-warmup", "0"])])
def test_a_large_action_l2_makes_small_actions(tmp_path, script, flags):
    size = []
    for weight in ("0", "1"):
        folder = dense_checkpoint(tmp_path / weight)
        run(script, tmp_path / weight, "--resume-dir", folder, *flags, "--learning-rate", "1e-3", "--action-l2", weight)
        last = max((tmp_path / weight).glob("logs/**/checkpoint.pt"), key=os.path.getmtime)
        agent = load_policy()
        agent.load_state_dict(torch.load(last, weights_only=True)["agent"])
        obs = agent.obs_mean + agent.obs_std * torch.randn((1000, 42), generator=torch.Generator().manual_seed(0))
        size.append(agent.get_mean_action(obs).square().sum(1).mean().item())
    assert size[1] < 0.8 * size[0], size


def test_stage_4_renders_final_frames_only(tmp_path, monkeypatch):
    """Every rendered picture is counted inside ManiSkill: as many as episodes ended. With `always`: as many as env steps."""
    random_reward_model(tmp_path / "model.pt")
    pictures, render = [], BaseEnv.render_rgb_array
    monkeypatch.setattr(BaseEnv, "render_rgb_array", lambda *args, **kwargs: pictures.append(1) or render(*args, **kwargs))
    for mode in ("episode_end", "always"):
        pictures.clear()
        start = dense_checkpoint(tmp_path / mode)
        run("ppo_resnet_reward", tmp_path, "--resume-dir", start, "--reward-checkpoint", "model.pt",
            "--num-iterations", "2" if mode == "episode_end" else "1", "--num-envs", "4",
                     "--threshold", "1.0", "--reward-render-mode", mode, "--log-dir", mode, "--save-mistakes")
        run_dir, = (tmp_path / mode).glob("*-ppo_resnet_reward")
        metrics, mistakes = scalars(run_dir), run_dir / "mistakes"
        scored = sum(metrics["reward_model/scored_frames"].values())
        assert len(pictures) == scored and (scored == 200 if mode == "always" else 8 <= scored < 60)
        assert metrics["env/success_once"].keys() == metrics["reward_model/accuracy"].keys()

        # The mistakes are laid out as stage 1's data, one an episode, and stage 2 reads them
        found, contract = train_reward_resnet.read_data([str(mistakes)])
        assert contract == CONTRACT
        with open(mistakes / "index.csv") as f:
            rows = list(csv.DictReader(f))
        wrong = sum((1 - metrics["reward_model/accuracy"][step]) * metrics["reward_model/scored_frames"][step]
                    for step in metrics["reward_model/accuracy"])
        assert 0 < len(rows) <= round(wrong) and (mode == "always" or len(rows) == round(wrong))
        assert len(found["files"]) == len({row["episode"] for row in rows}) == len(rows)
        for row in rows:
            with Image.open(mistakes / row["file"]) as image:
                assert image.size == (224, 224)
            assert (row["label"] == "success") == (row["is_obj_placed"] == row["is_robot_static"] == "1")
            assert row["is_final"] == "1" or mode == "always"


def test_ambiguous_frames_are_no_mistakes(tmp_path):
    """A ResNet that always says done ends episodes while the robot still moves: those frames are not filed as failures."""
    model = random_reward_model(tmp_path / "model.pt")
    run("ppo_resnet_reward", tmp_path, "--resume-dir", dense_checkpoint(tmp_path), "--reward-checkpoint", model, "--threshold",
        "0.0", "--num-iterations", "1", "--num-envs", "16", "--done-by", "resnet", "--score-every", "20", "--save-mistakes")
    run_dir, = run_dirs(tmp_path)
    metrics = scalars(run_dir)
    ends = metrics["reward_model/scored_frames"][1]
    with open(run_dir / "mistakes/index.csv") as f:
        rows = list(csv.DictReader(f))
    assert 0 < len(rows) == round(ends * (1 - metrics["reward_model/precision"][1])) < ends, "the cube is at the goal or not"
    assert {row["is_obj_placed"] for row in rows} == {"0"}
    assert metrics["env/success_once"][1] >= metrics["reward_model/precision"][1], "the bar's success is that too"


def test_before_and_after_are_of_rollouts_with_ends(tmp_path):
    """Here episodes end in every second one: in 2 of the first three, in which only the critic learns, and in 4 of all five."""
    out, _ = run("ppo_resnet_reward", tmp_path, "--oracle", "--resume-dir", dense_checkpoint(tmp_path), "--done-by", "time",
                 "--num-steps", "25", "--critic-warmup", "3", "--num-iterations", "5")
    run_dir, = run_dirs(tmp_path)
    success = scalars(run_dir)["env/success_once"]
    assert set(success) == {2, 4} and success[2] > 0
    assert (f"before -> after: env/success_once {success[2]:.3f} -> {success[4]:.3f}, "
            "env/episode_len 50.000 -> 50.000\n") in out


def test_stage_4_continues(tmp_path):
    """From stage 3: the weights, Adam's moments of the actor, and a critic that warms up while the actor stands still. From
    its own: on."""
    model, start = random_reward_model(tmp_path / "model.pt"), dense_checkpoint(tmp_path)
    args = ["--reward-checkpoint", model, "--critic-warmup", "2", "--num-iterations", "3"]
    out, _ = run("ppo_resnet_reward", tmp_path, *args, "--resume-dir", start, "--save-interval", "2")
    run_dir, = run_dirs(tmp_path)
    success, metrics = scalars(run_dir)["env/success_once"], scalars(run_dir)["env/episode_len"]
    assert f"before -> after: env/success_once {success[2]:.3f} -> {success[3]:.3f}, " in out
    assert f"env/episode_len {metrics[2]:.3f} -> {metrics[3]:.3f}\n" in out
    before = torch.load(start / "checkpoint.pt", weights_only=True)["agent"]
    warm = torch.load(run_dir / "checkpoints/global_step_2/checkpoint.pt", weights_only=True)
    for key, value in warm["agent"].items():
        assert torch.equal(value, before[key]) == (not key.startswith("critic")), key
    steps = [int(state["step"]) for state in warm["optimizer"]["state"].values()]
    assert steps.count(1000) == 9 and steps.count(2 * 8 * 4) == 8, steps  # of the actor, of the critic
    assert [group["lr"] for group in warm["optimizer"]["param_groups"]] == pytest.approx([2.5e-3 * 2 / 3, 2.5e-4 * 2 / 3])
    run("ppo_resnet_reward", tmp_path, *args, "--resume-dir", run_dir / "checkpoints/global_step_2")
    after = torch.load(run_dirs(tmp_path)[-1] / "checkpoints/global_step_3/checkpoint.pt", weights_only=True)
    assert after["env_steps"] == 3 * 8 * 50 and len(run_dirs(tmp_path)) == 2
    assert not any(torch.equal(value, before[key]) for key, value in after["agent"].items())


@pytest.mark.parametrize("flags, worth", [
    (["--threshold", "0"], 1), (["--done-by", "time", "--threshold", "1", "--use-soft-reward"], 0.5)])
def test_nothing_follows_an_end_that_is_paid(tmp_path, flags, worth):
    """Where every frame looks done, and without terminations in any case: the critic learns what the frame is paid, which
    is 1, or an untrained ResNet's probability. Were what follows added, it would grow by that in each global step."""
    model = random_reward_model(tmp_path / "model.pt")
    run("ppo_resnet_reward", tmp_path, "--reward-checkpoint", model, *flags, "--gamma", "1", "--gae-lambda", "1",
        "--critic-warmup", "6", "--num-iterations", "6", "--learning-rate", "1e-3",
        "--no-anneal-lr")
    checkpoint = torch.load(next(tmp_path.glob("logs/*/checkpoints/global_step_6/checkpoint.pt")), weights_only=True)
    agent = ppo_resnet_reward.Agent(42, 8)
    agent.load_state_dict(checkpoint["agent"])
    obs, _ = make(4).reset(seed=0)
    assert (agent.get_value(obs) - worth).abs().max() < 0.45


@pytest.mark.parametrize("soft", [[], ["--use-soft-reward"]])
def test_a_success_that_is_missed_is_only_a_cut(tmp_path, soft):
    """Where no frame looks done, what the critic expected after an episode's end is what it goes on to expect."""
    model, start = random_reward_model(tmp_path / "model.pt"), dense_checkpoint(tmp_path)
    run("ppo_resnet_reward", tmp_path, "--reward-checkpoint", model, "--threshold", "1", "--resume-dir", start, "--gamma", "1",
        *soft, "--gae-lambda", "1", "--critic-warmup", "6", "--num-iterations", "6", "--learning-rate", "1e-3",
        "--no-anneal-lr")
    run_dir, = tmp_path.glob("logs/*")
    assert scalars(run_dir)["env/episode_len"][6] < 35, "successes end episodes"
    obs, _ = make(4).reset(seed=0)
    before, after = load_policy(), load_policy()
    after.load_state_dict(torch.load(run_dir / "checkpoints/global_step_6/checkpoint.pt", weights_only=True)["agent"])
    assert (after.get_value(obs) > 0.5 * before.get_value(obs)).all()


def test_nothing_privileged(tmp_path, monkeypatch):
    """--done-by resnet: whatever the simulator says of success, reward and the end of an episode, the weights are the same."""
    dense, model = dense_checkpoint(tmp_path), random_reward_model(tmp_path / "model.pt")
    make_envs, noise = ppo_resnet_reward.ManiSkillEnvs, torch.Generator().manual_seed(0)

    def make_lying_envs(*args, **kwargs):
        envs = make_envs(*args, **kwargs)
        step = envs.step

        def lie(action):
            obs, reward, terminated, truncated, info = step(action)
            said = torch.rand(reward.shape, generator=noise) < 0.5
            return obs, -reward, said, truncated, dict(info, success=said, is_obj_placed=~said)

        envs.step = lie
        return envs

    def train(name):
        args = Args(done_by="resnet", score_every=5, threshold=0.45, resume_dir=(str(dense),), reward_checkpoint=str(model),
                    gamma=0.9, num_envs=4, num_steps=25, num_minibatches=2, num_iterations=2, num_eval_envs=2,
                    critic_warmup=1, capture_video=False, log_dir=str(tmp_path / name))
        reward_model, contract = ppo_resnet_reward.load_reward_model(model, torch.device("cpu"))
        ppo_resnet_reward.train(args, TASK, ppo_resnet_reward.load_checkpoint(args), reward_model, contract)
        [run_dir] = (tmp_path / name).iterdir()
        return torch.load(run_dir / "checkpoints/global_step_2/checkpoint.pt", weights_only=True)["agent"], scalars(run_dir)

    honest, metrics = train("honest")
    monkeypatch.setattr(ppo_resnet_reward, "ManiSkillEnvs", make_lying_envs)
    lied_to, lied_metrics = train("lied_to")
    assert 5 < metrics["env/episode_len"][2] < 50 and metrics["env/episode_len"] == lied_metrics["env/episode_len"]
    assert metrics["reward_model/precision"] != lied_metrics["reward_model/precision"]
    assert all(torch.equal(honest[name], lied_to[name]) for name in honest)
    started = torch.load(dense / "checkpoint.pt", weights_only=True)["agent"]
    assert not any(torch.equal(honest[name], started[name]) for name in ("actor_mean.0.weight", "critic.0.weight"))


def test_nobody_ends_episodes(tmp_path):
    """Episodes last their 50 steps, also those of a policy that succeeds."""
    run("ppo_resnet_reward", tmp_path, "--done-by", "time", "--oracle", "--num-iterations", "1", "--resume-dir",
        dense_checkpoint(tmp_path))
    metrics = scalars(next(tmp_path.glob("logs/*")))
    assert metrics["env/episode_len"] == {1: 50.0} and metrics["env/success_once"][1] >= 0.5


@pytest.mark.parametrize("script, flags", [("ppo_dense", ["--env-id", "PullCube-v1"]),
                                           ("ppo_collect", ["--control-mode", "pd_joint_pos"]),
                                           ("ppo_dense", ["--robot-uids", "so100"]), ("ppo_resnet_reward", [])])
def test_a_policy_of_another_task_robot_or_controller(tmp_path, script, flags):
    """Refused by name before anything is built; stage 4's task is the reward model's."""
    model = random_reward_model(tmp_path / "model.pt", env_id="PushCube-v1")
    flags += ["--reward-checkpoint", model] if script == "ppo_resnet_reward" else []
    _, err = run(script, tmp_path, "--resume-dir", dense_checkpoint(tmp_path), *flags, code=2)
    line = err.splitlines()[-1]
    other = flags[-1] if script != "ppo_resnet_reward" else "PushCube-v1"
    assert "is of {'env_id': 'PickCube-v1', 'robot_uids': 'panda', 'control_mode': 'pd_joint_" in line and other in line
    assert not (tmp_path / "logs").exists(), "nothing was built"


def test_stage_4_takes_everything_from_the_reward_model(tmp_path):
    """Task, camera, size and goal marker of the frames: the picture that stage 1 would take, and no flag for it."""
    data = tmp_path / "data"
    run("ppo_collect", tmp_path, "--env-id", "PushCube-v1", "--camera", "workspace",
        "--image-size", "160", "--no-show-goal-site", "--num-iterations", "1", "--sample-rate-fail", "0.1")
    contract = json.loads((data / "metadata.json").read_text())
    model = random_reward_model(tmp_path / "model.pt")
    torch.save(torch.load(model, weights_only=True) | dict(contract=contract), model)
    run("ppo_dense", tmp_path, "--env-id", "PushCube-v1", "--num-iterations", "1")
    run("ppo_resnet_reward", tmp_path, "--resume-dir", *tmp_path.glob("logs/*-ppo_dense"), "--reward-checkpoint", model,
        "--num-iterations", "2", "--threshold", "0", "--save-mistakes")
    mistakes = run_dirs(tmp_path)[-1] / "mistakes"
    assert json.loads((mistakes / "metadata.json").read_text()) == contract
    with Image.open(next(mistakes.glob("failure/*.png"))) as mistake, Image.open(
            next(data.glob("failure/*.png"))) as frame:
        assert mistake.size == frame.size == (160, 160)
        assert abs(np.asarray(mistake, int) - np.asarray(frame, int)).mean() < 40, "the same views"
    assert scalars(run_dirs(tmp_path)[-1])["reward_model/scored_frames"]


@pytest.mark.parametrize("flags", [["--oracle", "--num-iterations", "1"], ["--evaluate"]])
def test_without_a_reward_model_the_policy_says_its_task(tmp_path, flags):
    run("ppo_dense", tmp_path, "--env-id", "PushCube-v1", "--num-iterations", "1")
    run("ppo_resnet_reward", tmp_path, *flags, "--resume-dir", *run_dirs(tmp_path))
    _, err = run("ppo_resnet_reward", tmp_path, *flags, code=2)
    assert "--resume-dir" in err.splitlines()[-1]


def test_the_readme_s_own_task(tmp_path, monkeypatch):
    """README, "A task of your own": the module and the commands that stand there, smaller."""
    readme = (run_script.ROOT / "README.md").read_text()
    module, commands = (re.search(rf"<!-- {name} -->\n```.*\n((.*\n)*?)```", readme)[1]
                        for name in ("own task", "own task's commands"))
    (tmp_path / "my_tasks.py").write_text(module)
    assert module.count("\n") <= 25
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = dict(ppo_collect=["--target-success", "4", "--target-failure", "4", "--learning-rate", "1e-3", "--num-envs", "16",
                              "--sample-rate-fail", "0.1"],
                 train_reward_resnet=["--epochs", "1", "--epoch-frames", "16", "--input-size", "32"],
                 ppo_dense=["--num-iterations", "1"], ppo_resnet_reward=["--num-iterations", "1"])
    for line in commands.splitlines():
        _, script, *flags = shlex.split(line.replace("logs/*-ppo_dense", str(next(tmp_path.glob("logs/*-ppo_dense"), ""))))
        script = script.removeprefix("../").removesuffix(".py")
        run_script.run(script, tmp_path, *([] if script == "train_reward_resnet" else SMALL), *flags, *small[script])
    contract = json.loads((tmp_path / "data/metadata.json").read_text())
    assert contract["env_id"] == "TouchCube-v1" and contract["robot_uids"] == "panda"
    assert scalars(run_dirs(tmp_path)[-1])["reward_model/scored_frames"]

    # A file names no module, and another task than the file's is refused
    last = ["--resume-dir", *tmp_path.glob("logs/*-ppo_dense")]
    _, err = run("ppo_resnet_reward", tmp_path, "--env-id", "PushCube-v1", *last, code=2)
    assert "--env-id PushCube-v1: the reward model or the policy is of TouchCube-v1" in err.splitlines()[-1]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    args = [sys.executable, "-c", code, run_script.ROOT / "ppo_resnet_reward.py", *SMALL, *last]
    other = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True)
    assert other.returncode == 2 and "is its module in --env-id?" in other.stderr.splitlines()[-1]


@pytest.mark.parametrize("module, says", [("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"),
                                          ("def broken(:", "SyntaxError"), ("", "there is no task Own-v1 in own")])
def test_a_module_without_the_task(tmp_path, monkeypatch, module, says):
    """One line with its error."""
    (tmp_path / "own.py").write_text(module)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    _, err = run("ppo_dense", tmp_path, "--env-id", "own:Own-v1", code=2)
    assert says in err.splitlines()[-1]


@pytest.mark.parametrize("flags, says", [
    (["--robot-uids", "ur10e"], "PickCube-v1 has panda, fetch, xarm6_robotiq, so100, widowxai"),
    (["--env-id", "PickCubeSO100-v1", "--robot-uids", "panda"], "PickCubeSO100-v1 has a robot of its own"),
    (["--robot-uids", "xarm6_robotiq"], "files are missing: python -m mani_skill.utils.download_asset xarm6_robotiq"),
    (["--env-id", "PickCubeWidowXAI-v1"], "files are missing: python -m mani_skill.utils.download_asset widowxai")])
def test_robots_that_cannot_be_had(tmp_path, flags, says):
    out, err = run("ppo_dense", tmp_path, *flags, code=2)
    assert says in err.splitlines()[-1] and "y|n" not in out


@pytest.mark.parametrize("flags", [["--robot-uids", "fetch"], ["--env-id", "PickCubeSO100-v1"]])
def test_other_robots(tmp_path, flags):
    """They act, are photographed by the camera that moves with the goal, and stage 4 takes them over."""
    run("ppo_collect", tmp_path, *flags, "--num-iterations", "1", "--sample-rate-fail", "0.1")
    contract = json.loads((tmp_path / "data/metadata.json").read_text())
    assert contract["robot_uids"] == (flags[1] if flags[0] == "--robot-uids" else "") and "left" in contract["views"]
    with open(tmp_path / "data/index.csv") as f:
        assert all(0 < float(row["cube_to_goal"]) < 0.5 for row in csv.DictReader(f))
    with Image.open(next(tmp_path.glob("data/failure/*.png"))) as frame:
        red, green, blue = np.asarray(frame, int).transpose(2, 0, 1)
        assert ((green > 80) & (red < 60) & (blue < 60)).sum() > 200, "the goal is in the picture"
    model = random_reward_model(tmp_path / "model.pt")
    torch.save(torch.load(model, weights_only=True) | dict(contract=contract), model)
    run("ppo_dense", tmp_path, *flags, "--num-iterations", "1")
    run("ppo_resnet_reward", tmp_path, "--resume-dir", *tmp_path.glob("logs/*-ppo_dense"), "--reward-checkpoint", model,
        "--num-iterations", "1")


def test_reward_models_of_before(tmp_path):
    model = random_reward_model(tmp_path / "model.pt", format_version=2)
    _, err = run("ppo_resnet_reward", tmp_path, "--reward-checkpoint", model, code=2)
    assert "another version of the project: train it anew" in err.splitlines()[-1]


def test_no_reward_model(tmp_path):
    _, err = run("ppo_resnet_reward", tmp_path, code=2)
    assert "best_model.pt is not a reward model" in err.splitlines()[-1]


def test_weights_that_are_not_finite_are_refused(tmp_path):
    """Of a reward model, whose NaN would look like "not done" for ever, and of a policy."""
    model = torch.load(random_reward_model(tmp_path / "model.pt"), weights_only=True)
    model["model"]["resnet.fc.3.bias"][0] = torch.nan
    torch.save(model, tmp_path / "nan.pt")
    _, err = run("ppo_resnet_reward", tmp_path, "--reward-checkpoint", tmp_path / "nan.pt", code=2)
    assert "nan.pt is not a reward model" in err and "not finite" in err.splitlines()[-1]
    folder = dense_checkpoint(tmp_path)
    policy = torch.load(folder / "checkpoint.pt", weights_only=True)
    policy["agent"]["actor_logstd"][0, 0] = torch.inf
    torch.save(policy, folder / "checkpoint.pt")
    _, err = run("ppo_resnet_reward", tmp_path, "--reward-checkpoint", tmp_path / "model.pt", "--resume-dir", folder, code=2)
    assert "weights that are not finite" in err.splitlines()[-1]


@pytest.mark.parametrize("script", [ppo_dense, ppo_resnet_reward], ids=lambda m: m.__name__)
def test_help_names_every_flag(script):
    text, _ = run_script.run(script.__name__, ".", "--help")
    for name in script.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_shapes():
    """uint8 frames of any size in, one float32 probability each out."""
    model = RewardModel("resnet34", 32).eval()
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8))
    probs = model.predict(frames, batch_size=2)
    assert probs.shape == (5,) and probs.dtype == torch.float32 and ((probs > 0) & (probs < 1)).all()
    with pytest.raises(ValueError):
        RewardModel("resnet18", 10**9)
