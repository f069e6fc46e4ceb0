"""The package as a whole: which module may import which, what is in the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MATHS = ("common/mean_flow", "common/importance", "common/categorical", "common/divergence", "common/score")
# What each module may import besides the standard library
ALLOWED = {
    **{module: {"torch"} for module in MATHS},
    "common/torch_layers": {"torch"},
    "common/checks": {"numpy"},
    "common/acceleration": {"torch"},
    "runs/checkpoint": {"numpy", "stable_baselines3", "sb3_mfpo.common.files"},
    "runs/environments": {"numpy", "gymnasium", "stable_baselines3", "mujoco"},
    "runs/state": {"torch", "numpy", "stable_baselines3", "tensorboard", "sb3_mfpo.runs"},
    "runs/callback": {"stable_baselines3", "sb3_mfpo.common.checks", "sb3_mfpo.runs"},
    "common/files": set(),
    "common/critics": {"torch", "gymnasium", "stable_baselines3", "sb3_mfpo.common"},
    "common/off_policy": {"torch", "numpy", "gymnasium", "stable_baselines3", "sb3_mfpo.common", "sb3_mfpo.runs"},
    "common/policies": {"torch", "numpy", "gymnasium", "stable_baselines3", "sb3_mfpo.common"},
    "common/callbacks": {"torch", "numpy", "stable_baselines3", "sb3_mfpo.common"},
    "mfpo/policies": {"torch", "gymnasium", "stable_baselines3", "sb3_mfpo.common"},
    "envs": {"numpy", "gymnasium", "dm_control", "shimmy"},
    "zoo/search_space": {"optuna"},
    "zoo/manager": {"gymnasium", "rl_zoo3", "stable_baselines3", "sb3_mfpo", "sb3_mfpo.envs"},
    "zoo/registration": {
        *("gymnasium", "rl_zoo3", "huggingface_sb3", "stable_baselines3"),
        *("sb3_mfpo", "sb3_mfpo.envs", "sb3_mfpo.zoo"),
    },
    "zoo/paper": set(),
    "zoo/doctor": {"torch", "packaging", "sb3_mfpo.envs"},
    "zoo/__main__": {
        *("gymnasium", "rl_zoo3", "yaml", "matplotlib", "imageio_ffmpeg"),
        *("sb3_mfpo.envs", "sb3_mfpo.zoo.doctor", "sb3_mfpo.zoo.registration"),
    },
    "mfpo/mfpo": {"torch", "numpy", "gymnasium", "stable_baselines3", "sb3_mfpo.common", "sb3_mfpo.mfpo.policies"},
    "som/policies": {"gymnasium", "stable_baselines3", "sb3_mfpo.common"},
    "som/som": {"torch", "stable_baselines3", "sb3_mfpo.common", "sb3_mfpo.som.policies"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("module", ALLOWED)
def test_imports_go_one_way(module: str) -> None:
    for name in imports(ROOT / "sb3_mfpo" / f"{module}.py"):
        assert any(name == allowed or name.startswith(allowed + ".") for allowed in ALLOWED[module]), f"{module}: {name}"


def test_every_module_has_its_place() -> None:
    modules = {str(path.relative_to(ROOT / "sb3_mfpo").with_suffix("")) for path in (ROOT / "sb3_mfpo").rglob("*.py")}
    assert {module for module in modules if not module.endswith("__init__")} == set(ALLOWED)


@pytest.mark.parametrize("module", MATHS)
def test_maths_has_no_classes_and_draws_nothing(module: str) -> None:
    source = (ROOT / "sb3_mfpo" / f"{module}.py").read_text()
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    assert "randn" not in source and "th.rand" not in source
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert functions and all(ast.get_docstring(function) for function in functions)


def test_wheel(tmp_path: Path) -> None:
    """Built from a clean copy of the sources: no tests inside, typed, imports without the optional packages."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert len(list(tmp_path.glob("*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert len(packages) == 2 and "sb3_mfpo" in packages and any(name.endswith(".dist-info") for name in packages)
    assert {"sb3_mfpo/py.typed", "sb3_mfpo/mfpo/mfpo.py", "sb3_mfpo/som/som.py", "sb3_mfpo/common/mean_flow.py"} <= set(names)
    assert {"sb3_mfpo/zoo/hyperparams/mfpo.yml", "sb3_mfpo/zoo/hyperparams/som.yml"} <= set(names)

    absent = "dm_control", "mujoco", "shimmy", "rl_zoo3", "optuna", "seaborn", "matplotlib", "scipy", "sb3_contrib"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
import sb3_mfpo
assert {wheel.name!r} in sb3_mfpo.__file__, sb3_mfpo.__file__
from sb3_mfpo import MFPO, SOM
print(sb3_mfpo.__version__)
"""
    # Absent packages include those that SB3 itself imports when they are there
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in wheel.name
