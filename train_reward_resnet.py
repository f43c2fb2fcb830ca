"""Stage 2: train a ResNet to say of a frame whether the task is done.

    reads   data/success/, data/failure/, data/metadata.json, data/index.csv
            of ppo_collect.py; or just your own pictures in the two folders:
            PNG or JPEG, of any size
    writes  reward_checkpoints/best_model.pt  lowest loss on held-out episodes:
                                              the reward model of stage 4
            reward_checkpoints/last_model.pt  where --resume goes on
            reward_checkpoints/report.json    accuracy, precision, recall, ...
            reward_checkpoints/report.csv     the probability of every frame
            reward_checkpoints/mistakes.png   the worst mistakes
            logs/<timestamp>-train_reward_resnet/  TensorBoard events, args.json

    python train_reward_resnet.py                  # on a GPU if there is one
    torchrun --nproc-per-node=8 train_reward_resnet.py
    python train_reward_resnet.py --resume         # go on where a run stopped
    python train_reward_resnet.py --evaluate <model.pt> --data-path more
            writes report_more.json, report_more.csv and mistakes_more.png
"""
import atexit
import contextlib
import csv
import ctypes
import functools
import io
import itertools
import json
import os
import shlex
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Literal, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # but first look for work 5,000 times: stage 2 trains a fifth faster
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision
import tyro
from PIL import Image, ImageDraw, ImageOps
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

SCRIPT = Path(__file__).stem
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun or start_ranks
LAUNCHER = f"{os.environ.get('TORCHELASTIC_RUN_ID')}-{os.getppid()}"  # the same when torchrun starts its ranks anew


@dataclass
class GeneralArgs:
    exp_name: str = SCRIPT
    """the run's folder is <log-dir>/<timestamp>-<exp-name>"""
    seed: int = 1
    """seed of the split, the first weights, the order of the frames and their augmentation"""
    cuda: bool = True
    """train on the GPU when there is one"""
    num_procs: int = 1
    """ranks to start; one already uses every core of a CPU (with more than one GPU, use torchrun)"""
    log_dir: str = "logs"
    """parent of the runs' folders"""
    data_path: tuple[str, ...] = ("data",)
    """folders of the frames, one or more"""
    save_dir: str = "reward_checkpoints"
    """folder of the checkpoints and reports"""
    resume: bool = False
    """continue from <save-dir>/last_model.pt"""
    evaluate: Optional[str] = None
    """only score this checkpoint on all frames of --data-path"""


@dataclass
class ModelArgs:
    arch: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    """torchvision's network (arXiv:1512.03385)"""
    hidden_dim: int = 256
    """units of the layer between its features and the logit"""
    input_size: Optional[int] = None
    """side in pixels to which frames are scaled before the first layer; None: 224 on a GPU, 112 on a CPU"""
    bf16: Optional[bool] = None
    """train in bfloat16 where that is safe; None: on a GPU, and on a CPU where it is faster"""
    pretrained: bool = False
    """start from ImageNet weights, downloaded by torchvision"""


@dataclass
class TrainingArgs:
    epochs: Optional[int] = None
    """passes over the frames at most; None: 100 on a GPU, 14 on a CPU"""
    batch_size: Optional[int] = None
    """frames of all ranks together in one step; None: 64 on a GPU, 32 on a CPU"""
    lr: Optional[float] = None
    """AdamW's step size: it rises in the first epoch, then falls, to 0 after the last; None: 1e-4 on a GPU, 1e-3 on a CPU"""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay"""
    val_split: float = 0.1
    """share of the frames, in whole episodes, that is held out"""
    early_stopping_patience: int = 15
    """end after so many epochs without a lower loss on the held-out episodes"""
    threshold: float = 0.5
    """probability above which the reports count a frame as done"""
    random_shift: float = 0.02
    """augmentation: shift frames by up to this share of their side"""
    color_jitter: float = 0.2
    """augmentation: change brightness and contrast by up to this share"""
    random_flip: Optional[bool] = None
    """augmentation: flip half of the frames left to right; None: where the views mirror each other (goal, workspace)"""
    easy_loss: float = 0.01
    """a frame whose loss was below this the last time is shown in every sixth epoch only; 0: in all of them"""
    final_weight: float = 2.0
    """weight in the loss of frames that end an episode, which are what stage 4 scores (others weigh 1)"""
    to_goal_weight: float = 2.0
    """weight of the mean error (cm) of the vector from cube to goal, which index.csv of PickCube knows; 0: labels alone"""


@dataclass
class Args(TrainingArgs, ModelArgs, GeneralArgs):
    pass


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


def augment(frames, cm, args):
    """Shift whole frames, repeating their edges, flip them left to right, which is the scene mirrored in y, and change their
    brightness and contrast: nothing moves the cube relative to the goal.

    (B, S, S, 3) uint8 frames, (B, 3) vectors from the cube to the goal -> the frames, float32 in about [0, 255]; the vectors.
    """
    x, u = frames.permute(0, 3, 1, 2).float(), torch.rand(5, len(frames), device=frames.device) * 2 - 1
    side = torch.where(u[4] < 0, -1.0, 1.0) if args.random_flip else torch.ones_like(u[4])
    affine = torch.eye(2, 3, device=frames.device).repeat(len(frames), 1, 1)
    affine[:, 0, 0] = side
    affine[:, :, 2] = 2 * args.random_shift * u[:2].T
    grid = nn.functional.affine_grid(affine, x.shape, align_corners=False)
    x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    brightness, contrast = (args.color_jitter * u[2:4])[:, :, None, None, None]
    mean = x.mean((1, 2, 3), keepdim=True)
    x = x * (1 + contrast) + mean * (brightness - contrast)
    return x.permute(0, 2, 3, 1), torch.stack([cm[:, 0], cm[:, 1] * side, cm[:, 2]], 1)


PICTURES = dict(format_version=2, source="pictures")
"""what becomes metadata.json of a folder of your own pictures, of any size"""
SYSTEM_FILES = (".tmp", "Thumbs.db", "desktop.ini")
KINDS = ("ends an episode", "near miss", "ambiguous", "other")


def read_data(data_path):
    """What is in the folders of frames, without opening one.

    Returns:
        files: paths; labels: (M,) bool, True is success;
        episodes: (M,) int64, a frame without a row in index.csv is an episode of its own;
        kinds: {kind: (M,) bool}, from index.csv: the frames that end an episode; failures with the cube 2.5 to 5 cm from the
        goal; failures with the cube at the goal and the robot still moving; the rest;
        to_goal: (M, 3) float32 metres, the vector from the cube to the goal, NaN where index.csv does not say;
        contract: metadata.json, the same in all folders.
    """
    if not data_path:
        fail("--data-path names no folder")
    files, labels, episodes, kinds, to_goal, contracts = zip(*(read_folder(Path(folder)) for folder in data_path))
    for folder, contract in zip(data_path, contracts):
        differing = contract_differences(contracts[0], contract) if contract is not contracts[0] else []
        if differing:
            fail(f"the frames in {folder} were made differently from those in {data_path[0]}: " + "; ".join(differing))
    episodes = [list(zip([k] * len(part), part)) for k, part in enumerate(episodes)]
    _, episodes = np.unique(np.concatenate(episodes), axis=0, return_inverse=True)
    kinds = {kind: np.concatenate([part[kind] for part in kinds]) for kind in KINDS}
    return sum(files, []), np.concatenate(labels), episodes.flatten(), kinds, np.concatenate(to_goal), contracts[0]


def read_folder(folder: Path):
    files = {}
    for label in LABELS:
        names = sorted(os.listdir(folder / label)) if (folder / label).is_dir() else []
        names = [name for name in names if not name.startswith(".") and not name.endswith(SYSTEM_FILES)]
        strange = next((name for name in names if not name.lower().endswith((".png", ".jpg", ".jpeg"))), None)
        if strange:
            fail(f"{folder / label / strange} is neither a PNG nor a JPEG; remove it")
        if not names:
            fail(f"{folder / label} holds no frames, and training needs both classes; collect them with ppo_collect.py, or "
                 "put your own pictures there")
        files[label] = [f"{label}/{name}" for name in names]
    metadata = folder / "metadata.json"
    try:
        from_stage_1 = metadata.exists() or (folder / "index.csv").exists()
        contract = dict(json.loads(metadata.read_text())) if from_stage_1 else PICTURES
        if contract != PICTURES:
            channels, height, width = contract["image_size"]
            if channels != 3 or not 32 <= min(height, width) <= max(height, width) <= 4096:
                raise ValueError("image_size must be [3, height, width], of 32 to 4096 pixels")
            views_mirror(contract)  # can be read
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        fail(f"{metadata}: {type(error).__name__}: {str(error)[:100]}; it must say how the frames were made: collect them "
             "with ppo_collect.py, or name their folder with --data-path")
    rows = {}
    try:
        if (folder / "index.csv").exists():
            with open(folder / "index.csv", newline="") as f:
                for row in csv.DictReader(f):
                    rows[row["file"]] = dict(
                        episode=int(row["episode"]), label=row["label"], final=row["is_final"] == "1",
                        placed=row.get("is_obj_placed") == "1", distance=float(row.get("cube_to_goal") or "nan"),
                        to_goal=[float(row.get(axis) or "nan") for axis in TO_GOAL])
    except (ValueError, TypeError, KeyError, UnicodeDecodeError, csv.Error) as error:
        fail(f"{folder / 'index.csv'} row {len(rows) + 2}: {type(error).__name__}: {str(error)[:100]}; ppo_collect.py writes "
             f"it anew from the frames: --save-dir {folder}")
    names = files["success"] + files["failure"]
    moved = next((name for name in names if name in rows and rows[name]["label"] != name.partition("/")[0]), None)
    if moved:
        fail(f"{folder / moved} is labelled {rows[moved]['label']} in index.csv; move it back or remove the row")
    unknown = dict(final=False, placed=False, distance=float("nan"), to_goal=[float("nan")] * 3)
    rows = [rows.get(name, dict(unknown, episode=-1 - k)) for k, name in enumerate(names)]
    labels = np.array([name.startswith("success/") for name in names])
    final, placed, distance, to_goal = (
        np.array([row[key] for row in rows]) for key in ("final", "placed", "distance", "to_goal"))
    kinds = [final, ~labels & ~placed & (distance <= 0.05), ~labels & placed]
    kinds.append(~np.any(kinds, axis=0))
    episodes = np.array([row["episode"] for row in rows])
    files = [str(folder / name) for name in names]
    return files, labels, episodes, dict(zip(KINDS, kinds)), to_goal.astype(np.float32), contract


def views_mirror(contract: dict) -> bool:
    """Whether the views, from left to right, mirror each other in the plane y = 0, so that a frame flipped left to right is a
    frame of the mirrored scene, and has the same label."""
    views = list(contract["camera"].values())
    poses = np.array([view["pose"] for view in views], float).reshape(-1, 7)  # position, quaternion wxyz
    mirrored = poses[::-1] * [1, -1, 1, 1, -1, 1, -1]
    mirrored[(poses * mirrored)[:, 3:].sum(1) < 0, 3:] *= -1  # q and -q are the same
    others = [(view["fov"], view.get("mount")) for view in views]
    return np.allclose(poses, mirrored, atol=1e-3) and others == others[::-1]


def split_by_episode(labels, episodes, val_split: float, seed: int):
    """(train, val): indices of frames; no episode is in both."""
    order, frames = np.unique(episodes, return_counts=True)
    chosen = np.random.default_rng(seed).permutation(len(order))
    chosen = chosen[:1 + np.searchsorted(np.cumsum(frames[chosen]), val_split * len(labels))]
    held_out = np.isin(episodes, order[chosen])
    if any(len(np.unique(labels[part])) < 2 for part in (held_out, ~held_out)):
        fail(f"too few frames to split: {labels.sum()} successes and {(~labels).sum()} failures in {len(order)} episodes with "
             f"--val-split {val_split} leave a class missing on one side; collect more")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def frame_weights(labels, final, final_weight: float):
    """Weights in the loss: (M,) bool labels, (M,) bool whether a frame ends an episode -> (M,) float32.

    Frames that end an episode weigh `final_weight` times as much as others. Then each class has half of the sum: successes
    are all ends, failures few, a folder of mistakes may hold nothing but failures, and neither class may outvote the other.
    """
    weights = np.where(final, final_weight, 1.0)
    successes = weights[labels].sum() / weights.sum()
    return torch.from_numpy(weights * np.where(labels, 0.5 / successes, 0.5 / (1 - successes))).float()


def load_frames(files, contract: dict, model, progress: str):
    """Decode this rank's pictures once, in parallel: (M, input_size, input_size, 3) uint8 on the CPU.

    Every file must be whole, with 8 bits a channel, and as large as the contract says; headers are checked before memory is
    taken.
    """
    def decode(file):
        try:
            with Image.open(file, formats=["PNG", "JPEG"]) as image:
                size = contract.get("image_size", [3, image.height, image.width])[1:]
                if [image.height, image.width] != size:
                    return f"{file} is {image.width}x{image.height} and metadata.json says {size[1]}x{size[0]}"
                if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "CMYK"):
                    return f"{file} does not have 8 bits a channel (Pillow's mode {image.mode})"
                row = json.loads(getattr(image, "text", {}).get("row", "{}"))
                if row.get("label", Path(file).parent.name) != Path(file).parent.name:
                    return f"{file} was collected as a {row['label']}"
                picture = ImageOps.exif_transpose(image).convert("RGB")  # a telephone may have been held upright
            return model.scale(torch.from_numpy(np.array(picture))[None])[0]
        except (OSError, SyntaxError, ValueError, AttributeError, RecursionError, Image.DecompressionBombError) as error:
            return f"{file} is not a whole picture ({str(error)[:80]})"

    frames = torch.empty((len(files), model.input_size, model.input_size, 3), dtype=torch.uint8)
    problem = None
    with ThreadPoolExecutor() as pool, tqdm(total=len(files), desc=progress, unit="frame", disable=RANK > 0) as bar:
        for k in range(0, len(files), 256):
            chunk = list(pool.map(decode, files[k:k + 256]))
            problem = next((frame for frame in chunk if isinstance(frame, str)), None)
            if problem:
                break
            frames[k:k + 256] = torch.stack(chunk)
            bar.update(len(chunk))
    problem = next((p for p in gather_all(problem) if p), None)
    if problem:
        fail(f"{problem}; mend it, or remove it and its row of index.csv")
    return frames


def train(args: Args):
    data = files, labels, episodes, kinds, to_goal, contract = read_data(args.data_path)
    device, stop_signals = join_ranks(args.cuda), catch_signals()
    torch.manual_seed(args.seed)
    if args.random_flip is None:
        args.random_flip = contract != PICTURES and views_mirror(contract)
    if args.evaluate:
        return evaluate_reward_model(args, device, data)

    # Model
    model = RewardModel(args.arch, args.hidden_dim, args.input_size)
    if args.pretrained:
        on_rank0(load_imagenet_weights, model, args.arch)
    model.to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)

    # Data
    train_idx, val_idx = split_by_episode(labels, episodes, args.val_split, args.seed)
    train_frames = load_frames([files[i] for i in train_idx[RANK::WORLD_SIZE]], contract, model, "decoding")
    val_frames = load_frames([files[i] for i in val_idx[RANK::WORLD_SIZE]], contract, model, "decoding held-out")
    if args.cuda and train_frames.numel() < torch.cuda.mem_get_info()[0] / 2:  # bytes free
        train_frames = train_frames.to(device)
    train_labels = torch.from_numpy(labels[train_idx[RANK::WORLD_SIZE]]).float()
    train_cm = torch.from_numpy(100 * to_goal[train_idx[RANK::WORLD_SIZE]])  # (M, 3)
    train_cm[train_cm.norm(dim=1) > 8] = torch.nan  # out of sight
    train_weights, val_weights = (frame_weights(labels[idx], kinds[KINDS[0]][idx], args.final_weight)
                                  for idx in (train_idx, val_idx))
    train_weights = train_weights[RANK::WORLD_SIZE]
    frame_losses = torch.full((len(train_idx[RANK::WORLD_SIZE]),), torch.inf)  # of each frame when it was shown last
    sizes = [len(train_idx), len(val_idx)]
    if RANK == 0:
        print(f"{sizes[0]} frames to train on and {sizes[1]} held out, in whole episodes; {WORLD_SIZE} rank(s) on {device}")

    # Where an interrupted training stopped
    state = dict(epoch=0, best_epoch=0, best_loss=float("inf"), seconds=0.0, run_dir=None)
    fixed = {name: getattr(args, name) for name in ("arch", "hidden_dim", "input_size", "seed", "val_split")}
    fixed["sizes"] = sizes
    if args.resume:
        last = load_last_model(Path(args.save_dir, "last_model.pt"), fixed, model, optimizer)
        state = {name: last[name] for name in state}
        frame_losses = last["frame_losses"][RANK::WORLD_SIZE].clone()
    state["run_dir"] = on_rank0(open_folders, args, state["run_dir"])
    writer = SummaryWriter(state["run_dir"], purge_step=state["epoch"] + 1) if RANK == 0 else None
    broadcast(model.state_dict().values())

    interrupted = False
    while state["epoch"] < args.epochs and state["epoch"] - state["best_epoch"] < args.early_stopping_patience:
        epoch, start_time = state["epoch"] + 1, time.time()
        torch.manual_seed((args.seed * 100_003 + epoch) * 1009 + RANK)  # an epoch is the same whether resumed or not

        # Train
        model.train()
        order = torch.randperm(len(train_frames))
        easy = frame_losses[order] < args.easy_loss
        order = order[~easy | (easy.cumsum(0) % 6 == 1)]
        shown = int(all_reduce_sum(torch.tensor(len(order))))
        batches = order.tensor_split(max(1, shown // args.batch_size))  # as many on every rank
        new_losses = frame_losses.to(device, copy=True)  # an interrupted epoch changes nothing
        for step, batch in enumerate(tqdm(batches, desc=f"epoch {epoch}", unit="step", leave=False, disable=RANK > 0)):
            if step % 10 == 0 and any(gather_all(bool(stop_signals))):
                interrupted = True
                break
            for group in optimizer.param_groups:  # large first steps may kill every ReLU of the head
                group["lr"] = args.lr * ((step + 1) / len(batches) if epoch == 1 else 1 - (epoch - 1) / args.epochs)
            x, to_goal_cm = augment(train_frames[batch].to(device), train_cm[batch].to(device), args)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                logits, cm = model(x)
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, train_labels[batch].to(device), reduction="none")
            cm_error = (cm - to_goal_cm).abs().mean(1).nan_to_num()  # NaN: not known
            optimizer.zero_grad()
            (train_weights[batch].to(device) * losses + args.to_goal_weight * cm_error).mean().backward()
            average_gradients(parameters)
            optimizer.step()
            new_losses[batch.to(device)] = losses.detach()
        if interrupted:  # what this epoch has learned is dropped: last_model.pt is the end of the one before
            break
        if WORLD_SIZE > 1:
            for buffer in model.buffers():  # the statistics of batch normalisation
                buffer.copy_(all_reduce_sum(buffer) / WORLD_SIZE)
        images_per_s = shown / (time.time() - start_time)
        frame_losses = new_losses.cpu()

        # Validate
        model.eval()
        all_losses = torch.from_numpy(join(frame_losses))
        train_loss = all_losses.mean().item()
        probs = torch.from_numpy(join(model.predict(val_frames)))
        val_loss = nn.functional.binary_cross_entropy(
            probs, torch.from_numpy(labels[val_idx]).float(), val_weights / val_weights.mean()).item()
        if not np.isfinite([train_loss, val_loss]).all():
            fail(f"the loss is no longer finite in epoch {epoch}; continue with --resume and a smaller --lr")

        # Checkpoint
        state |= dict(epoch=epoch, seconds=state["seconds"] + time.time() - start_time)
        improved = val_loss < state["best_loss"]
        if improved:
            state |= dict(best_epoch=epoch, best_loss=val_loss)
            on_rank0(save_model, Path(args.save_dir, "best_model.pt"), model, contract, args, dict(epoch=epoch))
        on_rank0(save_model, Path(args.save_dir, "last_model.pt"), model, contract, args,
                 dict(state, fixed=fixed, optimizer=optimizer.state_dict(), frame_losses=all_losses))

        # Log
        if RANK == 0:
            report = score(probs.numpy(), labels[val_idx], {}, args.threshold)
            scalars = {"losses/train_loss": train_loss, "losses/val_loss": val_loss, "charts/images_per_s": images_per_s}
            for name in ("accuracy", "precision", "recall", "false_positive_rate", "roc_auc"):
                if report[name] is not None:
                    scalars[f"reward_model/{name}"] = report[name]
            for name, value in scalars.items():
                writer.add_scalar(name, value, epoch)
            print(f"epoch {epoch}: {shown} frames, loss {train_loss:.4f}, held-out loss {val_loss:.4f}, accuracy "
                  f"{report['accuracy']:.4f}, {images_per_s:.1f} images/s, {state['seconds'] / 60:.1f} min"
                  f"{' *' if improved else ''}", flush=True)

    if interrupted:
        if RANK == 0:
            print(f"To go on: {shlex.join(['python', *sys.argv])}{' --resume' if state['epoch'] and not args.resume else ''}")
        return
    model, _ = load_reward_model(Path(args.save_dir, "best_model.pt"), device)
    if RANK == 0:
        print(f"the best of {state['epoch']} epochs was {state['best_epoch']}; on the held-out episodes:")
    report_on(model, data, val_idx, val_frames, args, "", writer, state["epoch"], best_epoch=state["best_epoch"],
              train_frames=sizes[0], minutes=state["seconds"] / 60)
    if RANK == 0:
        writer.close()
        print(f"{Path(args.save_dir, 'best_model.pt')} is ready" + (" for stage 4" if contract != PICTURES else ""))


# ==== From here on: machinery. The same text in every script; nothing below is needed to follow the algorithm.

# ---------------------------------------------------------------------------------------------- reports

def score(probs, labels, kinds: dict, threshold: float) -> dict:
    """Metrics of `probs` (M,) against `labels` (M,) bool, in all and for each kind of frame.

    precision, recall and the like are null where they are 0 / 0; threshold_995 is the lowest threshold with a precision of at
    least 99.5 % on these frames.
    """
    def ratio(a, b):
        return float(a / b) if b else None

    said = probs > threshold
    tp, fp, fn, tn = (int((said == a)[labels == b].sum()) for a, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    order = np.argsort(-probs, kind="stable")
    precision = np.cumsum(labels[order]) / np.arange(1, len(order) + 1)
    last = np.flatnonzero((precision >= 0.995) & (np.diff(probs[order], append=-1) < 0))  # equal probs: all or none
    following = probs[order][min(last[-1] + 1, len(order) - 1)] if len(last) else None
    values, ranks = np.unique(probs, return_inverse=True)
    counts = np.bincount(ranks)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[ranks]  # ties share their mean rank
    pos, neg = labels.sum(), (~labels).sum()
    result = dict(frames=len(labels), accuracy=ratio(tp + tn, len(labels)), precision=ratio(tp, tp + fp),
                  recall=ratio(tp, tp + fn), false_positive_rate=ratio(fp, fp + tn),
                  roc_auc=ratio(ranks[labels].sum() - pos * (pos + 1) / 2, pos * neg),
                  confusion=dict(true_positive=tp, false_positive=fp, false_negative=fn, true_negative=tn),
                  threshold=threshold, threshold_995=None if following is None else float(following), kinds={})
    for kind, mask in kinds.items():
        failures = mask & ~labels
        result["kinds"][kind] = dict(frames=int(mask.sum()), accuracy=ratio((said == labels)[mask].sum(), mask.sum()),
                                     failures=int(failures.sum()),
                                     false_positive_rate=ratio(said[failures].sum(), failures.sum()))
    return result


def print_report(report: dict):
    def percent(x):
        return "     -" if x is None else f"{x:6.1%}"

    c = report["confusion"]
    print(f"{report['frames']} frames: accuracy {report['accuracy']:.4f}, precision {percent(report['precision'])}, recall "
          f"{percent(report['recall'])}, false positives {percent(report['false_positive_rate'])}, ROC-AUC "
          + ("-" if report["roc_auc"] is None else f"{report['roc_auc']:.5f}"))
    print(f"             says done  says not done     (threshold {report['threshold']})")
    print(f"  success {c['true_positive']:12} {c['false_negative']:14}")
    print(f"  failure {c['false_positive']:12} {c['true_negative']:14}")
    if report["threshold_995"] is not None:
        print(f"  99.5 % precision from threshold {report['threshold_995']:.4f} on")
    print("  kind of frame      frames  accuracy  failures  false positives")
    for kind, k in report["kinds"].items():
        print(f"  {kind:17} {k['frames']:7}  {percent(k['accuracy']):>8}  {k['failures']:8}  "
              f"{percent(k['false_positive_rate']):>15}")


def draw_mistakes(files, probs, labels, threshold: float, columns: int = 6, rows: int = 4, size: int = 192):
    """The frames that are most wrong, each with its probability: (H, W, 3) uint8. Green frame: it is a success."""
    wrong = np.flatnonzero((probs > threshold) != labels)
    wrong = wrong[np.argsort(-np.abs(probs[wrong] - labels[wrong]))][:columns * rows]
    sheet = Image.new("RGB", (columns * size, max(1, -(-len(wrong) // columns)) * size), "white")
    for k, i in enumerate(wrong):
        cell = Image.new("RGB", (size, size), "#2a2" if labels[i] else "#c33")
        with Image.open(files[i]) as image:
            cell.paste(ImageOps.exif_transpose(image).convert("RGB").resize((size - 6, size - 6)), (3, 3))
        text = f"p = {probs[i]:.3f}\n{'/'.join(Path(files[i]).parts[-2:])}"
        ImageDraw.Draw(cell).text((8, 6), text, fill="white", stroke_width=2, stroke_fill="black", font_size=13)
        sheet.paste(cell, (k % columns * size, k // columns * size))
    return np.asarray(sheet)


def report_on(model, data, idx, frames, args, name: str, writer=None, step: int = 0, **more):
    """Score `frames`, this rank's share of `idx`, print, and write report<name>.json, report<name>.csv with the probability of
    every file, and mistakes<name>.png into <save-dir>."""
    on_rank0(write_report, join(model.predict(frames)), data, idx, args, name, writer, step, more)


def write_report(probs, data, idx, args, name: str, writer, step: int, more: dict):
    files, labels, _, kinds, _, _ = data
    files, labels = [files[i] for i in idx], labels[idx]
    report = score(probs, labels, {kind: mask[idx] for kind, mask in kinds.items()}, args.threshold)
    print_report(report)
    picture, png, table = draw_mistakes(files, probs, labels, args.threshold), io.BytesIO(), io.StringIO()
    Image.fromarray(picture).save(png, "PNG")
    rows = ((file, LABELS[not label], f"{prob:.6f}") for file, label, prob in zip(files, labels, probs))
    csv.writer(table, lineterminator="\n").writerows([("file", "label", "probability"), *rows])
    write_file(Path(args.save_dir, f"mistakes{name}.png"), png.getvalue())
    write_file(Path(args.save_dir, f"report{name}.csv"), table.getvalue().encode())
    write_file(Path(args.save_dir, f"report{name}.json"), json.dumps(dict(report, **more), indent=2).encode())
    if writer:
        writer.add_image("reward_model/mistakes", picture, step, dataformats="HWC")


def evaluate_reward_model(args, device, data):
    """Score --evaluate's checkpoint on all frames of --data-path."""
    files, contract = data[0], data[-1]
    model, known = load_reward_model(args.evaluate, device)
    differing = contract_differences(known, contract)
    if differing:
        fail(f"{args.evaluate} knows frames made differently from those in {args.data_path[0]}: " + "; ".join(differing))
    on_rank0(functools.partial(os.makedirs, args.save_dir, exist_ok=True))
    mine = load_frames(files[RANK::WORLD_SIZE], contract, model, "decoding")
    name = f"_{Path(args.data_path[0]).resolve().name}"
    report_on(model, data, np.arange(len(files)), mine, args, name, checkpoint=args.evaluate)


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


# ---------------------------------------------------------------------------------------------- models

def join(part):
    """The whole (M,) array of which rank r holds every WORLD_SIZE-th element from r on in the tensor `part`."""
    parts = gather_all(part.cpu().numpy())
    whole = np.empty(sum(map(len, parts)), parts[0].dtype)
    for r, values in enumerate(parts):
        whole[r::WORLD_SIZE] = values
    return whole


def open_folders(args, run_dir):
    """Create what is missing of <save-dir>, of metadata.json and of the run's folder, and return the latter."""
    Path(args.save_dir).mkdir(parents=True, exist_ok=True)
    for folder in map(Path, args.data_path):
        if not (folder / "metadata.json").exists():
            with contextlib.suppress(OSError):  # it may be read-only
                write_file(folder / "metadata.json", json.dumps(PICTURES, indent=2).encode())
    if run_dir is None or not Path(run_dir).is_dir():
        run_dir = make_run_dir(args)
    return str(run_dir)


def load_imagenet_weights(model, arch: str):
    try:
        weights = torchvision.models.get_model(arch, weights="DEFAULT").state_dict()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong checksum a RuntimeError
        fail(f"--pretrained: the ImageNet weights could not be downloaded ({error}); train without it")
    model.resnet.load_state_dict({k: v for k, v in weights.items() if not k.startswith("fc.")}, strict=False)


def save_model(path: Path, model, contract: dict, args, more: dict):
    buffer = io.BytesIO()
    torch.save(dict(script=SCRIPT, model=model.state_dict(), arch=args.arch, hidden_dim=args.hidden_dim,
                    input_size=model.input_size, contract=contract, args=asdict(args), **more), buffer)
    write_file(path, buffer.getbuffer(), sync=True)


def load_last_model(path: Path, fixed: dict, model, optimizer) -> dict:
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        differing = [f"{name} was {last['fixed'][name]} and is {value}" for name, value in fixed.items()
                     if last["fixed"][name] != value]
        if not differing:
            model.load_state_dict(last["model"])
            optimizer.load_state_dict(last["optimizer"])
            if last["frame_losses"].shape != (fixed["sizes"][0],):
                raise ValueError("it knows another number of frames")
    except Exception as error:  # torch.load raises many kinds of errors for damaged files
        fail(f"--resume: {path} cannot be read ({str(error).strip().partition(chr(10))[0][:100]}); train without --resume")
    if differing:
        fail(f"--resume: {path} was trained otherwise: " + "; ".join(differing))
    return last


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


# ---------------------------------------------------------------------------------------------- stage 2's flags

def check_training_args(args) -> int:
    """Refuse what cannot work before anything is started; fill in the defaults that depend on the machine.

    Returns:
        the number of ranks.
    """
    args.cuda = args.cuda and torch.cuda.is_available()
    if args.bf16 is None:
        args.bf16 = fast_bf16("cuda" if args.cuda else "cpu")
    for name, default in dict(input_size=224 if args.cuda else 112, epochs=100 if args.cuda else 14,
                              batch_size=64 if args.cuda else 32, lr=1e-4 if args.cuda else 1e-3).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return WORLD_SIZE if "WORLD_SIZE" in os.environ else args.num_procs


if __name__ == "__main__":
    torch.set_num_threads(1)  # until join_ranks: a process with threads cannot be forked
    args = parse_args()
    num_ranks = check_training_args(args)
    read_data(args.data_path)  # refuses what it cannot read, before anything is started
    if num_ranks > 1 and "WORLD_SIZE" not in os.environ:
        start_ranks(num_ranks)
    train(args)
