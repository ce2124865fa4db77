"""The watcher for a spot machine's end, against a server that speaks the clouds' metadata protocols."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_notice.py"
NODE = "316d76b4b07b450533a9b15198f51e92d708891a56953a7c1cf6abd4"
ADDRESS = "192.0.2.9:6399"

_spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
assert _spec and _spec.loader
spot_notice = importlib.util.module_from_spec(_spec)
sys.modules["spot_notice"] = spot_notice
_spec.loader.exec_module(spot_notice)


class Metadata:
    """A metadata server of both clouds; `pages` is what it tells, by path."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self.tokens = ["first"]
        self.failures = 0
        """Requests to answer with 503 before any other."""
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args) -> None: ...

            def reply(self, status: int, body: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_PUT(self) -> None:
                asked = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0"))
                if self.path != "/latest/api/token" or not 0 < asked <= 21600:
                    return self.reply(400)
                return self.reply(200, served.tokens[-1])

            def do_GET(self) -> None:
                if served.failures:
                    served.failures -= 1
                    return self.reply(503)
                aws = self.path.startswith("/latest/")
                if aws and self.headers.get("X-aws-ec2-metadata-token") != served.tokens[-1]:
                    return self.reply(401)
                if not aws and self.headers.get("Metadata-Flavor") != "Google":
                    return self.reply(403)
                if self.path not in served.pages:
                    return self.reply(404)
                return self.reply(200, served.pages[self.path])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def announce(self, seconds: float) -> None:
        end = datetime.now(UTC) + timedelta(seconds=seconds)
        notice = {"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
        self.pages["/latest/meta-data/spot/instance-action"] = json.dumps(notice)


@pytest.fixture
def metadata(monkeypatch):
    made = Metadata()
    made.pages["/latest/meta-data/instance-life-cycle"] = "spot"
    made.pages["/computeMetadata/v1/instance/scheduling/preemptible"] = "TRUE"
    made.pages["/computeMetadata/v1/instance/preempted"] = "FALSE"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{made.address}/")
    monkeypatch.setenv("GCE_METADATA_HOST", made.address)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def raylet(tmp_path):
    """A process with a raylet's command line."""
    arguments = ["/opt/ray/raylet", f"--node_id={NODE}", f"--agent=python agent.py --gcs-address={ADDRESS} --x=1"]
    code = "import time; print(flush=True); time.sleep(60)"
    process = subprocess.Popen([arguments[0], "-c", code, *arguments[1:]], executable=sys.executable, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def run(*arguments: str, timeout: float = 30) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=timeout)


def test_aws_tells_when_the_machine_goes(metadata):
    cloud = spot_notice.Aws()
    assert cloud.is_spot() and cloud.seconds_left() is None
    metadata.tokens.append("second")  # the first has expired
    metadata.announce(120)
    assert 115 < cloud.seconds_left() <= 120
    metadata.announce(-5)
    assert cloud.seconds_left() == 0


def test_gcp_tells_when_the_machine_goes(metadata):
    cloud = spot_notice.Gcp()
    assert cloud.is_spot() and cloud.seconds_left() is None
    metadata.pages["/computeMetadata/v1/instance/preempted"] = "TRUE"
    assert cloud.seconds_left() == spot_notice.GCP_SECONDS


def test_the_watch_outlasts_a_failing_service_and_a_strange_answer(metadata, capsys):
    metadata.failures = 2
    metadata.pages["/latest/meta-data/spot/instance-action"] = "<html>"

    def later() -> None:
        time.sleep(0.3)
        metadata.announce(60)

    threading.Thread(target=later).start()
    assert 50 < spot_notice.watch(spot_notice.Aws(), 0.02) <= 60
    said = capsys.readouterr().out
    assert said.count("fails and is asked again") == 2 and "503" in said  # once a fault, not once a look


def test_no_watch_on_a_machine_at_full_price(metadata):
    metadata.pages["/latest/meta-data/instance-life-cycle"] = "on-demand"
    done = run("aws", f"--address={ADDRESS}")
    assert done.returncode == 0 and "not a spot machine" in done.stdout


def test_a_machine_without_a_metadata_service_is_told(metadata):
    metadata.server.shutdown()
    metadata.server.server_close()
    with pytest.raises(OSError, match="does not answer"):
        spot_notice.watch(spot_notice.Gcp(), 0.01, patience=0.05)


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_dry_run_prints_the_command(metadata, raylet, cloud):
    metadata.announce(90)
    metadata.pages["/computeMetadata/v1/instance/preempted"] = "TRUE"
    done = run(cloud, f"--address={ADDRESS}", "--dry-run", "--interval=0.05")
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    assert command.startswith(f"{Path(sys.executable).with_name('ray')} drain-node --address={ADDRESS} --node-id={NODE} ")
    assert "--reason=DRAIN_NODE_REASON_PREEMPTION" in command
    seconds = int(command.rsplit("=", 1)[1])
    assert (80 <= seconds <= 90) if cloud == "aws" else seconds == spot_notice.GCP_SECONDS


def test_the_command_is_one_that_ray_has():
    from click.testing import CliRunner
    from ray.scripts.scripts import drain_node

    arguments = spot_notice.drain_command(spot_notice.Raylet(1, "zz", ADDRESS), -3)[2:]
    refused = CliRunner().invoke(drain_node, arguments)
    assert "--deadline-remaining-seconds cannot be negative" in refused.output  # every option was understood


def test_now_without_a_node_ends_at_once():
    done = run("now", "--address=192.0.2.9:1")
    assert done.returncode == 0 and "no Ray node runs here" in done.stdout
    assert run("now", "--address=192.0.2.9:1", "--dry-run").returncode == 1


def test_raylets_are_told_apart_by_their_head(raylet):
    assert [found.node_id for found in spot_notice.raylets(ADDRESS)] == [NODE]
    assert [found.pid for found in spot_notice.raylets(ADDRESS)] == [raylet.pid]
    assert spot_notice.raylets("192.0.2.9:6398") == []
    assert spot_notice.parse_raylet(1, ["/bin/cat", f"--node_id={NODE}", "--gcs-address=h:1"]) is None
    assert spot_notice.parse_raylet(1, [""]) is None


def test_wait_for_end(raylet):
    nodes = spot_notice.raylets(ADDRESS)
    assert not spot_notice.wait_for_end(nodes, 0.2)
    raylet.kill()
    raylet.wait()
    assert spot_notice.wait_for_end(nodes, 10)


def test_a_head_that_is_gone_is_not_waited_for(capsys):
    nodes = [spot_notice.Raylet(1, NODE, "127.0.0.1:1")]
    began = time.monotonic()
    assert not spot_notice.drain(lambda: nodes, 60, patience=0.5)
    assert time.monotonic() - began < 10
    assert f"{NODE}: nothing answers at 127.0.0.1:1" in capsys.readouterr().out


def test_an_answer_that_is_not_rays_is_tried_again_until_the_end(metadata, capsys):
    nodes = [spot_notice.Raylet(1, NODE, metadata.address)]
    assert not spot_notice.drain(lambda: nodes, 2, patience=2)
    assert NODE in capsys.readouterr().out


def test_one_watcher_a_machine(metadata):
    name = f"test-{os.getpid()}"
    lock = spot_notice.only_watcher(name)
    assert lock is not None
    done = run("aws", f"--address={name}")
    lock.close()
    assert done.returncode == 0 and "another watcher runs here" in done.stdout
