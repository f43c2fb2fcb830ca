"""Stage 1: train PPO on PickCube's dense reward and save labelled frames for the reward model.

    writes  data/success/0001.png ..., data/failure/0001.png ...   224x224 RGB, the folder is the label
            data/metadata.json   how the frames were made; stages 2 and 4 refuse data and models that do not match
            data/index.csv       a row a frame: episode, step, distance of the cube to the goal, ...
            data/preview.png     random frames of both classes
            logs/<timestamp>-ppo_collect/   TensorBoard events, args.json, videos/, checkpoints/global_step_<N>/

    python ppo_collect.py --target-success 5000       # on the GPU if there is one, else one process a core
    torchrun --nproc-per-node=8 ppo_collect.py        # eight GPUs
    python ppo_collect.py --resume-dir logs/<run>     # go on where an interrupted run stopped
"""
import atexit
import csv
import ctypes
import gc
import io
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Literal, Optional

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.distributions.normal import Normal
from torch.utils.tensorboard import SummaryWriter
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
    """any ManiSkill task that reports `success`; on a CPU, tasks other than PickCube-v1 run one scene a rank, slowly"""
    control_mode: str = "pd_joint_delta_pos"
    """ManiSkill controller of the arm, the same in all stages"""
    sim_backend: Literal["auto", "physx_cuda", "physx_cpu"] = "auto"
    """where the physics runs; auto: physx_cuda with a GPU, else physx_cpu"""
    num_procs: Optional[int] = None
    """ranks to start on a CPU; None: one a core (a GPU run is one process; for more use torchrun)"""
    log_dir: str = "logs"
    """parent of the runs' folders"""
    resume_dir: Optional[str] = None
    """checkpoint folder or run folder (its newest checkpoint): this script's own is continued, another's starts a new run"""
    evaluate: bool = False
    """only evaluate the checkpoint in --resume-dir"""


@dataclass
class PPOArgs:
    num_envs: Optional[int] = None
    """parallel scenes of all ranks together; None: 256 on a GPU, 64 on a CPU"""
    num_steps: int = 50
    """steps of every scene in one rollout"""
    num_iterations: Optional[int] = None
    """global steps at most; one is a rollout and its update; None: 1000 on a GPU, 500 on a CPU"""
    num_minibatches: Optional[int] = None
    """minibatches in an update epoch; None: 32 on a GPU, 8 on a CPU"""
    update_epochs: int = 8
    """passes over a rollout's data"""
    learning_rate: Optional[float] = None
    """Adam's step size, at first; None: 3e-4 on a GPU, 1e-3 on a CPU"""
    anneal_lr: Optional[bool] = None
    """lower the step size in proportion to what is left of the run; None: off on a GPU, on on a CPU"""
    gamma: float = 0.8
    """discount factor per step"""
    gae_lambda: float = 0.9
    """lambda of generalised advantage estimation (arXiv:1506.02438)"""
    clip_coef: float = 0.2
    """PPO's clipping range (arXiv:1707.06347)"""
    target_kl: float = 0.1
    """an update ends after the epoch whose mean KL divergence (nats) exceeds this"""
    eval_freq: int = 40
    """global steps between evaluations"""
    num_eval_envs: int = 128
    """evaluation episodes of all ranks together"""
    save_interval: int = 20
    """global steps between checkpoints"""
    capture_video: bool = True
    """film the first evaluation scenes, into videos/ and TensorBoard"""


@dataclass
class FrameArgs:
    target_success: int = 5000
    """success frames to collect"""
    target_failure: int = 5000
    """failure frames to collect; once complete, new ones replace random old ones until the successes are complete too"""
    sample_rate_success: float = 1.0
    """share of the frames in which the task succeeds that is saved"""
    sample_rate_fail: float = 0.01
    """share of all failure frames that is saved"""
    sample_rate_fail_final: float = 0.3
    """share of the frames that end a failed episode that is saved"""
    sample_rate_near_miss: float = 0.05
    """share of the failure frames with the cube 2.5 to 5 cm from the goal that is saved (PickCube only)"""
    keep_ambiguous: bool = False
    """also save, as failures, frames with the cube at the goal and the robot still moving: one picture cannot tell"""
    save_dir: str = "data"
    """folder of the frames; frames already there are kept and counted"""
    image_size: int = 224
    """side of the square frames in pixels (stages 2 and 4 must match)"""
    show_goal_site: bool = True
    """show the green goal sphere in the frames (stage 4 must match)"""
    reward_render_mode: Literal["episode_end", "always"] = "episode_end"
    """what stage 4 may score with this data: frames that end an episode, or every frame (stage 4 must match)"""


@dataclass
class Args(FrameArgs, PPOArgs, RunArgs):
    pass


GPU_CPU_DEFAULTS = dict(num_envs=(256, 64), num_iterations=(1000, 500),
                        num_minibatches=(32, 8), learning_rate=(3e-4, 1e-3), anneal_lr=(False, True))
RATES = ("gamma", "gae_lambda", "sample_rate_success", "sample_rate_fail", "sample_rate_fail_final", "sample_rate_near_miss")
MAY_BE_ZERO = ("seed",)


# ---------------------------------------------------------------------------------------------- environment

# A frame shows the goal and what is around it from two sides, at right angles: one view cannot tell how deep the goal is
# behind the cube. Seen from 45 degrees, fingers hide less of the cube than from the side. The cameras are mounted on the goal
# and move with it (in a task without `goal_site` they stand still).
CAMERA = dict(  # pose: position in metres, quaternion wxyz; fov: vertical, in radians
    left=dict(mount="goal_site", pose=[0.84853, 0.84853, 0.22, 0.38111, 0.08364, 0.03465, -0.92009], fov=0.17),
    right=dict(mount="goal_site", pose=[0.84853, -0.84853, 0.22, 0.38111, -0.08364, 0.03465, 0.92009], fov=0.17))
# Videos show all of the scene.
VIDEO_CAMERA = dict(view=dict(pose=[0.75, 0.65, 0.55, 0.3445, 0.15807, 0.05896, -0.9235], fov=0.5))


def find_task(env_id: str):
    """The class of a ManiSkill task."""
    import mani_skill.envs  # noqa: F401  (registers the tasks)
    from mani_skill.utils.registration import REGISTERED_ENVS

    if env_id not in REGISTERED_ENVS:
        fail(f"--env-id {env_id}: ManiSkill has no such task")
    return REGISTERED_ENVS[env_id].cls


def make_stock(env_id: str, num_envs: int, control_mode: str, sim_backend: str, camera: Optional[dict] = None):
    """ManiSkill's own environment, with our render cameras instead of its own.

    `camera`: views, {name: dict(pose, fov)}, which share frames of width x height pixels from left to right, and shader_pack.
    A view with `mount` moves with the task's object of that name, and its pose is relative to it.
    None makes a state-only environment, which also works where there is no Vulkan driver at all.
    """
    import sapien
    from mani_skill.sensors.camera import CameraConfig

    task = find_task(env_id)

    def cameras(env):
        edges = np.linspace(0, camera["width"], len(camera["views"]) + 1).astype(int)
        return [CameraConfig(name, sapien.Pose(view["pose"][:3], view["pose"][3:]), int(width), camera["height"], view["fov"],
                             mount=getattr(env, view.get("mount", ""), None), shader_pack=camera["shader_pack"])
                for (name, view), width in zip(camera["views"].items(), np.diff(edges))]

    own_cameras = task.__dict__.get("_default_human_render_camera_configs")
    task._default_human_render_camera_configs = property(cameras) if camera else []  # gym.make can add none
    render_backend = sim_backend.replace("physx_cuda", "sapien_cuda") if "cuda" in sim_backend else "cpu"
    material = sapien.render.RenderMaterial
    if camera is None:  # ManiSkill asks Vulkan for the colour of the cube even when nothing is ever drawn
        render_backend, sapien.render.RenderMaterial = "none", type("NoMaterial", (), dict(__init__=lambda *_, **__: None))
        sapien.pysapien.render.RenderMaterial = sapien.render.RenderMaterial
    try:
        return gym.make(env_id, num_envs=num_envs, obs_mode="state", control_mode=control_mode, sim_backend=sim_backend,
                        render_backend=render_backend)
    except AssertionError as error:
        fail(f"--control-mode: {error}")
    except RuntimeError as error:
        if camera is None:
            raise
        fail(f"no Vulkan device to render with ({error}); on a CPU install Mesa's lavapipe >= 24.3: "
             "bash tests/install_cpu_renderer.sh (on a GPU: the driver's own Vulkan)")
    finally:
        sapien.render.RenderMaterial = sapien.pysapien.render.RenderMaterial = material
        if own_cameras is None:
            del task._default_human_render_camera_configs
        else:
            task._default_human_render_camera_configs = own_cameras


def take_pictures(env, show_goal_site: bool):
    """(num_envs, H, W, 3) uint8: what the render cameras of a ManiSkill environment see, side by side."""
    from mani_skill.utils.visualization.misc import tile_images

    if show_goal_site:
        return env.render_rgb_array()
    for hidden in env._hidden_objects:
        hidden.hide_visual()
    env.scene.update_render(update_sensors=False, update_human_render_cameras=True)
    frames = tile_images(list(env.scene.get_human_render_camera_images().values()))
    for hidden in env._hidden_objects:
        hidden.show_visual()
    return frames


class PickCubeCPU:
    """`num_envs` PickCube-v1 scenes (Panda, pd_joint_delta_pos) in one process, on PhysX's CPU backend.

    ManiSkill runs one scene a process on a CPU and spends most of a step on per-scene torch bookkeeping. These are stock
    scenes too, but `step` and partial resets talk to SAPIEN directly, and observation, reward and success are computed once,
    vectorised over all scenes. tests/test_env.py compares every number with the stock environment.

    Args:
        num_envs: number of scenes N.
        max_episode_steps: `truncated` is set from this step of an episode on.
        camera: None (nothing of Vulkan is touched), or what `render_frames` shows, see make_stock.
        show_goal_site: draw the green goal sphere.
    """

    def __init__(self, num_envs: int, *, max_episode_steps: int = 50, camera: Optional[dict] = None,
                 show_goal_site: bool = True):
        gc.freeze()  # ManiSkill collects garbage in every scene it builds: 0.3 s each with torch imported
        self._envs = [make_stock("PickCube-v1", 1, "pd_joint_delta_pos", "physx_cpu").unwrapped for _ in range(num_envs)]
        # One more scene is the photo studio: render_frames poses it like the scene to be photographed.
        self._studio = camera and make_stock("PickCube-v1", 1, "pd_joint_delta_pos", "physx_cpu", camera).unwrapped
        gc.unfreeze()
        self._show_goal_site = show_goal_site
        self._scenes = [self._handles(env) for env in self._envs]
        self.num_envs, self.device, self.max_episode_steps = num_envs, torch.device("cpu"), max_episode_steps
        self.single_observation_space = self._envs[0].single_observation_space
        self.single_action_space = self._envs[0].single_action_space
        self._qpos = np.zeros((num_envs, 9), np.float32)
        self._qvel = np.zeros((num_envs, 9), np.float32)
        self._tcp_pose = np.zeros((num_envs, 7), np.float32)  # position, quaternion wxyz
        self._cube_pose = np.zeros((num_envs, 7), np.float32)
        self._goal_pos = np.zeros((num_envs, 3), np.float32)
        self._finger_quat = np.zeros((num_envs, 2, 4), np.float32)
        self._finger_impulse = np.zeros((num_envs, 2, 3), np.float32)  # of the cube on each finger in the last physics step
        self._elapsed_steps = np.zeros(num_envs, np.int64)

    @staticmethod
    def _handles(env):
        """The SAPIEN objects behind one ManiSkill scene."""
        agent, robot = env.agent, env.agent.robot._objs[0]
        return dict(px=env.scene.px, robot=robot, drives=[joint.set_drive_target for joint in robot.active_joints],
                    tcp=agent.tcp._objs[0], fingers=[agent.finger1_link._objs[0], agent.finger2_link._objs[0]],
                    cube=env.cube._objs[0], cube_body=env.cube._bodies[0], goal=env.goal_site._objs[0],
                    table=env.table_scene.table._objs[0])

    def reset(self, seed=None, options: Optional[dict] = None):
        """Start new episodes in the scenes `options["env_idx"]` (default: all).

        `seed` is a list with one seed a scene, or an int that stands for the same list as in ManiSkill: itself, then draws of
        `np.random.RandomState(seed)`. Scene i then starts as `gym.make("PickCube-v1", num_envs=1).reset(seed=seeds[i])`.

        Returns:
            obs: (N, 42) float32, all scenes.
            info: success, is_obj_placed, is_robot_static, is_grasped: (N,) bool each.
        """
        idx = np.arange(self.num_envs) if options is None else np.asarray(options["env_idx"])
        if seed is None:
            self._new_episodes(idx)
        else:
            seeds = [seed, *np.random.RandomState(seed).randint(2**31, size=len(idx) - 1)] if np.isscalar(seed) else seed
            for i, scene_seed in zip(idx, seeds):
                self._envs[i].reset(seed=int(scene_seed))
                self._goal_pos[i] = self._scenes[i]["goal"].pose.p
        for i in idx:
            self._read_state(i)
        self._elapsed_steps[idx] = 0
        info = self._evaluate()
        return self._observation(info), {key: torch.from_numpy(value) for key, value in info.items()}

    def _new_episodes(self, idx):
        """PickCube's `_initialize_episode` for many scenes: the same draws from the same generators, in the same order."""
        import sapien
        from mani_skill.utils.geometry.rotation_conversions import euler_angles_to_matrix, matrix_to_quaternion

        env = self._envs[0]
        u = torch.rand(len(idx), 8)  # cube x, y; three angles, of which PickCube keeps the last; goal x, y, z
        size, center = env.cube_spawn_half_size, torch.tensor(env.cube_spawn_center)
        cube_z = torch.full((len(idx), 1), env.cube_half_size)
        cube_xyz = torch.cat([u[:, :2] * size * 2 - size + center, cube_z], 1).numpy()
        goal_xyz = torch.cat([u[:, 5:7] * size * 2 - size + center, u[:, 7:] * env.max_goal_height + cube_z], 1).numpy()
        angles = u[:, 2:5] * (2 * np.pi) * torch.tensor([0.0, 0.0, 1.0])
        cube_quat = matrix_to_quaternion(euler_angles_to_matrix(angles, "XYZ")).numpy()
        rest, zeros = env.agent.keyframes["rest"].qpos, np.zeros(9, np.float32)
        for k, i in enumerate(idx):
            robot, cube, body = (self._scenes[i][name] for name in ("robot", "cube", "cube_body"))
            qpos = rest + self._envs[i]._episode_rng.normal(0, env.robot_init_qpos_noise, (1, 9))[0]
            qpos[7:] = 0.04
            body.linear_velocity = body.angular_velocity = zeros[:3]
            robot.qvel = robot.qf = zeros
            robot.qpos = qpos
            cube.pose = sapien.Pose(cube_xyz[k], cube_quat[k])
            self._scenes[i]["goal"].pose = sapien.Pose(goal_xyz[k])
        self._goal_pos[idx] = goal_xyz

    def step(self, action):
        """Advance every scene by one control step, 0.05 s in five physics steps.

        Args:
            action: (N, 8) float32, clipped to [-1, 1]: seven joint deltas in units of 0.1 rad, and the gripper.

        Returns:
            obs (N, 42) float32, reward (N,) float32 in [0, 1], terminated (N,) bool, truncated (N,) bool, info as `reset`.
        """
        action = np.clip(action.numpy(), -1, 1)
        low, high = np.float32(-0.01), np.float32(0.04)
        fingers = 0.5 * (high + low) + 0.5 * (high - low) * action[:, 7:]
        targets = np.concatenate([self._qpos[:, :7] + 0.1 * action[:, :7], fingers, fingers], 1).tolist()
        for i, scene in enumerate(self._scenes):
            for drive, target in zip(scene["drives"], targets[i]):
                drive(target)
            for _ in range(5):  # sim_freq 100 Hz, control_freq 20 Hz
                scene["px"].step()
            self._read_state(i)
        self._read_contacts()
        self._elapsed_steps += 1
        info = self._evaluate()
        obs, reward = self._observation(info), torch.from_numpy(self._dense_reward(info))
        truncated = torch.from_numpy(self._elapsed_steps >= self.max_episode_steps)
        info = {key: torch.from_numpy(value) for key, value in info.items()}
        return obs, reward, info["success"].clone(), truncated, info

    def _read_state(self, i):
        scene = self._scenes[i]
        self._qpos[i], self._qvel[i] = scene["robot"].qpos, scene["robot"].qvel
        tcp, cube = scene["tcp"].entity_pose, scene["cube"].pose
        self._tcp_pose[i, :3], self._tcp_pose[i, 3:] = tcp.p, tcp.q
        self._cube_pose[i, :3], self._cube_pose[i, 3:] = cube.p, cube.q

    def _read_contacts(self):
        """Contact impulses of the cubes on the fingers; a cube 15 cm from the tcp is out of their reach."""
        self._finger_impulse[:] = 0
        offset = self._cube_pose[:, :3] - self._tcp_pose[:, :3]
        for i in np.flatnonzero((offset * offset).sum(1) <= 0.15**2):
            scene = self._scenes[i]
            cube, fingers, impulses = scene["cube_body"], scene["fingers"], [[], []]
            for contact in scene["px"].get_contacts():
                a, b = contact.bodies
                if a is not cube and b is not cube:
                    continue
                finger, sign = (b, -1) if a is cube else (a, 1)
                for f in (0, 1):
                    if finger is fingers[f]:
                        impulses[f] += [sign * point.impulse for point in contact.points]
            for f in (0, 1):
                if impulses[f]:
                    self._finger_impulse[i, f] = np.add.reduce(impulses[f])
                    self._finger_quat[i, f] = fingers[f].entity_pose.q

    def _evaluate(self):
        """PickCube's `evaluate`, with Panda's `is_grasping` and `is_static`."""
        force = self._finger_impulse / self._envs[0].scene.px.timestep  # (N, 2, 3) newtons
        w, x, y, z = np.moveaxis(self._finger_quat, -1, 0)
        opening = np.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], -1)  # the fingers' y axes
        opening[:, 1] *= -1
        norm = np.linalg.norm(force, axis=-1)
        angle = np.rad2deg(np.arccos(np.clip((force * opening).sum(-1) / np.maximum(norm, 1e-6), -1, 1)))
        placed = np.linalg.norm(self._goal_pos - self._cube_pose[:, :3], axis=1) <= self._envs[0].goal_thresh
        static = np.abs(self._qvel[:, :7]).max(1) <= 0.2
        return dict(success=placed & static, is_obj_placed=placed, is_robot_static=static,
                    is_grasped=((norm >= 0.5) & (angle <= 85)).all(1))

    def _observation(self, info):
        return torch.from_numpy(np.concatenate([
            self._qpos, self._qvel, info["is_grasped"][:, None], self._tcp_pose, self._goal_pos, self._cube_pose,
            self._cube_pose[:, :3] - self._tcp_pose[:, :3], self._goal_pos - self._cube_pose[:, :3],
        ], axis=1, dtype=np.float32))

    def _dense_reward(self, info):
        """PickCube's `compute_normalized_dense_reward`."""
        def closeness(x):
            return 1 - np.tanh(5 * np.linalg.norm(x, axis=1))

        reward = closeness(self._cube_pose[:, :3] - self._tcp_pose[:, :3]) + info["is_grasped"]
        reward += closeness(self._goal_pos - self._cube_pose[:, :3]) * info["is_grasped"]
        reward += closeness(self._qvel[:, :7]) * info["is_obj_placed"]
        reward[info["success"]] = 5
        return reward.astype(np.float32) / 5

    def render_frames(self, env_idx):
        """Photograph the scenes `env_idx` (K,): (K, H, W, 3) uint8."""
        frames, studio = [], self._handles(self._studio)
        for i in env_idx.tolist():
            studio["robot"].qpos = self._qpos[i]
            for name in ("cube", "goal", "table"):
                studio[name].pose = self._scenes[i][name].pose
            frames.append(take_pictures(self._studio, self._show_goal_site))
        return torch.cat(frames)


class StockEnvs(gym.Wrapper):
    """A ManiSkill environment (many scenes on a GPU, or one on a CPU) with the interface of PickCubeCPU."""

    def __init__(self, env, show_goal_site: bool):
        super().__init__(env)
        self.num_envs, self.device = env.unwrapped.num_envs, env.unwrapped.device
        self.single_observation_space = env.unwrapped.single_observation_space
        self.single_action_space = env.unwrapped.single_action_space
        self.max_episode_steps = env.get_wrapper_attr("_max_episode_steps")
        self._show_goal_site = show_goal_site

    def render_frames(self, env_idx):
        return take_pictures(self.env.unwrapped, self._show_goal_site)[env_idx]


def make_envs(args, num_envs: int, camera: Optional[dict] = None, show_goal_site: bool = True):
    """This rank's scenes of `args.env_id`, on the chosen backend; the training loop cannot tell one backend from another."""
    if args.sim_backend == "physx_cpu" and args.env_id == "PickCube-v1" and args.control_mode == "pd_joint_delta_pos":
        return PickCubeCPU(num_envs, camera=camera, show_goal_site=show_goal_site)
    device = f":{os.environ.get('LOCAL_RANK', 0)}" if args.sim_backend == "physx_cuda" else ""
    env = make_stock(args.env_id, num_envs, args.control_mode, args.sim_backend + device, camera)
    return StockEnvs(env, show_goal_site)


# ---------------------------------------------------------------------------------------------- agent

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
            action = probs.sample()
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1)


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


@torch.no_grad()
def evaluate(agent, envs, num_videos: int = 0):
    """One episode a scene with the deterministic policy, on seeds that never change.

    Returns:
        metrics: success_once (at any step), success_at_end (in the last step), episode_len (steps until the first success
            or the time-out), return (sum of rewards until then): means over the episodes of all ranks.
        video: (max_episode_steps, H, W, 3) uint8 of the first `num_videos` scenes side by side, or None.
    """
    first_seed = 1_000_000 + RANK * envs.num_envs
    obs, _ = envs.reset(seed=list(range(first_seed, first_seed + envs.num_envs)))
    once = torch.zeros(envs.num_envs, dtype=torch.bool, device=envs.device)
    episode_len, episode_return = torch.zeros(2, envs.num_envs, device=envs.device)
    video = []
    for _ in range(envs.max_episode_steps):
        obs, reward, _, _, info = envs.step(agent.get_mean_action(obs))
        episode_len += ~once
        episode_return += reward * ~once
        once |= info["success"]
        if num_videos:
            video.append(torch.cat(list(envs.render_frames(torch.arange(num_videos, device=envs.device))), 1).cpu().numpy())
    means = all_reduce_sum(torch.stack([once, info["success"], episode_len, episode_return]).mean(1)) / WORLD_SIZE
    names = ("success_once", "success_at_end", "episode_len", "return")
    return dict(zip(names, means.tolist())), np.stack(video) if video else None


def save_video(run_dir: Path, writer, video, global_step: int):
    """videos/global_step_<N>.mp4 at the control frequency of 20 Hz, and a moving picture in TensorBoard."""
    import imageio
    from tensorboard.compat.proto.summary_pb2 import Summary

    path, gif = run_dir / "videos" / f"global_step_{global_step}.mp4", io.BytesIO()
    path.parent.mkdir(exist_ok=True)
    imageio.mimwrite(path, video, fps=20, macro_block_size=1)
    imageio.mimwrite(gif, video, format="GIF", duration=50, loop=0)
    image = Summary.Image(height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=gif.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag="eval/video", image=image)]), global_step)


# ---------------------------------------------------------------------------------------------- ranks and files

def fail(message: str):
    """End with exit code 2 and one line on stderr: what is wrong, where, and what to do."""
    if RANK == 0:
        print(f"{SCRIPT}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def die_with_parent():
    """Called in a new rank: when the process that started it is killed, so is the rank (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def start_ranks(num_procs: int) -> int:
    """Run this very command once per rank with torchrun's variables set; returns 0 or the first exit code that is not 0."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        env = dict(os.environ, MASTER_ADDR="localhost", MASTER_PORT=str(s.getsockname()[1]),
                   WORLD_SIZE=str(num_procs), LOCAL_WORLD_SIZE=str(num_procs))
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=dict(env, RANK=str(r), LOCAL_RANK=str(r)),
                              preexec_fn=die_with_parent) for r in range(num_procs)]
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: [rank.send_signal(signum) for rank in ranks])
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            for rank in ranks:
                rank.kill()
            return abs(failed[0]) if failed else 0
        time.sleep(0.1)


def join_ranks(backend: str):
    """Form the process group of this and the other ranks. A rank that loses another says so in one line."""
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
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter, whatever ends it


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


def average_gradients(parameters):
    """Average the gradients over the ranks: one all-reduce of one flat tensor."""
    if WORLD_SIZE > 1:
        flat = all_reduce_sum(torch.cat([p.grad.flatten() for p in parameters])) / WORLD_SIZE
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(grad.view_as(p.grad))


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
    """Create <log-dir>/<timestamp>-<exp-name>/ with args.json, which also holds the command line."""
    run_dir = Path(args.log_dir, f"{time.strftime('%Y%m%d-%H%M%S')}-{args.exp_name}")
    run_dir.mkdir(parents=True)
    write_file(run_dir / "args.json",
               json.dumps(dict(asdict(args), command=shlex.join(sys.argv), launcher=LAUNCHER), indent=2).encode())
    return run_dir


def restarted_run(args) -> Optional[str]:
    """After `torchrun --max-restarts` has started the ranks anew: the folder of the run that they had begun; else None."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        for file in sorted(Path(args.log_dir).glob("*/args.json"), reverse=True):
            if json.loads(file.read_text()).get("launcher") == LAUNCHER and any(file.parent.glob("checkpoints/*/*.pt")):
                return str(file.parent)
    return None


def save_checkpoint(run_dir: Path, agent, optimizer, global_step: int, env_steps: int, args):
    """checkpoints/global_step_<N>/checkpoint.pt, tensors and plain values only."""
    folder, buffer = run_dir / "checkpoints" / f"global_step_{global_step}", io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(dict(script=SCRIPT, agent=agent.state_dict(), optimizer=optimizer.state_dict(), global_step=global_step,
                    env_steps=env_steps, args=asdict(args)), buffer)
    write_file(folder / "checkpoint.pt", buffer.getvalue(), sync=True)


def load_checkpoint(resume_dir: str):
    """The checkpoint in a checkpoint folder, or the newest whole one in a run's folder; returns (checkpoint, run_dir)."""
    folder, error = Path(resume_dir), "there is none"
    steps = [f for f in folder.glob("checkpoints/global_step_*") if f.name[12:].isdigit()]
    is_run = not (folder / "checkpoint.pt").exists()
    for candidate in sorted(steps, key=lambda f: -int(f.name[12:])) if is_run else [folder.resolve()]:
        try:
            checkpoint = torch.load(candidate / "checkpoint.pt", map_location="cpu", weights_only=True)
            if {"script", "agent", "optimizer", "global_step", "env_steps"} <= checkpoint.keys():
                return checkpoint, candidate.parents[1]
            error = "it was not written by this project"
        except Exception as e:  # torch.load raises many kinds of errors for damaged files
            error = str(e).strip().partition("\n")[0][:100]
    fail(f"--resume-dir {resume_dir}: no checkpoint could be read ({error}); name a run's folder or a checkpoint's")


def command_to_go_on(run_dir: Path) -> str:
    """This command line, with `run_dir` as its --resume-dir."""
    argv = list(sys.argv)
    for i in reversed(range(len(argv))):
        if argv[i].replace("_", "-").partition("=")[0] == "--resume-dir":
            del argv[i:i + (1 if "=" in argv[i] else 2)]
    return shlex.join(["python", *argv, "--resume-dir", str(run_dir)])


def load_weights(agent, optimizer, checkpoint):
    """Take over the checkpoint's agent and optimizer: without Adam's moments, its first steps hurt a trained policy."""
    try:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if "initial_lr" not in optimizer.param_groups[0]:
            raise KeyError("the optimizer has no initial_lr")
        if not all(weight.isfinite().all() for weight in agent.state_dict().values()):
            raise ValueError("it has weights that are not finite")
    except (RuntimeError, ValueError, KeyError) as error:
        fail(f"the checkpoint does not fit this task's agent ({str(error).splitlines()[-1].strip()}); was it trained with "
             "another --env-id or --control-mode?")


def parse_args():
    """The flags of the command line in one flat Args; --help shows them in the groups that Args inherits."""
    groups = make_dataclass("Groups", [(base.__name__.removesuffix("Args"), base) for base in reversed(Args.__bases__)])
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[groups], description=__doc__)
    return Args(**{name: value for group in vars(parsed).values() for name, value in vars(group).items()})


def check_args(args) -> int:
    """Refuse what cannot work before anything is started; fill in the defaults that depend on the machine.

    Returns:
        the number of ranks.
    """
    if args.sim_backend == "auto":
        args.sim_backend = "physx_cuda" if args.cuda and torch.cuda.is_available() else "physx_cpu"
    gpu = args.sim_backend == "physx_cuda"
    if gpu and not torch.cuda.is_available():
        fail("--sim-backend physx_cuda needs an NVIDIA GPU and none was found; leave it out to simulate on the CPU")
    for name, (gpu_default, cpu_default) in GPU_CPU_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, gpu_default if gpu else cpu_default)
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and name not in MAY_BE_ZERO and value < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
        if name in RATES and not 0 <= value <= 1:
            fail(f"--{name.replace('_', '-')} {value} is not between 0 and 1")
    if "WORLD_SIZE" in os.environ:
        num_ranks = WORLD_SIZE
    elif gpu:
        num_ranks = 1
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        num_ranks = args.num_procs or next(
            n for n in range(cores, 0, -1) if args.num_envs % n == 0 and args.num_eval_envs % n == 0)
    for name in ("num_envs", "num_eval_envs"):
        if getattr(args, name) % num_ranks:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared by {num_ranks} ranks; take a multiple")
        stock = args.env_id != "PickCube-v1" or args.control_mode != "pd_joint_delta_pos"
        if stock and not gpu and getattr(args, name) > num_ranks:
            fail(f"{args.env_id} with {args.control_mode} runs one scene a rank on a CPU: take --num-envs {num_ranks} "
                 f"--num-eval-envs {num_ranks}, or PickCube-v1 with pd_joint_delta_pos")
    if args.num_envs // num_ranks * args.num_steps < args.num_minibatches:
        fail(f"--num-minibatches {args.num_minibatches} is more than the {args.num_envs // num_ranks * args.num_steps} steps "
             "of a rank's rollout")
    if args.evaluate and not args.resume_dir:
        fail("--evaluate needs a checkpoint: --resume-dir logs/<run>")
    return num_ranks


# ---------------------------------------------------------------------------------------------- frames

LABELS = ("success", "failure")
TO_GOAL = ("to_goal_x", "to_goal_y", "to_goal_z")
COLUMNS = ("file", "label", "episode", "step", "is_final", "global_step", "env_steps", "cube_to_goal", *TO_GOAL,
           "is_obj_placed", "is_robot_static", "is_grasped")
"""of index.csv: `step` counts from 1 in each episode, `cube_to_goal` is the distance and `to_goal_...` the vector from the
cube to the goal in metres (PickCube only), flags are 0 or 1"""


def make_contract(args) -> dict:
    """What stages 2 and 4 must agree on: a reward model only knows pictures that were made exactly like this."""
    import inspect

    import mani_skill

    robot = inspect.signature(find_task(args.env_id)).parameters["robot_uids"].default
    return dict(format_version=1, env_id=args.env_id, robot=robot, control_mode=args.control_mode,
                reward_render_mode=args.reward_render_mode, show_goal_site=args.show_goal_site,
                image_size=[3, args.image_size, args.image_size], camera=CAMERA, shader="minimal",
                mani_skill_version=mani_skill.__version__)


def contract_differences(theirs: dict, ours: dict):
    """What two contracts disagree on, in words; another version of ManiSkill only gets a warning."""
    if RANK == 0 and theirs.get("mani_skill_version") != ours.get("mani_skill_version"):
        print(f"{SCRIPT}: warning: the frames were made with ManiSkill {theirs.get('mani_skill_version')}, here it is "
              f"{ours.get('mani_skill_version')}", file=sys.stderr)
    return [f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in sorted({*theirs, *ours})
            if theirs.get(key) != ours.get(key) and key != "mani_skill_version"]


class FrameCollector:
    """Chooses frames while the policy trains, photographs them, and has rank 0 file them once per global step.

    A frame's row of index.csv also travels inside its PNG (a tEXt chunk), so that the table can be rebuilt at any time and a
    crash between two files cannot make them disagree.
    """

    def __init__(self, args, contract: dict):
        self.args, self.dir, self.pending = args, Path(args.save_dir), []
        self.targets = dict(success=args.target_success, failure=args.target_failure)
        self.rows = dict(success=[], failure=[])  # rank 0: rows[label][n - 1] describes <label>/<n>.png
        self.counts, self.first_episode = on_rank0(self._open, contract)
        self.rng = np.random.default_rng([args.seed, *self.counts.values()])  # chooses the old frame that a new one replaces

    def share(self) -> float:
        """Of the targets, in [0, 1]: the run is over at 1."""
        return min(min(self.counts[label] / self.targets[label], 1.0) for label in LABELS)

    def _open(self, contract):
        """Create the folder, or take over the frames in it: drop unfinished files, close gaps in the numbering."""
        metadata = self.dir / "metadata.json"
        for label in LABELS:
            (self.dir / label).mkdir(parents=True, exist_ok=True)
        if metadata.exists():
            try:
                old = dict(json.loads(metadata.read_text()))
            except (ValueError, TypeError):
                fail(f"{metadata} is not a JSON object; choose another --save-dir")
            differing = contract_differences(old, contract)
            if differing:
                fail(f"{self.dir} holds frames made differently; choose another --save-dir, or match: " + "; ".join(differing))
        elif any(self.dir.glob("*/*.png")):
            fail(f"{self.dir} holds frames but no metadata.json that says how they were made; choose another --save-dir")
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
                    fail(f"{file} is not a frame of this script; remove it or choose another --save-dir")
        self._write_index()
        episodes = [row["episode"] for label in LABELS for row in self.rows[label]]
        return {label: len(self.rows[label]) for label in LABELS}, max(episodes, default=-1) + 1

    def photograph(self, envs, obs, info, done, **counters):
        """Take the frames of this step that the sampling rates choose; to be called before finished scenes are reset.

        Args:
            obs, info, done: of the step just taken.
            counters: `episode` and `step`: (N,) int64; `global_step` and `env_steps`: int.
        """
        args, success = self.args, info["success"]
        rate = torch.where(done, max(args.sample_rate_fail, args.sample_rate_fail_final), args.sample_rate_fail)
        if args.env_id == "PickCube-v1":  # its observation ends with the vector from the cube to the goal
            cube_to_goal = obs[:, -3:].norm(dim=1)
            rate = torch.where(cube_to_goal <= 0.05, rate.clamp(min=args.sample_rate_near_miss), rate)
        if not args.keep_ambiguous and "is_obj_placed" in info:
            rate[info["is_obj_placed"]] = 0.0
        rate[success] = args.sample_rate_success if self.counts["success"] < args.target_success else 0.0
        idx = (torch.rand(rate.shape, device=rate.device) < rate).nonzero().squeeze(-1)
        if len(idx) == 0:
            return
        columns = dict({key: info[key] for key in COLUMNS if key in info}, is_final=done)
        columns = {key: value[idx].int().tolist() for key, value in columns.items()}
        columns |= {key: counters[key][idx].tolist() for key in ("episode", "step")}
        if args.env_id == "PickCube-v1":
            to_goal = torch.cat([cube_to_goal[idx, None], obs[idx, -3:]], 1).T
            columns |= zip(("cube_to_goal", *TO_GOAL), to_goal.double().round(decimals=5).tolist())
        for k, (frame, succeeded) in enumerate(zip(envs.render_frames(idx).cpu().numpy(), success[idx].tolist())):
            row = dict({key: values[k] for key, values in columns.items()}, label=LABELS[not succeeded],
                       global_step=counters["global_step"], env_steps=counters["env_steps"])
            text, png = PngInfo(), io.BytesIO()
            text.add_text("row", json.dumps(row))
            Image.fromarray(frame).save(png, "PNG", pnginfo=text, compress_level=1)
            self.pending.append((row, png.getvalue()))

    def file(self):
        """Collective: rank 0 writes everybody's new frames, then index.csv; updates `counts` on every rank."""
        gathered = [self.pending]
        if WORLD_SIZE > 1:
            gathered = [None] * WORLD_SIZE if RANK == 0 else None
            dist.gather_object(self.pending, gathered)
        self.pending = []
        self.counts = on_rank0(self._file, gathered)

    def _file(self, gathered):
        for row, png in (frame for frames in gathered for frame in frames):
            label, rows = row["label"], self.rows[row["label"]]
            number = len(rows) + 1
            if number > self.targets[label]:
                if label == "success":
                    continue
                number = int(self.rng.integers(len(rows))) + 1
            file = f"{label}/{number:04d}.png"
            write_file(self.dir / file, png)
            rows[number - 1:number] = [dict(row, file=file)]
        self._write_index()
        return {label: len(self.rows[label]) for label in LABELS}

    def _write_index(self):
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for label in LABELS for row in self.rows[label])
        write_file(self.dir / "index.csv", table.getvalue().encode())

    def preview(self, columns: int = 8, rows: int = 3, size: int = 168):
        """Random frames, successes on green and failures on red: (H, W, 3) uint8, and <save-dir>/preview.png."""
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


if __name__ == "__main__":
    args = parse_args()
    num_procs = check_args(args)
    args.resume_dir = restarted_run(args) or args.resume_dir
    checkpoint, run_dir = load_checkpoint(args.resume_dir) if args.resume_dir else (None, None)
    if num_procs > 1 and "WORLD_SIZE" not in os.environ:
        sys.exit(start_ranks(num_procs))

    # Ranks and seeds
    gpu = args.sim_backend == "physx_cuda"
    if gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE))))
    if WORLD_SIZE > 1:
        join_ranks("nccl" if gpu else "gloo")
    stop_signals = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: stop_signals.append(signum))
    continued = checkpoint is not None and checkpoint["script"] == SCRIPT
    global_step, env_steps = (checkpoint["global_step"], checkpoint["env_steps"]) if continued else (0, 0)

    # Frames, and seeds: neither a continued run nor one that adds to a folder may repeat the episodes that are in it
    contract = make_contract(args)
    collector = None if args.evaluate else FrameCollector(args, contract)
    seed = args.seed + 1000 * (global_step + (collector.first_episode if collector else 0)) + RANK
    random.seed(seed)
    torch.manual_seed(seed)

    # Scenes
    film = dict(views=VIDEO_CAMERA, width=224, height=224, shader_pack="minimal")
    camera = dict(views=contract["camera"], width=args.image_size, height=args.image_size, shader_pack=contract["shader"])
    eval_envs = make_envs(args, args.num_eval_envs // WORLD_SIZE, film if args.capture_video else None)
    envs = eval_envs if args.evaluate else make_envs(args, args.num_envs // WORLD_SIZE, camera, args.show_goal_site)
    device, num_envs = envs.device, envs.num_envs
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]

    # Agent
    agent = Agent(obs_dim, action_dim).to(device)
    parameters = list(agent.parameters())
    optimizer = torch.optim.Adam([dict(params=parameters, initial_lr=args.learning_rate)], lr=args.learning_rate, eps=1e-5,
                                 fused=True)
    if checkpoint:
        load_weights(agent, optimizer, checkpoint)
        if not continued:
            optimizer.param_groups[0].update(lr=args.learning_rate, initial_lr=args.learning_rate)
    if WORLD_SIZE > 1:
        for p in parameters:
            dist.broadcast(p.data, 0)

    # The run's folder
    if not continued:
        run_dir = on_rank0(make_run_dir, args)
    writer = SummaryWriter(run_dir, purge_step=global_step + 1) if RANK == 0 else None
    num_videos = min(4, eval_envs.num_envs) if args.capture_video and RANK == 0 else 0

    def log_evaluation():
        metrics, video = evaluate(agent, eval_envs, num_videos)
        if RANK == 0:
            for name, value in metrics.items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            if video is not None:
                save_video(run_dir, writer, video, global_step)
            tqdm.write(f"global step {global_step}, {env_steps:,} env steps: "
                       + ", ".join(f"eval/{name} {value:.3f}" for name, value in metrics.items()))

    if args.evaluate:
        log_evaluation()
        sys.exit(0)

    # Storage of one rollout
    obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)
    next_obs = torch.zeros((args.num_steps, num_envs, obs_dim), device=device)  # the true ones, before any reset
    actions = torch.zeros((args.num_steps, num_envs, action_dim), device=device)
    logprobs = torch.zeros((args.num_steps, num_envs), device=device)
    rewards = torch.zeros((args.num_steps, num_envs), device=device)
    dones = torch.zeros((args.num_steps, num_envs), dtype=torch.bool, device=device)
    # Of the episodes under way
    episode_id = collector.first_episode + RANK * num_envs + torch.arange(num_envs, device=device)
    episode_len = torch.zeros(num_envs, dtype=torch.int64, device=device)
    episode_return = torch.zeros(num_envs, device=device)
    current_obs, _ = envs.reset(seed=seed)

    progress = tqdm(total=args.target_success + args.target_failure, initial=sum(collector.counts.values()), unit="frame",
                    disable=RANK > 0)
    first_env_steps, start_time, stopping = env_steps, time.time(), collector.share() == 1
    while global_step < args.num_iterations and not stopping:
        global_step += 1
        iteration_time = time.time()
        if args.anneal_lr:
            schedule = optimizer.param_groups[0]
            schedule["lr"] = schedule["initial_lr"] * (1 - (global_step - 1) / args.num_iterations) * (1 - collector.share())

        # Rollout
        finished = torch.zeros(4, dtype=torch.float64, device=device)  # episodes, successes, their lengths, their returns
        for step in range(args.num_steps):
            with torch.no_grad():
                action, logprob, _ = agent.get_action_and_logprob(current_obs)
            obs[step], actions[step], logprobs[step] = current_obs, action, logprob
            current_obs, reward, terminated, truncated, info = envs.step(action)
            done = terminated | truncated
            next_obs[step], rewards[step], dones[step] = current_obs, reward, done
            env_steps += args.num_envs
            episode_len += 1
            episode_return += reward
            collector.photograph(envs, current_obs, info, done, episode=episode_id, step=episode_len,
                                 global_step=global_step, env_steps=env_steps)
            done_idx = done.nonzero().squeeze(-1)
            if len(done_idx):
                finished += torch.stack([done, info["success"] & done, episode_len * done, episode_return * done]).sum(1)
                current_obs, _ = envs.reset(options=dict(env_idx=done_idx))
                episode_id[done_idx] += args.num_envs
                episode_len[done_idx] = 0
                episode_return[done_idx] = 0
        collector.file()
        rollout_time = time.time() - iteration_time

        # Advantages
        with torch.no_grad():
            values, next_values = agent.get_value(obs), agent.get_value(next_obs)
        # Bootstrap at every episode end, success included: with a dense reward, an end worth nothing teaches avoidance.
        advantages = compute_gae(rewards, values, next_values, torch.zeros_like(dones), dones, args.gamma, args.gae_lambda)
        returns = advantages + values

        # Update
        b_obs, b_actions, b_logprobs = obs.flatten(0, 1), actions.flatten(0, 1), logprobs.flatten()
        b_advantages, b_returns = advantages.flatten(), returns.flatten()
        losses = torch.zeros(5, device=device)  # sums over minibatches, in the order of the names they are logged under
        num_updates = 0
        for _epoch in range(args.update_epochs):
            epoch_kl = torch.zeros((), device=device)
            for mb_inds in torch.randperm(len(b_obs), device=device).chunk(args.num_minibatches):
                _, new_logprob, entropy = agent.get_action_and_logprob(b_obs[mb_inds], b_actions[mb_inds])
                logratio = new_logprob - b_logprobs[mb_inds]
                ratio = logratio.exp()
                mb_advantages = b_advantages[mb_inds]
                mb_advantages = (mb_advantages - mb_advantages.mean()) / (mb_advantages.std() + 1e-8)
                clipped_ratio = torch.clamp(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
                policy_loss = -torch.min(mb_advantages * ratio, mb_advantages * clipped_ratio).mean()
                value_loss = 0.5 * ((agent.get_value(b_obs[mb_inds]) - b_returns[mb_inds]) ** 2).mean()

                optimizer.zero_grad()
                (policy_loss + 0.5 * value_loss).backward()
                average_gradients(parameters)
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()

                with torch.no_grad():
                    approx_kl = ((ratio - 1) - logratio).mean()  # http://joschu.net/blog/kl-approx.html
                    clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
                    losses += torch.stack([value_loss, policy_loss, entropy.mean(), approx_kl, clipfrac])
                    epoch_kl += approx_kl
                num_updates += 1
            mean_kl = all_reduce_sum(epoch_kl).item() / (args.num_minibatches * WORLD_SIZE)
            if mean_kl > args.target_kl:
                break

        agent.update_normalization(obs)

        # Log
        stop = torch.tensor([float(bool(stop_signals))], dtype=torch.float64, device=device)
        *totals, stop = all_reduce_sum(torch.cat([finished, losses.double() / num_updates, stop])).tolist()
        episodes, successes, lengths, total_return = totals[:4]
        losses = [loss / WORLD_SIZE for loss in totals[4:]]
        if not np.isfinite(losses).all():
            fail(f"the losses are no longer finite at global step {global_step}; continue from the last checkpoint with a "
                 f"smaller --learning-rate: --resume-dir {run_dir}")
        stopping = stop > 0 or collector.share() == 1
        if RANK == 0:
            scalars = {f"data/{label}": count for label, count in collector.counts.items()}
            if episodes:
                scalars |= {"env/success_once": successes / episodes, "env/episode_len": lengths / episodes,
                            "env/return": total_return / episodes, "env/reward": total_return / lengths}
            names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")
            scalars |= {f"losses/{name}": loss for name, loss in zip(names, losses)}
            scalars["losses/explained_variance"] = 1 - ((returns - values).var() / returns.var()).item()
            scalars["charts/SPS"] = (env_steps - first_env_steps) / (time.time() - start_time)
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/env_steps"] = env_steps
            scalars["charts/rollout_share"] = rollout_time / (time.time() - iteration_time)
            for name, value in scalars.items():
                writer.add_scalar(name, value, global_step)
            progress.update(sum(collector.counts.values()) - progress.n)
            progress.set_postfix_str("step {}, success {:.0%}, {:.0f} steps/s, {success} + {failure} frames".format(
                global_step, successes / max(episodes, 1), scalars["charts/SPS"], **collector.counts))

        # Evaluate, checkpoint
        last = stopping or global_step == args.num_iterations
        if last or global_step % args.eval_freq == 0:
            log_evaluation()
            if RANK == 0:
                writer.add_image("data/preview", collector.preview(), global_step, dataformats="HWC")
        if last or global_step % args.save_interval == 0:
            on_rank0(save_checkpoint, run_dir, agent, optimizer, global_step, env_steps, args)

    if RANK == 0:
        progress.close()
        writer.close()
        print(f"{args.save_dir}: {collector.counts['success']} success and {collector.counts['failure']} failure frames after "
              f"{env_steps:,} env steps and {time.time() - start_time:.0f} s in this process")
        if collector.share() < 1:
            print(f"To go on: {command_to_go_on(run_dir)}")
