"""The picture at the top of the README: what the ResNet is shown and says, and stage 4's first and last film side by side.

    python tests/draw_overview.py pipeline/seed_1 overview.gif    # of a folder of bench_pipeline.py
"""
import csv
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageOps

GREEN, RED, GRAY = "#2a8a2a", "#c03030", "#707070"
SIDE = 150  # of a small picture, in pixels


def verdicts(sheet: Image.Image, folder: Path):
    """A held-out success 1 cm from the goal and a failure 4 cm from it, with the probability that the ResNet gives them."""
    draw = ImageDraw.Draw(sheet)
    with open(folder / "reward_checkpoints/report.csv") as report, open(folder / "data/index.csv") as index:
        probabilities = {Path(row["file"]).parts[-2:]: float(row["probability"]) for row in csv.DictReader(report)}
        distances = {Path(row["file"]).parts: float(row["cube_to_goal"]) for row in csv.DictReader(index)}
    for k, (label, color, distance) in enumerate((("success", GREEN, 0.01), ("failure", RED, 0.04))):
        held_out = [file for file in probabilities if file[0] == label]
        file = min(held_out, key=lambda file: abs(distances[file] - distance))
        path, top, probability = folder / "data" / Path(*file), 60 + k * (SIDE + 6), probabilities[file]
        sheet.paste(ImageOps.expand(Image.open(path).resize((SIDE - 8, SIDE - 8)), 4, color), (10, top))
        draw.text((10 + SIDE + 14, top + 30), label, color, font_size=17)
        draw.text((10 + SIDE + 14, top + 54), f"ResNet: {probability:.1%}", "black", font_size=17)
        draw.text((10 + SIDE + 14, top + 78), f"reward {int(probability > 0.8)}", "black", font_size=17)


def overview(folder: Path) -> list:
    """Frames of the animation."""
    films = sorted(folder.glob("logs/*-ppo_resnet_reward/videos/*.mp4"), key=lambda film: int(film.stem.split("_")[-1]))
    before, after = iio.imread(films[0]), iio.imread(films[-1])  # (T, 224, 4 * 224, 3)
    still = Image.new("RGB", (970, 400), "white")
    draw = ImageDraw.Draw(still)
    verdicts(still, folder)
    steps = films[-1].stem.split("_")[-1]
    for x, title, text in ((10, "The reward", "a picture, a ResNet, a verdict"),
                           (340, "Before", "learned from the dense reward"),
                           (660, "After", f"{steps} updates with the ResNet's reward")):
        draw.text((x, 6), title, "black", font_size=21)
        draw.text((x, 33), text, GRAY, font_size=15)
    frames = []
    for t in range(min(len(before), 42)):
        frame = still.copy()
        for x, film in ((340, before), (660, after)):
            for k, scene in enumerate(np.split(film[t], 4, axis=1)):
                red, green, _ = scene[2, 112]  # the film's mark of a success
                border = "#20d020" if green > 150 > red else "white"
                picture = Image.fromarray(scene).crop((40, 60, 204, 224)).resize((SIDE - 8, SIDE - 8))
                frame.paste(ImageOps.expand(picture, 4, border), (x + k % 2 * (SIDE + 4), 60 + k // 2 * (SIDE + 6)))
            ImageDraw.Draw(frame).text((x, 372), f"step {t}; green: success", GRAY, font_size=15)
        frames.append(frame)
    return frames


if __name__ == "__main__":
    frames = overview(Path(sys.argv[1]))
    palette = frames[-1].quantize(128)
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(sys.argv[2], save_all=True, append_images=others, duration=[120] * len(others) + [2500], loop=0, optimize=True)
