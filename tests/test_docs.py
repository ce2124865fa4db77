"""Every command, snippet, setting and link of README.md, CONTRIBUTING.md and docs/.

Really executed: only `kubectl … --help`. Executed with `--dry-run`, so that recipe, options and keys must be real but nothing
is read, started or written: every `i3cl …` and `python jobs/…` line, also behind `ray job submit … --`. Executed with `make
-n`: every make target. Looked up: options of `ray …` in Ray's own command line, files and markers of `pytest …`, imported names
of Python snippets, keys of settings in YAML. Lines with tools that need an account or other machines (aws, gcloud, helm,
docker, ssh, …) pass only when a line `Needs X.`, visible or in an HTML comment, stands right above their block: nobody has run
those.
"""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "cluster").rglob("*.md"),
        *(ROOT / "i3cl" / "weights").rglob("*.md"),
    ]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

# Recipes that stand in for files of the reader.
STAND_INS = {"my.yaml": "configs/realtext.yaml", "RECIPE.yaml": "configs/realtext.yaml", "FILE.yaml": "configs/realtext.yaml"}
STAND_INS["runs/search-select/best.yaml"] = "configs/realtext.yaml"
SHELL = {"export", "cd", "mkdir", "echo", "cat", "chmod", "umask", "unset", "cp", "tar", "test"}
SHELL |= {"grep", "sleep", "wait", "ulimit"}
OPTIONS = {"pip": {"-e", "-r", "--no-deps"}, "pip-audit": {"-r", "--no-deps", "--disable-pip"}, "tensorboard": {"--logdir"}}
OPTIONS["uv"] = OPTIONS["pip"]
OPTIONS["pre-commit"] = set()
"""Options of other tools that the pages use, looked up by hand."""
OUTSIDE = {"aws", "gcloud", "gsutil", "helm", "docker", "ssh", "scp", "rsync", "kubectl", "curl", "openssl", "git", "sudo"}
OUTSIDE |= {"systemctl", "iptables", "ufw", "mount", "apt-get", "podman", "kind"}
NEEDS = re.compile(r"<!-- Needs [^.]+\. -->")
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    """Number of the first line of its content, from 1."""
    language: str
    """Language of the fence; "" for an indented block."""
    text: str
    needs: bool
    """Whether a comment `<!-- Needs X. -->` stands right above it."""


def blocks(page: Path) -> list[Block]:
    """Fenced blocks, also inside list items, and blocks indented by four."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found, above, i = [], "", 0
    while i < len(lines):
        fence = re.match(r"( *)```(\w*)\s*$", lines[i])
        if fence:
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == "```")
            body = [line[len(fence[1]) :] for line in lines[i + 1 : end]]
            found.append(Block(page.name, i + 2, fence[2] or "?", "\n".join(body), bool(NEEDS.fullmatch(above))))
            i, above = end, ""
        elif lines[i].startswith("    ") and lines[i].strip() and (i == 0 or not lines[i - 1].strip()):
            end = i
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            body = [line[4:] for line in lines[i:end]]
            found.append(Block(page.name, i + 1, "", "\n".join(body).strip("\n"), bool(NEEDS.fullmatch(above))))
            i, above = end - 1, ""
        elif lines[i].strip():
            above = lines[i].strip()
        i += 1
    return found


def commands(page: Path) -> list[tuple[str, bool]]:
    """The command lines of a page, also in running text, continued ones joined, each with whether a marker is above it."""
    found = []
    for block in blocks(page):
        if block.language not in ("", "?", "sh", "bash", "console"):
            continue
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            line = line.removeprefix("$ ").strip()
            if tool(line):
                found.append((line, block.needs))
            elif block.language in ("sh", "bash", "console") and line and not line.startswith("#"):
                raise AssertionError(f"{page.name}: {line!r}: an unknown command; teach tests/test_docs.py to check it")
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    for span in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", "\n".join(x for x in text.splitlines() if x[:4] != "    ")):
        span = " ".join(span.split())
        if tool(span) in ("python", "make", "ray", "jobs", "i3cl") and len(span.split()) > 1:
            found.append((span, False))
    return found


def tool(line: str) -> str:
    """What a line calls: python, make, ray, i3cl, pip, a shell word or an outside tool; "" when it is not a command."""
    words = line.split()
    while words and ASSIGNMENT.match(words[0]):
        words = words[1:]
    if not words:
        return ""
    word = words[0].removeprefix(".venv/bin/").removeprefix("timeout ")
    if word in ("python", "python3"):
        return "python"
    if re.fullmatch(r"jobs/\w+\.py", word):
        return "jobs"
    return word if word in {"make", "ray", "i3cl", *OPTIONS} | SHELL | OUTSIDE else ""


def split(line: str) -> list[list[str]]:
    """The commands of a line (behind &&, ||, | and &), split into words as a shell does it.

    Comments, redirections and assignments before a command are left out. [OPTIONAL] and A|B count as their first choice.
    """
    line = re.sub(r"\[(--[^\]]+)\]", lambda part: part[1].split("|")[0], line).replace("…", " ")
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>;&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    found: list[list[str]] = [[]]
    target = False
    for word in lexer:
        if set(word) <= set("|;&"):
            found.append([])
        elif set(word) <= set("<>"):
            target = True
        elif target:
            target = False
        elif found[-1] or not ASSIGNMENT.match(word):
            found[-1].append(word.removeprefix(".venv/bin/"))
    return [words for words in found if words]


def check(line: str, needs: bool, monkeypatch) -> None:
    """AssertionError with the reason when the line is not one that works."""
    for words in split(line):
        check_words(words, needs, monkeypatch)


def check_words(words: list[str], needs: bool, monkeypatch) -> None:
    name = words[0]
    if name == "export":
        assert all(ASSIGNMENT.match(word) or word.isidentifier() for word in words[1:]), words
    elif name in ("python", "python3") and words[1:2] == ["-m"]:
        assert words[2:], "names no module"
        if words[2] == "pytest":
            check_pytest(words[3:])
    elif name in ("python", "python3") and words[1:2] == ["-c"]:
        compile(words[2], "-c", "exec")
    elif name in ("python", "python3") or name.startswith("jobs/"):
        dry_run(words if name.startswith("jobs/") else words[1:], monkeypatch)
    elif name == "i3cl":
        dry_run(words, monkeypatch)
    elif name == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif name == "ray":
        if "--" in words:
            rest = words[words.index("--") + 1 :]
            words = words[: words.index("--")]
            if rest:
                check_words(rest, needs, monkeypatch)
        check_ray(words[1:])
    elif name in OPTIONS:
        assert {word for word in words[1:] if word.startswith("-")} <= OPTIONS[name], words
    elif name == "kubectl" and shutil.which("kubectl"):
        assert needs, "kubectl: put a line `<!-- Needs Kubernetes. -->` above the block"
        check_kubectl(words[1:])
    elif name in OUTSIDE:
        assert needs, f"{name}: nobody can run it here; put a line such as `<!-- Needs AWS. -->` above the block"


def dry_run(words: list[str], monkeypatch) -> None:
    script, arguments = words[0], words[1:]
    if "NAME.py" in script or "COMMAND" in arguments[:1]:  # any command
        return
    if script == "i3cl":
        from i3cl.cli.__main__ import COMMANDS

        if not arguments or arguments[0] in ("--help", "--version"):
            return
        assert arguments[0] in COMMANDS, f"i3cl has no command {arguments[0]}"
        script, arguments = f"i3cl {arguments[0]}", arguments[1:]
    else:
        assert (ROOT / script).is_file(), f"no such file {script}"
        if not script.startswith("jobs/"):
            return
    name = Path(script.removeprefix("i3cl ")).stem
    if name == "benchmark":  # has no dry run
        arguments = [*arguments[:1], "--help"]
    elif "--help" not in arguments:
        arguments = [*(STAND_INS.get(word, word) for word in arguments), "--dry-run"]
    if arguments[:2] == ["import", "NAME"]:
        arguments[1] = "art"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        if script.startswith("i3cl "):
            importlib.import_module(f"i3cl.cli.{name.replace('-', '_')}").main()
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), f"ended with status {end.code}"


def check_pytest(words: list[str]) -> None:
    markers = re.findall(r'"(\w+): ', (ROOT / "pyproject.toml").read_text())
    for before, word in zip(["", *words], words):
        if before == "-m":
            assert set(re.findall(r"\w+", word)) - {"not", "and", "or"} <= set(markers), word
        elif before != "-k" and not word.startswith("-"):
            assert (ROOT / word.split("::")[0]).exists(), f"no such test file {word}"


def check_ray(words: list[str]) -> None:
    import click
    from ray.scripts.scripts import cli

    command: click.Command = cli
    while isinstance(command, click.Group) and words:
        known = {**command.commands, "job": job_group()} if command is cli else command.commands
        assert words[0] in known, f"ray has no command {words[0]!r}"
        command, words = known[words[0]], words[1:]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("-") and len(word) > 1:
            assert word.split("=")[0] in options | {"--help"}, f"ray {command.name} has no option {word}"


@cache
def job_group():
    from ray.dashboard.modules.job.cli import job_cli_group

    return job_cli_group


@cache
def kubectl_help(*command: str) -> str:
    return subprocess.run(["kubectl", *command, "--help"], capture_output=True, text=True).stdout


def check_kubectl(words: list[str]) -> None:
    if "--" in words:
        words = words[: words.index("--")]
    if words[:1] == ["-n"]:
        words = [*words[2:], *words[:2]]
    depth = {"create": 3 if words[1:2] == ["secret"] else 2, "rollout": 2, "config": 2, "set": 2}.get(words[0], 1)
    command = [word for word in words[:depth] if not word.startswith("-")]
    text = kubectl_help(*command) + subprocess.run(["kubectl", "options"], capture_output=True, text=True).stdout
    assert command and "Usage:" in text, f"kubectl has no command {command}"
    for word in words[depth:]:
        if word.startswith("-") and len(word) > 1:
            assert re.search(rf"(?<![\w-]){re.escape(word.split('=')[0])}(?![\w-])", text), f"kubectl {command[0]}: no {word}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands(page, monkeypatch, capsys):
    wrong = []
    for line, needs in commands(page):
        try:
            check(line, needs, monkeypatch)
        except AssertionError as error:
            said = capsys.readouterr().err.strip().splitlines()
            wrong.append(f"{line}\n    {str(error).splitlines()[0]}  {said[-1] if said else ''}")
    assert not wrong, "\n".join([f"{page.name}:", *wrong])


def test_the_pages_do_hold_commands():
    assert len(commands(ROOT / "README.md")) > 3
    assert sum(len(commands(page)) for page in PAGES) > 50


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("python jobs/train.py --config configs/r50/mixtrain.yaml train.lerning_rate=1", False),
        ("python jobs/train.py --config configs/none.yaml", False),
        ("python jobs/nothing.py", False),
        ("python jobs/prepare.py split --sauce a.json --out b", False),
        ("ray job submit --workingdir . -- python jobs/train.py", False),
        ("ray job submit --working-dir . -- python jobs/train.py train.step=3", False),
        ("ray jobs submit", False),
        ("i3cl trian --config quickstart", False),
        ("i3cl train --config quikstart", False),
        ("i3cl train --config quickstart train.stepz=3", False),
        ("make nothing", False),
        ("python -m pytest -m fast", False),
        ("aws s3 ls", False),
    ],
)
def test_a_wrong_command_is_found(line, needs, monkeypatch):
    with pytest.raises(AssertionError):
        check(line, needs, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_snippets_compile_and_their_names_exist(page):
    for block in blocks(page):
        if not re.match(r"(import|from) \w", block.text) and block.language != "python":
            continue
        modules = {}
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
                    modules[alias.asname or alias.name] = getattr(module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    modules[alias.asname or alias.name] = importlib.import_module(alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert hasattr(modules[node.value.id], node.attr), f"{page.name}:{block.line}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_settings_in_yaml_are_real(page, tmp_path):
    from i3cl.config import Settings, load_settings

    for block in blocks(page):
        if block.language not in ("", "?", "yaml"):
            continue
        try:
            tree = yaml.safe_load(block.text)
        except yaml.YAMLError:
            assert block.language != "yaml", f"{page.name}:{block.line}: not YAML"
            continue
        if isinstance(tree, dict) and tree.keys() <= {*Settings.model_fields, "extends"}:
            (tmp_path / "block.yaml").write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "extends"}))
            load_settings(tmp_path / "block.yaml")


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}: no such file"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_of_the_repository_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:i3cl|jobs|configs|cluster|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists() or "NAME" in path, f"{page.name}: {path}: no such file"
