"""How fast is PickCubeCPU? Everything side by side in one run, because these figures drift with the machine.

    python tests/bench_env.py

1. One core: PickCubeCPU, one stock ManiSkill scene, and physics alone (nothing but the px.step() calls of the same
   trajectories). Resets count. Two policies drive: that of tests/policy.pt, so that gripper, cube and table touch, and an
   untrained one, which waves the arm about.
2. All cores: PickCubeCPU in one process a core, against gymnasium's AsyncVectorEnv of stock scenes (CPUGymWrapper).
3. Milliseconds a rendered frame, PickCubeCPU and stock, and what is left of it without the robot's and all meshes.
"""
import argparse
import multiprocessing as mp
import os
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ppo_collect  # noqa: E402
from ppo_collect import Agent, PickCubeCPU, StockEnvs, make_stock  # noqa: E402

POLICY = Path(__file__).with_name("policy.pt")


def load_policy(trained=True):
    agent = Agent(42, 8)
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


class PhysicsAlone(PickCubeCPU):
    """Times the px.step() calls of PickCubeCPU, with a clock around each scene's five."""

    physics = 0.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for scene in self._scenes:
            scene["px"] = TimedPhysics(scene["px"], self)


class TimedPhysics:
    def __init__(self, px, owner):
        self.px, self.owner, self.get_contacts = px, owner, px.get_contacts

    def step(self):
        start = time.perf_counter()
        self.px.step()
        self.owner.physics += time.perf_counter() - start


def one_core(num_envs, rounds, trained):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = load_policy(trained)
    ours, timed = PickCubeCPU(num_envs), PhysicsAlone(num_envs)
    stock = StockEnvs(make_stock("PickCube-v1", 1, "pd_joint_delta_pos", "physx_cpu"), True)
    ours_obs, timed_obs, stock_obs = ours.reset(seed=0)[0], timed.reset(seed=0)[0], stock.reset(seed=0)[0]
    totals = np.zeros(3)
    ratios = []
    for _ in range(rounds):
        state = torch.get_rng_state()
        ours_obs, a = drive(ours, policy, ours_obs, 50)
        torch.set_rng_state(state)  # the very same trajectories
        timed.physics = 0.0
        timed_obs, _ = drive(timed, policy, timed_obs, 50)
        stock_steps = 50 * max(1, num_envs // 8)
        stock_obs, b = drive(stock, policy, stock_obs, stock_steps)
        rates = np.array([num_envs * 50 / a, stock_steps / b, num_envs * 50 / timed.physics])
        ratios.append((rates[0] / rates[1], rates[0] / rates[2], rates[2] / rates[1]))
        totals += rates / rounds
    assert torch.equal(ours_obs, timed_obs), "the trajectories were not the same"
    to_stock, to_physics, bound = np.median(ratios, axis=0)
    print(f"one core, {num_envs} scenes, {rounds} rounds of 50 steps, {'in contact' if trained else 'free motion'}")
    print(f"  PickCubeCPU        {totals[0]:7.0f} steps/s")
    print(f"  stock, one scene   {totals[1]:7.0f} steps/s   PickCubeCPU is {to_stock:.1f}x as fast")
    print(f"  physics alone      {totals[2]:7.0f} steps/s   PickCubeCPU reaches {to_physics:.2f} of it "
          f"({bound:.1f}x stock: the most there is)")


def rank(num_envs, steps, seed, barrier, queue):
    torch.set_num_threads(1)
    policy, envs = load_policy(), PickCubeCPU(num_envs)
    torch.manual_seed(seed)
    obs, _ = drive(envs, policy, envs.reset(seed=seed)[0], 10)
    barrier.wait()
    start = time.perf_counter()
    drive(envs, policy, obs, steps)
    queue.put(num_envs * steps / (time.perf_counter() - start))


def make_wrapped():
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    torch.set_num_threads(1)
    return CPUGymWrapper(make_stock("PickCube-v1", 1, "pd_joint_delta_pos", "physx_cpu"))


def all_cores(num_envs, rounds):
    cores, context = len(os.sched_getaffinity(0)), mp.get_context("spawn")
    policy, ours, theirs = load_policy(), [], []
    for seed in range(rounds):
        barrier, queue = context.Barrier(cores), context.Queue()
        workers = [context.Process(target=rank, args=(num_envs, 100, seed * cores + r, barrier, queue)) for r in range(cores)]
        for worker in workers:
            worker.start()
        ours.append(sum(queue.get() for _ in workers))
        for worker in workers:
            worker.join()
        envs = gym.vector.AsyncVectorEnv([make_wrapped] * (4 * cores), context="spawn")
        obs, _ = envs.reset(seed=0)
        start = time.perf_counter()
        for _ in range(100):
            obs = envs.step(act(policy, torch.from_numpy(obs)).numpy())[0]
        theirs.append(4 * cores * 100 / (time.perf_counter() - start))
        envs.close()
    print(f"{cores} cores, policy included")
    print(f"  PickCubeCPU, a process a core, {num_envs} scenes each   {np.median(ours):7.0f} steps/s")
    print(f"  AsyncVectorEnv of {4 * cores} stock scenes                    {np.median(theirs):7.0f} steps/s   "
          f"PickCubeCPU is {np.median(np.divide(ours, theirs)):.1f}x as fast")


def rendering(size, frames=40):
    import sapien

    camera = dict(views=ppo_collect.CAMERA, width=size, height=size, shader_pack="minimal")
    ours = PickCubeCPU(1, camera=camera)
    stock = StockEnvs(make_stock("PickCube-v1", 1, "pd_joint_delta_pos", "physx_cpu", camera), True)
    policy, obs = load_policy(), ours.reset(seed=0)[0]
    stock.reset(seed=0)
    meshes = [(entity.name, entity.find_component_by_type(sapien.render.RenderBodyComponent))
              for entity in stock.unwrapped.scene.sub_scenes[0].entities]
    meshes = [(name, body) for name, body in meshes if body]

    def stock_without(hidden):
        def render():
            for name, body in meshes:
                body.visibility = float(not hidden(name))
            stock.render_frames(torch.tensor([0]))
        return render

    cases = {"PickCubeCPU": lambda: ours.render_frames(torch.tensor([0])),
             "stock": stock_without(lambda name: False),
             "stock without the robot's meshes": stock_without(lambda name: name.startswith("panda_")),
             "stock without any mesh": stock_without(lambda name: True)}
    times = {name: [] for name in cases}
    for _ in range(frames):
        action = act(policy, obs)
        obs = ours.step(action)[0]
        stock.step(action)
        for name, render in cases.items():
            start = time.perf_counter()
            render()
            times[name].append(1000 * (time.perf_counter() - start))
    print(f"a frame of {size}x{size}, in milliseconds (median of {frames})")
    for name, values in times.items():
        print(f"  {name:35}{np.median(values[5:]):6.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-envs", type=int, default=32, help="scenes in one process")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-render", action="store_true", help="skip part 3, which needs a Vulkan driver")
    options = parser.parse_args()
    for trained in (True, False):
        one_core(options.num_envs, options.rounds, trained)
    all_cores(options.num_envs, max(1, options.rounds // 2))
    if not options.no_render:
        for size in (224, 112):
            rendering(size)
