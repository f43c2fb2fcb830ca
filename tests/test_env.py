"""PickCubeCPU against stock ManiSkill, number by number.

policy.pt is a checkpoint of `python ppo_collect.py` without its optimizer; it grasps the cube, so that contacts are tested.
"""
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import mani_skill.envs  # noqa: F401
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import ppo_collect  # noqa: E402
from ppo_collect import Agent, PickCubeCPU, StockEnvs, compute_gae  # noqa: E402

TOLERANCE = 1e-5
CAMERA = dict(views=ppo_collect.CAMERA, width=224, height=224, shader_pack="minimal")


def make_stock(**kwargs):
    return gym.make("PickCube-v1", num_envs=1, obs_mode="state", control_mode="pd_joint_delta_pos", sim_backend="physx_cpu",
                    **dict(dict(render_backend="none"), **kwargs))


def load_policy():
    agent = Agent(42, 8)
    agent.load_state_dict(torch.load(ROOT / "tests" / "policy.pt", weights_only=True)["agent"])
    return agent


class Pair:
    """N scenes of PickCubeCPU and N stock environments in lockstep; every step and reset asserts that they agree."""

    def __init__(self, num_envs, seed, **kwargs):
        self.envs = PickCubeCPU(num_envs, **kwargs)
        self.stock = [make_stock() for _ in range(num_envs)]
        self.obs, info = self.envs.reset(seed=seed)
        # ManiSkill's convention: the first scene gets the seed itself, the others draws from it.
        seeds = [seed, *np.random.RandomState(seed).randint(2**31, size=num_envs - 1)]
        results = [stock.reset(seed=int(s)) for stock, s in zip(self.stock, seeds)]
        self.compare(torch.cat([r[0] for r in results]), [r[1] for r in results], info)

    def compare(self, stock_obs, stock_infos, info):
        torch.testing.assert_close(self.obs, stock_obs, atol=TOLERANCE, rtol=0)
        assert self.obs.dtype == torch.float32 and self.obs.shape == (self.envs.num_envs, 42)
        for key in ("success", "is_obj_placed", "is_robot_static", "is_grasped"):
            assert torch.equal(info[key], torch.cat([s[key] for s in stock_infos])), key

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.envs.step(action)
        results = [stock.step(action[i:i + 1]) for i, stock in enumerate(self.stock)]
        self.compare(torch.cat([r[0] for r in results]), [r[4] for r in results], info)
        torch.testing.assert_close(reward, torch.cat([r[1] for r in results]), atol=TOLERANCE, rtol=0)
        assert torch.equal(terminated, torch.cat([r[2] for r in results]))
        assert torch.equal(truncated, torch.cat([r[3] for r in results]))
        return terminated | truncated, info

    def reset(self, idx):
        """Both draw the new episodes from torch's generator: give both the same one."""
        state = torch.get_rng_state()
        self.obs, _ = self.envs.reset(options=dict(env_idx=idx))
        torch.set_rng_state(state)
        for i in idx.tolist():
            stock_obs, _ = self.stock[i].reset()
            torch.testing.assert_close(self.obs[i:i + 1], stock_obs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("seed", [0, 7, 12345])
def test_random_episodes(seed):
    torch.manual_seed(seed)
    pair = Pair(3, seed)
    ended = 0
    for _ in range(110):
        done, _ = pair.step(torch.rand(3, 8) * 2.4 - 1.2)  # beyond the action space too: both clip
        ended += done.sum()
        if done.any():
            pair.reset(done.nonzero().squeeze(-1))
    assert ended >= 6


@pytest.mark.parametrize("seed", [1, 2])
def test_grasping_episodes(seed):
    """The policy grasps, lifts and places the cube; scenes that succeed are reset on their own."""
    torch.manual_seed(seed)
    pair, policy = Pair(4, seed), load_policy()
    grasped = successes = 0
    lifted = 0.0
    for _ in range(100):
        with torch.no_grad():
            done, info = pair.step(policy.get_action_and_logprob(pair.obs)[0])
        grasped += info["is_grasped"].sum()
        successes += info["success"].sum()
        lifted = max(lifted, (pair.obs[:, 31] * info["is_grasped"]).max().item())  # height of a cube in the gripper
        if done.any():
            pair.reset(done.nonzero().squeeze(-1))
    assert grasped >= 20 and successes >= 2 and lifted > 0.1


def test_scripted_contacts():
    """The gripper is driven onto the table and the cube, open and closed, from all sides: contacts without a grasp too."""
    torch.manual_seed(0)
    pair = Pair(6, 3)
    touched = 0
    for t in range(150):
        towards = pair.obs[:, 36:39]  # cube minus tcp
        action = torch.rand(6, 8) * 0.6 - 0.3
        action[:, 0] += torch.atan2(pair.obs[:, 30], pair.obs[:, 29] + 0.615).sub(pair.obs[:, 0]) * 5
        action[:, 1] += 0.6 - 2 * (towards[:, 2] > -0.01)
        action[:, 3] -= 0.2
        action[:, 7] = 1.0 if t // 15 % 2 else -1.0
        done, _ = pair.step(action)
        touched += (pair.envs._finger_impulse != 0).any()
        if done.any():
            pair.reset(done.nonzero().squeeze(-1))
    assert touched > 10


def test_partial_resets_leave_the_others_alone():
    pair = Pair(4, 5)
    for t in range(60):
        pair.step(torch.rand(4, 8) * 2 - 1)
        if t % 7 == 3:
            before = pair.obs.clone()
            pair.reset(torch.tensor([t % 4]))
            others = [i for i in range(4) if i != t % 4]
            assert torch.equal(pair.obs[others], before[others])


@pytest.mark.parametrize("show_goal_site", [True, False])
def test_frames_equal_the_stock_cameras(show_goal_site):
    torch.manual_seed(0)
    pair = Pair(2, 11, camera=CAMERA, show_goal_site=show_goal_site)
    views = []  # a stock environment a view
    for view in CAMERA["views"].values():
        pose = [*(pair.obs[0, 26:29] + torch.tensor(view["pose"][:3])).tolist(), *view["pose"][3:]]  # relative to the goal
        camera = dict(pose=pose, fov=view["fov"], width=224 // len(CAMERA["views"]), height=224, shader_pack="minimal")
        views.append(StockEnvs(make_stock(render_backend="cpu", human_render_camera_configs=dict(render_camera=camera)),
                               show_goal_site))
        views[-1].reset(seed=11)
    greens = []
    for t in range(25):
        action = torch.rand(2, 8) * 2 - 1
        pair.step(action)
        for stock in views:
            stock.step(action[:1])
        if t % 6 == 0:
            frames = pair.envs.render_frames(torch.tensor([1, 0]))
            assert frames.shape == (2, 224, 224, 3) and frames.dtype == torch.uint8
            # The joints' last bit is lost when the studio is posed: a pixel or two on the edges of the robot may differ.
            expected = torch.cat([stock.render_frames(torch.tensor([0]))[0] for stock in views], 1)
            difference = (frames[1].int() - expected.int()).abs()
            assert (difference.amax(-1) > 1).sum() <= 3 and (difference.amax(-1) > 0).sum() <= 10
            assert not torch.equal(frames[0], frames[1])
            r, g, b = frames[1].int().unbind(-1)
            greens.append(((g > 100) & (r < 80) & (b < 80)).sum().item())
    assert (max(greens) > 20) == show_goal_site


def test_without_vulkan():
    """State-only scenes need no Vulkan driver; with a camera the program says what to install."""
    env = dict(os.environ, VK_DRIVER_FILES="/nonexistent.json", VK_ICD_FILENAMES="/nonexistent.json")
    code = "import torch, ppo_collect as p; e = p.PickCubeCPU(2); e.reset(seed=0); e.step(torch.zeros(2, 8)); print('stepped')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "stepped" in result.stdout, result.stderr


def test_gae():
    """Against the definition: the discounted sum of TD errors up to the end of the episode."""
    torch.manual_seed(0)
    rewards, values, next_values = torch.rand(3, 20, 5)
    dones = torch.rand(20, 5) < 0.2
    terminal = dones & (torch.rand(20, 5) < 0.5)
    advantages = compute_gae(rewards, values, next_values, terminal, dones, 0.8, 0.9)
    for n in range(5):
        for t in range(20):
            expected, k = 0.0, t
            while True:
                bootstrap = 0.0 if terminal[k, n] else 0.8 * next_values[k, n]
                expected += (0.8 * 0.9) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
                if dones[k, n] or k == 19:
                    break
                k += 1
            assert abs(advantages[t, n] - expected) < 1e-5


def test_observation_normalization():
    """Mean and standard deviation over all batches so far; what never changes stays finite."""
    torch.manual_seed(0)
    agent, batches = Agent(4, 2), [torch.randn(50, 8, 4) * torch.tensor([0.1, 3.0, 20.0, 0.0]) + 5 for _ in range(3)]
    before = agent.get_mean_action(batches[0])
    assert torch.equal(before, agent.actor_mean(batches[0].clamp(-10, 10))), "only clipped before the first rollout"
    for batch in batches:
        agent.update_normalization(batch)
    seen = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(agent.obs_mean, seen.mean(0))
    torch.testing.assert_close(agent.obs_std[:3], seen.std(0, correction=0)[:3], rtol=1e-4, atol=0)
    normalized = agent.normalize(seen)
    assert normalized.abs().max() < 10 and torch.allclose(normalized[:, 3], torch.zeros(1))
    again = Agent(4, 2)
    again.load_state_dict(agent.state_dict())
    again.update_normalization(batches[0] + 1)
    agent.update_normalization(batches[0] + 1)
    assert torch.equal(again.obs_mean, agent.obs_mean), "a checkpoint goes on counting where it stopped"
