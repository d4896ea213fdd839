"""What the README and the documentation name exists: commands, options, code and links."""

import ast
import importlib
import importlib.util
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = {"docs/results.md", "docs/changelog.md"}
"""Links to files that stand elsewhere."""
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted(p for p in (ROOT / "docs").rglob("*.md") if str(p.relative_to(ROOT)) not in LINKED),
]
OF_OTHERS = {"--nproc-per-node"}
"""Options of other programs."""

spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs/_build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
COMMANDS = dict(build.commands(build.application()))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, *languages):
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    return [text for language, text in found if language in languages]


def without_blocks(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)


def options(command):
    return {name for one in command.params for name in [*one.opts, *one.secondary_opts]} | {
        "--help"
    }


def command_lines(page):
    """Words of every call of this command line in a page, in code blocks and in running text."""
    for text in blocks(page, "sh", "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            yield from calls(line)
    for code in re.findall(r"`([^`\n]+)`", without_blocks(page)):
        yield from calls(code)


def calls(line):
    start = re.search(r"(?:^|\s)(?:maira-sae|-m maira_sae)\s+(?=[a-z])", line)
    if start:
        words = shlex.split(line[start.end() :], comments=True)
        yield [word for word in words if word != "…"]


def command_of(words):
    """The command that words begin with, and the rest of them."""
    for n in (2, 1):
        name = " ".join(["maira-sae", *words[:n]])
        if name in COMMANDS:
            return COMMANDS[name], words[n:]
    raise AssertionError(f"there is no command maira-sae {' '.join(words[:2])}")


def test_the_parser_sees_what_is_there():
    """It would otherwise pass by finding nothing."""
    readme = [" ".join(words) for words in command_lines(ROOT / "README.md")]
    assert len(readme) >= 15
    assert any(line.startswith("bench absorption") for line in readme)
    with pytest.raises(AssertionError, match="no command maira-sae harvst"):
        command_of(["harvst", "--out"])
    assert "--no-text" in options(COMMANDS["maira-sae dashboard"])
    assert "--outt" not in options(COMMANDS["maira-sae dashboard"])


@pages
def test_every_command_and_its_options_exist(page):
    for words in command_lines(page):
        if words == ["bench"]:
            continue
        command, rest = command_of(words)
        named = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert named <= options(command), f"{page}: {' '.join(words)}"


@pages
def test_every_option_in_running_text_exists(page):
    known = set().union(*map(options, COMMANDS.values())) | OF_OTHERS
    named = re.findall(r"`(--[a-z][a-z-]+)", without_blocks(page))
    of_modules = re.findall(r"`python -m (?!maira_sae)[^`]+`", without_blocks(page))
    elsewhere = set(re.findall(r"--[a-z-]+", " ".join(of_modules)))
    assert set(named) - elsewhere <= known, page


@pages
def test_python_compiles_and_its_imports_resolve(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)


def anchors(page):
    """Addresses of headings, as both GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(page), re.M):
        text = re.sub(r"[^\w\s-]", "", heading.lower())
        found.add(re.sub(r"\s+", "-", text.strip()))
    return found


@pages
def test_every_relative_link_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{page} links to {target}"


@pages
def test_every_file_named_exists(page):
    for name in re.findall(r"`((?:tests|benchmarks|docs|notebooks)/[\w./*-]+)`", page.read_text()):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page} names {name}"


def test_the_reference_has_every_command_and_module():
    text = build.command_reference()
    for name, command in COMMANDS.items():
        assert f"## {name}\n" in text
        for option in options(command) - {"--help"}:
            assert f"`{option}`" in text or not option.startswith("--")
    assert {"hooks", "hooks.readers.mimic", "hooks.store"} <= set(build.modules("hooks"))
    for package in build.PACKAGES:
        for name in build.modules(package):
            assert ast.get_docstring(ast.parse(source_of(name).read_text())), name


def source_of(module):
    path = ROOT / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> "$LOG"
case "$*" in
  *train*) trap 'echo saved >> "$LOG"; exit 1' TERM; touch "$READY"; sleep 60 & wait ;;
esac
"""


def test_the_cluster_script_saves_and_comes_back(tmp_path):
    """With programs in the place of torchrun and scontrol."""
    (script,) = blocks(ROOT / "docs/recipes.md", "bash")
    (tmp_path / "job.sh").write_text(script)
    for name in ("torchrun", "maira-sae", "scontrol"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    log, ready = tmp_path / "log", tmp_path / "ready"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(log), "READY": str(ready)}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment)
    until = time.monotonic() + 20
    while not ready.exists() and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)  # the shell alone, as --signal=B: sends it
    assert job.wait(20) == 0
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["torchrun", "torchrun", "saved", "scontrol"]
    assert lines[-1] == "scontrol requeue 7"
