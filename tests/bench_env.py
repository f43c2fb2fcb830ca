"""How fast are the scenes on a CPU? Everything side by side in one run, because these figures drift with the machine.

    python tests/bench_env.py

1. One core, three tasks: our scenes, one stock ManiSkill scene, and physics alone (the time of the same trajectories that is
   spent in PhysX). Resets count. PickCube is driven by the policy of tests/policy.pt, so that gripper, cube and table touch,
   and, as the others, by an untrained one, which waves the arm about.
2. All cores: our scenes in one process a core, against gymnasium's AsyncVectorEnv of stock scenes (CPUGymWrapper).
3. Milliseconds a rendered frame of PickCube: the frame camera and ManiSkill's own, with light and stock meshes.
"""
import argparse
import multiprocessing as mp
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import gymnasium as gym  # noqa: E402
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from ppo_collect import CAMERAS, FILM_CAMERA, Agent, Args, ManiSkillEnvs, find_task  # noqa: E402

POLICY = Path(__file__).with_name("policy.pt")


def make(env_id, num_envs, camera=None):
    task = find_task(env_id, "", "pd_joint_delta_pos")
    return ManiSkillEnvs(Args(sim_backend="physx_cpu"), task, num_envs, camera)


def make_stock(env_id):
    return gym.make(env_id, num_envs=1, obs_mode="state", reward_mode="normalized_dense", control_mode="pd_joint_delta_pos",
                    sim_backend="physx_cpu", render_backend="none")


def make_policy(envs, trained):
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    if trained:
        agent.load_state_dict(torch.load(POLICY, weights_only=True)["agent"])
    return agent


def act(policy, obs):
    with torch.no_grad():
        return policy.get_action_and_logprob(obs)[0]


def drive(envs, policy, obs, steps):
    """Step and reset for `steps` steps; returns (last obs, seconds spent in the environment)."""
    spent = 0.0
    for _ in range(steps):
        action = act(policy, obs)
        start = time.perf_counter()
        obs, _, terminated, truncated, _ = envs.step(action)
        done = terminated | truncated
        if done.any():
            obs, _ = envs.reset(options=dict(env_idx=done.nonzero().squeeze(-1)))
        spent += time.perf_counter() - start
    return obs, spent


class TimedPhysics:
    """A PhysX system with a clock around its steps."""

    def __init__(self, px, clock):
        self.px, self.clock, self.get_contacts = px, clock, px.get_contacts

    def step(self):
        start = time.perf_counter()
        self.px.step()
        self.clock[0] += time.perf_counter() - start


def one_core(env_id, num_envs, rounds, trained):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, timed, stock = make(env_id, num_envs), make(env_id, num_envs), make_stock(env_id)
    clock, px = [0.0], timed.unwrapped.scene.px
    px.systems = [TimedPhysics(system, clock) for system in px.systems]
    policy, results = make_policy(ours, trained), []
    ours_obs, timed_obs, stock_obs = ours.reset(seed=0)[0], timed.reset(seed=0)[0], stock.reset(seed=0)[0]
    for _ in range(rounds):
        state = torch.get_rng_state()
        ours_obs, a = drive(ours, policy, ours_obs, 25)
        torch.set_rng_state(state)  # the very same trajectories
        clock[0] = 0.0
        timed_obs, _ = drive(timed, policy, timed_obs, 25)
        stock_steps = 25 * max(1, num_envs // 8)
        stock_obs, b = drive(stock, policy, stock_obs, stock_steps)
        results.append((num_envs * 25 / a, stock_steps / b, num_envs * 25 / clock[0]))
    assert torch.equal(ours_obs, timed_obs), "the trajectories were not the same"
    (a, b, c), ratios = np.median(results, axis=0), np.array(results)
    print(f"| {env_id}, {'trained policy' if trained else 'untrained policy'} | {num_envs} | {a:.0f} | {b:.0f} | {c:.0f} | "
          f"{np.median(ratios[:, 0] / ratios[:, 1]):.1f} | {np.median(ratios[:, 0] / ratios[:, 2]):.2f} |", flush=True)


def rank(num_envs, steps, seed, barrier, queue):
    torch.set_num_threads(1)
    envs = make("PickCube-v1", num_envs)
    policy = make_policy(envs, True)
    torch.manual_seed(seed)
    obs, _ = drive(envs, policy, envs.reset(seed=seed)[0], 10)
    barrier.wait()
    start = time.perf_counter()
    drive(envs, policy, obs, steps)
    queue.put(num_envs * steps / (time.perf_counter() - start))


def make_wrapped():
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    torch.set_num_threads(1)
    return CPUGymWrapper(make_stock("PickCube-v1"))


def all_cores(num_envs, rounds):
    cores, context = len(os.sched_getaffinity(0)), mp.get_context("spawn")
    ours, theirs = [], []
    for seed in range(rounds):
        barrier, queue = context.Barrier(cores), context.Queue()
        workers = [context.Process(target=rank, args=(num_envs, 100, seed * cores + r, barrier, queue)) for r in range(cores)]
        for worker in workers:
            worker.start()
        ours.append(sum(queue.get() for _ in workers))
        for worker in workers:
            worker.join()
        envs = gym.vector.AsyncVectorEnv([make_wrapped] * (4 * cores), context="spawn")
        policy, (obs, _) = make_policy(envs, True), envs.reset(seed=0)
        start = time.perf_counter()
        for _ in range(100):
            obs = envs.step(act(policy, torch.from_numpy(obs)).numpy())[0]
        theirs.append(4 * cores * 100 / (time.perf_counter() - start))
        envs.close()
    print(f"\nOn all cores ({cores}), PickCube, trained policy included: {np.median(ours):.0f} steps/s with a process a core, "
          f"{num_envs} scenes each; AsyncVectorEnv of {4 * cores} stock scenes {np.median(theirs):.0f} steps/s; ratio "
          f"{np.median(np.divide(ours, theirs)):.1f}")


def rendering(frames=30):
    frames_of = dict(width=224, height=224, views=CAMERAS["goal"], show_goal_site=True)
    cameras = {"frames of 224x224, two views": frames_of, "a film's, of the whole scene": FILM_CAMERA}
    envs = {(name, meshes): make("PickCube-v1", 1, dict(camera, meshes=meshes))
            for name, camera in cameras.items() for meshes in ("light", "stock")}
    times = {key: [] for key in envs}
    for env in envs.values():
        env.reset(seed=0)
    for _ in range(frames):
        action = torch.rand(1, 8) * 2 - 1
        for key, env in envs.items():
            env.step(action)
            start = time.perf_counter()
            env.render_frames(torch.tensor([0]))
            times[key].append(1000 * (time.perf_counter() - start))
    print(f"\nmilliseconds a frame (median of {frames - 5})\n\n| | light meshes | stock meshes | ratio |\n|---|---|---|---|")
    for name in cameras:
        light, stock = (np.array(times[name, meshes][5:]) for meshes in ("light", "stock"))
        print(f"| {name} | {np.median(light):.1f} | {np.median(stock):.1f} | {np.median(stock / light):.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, nargs="+", default=[64, 128], help="scenes in one process")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-render", action="store_true", help="skip part 3, which needs a Vulkan driver")
    options = parser.parse_args()
    print("| one core, resets included | scenes | steps/s | one stock scene | physics alone | to stock | to physics |")
    print("|---|---|---|---|---|---|---|")
    for num_envs in options.num_envs:
        one_core("PickCube-v1", num_envs, options.rounds, True)
    for env_id in ("PickCube-v1", "PushCube-v1", "StackCube-v1"):
        one_core(env_id, options.num_envs[0], options.rounds, False)
    all_cores(options.num_envs[0], max(1, options.rounds // 3))
    if not options.no_render:
        rendering()
