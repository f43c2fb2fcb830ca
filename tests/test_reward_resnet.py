"""Stage 2: train_reward_resnet.py as people run it, on a small folder of real rendered frames."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import run_script
import torch
from mani_skill.utils.structs import Pose
from PIL import Image
from test_env import CAMERA, ROOT, make

import train_reward_resnet
from ppo_collect import CAMERAS
from train_reward_resnet import augment, frame_weights, load_reward_model, read_data, score, split_by_episode, views_mirror

SMALL = ["--input-size", "48", "--batch-size", "16", "--lr", "1e-3", "--val-split", "0.2", "--epoch-frames", "1"]


def run(cwd, *args, code=0):
    return run_script.run("train_reward_resnet", cwd, *SMALL, *args, code=code)


def test_learns_easy_frames(data, tmp_path):
    """Far failures against successes: all of the held-out frames are right after seconds; the contract travels. Once learned,
    frames are shown less often."""
    out, _ = run(tmp_path, "--epochs", "16")
    shown = [int(line.split()[2]) for line in out.splitlines() if line.startswith("epoch ")]
    assert shown[0] / 6 <= min(shown) < 0.6 * shown[0], shown
    report = json.loads((tmp_path / "reward_checkpoints/report.json").read_text())
    assert report["accuracy"] == report["precision"] == report["recall"] == 1.0 and report["false_positive_rate"] == 0.0, out
    assert report["kinds"]["ends an episode"]["frames"] >= 4
    with Image.open(tmp_path / "reward_checkpoints/mistakes.png") as picture:
        picture.verify()
    model, contract = load_reward_model(tmp_path / "reward_checkpoints/best_model.pt", torch.device("cpu"))
    assert contract == json.loads((data / "metadata.json").read_text())
    for label in ("success", "failure"):
        pictures = [np.asarray(Image.open(f)) for f in sorted((data / label).iterdir())]
        probs = model.predict(torch.from_numpy(np.stack(pictures)))
        assert probs.shape == (64,) and ((probs > 0.5) == (label == "success")).float().mean() > 0.95
    assert list(tmp_path.glob("logs/*-train_reward_resnet/events*")) and list(tmp_path.glob("logs/*/args.json"))

    # The same checkpoint on another folder, and on one whose frames were made otherwise
    shutil.copytree(data, tmp_path / "other")
    out, _ = run(tmp_path, "--evaluate", "reward_checkpoints/best_model.pt", "--data-path", "other")
    report = json.loads((tmp_path / "reward_checkpoints/report_other.json").read_text())
    assert report["frames"] == 128 and report["accuracy"] > 0.95
    (tmp_path / "other/metadata.json").write_text(json.dumps(dict(contract, control_mode="pd_ee_delta_pose", meshes="stock")))
    _, err = run(tmp_path, "--evaluate", "reward_checkpoints/best_model.pt", "--data-path", "other", code=2)
    assert "control_mode is pd_joint_delta_pos there and pd_ee_delta_pose here" in err
    assert "meshes is light there and stock here" in err


def test_neither_class_nor_other_frames_outvote():
    labels, final = np.array([True] * 30 + [False] * 970), np.array([True] * 80 + [False] * 920)
    weights = frame_weights(labels, final, 2.0).numpy()
    assert weights[labels].sum() == pytest.approx(weights[~labels].sum()) == pytest.approx((80 * 2 + 920) / 2)
    assert (weights[30:80] == 2 * weights[-1]).all() and len(set(weights)) == 3
    assert (frame_weights(np.array([True, False] * 5), np.zeros(10, bool), 2.0) == 1).all()


def test_weights_that_are_not_finite_end_the_training(data, tmp_path):
    _, err = run(tmp_path, "--lr", "1e9", "--epochs", "2", code=2)
    assert "no longer finite in epoch 1: train with a smaller --lr" in err and "Traceback" not in err


def test_resumed_training_gives_the_same_weights(data, tmp_path):
    """Interrupted after the second epoch, resumed, and the same as never interrupted."""
    schedule = ["--epochs", "6", "--early-stopping-patience", "6", "--input-size", "32"]
    run(tmp_path, *schedule, "--save-dir", "whole")
    process = run_script.start("train_reward_resnet", tmp_path, *SMALL, *schedule, "--save-dir", "parts")
    for line in process.stdout:
        if line.startswith("epoch 2:"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "To go on: python" in out and "--resume" in out and "Traceback" not in err, out + err
    assert 2 <= torch.load(tmp_path / "parts/last_model.pt", weights_only=True)["state"]["epoch"] < 6
    run(tmp_path, *schedule, "--save-dir", "parts", "--resume")
    a, b = (torch.load(tmp_path / name / "last_model.pt", weights_only=True) for name in ("whole", "parts"))
    assert a["state"]["epoch"] == b["state"]["epoch"] == 6 and a["state"]["best_loss"] == b["state"]["best_loss"]
    assert torch.equal(a["state"]["frame_losses"], b["state"]["frame_losses"])
    for part in ("model", "averaged"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert len(list(tmp_path.glob("logs/*"))) == 3, "each command makes a run's folder"
    _, err = run(tmp_path, "--save-dir", "parts", "--resume", "--seed", "7", code=2)
    assert "seed is 1 there and 7 here" in err


def test_split_keeps_episodes_together(data):
    found, _ = read_data([str(data)])
    labels, episodes, kinds = found["labels"], found["episodes"], found["kinds"]
    assert kinds["ends an episode"].sum() >= 64 and len(episodes) == 128
    sides = set()
    for seed in range(20):
        train, val = split_by_episode(labels, episodes, 0.2, seed)
        assert sorted([*train, *val]) == list(range(128))
        assert not set(episodes[train]) & set(episodes[val])
        assert 26 <= len(val) <= 44
        sides.add(tuple(val))
    assert len(sides) == 20
    assert np.array_equal(split_by_episode(labels, episodes, 0.2, 3)[1], split_by_episode(labels, episodes, 0.2, 3)[1])


def test_ctrl_c_while_pictures_are_decoded(data, tmp_path):
    """There is nothing to lose: within 2 seconds, without a word."""
    for file in data.glob("*/*.png"):
        for copy in range(60):
            (tmp_path / "many" / file.parent.name).mkdir(parents=True, exist_ok=True)
            os.link(file, tmp_path / "many" / file.parent.name / f"{copy}_{file.name}")
    process = run_script.start("train_reward_resnet", tmp_path, "--data-path", "many")
    while "decoding" not in process.stderr.read(20):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=2)
    assert process.returncode == -signal.SIGINT and "Traceback" not in err


def test_several_folders(data, tmp_path):
    """Their episodes stay apart even where they have the same numbers; contracts must agree."""
    shutil.copytree(data, tmp_path / "other")
    both, _ = read_data([str(data), str(tmp_path / "other")])
    one, _ = read_data([str(data)])
    files, episodes = both["files"], both["episodes"]
    assert len(files) == 256 and both["labels"].sum() == 128 and files[128] == str(tmp_path / "other/success/0001.png")
    assert len(set(episodes)) == 2 * len(set(one["episodes"])) and not set(episodes[:128]) & set(episodes[128:])
    assert all(both["kinds"][kind].sum() == 2 * one["kinds"][kind].sum() for kind in one["kinds"])
    contract = json.loads((data / "metadata.json").read_text())
    (tmp_path / "other/metadata.json").write_text(json.dumps(dict(contract, env_id="PushCube-v1")))
    _, err = run(tmp_path, "--data-path", "data", "other", code=2)
    assert "env_id is PushCube-v1 there and PickCube-v1 here" in err.splitlines()[-1]


def test_a_folder_of_one_class(data, tmp_path):
    """Both classes are needed over all folders together, and none to be scored."""
    shutil.copytree(data, tmp_path / "mistakes")
    shutil.rmtree(tmp_path / "mistakes/success")
    both, contract = read_data([str(data), str(tmp_path / "mistakes")])
    assert len(both["files"]) == 192 and both["labels"].sum() == 64
    model = train_reward_resnet.RewardModel("resnet18", 32)
    train_reward_resnet.save_model(tmp_path / "model.pt", model, contract, train_reward_resnet.Args(input_size=32))
    run(tmp_path, "--evaluate", "model.pt", "--data-path", "mistakes", "--save-dir", "scores")
    report = json.loads((tmp_path / "scores/report_mistakes.json").read_text())
    assert report["frames"] == 64 and report["recall"] is None and report["false_positive_rate"] is not None


def test_pictures_that_nobody_has_labelled(data, tmp_path):
    """--evaluate on a folder of pictures: each one's probability, and a contact sheet from done to not done."""
    run(tmp_path, "--epochs", "6")
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    for k, file in enumerate(sorted(data.glob("*/*.png"))[::2]):
        with Image.open(file) as image:
            image.convert("RGB").resize((320, 240)).save(pictures / f"{file.parent.name}_{k}.jpg", quality=95)
    out, _ = run(tmp_path, "--evaluate", "reward_checkpoints", "--data-path", pictures)
    header, *rows = (tmp_path / "reward_checkpoints/probabilities_my pictures.csv").read_text().splitlines()
    assert header == "picture,probability" and len(rows) == 64
    probs = dict(row.rsplit(",", 1) for row in rows)
    right = [(float(prob) > 0.5) == ("success_" in picture) for picture, prob in probs.items()]
    assert np.mean(right) > 0.9 and f"{sum(float(prob) > 0.5 for prob in probs.values())} of 64 are above 0.5" in out
    sheet = np.asarray(Image.open(tmp_path / "reward_checkpoints/probabilities_my pictures.png"))
    assert sheet.shape == (10 * 192, 6 * 192, 3)
    green = [np.abs(sheet[192 * (k // 6) + 1, 192 * (k % 6) + 50].astype(int) - [34, 170, 34]).max() < 9 for k in range(60)]
    assert green == sorted(green, reverse=True) and 15 < sum(green) < 45, "sorted by probability"
    _, err = run(tmp_path, "--data-path", pictures, code=2)
    assert "two episodes of each class are needed; 0 have successes" in err.splitlines()[-1]


@pytest.mark.parametrize("successes, failures", [(2, 2), (8, 400), (400, 2), (2, 400)])
def test_two_episodes_of_each_class_are_enough(successes, failures):
    """With any seed, however few of one class there are; less is refused saying what is missing."""
    labels = np.array([True] * successes + [False] * failures)
    for seed in range(30):
        train, val = split_by_episode(labels, np.arange(len(labels)), 0.1, seed)
        assert all(len(np.unique(labels[part])) == 2 for part in (train, val)) and len(val) >= 0.1 * len(labels) - 1
    # Frames of failures in the episodes that succeed
    train, val = split_by_episode(np.array([False, True] * 4), np.repeat(np.arange(4), 2), 0.1, 0)
    assert len(val) == 2 and len(train) == 6


def test_one_episode_of_a_class_is_not_enough(capsys):
    with pytest.raises(SystemExit) as end:
        split_by_episode(np.array([True] * 5 + [False] * 5), np.array([0] * 5 + [1, 2, 3, 4, 5]), 0.1, 0)
    assert end.value.code == 2
    assert "two episodes of each class are needed; 1 have successes, 5 only failures" in capsys.readouterr().err


@pytest.mark.parametrize("yes, no, encoding", [("1", "0", "utf-8"), ("TRUE", "FALSE", "utf-8-sig"), ("True", "False", "utf-8"),
                                               ("1.0", "0.0", "utf-8"), ("yes", "", "utf-8")])
def test_tables_as_spreadsheets_and_pandas_write_them(data, tmp_path, yes, no, encoding):
    lines = (data / "index.csv").read_text().splitlines()
    header, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    final, episode, placed = (header.index(name) for name in ("is_final", "episode", "is_obj_placed"))
    before, _ = read_data([str(data)])
    for row in rows:
        row[final], row[placed] = (yes if row[k] == "1" else no for k in (final, placed))
        row[episode] += ".0" if yes == "1.0" else ""
    text = "\r\n".join(",".join(row) for row in [header, *rows])
    (data / "index.csv").write_text(text + "\r\n", encoding=encoding)
    after, _ = read_data([str(data)])
    assert all((after["kinds"][kind] == before["kinds"][kind]).all() for kind in before["kinds"])
    assert (after["episodes"] == before["episodes"]).all()


@pytest.mark.parametrize("change, says", [
    (lambda table: table.replace(",", ";"), "row 2: KeyError: "),  # a spreadsheet in Europe
    (lambda table: re.sub(r"(success,\d+,\d+),1,", r"\1,WAHR,", table), "KeyError: 'wahr'"),
    (lambda table: table.replace("success/", "success\\"), "success\\0001.png is labelled success"),
    (lambda table: table.replace("is_final", "final"), "KeyError: 'is_final'")])
def test_tables_that_cannot_be_understood(data, capsys, change, says):
    (data / "index.csv").write_text(change((data / "index.csv").read_text()))
    with pytest.raises(SystemExit) as end:
        read_data([str(data)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and says in err and "index.csv, row" in err and err.count("\n") == 1, err


def test_rows_that_match_no_file(data, capsys):
    table = (data / "index.csv").read_text()
    (data / "index.csv").write_text(table.replace("success/00", "success/IMG_00"))
    found, _ = read_data([str(data)])
    out = capsys.readouterr().out
    assert "warning: 64 rows of" in out and "match no file, such as success/IMG_00" in out and len(found["files"]) == 128


def test_damaged_metadata_of_a_whole_picture(data):
    """EXIF that nobody can read, in a JPEG and in a PNG: the picture counts."""
    with Image.open(data / "success/0001.png") as image:
        picture = Image.fromarray(np.asarray(image))
    picture.save(data / "success/broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff and no more", quality=95)
    picture.save(data / "success/broken.png", exif=b"MM\0*\xff\xff")
    jpg = (data / "success/broken.jpg").read_bytes()
    (data / "success/photoshop.jpg").write_bytes(jpg[:2] + b"\xff\xed\0\x18Photoshop 3.0\0 8BIM\1\2" + jpg[2:] + b"and more")
    model = train_reward_resnet.RewardModel("resnet18", 32)
    files = [data / "success" / name for name in ("broken.jpg", "broken.png", "photoshop.jpg", "0001.png")]
    frames = train_reward_resnet.load_frames(files, {}, model, "decoding").float()
    assert (frames[:-1] - frames[-1]).abs().mean() < 3


def test_hardly_better_than_guessing(data, tmp_path):
    """Labels by the throw of a coin: exit code 0, but nothing is said to be ready."""
    rng = np.random.default_rng(0)
    for side in ("success", "failure"):
        (tmp_path / "coin" / side).mkdir(parents=True)
    for file in sorted(data.glob("*/*.png")):
        shutil.copy(file, tmp_path / "coin" / rng.choice(["success", "failure"]) / f"{file.parent.name}_{file.name}")
    out, _ = run(tmp_path, "--data-path", "coin", "--epochs", "6", "--input-size", "32")
    assert "hardly better than guessing" in out and "is ready" not in out
    # Few held-out frames tell little: the best epoch is a later one than that of the lowest loss
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    losses = [float(line.partition("val_loss ")[2].split(",")[0]) for line in epochs]
    state = torch.load(tmp_path / "reward_checkpoints/last_model.pt", weights_only=True)["state"]
    assert state["best_loss"] == pytest.approx(min(losses), abs=1e-4)
    assert losses.index(min(losses)) + 1 < state["best_epoch"]
    # One success that is held out says little, however many failures are
    for file in sorted(data.glob("success/*.png"))[2:]:
        file.unlink()
    out, _ = run(tmp_path, "--epochs", "1", "--input-size", "32", "--save-dir", "few")
    assert "hardly better than guessing" in out and "is ready" not in out


def test_only_uint8_frames_have_probabilities():
    with pytest.raises(ValueError, match="frames are uint8, not torch.float32"):
        train_reward_resnet.RewardModel("resnet18", 32).predict(torch.rand(1, 32, 32, 3))


def test_own_pictures_with_a_table(data, tmp_path):
    """index.csv without metadata.json: its episodes are kept together."""
    pictures = own_pictures(data, tmp_path / "pictures")
    files = sorted(f"{label}/{file.name}" for label in ("success", "failure") for file in (pictures / label).iterdir()
                   if file.suffix.lower() in (".png", ".jpg"))
    rows = [f"{file},{file.partition('/')[0]},night {k // 8},0" for k, file in enumerate(files)]
    (pictures / "index.csv").write_text("\n".join(["file,label,episode,is_final", *rows]) + "\n")
    found, contract = read_data([str(pictures)])
    assert len(set(found["episodes"])) == 16 and contract == train_reward_resnet.PICTURES


def own_pictures(data, folder):
    """What a person has: large upright and wide JPEGs, some of them turned by the camera, PNGs, and what systems leave."""
    for label in ("success", "failure"):
        (folder / label).mkdir(parents=True)
        for k, file in enumerate(sorted((data / label).iterdir())):
            with Image.open(file) as image:
                picture = Image.fromarray(np.asarray(image)).resize((480, 640) if k % 2 else (1280, 720))
            exif = Image.Exif()
            if k % 4 == 1:  # a telephone held upright stores the picture lying, and says so
                picture, exif[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6
            if k % 3:
                picture.save(folder / label / f"IMG_{k}.JPG", exif=exif, quality=90)
            else:
                picture.save(folder / label / f"{k} (copy).png", exif=exif, compress_level=1)
        (folder / label / ".DS_Store").write_bytes(b"Bud1")
        (folder / label / "Thumbs.db").write_bytes(b"thumbs")
    return folder


def test_own_pictures(data, tmp_path):
    """Two folders of anybody's pictures, one command: a classifier; stage 4 refuses it with the reason."""
    pictures = own_pictures(data, tmp_path / "pictures")
    run(tmp_path, "--data-path", "pictures", "--epochs", "24", "--seed", "2")
    report = json.loads((tmp_path / "reward_checkpoints/report.json").read_text())
    assert report["accuracy"] > 0.95, report
    assert not (pictures / "metadata.json").exists()
    out, _ = run(tmp_path, "--data-path", "pictures", "--epochs", "25", "--seed", "2", "--resume")
    assert "is ready: " in out

    # Turned pictures are seen as people see them
    model, contract = load_reward_model(tmp_path / "reward_checkpoints", torch.device("cpu"))
    turned, = train_reward_resnet.load_frames([str(pictures / "success/IMG_1.JPG")], contract, model, "decoding")
    with Image.open(data / "success/0002.png") as image:
        straight = model.scale(torch.from_numpy(np.array(image))[None])[0]
    assert (turned.float() - straight.float()).abs().mean() < 4

    # Every picture gets its probability, in a folder that does not exist yet
    run(tmp_path, "--evaluate", "reward_checkpoints", "--data-path", "pictures", "--save-dir", "new/folder")
    rows = (tmp_path / "new/folder/report_pictures.csv").read_text().splitlines()
    assert rows[0] == "file,label,probability" and len(rows) == 129
    file, label, probability = rows[1].split(",")
    assert file == "pictures/success/0 (copy).png" and label == "success" and 0 <= float(probability) <= 1
    right = [(float(row.split(",")[2]) > 0.5) == (row.split(",")[1] == "success") for row in rows[1:]]
    assert np.mean(right) == json.loads((tmp_path / "new/folder/report_pictures.json").read_text())["accuracy"] > 0.95

    _, err = run(tmp_path, "--evaluate", "reward_checkpoints", "--data-path", "data", code=2)
    assert "source is pictures there and None here" in err
    _, err = run_script.run("ppo_resnet_reward", tmp_path, code=2)
    assert "was trained on anyone's pictures, not on frames of a ManiSkill task" in err


def test_frames_that_are_not_square(data, tmp_path):
    contract = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps(dict(contract, width=640, height=480)))
    for file in data.glob("*/*.png"):
        with Image.open(file) as image:
            Image.fromarray(np.asarray(image)).resize((640, 480)).save(file, compress_level=1)
    run(tmp_path, "--epochs", "10")
    assert json.loads((tmp_path / "reward_checkpoints/report.json").read_text())["accuracy"] > 0.95


def test_the_readme_s_own_loop(data, tmp_path):
    """README, "The reward model in your own code": the lines that stand there, with a ManiSkill task as "your" environment."""
    run(tmp_path, "--epochs", "3")
    code = re.search(r"<!-- own loop -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    own = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport json, torch, gymnasium, ppo_collect\n"
           "contract = json.load(open('data/metadata.json'))\n"
           "class Robot(gymnasium.Env):\n"
           "    def __init__(self):\n"
           "        args = ppo_collect.Args(sim_backend='physx_cpu')\n"
           "        task = {key: contract[key] for key in ('env_id', 'robot_uids', 'control_mode')}\n"
           "        self.envs = ppo_collect.ManiSkillEnvs(args, task, 1, contract)\n"
           "        self.action_space = self.envs.single_action_space\n"
           "    def reset(self, seed=None, options=None):\n"
           "        return self.envs.reset(seed=seed)[0][0].numpy(), {}\n"
           "    def step(self, action):\n"
           "        obs = self.envs.step(torch.from_numpy(action)[None])[0]\n"
           "        return obs[0].numpy(), 0.0, False, False, {}\n"
           "    def render(self):\n"
           "        return self.envs.render_frames(torch.tensor([0]))[0].numpy()[:, ::-1]\n"  # a view, as MuJoCo's
           f"my_env = Robot()\n{code}\n"
           "print('RESULT', type(reward).__name__, reward, terminated, info['probability'])\n")
    process = subprocess.run([sys.executable, "-c", own], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-2000:]
    assert re.search(r"RESULT float 0.0 False [\d.e-]+", process.stdout), process.stdout


def test_frames_of_before(data, tmp_path):
    contract = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps(dict(contract, format_version=2)))
    _, err = run(tmp_path, code=2)
    assert "metadata.json" in err and "another version of the project" in err.splitlines()[-1]


def test_scores():
    """Against numbers counted by hand."""
    labels = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    probs = np.array([0.9, 0.8, 0.3, 0.6, 0.2, 0.1, 0.3])
    report = score(probs, labels, dict(first=np.array([1, 0, 0, 1, 0, 0, 0], bool), none=np.zeros(7, bool)))
    assert report["accuracy"] == pytest.approx(5 / 7) and report["precision"] == pytest.approx(2 / 3)
    assert report["recall"] == pytest.approx(2 / 3) and report["false_positive_rate"] == 0.25
    assert report["kinds"]["first"] == dict(frames=2, accuracy=0.5, failures=1, false_positive_rate=1.0)
    assert report["kinds"]["none"]["accuracy"] is None
    nothing = score(np.full(4, 0.2), np.array([1, 0, 0, 1], bool), {})
    assert nothing["precision"] is None and nothing["recall"] == 0.0


def test_augmentation_moves_whole_frames():
    """Two dots keep their distance and direction, wherever they go; flipped frames have flipped vectors."""
    def augmented(shift=0.0, color_jitter=0.0, flip=False):
        return augment(frames, cm, shift, color_jitter, flip)

    torch.manual_seed(0)
    frames, cm = torch.zeros(200, 64, 64, 3, dtype=torch.uint8), torch.tensor([[1.0, 2.0, 3.0]]).repeat(200, 1)
    frames[:, 24:27, 30:33], frames[:, 40:43, 30:33] = 240, 120
    still, vectors = augmented()
    torch.testing.assert_close(still, frames.float(), atol=0.1, rtol=0)
    assert torch.equal(vectors, cm)
    moved, places = augmented(shift=0.1)[0].mean(-1), []
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    bright = moved.flatten(1).argmax(1)
    near = ((grid[:, None] - torch.stack([bright // 64, bright % 64])[:, :, None, None]).norm(dim=0) < 6).float()
    for weight in (moved * near, moved * (1 - near)):
        places.append((weight[:, None] * grid).sum((2, 3)) / weight.sum((1, 2))[:, None])
    assert (places[1] - places[0] - torch.tensor([16.0, 0.0])).abs().max() < 0.2
    assert (places[0] - torch.tensor([25.0, 31.0])).abs().max() < 6.8 and places[0].std(0).min() > 3
    bright = augmented(color_jitter=0.2)[0].amax((1, 2, 3))
    assert 0.8 * 240 - 5 < bright.min() < 215 and 265 < bright.max() < 1.2 * 240 + 5

    frames[:, :, :20] = torch.randint(255, (64, 20, 3), dtype=torch.uint8)
    flipped, vectors = augmented(flip=True)
    turned = vectors[:, 1] < 0
    assert 60 < turned.sum() < 140 and torch.equal(vectors.abs(), cm) and (vectors[:, [0, 2]] > 0).all()
    expected = torch.where(turned[:, None, None, None], frames.flip(2), frames).float()
    torch.testing.assert_close(flipped, expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("camera", ["goal", "workspace"])
def test_flipped_frames_are_mirrored_scenes(camera):
    """What flips take for granted, in rendered frames: in those of a scene mirrored in y = 0, cube and goal are where
    they are in the flipped frame. (The lamps are not mirrored.)"""
    views = CAMERAS[camera]
    envs = make(2, dict(CAMERA, views=views))
    envs.reset(seed=0)
    scene, side = envs.unwrapped, torch.tensor([[1.0], [-1.0]])
    for actor, (x, y, z) in ((scene.cube, (0.05, 0.07, 0.12)), (scene.goal_site, (0.08, 0.05, 0.15))):
        actor.set_pose(Pose.create_from_pq(torch.cat([torch.full_like(side, x), y * side, torch.full_like(side, z)], 1)))
    q = scene.agent.robot.get_qpos()
    q[:, 0], q[:, 2], q[:, 4] = 0.3 * side[:, 0], 0.2 * side[:, 0], -0.2 * side[:, 0]
    q[:, 6] = np.pi / 4
    scene.agent.robot.set_qpos(q)
    red, green, blue = envs.render_frames(torch.arange(2)).int().unbind(-1)
    cube, goal = (red > 80) & (green < 45) & (blue < 45), (green > 80) & (red < 60) & (blue < 60)
    for scene, mirrored in (cube, goal):
        assert scene.sum() > 200 and (scene ^ mirrored.flip(1)).sum() < 0.1 * scene.sum()
    assert (cube[0] ^ cube[1]).sum() > 0.5 * cube[0].sum()
    assert views_mirror(views) and not views_mirror(dict(left=views["left"]))
    assert not views_mirror(dict(views, right=dict(views["right"], fov=1.0)))
    # One view is the task's own, even if it looks along the axis: it may tell left from right
    assert not views_mirror(dict(front=dict(pose=[0.6, 0, 0.6, 0, 0.38268, 0, -0.92388], fov=1.0)))


def tiny_metadata(data):
    contract = json.loads((data / "metadata.json").read_text())
    (data / "metadata.json").write_text(json.dumps(dict(contract, width=8)))


def one_class(data):
    shutil.rmtree(data / "success")


def too_few(data):
    for label in ("success", "failure"):
        for f in sorted((data / label).iterdir())[1:]:
            f.unlink()


def truncated_png(data):
    f = data / "failure/0020.png"
    f.write_bytes(f.read_bytes()[:3000])


def wrong_size(data):
    Image.new("RGB", (64, 64)).save(data / "success/0003.png")


def bomb(data):
    """A PNG whose header promises 60,000 x 60,000 pixels: refused before memory is taken."""
    f = data / "success/0003.png"
    content = bytearray(f.read_bytes())
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    import zlib
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    f.write_bytes(content)


def not_a_picture(data):
    (data / "failure/0007.png").write_text("no picture")


def many_unusable(data):
    for n in range(1, 16):
        (data / f"success/{n:04d}.png").write_text("no picture")


def another_file(data):
    (data / "failure/notes.txt").write_text("no picture")


def sixteen_bits(data):
    """Pillow's convert("RGB") would make it white."""
    Image.fromarray((np.arange(224 * 224, dtype=np.uint16)).reshape(224, 224)).save(data / "failure/0007.png")


def wrong_label(data):
    index = (data / "index.csv").read_text()
    (data / "index.csv").write_text(index.replace("failure/0001.png,failure", "failure/0001.png,success"))


def broken_index(data):
    (data / "index.csv").write_text("file,label,episode,is_final\nsuccess/0001.png,success,1,perhaps\n")


@pytest.mark.parametrize("prepare, says", [
    (tiny_metadata, "is (224, 224) and metadata.json says (8, 224)"),
    (one_class, "two episodes of each class are needed; 0 have successes"),
    (too_few, "two episodes of each class are needed; 1 have successes, 1 only failures"),
    (truncated_png, "failure/0020.png is not a whole picture"),
    (wrong_size, "success/0003.png is (64, 64) and metadata.json says (224, 224)"), (bomb, "success/0003.png is "),
    (not_a_picture, "failure/0007.png is not a whole picture"),
    (many_unusable, "; data/success/00"), (another_file, "notes.txt is neither a PNG nor a JPEG"),
    (sixteen_bits, "failure/0007.png is not a whole picture of 8 bits a channel (Pillow's"),
    (wrong_label, "failure/0001.png is labelled"), (broken_index, "index.csv, row 2"),
    (shutil.rmtree, "data: no pictures"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_bad_folders(data, tmp_path, prepare, says):
    """One line that says what is wrong, exit code 2, no traceback."""
    prepare(data)
    _, err = run(tmp_path, "--epochs", "1", code=2)
    lines = [line for line in err.splitlines() if "Warning" not in line and "warn(" not in line]
    assert says in lines[-1] and "train_reward_resnet: error: " in lines[-1], err
    assert "Traceback" not in err and err.count("error: ") == 1


def pickled(path):
    torch.save(dict(model=Path("x")), path)


def foreign(path):
    torch.save(dict(script="ppo_dense", agent={}), path)


def huge(path):
    torch.save(dict(arch="resnet18", input_size=10**9, model={}, contract=dict(format_version=4)), path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("write", [pickled, foreign, huge, empty])
def test_bad_checkpoints(data, tmp_path, write):
    (tmp_path / "reward_checkpoints").mkdir()
    write(tmp_path / "reward_checkpoints/last_model.pt")
    _, err = run(tmp_path, "--evaluate", "reward_checkpoints/last_model.pt", code=2)
    assert "last_model.pt is not a reward model" in err and "Traceback" not in err
    _, err = run(tmp_path, "--resume", code=2)
    assert "last_model.pt cannot be gone on with" in err and "Traceback" not in err


def test_few_frames_are_shifted_further_but_not_where_the_goal_is_in_the_middle(data, tmp_path, monkeypatch):
    """A view that moves with the goal has it in the middle of every picture."""
    shifts = []

    def watched(frames, cm, shift, *more):
        shifts.append(shift)
        return augment(frames, cm, shift, *more)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_reward_resnet, "augment", watched)
    monkeypatch.setattr(train_reward_resnet, "on_stop_signal", lambda handle: None)  # pytest's own stay
    frames, contract = read_data(["data"])
    for view in contract["views"].values():
        assert view["mount"] == "goal_site"
    args = train_reward_resnet.Args(input_size=32, epochs=1, epoch_frames=1)
    train_reward_resnet.train(args, frames, contract)
    assert shifts and not any(shifts)
    train_reward_resnet.train(args, frames, contract | dict(views=CAMERAS["workspace"]))
    assert 0.02 < shifts[-1] <= 0.08


def test_imagenet_weights(data, tmp_path, monkeypatch):
    """Where there is no network, one line says so and training goes on without; where the weights are, it begins with them."""
    import torchvision

    home = tmp_path / "home"
    monkeypatch.setenv("https_proxy", "http://localhost:9")
    monkeypatch.setenv("TORCH_HOME", str(home))
    args = ["--pretrained", "--epochs", "1", "--input-size", "32"]
    out, _ = run(tmp_path, *args)
    assert out.count("warning: ImageNet's weights cannot be downloaded") == 1 and (tmp_path / "reward_checkpoints").exists()
    weights = torchvision.models.resnet18()
    (home / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    torch.save(weights.state_dict(), home / "hub/checkpoints" / url.rpartition("/")[2])
    out, _ = run(tmp_path, *args, "--lr", "0", "--save-dir", "from")
    model, _ = load_reward_model(tmp_path / "from", torch.device("cpu"))
    assert "ImageNet" not in out and torch.equal(model.resnet.conv1.weight, weights.conv1.weight)


def test_help_names_every_flag():
    text, _ = run_script.run("train_reward_resnet", ".", "--help")
    for name in train_reward_resnet.Args.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
