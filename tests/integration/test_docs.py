"""What the documentation shows exists: files that it links, commands and options that it types."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from prunefront.cli.app import app, run

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def command_lines() -> Iterator[tuple[str, str]]:
    """Every ``prunefront`` line of a code block, with the page it stands on; continued lines are joined."""
    for page in PAGES:
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = line.strip().removeprefix("$ ")
                if text.startswith("prunefront ") and "..." not in text:
                    yield str(page.relative_to(ROOT)), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text())

    assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_a_command_that_is_shown_can_be_typed(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    node: Any = get_command(app)
    while hasattr(node, "commands") and words and not words[0].startswith("-"):
        assert words[0] in node.commands, f"{page}: {line}"
        node = node.commands[words.pop(0)]
    known = {option for parameter in node.params for option in (*parameter.opts, *parameter.secondary_opts)}
    typed = {word.partition("=")[0] for word in words if word.startswith("-") and not word[1:2].isdigit()}

    if node.context_settings.get("ignore_unknown_options"):
        from prunefront.cli.spellings import SPELLINGS

        known |= {f"--{name}" for name in SPELLINGS}
    assert typed <= known | {"--help", "-h"}, f"{page}: {line}"


def test_every_problem_of_the_api_is_explained() -> None:
    from service.problems import ERROR_STATUS

    explained = (ROOT / "docs" / "rest-api.md").read_text()

    assert [code for _, _, code in ERROR_STATUS if f"`{code}`" not in explained] == []


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    new = "config new --model digit_vit_patch6_48 --method evit --at 1,3 --op fuse --keep-ratio 0.5 --out best.json"
    assert run(new.split()) == 0
    names: dict[str, Any] = {}

    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)

    assert names["model"].prune_config == names["config"]


def test_fields_that_the_migration_page_sets_are_the_recipes() -> None:
    from prunefront.training.recipes import RECIPES, _fields

    page = (ROOT / "docs" / "migration.md").read_text()
    code = [span for span in re.findall(r"`([^`]+)`", page) if "--set " in span or re.fullmatch(r"[a-z_.]+=", span)]
    named = {name for span in code for name in re.findall(r"([a-z_.]+)=", span.partition("--set ")[2] or span)}
    recipes = set(re.findall(r"--recipe ([\w-]+)", page))

    assert len(named) > 15
    assert named <= set(_fields(RECIPES["default"].__class__))
    assert recipes <= set(RECIPES)
