"""Who gets in, and what comes in: tokens and listening ports of real Rays, and files that would run code if they were trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
import torch
import yaml

import i3cl
from cluster.nodes import descendants
from i3cl.config import load_settings, to_yaml, with_overrides
from i3cl.errors import UserError
from i3cl.model.checkpoint import load_weights
from i3cl.model.convert import convert_original
from i3cl.model.network import I3CL

ROOT = Path(__file__).parents[2]
_JOB = """
from i3cl.cli.command_line import run
from i3cl.runtime.cluster import connect
run(lambda settings, options: connect(), 'joins')
"""


def status_of(address: str, token: str | None) -> int:
    """HTTP status of a GET, with the token as Ray's own clients send it."""
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def join(laptop, code: str = _JOB, timeout: float = 120, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A driver without a token unless `environment` has one; how it ended and after how many seconds."""
    keep = {k: v for k, v in laptop.environment.items() if not k.startswith("RAY_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**keep, **environment}, capture_output=True, text=True, timeout=timeout
    )
    return done, time.monotonic() - began


@pytest.mark.parametrize(
    ("token", "words"), [(None, ["Unauthorized", "401"]), ("0" * 64, ["Forbidden", "403", "invalid"])], ids=["none", "wrong"]
)
def test_a_submission_without_the_token_is_refused_and_runs_nothing(laptop, cluster, tmp_path, token, words):
    environment = {k: v for k, v in laptop.environment.items() if not k.startswith("RAY_AUTH")}
    if token:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    thief = replace(laptop, environment=environment)
    ran = tmp_path / "ran"
    done = thief.submit("-c", f"open({str(ran)!r}, 'w')", options=("--submission-id", f"thief-{bool(token)}"))
    assert done.returncode != 0 and any(word in done.stdout + done.stderr for word in words), done.stdout + done.stderr
    assert status_of(f"{cluster.dashboard}/api/jobs/thief-{bool(token)}", cluster.token.read_text()) == 404
    assert not ran.exists()


def test_the_data_behind_the_dashboard_wants_the_token(cluster):
    for path in ("/api/jobs/", "/nodes?view=summary", "/logical/actors", "/api/v0/tasks", "/api/cluster_status"):
        assert status_of(cluster.dashboard + path, None) == 401, path
        assert status_of(cluster.dashboard + path, "0" * 64) == 403, path
        assert status_of(cluster.dashboard + path, cluster.token.read_text()) == 200, path


@pytest.mark.parametrize(
    "environment",
    [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}],
    ids=["none", "no token", "wrong"],
)
def test_a_job_that_joins_without_the_token_ends_soon_with_one_line(laptop, cluster, environment):
    done, seconds = join(laptop, RAY_ADDRESS=cluster.address, **environment)
    assert done.returncode == 2 and seconds < 20, (done, seconds)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "token" in lines[0] and "export RAY_AUTH_MODE=token" in lines[0]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "no cluster answers there"),
        ("no-such-host.invalid:6379", "no cluster answers there"),
        ("http://127.0.0.1:8265", "ray job submit --address"),
        ("127.0.0.1", "is not host:port"),
    ],
)
def test_a_wrong_address_ends_soon_with_one_line(laptop, address, words):
    done, seconds = join(laptop, RAY_ADDRESS=address)
    assert done.returncode == 2 and seconds < 30, (done, seconds)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and words in lines[0] and f"RAY_ADDRESS={address}" in lines[0]


@pytest.mark.slow
def test_ray_itself_refuses_a_driver_without_the_token(laptop, cluster):
    done, _ = join(laptop, "import ray; ray.init(); print(ray.cluster_resources())", RAY_ADDRESS=cluster.address)
    assert done.returncode != 0 and "InvalidAuthToken" in done.stderr and "CPU" not in done.stdout


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """(address, port) of all that these processes listen on, as Linux tells it."""
    sockets = set()
    for pid in pids:
        with suppress(FileNotFoundError, PermissionError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                ip = ip_address(b"".join(words))
                found.add((str(getattr(ip, "ipv4_mapped", None) or ip), int(port, 16)))
    return found


def test_the_dashboard_listens_on_the_loopback_only(cluster):
    head = cluster.nodes[0].process.pid
    found = listening([head, *descendants(head)])
    assert len(found) > 5
    assert {address for address, port in found if port == cluster.dashboard_port} == {"127.0.0.1"}, found


_LOCAL = """
import json, os
from pathlib import Path
os.environ["AWS_SECRET_ACCESS_KEY"] = "of the laptop"
from cluster.nodes import descendants
from i3cl.runtime.cluster import connect
connect()
import ray
secret = ray.remote(lambda: os.environ.get("AWS_SECRET_ACCESS_KEY"))
print(json.dumps({
    "pids": [os.getpid(), *descendants(os.getpid())], "mode": os.environ.get("RAY_AUTH_MODE"),
    "secret": ray.get(secret.remote()), "shown": str(ray.get_runtime_context().runtime_env),
}), flush=True)
input()
"""


def test_a_local_ray_is_closed_to_the_network_and_its_workers_inherit_the_environment(laptop):
    environment = {k: v for k, v in laptop.environment.items() if not k.startswith("RAY_")}
    started = subprocess.Popen(
        [sys.executable, "-c", _LOCAL], cwd=ROOT, env={**environment, "RAY_ADDRESS": "local"}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout and started.stdin
    try:
        line = started.stdout.readline()
        assert line.startswith("{"), (line, started.stderr)
        told = json.loads(line)
        found = listening(told["pids"])
    finally:
        started.communicate("\n", timeout=60)
    assert len(found) > 5 and {address for address, _ in found} == {"127.0.0.1"}, found
    assert told["mode"] == "token"
    assert told["secret"] == "of the laptop" and "AWS" not in told["shown"]


# ----------------------------------------------------------------------------------------------- files that would run code


@pytest.fixture
def trap(tmp_path) -> tuple[Path, Path]:
    """A weights file that makes a file when it is unpickled, and that file."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.system, (f"touch {sprung}",))

    torch.save({"state_dict": {"a": torch.zeros(1)}, "step": Trap()}, tmp_path / "trap.pth")
    return tmp_path / "trap.pth", sprung


def trapped_checkpoint(tiny_settings, folder: Path, weights: Path) -> Path:
    """A checkpoint directory whose weights are the trap under the name of a safetensors file."""
    folder.mkdir()
    (folder / "settings.yaml").write_text(to_yaml(tiny_settings))
    (folder / "weights.safetensors").write_bytes(weights.read_bytes())
    return folder


def test_weights_from_elsewhere_run_no_code(trap, tiny_settings, tmp_path):
    """train.start_from, model.backbone.weights, prepare.py convert, and i3cl.load, which predict.py and label.py use."""
    weights, sprung = trap
    from_backbone = with_overrides(tiny_settings, {"model.backbone.weights": str(weights)}, "test")
    checkpoint = trapped_checkpoint(tiny_settings, tmp_path / "checkpoint", weights)
    model = I3CL(with_overrides(tiny_settings, {"model.backbone.weights": "none"}, "test").model)
    for load in (
        lambda: load_weights(model, weights),
        lambda: load_weights(model, checkpoint),
        lambda: I3CL(from_backbone.model),
        lambda: convert_original(str(weights), str(tmp_path / "converted"), None),
        lambda: i3cl.load(str(checkpoint)),
    ):
        with pytest.raises(UserError, match=r"trap\.pth|weights\.safetensors") as caught:
            load()
        assert "\n" not in str(caught.value)
    assert not sprung.exists() and not (tmp_path / "converted").exists()


def test_a_member_that_is_no_safetensors_is_told_before_actors_start(trap, tiny_settings, tiny_checkpoints, tmp_path):
    from i3cl.members.ours import checkpoint_hash

    weights, sprung = trap
    with pytest.raises(UserError, match=r"weights\.safetensors: not a readable safetensors file; give") as caught:
        checkpoint_hash(str(trapped_checkpoint(tiny_settings, tmp_path / "checkpoint", weights)))
    assert "\n" not in str(caught.value) and not sprung.exists()
    assert len(checkpoint_hash(tiny_checkpoints["a"])) == 64


def test_a_state_of_training_runs_no_code(trap, tiny_settings, tmp_path):
    from i3cl.training.loop import STATE, Trainer

    weights, sprung = trap
    model = I3CL(with_overrides(tiny_settings, {"model.backbone.weights": "none"}, "test").model)
    trainer = Trainer(tiny_settings, model, torch.device("cpu"), 0, 1, str(tmp_path / "run"))
    trainer.save(tmp_path / "checkpoint")
    state = tmp_path / "checkpoint" / STATE / "state.pt"
    trainer.restore(tmp_path / "checkpoint")
    for content, words in ((weights.read_bytes(), "more than tensors"), (b"", "the file is empty"), (b"x" * 99, "damaged")):
        state.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            trainer.restore(tmp_path / "checkpoint")
        assert "\n" not in str(caught.value)
    assert not sprung.exists()


@pytest.mark.parametrize("entry", ["label", *(pytest.param(name, marks=pytest.mark.slow) for name in ("train", "backbone"))])
def test_a_job_given_such_a_file_ends_with_status_2_and_one_line(trap, tiny_settings, tmp_path, entry):
    """Through the workers of a real Ray: nothing is retried, nothing runs."""
    weights, sprung = trap
    changes = {"name": "locks", "storage": str(tmp_path / "runs")}
    if entry == "label":
        changes["label.members"] = {"a": str(trapped_checkpoint(tiny_settings, tmp_path / "checkpoint", weights))}
    else:
        changes["train.start_from" if entry == "train" else "model.backbone.weights"] = str(weights)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(with_overrides(tiny_settings, changes, "test")))
    command = ["label.py", "predict"] if entry == "label" else ["train.py"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / command[0]), *command[1:], "--config", str(recipe)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": "local"},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(command[0]) and ("trap.pth" in last or "weights.safetensors" in last), done.stderr
    assert "Traceback" not in done.stderr and not sprung.exists()


_TAG = "!!python/object/apply:os.system ['touch {}']"


def test_yaml_makes_no_objects(tmp_path, tiny_settings):
    """Recipes, extends, catalogue, overrides, settings of a checkpoint and of a run that is continued."""
    from i3cl.claims import claim_run

    sprung = tmp_path / "sprung"
    tag = _TAG.format(sprung)
    (tmp_path / "bad.yaml").write_text(f"name: {tag}\n")
    (tmp_path / "child.yaml").write_text("extends: bad.yaml\n")
    (tmp_path / "sets.yaml").write_text(f"art: {tag}\n")
    (tmp_path / "catalogue.yaml").write_text("data: {catalogue: sets.yaml, train: [{dataset: art}]}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "settings.yaml").write_text(f"name: {tag}\n")
    (tmp_path / "run" / "weights.safetensors").write_bytes(b"")
    for read in (
        lambda: load_settings(tmp_path / "bad.yaml"),
        lambda: load_settings(tmp_path / "child.yaml"),
        lambda: load_settings(tmp_path / "catalogue.yaml"),
        lambda: load_settings(None, [f"train.steps={tag}"]),
        lambda: i3cl.load(str(tmp_path / "run")),
        lambda: claim_run(str(tmp_path / "run"), tiny_settings, ("model",)),
    ):
        with pytest.raises(UserError) as caught:
            read()
        assert "\n" not in str(caught.value)
    assert load_settings(None, [f"name={tag}"]).name == tag, "a text setting is text, whatever it looks like"
    assert not sprung.exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(tag)


def test_no_unsafe_reader_is_in_the_code():
    """What would make an object of a file: none of it is called anywhere in the product."""
    import re

    forbidden = re.compile(
        r"\bimport pickle\b|pickle\.loads?\(|yaml\.(load|unsafe_load|full_load)\(|weights_only=False|allow_pickle=True|"
        r"\beval\(|\bexec\(|joblib|\bshelve\b|\bmarshal\b|from xml\.etree\.ElementTree import (?!Element\b|ParseError\b)|"
        r"import xml\.etree|xml\.dom|extractall\(|shell=True|os\.system\("
    )
    for file in [*(ROOT / "i3cl").rglob("*.py"), *(ROOT / "jobs").glob("*.py"), *(ROOT / "cluster").glob("*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert not forbidden.search(line.replace(".eval()", "")), f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        loads = re.findall(r"torch\.load\([^)]*\)", file.read_text())
        assert all("weights_only=True" in load for load in loads), file
