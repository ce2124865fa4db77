"""The command `i3cl`: its map, its messages, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from i3cl.cli import command_line
from i3cl.cli.__main__ import COMMANDS, page

ROOT = Path(__file__).parents[2]


def i3cl(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "i3cl.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **changes},
    )


def test_every_command_is_on_the_map_and_has_a_job():
    shared = {"__init__", "__main__", "command_line"}
    assert {path.stem for path in (ROOT / "i3cl" / "cli").glob("*.py")} - shared == {name.replace("-", "_") for name in COMMANDS}
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} <= set(COMMANDS)
    assert all(name in page() for name in COMMANDS)


def test_the_map_is_printed_without_loading_torch_or_ray():
    code = "import sys; sys.argv = ['i3cl', '--help']; from i3cl.cli.__main__ import main; main()"
    check = "; sys.exit(any(name in sys.modules for name in ('torch', 'ray', 'numpy', 'pydantic')))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == page()


def test_version():
    from i3cl import __version__

    assert i3cl("--version").stdout == f"i3cl {__version__}\n"


def test_version_is_the_one_of_the_package():
    import tomllib

    from i3cl import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["i3cl: ", "'trian'", "did you mean train?"]),
        (["zzz"], ["i3cl: ", "'zzz'", "i3cl --help"]),
        (["prepare", "splitt"], ["i3cl prepare: ", "did you mean split?"]),
        (["label", "slect"], ["i3cl label: ", "did you mean select?"]),
        (["benchmark", "stp"], ["i3cl benchmark: ", "did you mean step?"]),
        (["train", "--confg=x"], ["i3cl train: ", "did you mean --config?"]),
        (["train", "--config", "quikstart"], ["i3cl train: ", "did you mean quickstart?"]),
        (["train", "train.lerning_rate=1"], ["i3cl train: ", "train.learning_rate?"]),
        (["prepare", "split"], ["i3cl prepare split: ", "--source"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_nearest(arguments, words):
    done = i3cl(*arguments)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert all(word in done.stderr for word in words), done.stderr


def test_a_job_is_called_by_its_file_in_messages():
    done = subprocess.run([sys.executable, "jobs/train.py", "train.stepz=1"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.startswith("train.py: ")


def test_the_command_and_the_job_print_the_same():
    job = [sys.executable, "jobs/train.py", "--config", "configs/quickstart.yaml", "--dry-run"]
    assert (
        i3cl("train", "--config", "quickstart", "--dry-run").stdout
        == subprocess.run(job, capture_output=True, text=True, cwd=ROOT).stdout
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--dry-run"], ["prepare", "--help"]])
def test_a_closed_stdout_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen([sys.executable, "-m", "i3cl.cli", *arguments], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert process.communicate()[1] == b""
    assert process.returncode in (0, 141)  # 0: argparse itself passes over it when it prints help


def test_a_process_without_stdout():
    command = f'"{sys.executable}" -m i3cl.cli train --dry-run >&-'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from i3cl.cli.command_line import run
run(lambda settings, options: os.kill(os.getpid(), signal.{signal}), "", argv=[], prog="x", resumes={resumes})
"""


@pytest.mark.parametrize(
    ("signal_name", "resumes", "words"),
    [("SIGINT", True, "continues where it stopped"), ("SIGTERM", False, "starts from the beginning")],
)
def test_the_interrupted_message_is_true(signal_name, resumes, words):
    code = INTERRUPTED.format(signal=signal_name, resumes=resumes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130
    assert done.stderr == f"x: interrupted; the same command {words}\n"


def test_a_broken_connection_is_not_taken_for_a_closed_stdout(capsys):
    with pytest.raises(BrokenPipeError), command_line.streams():
        raise BrokenPipeError("a socket of Ray")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("i3cl tra", {"train"}),
        ("i3cl train --dry", {"--dry-run"}),
        ("i3cl train --config quicks", {"quickstart"}),
        ("i3cl train train.learn", {"train.learning_rate="}),
        ("i3cl label sel", {"select"}),
        ("i3cl prepare spl", {"split"}),
        ("i3cl prepare split --fra", {"--fractions"}),
        ("i3cl benchmark fus", {"fusion"}),
    ],
)
def test_completion(line, expected, tmp_path):
    pytest.importorskip("argcomplete", reason="needs the package argcomplete")
    out = tmp_path / "completions"
    changes = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    i3cl(**changes, _ARGCOMPLETE_IFS="\v")
    assert {word.strip() for word in out.read_text().split("\v")} == expected
