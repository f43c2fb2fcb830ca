"""The README's results in one command: all four stages from end to end, once a seed, and one table.

    python tests/bench_pipeline.py --seeds 1 2 3
    python tests/bench_pipeline.py --seeds 1 --flags 1 "--target-success 600 --target-failure 600" --flags 2 "--epochs 9"

Every stage runs as a person runs it, with the defaults or with --flags. --out holds a folder a seed with all that the stages
leave, and results.md, the table. Stopped with Ctrl-C or killed, and called again with the same flags, the bench goes on where
it was; a stage's time is that of all its parts, but not of one that was killed.
"""
import argparse
import csv
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
SCRIPTS = {1: "ppo_collect", 2: "train_reward_resnet", 3: "ppo_dense", 4: "ppo_resnet_reward"}
LAST = 20  # global steps over which stage 4's last metrics are averaged; its first over 10


class Pipeline:
    """One seed's four stages, in a folder of their own."""

    def __init__(self, folder: Path, seed: int, flags: dict):
        self.folder, self.seed, self.flags = folder, seed, flags

    def run_dirs(self, stage: int):
        """Of the stage's parts: each command makes a folder of its own."""
        return sorted(map(str, self.folder.glob(f"logs/*-{SCRIPTS[stage]}")))

    def begun(self, stage: int) -> bool:
        """Is there something to go on with?"""
        if stage == 2:
            return (self.folder / "reward_checkpoints/last_model.pt").exists()
        return any(self.folder.glob(f"logs/*-{SCRIPTS[stage]}/checkpoints/*/checkpoint.pt"))

    def command(self, stage: int) -> list:
        command = [sys.executable, str(ROOT / f"{SCRIPTS[stage]}.py"), "--seed", str(self.seed), *self.flags[stage]]
        if self.begun(stage):
            return command + (["--resume"] if stage == 2 else ["--resume-dir", *self.run_dirs(stage)])
        return command + (["--resume-dir", *self.run_dirs(3)] if stage == 4 else [])

    def run(self, stage: int):
        """Run the stage to its end, and note how long it took."""
        times = self.folder / "seconds.json"
        seconds = json.loads(times.read_text()) if times.exists() else {}
        if f"stage {stage} is done" in seconds:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        command, start = self.command(stage), time.time()
        print(f"seed {self.seed}: {shlex.join(command)}", file=sys.stderr)
        with open(self.folder / f"stage_{stage}.log", "a") as log:
            process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
            try:
                process.wait()
            except KeyboardInterrupt:  # the stage has it too, and saves a checkpoint
                process.wait()
                raise
            finally:
                seconds[str(stage)] = seconds.get(str(stage), 0) + time.time() - start
                if process.returncode == 0:
                    seconds[f"stage {stage} is done"] = True
                times.write_text(json.dumps(seconds))
        if f"stage {stage} is done" not in seconds:
            log = self.folder / f"stage_{stage}.log"
            sys.exit("stopped; the same command goes on" if process.returncode == 130 else f"failed, see {log}")

    def evaluate_on(self, other: "Pipeline"):
        """Score the other seed's frames with this seed's reward model."""
        save_dir = self.folder / "fresh"
        if not (save_dir / "report_data.json").exists():
            command = [sys.executable, str(ROOT / "train_reward_resnet.py"), "--evaluate", "reward_checkpoints/best_model.pt",
                       "--data-path", str(other.folder / "data"), "--save-dir", "fresh", "--log-dir", "fresh"]
            with open(self.folder / "fresh.log", "w") as log:
                subprocess.run(command, cwd=self.folder, stdout=log, stderr=log, check=True)

    def verdicts(self, report: Path) -> dict:
        """{row of the table: share of the report's frames}: of the ends of episodes those above stage 4's threshold, and how
        right the model is by the cube's distance from the rim, 25 mm from the goal."""
        from ppo_resnet_reward import Args
        rows, frames = [], {}
        with open(report) as f:
            for row in csv.DictReader(f):
                file = self.folder / row["file"]
                if file.parents[1] not in frames:
                    with open(file.parents[1] / "index.csv") as index:
                        frames[file.parents[1]] = {frame["file"]: frame for frame in csv.DictReader(index)}
                rows.append(row | frames[file.parents[1]][f"{row['label']}/{file.name}"])
        probability = np.array([float(row["probability"]) for row in rows])
        success, end = np.array([(row["label"] == "success", row["is_final"] == "1") for row in rows]).T
        from_rim = np.array([abs(1000 * float(row["cube_to_goal"] or "nan") - 25) for row in rows])  # mm; PickCube's
        right, paid = (probability > 0.5) == success, probability > Args.threshold
        shares = {"failed ends paid": paid[end & ~success], "successes paid": paid[end & success],
                  "right, 2 mm or more from the rim": right[from_rim >= 2],
                  "of its errors within 2.5 mm of the rim": (from_rim < 2.5)[~right & ~np.isnan(from_rim)]}
        return {row: float(share.mean()) for row, share in shares.items() if len(share)}

    def results(self) -> dict:
        """{row of the table: number or None}"""
        seconds = json.loads((self.folder / "seconds.json").read_text())
        rows, metrics = {}, {}
        for stage in (1, 3, 4):
            metrics[stage] = {}
            for run_dir in self.run_dirs(stage):
                events = EventAccumulator(run_dir, size_guidance=dict(scalars=0))
                events.Reload()
                for tag in events.Tags()["scalars"]:
                    metrics[stage].setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
            metrics[stage] = {tag: [values[step] for step in sorted(values)] for tag, values in metrics[stage].items()}

        def policy(stage):
            if stage < 4:
                rows[f"stage {stage}: env steps"] = metrics[stage]["charts/env_steps"][-1]
            for tag in ("eval/success_once", "eval/episode_len"):
                rows[f"stage {stage}: `{tag}`"] = metrics[stage][tag][-1]
            rows[f"stage {stage}: minutes"] = seconds[str(stage)] / 60

        policy(1)
        for name, file in (("held out", "reward_checkpoints/report.json"), ("fresh", "fresh/report_data.json")):
            if (self.folder / file).exists():
                report = json.loads((self.folder / file).read_text())
                rows[f"stage 2, {name}: accuracy"] = report["accuracy"]
                for kind in ("ends an episode", "near miss"):
                    rows[f"stage 2, {name}: {kind}"] = report["kinds"][kind]["accuracy"]
                shares = self.verdicts((self.folder / file).with_suffix(".csv"))
                rows |= {f"stage 2, {name}: {row}": share for row, share in shares.items()}
        rows["stage 2: minutes"] = seconds["2"] / 60
        policy(3)
        for tag in ("env/success_once", "env/episode_len", "reward_model/precision", "reward_model/recall"):
            rows[f"stage 4: `{tag}`, first 10"] = statistics.mean(metrics[4][tag][:10])
            rows[f"stage 4: `{tag}`, last {LAST}"] = statistics.mean(metrics[4][tag][-LAST:])
        policy(4)
        rows["minutes in all"] = sum(value for key, value in seconds.items() if key.isdigit()) / 60
        return rows


def commit() -> str:
    """The last one that changed the scripts: results, tests and benches do not."""
    command = ["git", "log", "-1", "--abbrev=7", "--format=%h", "--", ":(glob)*.py", "requirements.txt"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    cpu = next((line.partition(":")[2].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
               platform.processor()) if sys.platform == "linux" else platform.processor()
    flags = set(open("/proc/cpuinfo").read().split()) if sys.platform == "linux" else set()
    known = [name for name, flag in (("AVX2", "avx2"), ("AVX-512", "avx512f"), ("bfloat16", "avx512_bf16")) if flag in flags]
    from ppo_dense import usable_cores
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "mani_skill", "sapien"))
    cores = usable_cores()
    return f"{cores} core{'s' * (cores > 1)} of {cpu} ({', '.join(known)}); {versions}; scripts of `{commit()}`"


def table(results: dict) -> str:
    """Markdown: a row a figure, of one seed, or min, median and max over seeds."""
    def show(row, value):
        return f"{value:,.0f}" if "env steps" in row else f"{value:.1f}" if "minutes" in row or value > 1 else f"{value:.3f}"

    several = len(results) > 1
    names = ["min", "median", "max"] if several else [f"seed {seed}" for seed in results]
    lines = ["||" + "|".join(names) + "|", "|---" * (len(names) + 1) + "|"]
    for row in next(iter(results.values())):
        values = [found[row] for found in results.values() if found.get(row) is not None]
        picks = [min, statistics.median, max] if several else [min]
        lines.append(f"|{row}|" + "|".join(show(row, pick(values)) if values else "" for pick in picks) + "|")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--flags", nargs=2, action="append", default=[], metavar=("STAGE", "FLAGS"),
                        help="more flags of a stage, in quotes")
    parser.add_argument("--out", type=Path, default=Path("pipeline"))
    args = parser.parse_args()
    flags = {stage: [flag for s, text in args.flags if s == str(stage) for flag in shlex.split(text)] for stage in SCRIPTS}
    pipelines = [Pipeline(args.out.resolve() / f"seed_{seed}", seed, flags) for seed in args.seeds]
    try:
        for pipeline in pipelines:
            for stage in SCRIPTS:
                pipeline.run(stage)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
    for pipeline, following in zip(pipelines, pipelines[1:] + pipelines[:1]):
        if following is not pipeline:
            pipeline.evaluate_on(following)
    results = {pipeline.seed: pipeline.results() for pipeline in pipelines}
    command = shlex.join(["python", "tests/bench_pipeline.py", *sys.argv[1:]])
    text = f"`{command}`, seeds {', '.join(map(str, results))}, on {machine()}:\n\n{table(results)}\n"
    (args.out / "results.md").write_text(text)
    (args.out / "results.json").write_text(json.dumps(results, indent=2))
    print(table(results))
