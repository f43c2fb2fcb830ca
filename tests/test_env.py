"""The environment of the PPO scripts against stock ManiSkill, number by number, on a CPU.

policy.pt is a checkpoint of `python ppo_collect.py` without Adam's moments; it grasps the cube, so that contacts are tested.
"""
import re
import sys
from types import SimpleNamespace

import gymnasium as gym
import mani_skill.envs  # noqa: F401
import numpy as np
import pytest
import sapien
import torch
from mani_skill.envs.tasks.tabletop.push_cube import PushCubeEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils import tree
from mani_skill.utils.registration import register_env
from mani_skill.utils.structs import Pose
from PIL import Image
from run_script import ROOT

sys.path.insert(0, str(ROOT))
import ppo_collect  # noqa: E402
from ppo_collect import Agent, Args, ManiSkillEnvs, compute_gae, find_task, make_scenes  # noqa: E402

TOLERANCE = 1e-6
CAMERA = dict(views=ppo_collect.CAMERAS["goal"], width=224, height=224, shader_pack="minimal", meshes="light",
              show_goal_site=True)


def find(env_id="PickCube-v1", robot_uids="", control_mode="pd_joint_delta_pos"):
    return find_task(env_id, robot_uids, control_mode)


TASK = find()


def make(num_envs, camera=None, **task):
    return ManiSkillEnvs(Args(sim_backend="physx_cpu"), find(**task), num_envs, camera)


def make_stock(env_id="PickCube-v1", control_mode="pd_joint_delta_pos", **kwargs):
    return gym.make(env_id, num_envs=1, obs_mode="state", control_mode=control_mode, sim_backend="physx_cpu",
                    **dict(dict(render_backend="none"), **kwargs))


def load_policy():
    agent = Agent(42, 8)
    agent.load_state_dict(torch.load(ROOT / "tests" / "policy.pt", weights_only=True)["agent"])
    return agent


class Pair:
    """N scenes of ours and N stock environments in lockstep; every step and reset asserts that they agree. New episodes are
    ManiSkill's own: stock environments begin with the states of our scenes."""

    def __init__(self, num_envs, seed, camera=None, **task):
        self.envs = make(num_envs, camera, **task)
        self.stock = [make_stock(**task) for _ in range(num_envs)]
        self.obs, info = self.envs.reset(seed=seed)
        self.begin(range(num_envs))

    def begin(self, scenes):
        """Stock environments take over these scenes of ours, at the beginning of an episode."""
        state, scenes = self.envs.get_state_dict(), torch.tensor(list(scenes))
        self.envs.set_state_dict(tree.slice(state, scenes), scenes)  # rounded as theirs: a pose is not what was set
        for i in scenes.tolist():
            self.stock[i].reset(seed=0)
            base = self.stock[i].unwrapped
            base.set_state_dict(tree.slice(state, slice(i, i + 1)))
            base.agent.controller.reset()
            torch.testing.assert_close(self.obs[i:i + 1], base.get_obs(), atol=TOLERANCE, rtol=0)

    def compare(self, stock_obs, stock_infos, info):
        torch.testing.assert_close(self.obs, stock_obs, atol=TOLERANCE, rtol=0)
        assert self.obs.dtype == torch.float32 and self.obs.shape == (self.envs.num_envs, *stock_obs.shape[1:])
        for key, value in info.items():
            if torch.is_tensor(value) and value.dtype == torch.bool:
                assert torch.equal(value, torch.cat([s[key] for s in stock_infos])), key

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.envs.step(action)
        results = [stock.step(action[i:i + 1]) for i, stock in enumerate(self.stock)]
        self.compare(torch.cat([r[0] for r in results]), [r[4] for r in results], info)
        torch.testing.assert_close(reward, torch.cat([r[1] for r in results]), atol=TOLERANCE, rtol=0)
        assert torch.equal(terminated, torch.cat([r[2] for r in results]))
        assert torch.equal(truncated, torch.cat([r[3] for r in results]))
        return terminated | truncated, info

    def reset(self, idx):
        """New episodes in some scenes; the others must not notice."""
        before = self.obs.clone()
        self.obs, _ = self.envs.reset(options=dict(env_idx=idx))
        self.begin(idx.tolist())
        others = [i for i in range(len(before)) if i not in idx.tolist()]
        assert torch.equal(self.obs[others], before[others])


@pytest.mark.parametrize("env_id, control_mode", [
    *((env_id, "pd_joint_delta_pos") for env_id in (
        "PickCube-v1", "PushCube-v1", "PullCube-v1", "StackCube-v1", "LiftPegUpright-v1", "PokeCube-v1", "PullCubeTool-v1",
        "PlaceSphere-v1", "RollBall-v1", "PickCubeSO100-v1")),
    *(("PickCube-v1", mode) for mode in ("pd_joint_target_delta_pos", "pd_joint_pos", "pd_joint_vel"))])
def test_tasks_and_controllers(env_id, control_mode):
    """Random episodes, with time-outs and resets of some scenes."""
    torch.manual_seed(0)
    pair = Pair(3, 7, env_id=env_id, control_mode=control_mode)
    for t in range(pair.envs.max_episode_steps + 5):
        done, _ = pair.step(torch.rand(3, *pair.envs.single_action_space.shape) * 2.4 - 1.2)  # beyond the action space too
        if t == 17 and control_mode != "pd_joint_pos":  # it throws the arm at the table: the last bits of contacts grow
            done[1] = True
        if done.any():
            pair.reset(done.nonzero().squeeze(-1))
    assert (pair.obs[:, 0] == pair.obs[:, 0]).all()


@pytest.mark.parametrize("env_id", ["PickCube-v1", "PushCube-v1", "StackCube-v1", "PlaceSphere-v1"])
def test_resets_without_a_seed(env_id):
    """One scene draws its new episodes as a stock environment does, from the same generators."""
    ours, stock = make(1, env_id=env_id), make_stock(env_id)
    torch.testing.assert_close(ours.reset(seed=3)[0], stock.reset(seed=3)[0], atol=TOLERANCE, rtol=0)
    torch.manual_seed(0)
    for t in range(60):
        action = torch.rand(1, *ours.single_action_space.shape) * 2 - 1
        obs, _, _, truncated, _ = ours.step(action)
        torch.testing.assert_close(obs, stock.step(action)[0], atol=TOLERANCE, rtol=0)
        if truncated.any() or t % 9 == 8:
            state = torch.get_rng_state()
            obs, _ = ours.reset(options=dict(env_idx=torch.tensor([0])))
            torch.set_rng_state(state)
            torch.testing.assert_close(obs, stock.reset()[0], atol=TOLERANCE, rtol=0)


def test_new_episodes_differ():
    """Several scenes at once, without a seed: every one begins anew and elsewhere, the others go on."""
    torch.manual_seed(0)
    envs = make(6)
    obs, _ = envs.reset(seed=0)
    for _ in range(4):
        before, _, _, _, _ = envs.step(torch.rand(6, 8) * 2 - 1)
        obs, _ = envs.reset(options=dict(env_idx=torch.tensor([1, 4, 5])))
        assert torch.equal(obs[[0, 2, 3]], before[[0, 2, 3]])
        for part in (obs[:, :7], obs[:, 26:29], obs[:, 29:31]):  # joints, goal, cube
            assert all((part[i] - part[k]).abs().max() > 1e-3 for i, k in ((1, 4), (1, 5), (4, 5)))


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
        touched += any((impulse != 0).any() for impulse in (pair.envs.scene.px.contacts or {}).values())
        if done.any():
            pair.reset(done.nonzero().squeeze(-1))
    assert touched > 10


def test_end_effector_controllers():
    """Many scenes use ManiSkill's inverse kinematics for a GPU: the hand goes where it is told to, in each scene elsewhere."""
    envs = make(3, control_mode="pd_ee_delta_pos")
    before, _ = envs.reset(seed=0)
    action = torch.tensor([[1.0, 0, 0, 1], [0, 1.0, 0, 1], [0, 0, 1.0, 1]]) * 0.5
    for _ in range(4):
        after, *_ = envs.step(action)
    moved = (after - before)[:, 19:22]
    assert envs.num_envs == 3 and (moved.diag() > 0.05).all() and (moved - torch.diag(moved.diag())).abs().max() < 0.02, moved


def test_objects_that_differ():
    """Each scene has a peg of its own, which is simulated; but no single studio could photograph them all."""
    envs = make(3, env_id="PegInsertionSide-v1")
    obs, _ = envs.reset(seed=0)
    assert envs.num_envs == 3 and len(obs[:, 25:28].unique(dim=0)) == 3
    envs.step(torch.zeros(3, 8))


@pytest.mark.parametrize("env_id, says", [
    ("NoSuchTask-v1", "there is no task NoSuchTask-v1 in ManiSkill"), ("CartPole-v1", "there is no task CartPole-v1"),
    ("StackPyramid-v1", "Unsupported reward mode: normalized_dense"), ("MS-CartpoleBalance-v1", "reports no success"),
    ("TwoRobotPickCube-v1", "takes Dict actions"),
    ("RotateValveLevel0-v1", "RotateValveLevel0-v1 cannot be simulated here: RuntimeError('Sizes of tensors must match"),
    ("Pressed-v1", f"NotImplementedError('gpu_query_contact_body_impulses') ({__file__}:"),
    ("Faulty-v1", f"does not broadcast with previously seen size 3') ({__file__}:"),
    ("PickSingleYCB-v1", "files are missing: python -m mani_skill.utils.download_asset PickSingleYCB-v1")])
def test_tasks_that_are_refused(env_id, says, capsys):
    with pytest.raises(SystemExit) as exit:
        make(2, env_id=env_id)
    assert exit.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]


@register_env("Crates-v1", max_episode_steps=50)
class CratesEnv(PushCubeEnv):
    """Each scene has an articulation of its own, as those of PartNet's drawers."""

    def _load_scene(self, options):
        super()._load_scene(options)
        for i in range(self.num_envs):
            builder = self.scene.create_articulation_builder()
            builder.set_scene_idxs([i])
            builder.initial_pose = sapien.Pose([0, 1, 0.5])
            builder.create_link_builder().add_box_visual(half_size=[0.1 + 0.1 * i] * 3)
            builder.build(f"crate_{i}", fix_root_link=True)


@register_env("Pressed-v1", max_episode_steps=50)
class PressedEnv(PushCubeEnv):
    """Asks for all that presses on a body, which only a GPU knows."""

    def evaluate(self):
        return dict(success=self.obj.get_net_contact_forces().norm(dim=1) > 1)


@register_env("Faulty-v1", max_episode_steps=50)
class FaultyEnv(PushCubeEnv):
    """As one's own task is at first."""

    def evaluate(self):
        return dict(success=torch.einsum("ij,j->i", self.obj.pose.p, torch.zeros(2)) > 0)


@register_env("Wrist-v1", max_episode_steps=50)
class WristEnv(PushCubeEnv):
    """Its camera is in the hand."""

    @property
    def _default_human_render_camera_configs(self):
        return CameraConfig("hand", sapien.Pose([0, 0, -0.1], [0.7071, 0, -0.7071, 0]), 224, 224, 1.2, mount=self.agent.tcp)


@pytest.mark.parametrize("env_id", ["PegInsertionSide-v1", "Crates-v1"])
def test_objects_that_differ_cannot_be_photographed(env_id, capsys):
    make(2, env_id=env_id)
    with pytest.raises(SystemExit) as exit:
        make(2, CAMERA | dict(views=ppo_collect.CAMERAS["workspace"]), env_id=env_id)
    assert exit.value.code == 2 and "objects differ from scene to scene" in capsys.readouterr().err.splitlines()[-1]


SCENE = dict(all=dict(pose=[0.75, 0.65, 0.55, 0.3445, 0.15807, 0.05896, -0.9235], fov=0.5))  # all of it


def frames_differ(env_id, views, seed, show_goal_site=True, **kwargs):
    """Ours and stock's pictures of the same scene at some moments: a list of (ours, stock's), each (224, 224, 3) int."""
    torch.manual_seed(0)
    camera = dict(CAMERA, views=views, show_goal_site=show_goal_site, **kwargs)
    pair, stock, pictures = Pair(2, seed, camera, env_id=env_id), [], []
    for view in views.values():  # a stock environment a view
        goal = pair.envs.unwrapped.goal_site.pose.p[0] if "mount" in view else torch.zeros(3)
        pose = [*(goal + torch.tensor(view["pose"][:3])).tolist(), *view["pose"][3:]]
        config = dict(pose=pose, fov=view["fov"], width=224 // len(views), height=224, shader_pack="minimal")
        stock.append(make_stock(env_id, render_backend="cpu", human_render_camera_configs=dict(render_camera=config)))
        stock[-1].reset(seed=0)
        if not show_goal_site:  # ManiSkill shows it in pictures unless it does not know it
            for hidden in stock[-1].unwrapped._hidden_objects:
                hidden.hide_visual()
            stock[-1].unwrapped._hidden_objects.clear()
    for t in range(19):
        action = torch.rand(2, 8) * 2 - 1
        pair.step(action)
        for env in stock:
            env.unwrapped.set_state_dict(pair.stock[0].unwrapped.get_state_dict())
        if t % 6 == 0:
            frames = pair.envs.render_frames(torch.tensor([1, 0]))
            assert frames.shape == (2, 224, 224, 3) and frames.dtype == torch.uint8 and not torch.equal(frames[0], frames[1])
            pictures.append((frames[1].int(), torch.cat([env.unwrapped.render_rgb_array()[0] for env in stock], 1).int()))
    return pictures


@pytest.mark.parametrize("env_id, show_goal_site", [("PickCube-v1", True), ("PickCube-v1", False), ("PushCube-v1", True)])
def test_frames_equal_the_stock_cameras(env_id, show_goal_site):
    views = ppo_collect.CAMERAS["goal"] if env_id == "PickCube-v1" else SCENE
    pictures = frames_differ(env_id, views, 11, show_goal_site, meshes="stock")
    for ours, theirs in pictures:
        # The joints' last bit is lost when the studio is posed: a pixel or two on the edges of the robot may differ.
        difference = (ours - theirs).abs().amax(-1)
        assert (difference > 1).sum() <= 3 and (difference > 0).sum() <= 10
    r, g, b = pictures[0][0].unbind(-1)
    if env_id == "PickCube-v1":
        assert (((g > 100) & (r < 80) & (b < 80)).sum() > 20) == show_goal_site


def test_a_camera_in_the_hand(capsys):
    """`--camera task` knows what it is mounted on; where that is not there, it says so."""
    contract = ppo_collect.make_contract(Args(camera="task", meshes="stock"), find("Wrist-v1"), make(1, env_id="Wrist-v1"))
    ours, pictures = make(2, contract, env_id="Wrist-v1"), []
    stock = make_stock("Wrist-v1", render_backend="cpu", human_render_camera_configs=dict(shader_pack="minimal"))
    for env in (ours, stock):
        env.reset(seed=0)
    for action in (1.0, -1.0):
        ours.step(torch.full((2, 8), action))
        stock.unwrapped.set_state_dict(tree.slice(ours.get_state_dict(), slice(1, 2)))
        pictures.append(ours.render_frames(torch.tensor([1]))[0].int())
        assert ((pictures[-1] - stock.unwrapped.render_rgb_array()[0].int()).abs().amax(-1) > 1).sum() <= 3
    assert (pictures[0] - pictures[1]).abs().float().mean() > 1
    with pytest.raises(SystemExit):
        make(1, CAMERA | dict(views=dict(hand=dict(contract["views"]["hand"], mount="no_hand"))))
    assert "KeyError('no_hand')" in capsys.readouterr().err.splitlines()[-1]


def test_films_are_of_the_tasks_own_camera():
    """Wherever its robot stands, it is in the picture."""
    envs = make(1, dict(ppo_collect.FILM_CAMERA, meshes="stock"), env_id="PickCubeSO100-v1")
    stock = make_stock("PickCubeSO100-v1", render_backend="cpu", human_render_camera_configs=dict(
        width=224, height=224, shader_pack="minimal"))
    for env in (envs, stock):
        env.reset(seed=0)
    envs.set_state_dict(stock.unwrapped.get_state_dict())
    (ours,), (theirs,) = envs.render_frames(torch.tensor([0])).int(), stock.unwrapped.render_rgb_array().int()
    assert ours.shape == (224, 224, 3) and ((ours - theirs).abs().amax(-1) > 1).sum() <= 3


def test_a_gpu_takes_the_same_pictures():
    """There the studio is all scenes, drawn view by view where they are. On a CPU it has one scene: that is asked alike."""
    envs = make(2, CAMERA)
    envs.reset(seed=0)
    frames = envs.render_frames(torch.tensor([1]))
    envs.env = envs.studio  # posed like scene 1
    envs.studio = envs
    assert torch.equal(envs.render_frames(torch.tensor([0])), frames) and frames.float().std() > 10


def test_light_meshes_look_alike():
    """The cube, the goal and the table are what they were, the robot nearly so, with a seventh of the triangles."""
    pictures = frames_differ("PickCube-v1", SCENE, 11)
    for ours, theirs in pictures:
        robot = (theirs.amax(-1) - theirs.amin(-1) < 20)  # grey
        assert ((ours - theirs).abs().amax(-1) > 16)[~robot].float().mean() < 0.01
        assert ((ours - theirs).abs().amax(-1) > 16).float().mean() < 0.05
    assert any(not torch.equal(ours, theirs) for ours, theirs in pictures)


def test_light_meshes_are_made_once_for_all_scenes(monkeypatch):
    """As on a GPU: the same thing's meshes in two scenes, and a third that has its own."""
    camera, calls, unique = dict(CAMERA, views=SCENE), [], np.unique
    *two, own = studios = [make_scenes(TASK, 1, "physx_cpu", dict(camera, meshes=meshes)).unwrapped
                           for meshes in ("stock", "stock", "light")]
    monkeypatch.setattr(np, "unique", lambda *args, **kwargs: calls.append(args) or unique(*args, **kwargs))
    make_scenes(TASK, 1, "physx_cpu", camera)
    calls_of_one = len(calls)
    ground = SimpleNamespace(_objs=[env.scene.actors["ground"]._objs[0] for env in two])
    links = [SimpleNamespace(name=a.name, _objs=[*a._objs, *b._objs]) for a, b in zip(*[env.agent.robot.links for env in two])]
    views = dict(enumerate([view for env in two for view in env.scene.human_render_cameras.values()]))
    ppo_collect.use_light_meshes(SimpleNamespace(agent=SimpleNamespace(robot=SimpleNamespace(links=links)), scene=SimpleNamespace(
        actors=dict(ground=ground), human_render_cameras=views)))
    assert len(calls) == 2 * calls_of_one > 0
    for env in studios:
        env.reset(seed=0)
    frames = [env.render_rgb_array() for env in studios]
    assert torch.equal(frames[0], frames[2]) and torch.equal(frames[1], frames[2]) and frames[0].float().std() > 10


def test_there_is_no_sky_to_be_mirrored(tmp_path):
    """How materials mirror it is a table that SAPIEN integrates for 10 s. Black or white, the frames are the same; were there
    a sky, they would not be."""
    Image.new("RGB", (32, 32), "white").save(tmp_path / "sky.png")
    sky, frames = sapien.render.RenderCubemap(*[str(tmp_path / "sky.png")] * 6), []
    for cubemap, value in ((None, 0), (None, 255), (sky, 0), (sky, 255)):
        envs = make(1, CAMERA)
        scene = envs.studio.scene
        scene.sub_scenes[0].render_system.cubemap = cubemap
        table = sapien.render.RenderTexture(np.full((1, 1, 4), value, np.uint8), 2, "R8G8B8A8Unorm")
        for view in scene.human_render_cameras.values():
            view.camera._render_cameras[0].set_texture("BRDFLUT", table)
        envs.reset(seed=0)
        frames.append(envs.render_frames(torch.tensor([0])))
    assert torch.equal(frames[0], frames[1]) and not torch.equal(frames[2], frames[3])


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


@pytest.mark.parametrize("torque, holds, rests", [(100, False, True), (1, True, False), (0.2, True, True)])
def test_an_arm_that_can_hold_a_cube(tmp_path, monkeypatch, torque, holds, rests):
    """so100.md: the cube is thrown out by ManiSkill's gripper, and held by a weaker one. Only the module's is at rest then."""
    module = re.search(r"```python\n(.*?)```", (ROOT / ".github/results/so100.md").read_text(), re.S)[1]
    env_id = f"Servo{10 * torque:.0f}-v1"
    (tmp_path / "so100.py").write_text(module.replace("[0.2]", f"[{torque}]").replace("PickCubeServo-v1", env_id))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "so100", raising=False)
    envs = make(8, env_id=f"so100:{env_id}", control_mode="pd_joint_target_delta_pos")
    envs.reset(seed=0)
    agent, cube = envs.unwrapped.agent, envs.unwrapped.cube
    qpos = agent.robot.get_qpos().clone()
    qpos[:, 5] = -0.75  # the jaws are a little wider than the cube
    agent.reset(qpos)
    between = Pose.create_from_pq(agent.tcp_pose.p, agent.tcp_pose.q)
    for step in range(50):
        action = torch.zeros(8, 6)
        if step < 6:
            action[:, 5] = -1.0
            cube.set_pose(between)
            cube.set_linear_velocity(torch.zeros(8, 3))
            cube.set_angular_velocity(torch.zeros(8, 3))
        elif 10 <= step < 25:
            action[:, 1] = -0.5  # up
        *_, info = envs.step(action)
    assert (info["is_grasped"] == holds).all() and ((cube.pose.p - between.p)[:, 2] > 0.05).all() == holds
    assert (info["is_robot_static"] == rests).all()
