"""Stage 2: train a ResNet to say of a frame whether the task is done.

    reads   data/success/, data/failure/, data/metadata.json, data/index.csv
            of ppo_collect.py; or your own PNGs or JPEGs in the two folders
    writes  reward_checkpoints/best_model.pt  the reward model of stage 4
            reward_checkpoints/last_model.pt  where --resume goes on
            reward_checkpoints/report.json, report.csv, mistakes.png
            logs/<timestamp>-train_reward_resnet/  TensorBoard events, args.json

    python train_reward_resnet.py
    python train_reward_resnet.py --resume  # go on where a run stopped
    python train_reward_resnet.py --evaluate <model.pt> --data-path more
            without success/ and failure/: probabilities, a contact sheet
"""
import contextlib
import csv
import functools
import io
import json
import os
import shlex
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Literal, NewType, Optional

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # but first look for work
import numpy as np  # noqa: E402
import torch
import torch.nn as nn
import torchvision
import tyro
from PIL import Image, ImageDraw, ImageOps
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

SCRIPT, GPU, RANK = Path(__file__).stem, torch.cuda.is_available(), 0
DEVICE = torch.device("cuda" if GPU else "cpu")
Share = NewType("Share", float)  # a number between 0 and 1


@dataclass
class Args:
    seed: int = 1  # of the split, the weights, the order
    data_path: tuple[str, ...] = ("data",)  # folders of frames, one or more
    save_dir: str = "reward_checkpoints"  # folder of the checkpoints and reports
    log_dir: str = "logs"  # parent of the runs' folders
    resume: bool = False  # go on from <save-dir>/last_model.pt
    evaluate: str = ""  # only score this model on all of --data-path

    arch: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"  # torchvision's
    input_size: int = 128  # side in pixels to which frames are scaled
    pretrained: bool = False  # start from ImageNet weights, downloaded by torchvision
    epochs: int = 9  # passes over the frames
    epoch_frames: int = 1250  # in an epoch: fewer are shown again, easy ones too
    batch_size: int = 32  # frames in a step, or a few more
    lr: float = 1e-3  # AdamW's step size: it rises in epoch 1, then falls
    val_split: Share = 0.1  # share of the frames, in whole episodes, that is held out
    early_stopping_patience: int = 15  # epochs that are clearly worse than the best
    random_shift: Share = 0.02  # augmentation: shift by up to this; more if frames are few, none if views move
    color_jitter: Share = 0.2  # augmentation: of brightness and contrast
    easy_loss: float = 0.01  # of frames below this a sixth is shown in an epoch
    final_weight: float = 2.0  # of frames that end an episode: these stage 4 scores
    to_goal_weight: float = 2.0  # of the vector from cube to goal, where index.csv knows it


class RewardModel(nn.Module):
    """Says of a frame how sure it is that the task is done. Three more outputs, the vector from the cube to
    the goal, sharpen the first (stage 2, --to-goal-weight)."""

    def __init__(self, arch: str, input_size: int, weights: Optional[str] = None):
        super().__init__()
        if arch not in ("resnet18", "resnet34", "resnet50") or not 32 <= input_size <= 1024:
            raise ValueError(f"no such reward model: {arch} of {input_size} pixels")
        self.input_size = input_size
        self.resnet = torchvision.models.get_model(arch, weights=weights)
        self.resnet.avgpool = nn.AdaptiveAvgPool2d(4)  # not 1: where things are is what matters
        self.resnet.fc = nn.Sequential(
            nn.Dropout(0.2), nn.Linear(self.resnet.fc.in_features * 4 * 4, 256), nn.ReLU(), nn.Linear(256, 4))
        self.register_buffer("mean", 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), False)  # ImageNet's
        self.register_buffer("std", 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), False)

    def scale(self, frames):
        """(K, H, W, 3) uint8 -> (K, input_size, input_size, 3) uint8."""
        return resize(frames.permute(0, 3, 1, 2), [self.input_size] * 2, antialias=True).permute(0, 2, 3, 1)

    def forward(self, frames):
        """(K, S, S, 3) in [0, 255] -> (K,) float32 logits, (K, 3) float32 cm. NHWC is channels_last."""
        outputs = self.resnet((frames.permute(0, 3, 1, 2).float() - self.mean) / self.std).float()
        return outputs[:, 0], outputs[:, 1:]

    @torch.inference_mode()
    def predict(self, frames, batch_size: int = 64):
        """(K, H, W, 3) uint8 frames of any size -> (K,) float32 probabilities of being done."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames are uint8, not {frames.dtype}")
        device = self.mean.device
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device.type)):
            return torch.cat([self(self.scale(f.to(device)))[0].sigmoid() for f in frames.split(batch_size)])


def augment(frames, cm, shift: float, color_jitter: float, flip: bool):
    """Shift (B, S, S, 3) uint8 frames, make them brighter or darker, flip half of them left to right,
    which is the scene mirrored in y, with their (B, 3) vectors: cube and goal stay where they are."""
    x, u = frames.permute(0, 3, 1, 2).float(), 2 * torch.rand(5, len(frames), device=frames.device) - 1
    side = torch.where((u[4] < 0) & flip, -1.0, 1.0)
    affine = torch.eye(2, 3, device=frames.device).repeat(len(frames), 1, 1)
    affine[:, 0, 0] = side
    affine[:, :, 2] = 2 * shift * u[:2].T
    grid = nn.functional.affine_grid(affine, x.shape, align_corners=False)
    x = nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    brightness, contrast = (color_jitter * u[2:4])[:, :, None, None, None]
    x = x * (1 + contrast) + x.mean((1, 2, 3), keepdim=True) * (brightness - contrast)
    return x.permute(0, 2, 3, 1), torch.stack([cm[:, 0], cm[:, 1] * side, cm[:, 2]], 1)


def split_by_episode(labels, episodes, val_split: float, seed: int):
    """(train, val): indices of frames; no episode is in both. A share of the episodes with a success, and of
    the others, is held out, at least one and never all: two of each are enough, with any seed."""
    succeeds, held_out = np.isin(episodes, episodes[labels]), np.zeros(len(labels), bool)
    rng = np.random.default_rng(seed)
    for group in (succeeds, ~succeeds):
        order, frames = np.unique(episodes[group], return_counts=True)
        chosen = rng.permutation(len(order))
        count = 1 + np.searchsorted(np.cumsum(frames[chosen]), val_split * frames.sum())
        held_out |= np.isin(episodes, order[chosen[:min(count, len(order) - 1)]])
    if any(len(np.unique(labels[part])) < 2 for part in (held_out, ~held_out)):
        of = [len(np.unique(episodes[which])) for which in (succeeds, ~succeeds)]
        fail(f"two episodes of each class are needed; {of[0]} have successes, {of[1]} only failures")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def frame_weights(labels, final, final_weight: float):
    """(M,) bool labels, (M,) bool whether a frame ends an episode -> (M,) float32 weights in the loss:
    ends weigh more, and then each class has half of the sum."""
    weights = np.where(final, final_weight, 1.0)
    sums = np.where(labels, weights[labels].sum(), weights[~labels].sum())
    return torch.from_numpy(weights / sums * weights.sum() / 2).float()


def train(args: Args, data: dict, contract: dict):
    # Model
    torch.manual_seed(args.seed)
    try:
        model = RewardModel(args.arch, args.input_size, weights="DEFAULT" if args.pretrained else None)
    except (OSError, RuntimeError) as error:
        say(f"warning: ImageNet's weights cannot be downloaded ({error})")
        model = RewardModel(args.arch, args.input_size)
    model.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)
    averaged = AveragedModel(model, use_buffers=True)  # better at new poses

    # Data
    labels, flip = data["labels"], views_mirror(contract.get("views", {}))
    train_idx, val_idx = parts = split_by_episode(labels, data["episodes"], args.val_split, args.seed)
    train_frames = load_frames(data["files"][train_idx], contract, model, "decoding")
    val_frames = load_frames(data["files"][val_idx], contract, model, "decoding held-out")
    if GPU and train_frames.numel() < torch.cuda.mem_get_info()[0] / 2:  # bytes free
        train_frames = train_frames.to(DEVICE)
    final = data["kinds"]["ends an episode"]
    train_labels, val_labels = (torch.from_numpy(labels[part]).float() for part in parts)
    train_weights, val_weights = (frame_weights(labels[part], final[part], args.final_weight) for part in parts)
    train_cm = torch.from_numpy(100 * data["to_goal"][train_idx])
    train_cm[train_cm.norm(dim=1) > 8] = torch.nan  # cm: may be out of sight
    repeats = -(-args.epoch_frames // len(train_idx))
    shift = args.random_shift * min(max(9000 / len(train_idx), 1) ** 0.3, 4)
    shift *= not any(view.get("mount") == "goal_site" for view in contract.get("views", {}).values())  # in the middle
    say(f"{len(train_idx)} frames to train on, {len(val_idx)} held out, on {DEVICE}")

    # Where an interrupted training stopped
    same = dict(frames=[len(train_idx), len(val_idx)], arch=args.arch, input_size=args.input_size, seed=args.seed)
    state = dict(same=same, epoch=0, best_epoch=0, best_loss=np.inf, frame_losses=torch.full_like(train_labels, np.inf))
    folder = Path(args.save_dir)
    if args.resume:
        state = load_last_model(folder / "last_model.pt", same, model, optimizer, averaged)
    folder.mkdir(parents=True, exist_ok=True)

    (_, writer), stop_signals = make_run_dir(args), []
    on_stop_signal(stop_signals.append)
    while state["epoch"] < min(args.epochs, state["best_epoch"] + args.early_stopping_patience):
        epoch, start_time = state["epoch"] + 1, time.time()
        torch.manual_seed(args.seed * 100_003 + epoch)  # the same whether resumed or not

        # Train
        order = torch.cat([torch.randperm(len(train_idx)) for _ in range(repeats)])
        frame_losses = state["frame_losses"].to(DEVICE)
        easy = (state["frame_losses"][order] < args.easy_loss) & (repeats == 1)
        order = order[~easy | (easy.cumsum(0) % 6 == 1)]
        batches = order.tensor_split(max(1, len(order) // args.batch_size))
        averaged.multi_avg_fn = get_ema_multi_avg_fn(1 - 1 / len(batches))  # over about an epoch
        for step, batch in enumerate(tqdm(batches, f"epoch {epoch}", unit="step", leave=False)):
            if stop_signals:
                break
            share = (step + 1) / len(batches) if epoch == 1 else 1 - (epoch - 1) / args.epochs
            optimizer.param_groups[0]["lr"] = args.lr * share  # large first steps may kill every ReLU
            x, to_goal_cm = augment(
                train_frames[batch].to(DEVICE), train_cm[batch].to(DEVICE), shift, args.color_jitter, flip)
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=fast_bf16(DEVICE.type)):
                logits, cm = model(x)
            losses = nn.functional.binary_cross_entropy_with_logits(
                logits, train_labels[batch].to(DEVICE), reduction="none")
            cm_error = (cm - to_goal_cm).abs().mean(1).nan_to_num()  # NaN: not known
            optimizer.zero_grad()
            (train_weights[batch].to(DEVICE) * losses + args.to_goal_weight * cm_error).mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
            frame_losses[batch.to(DEVICE)] = losses.detach()
        if stop_signals:  # this epoch is dropped
            resume = " --resume" if state["epoch"] and not args.resume else ""
            say(f"To go on: {shlex.join(['python', *sys.argv])}{resume}")
            sys.exit(130)  # so that && stops

        # Validate
        probs = averaged.eval().module.predict(val_frames).cpu()
        if not probs.isfinite().all():
            fail(f"the weights are no longer finite in epoch {epoch}: train with a smaller --lr")
        losses = nn.functional.binary_cross_entropy(probs, val_labels, val_weights, reduction="none")
        val_loss, error = losses.mean().item(), losses.std().item() / len(losses) ** 0.5
        state |= dict(epoch=epoch, frame_losses=frame_losses.cpu())

        # Checkpoint the last epoch within its standard error of the best
        if best := val_loss <= state["best_loss"] + error:
            state |= dict(best_epoch=epoch, best_loss=min(val_loss, state["best_loss"]))
            save_model(folder / "best_model.pt", averaged.module, contract, args)
        save_model(folder / "last_model.pt", model, contract, args, state=state, optimizer=optimizer.state_dict(),
                   averaged=averaged.state_dict())

        # Log
        report = score(probs.numpy(), labels[val_idx], {})
        scalars = {"losses/train_loss": (train_weights * frame_losses.cpu()).mean().item(), "losses/val_loss": val_loss}
        scalars |= {f"reward_model/{name}": value for name, value in report.items() if type(value) is float}
        for name, value in scalars.items():
            writer.add_scalar(name, value, epoch)
        text = ", ".join(f"{name.partition('/')[2]} {scalars[name]:.4f}" for name in list(scalars)[:3])
        say(f"epoch {epoch}: {len(order)} frames, {text}, {time.time() - start_time:.1f} s{' *' if best else ''}")

    model, _ = load_reward_model(folder, DEVICE)
    say(f"after {state['epoch']} epochs, on the held-out episodes:")
    report, picture = write_report(model.predict(val_frames), data, val_idx, args, "")
    writer.add_image("reward_model/mistakes", picture, state["epoch"], dataformats="HWC")
    writer.close()
    noise = (1 / np.bincount(labels[val_idx])).sum() ** 0.5  # two standard errors
    verdict = "ready" if report["recall"] - report["false_positive_rate"] >= noise else "hardly better than guessing"
    say(f"{folder}/best_model.pt is {verdict}: {report['accuracy']:.1%} of {len(val_idx)} held-out frames are right")


# ==== From here on: machinery. Sections of one name are equal.

# -------------------- data

PICTURES = dict(format_version=4, source="pictures")  # anyone's own
LABELS = ("success", "failure")
FLAGS = dict.fromkeys(("1", "1.0", "true", "yes"), True) | dict.fromkeys(("0", "0.0", "false", "no", "", "nan"), False)
TO_GOAL = ("to_goal_x", "to_goal_y", "to_goal_z")


def read_data(data_path):
    """What is in the folders: (M,) arrays `files`, `labels` (True: success), `episodes` (a frame without
    a row is its own), `to_goal` (M, 3) metres (NaN: not known), `kinds` {kind: bool}; the contract, or {}."""
    rows, contracts = [], []
    for folder in map(Path, data_path or fail("--data-path: no folder")):
        found, contract = read_folder(folder)
        if not found:
            fail(f"{folder}: no pictures")
        rows += found
        contracts.append(contract)
        if differences(contract, contracts[0]):
            fail(f"the frames in {folder} were made differently: {differences(contract, contracts[0])}")
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    _, columns["episodes"] = np.unique(columns["episodes"], return_inverse=True)
    final, near = columns.pop("final"), ~columns["labels"] & (np.linalg.norm(columns["to_goal"], axis=1) <= 0.05)
    kinds = {"ends an episode": final, "near miss": near, "other": ~final & ~near}
    return columns | dict(kinds=kinds), contracts[0]


def read_folder(folder: Path):
    index, metadata, rows, found = folder / "index.csv", folder / "metadata.json", {}, []
    try:
        contract = dict(json.loads(metadata.read_text())) if metadata.exists() else PICTURES
        if contract.get("source") == "pictures":
            contract = PICTURES
        else:
            views_mirror(contract["views"])  # can be read
            if contract["format_version"] != 4:
                raise ValueError("it is of another version of the project")
        with open(index, newline="", encoding="utf-8-sig") if index.exists() else io.StringIO() as table:
            for row in csv.DictReader(table):
                if not row["file"].startswith(row["label"] + "/"):
                    raise ValueError(f"{row['file']} is labelled {row['label']}")
                to_goal = [float(row.get(axis) or "nan") for axis in TO_GOAL]
                rows[row["file"]] = dict(
                    episodes=f"{folder} {row['episode']}", final=FLAGS[row["is_final"].lower()],
                    to_goal=to_goal)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as e:
        fail(f"{metadata} or {index}, row {len(rows) + 2}: {type(e).__name__}: {str(e)[:150]}")
    labels = [label for label in LABELS if (folder / label).is_dir()]
    for label in labels or [""]:
        for file in sorted((folder / label).iterdir()) if folder.is_dir() else ():
            if file.name.startswith(".") or file.name.endswith((".tmp", "Thumbs.db", "desktop.ini")):
                continue
            if file.suffix.lower() not in (".png", ".jpg", ".jpeg"):
                fail(f"{file} is neither a PNG nor a JPEG")
            own = dict(episodes=str(file), final=False, to_goal=[np.nan] * 3)
            row = rows.pop(f"{label}/{file.name}", own)
            found.append(row | dict(files=str(file), labels=label == "success"))
    if rows:
        say(f"warning: {len(rows)} rows of {index} match no file, such as {next(iter(rows))}")
    return found, contract if labels else {}


def views_mirror(views: dict) -> bool:
    """Two views, in y = 0: then a frame flipped left to right is one of the mirrored scene."""
    views = list(views.values())
    poses = np.array([view["pose"] for view in views], float).reshape(-1, 7)  # xyz, wxyz
    mirrored = poses[::-1] * [1, -1, 1, 1, -1, 1, -1]
    mirrored[(poses * mirrored)[:, 3:].sum(1) < 0, 3:] *= -1  # q and -q are the same
    others = [(view["fov"], view.get("mount")) for view in views]
    return len(views) > 1 and np.allclose(poses, mirrored, atol=1e-3) and others == others[::-1]


def read_picture(file: str):
    """As people see it: a telephone may have been turned. Damaged metadata does not matter."""
    with Image.open(file, formats=["PNG", "JPEG"]) as image:
        if image.mode not in ("RGB", "RGBA", "L", "LA", "P", "CMYK"):
            raise ValueError(f"Pillow's mode {image.mode}")
        picture = image.convert("RGB")
        with contextlib.suppress(Exception):
            picture = ImageOps.exif_transpose(image).convert("RGB")
        return picture


def load_frames(files, contract: dict, model, progress: str):
    """(M, input_size, input_size, 3) uint8 on the CPU, of whole pictures as large as the contract says."""
    def decode(numbered):
        k, file = numbered[0], str(numbered[1])
        try:
            picture = read_picture(file)
            size = contract.get("width", picture.width), contract.get("height", picture.height)
            if picture.size != size:
                return f"{file} is {picture.size} and metadata.json says {size}"
            frames[k] = model.scale(torch.from_numpy(np.array(picture))[None])[0]
        except Exception as error:  # whatever Pillow makes of a damaged file
            return f"{file} is not a whole picture of 8 bits a channel ({str(error)[:80]})"

    frames = torch.empty((len(files), model.input_size, model.input_size, 3), dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        done = tqdm(pool.map(decode, enumerate(files)), progress, len(files), leave=False)
        problems = [problem for problem in done if problem]
    if problems:
        fail(f"{len(problems)} of {len(files)} files cannot be used: {'; '.join(problems[:10])}")
    return frames


# -------------------- reports

def score(probs, labels, kinds: dict) -> dict:
    """Metrics of `probs` (M,) above 0.5 against `labels` (M,) bool, in all and of each kind; null for 0 / 0."""
    def share(a, b):
        return float((a & b).sum() / b.sum()) if b.any() else None

    said, right, failures = probs > 0.5, (probs > 0.5) == labels, ~labels
    report = dict(frames=len(labels), accuracy=float(right.mean()), precision=share(labels, said),
                  recall=share(said, labels), false_positive_rate=share(said, failures), kinds={})
    for kind, of in kinds.items():
        report["kinds"][kind] = dict(frames=int(of.sum()), failures=int((of & failures).sum()),
                                     accuracy=share(right, of), false_positive_rate=share(said, of & failures))
    return report


def draw_pictures(path: Path, files, probs, done, columns=6, size=192):
    """A PNG, and (H, W, 3) uint8, of pictures with their probability; those that are `done` on green."""
    sheet = Image.new("RGB", (columns * size, max(1, -(-len(files) // columns)) * size), "white")
    for k, file in enumerate(files):
        cell = ImageOps.expand(read_picture(file).resize((size - 6, size - 6)), 3, "#2a2" if done[k] else "#c33")
        text = f"p = {probs[k]:.3f}\n{'/'.join(Path(file).parts[-2:])}"
        ImageDraw.Draw(cell).text((8, 6), text, fill="white", stroke_width=2, stroke_fill="black", font_size=13)
        sheet.paste(cell, (k % columns * size, k // columns * size))
    sheet.save(path)
    return np.asarray(sheet)


def write_table(path: Path, *rows):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows)
    write_file(path, table.getvalue().encode(errors="surrogateescape"))


def write_report(probs, data, idx, args, name: str):
    """Print how right `probs` are of the frames `idx`; write report and mistakes into <save-dir>."""
    probs, files, labels = probs.cpu().numpy(), data["files"][idx], data["labels"][idx]
    kinds = {kind: of[idx] for kind, of in data["kinds"].items()}
    report, path = score(probs, labels, kinds), Path(args.save_dir)
    for kind, of in [("all", report), *report["kinds"].items()]:
        text = [f"{name} {of[name]:.4f}" for name in of if isinstance(of[name], float)]
        say(f"  {kind:15} {of['frames']:6} frames: {', '.join(text)}")
    rows = zip(files, [LABELS[not label] for label in labels], [f"{prob:.6f}" for prob in probs])
    write_table(path / f"report{name}.csv", ("file", "label", "probability"), *rows)
    write_file(path / f"report{name}.json", json.dumps(report, indent=2).encode())
    wrong = np.flatnonzero((probs > 0.5) != labels)
    wrong = wrong[np.argsort(-np.abs(probs[wrong] - labels[wrong]))][:24]
    return report, draw_pictures(path / f"mistakes{name}.png", files[wrong], probs[wrong], labels[wrong])


def evaluate_reward_model(args):
    """Score --evaluate's model on the pictures of --data-path."""
    model, known = load_reward_model(args.evaluate, DEVICE)
    (data, contract), path = read_data(args.data_path), Path(args.save_dir)
    if contract and differences(known, contract):
        fail(f"{args.evaluate} knows other frames than {args.data_path[0]}: {differences(known, contract)}")
    files, name = data["files"], f"_{Path(args.data_path[0]).resolve().name}"
    probs = model.predict(load_frames(files, contract, model, "decoding"))
    if contract:
        return write_report(probs, data, np.arange(len(probs)), args, name)
    probs, sheet = probs.cpu().numpy(), path / f"probabilities{name}.png"
    write_table(sheet.with_suffix(".csv"), ("picture", "probability"), *zip(files, probs.round(6)))
    shown = np.argsort(-probs)[np.linspace(0, len(files) - 1, min(len(files), 60)).astype(int)]
    draw_pictures(sheet, files[shown], probs[shown], probs[shown] > 0.5)
    say(f"{(probs > 0.5).sum()} of {len(files)} are above 0.5: {sheet} and .csv")


# -------------------- models

def save_model(path: Path, model, contract: dict, args, **more):
    buffer = io.BytesIO()
    torch.save(dict(model=model.state_dict(), arch=args.arch, input_size=model.input_size, script=SCRIPT,
                    contract=contract, args=asdict(args), **more), buffer)
    write_file(path, buffer.getbuffer())


def load_last_model(path: Path, same: dict, model, optimizer, averaged) -> dict:
    try:
        last = torch.load(path, map_location="cpu", weights_only=True)
        if last["state"]["same"] != same:
            raise ValueError(differences(last["state"]["same"], same))
        model.load_state_dict(last["model"])
        optimizer.load_state_dict(last["optimizer"])
        averaged.load_state_dict(last["averaged"])
        return last["state"]
    except Exception as error:  # torch.load raises many kinds
        fail(f"--resume: {path} cannot be gone on with ({str(error)[:150]!r})")


# -------------------- contract

def differences(theirs: dict, ours: dict) -> str:
    """What two contracts disagree on, but for the version of ManiSkill."""
    keys = sorted({*theirs, *ours} - {"mani_skill_version"})
    return "; ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in keys
                     if theirs.get(key) != ours.get(key))


# -------------------- reward model

@functools.cache
def fast_bf16(device_type: str) -> bool:
    """Whether bfloat16 beats float32: on GPUs that have it, and on CPUs with AMX or AMD's AVX-512."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = "amx_bf16" in info or "AuthenticAMD" in info and "avx512_bf16" in info  # Intel's AVX-512 is slower
    return torch.cuda.is_bf16_supported(including_emulation=False) if device_type == "cuda" else cpu


def load_reward_model(path: str, device):
    """The model of stage 2 in a file, or in a folder's best_model.pt, and its contract."""
    path = Path(path, "best_model.pt") if Path(path).is_dir() else path
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["contract"].get("format_version") != 4:
            raise ValueError("it is of another version of the project: train it anew")
        model = RewardModel(checkpoint["arch"], checkpoint["input_size"])
        model.load_state_dict(checkpoint["model"])
        if not all(weight.isfinite().all() for weight in model.state_dict().values()):
            raise ValueError("it has weights that are not finite")
        return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["contract"]
    except Exception as error:  # torch.load raises many kinds
        fail(f"{path} is not a reward model of train_reward_resnet.py ({str(error)[:150]!r})")


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
    args = parse_args()
    try:
        evaluate_reward_model(args) if args.evaluate else train(args, *read_data(args.data_path))
    except (OSError, ValueError) as error:
        fail(f"{error}; what was written before is whole: mend that, then resume")
