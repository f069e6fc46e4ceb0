"""The manual: every page's lines of Python are run, in order, with fewer steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch as th

from sb3_mfpo import MFPO, SOM
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
