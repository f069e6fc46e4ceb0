"""The package as a whole: which module may import which, what is in the wheel."""

import ast
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sb3_mfpo"
MATHS = sorted(path for path in (PACKAGE / "maths").glob("*.py") if path.stem != "__init__")
# The parts of this package that each part may import from, besides itself; the zoo may import from all
MAY_IMPORT: dict[str, set[str]] = {
    "checks": set(),
    "data": {"runs", "training"},
    "envs": set(),
    "maths": set(),
    "nets": {"maths"},
    "runs": {"checks"},
    "training": {"checks", "maths", "nets", "runs"},
    "mfpo": {"checks", "maths", "nets", "training"},
    "som": {"checks", "maths", "nets", "training"},
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_one_way(part: str) -> None:
    for path in [PACKAGE / f"{part}.py", *(PACKAGE / part).glob("*.py")]:
        own = {name.split(".")[1] for name in imports(path) if name.startswith("sb3_mfpo.")} if path.exists() else set()
        assert own <= MAY_IMPORT[part] | {part}, path


def test_every_part_has_a_rule() -> None:
    assert {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} == {
        *MAY_IMPORT,
        "zoo",
        "__init__",
    }


def test_maths_needs_torch_alone() -> None:
    for path in MATHS:
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "sb3_mfpo"}, path


@pytest.mark.parametrize("path", MATHS, ids=lambda path: path.stem)
def test_maths_has_no_classes_and_draws_nothing(path: Path) -> None:
    source = path.read_text()
    assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    assert "randn" not in source and "th.rand" not in source
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    assert functions and all(ast.get_docstring(function) for function in functions)


def test_wheel(tmp_path: Path) -> None:
    """Built from a clean copy of the sources: no tests inside, typed, imports without the optional packages."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    (sources,) = tmp_path.glob("*.tar.gz")
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", wheel, sources], check=True)
    names = zipfile.ZipFile(wheel).namelist()
    packages = {name.split("/")[0] for name in names}
    assert len(packages) == 2 and "sb3_mfpo" in packages and any(name.endswith(".dist-info") for name in packages)
    assert {"sb3_mfpo/py.typed", "sb3_mfpo/mfpo/mfpo.py", "sb3_mfpo/som/som.py", "sb3_mfpo/maths/mean_flow.py"} <= set(names)
    assert {"sb3_mfpo/zoo/hyperparams/mfpo.yml", "sb3_mfpo/zoo/hyperparams/som.yml"} <= set(names)

    absent = "dm_control", "mujoco", "shimmy", "rl_zoo3", "optuna", "seaborn", "matplotlib", "scipy", "sb3_contrib", "onnx"
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
