"""How many pictures does a reward model need? Trains with few and with many, and scores all on frames of other seeds.

    python tests/bench_pictures.py                              # everything: hours on two cores
    python tests/bench_pictures.py --settings PushCube --counts 25 50 100 300

Stage 1 makes the frames once a setting: one seed's to learn from, two fresh seeds' to be scored. From the first, --counts a
class are drawn (three draws up to 300) and learned by train_reward_resnet.py as it is, from the labels alone. Stopped and
called again, the bench goes on where it was. --out holds pictures.csv, a row a training, and the curves, pictures.png.
"""
import argparse
import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
SETTINGS = {"PushCube": ["--env-id", "PushCube-v1"], "PickCube, goal": [], "PickCube, workspace": ["--camera", "workspace"]}
TRAIN, FRESH, SCORED = 1, (5, 6), 1000  # seeds; frames of each class and fresh seed
COLUMNS = ("setting", "count", "draw", "accuracy", "recall", "false_positive_rate", "seconds")


def run(script, *args, log):
    with open(log, "a") as file:
        command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, args), "--log-dir", str(log.parent / "logs")]
        if subprocess.run(command, stdout=file, stderr=file).returncode:
            sys.exit(f"failed, see {log}")


def collect(folder: Path, seed: int, frames: int, flags: list) -> Path:
    """Frames of each class by stage 1; those that are there count, and an interrupted run begins anew beside them."""
    data = folder / f"seed_{seed}"
    run("ppo_collect", *flags, "--seed", seed, "--save-dir", data, "--target-success", frames, "--target-failure", frames,
        "--no-capture-video", log=folder / f"seed_{seed}.log")
    return data


def draw(data: Path, count: int, seed: int, to: Path):
    """A folder with `count` random frames of each class, and their rows."""
    with open(data / "index.csv") as file:
        rows, rng = list(csv.DictReader(file)), np.random.default_rng(seed)
    chosen = [row for label in ("success", "failure")
              for row in rng.permutation([row for row in rows if row["label"] == label])[:count]]
    for row in chosen:
        (to / row["label"]).mkdir(parents=True, exist_ok=True)
        (to / row["file"]).unlink(missing_ok=True)
        (to / row["file"]).symlink_to((data / row["file"]).resolve())
    (to / "metadata.json").write_bytes((data / "metadata.json").read_bytes())
    with open(to / "index.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(chosen)


def measure(folder: Path, setting: str, count: int, number: int, data: Path, fresh: list) -> dict:
    """One training, and how right it is of the fresh frames."""
    here = folder / f"{count}_{number}"
    if not (here / "result.json").exists():
        draw(data, count, number, here / "data")
        start = time.time()
        run("train_reward_resnet", "--data-path", here / "data", "--save-dir", here, "--seed", number + 1,
            "--to-goal-weight", 0, log=here / "log")
        seconds = time.time() - start
        run("train_reward_resnet", "--evaluate", here, "--data-path", *fresh, "--save-dir", here, log=here / "log")
        report = json.loads((here / f"report_{fresh[0].name}.json").read_text())
        result = dict(setting=setting, count=count, draw=number, seconds=round(seconds), **{
            name: round(report[name], 4) for name in ("accuracy", "recall", "false_positive_rate")})
        (here / "result.json").write_text(json.dumps(result))
    return json.loads((here / "result.json").read_text())


def plot(path: Path, rows: list):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, name, title in zip(axes, ("accuracy", "false_positive_rate"), ("right", "failures called done")):
        for setting in dict.fromkeys(row["setting"] for row in rows):
            mine = [row for row in rows if row["setting"] == setting]
            counts = sorted({row["count"] for row in mine})
            line, = axis.plot(counts, [np.median([row[name] for row in mine if row["count"] == n]) for n in counts],
                              label=setting)
            axis.plot([row["count"] for row in mine], [row[name] for row in mine], ".", color=line.get_color(), alpha=0.5)
        axis.set(xscale="log", xlabel="pictures of each class", title=f"fresh frames: {title}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list) -> str:
    lines = ["|pictures a class|draws|right: median (range)|recall|failures called done|minutes|", "|---" * 6 + "|"]
    for setting, count in dict.fromkeys((row["setting"], row["count"]) for row in rows):
        mine = [row for row in rows if (row["setting"], row["count"]) == (setting, count)]
        median = {name: np.median([row[name] for row in mine]) for name in COLUMNS[3:]}
        span = f"{min(row['accuracy'] for row in mine):.3f} to {max(row['accuracy'] for row in mine):.3f}"
        lines.append(f"|{setting}: {count}|{len(mine)}|{median['accuracy']:.3f} ({span})|{median['recall']:.3f}|"
                     f"{median['false_positive_rate']:.3f}|{median['seconds'] / 60:.1f}|")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--counts", type=int, nargs="+", default=[25, 50, 100, 300, 1000, 5000])
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    args = parser.parse_args()
    rows = []
    for setting in args.settings:
        folder = args.out / setting.replace(", ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        data = collect(folder, TRAIN, max(args.counts), SETTINGS[setting])
        fresh = [collect(folder, seed, SCORED, SETTINGS[setting]) for seed in FRESH]
        for count in args.counts:
            for number in range(3 if count <= 300 else 1):
                rows.append(measure(folder, setting, count, number, data, fresh))
                print(rows[-1], file=sys.stderr)
    with open(args.out / "pictures.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(args.out / "pictures.png", rows)
    print(table(rows))
