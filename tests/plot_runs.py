"""Curves and the last film of any runs, over env steps: one picture, and the numbers in it.

    python tests/plot_runs.py resnet --tags env/success_once env/episode_len -- "ResNet=logs/<run>" "oracle=logs/<run>"

Writes .github/results/resnet.csv (run, tag, env_steps, value) and resnet.png, and prints a table: means of the first 10 and
of the last 20 values, of fewer the first and the last one. A run in several parts has its folders with commas between them.
--smooth averages over that many global steps; --film adds five moments of the last run's last film.
"""
import argparse
import csv
from pathlib import Path

import imageio.v3 as iio
import matplotlib
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

RESULTS = Path(__file__).parents[1] / ".github/results"


def read_run(folders: list, tag: str) -> list:
    """[(env steps, value)] of all its parts."""
    found = {}
    for folder in folders:
        events = EventAccumulator(folder, size_guidance=dict(scalars=0))
        events.Reload()
        env_steps = {0: 0} | {event.step: event.value for event in events.Scalars("charts/env_steps")}
        if tag in events.Tags()["scalars"]:
            found |= {int(env_steps[event.step]): event.value for event in events.Scalars(tag) if event.step in env_steps}
    return sorted(found.items())


def plot(path: Path, runs: dict, tags: list, smooth: int, film=None):
    """`runs` {name: {tag: [(env steps, value)]}}"""
    columns = min(len(tags), 3)
    figure, axes = plt.subplots(1 + bool(film), columns, figsize=(4 * columns, 3.4 + 2.2 * bool(film)), squeeze=False)
    for axis, tag in zip(axes[0], tags):
        for name, curves in runs.items():
            steps, values = np.array(curves[tag] or [(np.nan, np.nan)]).T
            width = min(smooth if tag.startswith(("env/", "reward_model/")) else 1, len(values))
            values = np.convolve(values, np.ones(width) / width, "valid")
            axis.plot(steps[width - 1:] / 1e6, values, label=name)
        axis.set(title=tag, xlabel="million env steps")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    if film:
        grid = axes[1][0].get_gridspec()
        for axis in axes[1]:
            axis.remove()
        axis = figure.add_subplot(grid[1, :])
        frames = iio.imread(film)
        side = frames.shape[1]  # of a scene; the first is shown
        axis.imshow(np.concatenate([frames[k][:, :side] for k in np.linspace(0, len(frames) - 1, 5).astype(int)], 1))
        axis.set(title="without noise, from the first step to the last", xticks=[], yticks=[])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("runs", nargs="+", help="label=folder[,folder ...]")
    parser.add_argument("--tags", nargs="+", default=["eval/success_once", "env/return"])
    parser.add_argument("--smooth", type=int, default=10)
    parser.add_argument("--film", action="store_true")
    args = parser.parse_args()
    folders = {name: paths.split(",") for name, paths in (run.rsplit("=", 1) for run in args.runs)}
    runs = {name: {tag: read_run(paths, tag) for tag in args.tags} for name, paths in folders.items()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with open(RESULTS / f"{args.name}.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "tag", "env_steps", "value"))
        writer.writerows((name, tag, steps, round(value, 4)) for name, curves in runs.items()
                         for tag, curve in curves.items() for steps, value in curve)
    print("|start, end|" + "|".join(f"`{tag}`" for tag in args.tags) + "|")
    print("|---" * (len(args.tags) + 1) + "|")
    for name, curves in runs.items():
        cells = []
        for values in ([value for _, value in curves[tag]] for tag in args.tags):
            first, end = (10, 20) if len(values) > 30 else (1, 1)
            cells.append(f"{np.mean(values[:first]):.3f}, {np.mean(values[-end:]):.3f}" if values else "")
        print(f"|{name}|" + "|".join(cells) + "|")
    films = [film for folder in folders[list(folders)[-1]] for film in sorted(
        Path(folder).glob("videos/*.mp4"), key=lambda path: int(path.stem.rpartition("_")[2]))]
    plot(RESULTS / f"{args.name}.png", runs, args.tags, args.smooth, films[-1] if args.film else None)
    moments = ", and five moments of an episode" * args.film
    print(f"\n![{', '.join(args.tags[:3])} over env steps{moments}]({args.name}.png)")
