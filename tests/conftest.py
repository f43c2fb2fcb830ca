"""A core for each of pytest-xdist's workers, and a small folder of real rendered frames, for the tests of stage 2."""
import os
import shutil
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a process draws on one device, and what is tested here is a CPU's
import pytest  # noqa: E402
import sapien
import torch
from test_env import TASK, load_policy, make

from ppo_collect import Args, FrameCollector, make_contract

CORES = os.sched_getaffinity(0)
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...
if WORKER:  # two trainings of two threads each crawl on two cores: 10 frames/s each, where one alone has 93
    os.sched_setaffinity(0, {sorted(CORES)[int(WORKER[2:]) % len(CORES)]})
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def renderer():
    """Once its last user is gone, SAPIEN closes its renderer, and takes 6 s to set up another."""
    yield sapien.render.RenderSystem(sapien.Device("cpu"))


@pytest.fixture(scope="session")
def frames(tmp_path_factory):
    """64 successes of the trained policy, and 64 frames with the cube more than 10 cm from the goal."""
    args = Args(save_dir=str(tmp_path_factory.mktemp("frames") / "data"), target_success=64, target_failure=64, meshes="light")
    contract = make_contract(args, TASK, make(1))
    collector, policy, envs = FrameCollector(args, contract), load_policy(), make(16, contract)
    torch.manual_seed(0)
    obs, _ = envs.reset(seed=0)
    episode, step = torch.arange(16), torch.zeros(16, dtype=torch.int64)
    args.sample_rate_fail = 0.06
    while collector.progress() < 1:
        with torch.no_grad():
            obs, _, terminated, truncated, info = envs.step(policy.get_action_and_logprob(obs)[0])
        done, far = terminated | truncated, obs[:, -3:].norm(dim=1) > 0.1
        info["is_obj_placed"] |= ~far  # what is neither success nor far is not photographed
        info["is_robot_static"] &= far | info["success"]
        step += 1
        if len(collector.folder.pending) < 200:
            collector.photograph(envs, info, done, 1, 0, episode=episode, step=step)
        if done.any():
            idx = done.nonzero().squeeze(-1)
            obs, _ = envs.reset(options=dict(env_idx=idx))
            episode[idx] += 16
            step[idx] = 0
            collector.file()
    collector.folder.lock.close()  # others may write there
    return Path(args.save_dir)


@pytest.fixture
def all_cores():
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield
    os.sched_setaffinity(0, own)


@pytest.fixture
def data(frames, tmp_path):
    shutil.copytree(frames, tmp_path / "data")
    return tmp_path / "data"
