"""Does all of it work on this GPU, and how fast? One command, at most eight minutes, for a fresh machine.

    python tests/gpu_check.py                             # physics, pictures and networks on the GPU
    python tests/gpu_check.py --sim-backend physx_cpu     # physics on the CPU, where PhysX's GPU library cannot be had

Prints a table, whose figures go with the card's name; exit code 1 if a row says FAILED. --out keeps the logs of all commands
and frames.png: what this GPU draws; where physics is there too, below each row the same, drawn one scene at a time.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_env import TASK, load_policy  # noqa: E402
from test_resnet_reward import dense_checkpoint  # noqa: E402

import ppo_collect  # noqa: E402
import ppo_resnet_reward  # noqa: E402

ROWS = []


def check(name: str):
    """Run the decorated function at once; a row of the table says what it returned, or how it failed."""
    def run(function):
        start = time.time()
        try:
            result = function()
        except (Exception, SystemExit) as error:  # whatever it is, the other checks go on
            result = f"FAILED: {type(error).__name__}: {str(error).strip()[-400:]}"
        ROWS.append((name, result, time.time() - start))
        print(f"{name}: {result} ({ROWS[-1][2]:.0f} s)", flush=True)
    return run


def command(name: str, *words, launcher=()):
    """Run a script in --out; returns what it printed and the peak of the GPU's memory in use (GiB) meanwhile."""
    peak, running = 0, True

    def watch():
        nonlocal peak
        while running:
            free, total = torch.cuda.mem_get_info()
            peak = max(peak, total - free)
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    done = subprocess.run([*(launcher or [sys.executable]), str(ROOT / words[0]), *map(str, words[1:])], cwd=OUT,
                          capture_output=True, text=True)
    running = False
    watcher.join()
    text = done.stdout + done.stderr
    (OUT / f"{name}.log").write_text(text)
    assert done.returncode == 0, f"exit code {done.returncode}: {text[-300:]}"
    return text, peak / 2**30


def last_number(pattern: str, text: str) -> float:
    return float(re.findall(pattern, text)[-1])


def newest_run(script: str) -> Path:
    return max((OUT / "logs").glob(f"*-{script}"), key=lambda run: run.stat().st_mtime)


def scenes(num_envs: int, sim_backend: str, camera=None):
    return ppo_collect.ManiSkillEnvs(ppo_collect.Args(sim_backend=sim_backend), TASK, num_envs, camera)


def set_state(envs, state):
    """Pose `envs` like others, whose get_state_dict() this is."""
    to = lambda x: {k: to(v) for k, v in x.items()} if isinstance(x, dict) else x.to(envs.device)  # noqa: E731
    envs.unwrapped.set_state_dict(to(state))


def roll(envs, steps: int):
    obs, _ = envs.reset(seed=0)
    for _ in range(steps):
        with torch.no_grad():
            obs, *_ = envs.step(POLICY.get_mean_action(obs))
    return obs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sim-backend", choices=("physx_cuda", "physx_cpu"), default="physx_cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"))
    ARGS = parser.parse_args()
    OUT = ARGS.out.resolve()
    OUT.mkdir(parents=True, exist_ok=True)
    POLICY = load_policy()
    on_gpu = ARGS.sim_backend == "physx_cuda"

    @check("machine")
    def machine():
        import mani_skill

        driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                                text=True).stdout.split()
        return (f"{torch.cuda.get_device_name()}, driver {driver[0]}, torch {torch.__version__}, ManiSkill "
                f"{mani_skill.__version__}, physics: {ARGS.sim_backend}")

    if on_gpu:
        @check("same states on the GPU and on the CPU")
        def parity():
            """The trained policy on the CPU; at every fifth step the GPU takes over its states and does the same action."""
            gpu, cpu = scenes(32, "physx_cuda"), scenes(32, "physx_cpu")  # PhysX on a GPU must be the first in a process
            obs, _ = cpu.reset(seed=0)
            gpu.reset(seed=0)
            differences, rewards, labels = [], [], []
            for step in range(50):
                with torch.no_grad():
                    action = POLICY.get_mean_action(obs)
                if step % 5 == 0:
                    set_state(gpu, cpu.unwrapped.get_state_dict())
                    differences.append((gpu.unwrapped.get_obs().cpu()[:, :18] - obs[:, :18]).abs().max().item())
                    _, reward, _, _, info = gpu.step(action.to(gpu.device))
                obs, cpu_reward, _, _, cpu_info = cpu.step(action)
                if step % 5 == 0:
                    rewards.append((reward.cpu() - cpu_reward).abs().mean().item())
                    labels.append((info["success"].cpu() == cpu_info["success"]).float().mean().item())
            said = (f"joints differ by {max(differences):.1e}; after one step {np.mean(labels):.1%} of the success labels "
                    f"agree, rewards differ by {np.mean(rewards):.1e}")
            assert max(differences) < 1e-3 and np.mean(labels) > 0.98 and np.mean(rewards) < 0.02, said
            return said

        @check("partial resets")
        def partial_resets():
            gpu = scenes(16, "physx_cuda")
            policy, idx = load_policy().to(gpu.device), torch.tensor([0, 3], device=gpu.device)
            obs, _ = gpu.reset(seed=0)
            for _ in range(20):
                with torch.no_grad():
                    obs, *_ = gpu.step(policy.get_mean_action(obs))
            after, _ = gpu.reset(options=dict(env_idx=idx))
            others = torch.ones(16, dtype=torch.bool)
            others[idx.cpu()] = False
            torch.testing.assert_close(after[others], obs[others], atol=1e-5, rtol=0)
            assert not torch.allclose(after[~others], obs[~others], atol=1e-2)
            return "only the scenes that begin change"

        @check("the trained policy")
        def policy_succeeds():
            gpu = scenes(256, "physx_cuda")
            metrics, _ = ppo_collect.evaluate(load_policy().to(gpu.device), gpu)
            assert metrics["success_once"] > 0.9, metrics
            return f"success_once {metrics['success_once']:.3f}, episode_len {metrics['episode_len']:.1f}"

    @check("frames")
    def frames():
        cpu = scenes(8, "physx_cpu")
        roll(cpu, 14)
        state, idx, sheet, results = cpu.unwrapped.get_state_dict(), torch.arange(8), [], []
        contract = ppo_collect.make_contract(ppo_collect.Args(meshes="stock"), TASK, cpu)
        light = dict(contract, meshes="light")
        for name, camera in (("stock", contract), ("light", light), ("film", ppo_collect.FILM_CAMERA)):
            gpu = scenes(8, ARGS.sim_backend, camera)
            gpu.reset(seed=0)
            set_state(gpu, state)
            drawn = gpu.render_frames(idx.to(gpu.device)).cpu().int()
            assert drawn.float().std() > 10 and all((drawn[0] - frame).abs().float().mean() > 0.5 for frame in drawn[1:])
            start = time.time()
            for _ in range(10):
                gpu.render_frames(idx.to(gpu.device)).cpu()
            per_frame, row = (time.time() - start) / 80 * 1000, [drawn]
            results.append(f"{name}: {per_frame:.1f} ms a frame")
            if on_gpu:
                other = scenes(8, "physx_cpu", camera)
                other.reset(seed=0)
                set_state(other, state)
                row.append(other.render_frames(idx).cpu().int())
                difference = (row[1] - drawn).abs().float().mean()
                assert difference < 2, f"{name}: {difference:.2f} of 255 from one scene's at a time"
                results[-1] += f", {difference:.2f} of 255 from one scene's at a time"
            sheet += [torch.cat(list(frames[:4]), 1) for frames in row]
        Image.fromarray(torch.cat(sheet).numpy().astype(np.uint8)).save(OUT / "frames.png")
        return "; ".join(results)

    @check("scoring")
    def scoring():
        model = ppo_resnet_reward.RewardModel("resnet18", 128).cuda()
        frames = torch.randint(0, 256, (256, 224, 224, 3), dtype=torch.uint8, device="cuda")
        model.predict(frames)
        torch.cuda.synchronize()
        start = time.time()
        for _ in range(10):
            model.predict(frames)
        torch.cuda.synchronize()
        return f"ResNet-18 scores {2560 / (time.time() - start):,.0f} frames/s of 224x224"

    # A stage's first run starts from tests/policy.pt, which succeeds: so a few global steps do all that the stage ever does
    sim = ["--sim-backend", ARGS.sim_backend]
    dense, rate = dense_checkpoint(OUT / str(int(time.time()))), r"([\d.]+) env steps/s"

    @check("stage 1")
    def stage_1():
        text, peak = command("stage_1", "ppo_collect.py", *sim, "--resume-dir", dense, "--num-iterations", 16,
                             "--target-success", 1500, "--target-failure", 1500, "--learning-rate", 1e-5)
        metadata, rows = json.loads((OUT / "data/metadata.json").read_text()), (OUT / "data/index.csv").read_text()
        assert metadata["env_id"] == TASK["env_id"] and min(rows.count("success/"), rows.count("failure/")) > 50
        return f"{last_number(rate, text):,.0f} env steps/s, {rows.count('.png'):,} frames, {peak:.1f} GiB"

    @check("stage 1, continued")
    def stage_1_continued():
        before = len(list((OUT / "data").glob("*/*.png")))
        command("stage_1_continued", "ppo_collect.py", *sim, "--resume-dir", newest_run("ppo_collect"), "--num-iterations", 20,
                "--target-success", 1500, "--target-failure", 1500, "--learning-rate", 1e-5)
        assert len(list((OUT / "data").glob("*/*.png"))) > before
        return "goes on in the same folders"

    @check("stage 2")
    def stage_2():
        text, peak = command("stage_2", "train_reward_resnet.py", "--epochs", 4)
        epochs = re.findall(r"epoch \d+: (\d+) frames, .*, ([\d.]+) s", text)
        fastest = max(int(frames) / float(seconds) for frames, seconds in epochs)
        return (f"{fastest:,.0f} frames/s in the fastest epoch, held-out accuracy "
                f"{last_number(r'accuracy ([0-9.]+), ', text):.3f}, {peak:.1f} GiB")

    @check("stage 2's limit")
    def limit():
        """The same network and batch, with nothing to load or augment."""
        model = ppo_resnet_reward.RewardModel("resnet18", 128).cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters())
        x = torch.rand(32, 128, 128, 3, device="cuda")
        for step in range(60):
            if step == 10:
                torch.cuda.synchronize()
                start = time.time()
            with torch.autocast("cuda", torch.bfloat16):
                logits, cm = model(x)
            optimizer.zero_grad()
            (logits.mean() + cm.mean()).backward()
            optimizer.step()
        torch.cuda.synchronize()
        return f"{32 * 50 / (time.time() - start):,.0f} frames/s"

    @check("the GPU's reward model on a CPU")
    def cross_models():
        accuracies = []
        for where, env in (("gpu", {}), ("cpu", dict(CUDA_VISIBLE_DEVICES=""))):
            with patch.dict(os.environ, env):
                command(f"evaluate_{where}", "train_reward_resnet.py", "--evaluate", "reward_checkpoints/best_model.pt",
                        "--save-dir", where)
            report, = (OUT / where).glob("report*.json")
            accuracies.append(json.loads(report.read_text())["accuracy"])
        assert abs(accuracies[0] - accuracies[1]) < 0.01, accuracies
        return f"accuracy {accuracies[0]:.4f} on the GPU, {accuracies[1]:.4f} on the CPU"

    @check("stage 3")
    def stage_3():
        text, peak = command("stage_3", "ppo_dense.py", *sim, "--num-iterations", 5)
        return f"{last_number(rate, text):,.0f} env steps/s, {peak:.1f} GiB"

    @check("stage 3 under torchrun, continued")
    def stage_3_torchrun():
        ranks = max(torch.cuda.device_count(), 1 if on_gpu else 2)  # with physics on the CPU two may share a GPU
        command("stage_3_torchrun", "ppo_dense.py", *sim, "--num-iterations", 7, "--resume-dir", newest_run("ppo_dense"),
                launcher=[sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"])
        return f"{ranks} ranks on {torch.cuda.device_count()} GPUs"

    @check("stage 4")
    def stage_4():
        text, peak = command("stage_4", "ppo_resnet_reward.py", *sim, "--resume-dir", dense, "--num-iterations", 5,
                             "--critic-warmup", 2, "--save-mistakes")
        success = last_number(r"eval/success_once ([0-9.]+)", text)
        assert success > 0.8, f"the trained policy is down to {success}"
        return f"{last_number(rate, text):,.0f} env steps/s, {peak:.1f} GiB, success {success:.3f}"

    @check("stage 4, continued; every frame scored")
    def stage_4_continued():
        command("stage_4_continued", "ppo_resnet_reward.py", *sim, "--resume-dir", newest_run("ppo_resnet_reward"),
                "--num-iterations", 6, "--use-soft-reward")
        return "goes on"

    if on_gpu:
        @check("the GPU's frames and reward model with physics on the CPU")
        def cross_physics():
            cpu = ["--sim-backend", "physx_cpu", "--meshes", "stock"]
            command("cross_stage_1", "ppo_collect.py", *cpu, "--resume-dir", dense, "--num-iterations", 1, "--num-envs", 16,
                    "--save-dir", "data_cpu", "--num-eval-envs", 16)
            command("cross_evaluate", "train_reward_resnet.py", "--evaluate", "reward_checkpoints/best_model.pt",
                    "--data-path", "data_cpu", "--save-dir", "cross")
            command("cross_stage_4", "ppo_resnet_reward.py", *cpu[:2], "--resume-dir", dense, "--num-iterations", 1,
                    "--num-envs", 16, "--num-eval-envs", 16)
            return "both ways"

    print("\n| check | result | s |\n|---|---|---|")
    for name, result, seconds in ROWS:
        print(f"| {name} | {result} | {seconds:.0f} |")
    sys.exit(any(result.startswith("FAILED") for _, result, _ in ROWS))
