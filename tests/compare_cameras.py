"""Which camera shows whether the cube is at the goal? The same states, seen by several.

    python tests/compare_cameras.py cameras.jpg

Writes the picture of successes and near misses side by side, and prints, as medians over both: how many pixels of 224x224 the
cube and the goal cover, and how many of them change when the cube moves by 1 cm in the direction in which the picture changes
least (of 13); and the share of successes in which less than 10 pixels of the goal can be seen.
"""
import itertools
import sys
from pathlib import Path

import numpy as np
import sapien
import torch
from mani_skill.utils.sapien_utils import look_at
from PIL import Image, ImageDraw
from test_env import TASK, load_policy, make

from ppo_collect import CAMERAS as OURS
from ppo_collect import make_scenes


def looking(eye, target, fov, **mount):
    return dict(view=dict(pose=look_at(eye, target).raw_pose[0].tolist(), fov=fov, **mount))


CAMERAS = {"the task's base_camera, 90 degrees": looking([0.3, 0, 0.6], [-0.1, 0, 0.1], np.pi / 2),
           "ManiSkill's human render camera, 57 degrees": looking([0.6, 0.7, 0.6], [0, 0, 0.35], 1.0),
           "one view of the workspace, 29 degrees": looking([0.7, 0.4, 0.15], [0, 0, 0.17], 0.5),
           "--camera workspace: two views of it, 26 degrees": OURS["workspace"],
           "two views that follow the goal, front and side, 15 degrees": dict(
               **looking([1.2, 0, 0.22], [0, 0, 0], 0.26, mount="goal_site"),
               side=looking([0, 1.2, 0.22], [0, 0, 0], 0.26, mount="goal_site")["view"]),
           "--camera goal: two views that follow the goal, from 45 degrees left and right": OURS["goal"]}
DIRECTIONS = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if d > (0, 0, 0)], float)
DIRECTIONS /= np.linalg.norm(DIRECTIONS, axis=1, keepdims=True)
NUM_ENVS, STATES, EXAMPLES, SIDE = 24, 24, 4, 200


def main(path):
    envs = make(NUM_ENVS)
    frame = dict(width=224, height=224, shader_pack="minimal", meshes="light", show_goal_site=True)
    studios = [make_scenes(TASK, 1, "physx_cpu", dict(frame, views=views)).unwrapped
               for views in CAMERAS.values()]
    policy, pixels, labels = load_policy(), [[] for _ in studios], []
    torch.manual_seed(0)
    obs, _ = envs.reset(seed=0)
    examples = dict(success=[], miss=[])
    while len(labels) < STATES or min(map(len, examples.values())) < EXAMPLES:
        with torch.no_grad():
            obs, _, terminated, truncated, info = envs.step(policy.get_action_and_logprob(obs)[0])
        distance, done = obs[:, -3:].norm(dim=1), terminated | truncated
        for i in range(NUM_ENVS):
            miss = info["is_grasped"][i] and 0.025 < distance[i] < 0.05 and torch.rand(()) < 0.05
            if not miss and not info["success"][i]:
                continue
            pictures = []
            labels.append(not miss)
            for studio, counts in zip(studios, pixels):
                envs.studio = studio
                pictures.append(envs.render_frames(torch.tensor([i]))[0].numpy())
                changed = []
                for direction in DIRECTIONS:
                    pose = envs.unwrapped.cube.pose.raw_pose[i].numpy()
                    studio.cube._objs[0].pose = sapien.Pose(pose[:3] + 0.01 * direction, pose[3:])
                    moved = studio.render_rgb_array()[0].numpy()
                    changed.append((np.abs(pictures[-1].astype(int) - moved).max(-1) > 30).sum())
                r, g, b = pictures[-1].astype(int).transpose(2, 0, 1)
                counts.append((((r > 80) & (g < 45) & (b < 45)).sum(), ((g > 80) & (r < 60) & (b < 60)).sum(), min(changed)))
            shown = examples["miss" if miss else "success"]
            if len(shown) < EXAMPLES:
                shown.append((pictures, f"{'near miss' if miss else 'success'}, {100 * distance[i]:.1f} cm"))
        idx = done.nonzero().squeeze(-1)
        if len(idx):
            obs, _ = envs.reset(options=dict(env_idx=idx))

    sheet = Image.new("RGB", (2 * EXAMPLES * SIDE, len(studios) * (SIDE + 24) + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for c, (pictures, text) in enumerate(examples["success"] + examples["miss"]):
        draw.text((c * SIDE + 4, 3), text, fill="black", font_size=15)
        for r, (name, picture) in enumerate(zip(CAMERAS, pictures)):
            top = 24 + r * (SIDE + 24)
            draw.text((4, top + 3), name, fill="black", font_size=15)
            sheet.paste("#2a2" if c < EXAMPLES else "#c33", (c * SIDE, top + 24, (c + 1) * SIDE, top + 24 + SIDE))
            sheet.paste(Image.fromarray(picture).resize((SIDE - 4, SIDE - 4)), (c * SIDE + 2, top + 26))
    sheet.save(path, quality=88)
    print(f"|median of {sum(labels)} successes and {len(labels) - sum(labels)} near misses|pixels of the cube|of the goal|changed by "
          "1 cm|successes that hide the goal|\n|---|---|---|---|---|")
    for name, counts in zip(CAMERAS, pixels):
        hidden = np.mean(np.array(counts)[labels, 1] < 10)
        print("|".join(["", name, *[f"{count:.0f}" for count in np.median(counts, axis=0)], f"{hidden:.1%}", ""]))
    print(f"\n![The same states, seen by six cameras: successes on green, near misses on red]({path.name})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
