"""Stage 1: train PPO on a task's dense reward and save labelled frames.

    writes  data/{success,failure}/0001.png ...  224x224 RGB, by label
            data/metadata.json  how they were made: stages 2 and 4 take it over
            data/index.csv      a row a frame; data/preview.png shows some
            logs/<timestamp>-ppo_collect/  TensorBoard events, args.json,
                                videos/, checkpoints/global_step_<N>/

    python ppo_collect.py --target-success 5000    # on a GPU if there is one
    python ppo_collect.py --resume-dir logs/<run>  # go on where a run stopped
"""
import atexit
import contextlib
import csv
import ctypes
import fcntl
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
from collections import defaultdict
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
import tyro
from PIL import Image, ImageOps
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
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
    env_id: str = "PickCube-v1"  # with `success` and a dense reward; module:Task-v1 imports a module first
    robot_uids: str = ""  # a robot that the task supports; none: the task's own
    control_mode: str = "pd_joint_delta_pos"  # ManiSkill controller of the arm
    sim_backend: Literal[BACKENDS] = BACKENDS[0]  # where physics runs
    num_procs: int = field(default_factory=lambda: min(usable_cores(), 4))  # a CPU's ranks share the scenes
    log_dir: str = "logs"  # parent of the runs' folders
    resume_dir: tuple[str, ...] = ()  # runs or checkpoints; the newest goes on
    evaluate: bool = False  # only evaluate the checkpoint in --resume-dir

    num_envs: int = 64  # parallel scenes of all processes
    num_steps: int = 25  # of every scene in one rollout
    num_iterations: int = 1000  # global steps, each a rollout and an update
    num_minibatches: int = 4  # in an update epoch
    update_epochs: int = 8  # passes over a rollout's data
    learning_rate: float = 2e-4  # Adam's step size
    gamma: Share = 0.9  # discount factor per step
    gae_lambda: Share = 0.9  # lambda of GAE (arXiv:1506.02438)
    clip_coef: Share = 0.2  # PPO's clipping range (arXiv:1707.06347)
    target_kl: float = 0.03  # mean KL of an epoch in nats that ends the policy's update
    action_l2: float = 0.005  # weight of the mean action's square
    eval_freq: int = 40  # global steps between evaluations
    num_eval_envs: int = 128  # evaluation episodes of all processes
    save_interval: int = 20  # global steps between checkpoints
    capture_video: bool = True  # film the first evaluation scenes, into videos/

    target_success: int = 5000  # frames
    target_failure: int = 5000  # frames
    sample_rate_success: Share = 1.0  # share of the successes that is saved
    sample_rate_fail: Share = 0.01  # of all failure frames
    sample_rate_fail_final: Share = 0.3  # of frames that end a failed episode
    sample_rate_near_miss: Share = 0.05  # of the cube 2.5 to 5 cm from the goal (PickCube)
    save_dir: str = "data"  # folder of the frames; those in it count
    image_size: int = 224  # side of the frames in pixels
    camera: Literal["goal", "workspace", "task"] = "goal"  # task where there is no goal_site
    show_goal_site: bool = True  # show the goal marker
    meshes: Literal["light", "stock"] = "stock" if GPU else "light"  # light: fewer triangles


class FrameCollector:
    """Chooses frames and photographs them. At first a policy only fails: failures may be ahead by half of
    their target; those beyond are photographed ever less and replace random old ones."""

    def __init__(self, args: Args, contract: dict):
        self.args, self.targets = args, dict(success=args.target_success, failure=args.target_failure)
        self.folder = FrameFolder(args.save_dir, contract, dict(self.targets), args.seed)
        self.chosen, self.newly_chosen = self.folder.counts["failure"], 0.0  # failures that the rates chose, expected
        self.file()

    def progress(self) -> float:
        """Share of the targets; 1 ends the run."""
        return min(min(self.folder.counts[label] / self.targets[label], 1.0) for label in LABELS)

    def photograph(self, envs, info, done, *when, **counters):
        """Take the frames that the rates choose, before finished scenes are reset."""
        args, success = self.args, info["success"]
        rate = torch.where(done, max(args.sample_rate_fail, args.sample_rate_fail_final), args.sample_rate_fail)
        near = cube_to_goal(envs).norm(dim=1) <= 0.05  # NaN is not
        rate = torch.where(near, rate.clamp(min=args.sample_rate_near_miss), rate)
        moving = info.get("is_obj_placed", success) & ~info.get("is_robot_static", success)  # looks like success
        rate[success | moving] = 0.0
        self.newly_chosen += rate.sum(dtype=torch.float64)
        rate *= self.failure_share
        if self.folder.counts["success"] < args.target_success:
            rate[success] = args.sample_rate_success
        idx = (torch.rand(rate.shape, device=rate.device) < rate).nonzero().squeeze(-1)
        if len(idx):
            self.folder.add(envs.render_frames(idx), frame_rows(idx, envs, info, done, *when, **counters))

    def file(self):
        """Collective: file the new frames, and find what share of the failures to photograph."""
        self.folder.file()
        self.chosen += sum_over_ranks(dict(chosen=self.newly_chosen))["chosen"]
        counts, self.newly_chosen = self.folder.counts, 0.0
        room = self.targets["failure"] * min(0.5 + counts["success"] / self.targets["success"], 1.0)
        self.folder.targets["failure"] = room = max(int(room), 1)
        self.failure_share = 1.0 if counts["failure"] < room else room / max(self.chosen, room)


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


def train(args: Args, task: dict, checkpoint: Optional[dict]):
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
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    if checkpoint:
        agent.load_state_dict(checkpoint["agent"])
        # Without Adam's moments its first steps would hurt a trained policy; step sizes are ours
        optimizer.load_state_dict(optimizer.state_dict() | dict(state=checkpoint["optimizer"]["state"]))
    run_dir, writer = make_run_dir(args, f"{SCRIPT}-evaluate" if args.evaluate else SCRIPT)
    if args.evaluate:
        return log_evaluation(agent, eval_envs, run_dir, writer, global_step, env_steps)

    # Scenes: no other rank, seed or run that adds frames may repeat their episodes
    contract = make_contract(args, task, eval_envs)
    collector = FrameCollector(args, contract)
    folder = collector.folder
    envs = ManiSkillEnvs(args, task, args.num_envs // WORLD_SIZE, camera=contract)
    seed = int(np.random.SeedSequence([args.seed, global_step, folder.first_episode, RANK, 1]).generate_state(1)[0])
    torch.manual_seed(seed)
    current_obs, _ = envs.reset(seed=seed)
    # First time-outs are spread over an episode (arXiv:2511.21011): a rollout holds all parts of it
    num_envs = envs.num_envs
    envs.elapsed_steps[:] = torch.arange(num_envs) * envs.max_episode_steps // num_envs

    # Storage of one rollout
    obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)
    next_obs = torch.zeros_like(obs)  # the true ones, before any reset
    actions = torch.zeros((args.num_steps, num_envs, action_dim), device=device)
    logprobs, rewards = torch.zeros((2, args.num_steps, num_envs), device=device)
    dones, terminal = torch.zeros((2, args.num_steps, num_envs), dtype=torch.bool, device=device)
    episode_id = folder.first_episode + RANK * num_envs + torch.arange(num_envs, device=device)
    episode_len, episode_return = torch.zeros((2, num_envs), device=device)

    bar = tqdm(total=args.target_success + args.target_failure, unit="frame", disable=RANK > 0)
    first_env_steps, start_time = env_steps, time.time()
    stop_signals, last, sums = [], collector.progress() == 1, dict(stop=0)
    on_stop_signal(stop_signals.append)
    while not last:
        global_step += 1

        # Rollout
        finished = dict.fromkeys(("episodes", "success_once", "episode_len", "return"), 0.0)  # sums
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, *_ = agent.get_action_and_logprob(current_obs)
            obs[step], actions[step], logprobs[step] = current_obs, action, logprob
            current_obs, reward, terminated, truncated, info = envs.step(action)
            done = terminated | truncated
            next_obs[step], rewards[step], dones[step] = current_obs, reward, done
            env_steps += num_envs * WORLD_SIZE
            episode_len += 1
            episode_return += reward
            collector.photograph(envs, info, done, global_step, env_steps, episode=episode_id, step=episode_len)
            done_idx = done.nonzero().squeeze(-1)
            if len(done_idx):
                finished["episodes"] += len(done_idx)
                finished["success_once"] += info["success"][done_idx].sum()
                finished["episode_len"] += episode_len[done_idx].sum()
                finished["return"] += episode_return[done_idx].sum()
                current_obs, _ = envs.reset(options=dict(env_idx=done_idx))
                episode_id[done_idx] += num_envs * WORLD_SIZE
                episode_len[done_idx] = 0
                episode_return[done_idx] = 0.0
        collector.file()

        # Update
        with torch.no_grad():
            values, next_values = agent.get_value(obs), agent.get_value(next_obs)
        # Nothing is terminal: where the reward is dense, an end that is worth nothing teaches avoidance
        advantages = compute_gae(rewards, values, next_values, terminal, dones, args.gamma, args.gae_lambda)
        returns = advantages + values
        losses = ppo_update(agent, optimizer, obs, actions, logprobs, advantages, returns, args)
        agent.update_normalization(obs)

        # Log
        sums = sum_over_ranks(finished | losses | dict(stop=len(stop_signals)))
        if RANK == 0:
            scalars = {f"losses/{name}": sums[name] / WORLD_SIZE for name in losses}
            scalars["losses/explained_variance"] = 1 - (advantages.var() / returns.var()).item()
            sps = (env_steps - first_env_steps) / (time.time() - start_time)
            scalars |= {"charts/SPS": sps, "charts/env_steps": env_steps}
            scalars |= {f"data/{label}": count for label, count in folder.counts.items()}
            bar.n = sum(folder.counts.values())
            log_iteration(writer, bar, global_step, sums, scalars)

        # Checkpoint, then evaluate
        last = sums["stop"] > 0 or collector.progress() == 1 or global_step == args.num_iterations
        if last or global_step % args.save_interval == 0 or global_step % args.eval_freq == 0:
            save_checkpoint(run_dir, agent, optimizer, global_step, env_steps, args, task)
        if last or global_step % args.eval_freq == 0:
            if RANK == 0:
                writer.add_image("data/preview", folder.preview(), global_step, dataformats="HWC")
            log_evaluation(agent, eval_envs, run_dir, writer, global_step, env_steps)

    bar.close()
    say(f"{args.save_dir}: {folder.counts['success']} success and {folder.counts['failure']} failure frames "
        f"after {env_steps:,} env steps and {time.time() - start_time:.0f} s")
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


# -------------------- cameras

def two_views(height: float, fov: float, **more) -> dict:
    """One cannot tell how deep the goal is. Poses are of ManiSkill's look_at (metres, wxyz), fov in radians."""
    return {name: dict(more, pose=[0.84853, y * 0.84853, height, 0.38111, y * 0.08364, 0.03465, y * -0.92009], fov=fov)
            for name, y in (("left", 1), ("right", -1))}


CAMERAS = dict(goal=two_views(0.22, 0.17, mount="goal_site"), workspace=two_views(0.42, 0.46))


def make_contract(args, task: dict, envs) -> dict:
    """What metadata.json says; stage 2 hands it on to stage 4, which takes such pictures."""
    import mani_skill
    from mani_skill.sensors.camera import parse_camera_configs

    camera = args.camera if hasattr(envs.unwrapped, "goal_site") or args.camera != "goal" else "task"
    views = CAMERAS.get(camera) or {
        name: dict(pose=config.pose.raw_pose[0].double().round(decimals=5).tolist(), fov=float(config.fov),
                   **dict(mount=config.mount.name) if config.mount else {})
        for name, config in parse_camera_configs(envs.unwrapped._default_human_render_camera_configs).items()}
    return dict(format_version=4, **task, views=views, width=args.image_size, height=args.image_size,
                meshes=args.meshes, show_goal_site=args.show_goal_site, mani_skill_version=mani_skill.__version__)


# -------------------- frames

class FrameFolder:
    """success/0001.png ..., failure/..., index.csv, metadata.json: any rank adds, rank 0 writes. Frames without
    a row (after a crash, or from a person) stay and count: their folder is their label. Beyond the
    `targets` successes are dropped, and failures replace random old ones."""

    def __init__(self, path: str, contract: dict, targets: dict, seed: int):
        self.dir, self.targets, self.pending = Path(path), targets, []
        self.rows, self.others, self.numbers = {}, {}, {}  # rank 0, of each label
        if RANK == 0:
            self._open(contract)
        self.file()
        self.rng = np.random.default_rng([seed, *self.counts.values()])

    def _open(self, contract: dict):
        metadata, index = self.dir / "metadata.json", self.dir / "index.csv"
        for label in LABELS:
            (self.dir / label).mkdir(parents=True, exist_ok=True)
        self.lock = open(self.dir / ".lock", "a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            known = dict(json.loads(metadata.read_text())) if metadata.exists() else {}
            table = csv.DictReader(index.read_text().splitlines() if index.exists() else [])
            rows = {row["file"]: row | dict(episode=int(row["episode"])) for row in table}
        except BlockingIOError:
            fail(f"another run writes into {self.dir}")
        except (ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
            fail(f"{metadata} or {index} is damaged: {error}")
        if any(self.dir.glob("*/*.png")) and differences(known, contract):
            fail(f"{self.dir} holds frames made differently: {differences(known, contract)}")
        write_file(metadata, json.dumps(contract, indent=2).encode())
        for label in LABELS:
            files = [f"{label}/{file.name}" for file in (self.dir / label).glob("*.png")]
            self.rows[label] = [rows[file] for file in files if file in rows]
            self.others[label] = len(files) - len(self.rows[label])
            self.numbers[label] = max([int(n) for file in files for n in re.findall(r"\d+", file)], default=0)

    def add(self, frames, rows: list):
        self.pending += [(row, to_png(frame)) for frame, row in zip(frames.cpu(), rows)]

    def file(self):
        """Collective: rank 0 writes new frames, then the table, then removes what was replaced."""
        new, self.pending, replaced = sum(gather(self.pending), []), [], []
        for row, png in new if RANK == 0 else []:
            label, rows = row["label"], self.rows[row["label"]]
            if len(rows) + self.others[label] >= self.targets[label]:
                if label == "success" or not rows:
                    continue
                replaced.append(rows.pop(self.rng.integers(len(rows))))
            self.numbers[label] += 1  # none is used twice
            rows.append(row | dict(file=f"{label}/{self.numbers[label]:04d}.png"))
            write_file(self.dir / rows[-1]["file"], png)
        rows = [row for label in self.rows for row in self.rows[label]]
        if RANK == 0:
            write_index(self.dir, rows)
        for row in replaced:
            (self.dir / row["file"]).unlink()
        counts = {label: len(self.rows[label]) + self.others[label] for label in self.rows}
        self.counts, self.first_episode = gather((counts, max([row["episode"] for row in rows], default=-1) + 1))[0]

    def preview(self, size: int = 172):
        """Rank 0: random successes in green, failures in red: (H, W, 3) uint8, and preview.png."""
        sheet = Image.new("RGB", (8 * size, 6 * size))
        for c, (label, color) in enumerate(zip(LABELS, ("#2a2", "#c33"))):
            for k, row in enumerate(self.rng.permutation(self.rows[label])[:24]):
                frame = Image.open(self.dir / row["file"]).resize((size - 4, size - 4))
                sheet.paste(ImageOps.expand(frame, 2, color), (k % 8 * size, (3 * c + k // 8) * size))
        sheet.save(self.dir / "preview.png")
        return np.asarray(sheet)


# -------------------- contract

def differences(theirs: dict, ours: dict) -> str:
    """What two contracts disagree on, but for the version of ManiSkill."""
    keys = sorted({*theirs, *ours} - {"mani_skill_version"})
    return "; ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in keys
                     if theirs.get(key) != ours.get(key))


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
    args = parse_args()
    task = find_task(args.env_id, args.robot_uids, args.control_mode)
    checkpoint = load_checkpoint(args, task) if args.resume_dir or args.evaluate else None
    start_ranks(args)
    try:
        train(args, task, checkpoint)
    except OSError as error:
        fail(f"{error}; what was written before is whole: mend that, then resume")
