"""How fast does train_reward_resnet.py train and infer here? Everything side by side in one run, real frames.

    python tests/bench_classifier.py data

1. One training step of ResNet-18 on 32 frames, in frames a second: memory layout, bfloat16 where the CPU is faster with it,
   torch.compile, input size.
2. Data: an epoch's worth of batches from uint8 memory, against a DataLoader that decodes the PNGs anew in every epoch.
3. Inference.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_reward_resnet import RewardModel, augment, fast_bf16, load_frames  # noqa: E402

BATCH = 32


def rate(step, frames, repeats):
    step()  # warm-up, and compilation
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return frames / np.median(times)


def training(frames, size, repeats, channels_last=True, bf16=False, compiled=False):
    torch.manual_seed(0)
    model = RewardModel("resnet18", size)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.randint(2, (BATCH,)).float()
    forward = torch.compile(model) if compiled else model
    batch = model.scale(frames[:BATCH])

    def step():
        x, _ = augment(batch, torch.zeros(BATCH, 3), 0.02, 0.2, True)
        if not channels_last:
            x = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits, _ = forward(x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trains = rate(step, BATCH, repeats)
    model.eval()

    @torch.inference_mode()
    def infer():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            forward(model.scale(frames[:BATCH]))

    return trains, rate(infer, BATCH, repeats)


class PNGs(torch.utils.data.Dataset):
    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        return torch.from_numpy(np.array(Image.open(self.files[i]).convert("RGB")))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder written by ppo_collect.py")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    files = sorted(Path(options.data).glob("*/*.png"))[:1024]
    size = Image.open(files[0]).width
    full = RewardModel("resnet18", size)
    frames = load_frames(files, dict(width=size, height=size), full, "decoding")

    print(f"ResNet-18, batches of {BATCH}, {torch.get_num_threads()} threads, frames a second")
    print("  input  layout         precision  compiled  training  inference")
    cases = [(False, False, False), (True, False, False), (True, False, True)]
    if fast_bf16("cpu"):
        cases += [(True, True, False), (True, True, True)]
    for side in sorted({80, 112, 160, size}):
        for layout, bf16, compiled in cases:
            trains, infers = training(frames, side, options.repeats, layout, bf16, compiled)
            print(f"  {side:5}  {'channels_last' if layout else 'contiguous':13}  {'bfloat16' if bf16 else 'float32':9}  "
                  f"{'yes' if compiled else 'no':8}  {trains:8.1f}  {infers:9.1f}", flush=True)

    def memory_epoch():
        for batch in torch.randperm(len(frames)).split(BATCH):
            augment(frames[batch], torch.zeros(len(batch), 3), 0.02, 0.2, True)

    def png_epoch(workers):
        loader = torch.utils.data.DataLoader(PNGs(files), BATCH, shuffle=True, num_workers=workers)
        return lambda: [augment(batch, torch.zeros(len(batch), 3), 0.02, 0.2, True) for batch in loader]

    print("batches alone, without the network, frames a second")
    print(f"  decoded once into memory      {rate(memory_epoch, len(files), 3):8.0f}")
    for workers in (0, 2):
        print(f"  DataLoader over PNGs, {workers} workers {rate(png_epoch(workers), len(files), 3):8.0f}")
