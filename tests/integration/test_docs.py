"""What the documentation shows exists: files that it links, commands and options that it types."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from latency_tables.schema import load_table
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


# What the tools write, by their sources: trtexec's --exportTimes (sampleReporting.cpp, TensorRT 10 and 11), and the
# result file of onnxruntime_perf_test (performance_runner.cc) with the statistics that its option -s adds.
TRTEXEC = """[
  { "startEnqMs" : 1.0, "endEnqMs" : 1.1, "startH2dMs" : 1.1, "endH2dMs" : 1.1, "startComputeMs" : 1.1
, "endComputeMs" : 1.35, "startD2hMs" : 1.4, "endD2hMs" : 1.4, "h2dMs" : 0, "computeMs" : 0.25, "d2hMs" : 0
, "latencyMs" : 0.25 }
, { "computeMs" : 0.5, "latencyMs" : 0.5 }
, { "computeMs" : 1.25, "latencyMs" : 1.25 }
]
"""
PERF_TEST = """parts,0.0005,21790720,97,0
parts,0.00125,21790720,97,1
parts,0.00025,21790720,97,2

Min Latency: 0.00025 s
P50 Latency: 0.0005 s
"""


@pytest.mark.parametrize(("suffix", "written"), [("json", TRTEXEC), ("txt", PERF_TEST)])
def test_the_python_that_fills_a_table_in_reads_what_the_tools_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "entries.csv").write_text(
        "entry,tokens_in,tokens_out,batch_size,median_ms,iqr_ms,samples\n"
        "attention,197,197,1,,,\nmlp,197,197,1,,,\nblock.evit.fuse,197,139,1,,,\n"
    )
    for part in ("attention-197-197", "mlp-197-197", "block.evit.fuse-197-139"):
        (parts / f"{part}.{suffix}").write_text(written)
    page = (ROOT / "docs" / "how-to-build-a-table.md").read_text()
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S) if "csv" in block]

    exec(compile(code, "how-to-build-a-table.md", "exec"), {})

    line = "import parts/entries.csv --model deit_small_patch16_224 --device-name x --runtime tensorrt --out table.json"
    assert run(["table", *line.split()]) == 0
    table = load_table(tmp_path / "table.json")
    # Quartiles of 0.25, 0.5 and 1.25 ms.
    assert {(entry.median_ms, entry.iqr_ms, entry.samples) for entry in table.entries} == {(0.5, 1.0, 3)}
    assert len(table.entries) == 3


def test_fields_that_the_migration_page_sets_are_the_recipes() -> None:
    from prunefront.training.recipes import RECIPES, _fields

    page = (ROOT / "docs" / "migration.md").read_text()
    code = [span for span in re.findall(r"`([^`]+)`", page) if "--set " in span or re.fullmatch(r"[a-z_.]+=", span)]
    named = {name for span in code for name in re.findall(r"([a-z_.]+)=", span.partition("--set ")[2] or span)}
    recipes = set(re.findall(r"--recipe ([\w-]+)", page))

    assert len(named) > 15
    assert named <= set(_fields(RECIPES["default"].__class__))
    assert recipes <= set(RECIPES)
