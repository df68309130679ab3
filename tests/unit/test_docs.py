"""Each code block of the README and of docs/ is run, or checked, or preceded by a comment that says why it is not:

    <!-- not run: why -->             a block that nothing runs
    <!-- run with: ARGUMENTS -->      its training commands get these arguments besides, to be short
    <!-- dry run -->                  its commands are run with --dry-run, without torchrun
    <!-- overrides of: FILE -->       YAML: laid over this configuration
    <!-- checked by: FILE -->         another test, which names the page

Pages share one folder of generated data, in the order of PAGES.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks import report, results
from preprocess.config import PreprocessConfig
from preprocess.make_scenes import draw_scene
from shards.cli.config_file import load_config
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.support.object_storage import FaultyProxy
from tests.support.zygote import run_forked
from trainer.config import load_run_config

PAGES = ("your-data", "training", "evaluation", "weights", "export", "streaming", "resilience", "contributing",
         "format", "benchmarks", "index")
FILES = [*(REPOSITORY / "docs" / f"{name}.md" for name in PAGES),
         *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
MARK = re.compile(r"<!-- (not run(?: here)?|run with|dry run|overrides of|checked by)(?:: (.+))? -->")
PACKAGES = ("preprocess", "shards", "trainer", "tests", "configs", "benchmarks")


class Block(NamedTuple):
    """A fenced block and the comment before it."""

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    detail: str = ""

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = lines.index("```", number + 1)
            found = MARK.fullmatch(lines[number - 1]) if number else None
            mark, detail = (found[1], found[2] or "") if found else ("", "")
            yield Block(page, number + 1, lines[number][3:], "\n".join(lines[number + 1 : end]), mark, detail)
            number = end
        number += 1


BLOCKS = [block for page in FILES for block in blocks_of(page, page.read_text(encoding="utf-8"))]


def problem(block: Block) -> str | None:
    """Why nothing would run or check this block; None if something does."""
    reasons = {"not run": block.detail, "not run here": block.detail, "checked by": block.detail,
               "run with": block.language == "bash" and block.detail, "dry run": block.language == "bash",
               "overrides of": block.language == "yaml" and block.detail}
    if not reasons.get(block.mark, block.language in ("bash", "python")):
        return f"{block.where}: a block of {block.language or 'no language'} that is neither run nor says why not"
    return None


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_each_block_is_run_or_says_why_not(block: Block) -> None:
    assert problem(block) is None
    if block.mark == "checked by":
        assert block.page.name in (REPOSITORY / block.detail).read_text(encoding="utf-8")
    if block.mark == "overrides of":
        check_overrides(block)


def check_overrides(block: Block) -> None:
    """Raises ConfigError for an unknown key or an illegal value."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(block.text)
        file.flush()
        files = [REPOSITORY / block.detail, Path(file.name)]
        load_config(PreprocessConfig, files) if "shards" in block.detail else load_run_config(files, [])


@pytest.mark.parametrize("text", ["```bash\nls\n```", "```text\nx\n```", "<!-- not run -->\n```text\nx\n```",
                                  "<!-- dry run -->\n```yaml\na: 1\n```", "```yaml\nseed: 1\n```"])
def test_a_block_that_nothing_runs_is_noticed(text: str, tmp_path: Path) -> None:
    (block,) = blocks_of(tmp_path / "page.md", text)
    if block.language == "bash" and not block.mark:
        with pytest.raises(AssertionError, match="cannot run"):
            run_commands(block, tmp_path)
    else:
        assert problem(block) is not None


def test_a_misspelt_setting_is_noticed(tmp_path: Path) -> None:
    block = Block(tmp_path / "page.md", 1, "yaml", "train:\n  total_step: 3", "overrides of", "configs/demo.yaml")
    with pytest.raises(ConfigError, match="total_steps"):
        check_overrides(block)


# -- running -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """What the pages assume: the checkout's folders, a photo, ADE20K (two images per split)."""
    for name in ("configs", "preprocess", "trainer"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for number in range(2):
            image, label_map = draw_scene(rng)
            for folder, pixels, suffix in (("images", image, "jpg"), ("annotations", label_map + 1, "png")):
                path = tmp_path / "ADEChallengeData2016" / folder / split / f"ADE_{split}_{number:08d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    (tmp_path / "shards-ade20k").symlink_to(tmp_path / "shards-scenes")  # as if it had been made
    return tmp_path


@pytest.mark.slow
def test_what_the_pages_show_works(workspace: Path, s3: FaultyProxy) -> None:
    for block in BLOCKS:
        if block.mark in ("", "run with", "dry run"):
            if block.language == "bash":
                run_commands(block, workspace)
            else:
                script = workspace / "block.py"
                script.write_text(block.text, encoding="utf-8")
                finish(block, run_forked(script, cwd=workspace))
    assert len(list((workspace / "predictions").glob("*-overlay.png"))) == 4
    assert json.loads((workspace / "runs/scenes/evaluation/metrics.json").read_text())["mIoU"] > 0


def run_commands(block: Block, folder: Path) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            finish(block, run_forked(*command(block, words, folder), cwd=folder))


def command(block: Block, words: list[str], folder: Path) -> tuple[Path, *tuple[str, ...]]:
    """(program, arguments)"""
    if block.mark == "dry run":
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[script:], "--dry-run"]
    assert words[0] == "python" and len(words) > 2, f"{block.where}: cannot run {shlex.join(words)}"
    if words[1:3] == ["-m", "shards"]:
        words = ["python", "shards/__main__.py", *words[3:]]
    if block.mark == "run with" and words[1] == "trainer/train.py":
        words += shlex.split(block.detail)
    arguments: list[str] = []
    for word in words[2:]:
        arguments += sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]
    return REPOSITORY / words[1], *arguments


def finish(block: Block, process: subprocess.CompletedProcess[str]) -> None:
    if process.returncode:
        pytest.fail(f"{block.where}: {' '.join(process.args)} ended with {process.returncode}\n"
                    f"{process.stdout[-2000:]}\n{process.stderr[-2000:]}")


# -- what is written about the tree and the numbers --------------------------------------------------------------------


def test_the_tree_names_every_folder() -> None:
    """README.md lists exactly the folders that exist."""
    (tree,) = (block for block in BLOCKS if block.language == "tree")
    named = {line.split()[0].rstrip("/") for line in tree.text.splitlines()}
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=REPOSITORY, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    code = {str(Path(name).parent) for name in tracked.stdout.splitlines() if name.endswith((".py", ".yaml"))}
    assert named == (code - {"tests"}) | {"docs", "docker"}


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site generate them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_outside_of_the_site_lead_somewhere() -> None:
    for page in FILES:
        for target in re.findall(r"\]\(([^)#\s]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert "://" in target or not target or (page.parent / target).exists(), f"{page.name}: {target}"
        for target, anchor in re.findall(r"\]\(([^)#\s:]*\.md)#([^)]*)\)", page.read_text(encoding="utf-8")):
            assert anchor in anchors(page.parent / target), f"{page.name}: {target}#{anchor}"


def test_the_readme_is_short() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1300


def test_the_page_of_benchmarks_is_what_the_results_say() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_results(page, results.RESULTS) == page, "run python -m benchmarks.report"


def test_a_result_is_saved_with_what_it_depends_on_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [str(REPOSITORY / "benchmarks/codec.py"), "--data", str(REPOSITORY.parent / "data"),
                                     "--results", str(tmp_path), "--file", "/somewhere/else/x.pt"])
    result = results.Result("codec", tmp_path)
    table = result.table("A title", "name", "count", "seconds", "nothing")
    table.row("a", np.int64(1234), results.spread([3.0, 1.0, 2.0], 10), None)
    with pytest.raises(ValueError, match="a row of 1 cells"):
        table.row("b")
    result.note("A note.")
    saved = json.loads(result.save().read_text(encoding="utf-8"))
    assert saved["command"] == "python -m benchmarks.codec --data ../data --file DIR/x.pt"
    assert saved["tables"][0]["rows"] == [["a", 1234, {"median": 20, "low": 15, "high": 25, "count": 3}, None]]
    assert {"python", "numpy"} <= saved["versions"].keys() and saved["machine"]["cores"] >= 1
    assert str(REPOSITORY.parent) not in json.dumps(saved)
    shown = report.section("codec", "Mask layouts", tmp_path)
    assert "| a | 1,234 | 20 (15 to 25) |  |" in shown and "A note." in shown and saved["commit"] in shown
    assert "| a | 1,234 |" in capsys.readouterr().out
    assert "Not measured yet: `python -m benchmarks.loader" in report.section("loader", "Data loading", tmp_path)


def test_every_benchmark_is_on_the_page() -> None:
    programs = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")}
    assert programs - {"results", "report", "peers"} == report.SECTIONS.keys()


@pytest.mark.slow
def test_the_site_is_built_without_broken_links(tmp_path: Path) -> None:
    zensical = shutil.which("zensical", path=str(Path(sys.executable).parent))
    if zensical is None:
        pytest.skip("zensical is not installed (extra: docs)")
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copy(REPOSITORY / "zensical.toml", tmp_path)
    process = subprocess.run([zensical, "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    pages = list((tmp_path / "build/docs").glob("*.html"))
    assert len(pages) == len(PAGES) + 1  # and 404.html
    loaded = {url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"',
                                                          page.read_text(encoding="utf-8"))}
    assert not loaded, "a page loads files from other hosts"


def test_hooks_and_workflow_run_the_checks_of_make_lint() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert lint is not None
    wanted = [line.strip().replace("$(BIN)/", ".venv/bin/").removesuffix(" .") for line in lint[1].splitlines()]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == wanted
    assert {repo["repo"] for repo in hooks} == {"local"}, "no hook is downloaded"
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert ".ci/run" in [step.get("run") for step in workflow["jobs"]["check"]["steps"]]
