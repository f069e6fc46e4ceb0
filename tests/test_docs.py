"""The manual: every page's lines of Python are run, in order, with fewer steps; its commands name what is there."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import rl_zoo3
import torch as th

from sb3_mfpo import MFPO, SOM
from sb3_mfpo.zoo.__main__ import COMMANDS
from tests.helpers import RandomEnv

ROOT = Path(__file__).parent.parent
# Pages whose lines other tests run, and then look at what they do
ELSEWHERE = {"export.md": "test_examples.py", "data.md": "test_examples.py", "normalization.md": "test_normalization.py"}


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def shortened(code: str) -> str:
    return re.sub(r"\.learn\([\d_]+", ".learn(104", code).replace("n_eval_episodes=20", "n_eval_episodes=1")


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if snippets(page)]


def test_all_pages_are_run() -> None:
    for name, test in ELSEWHERE.items():
        assert ROOT / "docs" / name in PAGES and f'"{name}"' in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=lambda page: page.name)
def test_the_lines_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What some pages take as given
    names: dict[str, Any] = {"gymnasium": gym, "obs_tensor": th.randn(5, 3)}
    if page.name in ("mfpo.md", "multimodality.md"):
        names["model"] = MFPO("MlpPolicy", RandomEnv(), buffer_size=10)
    for code in snippets(page):
        exec(shortened(code), names)
        model = names.get("model")
        if ".learn(" in code and model is not None:
            assert model._n_updates > 0
    gym.registry.pop("Walk-v0", None)


@pytest.mark.nightly
def test_the_numbers_of_the_readme() -> None:
    """As printed there, or by another processor's rounding near it."""
    text = (ROOT / "README.md").read_text()
    printed = re.search(r"a mean of about (-\d+), with a standard deviation of (\d+)", text)
    assert printed is not None
    (code,) = snippets(ROOT / "README.md")
    names: dict[str, Any] = {}
    exec(code[: code.index("print(")], names)
    mean, _ = names["evaluate_policy"](names["model"], names["model"].get_env(), n_eval_episodes=20)
    assert abs(mean - float(printed[1])) < 2 * float(printed[2])


def test_som_takes_the_place_of_mfpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = snippets(ROOT / "README.md")
    names: dict[str, Any] = {}
    exec(shortened(code.replace("MFPO", "SOM")), names)
    assert isinstance(names["model"], SOM)


# The manual's commands: what they name is there


def commands(page: Path) -> list[list[str]]:
    """All that a page asks to type in a shell, in blocks and within sentences, without variables of the environment."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"`((?:OMP_NUM_THREADS=\d )?(?:python|make|pip) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    found = []
    for line in lines:
        words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=\S+", word)]
        if words and words[0] in ("python", "make", "pip"):
            found.append(words)
    return found


# The commands of benchmarks/README.md belong to the commits that it names
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if commands(page)], ids=lambda page: page.name)
def test_the_commands_of_a_page(page: Path) -> None:
    """Scripts, suites, targets and extras exist, and scripts know the options."""
    extras = set(metadata("sb3-mfpo").get_all("Provides-Extra") or [])
    makefile = (ROOT / "Makefile").read_text()
    zoo = [*Path(rl_zoo3.__file__).parent.rglob("*.py"), *(ROOT / "sb3_mfpo" / "zoo").glob("*.py")]
    modules = {"sb3_mfpo.zoo": zoo, "peers": [*zoo, ROOT / "benchmarks" / "peers" / "__main__.py"]}
    for program, *words in commands(page):
        print(program, *words)
        if program == "make":
            assert f"\n{words[0]}:" in makefile
        elif program == "pip":
            asked = ",".join(name for word in words for name in re.findall(r"\[(.*)\]", word))
            assert set(filter(None, asked.split(","))) <= extras
        elif words[0] != "-c" and words[:2] not in (["-m", "build"], ["-m", "pytest"]):
            module = words[1] if words[0] == "-m" else None
            if module == "sb3_mfpo.zoo":
                assert set(words[2:3]) <= set(COMMANDS)
            script = [path for path in (ROOT / words[0], ROOT / "benchmarks" / words[0]) if path.exists()]
            # Options of a suite's parts are in a file of their own
            sources = modules[module] if module else [*script, ROOT / "benchmarks" / "suite.py"]
            assert script or module, words[0]
            text = "".join(source.read_text() for source in sources)
            # Behind "-params" and "--env-kwargs" come settings
            options = [word for word in words[2:] if re.match(r"--?[a-z]", word)]
            assert [option for option in options if f'"{option}"' not in text] == []
            files = [word for word in words[1:] if re.search(r"\.yml$", word)]
            assert all((ROOT / name).exists() or (ROOT / "benchmarks" / name).exists() for name in files)
