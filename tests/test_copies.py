"""The scripts are self-contained: what several of them need is copied, and the copies must stay identical."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("ppo_collect", "train_reward_resnet", "ppo_dense", "ppo_resnet_reward")
MARK = "# ==== From here on: machinery."
OWN = {"Args", "train", "(SCRIPT, GPU, RANK)", "(SCRIPT, GPU)", "DEVICE"}  # of the stories: differ by nature
LIMITS = dict(ppo_dense=(800, 42_000, 310), ppo_collect=(1020, 54_000, 410), ppo_resnet_reward=(1040, 55_000, 450),
              train_reward_resnet=(560, 30_000, 340))  # lines, bytes, lines of the story


def story_and_sections(script):
    """The text above the machinery, and {name: text} of its sections, up to the call of train."""
    story, _, machinery = (ROOT / f"{script}.py").read_text().partition(MARK)
    machinery = machinery.partition('\nif __name__ == "__main__":')[0]
    parts = re.split(r"^# -{20} (.*)\n", machinery, flags=re.M)
    assert len(parts) >= 7, "no sections"
    return story, dict(zip(parts[1::2], (text.strip() for text in parts[2::2])))


def definitions(source):
    """{name: source} of the top-level functions, classes and constants."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_are_identical_and_in_order(script):
    """To the byte, in every script that has them."""
    mine, shared = story_and_sections(script)[1], 0
    for other in SCRIPTS:
        theirs = story_and_sections(other)[1] if other != script else {}
        common = [name for name in mine if name in theirs]
        assert common == [name for name in theirs if name in mine], f"the order differs between {script}.py and {other}.py"
        for name in common:
            assert mine[name] == theirs[name], f"section {name} differs between {script}.py and {other}.py"
            shared += 1
    assert shared >= 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_stories_share_is_identical(script):
    mine = definitions(story_and_sections(script)[0])
    for other in SCRIPTS:
        theirs = definitions(story_and_sections(other)[0])
        for name in mine.keys() & theirs.keys() - OWN:
            assert mine[name] == theirs[name], f"{name} differs between {script}.py and {other}.py"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_story_is_short_and_complete(script):
    """It ends with train(), which a reader can follow without the machinery."""
    story, text = story_and_sections(script)[0], (ROOT / f"{script}.py").read_text()
    lines, size, told = LIMITS[script]
    assert len(text.splitlines()) <= lines and len(text.encode()) <= size and len(story.splitlines()) <= told
    widths = [len(line) for line in text.splitlines()]
    assert max(widths) <= 120 and sum(width > 100 for width in widths) < 0.1 * len(widths)
    assert list(definitions(story))[-1] == "train"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_largest_copies_are_compared(script):
    """PPO's update is one function, the same in the three scripts; stage 4's bookkeeping is one class."""
    mine = definitions(story_and_sections(script)[0])
    assert ("ppo_update" in mine) == (script != "train_reward_resnet")
    assert ("Audit" in mine) == (script == "ppo_resnet_reward")
    if script == "ppo_resnet_reward":
        assert len(mine["train"].splitlines()) <= 140


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_in_the_machinery_is_unused(script):
    """A function or method of a section is named somewhere else in its script, or called by a library."""
    text = (ROOT / f"{script}.py").read_text()
    called_by_libraries = {"forward", "torch", "gpu_init", "gpu_create_contact_pair_impulse_query",
                           "gpu_query_contact_pair_impulses"}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__") and node.name not in called_by_libraries:
            assert len(re.findall(rf"\b{node.name}\b", text)) > 1, f"{node.name} of {script}.py is not used"


def test_args_common_to_the_ppo_scripts():
    """Flags of the same name have the same type, and the same default unless it differs by nature."""
    def flags(script):
        args, = (n for n in ast.parse((ROOT / f"{script}.py").read_text()).body
                 if isinstance(n, ast.ClassDef) and n.name == "Args")
        return {a.target.id: (ast.unparse(a.annotation), ast.unparse(a.value)) for a in args.body
                if isinstance(a, ast.AnnAssign)}

    dense = flags("ppo_dense")
    dense.pop("stop_at_success")
    for other in ("ppo_collect", "ppo_resnet_reward"):
        theirs = flags(other)
        assert dense.keys() - theirs.keys() == ({"robot_uids", "control_mode"} if other == "ppo_resnet_reward" else set())
        differing = {name for name in dense.keys() & theirs.keys() if dense[name] != theirs[name]}
        assert differing <= {"env_id", "num_envs", "num_steps", "num_iterations", "num_minibatches", "learning_rate", "gamma",
                             "gae_lambda", "clip_coef", "target_kl"}, differing


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
            node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & set(SCRIPTS)
