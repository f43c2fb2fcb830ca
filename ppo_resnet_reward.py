"""Stage 4: train stage 3's policy on with stage 2's ResNet as its only reward.

    reads   reward_checkpoints/best_model.pt, a checkpoint of ppo_dense.py
    writes  logs/<timestamp>-ppo_resnet_reward/  TensorBoard events, args.json,
                                         videos/, checkpoints/global_step_<N>/

    python ppo_resnet_reward.py --resume-dir logs/<run of ppo_dense.py>
    torchrun --nproc-per-node=8 ppo_resnet_reward.py --resume-dir ...
    python ppo_resnet_reward.py --resume-dir ... --done-by resnet
            the ResNet ends episodes too: nothing of the simulator's is used
    python ppo_resnet_reward.py --resume-dir ... --save-mistakes mistakes
            frames to train the ResNet on again

The reward is the function `resnet_reward`. The simulator's verdict ends
episodes (but see --done-by) and audits the ResNet.
"""
import atexit
import contextlib
import csv
import ctypes
import functools
import inspect
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # but first look for work 5,000 times: stage 2 trains a fifth faster
import gymnasium as gym  # noqa: E402
import numpy as np
import sapien
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

SCRIPT = Path(__file__).stem
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun or start_ranks
LAUNCHER = f"{os.environ.get('TORCHELASTIC_RUN_ID')}-{os.getppid()}"  # the same when torchrun starts its ranks anew


@dataclass
class RunArgs:
    exp_name: str = SCRIPT
    """the run's folder is <log-dir>/<timestamp>-<exp-name>"""
    seed: int = 1
    """seed of the scenes and the policy; evaluation has its own, fixed seeds"""
    cuda: bool = True
    """simulate and train on the GPU when there is one"""
    env_id: str = "PickCube-v1"
    """any ManiSkill task that reports `success` and has a dense reward"""
    control_mode: str = "pd_joint_delta_pos"
    """ManiSkill controller of the arm, the same in all stages"""
    sim_backend: Literal["auto", "physx_cuda", "physx_cpu"] = "auto"
    """where the physics runs; auto: physx_cuda with a GPU, else physx_cpu"""
    render_backend: Literal["auto", "sapien_cuda", "sapien_cpu"] = "auto"
    """where pictures are drawn, and where the ResNet looks at them; auto: sapien_cuda with a GPU, else sapien_cpu"""
    num_procs: Optional[int] = None
    """ranks to start on a CPU; None: one a core, with 16 scenes or more each (a GPU run is one process; else use torchrun)"""
    log_dir: str = "logs"
    """parent of the runs' folders"""
    resume_dir: Optional[str] = None
    """a checkpoint, or a run's folder (its newest one): this script's own is continued, another's starts a new run"""
    evaluate: bool = False
    """only evaluate the checkpoint in --resume-dir"""


@dataclass
class PPOArgs:
    num_envs: Optional[int] = None
    """parallel scenes of all ranks together; None: 256 on a GPU, 64 on a CPU"""
    num_steps: int = 50
    """steps of every scene in one rollout"""
    num_iterations: Optional[int] = None
    """global steps at most; one is a rollout and its update; None: 1000 on a GPU, 100 on a CPU"""
    num_minibatches: Optional[int] = None
    """minibatches in an update epoch; None: 32 on a GPU, 8 on a CPU (of 400 steps either way)"""
    update_epochs: int = 8
    """passes over a rollout's data"""
    learning_rate: float = 2.5e-4
    """Adam's step size, at first"""
    logstd_learning_rate: float = 2.5e-3
    """the same for the policy's log standard deviation: what stage 3's policy lacks is a steady hand"""
    anneal_lr: Optional[bool] = None
    """lower the step sizes in proportion to what is left of the run; None: off on a GPU, on on a CPU"""
    gamma: Optional[float] = None
    """discount factor per step, near 1, since the reward comes at the end; None: 0.95, or 0.99 with --done-by time"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation (arXiv:1506.02438)"""
    clip_coef: float = 0.3
    """PPO's clipping range (arXiv:1707.06347)"""
    target_kl: float = 0.1
    """the policy's part of an update ends after the epoch whose mean KL divergence (nats) exceeds this"""
    action_l2: Optional[float] = None
    """weight in the policy's loss of the squares of its mean action: no joint turns for nothing; None: 0 GPU, 0.005 CPU"""
    eval_freq: int = 40
    """global steps between evaluations"""
    num_eval_envs: int = 128
    """evaluation episodes of all ranks together"""
    save_interval: int = 20
    """global steps between checkpoints"""
    capture_video: bool = True
    """film the first evaluation scenes, into videos/ and TensorBoard"""


@dataclass
class RewardArgs:
    reward_checkpoint: str = "reward_checkpoints/best_model.pt"
    """the reward model of stage 2"""
    reward_mode: Literal["replace", "add"] = "replace"
    """the ResNet's reward instead of the environment's dense one, or added to it"""
    alpha: float = 1.0
    """factor of the ResNet's reward"""
    threshold: float = 0.85
    """probability above which a frame counts as done and earns the reward; at 0.5 more failures and more successes do"""
    use_soft_reward: bool = False
    """the reward is the probability itself"""
    reward_render_mode: Literal["episode_end", "always"] = "episode_end"
    """score only frames that end an episode (others earn 0), or every frame (must match the data)"""
    camera: Optional[Literal["goal", "workspace", "task"]] = None
    """views of the frames (must match the data, see stage 1); None: goal where the task has a goal_site, else task"""
    show_goal_site: bool = True
    """show the green goal sphere in the frames (must match the data)"""
    image_size: int = 224
    """side of the square frames in pixels (must match the data)"""
    meshes: Optional[Literal["light", "stock"]] = None
    """the robot's and the ground's (must match the data, see stage 1); None: stock on a GPU, light on a CPU"""
    critic_warmup: int = 5
    """global steps at first that train the critic alone: that of stage 3 expects another reward"""
    done_by: Literal["simulator", "resnet", "time"] = "simulator"
    """who ends episodes early: the simulator when it sees success, the ResNet when it calls a frame done, or nobody"""
    score_every: Optional[int] = None
    """with --done-by resnet: steps of an episode between two frames that it looks at; None: 1 on a GPU, 5 on a CPU"""
    ignore_terminations: bool = False
    """the same as --done-by time"""
    oracle: bool = False
    """control experiment: the simulator's own success takes the place of the ResNet's verdict"""
    max_mistakes: int = 5000
    """frames of each label that the folder of mistakes may hold: then failures replace random old ones"""
    save_mistakes: Optional[str] = None
    """folder for the frames that the ResNet got wrong, laid out as stage 1's: train on both with --data-path data <folder>"""


@dataclass
class Args(RewardArgs, PPOArgs, RunArgs):
    pass


GPU_CPU_DEFAULTS = dict(num_envs=(256, 64), num_iterations=(1000, 100), num_minibatches=(32, 8), anneal_lr=(False, True),
                        action_l2=(0.0, 0.005), meshes=("stock", "light"), score_every=(1, 5))


class RewardModel(nn.Module):
    """Says of a frame how sure it is that the task is done. Three more outputs, the vector from the cube to the goal, are
    there because learning it too makes the first one exact (stage 2, --to-goal-weight)."""

    def __init__(self, arch: str, hidden_dim: int, input_size: int):
        super().__init__()
        if arch not in ("resnet18", "resnet34", "resnet50") or not 1 <= hidden_dim <= 1024 or not 32 <= input_size <= 1024:
            raise ValueError(f"no such reward model: {arch}, hidden_dim {hidden_dim}, input_size {input_size}")
        self.input_size = input_size
        self.resnet = torchvision.models.get_model(arch)
        self.resnet.avgpool = nn.AdaptiveAvgPool2d(4)  # not 1: where things are is what matters
        features = self.resnet.fc.in_features * 4 * 4
        self.resnet.fc = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, 4))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)  # ImageNet's
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def scale(self, frames):
        """(K, H, W, 3) uint8 -> (K, input_size, input_size, 3) uint8."""
        return resize(frames.permute(0, 3, 1, 2), [self.input_size] * 2, antialias=True).permute(0, 2, 3, 1)

    def forward(self, frames):
        """(K, S, S, 3), values in [0, 255] -> (K,) float32 logits, (K, 3) float32 vectors in cm. NHWC is channels_last."""
        outputs = self.resnet((frames.permute(0, 3, 1, 2).float() - self.mean) / self.std).float()
        return outputs[:, 0], outputs[:, 1:]

    @torch.inference_mode()
    def predict(self, frames, batch_size: int = 64):
        """(K, H, W, 3) uint8 frames of any size -> (K,) float32 probabilities that the task is done."""
        device = self.mean.device
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device.type)):
            return torch.cat([self(self.scale(f.to(device)))[0].sigmoid() for f in frames.split(batch_size)])


def resnet_reward(reward_model, envs, env_reward, success, scored, args):
    """The reward of stage 4: look at the scenes `scored` and pay for those that look done.

    Args:
        env_reward: (N,) float32, the environment's own, which only --reward-mode add uses.
        success: (N,) bool, the simulator's verdict, which only --oracle uses.
        scored: (K,) int64, indices of scenes; the others are paid nothing.

    Returns:
        reward (N,) float32, probs (K,) float32 that the task is done, frames (K, H, W, 3) uint8 (None where none was taken).
    """
    reward = env_reward.clone() if args.reward_mode == "add" else torch.zeros_like(env_reward)
    frames = envs.render_frames(scored) if len(scored) and not args.oracle else None
    probs = success[scored].float() if frames is None else reward_model.predict(frames).to(reward.device)
    reward[scored] += args.alpha * (probs if args.use_soft_reward else (probs > args.threshold).float())
    return reward, probs, frames


def matching_reward_model(args: Args, contract: dict):
    """The model in --reward-checkpoint; refused where the frames that it knows differ from ours, before anything is built."""
    if args.oracle or args.evaluate:
        return None
    reward_model, known = load_reward_model(args.reward_checkpoint, torch.device("cpu"))
    differing = contract_differences(known, contract)
    if differing:
        fail(f"{args.reward_checkpoint} knows other frames than these: " + "; ".join(differing)
             + "; match them with the flags of these names, or train it on frames like these")
    return reward_model


def layer_init(layer, std=2**0.5):
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, 0.0)
    return layer


def mlp(inputs: int, outputs: int, std: float):
    return nn.Sequential(
        layer_init(nn.Linear(inputs, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, 256)), nn.Tanh(),
        layer_init(nn.Linear(256, outputs), std))


class Agent(nn.Module):
    """A Gaussian policy whose standard deviation does not depend on the state, and a separate value network.

    Both see observations brought to mean 0 and standard deviation 1 over all that the agent has ever been trained on.
    """

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.register_buffer("obs_sums", torch.zeros((3, obs_dim), dtype=torch.float64))  # of 1, x and x squared
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.critic = mlp(obs_dim, 1, std=1.0)
        self.actor_mean = mlp(obs_dim, action_dim, std=0.01 * 2**0.5)
        self.actor_logstd = nn.Parameter(torch.full((1, action_dim), -1.0))

    @torch.no_grad()
    def update_normalization(self, obs):
        """Collective: count `obs` (num_steps, num_envs, obs_dim) of every rank into the mean and standard deviation."""
        x = obs.flatten(0, 1).double()
        self.obs_sums += all_reduce_sum(torch.stack([torch.ones_like(x).sum(0), x.sum(0), (x * x).sum(0)]))
        mean, square = self.obs_sums[1:] / self.obs_sums[0]
        self.obs_mean.copy_(mean)
        self.obs_std.copy_((square - mean * mean).clamp(min=1e-4).sqrt())  # at least 0.01: some never change

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
            action = mean + probs.scale * torch.randn_like(mean)  # probs.sample() makes the host wait for a GPU
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), mean


def compute_gae(rewards, values, next_values, terminal, dones, gamma: float, gae_lambda: float):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16). All tensors (num_steps, num_envs).

    `next_values` are those of the true next observations, also where an episode ended. `dones` cut the sum at the ends of
    episodes; `terminal` also drops the bootstrap there.
    """
    advantages, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_values[t] * ~terminal[t] - values[t]
        advantages[t] = last = delta + gamma * gae_lambda * ~dones[t] * last
    return advantages


def train(args: Args):
    # Start, or go on; another script's checkpoint gives a new run its agent
    checkpoint, run_dir = load_checkpoint(args)
    continued = checkpoint is not None and checkpoint["script"] == SCRIPT
    global_step, env_steps = (checkpoint["global_step"], checkpoint["env_steps"]) if continued else (0, 0)
    device, stop_signals = join_ranks(args.sim_backend == "physx_cuda"), catch_signals()
    seed = args.seed + 1000 * global_step + RANK  # a continued run must not repeat the episodes it began with
    torch.manual_seed(seed)
    if checkpoint is None and RANK == 0:
        print(f"{SCRIPT}: warning: without --resume-dir the policy starts from nothing and will hardly ever reach what the "
              "ResNet pays for; give it stage 3's checkpoint", file=sys.stderr)

    # Reward model; the contract says how our frames are made, and it must know such frames
    contract = make_contract(args)
    reward_model = matching_reward_model(args, contract)
    if reward_model:
        reward_model.to(my_gpu() if args.render_backend == "sapien_cuda" else device)
    mistakes, latest_mistakes = None, deque(maxlen=24)
    if args.save_mistakes and not args.evaluate:
        mistakes = FrameFolder(args.save_mistakes, contract, dict.fromkeys(LABELS, args.max_mistakes), args.seed)

    # Scenes
    args.capture_video = args.capture_video and has_renderer(args.render_backend)
    eval_envs = make_envs(args, args.num_eval_envs // WORLD_SIZE, VIDEO_CAMERA if args.capture_video else None)
    envs = eval_envs if args.evaluate else make_envs(
        args, args.num_envs // WORLD_SIZE, None if args.oracle else frame_camera(contract), args.show_goal_site)
    num_envs, obs_dim, action_dim = envs.num_envs, envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    # Agent
    agent = Agent(obs_dim, action_dim).to(device)
    parameters, critic_parameters = list(agent.parameters()), list(agent.critic.parameters())
    logstd, *others = parameters  # a module's own come first
    optimizer = torch.optim.Adam([dict(params=[logstd]), dict(params=others)], lr=args.learning_rate, eps=1e-5, fused=True)
    if checkpoint:
        load_weights(agent, optimizer, checkpoint)
        if not continued:
            for p in critic_parameters:  # the critic learns another reward
                optimizer.state.pop(p, None)
    broadcast(parameters)

    # The run's folder
    run_dir = run_dir if continued else on_rank0(make_run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1) if RANK == 0 else None
    if args.evaluate:
        return log_evaluation(agent, eval_envs, args, run_dir, writer, global_step, env_steps)

    # Storage of one rollout
    obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)
    next_obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)  # the true ones, before any reset
    actions = torch.zeros((args.num_steps, num_envs, action_dim), device=device)
    logprobs = torch.zeros((args.num_steps, num_envs), device=device)
    rewards = torch.zeros((args.num_steps, num_envs), device=device)
    dones = torch.zeros((args.num_steps, num_envs), dtype=torch.bool, device=device)
    terminal = torch.zeros_like(dones)  # the task is done, with nothing more to come
    # Of the episodes under way
    episode_id = RANK * num_envs + torch.arange(num_envs, device=device) + (mistakes.first_episode if mistakes else 0)
    episode_len = torch.zeros(num_envs, dtype=torch.int64, device=device)
    episode_once = torch.zeros(num_envs, dtype=torch.bool, device=device)  # has succeeded at any step
    episode_wrong = torch.zeros(num_envs, dtype=torch.bool, device=device)  # has a frame that the ResNet got wrong
    steps_late = torch.zeros(num_envs, dtype=torch.int64, device=device)  # since its first success
    episode_return = torch.zeros(num_envs, device=device)
    current_obs, _ = envs.reset(seed=seed)

    progress = tqdm(total=args.num_iterations, initial=global_step, unit="step", disable=RANK > 0)
    first_env_steps, start_time, stopping = env_steps, time.time(), False
    while global_step < args.num_iterations and not stopping:
        global_step += 1
        iteration_time = time.time()
        left = 1 - (global_step - 1) / args.num_iterations
        for group, lr in zip(optimizer.param_groups, (args.logstd_learning_rate, args.learning_rate)):
            group["lr"] = lr * (left if args.anneal_lr else 1)

        # Rollout
        finished = torch.zeros(4, dtype=torch.float64, device=device)  # episodes, successes, their lengths, their returns
        # True and false positives, false and true negatives; positives whose cube is at the goal, though the robot may move;
        # positives in episodes that have succeeded by then, and how many steps ago
        audit = torch.zeros(7, dtype=torch.float64, device=device)
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, *_ = agent.get_action_and_logprob(current_obs)
            obs[step], actions[step], logprobs[step] = current_obs, action, logprob
            current_obs, reward, terminated, truncated, info = envs.step(action)
            env_steps += num_envs * WORLD_SIZE
            episode_len += 1

            # Reward: `scored` are the scenes that the ResNet looks at, `said` is whether it calls them done
            done = terminated | truncated if args.done_by == "simulator" else truncated
            looked_at = done | (episode_len % args.score_every == 0) if args.done_by == "resnet" else done
            looked_at = looked_at | (args.reward_render_mode == "always")
            scored = looked_at.nonzero().squeeze(-1)
            reward, probs, frames = resnet_reward(reward_model, envs, reward, info["success"], scored, args)
            said = probs > args.threshold
            if args.done_by == "resnet":
                done = done.index_put((scored,), said | done[scored])
            done_idx = done.nonzero().squeeze(-1)
            next_obs[step], rewards[step], dones[step] = current_obs, reward, done
            if args.reward_mode == "replace":  # an end that is paid is one, else it would pay twice; any other is a cut
                terminal[step] = done & ((reward > 0) | (args.done_by == "time"))

            # Audit by the simulator: of all frames scored, but with --done-by resnet of those that end an episode
            steps_late += episode_once
            episode_once |= info["success"]
            success, counted = info["success"][scored], done[scored] | (args.done_by != "resnet")
            at_goal = info["is_obj_placed" if "is_obj_placed" in info else "success"][scored]
            counts = [said & success, said & ~success, ~said & success, ~said & ~success, said & at_goal,
                      said & episode_once[scored], said * steps_late[scored]]
            audit += (counted * torch.stack(counts)).sum(1)

            # Frames that it got wrong, one an episode: the next ones look the same. Not those with the cube at the goal and
            # the robot still moving, which a picture cannot tell from success: as failures they would teach against success
            wrong = ((said != success) & (success == at_goal) & ~episode_wrong[scored]).nonzero().squeeze(-1)
            if len(wrong) and not args.oracle:
                episode_wrong[scored[wrong]] = True
                rows = describe(scored[wrong], current_obs, info, done, args, global_step, env_steps,
                                episode=episode_id, step=episode_len)
                for frame, row in zip(frames[wrong].cpu().numpy(), rows):
                    latest_mistakes.append(frame)
                    if mistakes:
                        mistakes.add(frame, row)

            episode_return += reward
            if len(done_idx):
                finished += torch.stack([done, episode_once & done, episode_len * done, episode_return * done]).sum(1)
                current_obs, _ = envs.reset(options=dict(env_idx=done_idx))
                episode_id += num_envs * WORLD_SIZE * done
                episode_once &= ~done
                episode_wrong &= ~done
                steps_late *= ~done
                episode_len *= ~done
                episode_return *= ~done
        if mistakes:
            mistakes.file()
        rollout_time = time.time() - iteration_time

        # Advantages
        with torch.no_grad():
            values, next_values = agent.get_value(obs), agent.get_value(next_obs)
        # An end that the ResNet pays is a true one, with nothing to bootstrap from, unless the dense reward is in: there, an
        # end that is worth nothing teaches avoidance. At the others, time-outs and successes that it misses, the value of
        # the true last observation stands for what would follow; with --done-by time nothing does: then is when it counts.
        advantages = compute_gae(rewards, values, next_values, terminal, dones, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update: the critic in every epoch, the policy until it has moved by --target-kl
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(0, 1), logprobs.flatten()
        b_advantages, b_returns = advantages.flatten(), returns.flatten()
        train_policy = global_step > args.critic_warmup
        value_losses, policy_losses = torch.zeros(1, device=device), torch.zeros(4, device=device)  # sums over minibatches
        num_updates = num_policy_updates = 0
        for _epoch in range(args.update_epochs):
            epoch_kl = torch.zeros((), device=device)
            for mb_inds in torch.randperm(len(b_obs), device=device).chunk(args.num_minibatches):
                value_loss = 0.5 * ((agent.get_value(b_obs[mb_inds]) - b_returns[mb_inds]) ** 2).mean()
                loss, trained = 0.5 * value_loss, critic_parameters
                if train_policy:
                    _, new_logprob, entropy, mean_action = agent.get_action_and_logprob(b_obs[mb_inds], b_actions[mb_inds])
                    logratio = new_logprob - b_logprobs[mb_inds]
                    ratio = logratio.exp()
                    mb_advantages = b_advantages[mb_inds]
                    mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                    clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                    policy_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()
                    action_l2 = args.action_l2 * mean_action.square().sum(1).mean()
                    loss, trained = loss + policy_loss + action_l2, parameters
                    with torch.no_grad():
                        approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
                        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                        policy_losses += torch.stack([policy_loss, entropy.mean(), approx_kl, clipfrac])
                        epoch_kl += approx_kl
                    num_policy_updates += 1

                optimizer.zero_grad()  # to None: where the policy is not trained, Adam must not move it on zeros
                loss.backward()
                average_gradients(trained)
                nn.utils.clip_grad_norm_(trained, 0.5)
                optimizer.step()
                value_losses += value_loss.detach()
                num_updates += 1
            if train_policy:
                train_policy = all_reduce_sum(epoch_kl).item() / (args.num_minibatches * WORLD_SIZE) <= args.target_kl
        if global_step > args.critic_warmup:
            agent.update_normalization(obs)

        # Log
        losses = [value_losses / num_updates] + [policy_losses / num_policy_updates] * (num_policy_updates > 0)
        scalars = mean_losses(torch.cat(losses), global_step, run_dir)
        sums = torch.cat([finished, audit, finished.new_tensor([len(stop_signals)])])
        *finished, tp, fp, fn, tn, at_goal, once, late, stopping = all_reduce_sum(sums).tolist()
        if RANK == 0:
            scalars |= {f"reward_model/{name}": a / b for name, a, b in (
                ("accuracy", tp + tn, tp + fp + fn + tn), ("precision", tp, tp + fp), ("recall", tp, tp + fn),
                ("false_positive_rate", fp, fp + tn), ("precision_cube_at_goal", at_goal, tp + fp),
                ("steps_late", late, once)) if b}
            scalars["reward_model/scored_frames"] = tp + fp + fn + tn
            scalars["losses/explained_variance"] = 1 - ((returns - values).var() / returns.var()).item()
            scalars["losses/policy_updates"] = num_policy_updates
            scalars["charts/SPS"] = (env_steps - first_env_steps) / (time.time() - start_time)
            scalars["charts/learning_rate"] = optimizer.param_groups[1]["lr"]
            scalars["charts/env_steps"] = env_steps
            scalars["charts/rollout_share"] = rollout_time / (time.time() - iteration_time)
            log_iteration(writer, progress, global_step, finished, scalars)
            progress.update()

        # Evaluate, checkpoint
        last = stopping or global_step == args.num_iterations
        if last or global_step % args.eval_freq == 0:
            log_evaluation(agent, eval_envs, args, run_dir, writer, global_step, env_steps)
            if RANK == 0 and latest_mistakes:
                writer.add_images("reward_model/latest_mistakes", np.stack(latest_mistakes), global_step, dataformats="NHWC")
                if mistakes:
                    mistakes.preview()
        if last or global_step % args.save_interval == 0:
            on_rank0(save_checkpoint, run_dir, agent, optimizer, global_step, env_steps, args)

    if RANK == 0:
        progress.close()
        writer.close()
        print(f"global step {global_step} after {env_steps:,} env steps and {time.time() - start_time:.0f} s in this process: "
              f"{run_dir / 'checkpoints' / f'global_step_{global_step}'}")
        if mistakes:
            print(f"{args.save_mistakes}: {sum(mistakes.counts.values())} mistakes; {mistakes.left_out} did not fit")
        if global_step < args.num_iterations:
            print(f"To go on: {command_to_go_on(run_dir)}")


# ==== From here on: machinery. The same text in every script; nothing below is needed to follow the algorithm.

# ---------------------------------------------------------------------------------------------- scenes

def find_task(env_id: str):
    """ManiSkill's entry of a task, which must have a dense reward, for stages 1 and 3 to learn from, and a time limit."""
    from mani_skill.envs.sapien_env import BaseEnv
    from mani_skill.utils.registration import REGISTERED_ENVS

    task = REGISTERED_ENVS.get(env_id)
    if task is None:
        fail(f"--env-id {env_id}: ManiSkill has no such task")
    has_reward = task.cls.compute_normalized_dense_reward is not BaseEnv.compute_normalized_dense_reward
    if not has_reward or "normalized_dense" not in task.cls.SUPPORTED_REWARD_MODES or not task.max_episode_steps:
        fail(f"--env-id {env_id} has no dense reward or no time limit; choose a task that has both, such as PushCube-v1")
    return task


@contextlib.contextmanager
def replaced(owner, name: str, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class NoMaterial(metaclass=type("", (type,), dict(__instancecheck__=lambda *_: True))):
    """ManiSkill asks Vulkan for the colours of objects even when nothing is ever drawn."""
    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_: None


def make_task(env_id: str, num_envs: int, control_mode: str, sim_backend: str, camera: Optional[dict] = None,
              render_backend: str = "sapien_cpu", batched: bool = False):
    """A ManiSkill environment, with our render cameras instead of its own.

    `camera`: views, {name: dict(pose, fov)}, which share frames of width x height pixels from left to right, shader_pack, and
    meshes (light or stock). A view with `mount` moves with the task's object of that name, its pose is relative to it.
    None makes a state-only environment, which also works where there is no Vulkan driver at all.
    `batched`: on a CPU, where ManiSkill has one scene a process, simulate `num_envs` through PhysxCpuScenes.
    """
    from mani_skill.envs import sapien_env
    from mani_skill.sensors.camera import CameraConfig
    from mani_skill.utils.registration import EnvSpec, TimeLimitWrapper

    def cameras(env):
        edges = np.linspace(0, camera["width"], len(camera["views"]) + 1).astype(int)
        return [CameraConfig(name, sapien.Pose(view["pose"][:3], view["pose"][3:]), int(width), camera["height"], view["fov"],
                             mount=getattr(env, view.get("mount", ""), None), shader_pack=camera["shader_pack"])
                for (name, view), width in zip(camera["views"].items(), np.diff(edges))]

    task, changes = find_task(env_id), dict(_default_human_render_camera_configs=property(cameras) if camera else [])
    options = dict(num_envs=num_envs, obs_mode="state", reward_mode="normalized_dense", control_mode=control_mode,
                   sim_backend=sim_backend, render_backend=render_backend if camera else "none")
    if batched:
        changes["_setup_scene"], options["reconfiguration_freq"] = PhysxCpuScenes.setup_scene, 0
    spec = EnvSpec(env_id, type(env_id, (task.cls,), changes), None, task.asset_download_ids, task.default_kwargs)
    material = sapien.render.RenderMaterial if camera else NoMaterial
    set_shaders = sapien.render.set_camera_shader_dir
    try:
        with (replaced(sapien_env, "CPU_SIM_BACKENDS", ()), replaced(sapien.render, "RenderMaterial", material),
              replaced(sapien.pysapien.render, "RenderMaterial", material),
              replaced(sapien.render, "set_camera_shader_dir", lambda name: set_shaders(
                  shaders_for_cpu(name) if render_backend == "sapien_cpu" else name))):
            env = TimeLimitWrapper(spec.make(**options), task.max_episode_steps)
    except AssertionError as error:
        fail(f"--control-mode: {error}")
    except EOFError:
        fail(f"--env-id {env_id} needs files: python -m mani_skill.utils.download_asset {env_id}")
    except RuntimeError as error:
        if camera is None:
            raise
        fail(f"no Vulkan device to render with ({error}); on a CPU install Mesa's lavapipe >= 24.3: "
             "bash tests/install_cpu_renderer.sh (on a GPU: the driver's own Vulkan)")
    if camera and camera["meshes"] == "light":
        use_light_meshes(env.unwrapped)
    return env


@functools.cache
def shaders_for_cpu(name: str) -> str:
    """SAPIEN's shaders, but for how things reflect an environment map: of ManiSkill's scenes only ReplicaCAD's have one, and
    before its first frame a CPU would compute for 6 s what such reflections look like."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(Path(sapien.__file__).parent / "vulkan_shader", folder, dirs_exist_ok=True)
    for file in (folder / name).glob("*.frag"):
        without = re.sub(r"(?m)^.* uniform sampler2D samplerBRDFLUT;$", "", file.read_text())
        file.write_text(re.sub(r"texture\(samplerBRDFLUT, .*\)\.xy;", "vec2(0);", without))
    return str(folder / name)


def use_light_meshes(env):
    """Join vertices of the robot, all but its hand, on a grid of 12 mm, of the ground on one of 40 m: their triangles, 155,000
    of PickCube's, take most of a frame's time on a CPU, and 12,000 look nearly the same."""
    cells = {link.entity: 0.012 for struct in env.agent.robot.links for link in struct._objs
             if not any(part in struct.name for part in ("hand", "finger", "gripper", "jaw"))}
    cells |= {entity: 40.0 for entity in getattr(env.scene.actors.get("ground"), "_objs", ())}
    for entity, cell in cells.items():
        heavy, light = entity.find_component_by_type(sapien.render.RenderBodyComponent), sapien.render.RenderBodyComponent()
        for shape in heavy.render_shapes if heavy else ():
            is_mesh = isinstance(shape, sapien.render.RenderShapeTriangleMesh)
            for part in shape.parts if is_mesh else ():
                _, joined, counts = np.unique(np.round(part.vertices * shape.scale / cell), axis=0, return_inverse=True,
                                              return_counts=True)
                triangles = np.unique(joined.reshape(-1)[part.triangles], axis=0)
                triangles = triangles[(triangles != np.roll(triangles, 1, axis=1)).all(1)]
                vertices, normals, uvs = (
                    np.stack([np.bincount(joined.reshape(-1), column) for column in values.T], 1) / counts[:, None]
                    for values in (part.vertices * shape.scale, part.get_vertex_normal(), part.get_vertex_uv()))
                if len(triangles):
                    mesh = sapien.render.RenderShapeTriangleMesh(vertices, triangles, normals, uvs, part.material)
                    mesh.local_pose = shape.local_pose
                    light.attach(mesh)
            if not is_mesh:
                light.attach(shape.clone())
        if heavy:
            entity.remove_component(heavy)
            entity.add_component(light)


class PhysxBuffer:
    """A tensor through which ManiSkill talks to PhysX on a GPU, a row an object, for objects on a CPU: a row is read from its
    object when it is asked for and its scene has changed, and written to it when it is assigned; targets of joints, which
    PhysX never changes, are written together before the next step.

    Args:
        scenes: (num_rows,) int, the scene of each row's object.
        parts: {(first, end): (getters, setters)}: of each row, the functions that get and set the values of these columns.
    """

    def __init__(self, px, scenes, parts: dict, targets: bool = False):
        self.px, self.scenes, self.parts, self.targets, self.unwritten = px, np.array(scenes, int), parts, targets, set()
        self.index, self.data = np.arange(len(scenes)), torch.zeros(len(scenes), max(end for _, end in parts))
        self.values = {part: self.data.numpy()[:, slice(*part)] for part in parts}  # the same memory
        self.read = {part: np.full(len(scenes), -1) for part in parts}  # what px.version was when the row was read
        self[:, :]

    def torch(self):
        self.px.catch_up()
        return self

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*[arg.data if isinstance(arg, cls) else arg for arg in args], **kwargs or {})

    def _affected(self, key):
        rows, columns = key
        rows = self.index[rows if isinstance(rows, slice) else rows.numpy()]
        first, end, _ = columns.indices(self.data.shape[1]) if isinstance(columns, slice) else (0, self.data.shape[1], 1)
        return rows if rows.ndim == 1 else rows[:, 0], [part for part in self.parts if part[0] < end and part[1] > first]

    def __getitem__(self, key):
        rows, parts = self._affected(key)
        version = self.px.version[self.scenes[rows]]
        for part in parts:
            stale = self.read[part][rows] != version
            if stale.any():
                getters, values = self.parts[part][0], self.values[part]
                for row in rows[stale].tolist():
                    value = getters[row]()
                    values[row, :len(value)] = value
                self.read[part][rows[stale]] = version[stale]
        return self.data[key]

    def __setitem__(self, key, value):
        if not self.targets and not isinstance(key[1], slice):
            self[key]  # setters take whole rows
        self.data[key] = value
        rows, parts = self._affected(key)
        self.unwritten.update(rows.tolist())
        if not self.targets:
            self.write(parts)
            self.px.version[self.scenes[rows]] += 1

    def write(self, parts):
        for part in parts:
            setters, values = self.parts[part][1], self.values[part]
            for row in self.unwritten:
                setters[row](values[row])
        self.unwritten.clear()


class PhysxCpuScenes:
    """Many scenes of PhysX on a CPU, with the interface of the one system that has many on a GPU.

    ManiSkill runs one scene a process on a CPU. With this in the place of `scene.px`, its code for a GPU, from controllers and
    partial resets to rewards, computes all scenes at once; only physics is stepped scene by scene. tests/test_env.py compares
    every number with the stock environment of one scene.
    """
    __class__ = sapien.physx.PhysxGpuSystem  # what isinstance sees

    @staticmethod
    def setup_scene(env):
        """Takes the place of ManiSkill's BaseEnv._setup_scene."""
        from mani_skill.envs.scene import ManiSkillScene

        env._set_scene_config()
        scenes = [sapien.Scene([sapien.physx.PhysxCpuSystem()]) for _ in range(env.num_envs)]
        env.scene = ManiSkillScene(scenes, sim_config=env.sim_config, device=env.device, backend=env.backend)
        env.scene.px, env.scene.gpu_sim_enabled = PhysxCpuScenes(env.scene, 1 / env._sim_freq), True

    def __init__(self, scene, timestep: float):
        self.scene, self.timestep, self.systems = scene, timestep, [sub_scene.physx_system for sub_scene in scene.sub_scenes]
        self.steps, self.version = 0, np.zeros(len(self.systems), int)  # of a scene's state: counts changes
        self.contact_rows, self.impulses = {}, np.zeros((0, 3), np.float32)
        for px in self.systems:
            px.timestep = timestep

    def __getattr__(self, name):
        if name.startswith(("gpu_apply_", "gpu_fetch_", "gpu_update_")):  # buffers do it when they are used
            return lambda: None
        raise AttributeError(name)

    def step(self):
        self.steps += 1  # later: all steps of a scene in a row are 1.4 times as fast as one of every scene in turn (caches)

    def catch_up(self):
        if self.steps:
            for targets in (self.cuda_articulation_target_qpos, self.cuda_articulation_target_qvel):
                targets.write(targets.parts)
            for px in self.systems:
                for _ in range(self.steps):
                    px.step()
            self.steps, self.contacts_known = 0, False
            self.version += 1

    def gpu_init(self):
        """ManiSkill has built everything: give each articulation and each body that can be moved its row in the buffers."""
        scene, as_rows = self.scene, functools.partial(torch.tensor, dtype=torch.int32)
        actors = [actor for actor in [*scene.actors.values(), *scene.actor_views.values()] if actor.px_body_type != "static"]
        links = [link for art in scene.articulations.values() for link in art.links]
        bodies = {body: int(i) for struct in actors + links for body, i in zip(struct._bodies, struct._scene_idxs)}
        arts = {art: int(i) for struct in scene.articulations.values() for art, i in zip(struct._objs, struct._scene_idxs)}
        body_rows, art_rows = ({x: row for row, x in enumerate(rows)} for rows in (bodies, arts))
        for struct in actors + links:
            struct._body_data_index_internal = as_rows([body_rows[body] for body in struct._bodies])
        for struct in [*scene.articulations.values(), *scene.articulation_views.values()]:
            struct._data_index = as_rows([art_rows[art] for art in struct._objs])
            for joint in struct.joints or ():
                joint._data_index = struct._data_index

        def setters_of(body):
            """Of its pose, linear and angular velocity. Links follow their root and the joints."""
            ignore = lambda value: None  # noqa: E731
            if isinstance(body, sapien.physx.PhysxArticulationLinkComponent):
                art = body.articulation
                pose, *velocities = art.set_pose, art.set_root_linear_velocity, art.set_root_angular_velocity
                if not body.is_root:
                    return ignore, ignore, ignore
            else:
                pose = body.entity.set_pose
                velocities = [ignore] * 2 if body.kinematic else [body.set_linear_velocity, body.set_angular_velocity]
            return lambda value: pose(sapien.Pose(value[:3], value[3:])), *velocities

        def pose_getter(entity):
            def get():
                pose = entity.pose
                return np.concatenate((pose.p, pose.q))
            return get

        def target_setter(art, name):
            setters = [getattr(joint, f"set_{name}") for joint in art.active_joints]
            return lambda value: [set_target(x) for set_target, x in zip(setters, value.tolist())]

        set_pose, set_linear, set_angular = zip(*map(setters_of, bodies))
        self.cuda_rigid_body_data = PhysxBuffer(self, list(bodies.values()), {
            (0, 7): ([pose_getter(body.entity) for body in bodies], set_pose),
            (7, 10): ([body.get_linear_velocity for body in bodies], set_linear),
            (10, 13): ([body.get_angular_velocity for body in bodies], set_angular)})
        columns = 0, max((art.dof for art in arts), default=0)
        for name in ("qpos", "qvel", "qf", "qacc"):
            setattr(self, f"cuda_articulation_{name}", PhysxBuffer(self, list(arts.values()), {columns: (
                [getattr(art, f"get_{name}") for art in arts],
                [lambda value, art=art, name=name: setattr(art, name, value[:art.dof]) for art in arts])}))
        for name, target in (("qpos", "drive_target"), ("qvel", "drive_velocity_target")):
            setattr(self, f"cuda_articulation_target_{name}", PhysxBuffer(self, list(arts.values()), {columns: (
                [lambda art=art, name=target: [getattr(joint, name)[0] for joint in art.active_joints] for art in arts],
                [target_setter(art, target) for art in arts])}, targets=True))

    # Contacts: impulses (N s) of the last step of PhysX on the first body of a pair by the second.

    def gpu_create_contact_pair_impulse_query(self, pairs):
        first = len(self.impulses)
        for row, (a, b) in enumerate(pairs, first):
            self.contact_rows.setdefault((a, b), []).append((row, 1))
            self.contact_rows.setdefault((b, a), []).append((row, -1))
        self.impulses, self.contacts_known = np.zeros((first + len(pairs), 3), np.float32), False
        rows = slice(first, len(self.impulses))
        return SimpleNamespace(cuda_impulses=SimpleNamespace(torch=lambda: torch.from_numpy(self.impulses[rows])))

    def gpu_query_contact_pair_impulses(self, query):
        self.catch_up()
        if not self.contacts_known:
            self.impulses[:], self.contacts_known, found = 0, True, []
            for contact in [contact for px in self.systems for contact in px.get_contacts()]:
                rows = self.contact_rows.get(tuple(contact.bodies))
                points = rows and contact.points
                found += [(*row, points) for row in rows] if points else ()
            if found:
                rows, signs, points = zip(*found)
                impulses = np.concatenate([point.impulse for contact in points for point in contact]).reshape(-1, 3)
                impulses = np.add.reduceat(impulses, np.cumsum([0, *map(len, points[:-1])]))
                np.add.at(self.impulses, list(rows), impulses * np.array(signs, np.float32)[:, None])


class ManiSkillEnvs(gym.Wrapper):
    """`num_envs` scenes of a ManiSkill task in one process, on a GPU or a CPU; the training loop cannot tell which.

        obs, info = envs.reset(seed=...)                                # (N, obs_dim) float32
        obs, reward, terminated, truncated, info = envs.step(action)    # (N, ...); finished scenes are not reset
        obs, info = envs.reset(options=dict(env_idx=indices))           # new episodes in these scenes, the others go on
        frames = envs.render_frames(indices)                            # (K, height, width, 3) uint8

    `studio`: the environment that takes pictures: `env` itself, or one of a single scene, posed like each scene in turn.
    `show_goal_site`: pictures show what the task calls hidden objects, its goal.
    """

    def __init__(self, env, studio=None, show_goal_site: bool = True):
        super().__init__(env)
        base, self.studio = env.unwrapped, studio and studio.unwrapped
        if not isinstance(base.single_action_space, gym.spaces.Box):
            fail(f"this task takes {type(base.single_action_space).__name__} actions, not a vector")
        self.num_envs, self.device, self.max_episode_steps = base.num_envs, base.device, env._max_episode_steps
        self.single_observation_space, self.single_action_space = base.single_observation_space, base.single_action_space
        self.batched_cpu = self.device.type == "cpu" and base.scene.gpu_sim_enabled
        self.beginning = torch.ones(self.num_envs, dtype=torch.bool, device=self.device)  # scenes under reset
        controller, reset_controller = base.agent.controller, base.agent.controller.reset

        def reset_beginning():  # left to itself, ManiSkill 3.0.1 resets the targets of all scenes, whichever begin
            with replaced(base.scene, "_reset_mask", self.beginning):
                reset_controller()

        controller.reset = reset_beginning
        for part in getattr(controller, "controllers", {}).values():
            if self.batched_cpu and hasattr(part, "kinematics"):
                part.kinematics._setup_gpu()  # the inverse kinematics of many scenes
        if studio:  # for good: on a GPU ManiSkill hides things by moving them away, and cameras that are mounted on them too
            for hidden in [] if show_goal_site else self.studio._hidden_objects:
                for entity in hidden._objs:
                    entity.remove_component(entity.find_component_by_type(sapien.render.RenderBodyComponent))
            self.studio._hidden_objects.clear()

    def reset(self, seed=None, options: Optional[dict] = None):
        """New episodes in the scenes `options["env_idx"]` (default: all). On a CPU scene i begins like a stock environment
        that is reset with seed[i]; an int stands for itself, then draws of `np.random.RandomState(seed)`."""
        idx = torch.arange(self.num_envs, device=self.device) if options is None else options["env_idx"]
        if seed is None or not self.batched_cpu:
            self.beginning.fill_(False)[idx] = True
            return self.env.reset(seed=seed, options=dict(env_idx=idx))
        from mani_skill.envs.utils.randomization.batched_rng import BatchedRNG

        seeds = [seed, *np.random.RandomState(seed).randint(2**31, size=len(idx) - 1)] if np.isscalar(seed) else seed
        generators, base = [np.random.RandomState(seed) for seed in seeds], self.unwrapped
        for i, seed, generator in zip(idx, seeds, generators):
            base._episode_rng, base._batched_episode_rng = generator, BatchedRNG([generator] * self.num_envs)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(seed))
                obs, info = self.reset(options=dict(env_idx=i[None]))
        base._episode_rng = generators[0]  # resets to come draw from it and from torch's, as in ManiSkill
        return obs, info

    def render_frames(self, env_idx):
        """Photograph the scenes `env_idx` (K,): (K, height, width, 3) uint8, the views side by side."""
        if self.studio is self.unwrapped:
            return self.studio.render_rgb_array()[env_idx]
        scene, frames = self.unwrapped.scene, []
        poses = [(self.studio.scene.actors[name]._objs[0], actor.pose.raw_pose.numpy())
                 for name, actor in scene.actors.items() if actor.px_body_type != "static"]
        joints = [(self.studio.scene.articulations[name]._objs[0], art.pose.raw_pose.numpy(), art.qpos.numpy())
                  for name, art in scene.articulations.items()]
        for i in env_idx.tolist():
            for entity, pose in poses:
                entity.pose = sapien.Pose(pose[i, :3], pose[i, 3:])
            for art, pose, qpos in joints:
                art.pose, art.qpos = sapien.Pose(pose[i, :3], pose[i, 3:]), qpos[i, :art.dof]
            frames.append(self.studio.render_rgb_array().clone())  # a GPU draws the next one into the same memory
        return torch.cat(frames)


def make_envs(args, num_envs: int, camera: Optional[dict] = None, show_goal_site: bool = True):
    """This rank's scenes of `args.env_id`, with a camera or for states alone: on a CPU one, where it cannot have many."""
    task, render_backend = (args.env_id, args.control_mode), "sapien_cpu"
    if args.render_backend == "sapien_cuda":
        render_backend = f"sapien_{my_gpu()}"
    if args.sim_backend == "physx_cuda":
        env = make_task(task[0], num_envs, task[1], f"physx_{my_gpu()}", camera, render_backend)
        return ManiSkillEnvs(env, camera and env, show_goal_site)
    try:
        env = make_task(task[0], num_envs, task[1], "physx_cpu", batched=True)
        if camera and any(len(actor._objs) != num_envs for actor in env.unwrapped.scene.actors.values()):
            raise ValueError("its objects differ from scene to scene")
        envs = ManiSkillEnvs(env, camera and make_task(task[0], 1, task[1], "physx_cpu", camera, render_backend),
                             show_goal_site)
        with torch.random.fork_rng(devices=[]):  # try what training will do
            _, info = envs.reset(seed=[0], options=dict(env_idx=torch.tensor([0])))
            envs.step(torch.zeros(num_envs, *envs.single_action_space.shape))
    except Exception as error:
        if RANK == 0:
            print(f"{SCRIPT}: warning: {' with '.join(task)} cannot be simulated as many scenes on a CPU "
                  f"({str(error).splitlines()[0][:80]}); each rank runs one, slowly", file=sys.stderr)
        env = make_task(task[0], 1, task[1], "physx_cpu", camera, render_backend)
        envs = ManiSkillEnvs(env, camera and env, show_goal_site)
        _, info = envs.reset(seed=0)
    if "success" not in info:
        fail(f"--env-id {args.env_id} reports no success; choose a task that does, such as PushCube-v1")
    return envs


# ---------------------------------------------------------------------------------------------- metrics

# Films show all of the scene.
VIDEO_CAMERA = dict(views=dict(view=dict(pose=[0.75, 0.65, 0.55, 0.3445, 0.15807, 0.05896, -0.9235], fov=0.5)),
                    width=224, height=224, shader_pack="minimal", meshes="light")


def has_renderer(render_backend: str) -> bool:
    """Whether SAPIEN can draw here; if not, says so and what it needs."""
    try:
        sapien.render.RenderSystem(sapien.Device("cuda" if render_backend == "sapien_cuda" else "cpu"))
        return True
    except RuntimeError as error:
        if RANK == 0:
            print(f"{SCRIPT}: warning: no videos, for want of a Vulkan device ({error}); on a CPU install Mesa's lavapipe >= "
                  "24.3: bash tests/install_cpu_renderer.sh", file=sys.stderr)
        return False


@torch.no_grad()
def evaluate(agent, envs, num_videos: int = 0):
    """One episode a scene with the deterministic policy, on seeds that never change.

    Returns:
        metrics: success_once (at any step), success_at_end (in the last step), episode_len (steps until the first success
            or the time-out), return (sum of rewards until then): means over the episodes of all ranks.
        video: (max_episode_steps, H, W, 3) uint8, `num_videos` scenes side by side, each until its first success, then
            still and framed in green; None without, and on ranks other than 0. Every rank films its share of them.
    """
    first_seed = 1_000_000 + RANK * envs.num_envs
    obs, _ = envs.reset(seed=list(range(first_seed, first_seed + envs.num_envs)))
    once = torch.zeros(envs.num_envs, dtype=torch.bool, device=envs.device)
    episode_len, episode_return = torch.zeros(2, envs.num_envs, device=envs.device)
    filmed, shown, frames = torch.arange(len(range(RANK, num_videos, WORLD_SIZE)), device=envs.device), None, []
    for _ in range(envs.max_episode_steps):
        obs, reward, _, _, info = envs.step(agent.get_mean_action(obs))
        episode_len += ~once
        episode_return += reward * ~once
        going = filmed[~once[filmed]]
        once |= info["success"]
        if len(going):
            pictures = envs.render_frames(going)
            shown = pictures if shown is None else shown.index_copy(0, going, pictures)
            for edge in (shown[:, :4], shown[:, -4:], shown[:, :, :4], shown[:, :, -4:]):
                edge[once[filmed]] = torch.tensor([0, 200, 0], dtype=torch.uint8, device=shown.device)
        if len(filmed):
            frames.append(torch.cat(list(shown), 1).cpu().numpy())
    means = all_reduce_sum(torch.stack([once, info["success"], episode_len, episode_return]).mean(1)) / WORLD_SIZE
    names = ("success_once", "success_at_end", "episode_len", "return")
    films = [film for film in gather_all(np.stack(frames) if frames else None) if film is not None]
    return dict(zip(names, means.tolist())), np.concatenate(films, 2) if films and RANK == 0 else None


def log_evaluation(agent, envs, args, run_dir: Path, writer, global_step: int, env_steps: int) -> float:
    """Evaluate; print the metrics, and write them and a film of four scenes to TensorBoard and videos/global_step_<N>.mp4.

    Returns:
        success_once, on every rank.
    """
    metrics, video = evaluate(agent, envs, min(4, WORLD_SIZE * envs.num_envs) if args.capture_video else 0)
    if RANK > 0:
        return metrics["success_once"]
    for name, value in metrics.items():
        writer.add_scalar(f"eval/{name}", value, global_step)
    said = ", ".join(f"eval/{name} {value:.3f}" for name, value in metrics.items())
    if video is not None:
        import imageio
        from tensorboard.compat.proto.summary_pb2 import Summary

        path, gif = run_dir / "videos" / f"global_step_{global_step}.mp4", io.BytesIO()
        path.parent.mkdir(exist_ok=True)
        imageio.mimwrite(path, video, fps=20, macro_block_size=1)  # the control frequency
        imageio.mimwrite(gif, video[::2], format="GIF", duration=100, loop=0)
        image = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=gif.getvalue())
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), global_step)
        said += f", {path}"
    tqdm.write(f"global step {global_step}, {env_steps:,} env steps: {said}")
    return metrics["success_once"]


def mean_losses(losses, global_step: int, run_dir: Path) -> dict:
    """Collective: the losses, in this order, averaged over the ranks; the first alone while no policy is trained. NaN ends the
    run."""
    losses = (all_reduce_sum(losses.double()) / WORLD_SIZE).tolist()
    if not np.isfinite(losses).all():
        fail(f"the losses are no longer finite at global step {global_step}; continue from the last checkpoint with a "
             f"smaller --learning-rate: --resume-dir {run_dir}")
    return dict(zip([f"losses/{name}" for name in ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")], losses))


def log_iteration(writer, progress, global_step: int, finished, scalars: dict):
    """Write `scalars`, and the means over the `finished` episodes: their number, successes, sums of lengths and returns."""
    episodes, successes, lengths, total_return = finished
    if episodes:
        scalars |= {"env/success_once": successes / episodes, "env/episode_len": lengths / episodes,
                    "env/return": total_return / episodes, "env/reward": total_return / lengths}
    for name, value in scalars.items():
        writer.add_scalar(name, value, global_step)
    progress.set_postfix_str(f"step {global_step}, success {successes / max(episodes, 1):.0%}, "
                             f"{scalars['charts/SPS']:.0f} env steps/s")


# ---------------------------------------------------------------------------------------------- contract

LABELS = ("success", "failure")
TO_GOAL = ("to_goal_x", "to_goal_y", "to_goal_z")


def contract_differences(theirs: dict, ours: dict):
    """What two contracts disagree on, in words; another version of ManiSkill only gets a warning."""
    if theirs.get("source") != ours.get("source"):
        return ["some are anyone's own pictures, others are frames of a ManiSkill task"]
    if RANK == 0 and theirs.get("mani_skill_version") != ours.get("mani_skill_version"):
        print(f"{SCRIPT}: warning: the frames were made with ManiSkill {theirs.get('mani_skill_version')}, here it is "
              f"{ours.get('mani_skill_version')}", file=sys.stderr)
    # Format 1 knew no other meshes.
    theirs, ours = (dict(x, format_version=2, meshes="stock") if x.get("format_version") == 1 else x for x in (theirs, ours))
    return [f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key) and key != "mani_skill_version"]


# ---------------------------------------------------------------------------------------------- frames

# Two views at right angles: one cannot tell how deep the goal is behind the cube. Those that are mounted on the goal, and move
# with it, look from 45 degrees, where fingers hide less of the cube than from the side.
CAMERAS = dict(  # pose: position in metres, quaternion wxyz; fov: vertical, in radians
    goal=dict(left=dict(mount="goal_site", pose=[0.84853, 0.84853, 0.22, 0.38111, 0.08364, 0.03465, -0.92009], fov=0.17),
              right=dict(mount="goal_site", pose=[0.84853, -0.84853, 0.22, 0.38111, -0.08364, 0.03465, 0.92009], fov=0.17)),
    workspace=dict(left=dict(pose=[0.84853, 0.84853, 0.42, 0.38111, 0.08364, 0.03465, -0.92009], fov=0.46),
                   right=dict(pose=[0.84853, -0.84853, 0.42, 0.38111, -0.08364, 0.03465, 0.92009], fov=0.46)))
COLUMNS = ("file", "label", "episode", "step", "is_final", "global_step", "env_steps", "cube_to_goal", *TO_GOAL,
           "is_obj_placed", "is_robot_static", "is_grasped")
"""of index.csv: `step` counts from 1 in each episode, `cube_to_goal` is the distance and `to_goal_...` the vector from the
cube to the goal in metres (PickCube only), flags are 0 or 1"""


def make_contract(args) -> dict:
    """What stages 2 and 4 must agree on: a reward model only knows pictures that were made exactly like this."""
    import mani_skill

    robot = inspect.signature(find_task(args.env_id).cls).parameters["robot_uids"].default
    return dict(format_version=2, env_id=args.env_id, robot=robot, control_mode=args.control_mode,
                reward_render_mode=args.reward_render_mode, show_goal_site=args.show_goal_site,
                image_size=[3, args.image_size, args.image_size], camera=views(args.env_id, args.control_mode, args.camera),
                shader="minimal", meshes=args.meshes, mani_skill_version=mani_skill.__version__)


@functools.cache
def views(env_id: str, control_mode: str, camera: Optional[str]) -> dict:
    """{name: dict(pose, fov)} of --camera; what a task has, only its environment knows."""
    env, task = make_task(env_id, 1, control_mode, "physx_cpu").unwrapped, find_task(env_id).cls
    camera = camera or ("goal" if hasattr(env, "goal_site") else "task")
    if camera == "goal" and not hasattr(env, "goal_site"):
        fail(f"--env-id {env_id} has no goal_site for --camera goal to move with; take --camera task or workspace")
    if camera != "task":
        return CAMERAS[camera]
    configs = task._default_human_render_camera_configs.fget(env)
    configs = [config for config in (configs if isinstance(configs, list) else [configs]) if config.fov and not config.mount]
    if not configs:
        fail(f"--env-id {env_id} has no camera of its own with a field of view; take --camera workspace")
    return {config.uid: dict(pose=config.pose.raw_pose[0].double().round(decimals=5).tolist(), fov=float(config.fov))
            for config in configs}


def frame_camera(contract: dict) -> dict:
    """The camera of the contract's frames, as make_envs takes it."""
    return dict(views=contract["camera"], width=contract["image_size"][2], height=contract["image_size"][1],
                shader_pack=contract["shader"], meshes=contract["meshes"])


def describe(idx, obs, info, done, args, global_step: int, env_steps: int, **counters) -> list:
    """Rows of index.csv, but for the file, of the scenes `idx` (K,); counters: `episode` and `step`, (N,) int64."""
    columns = dict({key: info[key] for key in COLUMNS if key in info}, **counters, is_final=done, label=~info["success"])
    table = torch.stack([values[idx].long() for values in columns.values()], 1).tolist()
    rows = [dict(zip(columns, row), global_step=global_step, env_steps=env_steps) for row in table]
    for row in rows:
        row["label"] = LABELS[row["label"]]
    if args.env_id == "PickCube-v1":  # its observation ends with the vector from the cube to the goal
        to_goal = obs[idx, -3:].double()
        to_goal = torch.cat([to_goal.norm(dim=1, keepdim=True), to_goal], 1).round(decimals=5)
        for row, distances in zip(rows, to_goal.tolist()):
            row.update(zip(("cube_to_goal", *TO_GOAL), distances))
    return rows


class FrameFolder:
    """success/0001.png ..., failure/..., index.csv and metadata.json: any rank adds frames, rank 0 alone writes.

    A frame's row of index.csv also travels inside its PNG (a tEXt chunk), so that the table can be rebuilt at any time and a
    crash between two files cannot make them disagree.

    Args:
        targets: frames to hold of each label; more successes are dropped, more failures replace random old ones.
    """

    def __init__(self, path: str, contract: dict, targets: dict, seed: int = 0):
        self.dir, self.targets, self.pending, self.left_out = Path(path), targets, [], 0
        self.rows = {label: [] for label in LABELS}  # rank 0: rows[label][n - 1] describes <label>/<n>.png
        self.counts, self.first_episode = on_rank0(self._open, contract)
        self.rng, self.encoder = np.random.default_rng([seed, *self.counts.values()]), ThreadPoolExecutor(1)

    def _open(self, contract):
        """Create the folder, or take over the frames in it: drop unfinished files, close gaps in the numbering."""
        metadata = self.dir / "metadata.json"
        for label in LABELS:
            (self.dir / label).mkdir(parents=True, exist_ok=True)
        if metadata.exists():
            try:
                differing = contract_differences(dict(json.loads(metadata.read_text())), contract)
            except (ValueError, TypeError):
                fail(f"{metadata} is not a JSON object; choose another folder")
            if differing:
                fail(f"{self.dir} holds frames made differently; choose another folder, or match: " + "; ".join(differing))
        elif any(self.dir.glob("*/*.png")):
            fail(f"{self.dir} holds frames but no metadata.json that says how they were made; choose another folder")
        else:
            write_file(metadata, json.dumps(contract, indent=2).encode())
        for label in LABELS:
            for leftover in (self.dir / label).glob("*.tmp"):
                leftover.unlink()
            files = sorted((f for f in (self.dir / label).glob("*.png") if f.stem.isdigit()), key=lambda f: int(f.stem))
            for number, file in enumerate(files, 1):
                file = file.replace(file.with_name(f"{number:04d}.png"))
                try:
                    with Image.open(file) as image:
                        self.rows[label].append(dict(json.loads(image.text["row"]), file=f"{label}/{file.name}"))
                except Exception:  # whatever Pillow makes of a file that is no picture
                    fail(f"{file} is not a frame of ppo_collect.py; remove it or choose another folder")
        self._write_index()
        episodes = [row["episode"] for label in LABELS for row in self.rows[label]]
        return {label: len(self.rows[label]) for label in LABELS}, max(episodes, default=-1) + 1

    def add(self, frame, row: dict):
        """Keep a (H, W, 3) uint8 frame for the next file(); a thread makes it a PNG beside the simulation."""
        def encode():
            text, png = PngInfo(), io.BytesIO()
            text.add_text("row", json.dumps(row))
            Image.fromarray(frame).save(png, "PNG", pnginfo=text, compress_level=1)
            return png.getvalue()
        self.pending.append((row, self.encoder.submit(encode)))

    def file(self):
        """Collective: rank 0 writes everybody's new frames; updates `counts` on every rank."""
        gathered, self.pending = gather_all([(row, png.result()) for row, png in self.pending]), []
        self.counts = on_rank0(self._file, gathered)

    def _file(self, gathered):
        new = []
        for row, png in (frame for frames in gathered for frame in frames):
            rows = self.rows[row["label"]]
            number = len(rows) + 1
            if number > self.targets[row["label"]]:
                self.left_out += 1
                if row["label"] == "success":
                    continue
                number = int(self.rng.integers(len(rows))) + 1
            new.append((dict(row, file=f"{row['label']}/{number:04d}.png"), png))
            rows[number - 1:number] = [new[-1][0]]
        self._write_index()  # first: no picture without its row
        for row, png in new:
            write_file(self.dir / row["file"], png)
        return {label: len(self.rows[label]) for label in LABELS}

    def _write_index(self):
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for label in LABELS for row in self.rows[label])
        write_file(self.dir / "index.csv", table.getvalue().encode())

    def preview(self, columns: int = 8, rows: int = 3, size: int = 168):
        """Rank 0: random frames, successes on green, failures on red: (H, W, 3) uint8, and preview.png."""
        sheet, cell = Image.new("RGB", (columns * (size + 4), 2 * rows * (size + 4))), size + 4
        for c, (label, color) in enumerate(zip(LABELS, ("#2a2", "#c33"))):
            sheet.paste(color, (0, c * rows * cell, sheet.width, (c + 1) * rows * cell))
            for k, row in enumerate(random.sample(self.rows[label], min(columns * rows, len(self.rows[label])))):
                with Image.open(self.dir / row["file"]) as frame:
                    sheet.paste(frame.resize((size, size)), (k % columns * cell + 2, (c * rows + k // columns) * cell + 2))
        png = io.BytesIO()
        sheet.save(png, "PNG")
        write_file(self.dir / "preview.png", png.getvalue())
        return np.asarray(sheet)


# ---------------------------------------------------------------------------------------------- reward model

@functools.cache
def fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 is faster there than float32. A CPU needs AMX or AMD's AVX-512 for that: Intel's AVX-512 is slower."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return device_type == "cuda" or "amx_bf16" in cpuinfo or "AuthenticAMD" in cpuinfo and "avx512_bf16" in cpuinfo


def load_reward_model(path: str, device):
    """The model in a checkpoint of train_reward_resnet.py, or in a folder with best_model.pt, and the contract of the frames
    that it knows."""
    path = Path(path, "best_model.pt") if Path(path).is_dir() else path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        model = RewardModel(checkpoint["arch"], checkpoint["hidden_dim"], checkpoint["input_size"])
        model.load_state_dict(checkpoint["model"])
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            raise ValueError("it has weights that are not finite")
        return model.to(device, memory_format=torch.channels_last).eval(), dict(checkpoint["contract"])
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        fail(f"{path} is not a reward model of train_reward_resnet.py ({str(error).strip().partition(chr(10))[0][:100]})")


# ---------------------------------------------------------------------------------------------- ranks

def fail(message: str):
    """End with exit code 2 and one line on stderr: what is wrong, where, and what to do."""
    if RANK == 0:
        print(f"{SCRIPT}: error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(10)  # for rank 0 to say why: the first rank that fails ends all
    sys.exit(2)


def usable_cores(cgroup: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int:
    """The cores that this process may use: those of its affinity, at most what its container's quotas of CPU time amount to
    (cpu.max of cgroup v2, cpu.cfs_quota_us of v1; also those of the groups around its own)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    groups = {Path()}
    with contextlib.suppress(OSError):
        for line in Path(cgroup).read_text().splitlines():
            group = Path(line.split(":", 2)[2].lstrip("/"))
            groups |= {group, *group.parents}
    for group in groups:
        for files in ([Path(root, group, "cpu.max")],
                      [Path(root, "cpu", group, name) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")]):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                quota, period = map(int, " ".join(file.read_text() for file in files).split())
                if quota > 0:  # v1 says -1 for none
                    cores = min(cores, max(1, quota // period))
    return cores


def start_ranks(num_procs: int):
    """Fork a process per rank, with torchrun's variables set. Only the ranks return: this process ends with the last of them,
    or ends them once one has failed, and its exit code is the first that is not 0."""
    global RANK, WORLD_SIZE, LAUNCHER
    with socket.socket() as s:
        s.bind(("localhost", 0))
        os.environ |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]),
                           WORLD_SIZE=str(num_procs), LOCAL_WORLD_SIZE=str(num_procs))
    sys.stdout.flush()
    has_cuda, running = torch.cuda.is_available(), []
    for rank in range(num_procs):
        pid = os.fork()  # a rank that imports everything again takes seconds
        if pid == 0:
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank))
            if has_cuda:  # CUDA does not survive a fork
                os.execv(sys.executable, [sys.executable, *sys.argv])
            RANK, WORLD_SIZE, LAUNCHER = rank, num_procs, f"{os.environ.get('TORCHELASTIC_RUN_ID')}-{os.getppid()}"
            return
        running.append(pid)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: [os.kill(pid, signum) for pid in running])
    code = 0
    while running:
        pid, status = os.wait()
        running.remove(pid)
        code = code or abs(os.waitstatus_to_exitcode(status))
        if code:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
    sys.exit(code)


def my_gpu() -> torch.device:
    """This rank's: ranks that simulate on the CPU may share one."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def join_ranks(gpu: bool) -> torch.device:
    """Take this rank's GPU or share of the cores, and form the process group; a rank that loses another says so in a line."""
    device = my_gpu() if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))))
    if WORLD_SIZE == 1:
        return device
    python_hook = sys.excepthook

    def hook(kind, error, traceback):
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            print(f"{SCRIPT}: rank {RANK} has lost another rank; continue from the last checkpoint", file=sys.stderr)
        else:
            python_hook(kind, error, traceback)

    sys.excepthook = hook
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it starts ranks anew: under the same keys, the first would find the addresses of the dead.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=RANK, world_size=WORLD_SIZE)
    atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter, whatever ends it
    return device


def catch_signals() -> list:
    """SIGINT and SIGTERM no longer end the process, but appear in this list."""
    caught = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: caught.append(signum))
    return caught


def on_rank0(function, *arguments):
    """Call `function` on rank 0 and return its result on every rank. Where it fails on a file, every rank ends."""
    result = [None, False]
    if RANK == 0:
        try:
            result = [function(*arguments), True]
        except OSError as error:
            print(f"{SCRIPT}: error: {error.filename or 'writing'}: {error.strerror}; what was written before is whole: "
                  "mend that, then resume", file=sys.stderr)
        except SystemExit:  # fail() has spoken
            pass
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(result)
    if not result[1]:
        sys.exit(2)
    return result[0]


def all_reduce_sum(tensor):
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensors):
    """Give the tensors of rank 0 to every rank."""
    for tensor in tensors if WORLD_SIZE > 1 else ():
        dist.broadcast(tensor.data, 0)


def average_gradients(parameters):
    """Average the gradients over the ranks: one all-reduce of one flat tensor."""
    if WORLD_SIZE > 1:
        flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters])) / WORLD_SIZE
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p.grad))


# ---------------------------------------------------------------------------------------------- gathering

def gather_all(value):
    """The `value` of every rank, in a list, on every rank."""
    values = [value]
    if WORLD_SIZE > 1:
        values = [None] * WORLD_SIZE
        dist.all_gather_object(values, value)
    return values


# ---------------------------------------------------------------------------------------------- files

def write_file(path: Path, data: bytes, sync: bool = False):
    """Write via a temporary file, so that `path` never holds half of it; `sync`: not even after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(data)
        if sync:
            f.flush()
            os.fsync(f.fileno())
    os.replace(temporary, path)


def make_run_dir(args) -> Path:
    """Create <log-dir>/<timestamp>-<exp-name>/ with args.json, which also holds the command line.

    Of runs that begin in the same second the second one's timestamp ends in _2, and so on.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    for again in ("", *(f"_{n}" for n in range(2, 1000))):
        run_dir = Path(args.log_dir, f"{now}{again}-{args.exp_name}")
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    write_file(run_dir / "args.json",
               json.dumps(dict(asdict(args), command=shlex.join(sys.argv), launcher=LAUNCHER), indent=2).encode())
    return run_dir


# ---------------------------------------------------------------------------------------------- checkpoints

def save_checkpoint(run_dir: Path, agent, optimizer, global_step: int, env_steps: int, args):
    """checkpoints/global_step_<N>/checkpoint.pt, tensors and plain values only."""
    folder, buffer = run_dir / "checkpoints" / f"global_step_{global_step}", io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(script=SCRIPT, agent=agent.state_dict(), optimizer=optimizer.state_dict(), global_step=global_step,
                    env_steps=env_steps, args=asdict(args)), buffer)
    write_file(folder / "checkpoint.pt", buffer.getvalue(), sync=True)


def restarted_run(args) -> Optional[str]:
    """After `torchrun --max-restarts` has started the ranks anew: the folder of the run that they had begun; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        for file in sorted(Path(args.log_dir).glob("*/args.json"), reverse=True):
            if json.loads(file.read_text()).get("launcher") == LAUNCHER and any(file.parent.glob("checkpoints/*/*.pt")):
                return str(file.parent)
    return None


def load_checkpoint(args):
    """The checkpoint in --resume-dir, which is its folder or file, or the newest whole one of a run's folder.

    Returns:
        checkpoint, run_dir; (None, None) without --resume-dir.
    """
    resume_dir = restarted_run(args) or args.resume_dir
    if not resume_dir:
        return None, None
    path, error = Path(resume_dir), "there is none"
    steps = [folder for folder in path.glob("checkpoints/global_step_*") if folder.name[12:].isdigit()]
    files = [file.resolve() for file in (path, path / "checkpoint.pt") if file.is_file()] or [
        folder / "checkpoint.pt" for folder in sorted(steps, key=lambda folder: -int(folder.name[12:]))]
    for file in files:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            if {"script", "agent", "optimizer", "global_step", "env_steps"} <= checkpoint.keys():
                return checkpoint, file.parents[2]
            error = "it was not written by this project"
        except Exception as e:  # torch.load raises many kinds of errors for damaged files
            error = str(e).strip().partition("\n")[0][:100]
    fail(f"--resume-dir {resume_dir}: no checkpoint could be read ({error}); name a run's folder or a checkpoint's")


def load_weights(agent, optimizer, checkpoint):
    """Take over the checkpoint's agent and Adam's moments: without them, its first steps hurt a trained policy."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(dict(optimizer.state_dict(), state=checkpoint["optimizer"]["state"]))  # step sizes: ours
        if not all(weight.isfinite().all() for weight in agent.state_dict().values()):
            raise ValueError("it has weights that are not finite")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        fail(f"the checkpoint does not fit this task's agent ({str(error).splitlines()[-1].strip()}); was it trained with "
             "another --env-id or --control-mode?")


def command_to_go_on(run_dir: Path) -> str:
    """This command line, with `run_dir` as its --resume-dir."""
    argv = list(sys.argv)
    for i in reversed(range(len(argv))):
        if argv[i].replace("_", "-").partition("=")[0] == "--resume-dir":
            del argv[i:i + (1 if "=" in argv[i] else 2)]
    return shlex.join(["python", *argv, "--resume-dir", str(run_dir)])


# ---------------------------------------------------------------------------------------------- flags

RANGES = dict(
    seed=(0, 10**9), critic_warmup=(0, 10**9), target_kl=(0, 100), alpha=(0, 100), image_size=(32, 1024),
    input_size=(32, 1024), hidden_dim=(1, 1024), batch_size=(2, 65536), val_split=(0.001, 0.9), random_shift=(0, 0.5),
    color_jitter=(0, 0.9), final_weight=(0, 100), to_goal_weight=(0, 100))
"""of flags, in any of the scripts; other whole numbers are at least 1, other numbers between 0 and 1"""


def parse_args():
    """The flags of the command line in one flat Args; --help shows them in the groups that Args inherits."""
    for k, flag in enumerate(sys.argv):  # a shell makes several folders of logs/*-ppo_dense
        values = list(itertools.takewhile(lambda word: not word.startswith("--"), sys.argv[k + 1:]))
        several_ok = isinstance(getattr(Args, flag[2:].replace("-", "_"), None), tuple)
        if flag.startswith("--") and len(values) > 1 and not several_ok:
            fail(f"{flag} names several: {', '.join(values)}; name one")
    groups = make_dataclass("Groups", [(base.__name__.removesuffix("Args"), base) for base in reversed(Args.__bases__)])
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[groups], description=__doc__)
    args = Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high = RANGES.get(name, (1, 10**9) if isinstance(value, int) else (0, 1))
            if not low <= value <= high:  # NaN is in no range
                fail(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    return args


# ---------------------------------------------------------------------------------------------- PPO's flags

def check_args(args) -> int:
    """Refuse what cannot work before anything is started; fill in the defaults that depend on the machine.

    Returns:
        the number of ranks.
    """
    for name, prefix in (("sim_backend", "physx"), ("render_backend", "sapien")):
        if getattr(args, name) == "auto":
            setattr(args, name, f"{prefix}_{'cuda' if args.cuda and torch.cuda.is_available() else 'cpu'}")
        if getattr(args, name).endswith("cuda") and not torch.cuda.is_available():
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} needs an NVIDIA GPU and none was found; leave it out")
    gpu = args.sim_backend == "physx_cuda"
    if gpu and args.render_backend == "sapien_cpu":
        fail("--render-backend sapien_cpu cannot draw what --sim-backend physx_cuda simulates; leave one of them out")
    if gpu and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the other ranks wait for it when they join
        try:
            sapien.physx.enable_gpu()
        except (OSError, zipfile.BadZipFile) as error:
            fail(f"SAPIEN could not download PhysX's library for GPUs ({str(error)[:80]}); run python -c 'import sapien; "
                 "sapien.physx.enable_gpu()' where there is a network, or simulate on the CPU: --sim-backend physx_cpu")
    for name, (gpu_default, cpu_default) in GPU_CPU_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu_default if gpu else cpu_default)
    find_task(args.env_id)
    most = max(1, min(usable_cores(), args.num_envs // 16))  # a rank costs 0.9 GB: not for a handful of scenes
    num_ranks = WORLD_SIZE if "WORLD_SIZE" in os.environ else 1 if gpu else args.num_procs or next(
        n for n in range(most, 0, -1) if args.num_envs % n == 0 and args.num_eval_envs % n == 0)
    for name in ("num_envs", "num_eval_envs"):
        if getattr(args, name) % num_ranks:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared by {num_ranks} ranks; take a multiple")
    if args.num_envs // num_ranks * args.num_steps < args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} is more than the {args.num_envs // num_ranks * args.num_steps} steps "
             "of a rank's rollout")
    if args.evaluate and not args.resume_dir:
        fail("--evaluate needs a checkpoint: --resume-dir logs/<run>")
    load_checkpoint(args)
    return num_ranks


if __name__ == "__main__":
    torch.set_num_threads(1)  # until join_ranks: a process with threads cannot be forked
    args = parse_args()
    if args.ignore_terminations and args.done_by == "resnet":
        fail("--ignore-terminations and --done-by resnet exclude each other; take one of them")
    args.done_by = "time" if args.ignore_terminations else args.done_by
    if args.gamma is None:
        args.gamma = 0.99 if args.done_by == "time" else 0.95
    num_ranks = check_args(args)
    matching_reward_model(args, make_contract(args))
    if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        start_ranks(num_ranks)
    train(args)
