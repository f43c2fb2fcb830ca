"""The scripts are self-contained: what several of them need is copied, and the copies must stay identical."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("ppo_collect", "train_reward_resnet", "ppo_dense", "ppo_resnet_reward")
OWN = {"PPOArgs", "Args", "GPU_CPU_DEFAULTS", "RATES", "MAY_BE_ZERO"}  # differ by nature


def definitions(script):
    """{name: source} of the top-level functions, classes and constants."""
    source = (ROOT / f"{script}.py").read_text()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            decorators = "".join(f"@{ast.unparse(d)}\n" for d in node.decorator_list)
            found[node.name] = decorators + ast.get_source_segment(source, node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_copies_are_identical(script):
    mine, shared = definitions(script), 0
    for other in SCRIPTS:
        theirs = definitions(other)
        for name in mine.keys() & theirs.keys() - OWN if other != script else ():
            assert mine[name] == theirs[name], f"{name} differs between {script}.py and {other}.py"
            shared += 1
    assert shared >= 10


def test_args_common_to_the_ppo_scripts():
    """Flags of the same name have the same type, and the same text unless their default differs by nature."""
    def flags(script):
        source = (ROOT / f"{script}.py").read_text()
        groups = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name.endswith("Args")]
        return {a.target.id: (ast.unparse(a.annotation), ast.unparse(a.value)) for group in groups for a in group.body
                if isinstance(a, ast.AnnAssign)}

    dense = flags("ppo_dense")
    for other in ("ppo_collect", "ppo_resnet_reward"):
        theirs = flags(other)
        assert dense.keys() <= theirs.keys()
        differing = {name for name in dense if dense[name] != theirs[name]}
        assert differing <= {"num_iterations", "num_minibatches", "learning_rate", "gamma", "gae_lambda"}, differing


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
            node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & set(SCRIPTS)
