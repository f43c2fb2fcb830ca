"""Stage 4: train stage 3's policy on with stage 2's ResNet as its only reward.

    reads   reward_checkpoints/best_model.pt, which says what the task is and
            how pictures are taken; a checkpoint of ppo_dense.py
    writes  logs/<timestamp>-ppo_resnet_reward/  TensorBoard events, args.json,
            videos/, checkpoints/global_step_<N>/

    python ppo_resnet_reward.py --resume-dir logs/*-ppo_dense
"""
import atexit
import contextlib
import csv
import ctypes
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import signal
import socket
import sys
import time
import traceback
from collections import defaultdict, deque
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NewType, Optional
from unittest.mock import patch

import gymnasium as gym
import imageio
import numpy as np
import sapien
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
import tyro
from PIL import Image
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

SCRIPT, GPU = Path(__file__).stem, torch.cuda.is_available()
RANKS = [os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")]
RANK, LOCAL_RANK, WORLD_SIZE, TORCHRUN = map(int, RANKS) if all(RANKS) else (0, 0, 1, 0)  # or start_ranks sets them
DEVICE = torch.device(f"cuda:{LOCAL_RANK % torch.cuda.device_count()}" if GPU else "cpu")
BACKENDS = ("physx_cuda", "physx_cpu") if GPU else ("physx_cpu",)
Share = NewType("Share", float)  # a number between 0 and 1


@dataclass
class Args:
    seed: int = 1  # of the scenes and the policy; evaluation has its own
    env_id: str = ""  # module:Task-v1, to import a module
    sim_backend: Literal[BACKENDS] = BACKENDS[0]  # where physics runs
    num_procs: int = field(default_factory=lambda: min(usable_cores(), 4))  # a CPU's ranks share the scenes
    log_dir: str = "logs"  # parent of the runs' folders
    resume_dir: tuple[str, ...] = ()  # runs or checkpoints; the newest goes on
    evaluate: bool = False  # only evaluate the checkpoint in --resume-dir

    num_envs: int = 64  # parallel scenes of all processes
    num_steps: int = 50  # of every scene in one rollout
    num_iterations: int = 120  # global steps, each a rollout and an update
    num_minibatches: int = 8  # in an update epoch
    update_epochs: int = 8  # passes over a rollout's data
    learning_rate: float = 2.5e-4  # Adam's step size, at first
    logstd_learning_rate: float = 2.5e-3  # of the policy's noise
    anneal_lr: bool = True  # lower the step sizes to 0 over the run
    gamma: Share = 0.95  # discount factor per step; --done-by time wants 0.99
    gae_lambda: Share = 0.95  # lambda of GAE (arXiv:1506.02438)
    clip_coef: Share = 0.3  # PPO's clipping range (arXiv:1707.06347)
    target_kl: float = 0.1  # mean KL of an epoch in nats that ends the policy's update
    action_l2: float = 0.005  # weight of the mean action's square
    eval_freq: int = 40  # global steps between evaluations
    num_eval_envs: int = 128  # evaluation episodes of all processes
    save_interval: int = 20  # global steps between checkpoints
    capture_video: bool = True  # film the first evaluation scenes, into videos/

    reward_checkpoint: str = "reward_checkpoints/best_model.pt"  # stage 2's reward model
    reward_mode: Literal["replace", "add"] = "replace"  # or added to the dense one
    alpha: float = 1.0  # factor of the ResNet's reward
    threshold: Share = 0.8  # probability above which a frame counts as done
    use_soft_reward: bool = False  # the reward is the probability itself
    reward_render_mode: Literal["episode_end", "always"] = "episode_end"  # frames to score; others earn 0
    critic_warmup: int = 5  # first global steps: only the critic learns
    done_by: Literal["simulator", "resnet", "time"] = "simulator"  # who ends episodes early
    score_every: int = 5  # steps between frames that --done-by resnet looks at
    oracle: bool = False  # control: the simulator's verdict
    save_mistakes: bool = False  # frames that the ResNet got wrong, into mistakes/


class RewardModel(nn.Module):
    """Says of a frame how sure it is that the task is done. Three more outputs, the vector from the cube to
    the goal, sharpen the first (stage 2, --to-goal-weight)."""

    def __init__(self, arch: str, input_size: int, weights: Optional[str] = None):
        super().__init__()
        if arch not in ("resnet18", "resnet34", "resnet50") or not 32 <= input_size <= 1024:
            raise ValueError(f"no such reward model: {arch} of {input_size} pixels")
        self.input_size = input_size
        self.resnet = torchvision.models.get_model(arch, weights=weights)
        self.resnet.avgpool = nn.AdaptiveAvgPool2d(4)  # not 1: where things are is what matters
        self.resnet.fc = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(self.resnet.fc.in_features * 4 * 4, 256), nn.ReLU(), nn.Linear(256, 4))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)  # ImageNet's
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)

    def scale(self, frames):
        """(K, H, W, 3) uint8 -> (K, input_size, input_size, 3) uint8."""
        return resize(frames.permute(0, 3, 1, 2), [self.input_size] * 2, antialias=True).permute(0, 2, 3, 1)

    def forward(self, frames):
        """(K, S, S, 3) in [0, 255] -> (K,) float32 logits, (K, 3) float32 cm. NHWC is channels_last."""
        outputs = self.resnet((frames.permute(0, 3, 1, 2).float() - self.mean) / self.std).float()
        return outputs[:, 0], outputs[:, 1:]

    @torch.inference_mode()
    def predict(self, frames, batch_size: int = 64):
        """(K, H, W, 3) uint8 frames of any size -> (K,) float32 probabilities of being done."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are uint8, not {frames.dtype}")
        device = self.mean.device
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device.type)):
            return torch.cat([self(self.scale(f.to(device)))[0].sigmoid() for f in frames.split(batch_size)])


def resnet_reward(reward_model, envs, env_reward, success, scored, args):
    """Stage 4's reward: look at the scenes `scored` (K,) and pay for those that look done.

    `env_reward` (N,) is used by --reward-mode add alone, the simulator's `success` (N,) by --oracle. Returns
    reward (N,) float32, probs (K,) float32 that the task is done, frames (K, H, W, 3) uint8 or None.
    """
    reward = env_reward.clone() if args.reward_mode == "add" else torch.zeros_like(env_reward)
    frames = envs.render_frames(scored) if len(scored) and not args.oracle else None
    probs = success[scored].float() if frames is None else reward_model.predict(frames).to(reward.device)
    reward[scored] += args.alpha * (probs if args.use_soft_reward else (probs > args.threshold).float())
    return reward, probs, frames


class Audit:
    """What the simulator says of the ResNet's verdicts: counts, and frames that it got wrong."""
    COUNTS = ("true_positives", "false_positives", "false_negatives", "true_negatives")

    def __init__(self, args: Args, contract: Optional[dict], num_envs: int, device):
        self.args, self.contract, self.rows, self.new = args, contract, [], []
        self.latest = deque(maxlen=24)
        self.wrong_before = torch.zeros(num_envs, dtype=torch.bool, device=device)  # this episode

    def update(self, sums: dict, called_done, moving, scored, frames, envs, info, done, *when, **counters):
        """Count the verdicts `called_done` (K,) on the scenes `scored` (K,) into `sums`; keep wrong frames."""
        success, moving, resnet = info["success"][scored], moving[scored], self.args.done_by == "resnet"
        true, counted = success | (moving & resnet), done[scored] | (not resnet)  # resnet: ends
        verdicts = called_done & true, called_done & ~true, ~called_done & true, ~called_done & ~true
        for name, verdict in zip(self.COUNTS, verdicts):
            sums[name] += (verdict & counted).sum()
        wrong = (called_done != success) & ~moving & ~self.wrong_before[scored]  # once: the next look the same
        wrong = wrong.nonzero().squeeze(-1)
        if len(wrong) and frames is not None:
            self.wrong_before[scored[wrong]] = True
            self.latest.extend(frames[wrong].cpu().numpy())
            if self.args.save_mistakes:
                rows = frame_rows(scored[wrong], envs, info, done, *when, **counters)
                self.new += zip(rows, map(to_png, frames[wrong].cpu()))
        self.wrong_before &= ~done

    def file(self, folder: Path):
        """Collective: rank 0 writes the new ones, laid out as stage 1's."""
        new, self.new = sum(gather(self.new), []), []
        for row, png in new if RANK == 0 else []:
            self.rows.append(row | dict(file=f"{row['label']}/{len(self.rows) + 1:04d}.png"))
            write_file(folder / self.rows[-1]["file"], png)
        if self.rows:
            write_file(folder / "metadata.json", json.dumps(self.contract, indent=2).encode())
            write_index(folder, self.rows)

    def scalars(self, sums: dict) -> dict:
        tp, fp, fn, tn = (sums[name] for name in self.COUNTS)
        ratios = dict(accuracy=(tp + tn, fp + fn), precision=(tp, fp), recall=(tp, fn), false_positive_rate=(fp, tn))
        scalars = {f"reward_model/{name}": a / (a + b) for name, (a, b) in ratios.items() if a + b}
        return scalars | {"reward_model/scored_frames": tp + fp + fn + tn}


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(inputs: int, outputs: int, std: float):
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, outputs), std))


class Agent(nn.Module):
    """A Gaussian policy whose standard deviation does not depend on the state, and a value network; both
    see observations of mean 0 and standard deviation 1 over all that the agent was trained on."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.register_buffer("obs_sums", torch.zeros((3, obs_dim)).double())  # of 1, x and x squared
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.critic = mlp(obs_dim, 1, std=1.0)
        self.actor_mean = mlp(obs_dim, action_dim, std=0.01 * 2**0.5)
        self.actor_logstd = nn.Parameter(torch.full((1, action_dim), -1.0))

    @torch.no_grad()
    def update_normalization(self, obs):
        """Count every rank's `obs` (num_steps, num_envs, obs_dim) into the mean and deviation."""
        x = obs.flatten(0, 1).double()
        self.obs_sums += all_reduce_sum(torch.stack([torch.ones_like(x), x, x * x]).sum(1))
        mean, square = self.obs_sums[1:] / self.obs_sums[0]
        self.obs_mean.copy_(mean)
        self.obs_std.copy_((square - mean * mean).clamp(min=1e-4).sqrt())  # some never change

    def normalize(self, x):
        return ((x - self.obs_mean) / self.obs_std).clamp(-10, 10)

    def get_value(self, x):
        return self.critic(self.normalize(x)).squeeze(-1)

    def get_mean_action(self, x):
        return self.actor_mean(self.normalize(x))

    def get_action_and_logprob(self, x, action=None):
        mean = self.get_mean_action(x)
        probs = Normal(mean, self.actor_logstd.exp().expand_as(mean), validate_args=False)
        if action is None:
            action = mean + probs.scale * torch.randn_like(mean)  # sample() makes the host wait
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), mean


def compute_gae(rewards, values, next_values, terminal, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16). All tensors (num_steps, num_envs), with
    values of the true next observations; `dones` cut the sum, `terminal` also drops the bootstrap."""
    advantages, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminal[t] - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * ~dones[t] * last
    return advantages


def ppo_update(agent, optimizer, obs, actions, logprobs, advantages, returns, args, train_policy=True):
    """PPO on one rollout, tensors (num_steps, num_envs, ...), with all ranks: the critic learns in every
    epoch, the policy until it has moved by --target-kl. Returns {name: mean loss, a scalar tensor}."""
    batch, losses = (obs, actions, logprobs, advantages, returns), defaultdict(list)
    obs, actions, logprobs, advantages, returns = (x.flatten(0, 1) for x in batch)
    for _epoch in range(args.update_epochs):
        epoch_kl = []
        for mb_inds in torch.randperm(len(obs), device=obs.device).tensor_split(args.num_minibatches):
            value_loss = 0.5 * ((agent.get_value(obs[mb_inds]) - returns[mb_inds]) ** 2).mean()
            losses["value_loss"].append(value_loss.detach())
            loss, trained = 0.5 * value_loss, list(agent.critic.parameters())
            if train_policy:
                _, new_logprob, entropy, mean_action = agent.get_action_and_logprob(obs[mb_inds], actions[mb_inds])
                logratio = new_logprob - logprobs[mb_inds]
                ratio = logratio.exp()
                mb_advantages = advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()
                action_l2 = args.action_l2 * mean_action.square().sum(1).mean()
                loss, trained = loss + policy_loss + action_l2, list(agent.parameters())
                with torch.no_grad():
                    epoch_kl.append((ratio - 1 - logratio).mean())  # joschu.net/blog/kl-approx.html
                    losses["policy_loss"].append(policy_loss.detach())
                    losses["entropy"].append(entropy.mean())
                    losses["approx_kl"].append(epoch_kl[-1])
                    losses["clipfrac"].append(((ratio - 1).abs() > args.clip_coef).float().mean())

            optimizer.zero_grad()  # to None: Adam must not move what is not trained
            loss.backward()
            average_gradients(trained)
            nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
        if train_policy:
            train_policy = all_reduce_sum(torch.stack(epoch_kl).mean()).item() / WORLD_SIZE <= args.target_kl
    return {name: torch.stack(values).mean() for name, values in losses.items()}


def train(args: Args, task: dict, checkpoint: Optional[dict], reward_model, contract: Optional[dict]):
    # Start, or go on; another script's checkpoint gives a new run its agent
    continued = checkpoint is not None and checkpoint["script"] == SCRIPT
    global_step, env_steps = (checkpoint["global_step"], checkpoint["env_steps"]) if continued else (0, 0)
    device = DEVICE if args.sim_backend == "physx_cuda" else torch.device("cpu")

    # Agent
    camera = FILM_CAMERA if args.capture_video and RANK == 0 else None
    eval_envs = ManiSkillEnvs(args, task, args.num_eval_envs // WORLD_SIZE, camera)
    (obs_dim,), (action_dim,) = eval_envs.single_observation_space.shape, eval_envs.single_action_space.shape
    torch.manual_seed(args.seed)
    agent = Agent(obs_dim, action_dim).to(device)
    logstd, *others = agent.parameters()  # a module's own come first
    optimizer = torch.optim.Adam([dict(params=[logstd]), dict(params=others)], eps=1e-5, fused=True)
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        # Without Adam's moments its first steps would hurt a trained policy; step sizes are ours
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=checkpoint["optimizer"]["state"]))
    for p in agent.critic.parameters() if not continued else ():  # of another reward
        optimizer.state.pop(p, None)
    run_dir, writer = make_run_dir(args, f"{SCRIPT}-evaluate" if args.evaluate else SCRIPT)
    log_evaluation(agent, eval_envs, run_dir, writer, global_step, env_steps)
    if args.evaluate:
        return

    # Scenes: no other rank, seed or run that goes on may repeat their episodes
    envs = ManiSkillEnvs(args, task, args.num_envs // WORLD_SIZE, contract)
    num_envs = envs.num_envs
    audit = Audit(args, contract, num_envs, device)
    seed = int(np.random.SeedSequence([args.seed, global_step, RANK, 4]).generate_state(1)[0])
    torch.manual_seed(seed)
    current_obs, _ = envs.reset(seed=seed)

    # Storage of one rollout
    obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)
    next_obs = torch.zeros_like(obs)  # the true ones, before any reset
    actions = torch.zeros((args.num_steps, num_envs, action_dim), device=device)
    logprobs, rewards = torch.zeros((2, args.num_steps, num_envs), device=device)
    dones, terminal = torch.zeros((2, args.num_steps, num_envs), dtype=torch.bool, device=device)
    episode_id = RANK * num_envs + torch.arange(num_envs, device=device)
    episode_len, episode_return = torch.zeros((2, num_envs), device=device)
    episode_once = torch.zeros(num_envs, dtype=torch.bool, device=device)

    bar = tqdm(total=args.num_iterations, initial=global_step, unit="step", disable=RANK > 0)
    first_env_steps, start_time = env_steps, time.time()
    stop_signals, last, before = [], False, {}
    on_stop_signal(stop_signals.append)
    while not last:
        global_step += 1
        left = 1 - (global_step - 1) / args.num_iterations if args.anneal_lr else 1
        optimizer.param_groups[0]["lr"] = args.logstd_learning_rate * left
        optimizer.param_groups[1]["lr"] = args.learning_rate * left

        # Rollout
        sums = dict.fromkeys(("episodes", "success_once", "episode_len", "return", *Audit.COUNTS), 0.0)
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, *_ = agent.get_action_and_logprob(current_obs)
            obs[step], actions[step], logprobs[step] = current_obs, action, logprob
            current_obs, reward, terminated, truncated, info = envs.step(action)
            env_steps += num_envs * WORLD_SIZE
            episode_len += 1

            # Reward: `scored` are the scenes that the ResNet looks at
            done = terminated | truncated if args.done_by == "simulator" else truncated
            looked_at = done | (episode_len % args.score_every == 0) if args.done_by == "resnet" else done
            scored = (looked_at | (args.reward_render_mode == "always")).nonzero().squeeze(-1)
            reward, probs, frames = resnet_reward(reward_model, envs, reward, info["success"], scored, args)
            called_done, success = probs > args.threshold, info["success"]
            moving = info.get("is_obj_placed", success) & ~info.get("is_robot_static", success)  # looks like success
            if args.done_by == "resnet":
                done = done.index_put((scored,), called_done | done[scored])
                success = success | moving
            next_obs[step], rewards[step], dones[step] = current_obs, reward, done
            if args.reward_mode == "replace":  # with add the dense reward would go on
                terminal[step] = done & ((reward > args.alpha * args.threshold) | (args.done_by == "time"))

            audit.update(sums, called_done, moving, scored, frames, envs, info, done,
                         global_step, env_steps, episode=episode_id, step=episode_len)
            episode_once |= success
            episode_return += reward
            done_idx = done.nonzero().squeeze(-1)
            if len(done_idx):
                sums["episodes"] += len(done_idx)
                sums["success_once"] += episode_once[done_idx].sum()
                sums["episode_len"] += episode_len[done_idx].sum()
                sums["return"] += episode_return[done_idx].sum()
                current_obs, _ = envs.reset(options=dict(env_idx=done_idx))
                episode_id[done_idx] += num_envs * WORLD_SIZE
                episode_len[done_idx] = 0
                episode_once[done_idx] = False
                episode_return[done_idx] = 0.0
        if args.save_mistakes:
            audit.file(run_dir and run_dir / "mistakes")

        # Update
        with torch.no_grad():
            values, next_values = agent.get_value(obs), agent.get_value(next_obs)
        # Ends that are not paid are bootstrapped; with --done-by time none is
        advantages = compute_gae(rewards, values, next_values, terminal, dones, args.gamma, args.gae_lambda)
        returns, train_policy = advantages + values, global_step > args.critic_warmup
        losses = ppo_update(agent, optimizer, obs, actions, logprobs, advantages, returns, args, train_policy)
        if train_policy:  # else the policy would move all the same
            agent.update_normalization(obs)

        # Log
        sums = sum_over_ranks(sums | losses | dict(stop=len(stop_signals)))
        if RANK == 0:
            scalars = {f"losses/{name}": sums[name] / WORLD_SIZE for name in losses} | audit.scalars(sums)
            scalars["losses/explained_variance"] = 1 - (advantages.var() / returns.var()).item()
            sps = (env_steps - first_env_steps) / (time.time() - start_time)
            scalars |= {"charts/SPS": sps, "charts/env_steps": env_steps}
            bar.n = global_step
            log_iteration(writer, bar, global_step, sums, scalars)
            if sums["episodes"]:
                after = scalars
                before = before if before and train_policy else after  # the policy as it came

        # Checkpoint, then evaluate
        last = sums["stop"] > 0 or global_step == args.num_iterations
        if last or global_step % args.save_interval == 0 or global_step % args.eval_freq == 0:
            save_checkpoint(run_dir, agent, optimizer, global_step, env_steps, args, task)
        if last or global_step % args.eval_freq == 0:
            if RANK == 0 and audit.latest:
                writer.add_images("reward_model/mistakes", np.stack(audit.latest), global_step, dataformats="NHWC")
            log_evaluation(agent, eval_envs, run_dir, writer, global_step, env_steps)

    bar.close()
    say(f"global step {global_step} after {env_steps:,} env steps: {run_dir}")
    if before:
        text = [f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in ("env/success_once", "env/episode_len")]
        say("before -> after: " + ", ".join(text))
    if sums["stop"]:
        say("To go on: " + shlex.join(["python", *sys.argv, "--resume-dir", str(run_dir)]))
        sys.exit(130)  # so that && stops


# ==== From here on: machinery. Sections of one name are equal.

# -------------------- scenes

def find_task(env_id: str, robot_uids: str, control_mode: str) -> dict:
    """A task's names. "module:Task-v1" imports the module first, also from the working directory: a command
    may ask for that, never a file, which may be someone else's."""
    from mani_skill.utils.registration import REGISTERED_ENVS

    module, _, env_id = env_id.rpartition(":")
    sys.path.append(os.getcwd())
    try:
        importlib.import_module(module or "mani_skill.envs")
        spec = REGISTERED_ENVS[env_id]
    except Exception as error:  # whatever is in there
        fail(f"there is no task {env_id} in {module or 'ManiSkill'}; is its module in --env-id? ({error!r})")
    choice = inspect.signature(spec.cls.__init__).parameters.get("robot_uids")  # None: the class has chosen
    robots = spec.cls.SUPPORTED_ROBOTS if choice else []
    if robot_uids and robots is not None and robot_uids not in robots:
        fail(f"--robot-uids {robot_uids}: {env_id} has {', '.join(map(str, robots)) or 'a robot of its own'}")
    robot_uids = robot_uids or spec.default_kwargs.get("robot_uids") or (choice.default if choice else "")
    return dict(env_id=env_id, robot_uids=robot_uids, control_mode=control_mode)


def make_scenes(task: dict, num_envs: int, sim_backend: str, camera=None):
    """ManiSkill's environment: for states, on a CPU too with `num_envs` scenes; or with our `camera`,
    dict(views={name: dict(pose, fov)}, width, height, meshes, show_goal_site). Views stand side by side and
    move with `mount`, an attribute or a link; a film's are the task's own."""
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.sensors.camera import CameraConfig
    from mani_skill.utils.registration import REGISTERED_ENVS

    def cameras(env):
        edges = np.linspace(0, camera["width"], len(camera["views"]) + 1).astype(int)
        things = {None: None} | vars(env) | env.agent.robot.links_map
        return [CameraConfig(name, sapien.Pose(view["pose"][:3], view["pose"][3:]), int(width), camera["height"],
                             view["fov"], mount=things[view.get("mount")])
                for (name, view), width in zip(camera["views"].items(), np.diff(edges))]

    many, own = sim_backend == "physx_cpu" and not camera, (camera or {}).get("film", {})
    chosen = {name: task[name] for name in ("robot_uids", "control_mode") if task[name]}
    cls, setup_scene = REGISTERED_ENVS[task["env_id"]].cls, BaseEnv._setup_scene
    views = cls._default_human_render_camera_configs if own else property(cameras)
    with (patch.object(cls, "_default_human_render_camera_configs", views),
          patch.object(BaseEnv, "_setup_scene", lambda env: PhysxCpuScenes(env) if many else setup_scene(env)),
          patch("mani_skill.envs.sapien_env.CPU_SIM_BACKENDS", ()),
          patch("mani_skill.utils.download_asset.prompt_yes_no", lambda question: fail(  # every rank would ask
              f"files are missing: python -m mani_skill.utils.download_asset {question.split()[1]}"))):
        env = gym.make(task["env_id"], **chosen, num_envs=num_envs, obs_mode="state",
                       reward_mode="normalized_dense", reconfiguration_freq=0, sim_backend=sim_backend,
                       human_render_camera_configs=dict(own, shader_pack="minimal"),
                       render_backend=f"sapien_{DEVICE}" if camera else "none")
    if camera and camera["meshes"] == "light":
        use_light_meshes(env.unwrapped)
    if camera:  # for good: on a GPU ManiSkill moves hidden things, with the cameras on them
        for hidden in [] if camera["show_goal_site"] else env.unwrapped._hidden_objects:
            for entity in hidden._objs:
                entity.remove_component(entity.find_component_by_type(sapien.render.RenderBodyComponent))
        env.unwrapped._hidden_objects.clear()
    return env


def use_light_meshes(env):
    """Join vertices on a grid: 12,000 triangles look nearly like the 155,000 that take a CPU so long."""
    no_sky = sapien.render.RenderTexture(np.zeros((1, 1, 4), np.uint8), 2, "R8G8B8A8Unorm")
    for view in env.scene.human_render_cameras.values():  # else 10 s go into how one is mirrored
        view.camera._render_cameras[0].set_texture("BRDFLUT", no_sky)
    cells = [([link.entity for link in struct._objs], 0.012) for struct in env.agent.robot.links  # metres
             if not any(part in struct.name for part in ("hand", "finger", "gripper", "jaw"))]
    cells += [(actor._objs, 40.0) for name, actor in env.scene.actors.items() if name == "ground"]
    for entities, cell in cells:  # of all scenes
        body = entities[0].find_component_by_type(sapien.render.RenderBodyComponent)
        if not body or {*map(type, body.render_shapes)} != {sapien.render.RenderShapeTriangleMesh}:
            continue
        light = sapien.render.RenderBodyComponent()
        for shape in body.render_shapes:
            for part in shape.parts:
                corners = part.vertices * shape.scale
                _, first, joined = np.unique(np.round(corners / cell), True, True, axis=0)  # indices, inverse
                triangles = np.unique(joined.reshape(-1)[part.triangles], axis=0)
                triangles = triangles[(triangles != np.roll(triangles, 1, axis=1)).all(1)]
                if len(triangles):
                    normals, uvs = part.get_vertex_normal()[first], part.get_vertex_uv()[first]
                    mesh = sapien.render.RenderShapeTriangleMesh(corners[first], triangles, normals, uvs, part.material)
                    mesh.local_pose = shape.local_pose
                    light.attach(mesh)
        for entity in entities:
            entity.remove_component(entity.find_component_by_type(sapien.render.RenderBodyComponent))
            entity.add_component(light.clone())


class PhysxTable:
    """A table of PhysX on a GPU, a row an object, for objects on a CPU: `table[rows, columns]` gets rows whose
    scenes have changed; what is assigned is set. Without `get` only we change it."""

    def __init__(self, px, objects: list, scenes: list, columns: int, set, get=None):
        self.px, self.objects, self.scenes, self.set, self.get = px, objects, np.array(scenes, int), set, get
        self.rows, self.data = np.arange(len(objects)), torch.zeros(len(objects), columns)
        self.read = np.full(len(objects), -1)  # what px.version was when a row was read

    def torch(self):
        self.px.run_steps()
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*[arg.data if isinstance(arg, cls) else arg for arg in args], **kwargs or {})

    def fetch(self, rows):
        rows = self.rows[rows if isinstance(rows, slice) else rows.numpy()]
        rows = rows if rows.ndim == 1 else rows[:, 0]  # joints come as a grid
        stale = rows[self.read[rows] != self.px.version[self.scenes[rows]]] if self.get else ()
        if len(stale):
            self.data.numpy()[stale] = [self.get(self.objects[row]) for row in stale.tolist()]
            self.read[stale] = self.px.version[self.scenes[stale]]
        return rows

    def __getitem__(self, key):
        self.fetch(key[0])
        return self.data[key]

    def __setitem__(self, key, value):
        rows = self.fetch(key[0])
        self.data[key] = value
        for row, values in zip(rows.tolist(), self.data.numpy()[rows]):
            self.set(self.objects[row], values)
        if self.get:
            self.px.version[self.scenes[rows]] += 1
            self.read[rows] = self.px.version[self.scenes[rows]]


class PhysxCpuScenes:
    """Many scenes of PhysX on a CPU, with the interface of the one system that has many on a GPU: all but
    physics is ManiSkill's batched code."""
    __class__ = sapien.physx.PhysxGpuSystem  # what isinstance sees

    def __init__(self, env):
        """Takes the place of BaseEnv._setup_scene, which on a CPU makes one scene."""
        from mani_skill.envs.scene import ManiSkillScene

        env._set_scene_config()
        self.systems = [sapien.physx.PhysxCpuSystem() for _ in range(env.num_envs)]
        env.scene = self.scene = ManiSkillScene([sapien.Scene([px]) for px in self.systems], env.sim_config,
                                                device=env.device, backend=env.backend)
        env.scene.px, env.scene.gpu_sim_enabled, self.timestep = self, True, 1 / env._sim_freq
        for px in self.systems:
            px.timestep = self.timestep
        self.pending_steps, self.version = 0, np.zeros(env.num_envs, int)  # version counts changes
        self.asked, self.contacts = set(), None  # pairs of bodies; their impulses, once somebody asks

    def __getattr__(self, name):
        if name.startswith(("gpu_apply_", "gpu_fetch_", "gpu_update_")):
            return lambda: None
        raise NotImplementedError(name)

    def step(self):
        self.pending_steps += 1  # scene by scene they are 1.4 times as fast

    def run_steps(self):
        if self.pending_steps:
            for px in self.systems:
                for _ in range(self.pending_steps):
                    px.step()
            self.pending_steps, self.contacts = 0, None
            self.version += 1

    def gpu_init(self):
        """All is built: give articulations and bodies that can move their rows in the tables."""
        def give_rows(structs, index, objects):
            found, scenes = [], []
            for struct in structs:
                first = len(found)
                found += getattr(struct, objects)
                scenes += struct._scene_idxs.tolist()
                setattr(struct, index, torch.arange(first, len(found), dtype=torch.int32))
            return found, scenes

        def get_body(body):
            return *body.entity_pose.__getstate__(), *body.linear_velocity, *body.angular_velocity

        def set_body(body, row):
            pose = sapien.Pose(row[:3], row[3:7])
            if not isinstance(body, sapien.physx.PhysxArticulationLinkComponent):
                body.entity.pose = pose
                if not body.kinematic:
                    body.linear_velocity, body.angular_velocity = row[7:10], row[10:]
            elif body.is_root:  # other links follow it
                art, art.pose = body.articulation, pose
                art.root_linear_velocity, art.root_angular_velocity = row[7:10], row[10:]

        def set_targets(name):
            return lambda art, row: [getattr(joint, name)(x) for joint, x in zip(joints[art], row.tolist())]

        scene, structs = self.scene, [*self.scene.articulations.values(), *self.scene.articulation_views.values()]
        actors = [a for a in [*scene.actors.values(), *scene.actor_views.values()] if a.px_body_type != "static"]
        links = [link for art in scene.articulations.values() for link in art.links]
        bodies = give_rows(actors + links, "_body_data_index_internal", "_bodies")
        arts = give_rows(structs, "_data_index", "_objs")
        for art in structs:
            for joint in art.joints or ():
                joint._data_index = art._data_index
        joints = {art: art.active_joints for art in arts[0]}
        dof = max((art.dof for art in joints), default=0)
        self.cuda_rigid_body_data = PhysxTable(self, *bodies, 13, set_body, get_body)
        for name in ("qpos", "qvel", "qf", "qacc"):
            setattr(self, f"cuda_articulation_{name}", PhysxTable(
                self, *arts, dof, lambda art, row, name=name: setattr(art, name, row[:art.dof]),
                lambda art, name=name: (*getattr(art, name), *[0.0] * (dof - art.dof))))
        for name, target in (("qpos", "set_drive_target"), ("qvel", "set_drive_velocity_target")):
            setattr(self, f"cuda_articulation_target_{name}", PhysxTable(self, *arts, dof, set_targets(target)))

    def gpu_create_contact_pair_impulse_query(self, pairs):
        self.contacts, self.asked = None, self.asked | set(pairs)
        return SimpleNamespace(pairs=pairs)

    def gpu_query_contact_pair_impulses(self, query):
        """(len(pairs), 3) N s, of PhysX's last step, on the first body of a pair by the second."""
        self.run_steps()
        if self.contacts is None:
            self.contacts = dict.fromkeys(self.asked, np.zeros(3, np.float32))
            for contact in [contact for px in self.systems for contact in px.get_contacts()]:
                a, b = contact.bodies
                for pair, sign in (((a, b), 1), ((b, a), -1)):
                    if pair in self.asked:
                        impulses = [sign * point.impulse for point in contact.points]
                        self.contacts[pair] = sum(impulses, self.contacts[pair])
        impulses = torch.from_numpy(np.stack([self.contacts[pair] for pair in query.pairs]))
        query.cuda_impulses = SimpleNamespace(torch=lambda: impulses)


class ManiSkillEnvs(gym.Wrapper):
    """`num_envs` scenes of a task in one process; training cannot tell a GPU from a CPU.

        obs, info = envs.reset(seed=...)  # (N, obs_dim) float32
        obs, reward, terminated, truncated, info = envs.step(action)  # (N, ...); nothing is reset
        obs, info = envs.reset(options=dict(env_idx=indices))  # only these scenes begin anew
        frames = envs.render_frames(indices)  # (K, H, W, 3) uint8
    """

    def __init__(self, args, task: dict, num_envs: int, camera=None):
        on_gpu, name = args.sim_backend == "physx_cuda", task["env_id"]
        try:
            sim_backend = f"physx_{DEVICE}" if on_gpu else "physx_cpu"
            super().__init__(make_scenes(task, num_envs, sim_backend, on_gpu and camera))
            self.max_episode_steps = self.env._max_episode_steps
            if not isinstance(self.single_action_space, gym.spaces.Box):
                fail(f"{name} takes {type(self.single_action_space).__name__} actions")
            self.resetting = torch.ones(num_envs, dtype=torch.bool, device=self.device)
            controller = self.agent.controller  # ManiSkill resets all targets, whichever begin
            controller.reset = patch.object(self.scene, "_reset_mask", self.resetting)(controller.reset)
            for part in getattr(controller, "controllers", {}).values():
                if hasattr(part, "kinematics") and not on_gpu:
                    part.kinematics._setup_gpu()  # the inverse kinematics of many scenes
            self.reset(seed=0)  # what training will do
            *_, info = self.step(torch.zeros(num_envs, *self.single_action_space.shape))
            self.reset(options=dict(env_idx=torch.arange(1, device=self.device)))
            if "success" not in info or not self.max_episode_steps:
                fail(f"{name} reports no success or has no time limit")
            things = [*self.scene.actors.values(), *self.scene.articulations.values()]
            if camera and not on_gpu and {len(thing._objs) for thing in things} - {num_envs}:
                fail(f"a CPU cannot photograph {name}: its objects differ from scene to scene")
            # Takes pictures: on a CPU one scene, posed like each in turn
            self.studio = camera and (self if on_gpu else make_scenes(task, 1, "physx_cpu", camera).unwrapped)
        except Exception as error:  # also a task's own
            at = [f" ({f.filename}:{f.lineno})" for f in traceback.extract_tb(error.__traceback__)
                  if f.filename != __file__ and "lib/python" not in f.filename]
            hint = "; no Vulkan device? bash tests/install_cpu_renderer.sh" * bool(re.search("render|vk::", str(error)))
            fail(f"{name} cannot be simulated here: {error!r:.300}{''.join(at[-1:])}{hint}")

    def __getattr__(self, name):  # num_envs, device, agent, scene, ...
        return getattr(self.unwrapped, name)

    def reset(self, seed: Optional[int] = None, options: Optional[dict] = None):
        idx = options["env_idx"] if options else torch.arange(self.num_envs, device=self.device)
        self.resetting.fill_(False)[idx] = True
        return self.env.reset(seed=seed, options=dict(env_idx=idx))

    def render_frames(self, env_idx):
        from mani_skill.utils import tree
        if self.studio is self:  # ManiSkill would tile on the CPU
            views = self.scene.human_render_cameras
            return torch.cat([self.render_rgb_array(view)[env_idx] for view in views], 2)
        state, frames = self.get_state_dict(), []
        for i in env_idx.tolist():
            self.studio.set_state_dict(tree.slice(state, slice(i, i + 1)))
            frames.append(self.studio.render_rgb_array().clone())  # a GPU draws into the same memory
        return torch.cat(frames)


# -------------------- rows

LABELS = ("success", "failure")
TO_GOAL = ("to_goal_x", "to_goal_y", "to_goal_z")
# Of index.csv: `step` counts from 1, the way from cube to goal is in metres
COLUMNS = ("file", "label", "episode", "step", "is_final", "global_step", "env_steps", "cube_to_goal", *TO_GOAL,
           "is_obj_placed", "is_robot_static", "is_grasped")


def cube_to_goal(envs):
    """(N, 3) metres; NaN for tasks without a `cube` and a `goal_site`."""
    try:
        return envs.goal_site.pose.p - envs.cube.pose.p
    except AttributeError:
        return torch.full((envs.num_envs, 3), torch.nan, device=envs.device)


def frame_rows(idx, envs, info, done, global_step: int, env_steps: int, **counters) -> list:
    """Rows of index.csv, but for the file, of the scenes `idx` (K,); counters (N,): `episode`, `step`."""
    columns = {key: info[key] for key in COLUMNS if key in info} | counters | dict(is_final=done, label=info["success"])
    table = torch.stack([values[idx].long() for values in columns.values()], 1).tolist()
    rows = [dict(zip(columns, row), global_step=global_step, env_steps=env_steps) for row in table]
    to_goal = cube_to_goal(envs)[idx].double()
    to_goal = torch.cat([to_goal.norm(dim=1, keepdim=True), to_goal], 1).round(decimals=5)
    for row, distances in zip(rows, to_goal.tolist()):
        row.update(zip(("cube_to_goal", *TO_GOAL), distances), label=LABELS[not row["label"]])
    return rows


def to_png(frame) -> bytes:
    png = io.BytesIO()
    Image.fromarray(frame.numpy()).save(png, "PNG", compress_level=1)
    return png.getvalue()


def write_index(folder: Path, rows: list):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *[map(row.get, COLUMNS) for row in rows]])
    write_file(folder / "index.csv", table.getvalue().encode())


def gather(value) -> list:
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


# -------------------- reward model

@functools.cache
def fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 beats float32: on GPUs that have it, and on CPUs with AMX or AMD's AVX-512."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = "amx_bf16" in info or "AuthenticAMD" in info and "avx512_bf16" in info  # Intel's AVX-512 is slower
    return torch.cuda.is_bf16_supported(including_emulation=False) if device_type == "cuda" else cpu


def load_reward_model(path: str, device):
    """The model of stage 2 in a file, or in a folder's best_model.pt, and its contract."""
    path = Path(path, "best_model.pt") if Path(path).is_dir() else path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["contract"].get("format_version") != 4:
            raise ValueError("it is of another version of the project: train it anew")
        model = RewardModel(checkpoint["arch"], checkpoint["input_size"])
        model.load_state_dict(checkpoint["model"])
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            raise ValueError("it has weights that are not finite")
        return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["contract"]
    except Exception as error:  # torch.load raises many kinds
        fail(f"{path} is not a reward model of train_reward_resnet.py ({str(error)[:150]!r})")


# -------------------- runs and ranks

FILM_CAMERA = dict(film=dict(width=224, height=224), meshes="light", show_goal_site=True)


@torch.no_grad()
def evaluate(agent, envs):
    """One episode a scene without noise: means over the ranks, a film (H, W, 3) uint8."""
    obs, _ = envs.reset(seed=1_000_000 + RANK)
    once = torch.zeros(envs.num_envs, dtype=torch.bool, device=envs.device)
    episode_len, episode_return = torch.zeros(2, envs.num_envs, device=envs.device)
    film = [envs.render_frames(torch.arange(min(4, envs.num_envs)))] if envs.studio else []
    for _ in range(envs.max_episode_steps):
        obs, reward, _, _, info = envs.step(agent.get_mean_action(obs))
        episode_len += ~once
        episode_return += reward * ~once
        going = (~once[:4]).nonzero().squeeze(-1)
        once |= info["success"]
        if film:  # a scene that has succeeded stands still, under a green bar
            film.append(film[-1].clone())
            if len(going):
                film[-1][going] = envs.render_frames(going)
            film[-1][once[:4], :8] = film[-1].new_tensor([0, 200, 0])
    sums = sum_over_ranks({"success_once": once.sum(), "success_at_end": info["success"].sum(),
                           "episode_len": episode_len.sum(), "return": episode_return.sum()})
    metrics = {name: value / (WORLD_SIZE * envs.num_envs) for name, value in sums.items()}
    return metrics, [torch.cat(list(frames), 1).cpu().numpy() for frames in film]


def log_evaluation(agent, envs, run_dir, writer, global_step: int, env_steps: int) -> float:
    """Evaluate; rank 0 writes the metrics and a film. Returns success_once."""
    metrics, film = evaluate(agent, envs)
    if RANK == 0:
        for name, value in metrics.items():
            writer.add_scalar(f"eval/{name}", value, global_step)
        writer.flush()
        text = ", ".join(f"eval/{name} {value:.3f}" for name, value in metrics.items())
        try:
            if film:
                path = run_dir / f"videos/global_step_{global_step}.mp4"
                path.parent.mkdir(exist_ok=True)
                imageio.mimwrite(path, film, fps=20, macro_block_size=1)
                text += f", {path}"
        except Exception as error:  # whatever ffmpeg has: no film is no reason to end
            say(f"warning: no film ({str(error)[:200]})")
        say(f"global step {global_step}, {env_steps:,} env steps: {text}")
    return metrics["success_once"]


def log_iteration(writer, bar, global_step: int, sums: dict, scalars: dict):
    episodes = max(sums["episodes"], 1)
    if sums["episodes"]:
        scalars |= {f"env/{name}": sums[name] / episodes for name in ("success_once", "episode_len", "return")}
        scalars["env/reward"] = sums["return"] / sums["episode_len"]
    for name, value in scalars.items():
        writer.add_scalar(name, value, global_step)
    bar.set_postfix_str(f"step {global_step}, success {sums['success_once'] / episodes:.0%}, "
                        f"{scalars['charts/SPS']:.0f} env steps/s")


def save_checkpoint(run_dir, agent, optimizer, global_step: int, env_steps: int, args, task: dict):
    if RANK == 0:
        buffer = io.BytesIO()
        torch.save(dict(script=SCRIPT, task=task, args=asdict(args), global_step=global_step, env_steps=env_steps,
                        agent=agent.state_dict(), optimizer=optimizer.state_dict()), buffer)
        write_file(run_dir / f"checkpoints/global_step_{global_step}/checkpoint.pt", buffer.getbuffer())


def load_checkpoint(args, task: Optional[dict] = None) -> dict:
    """The newest in --resume-dir, by timestamp and step; it must be of `task`."""
    try:
        files = [f for path in map(Path, args.resume_dir) for f in (path, *path.rglob("checkpoint.pt")) if f.is_file()]
        file = max(files, key=lambda f: (f.parts[-4:-3], *map(int, re.findall(r"\d+", f.parent.name))))
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        if checkpoint["task"] != (task or checkpoint["task"]):
            raise ValueError(f"{file} is of {checkpoint['task']}, this is {task}")
        if not all(weight.isfinite().all() for weight in checkpoint["agent"].values()):
            raise ValueError(f"{file} has weights that are not finite")
        if checkpoint["script"] == SCRIPT and checkpoint["global_step"] >= args.num_iterations and not args.evaluate:
            raise ValueError(f"{file} is at the end of --num-iterations: give more")
    except Exception as error:  # torch.load raises many kinds
        fail(f"--resume-dir {' '.join(args.resume_dir)}: no checkpoint for this ({str(error)[:300]!r})")
    say(f"from {file}")
    return checkpoint


def usable_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no such file; "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, max(1, quota // period))
    return cores


def start_ranks(args):
    """Fork a CPU's ranks, which alone return. This process hands on signals; all die if it dies or one fails."""
    global RANK, WORLD_SIZE
    num_ranks, pids, code = WORLD_SIZE if TORCHRUN or GPU else args.num_procs, [], 0
    if args.num_eval_envs < num_ranks or args.num_envs // num_ranks * args.num_steps // args.num_minibatches < 2:
        fail(f"too few --num-envs, --num-eval-envs or --num-steps for {num_ranks} processes or --num-minibatches")
    if num_ranks > WORLD_SIZE:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]))
        while len(pids) < num_ranks and 0 not in pids:
            pids.append(os.fork())
        if 0 not in pids:
            on_stop_signal(lambda signum: [os.kill(pid, signum) for pid in pids])
            while pids:
                pid, status = os.wait()
                pids.remove(pid)
                code = code or abs(os.waitstatus_to_exitcode(status))
                for other in pids if 0 < code < 128 else ():  # 130: all are stopped
                    os.kill(other, signal.SIGKILL)
            sys.exit(code)
        RANK, WORLD_SIZE = len(pids) - 1, num_ranks
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if GPU:
        torch.cuda.set_device(DEVICE)
    if WORLD_SIZE > 1:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # else ranks begun anew wait for the dead
        store = dist.PrefixStore(attempt, next(dist.rendezvous("env://", RANK, WORLD_SIZE))[0])
        dist.init_process_group("cpu:gloo,cuda:nccl" if GPU else "gloo", store=store, rank=RANK, world_size=WORLD_SIZE)
        if args.sim_backend == "physx_cpu":  # NCCL would wait for all, also when one fails
            atexit.register(dist.destroy_process_group)


def all_reduce_sum(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_ranks(sums: dict) -> dict:
    """{name: number or scalar tensor} -> {name: number}; one that is not finite ends the run."""
    values = all_reduce_sum(torch.tensor([*map(float, sums.values())], dtype=torch.float64)).tolist()
    if not np.isfinite(values).all():
        fail("losses or rewards are no longer finite; lower --learning-rate")
    return dict(zip(sums, values))


def average_gradients(parameters):
    if WORLD_SIZE > 1:
        grads = [p.grad for p in parameters]
        nn.utils.vector_to_parameters(all_reduce_sum(nn.utils.parameters_to_vector(grads)) / WORLD_SIZE, grads)


# -------------------- files and flags

def on_stop_signal(handle):
    """Call `handle` with SIGINT, SIGTERM or SIGHUP instead of ending; nohup's is ignored."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda signum, _: handle(signum))


class Output:
    """stdout or stderr; that nobody can read it any more (| tee, a full disk) is no reason to end."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str = ""):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it is None where it was closed
            self.stream.write(text)
            self.stream.flush()

    flush = write


def say(text: str):
    if RANK == 0:
        tqdm.write(text)


def fail(message: str):
    """One line on stderr, exit code 2."""
    time.sleep(10 if RANK > 0 else 0)  # rank 0 says it: the first rank that fails ends all
    print(f"{SCRIPT}: error: {message}", file=sys.stderr)
    sys.exit(2)


def write_file(path: Path, data: bytes):
    """Via a temporary file, so that `path` never holds half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def make_run_dir(args, name: str = SCRIPT):
    """Rank 0: <log-dir>/<timestamp>-<name> with args.json, and its TensorBoard writer."""
    if RANK > 0:
        return None, None
    run_dir = Path(args.log_dir, f"{datetime.now():%Y%m%d-%H%M%S-%f}-{name}")
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args) | dict(command=shlex.join(sys.argv)), indent=2))
    return run_dir, SummaryWriter(run_dir.absolute())


def parse_args():
    """Numbers are finite and not negative, most counts at least 1, shares at most 1."""
    args = tyro.cli(Args, description=__doc__)
    for flag in fields(args):
        value, low = getattr(args, flag.name), int(flag.type is int and flag.name not in ("seed", "critic_warmup"))
        high = 1 if flag.type is Share else 10**9
        if type(value) in (int, float) and not low <= value <= high:  # NaN is in no range
            fail(f"--{flag.name.replace('_', '-')} {value} is not between {low} and {high}")
    return args


if __name__ == "__main__":
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins
    torch.set_num_threads(1)  # threads cannot be forked, and slow other runs down
    args, reward_model, contract = parse_args(), None, None
    if not args.oracle and not args.evaluate:
        reward_model, contract = load_reward_model(args.reward_checkpoint, DEVICE)
        if "env_id" not in contract:
            fail(f"{args.reward_checkpoint} was trained on anyone's pictures, not on frames of a ManiSkill task")
    task = contract and {name: contract[name] for name in ("env_id", "robot_uids", "control_mode")}
    checkpoint = load_checkpoint(args, task) if args.resume_dir or not task else None
    if checkpoint is None:
        say("warning: without --resume-dir the policy hardly ever reaches what is paid")
    task = task or checkpoint["task"]
    if find_task(**task | dict(env_id=args.env_id or task["env_id"])) != task:
        fail(f"--env-id {args.env_id}: the reward model or the policy is of {task['env_id']}")
    start_ranks(args)
    try:
        train(args, task, checkpoint, reward_model, contract)
    except OSError as error:
        fail(f"{error}; what was written before is whole: mend that, then resume")
