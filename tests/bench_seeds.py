"""Does every seed learn? Trains as stages 1 (without frames) and 3 do, for a list of seeds, one run a core.

    python tests/bench_seeds.py --seeds 0 1 2 3 4 5 6 7 8 9          # writes seeds/seeds.png and prints a table

Every run is ppo_dense.py with its defaults for a CPU, in one process bound to one core, but it goes on to --env-steps; the
table says where stage 3 would have stopped. ppo_collect.py trains in the same way. Stopped and called again, the bench goes on
where it was: its runs lie in --out, a folder each. --curves keeps what they have reached in a file, with the commit, and shows
the seeds of earlier days as well.
"""
import argparse
import csv
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import bench_pipeline  # noqa: E402
import ppo_collect  # noqa: E402
import ppo_dense  # noqa: E402

EVALUATION = re.compile(r"([\d,]+) env steps: eval/success_once ([\d.]+), .*eval/episode_len ([\d.]+)")
EVAL_EVERY = 64_000  # env steps


def recipe(script) -> dict:
    """The flags that both stages have."""
    common = {field.name for field in dataclasses.fields(ppo_dense.Args)} & {
        field.name for field in dataclasses.fields(ppo_collect.Args)}
    return {name: value for name, value in dataclasses.asdict(script.Args()).items() if name in common}


class Run:
    """One seed, on one core."""

    def __init__(self, folder: Path, seed: int, env_steps: float):
        ppo = recipe(ppo_dense)
        global_step = ppo["num_envs"] * ppo["num_steps"]
        self.seed, self.folder, self.log = seed, folder, folder / "output.log"
        self.whole = ppo["num_iterations"] * global_step
        self.last = min(env_steps, self.whole)
        self.command = [sys.executable, str(ROOT / "ppo_dense.py"), "--seed", str(seed), "--num-procs", "1",
                        "--eval-freq", str(EVAL_EVERY // global_step), "--no-capture-video", "--log-dir", str(folder),
                        "--stop-at-success", "1"]

    def curve(self) -> dict:
        """{env steps: (success_once, episode_len)} of the evaluations so far; a continued run says some of them again."""
        found = EVALUATION.findall(self.log.read_text()) if self.log.exists() else []
        return {int(steps.replace(",", "")): (float(success), float(length)) for steps, success, length in found}

    def env_steps(self) -> int:
        return max(self.curve(), default=0)

    def start(self, core: int):
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = any(self.folder.glob("*/checkpoints/*/checkpoint.pt"))
        resume = ["--resume-dir", str(self.folder)] if begun else []
        self.core = core
        with open(self.log, "a") as log, open(self.folder / "errors.log", "w") as errors:
            self.process = subprocess.Popen(self.command + resume, stdout=log, stderr=errors,
                                            preexec_fn=lambda: os.sched_setaffinity(0, [core]))

    def ended(self) -> bool:
        if self.process.poll() is None and self.env_steps() >= self.last and self.last < self.whole:
            self.process.terminate()
            self.process.wait()
        if self.process.poll() not in (None, 0, 130):  # 130: stopped, as above
            sys.exit(f"exit code {self.process.returncode}, see {self.folder / 'errors.log'}: {' '.join(self.command)}")
        return self.process.poll() is not None


def keep(path: Path, curves: dict) -> dict:
    """Write the curves to the file, with those of other seeds that are in it; returns all of them."""
    columns, rows, commit = ["seed", "env_steps", "success_once", "episode_len", "commit"], [], bench_pipeline.commit()
    if path.exists():
        with open(path) as file:
            rows = [row for row in csv.DictReader(file) if int(row["seed"]) not in curves]
    for seed, curve in curves.items():
        rows += [dict(zip(columns, (seed, steps, *curve[steps], commit))) for steps in sorted(curve)]
    rows.sort(key=lambda row: (int(row["seed"]), int(row["env_steps"])))
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    everything = {}
    for row in rows:
        values = float(row["success_once"]), float(row["episode_len"])
        everything.setdefault(int(row["seed"]), {})[int(row["env_steps"])] = values
    return everything


def table(curves: dict) -> str:
    """Markdown: a row a seed, then min, median and max of each column."""
    rows = []
    for seed, curve in curves.items():
        half, most, stop = (min([steps for steps in curve if curve[steps][0] >= once], default=float("inf"))
                            for once in (0.5, 0.95, ppo_dense.Args.stop_at_success))
        rows.append([seed, half, most, stop, *curve.get(stop, (0.0, 0.0)), max(curve), *curve[max(curve)]])
    for name, pick in (("min", min), ("median", statistics.median), ("max", max)):
        rows.append([name, *(pick(column) for column in list(zip(*rows[:len(curves)]))[1:])])
    lines = ["| seed | env steps to 0.5 | to 0.95 | stage 3 stops at | success | length | after | success | length |"]
    lines.append("|---" * 9 + "|")
    for seed, *values in rows:
        cells = ["never" if x == float("inf") else f"{x:,.0f}" if x > 50 else f"{x:.3f}" if x <= 1 else f"{x:.1f}"
                 for x in values]
        lines.append(" | ".join([f"| {seed}", *cells]) + " |")
    return "\n".join(lines)


def draw(curves: dict, title: str, path: Path):
    figure, axes = plt.subplots(2, 1, figsize=(7, 5), sharex=True, constrained_layout=True)
    for seed, curve in curves.items():
        steps = sorted(curve)
        for k, ax in enumerate(axes):
            ax.plot([s / 1e6 for s in steps], [curve[s][k] for s in steps], label=str(seed), lw=1.2)
    axes[0].axhline(0.95, color="0.7", lw=0.8, zorder=0)
    axes[0].set(ylabel="eval/success_once", ylim=(0, 1.02), title=title)
    axes[1].set(ylabel="eval/episode_len", xlabel="million env steps", ylim=(0, None), xlim=(0, None))
    axes[1].legend(title="seed", ncols=5, fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--env-steps", type=float, default=float("inf"), help="of a run at most")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; call again to go on")
    parser.add_argument("--out", type=Path, default=Path("seeds"))
    parser.add_argument("--curves", type=Path, help="CSV file of all evaluations so far; default: <out>/seeds.csv")
    args = parser.parse_args()
    assert recipe(ppo_collect).items() >= recipe(ppo_dense).items(), "stages 1 and 3 train differently"
    runs = [Run(args.out / f"seed_{seed}", seed, args.env_steps) for seed in args.seeds]
    waiting, running = [run for run in runs if run.env_steps() < run.last], []
    cores = sorted(os.sched_getaffinity(0))[:ppo_dense.usable_cores()]
    end = time.time() + 60 * args.minutes
    progress = tqdm(total=sum(run.last for run in runs), unit="env step", unit_scale=True)
    while (waiting or running) and time.time() < end:
        while waiting and cores:
            waiting[0].start(cores.pop())
            running.append(waiting.pop(0))
        time.sleep(1)
        progress.update(sum(min(run.env_steps(), run.last) for run in runs) - progress.n)
        for run in [run for run in running if run.ended()]:
            running.remove(run)
            cores.append(run.core)
    progress.close()
    for run in running:  # out of time: each ends its global step and saves a checkpoint
        run.process.terminate()
        run.process.wait()
    curves = keep(args.curves or args.out / "seeds.csv", {run.seed: run.curve() for run in runs if run.curve()})
    print(table(curves))
    picture = args.out / "seeds.png"
    draw(curves, f"{len(curves)} seeds", picture)
    print(f"\n![Success and episode length of the seeds over env steps]({picture.name})")
