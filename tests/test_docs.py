"""README.md and docs/: python blocks run, commands and their flags exist, links and code references lead somewhere.

The python blocks of a page run in order in one namespace, in an empty folder. A block is left out only by a comment in the
line before it that says why, such as `<!-- not run: needs a CUDA device -->`.
"""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from fxprune.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\[[^\]]+\]\((?!https?:|mailto:)([^)#\s]*)(#[^)\s]*)?\)")
REFERENCE = re.compile(r"`(?P<file>fxprune/[\w/]+)\.py(?::(?P<name>[\w.]+))?`")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str) -> list[re.Match[str]]:
    return [match for match in FENCE.finditer(page.read_text(encoding="utf-8")) if match["language"] == language]


def commands() -> dict[str, Any]:
    group = typer.main.get_command(app)
    return dict(group.commands)  # type: ignore[attr-defined]


def command_lines(page: Path) -> list[list[str]]:
    """Every line of a shell block that calls fxprune, continued lines joined, comments removed."""
    text = "\n".join(match["code"] for match in blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "fxprune"]


@pages
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    threads = torch.get_num_threads()
    try:
        for match in blocks(page, "python"):
            if match["reason"] is None:
                line = text[: match.start("code")].count("\n")
                # So many empty lines that a traceback shows the page's line.
                code = compile("\n" * line + match["code"], str(page), "exec", dont_inherit=True)
                exec(code, namespace)
    finally:
        torch.set_num_threads(threads)


@pages
def test_commands_and_flags_exist(page: Path) -> None:
    known = commands()
    for name, *words in command_lines(page):
        assert name in known, f"fxprune {name} is no command"
        flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            flag = word.partition("=")[0]
            assert not flag.startswith("--") or flag in {*flags, "--help"}, f"fxprune {name} has no {flag}"


@pages
def test_links_lead_to_files(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target, _ in LINK.findall(prose):
        assert not target or (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pages
def test_code_references_exist(page: Path) -> None:
    for match in REFERENCE.finditer(page.read_text(encoding="utf-8")):
        assert (ROOT / f"{match['file']}.py").is_file(), f"there is no {match['file']}.py"
        found: object = importlib.import_module(match["file"].removesuffix("/__init__").replace("/", "."))
        for part in (match["name"] or "").split(".") if match["name"] else ():
            assert hasattr(found, part), f"{match[0]}: no {part} there"
            found = getattr(found, part)


def test_every_page_is_in_the_site_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES[2:]:
        assert page.relative_to(ROOT / "docs").as_posix() in menu, f"{page.name} is not in mkdocs.yml"


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install 'fxprune[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "algorithm" / "index.html").is_file()


def test_the_checks_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nassert False\n```\n<!-- not run: a reason -->\n```python\nraise ValueError\n```\n"
        "```sh\nfxprune train --no-such-flag 3 \\\n    --epochs 2  # why\nls\n```\n[a](missing.md)\n",
        encoding="utf-8",
    )
    assert [match["reason"] for match in blocks(page, "python")] == [None, "a reason"]
    assert command_lines(page) == [["train", "--no-such-flag", "3", "--epochs", "2"]]
    with pytest.raises(AssertionError, match="no --no-such-flag"):
        test_commands_and_flags_exist(page)
    with pytest.raises(AssertionError, match=r"links to missing\.md"):
        test_links_lead_to_files(page)
