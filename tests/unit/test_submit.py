"""Submitting, against a job server of our own that speaks Ray's HTTP and websocket interface."""

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from aiohttp import web

from cnn_ray import submit, submit_client
from cnn_ray.config import EvaluateConfig, NightlyConfig, ScoreConfig, TrainConfig, build_config
from cnn_ray.errors import AccessDeniedError, ConfigError, NotFoundError, UnavailableError
from cnn_ray.flags import config_from_flags

DAY = date(2026, 11, 24)
JOBS = Path(__file__).parents[2] / "jobs"
SCORE = {"model": "small@1", "models_uri": "/m", "input_uri": "/in/{date}", "output_uri": "/out"}


def submission(attempt=1, today=DAY, **changes):
    document = SCORE | {"date": "2026-11-23"} | changes
    return submit.submission_of("score", ScoreConfig(**document), document, attempt=attempt, today=today)


class FakeJobs:
    """What a head node's job server does, with jobs that end as told: `plan` is a list of states after submission."""

    def __init__(self):
        self.jobs, self.packages, self.requests, self.token = {}, {}, [], None
        self.plan, self.exit_code, self.output, self.break_tail_at = ["RUNNING", "SUCCEEDED"], 0, "one\ntwo\n", None
        self.loop = asyncio.new_event_loop()
        started = threading.Event()
        threading.Thread(target=self._run, args=(started,), daemon=True).start()
        assert started.wait(20)

    def _run(self, started):
        asyncio.set_event_loop(self.loop)
        app = web.Application(client_max_size=100 * 1024**2, middlewares=[self.guard])
        app.router.add_get("/api/version", self.version)
        app.router.add_post("/api/jobs/", self.submit)
        app.router.add_get("/api/jobs/", self.listing)
        app.router.add_get("/api/jobs/{id}/logs/tail", self.tail)
        app.router.add_get("/api/jobs/{id}/logs", self.logs)
        app.router.add_get("/api/jobs/{id}", self.info)
        app.router.add_post("/api/jobs/{id}/stop", self.stop)
        app.router.add_get("/api/packages/{protocol}/{name}", self.package)
        app.router.add_put("/api/packages/{protocol}/{name}", self.upload)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        self.loop.run_forever()

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)

    @web.middleware
    async def guard(self, request, handler):
        sent = request.headers.get("Authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            return web.Response(status=401 if sent is None else 403, text="no")
        return await handler(request)

    async def version(self, request):
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})

    async def submit(self, request):
        body = await request.json()
        if body["submission_id"] in self.jobs:
            return web.Response(status=500, text=f"Job with submission_id {body['submission_id']} already exists.")
        self.requests.append(body)
        self.jobs[body["submission_id"]] = {"body": body, "states": ["PENDING", *self.plan]}
        return web.json_response({"job_id": body["submission_id"], "submission_id": body["submission_id"]})

    def details(self, name, *, step=True):
        job = self.jobs[name]
        status = job["states"][0]
        if step and len(job["states"]) > 1:
            job["states"].pop(0)
        ended = status in ("SUCCEEDED", "FAILED")
        return {
            "type": "SUBMISSION",
            "submission_id": name,
            "job_id": None,
            "driver_info": None,
            "status": status,
            "entrypoint": job["body"]["entrypoint"],
            "message": "aws_secret_access_key=abcdefghijkl failed" if status == "FAILED" else None,
            "metadata": job["body"]["metadata"],
            "start_time": 1_700_000_000_000,
            "driver_exit_code": self.exit_code if ended else None,
        }

    async def info(self, request):
        if request.match_info["id"] not in self.jobs:
            return web.Response(status=404, text="no such job")
        return web.json_response(self.details(request.match_info["id"]))

    async def listing(self, request):
        return web.json_response([self.details(name, step=False) for name in self.jobs])

    async def logs(self, request):
        return web.json_response({"logs": self.output})

    async def tail(self, request):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.break_tail_at is not None:
            at, self.break_tail_at = self.break_tail_at, None
            await socket.send_str(self.output[:at])
            request.transport.abort()
            return socket
        await socket.send_str(self.output)
        await socket.close()
        return socket

    async def stop(self, request):
        self.jobs[request.match_info["id"]]["states"] = ["STOPPED"]
        return web.json_response({"stopped": True})

    async def package(self, request):
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def upload(self, request):
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()


@pytest.fixture
def jobs(monkeypatch):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(submit_client, "POLL_S", 0.02)
    fake = FakeJobs()
    yield fake
    fake.close()


def test_the_id_follows_from_what_is_written_and_the_attempt():
    name = submission().submission_id
    assert name.startswith("cnnray-score-2026-11-23-")
    assert submission(batch_size=8, input_uri="/other/{date}").submission_id == name, "the same partition"
    assert submission(output_uri="/out/").submission_id == name
    others = [
        submission(attempt=2),
        submission(date="2026-11-24"),
        submission(model="small@2"),
        submission(output_uri="/out2"),
    ]
    assert len({name, *(other.submission_id for other in others)}) == 5


def test_every_job_has_its_own_target():
    train = {"name": "t", "models_uri": "/m", "runs_uri": "/r", "data": {"uri": "/d"}}
    night = {"score": SCORE}
    judged = {"model": "small@1", "models_uri": "/m", "data": {"uri": "/d"}, "output_uri": "/e"}

    def made(kind, config, document, today=DAY):
        return submit.submission_of(kind, config, document, attempt=1, today=today)

    first = made("train", TrainConfig(**train), train)
    assert first.submission_id != made("train", TrainConfig(**train, seed=1), train).submission_id
    assert first.entrypoint == "python jobs/train.py --config job.yaml"
    tonight = made("nightly", NightlyConfig(**night), night)
    assert tonight.submission_id != made("nightly", NightlyConfig(**night), night, date(2026, 11, 25)).submission_id
    assert tonight.entrypoint.endswith("--today 2026-11-24")
    assert made("evaluate", EvaluateConfig(**judged), judged).metadata["output"] == "/e"


@pytest.mark.parametrize("place", ["scores", "./scores", "~/scores"])
def test_locations_that_end_with_the_job_are_refused(place):
    with pytest.raises(ConfigError, match="output_uri"):
        submission(output_uri=place)
    document = {"name": "t", "models_uri": "/m", "runs_uri": "/r", "data": {"uri": place}}
    with pytest.raises(ConfigError, match=r"data\.uri"):
        submit.submission_of("train", TrainConfig(**document), document, attempt=1, today=DAY)


def test_the_working_directory_holds_the_package_the_entry_points_and_the_configuration(jobs):
    server = submit_client.JobServer(jobs.address)
    resources = submit.Resources(num_cpus=1, num_gpus=0.5, memory_bytes=10**9)
    assert server.submit(submission(batch_size=8), resources) is None
    (body,) = jobs.requests
    assert body["entrypoint"] == "python jobs/score.py --config job.yaml"
    assert (body["entrypoint_num_cpus"], body["entrypoint_num_gpus"]) == (1, 0.5)
    assert body["entrypoint_memory"] == 10**9
    assert body["metadata"] == {
        "cnn_ray": submit.cnn_ray.__version__,
        "job": "score",
        "attempt": "1",
        "output": "/out",
        "date": "2026-11-23",
        "model": "small@1",
    }
    (package,) = jobs.packages.values()
    assert len(package) < 2 * 1024**2
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        wanted = {"cnn_ray/cli.py", "cnn_ray/page/page.js", "jobs/score.py", "jobs/evaluate.py", "job.yaml"}
        assert wanted <= set(names)
        assert {name.split("/")[0] for name in names} == {"cnn_ray", "jobs", "job.yaml"}
        assert not [name for name in names if "__pycache__" in name]
        assert yaml.safe_load(archive.read("job.yaml"))["batch_size"] == 8


def test_nothing_of_this_machine_travels_along_and_others_cannot_look(tmp_path):
    with submit.working_folder(submission()) as folder:
        assert folder.stat().st_mode & 0o077 == 0
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert not [path for path in files if "__pycache__" in path.parts or path.suffix == ".pyc"]
        assert {path.suffix for path in folder.glob("jobs/*")} == {".py"}
        assert sum(path.stat().st_size for path in files) < 5 * 1024**2
    assert not folder.exists()


def test_pins_make_an_environment_and_none_leaves_the_image(jobs, tmp_path):
    assert set(submit.runtime_env(tmp_path, None)) == {"working_dir"}
    (tmp_path / "pins.txt").write_text("# by hand\nray==2.60.0\n\npyarrow==26.0.1 \n")
    assert submit.runtime_env(tmp_path, str(tmp_path / "pins.txt"))["pip"] == ["ray==2.60.0", "pyarrow==26.0.1"]
    with pytest.raises(ConfigError, match="file of pins"):
        submit.runtime_env(tmp_path, str(tmp_path / "none.txt"))


def test_the_same_work_is_submitted_once(jobs):
    server = submit_client.JobServer(jobs.address)
    assert server.submit(submission(), submit.Resources()) is None
    earlier = server.submit(submission(), submit.Resources())
    assert earlier is not None
    assert earlier.submission_id == submission().submission_id
    assert len(jobs.requests) == 1
    assert server.submit(submission(attempt=2), submit.Resources()) is None
    assert len(jobs.requests) == 2


def test_two_that_submit_at_the_same_moment_are_one(jobs, monkeypatch):
    server = submit_client.JobServer(jobs.address)
    server.submit(submission(), submit.Resources())
    monkeypatch.setattr(server, "find", lambda _: None)
    assert server.submit(submission(), submit.Resources()).status in ("PENDING", "RUNNING")
    assert len(jobs.requests) == 1


@pytest.mark.parametrize(
    ("plan", "process", "code"),
    [
        (["RUNNING", "SUCCEEDED"], 0, 0),
        (["RUNNING", "FAILED"], 4, 4),
        (["RUNNING", "FAILED"], 75, 75),
        (["RUNNING", "FAILED"], -9, 137),
        (["FAILED"], None, 75),
        (["RUNNING", "STOPPED"], None, 130),
    ],
)
def test_a_watched_job_ends_with_its_own_exit_code(jobs, plan, process, code):
    jobs.plan, jobs.exit_code = plan, process
    server = submit_client.JobServer(jobs.address)
    server.submit(submission(), submit.Resources())
    seen = []
    state = server.watch(submission().submission_id, on_status=lambda s: seen.append(s.status))
    assert state.exit_code == code
    assert seen[-1] == plan[-1]
    assert len(seen) == len(set(seen))


def test_output_is_followed_and_a_broken_connection_repeats_nothing(jobs):
    jobs.plan, jobs.break_tail_at = ["RUNNING", "RUNNING", "RUNNING", "SUCCEEDED"], 5
    server = submit_client.JobServer(jobs.address)
    server.submit(submission(), submit.Resources())
    written = []
    assert server.watch(submission().submission_id, write=written.append).exit_code == 0
    assert "".join(written) == jobs.output
    assert len(written) == 2


def test_a_server_that_goes_away_is_waited_for_and_then_given_up(jobs, monkeypatch):
    monkeypatch.setattr(submit_client, "LOST_S", 0.1)
    server = submit_client.JobServer(jobs.address)
    server.submit(submission(), submit.Resources())
    states = iter([UnavailableError("away"), None])

    def state(_name):
        failure = next(states, None)
        if failure is not None:
            raise failure
        return SimpleNamespace(status="SUCCEEDED", ended=True, exit_code=0)

    monkeypatch.setattr(server, "state", state)
    assert server.watch("x").exit_code == 0

    def away(_name):
        raise UnavailableError("away")

    monkeypatch.setattr(server, "state", away)
    with pytest.raises(UnavailableError):
        server.watch("x")


def test_a_token_is_wanted_and_never_shown(jobs, monkeypatch):
    jobs.token = "the-cluster-token-0123456789"
    # Ray keeps the machine's token once anything in this process has asked for it: it is the wrong one then.
    with pytest.raises(AccessDeniedError, match=r"(no|a wrong) token.*auth_token"):
        submit_client.JobServer(jobs.address)
    jobs.token = None
    server = submit_client.JobServer(jobs.address)
    jobs.token = "the-cluster-token-0123456789"
    server._client._headers["Authorization"] = "Bearer a-wrong-token-987654321"
    with pytest.raises(AccessDeniedError, match="a wrong token") as caught:
        server.jobs()
    assert "987654321" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "token_mode", "clear"),
    [
        ("http://127.0.0.1:8265", True, False),
        ("http://localhost:8265", True, False),
        ("http://[::1]:8265", True, False),
        ("http://10.0.0.5:8265", True, True),
        ("http://head.example.com:8265", True, True),
        ("https://head.example.com", True, False),
        ("http://10.0.0.5:8265", False, False),
    ],
)
def test_a_token_in_clear_is_told(address, token_mode, clear):
    assert submit_client.travels_in_clear(address, token_mode) is clear


def test_nobody_there_and_no_such_job(jobs, monkeypatch):
    with pytest.raises(UnavailableError, match=r"job server at http://127\.0\.0\.1:9"):
        submit_client.JobServer("http://127.0.0.1:9")
    server = submit_client.JobServer(jobs.address)
    with pytest.raises(NotFoundError, match="no-such-job"):
        server.logs("no-such-job")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert submit_client.JobServer(jobs.address).address == jobs.address, "the flag wins"
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"


def cli(jobs, *arguments, timeout=60):
    command = [sys.executable, "-m", "cnn_ray.cli", "submit", *arguments, "--address", jobs.address]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture
def night(tmp_path):
    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump(SCORE))
    return str(path)


def test_the_command_line_from_submission_to_stop(jobs, night):
    jobs.plan, jobs.exit_code = ["RUNNING", "FAILED"], 4
    first = cli(jobs, "score", "--config", night, "--date", "2026-11-23", "--follow")
    name = submission().submission_id
    assert first.returncode == 4, first.stderr
    assert f"Submitted: {name}" in first.stdout
    assert first.stdout.endswith("one\ntwo\n")
    again = cli(jobs, "score", "--config", night, "--date", "2026-11-23")
    assert again.returncode == 4
    assert f"Already submitted: {name} is FAILED. Next: --attempt 2" in again.stdout
    assert "abcdefghijkl" not in again.stderr
    assert cli(jobs, "score", "--config", night, "--date", "2026-11-23", "--no-wait").returncode == 0

    status = cli(jobs, "status", name)
    assert (status.returncode, f"{name}: FAILED, exit code 4" in status.stdout) == (4, True)
    assert "/out" in cli(jobs, "list").stdout
    assert cli(jobs, "logs", name).stdout == "one\ntwo\n"
    assert cli(jobs, "stop", name).stdout == f"Stopping: {name}\n"
    assert cli(jobs, "status", name).returncode == 130
    missing = cli(jobs, "status", "nobody")
    assert (missing.returncode, "Traceback" in missing.stderr) == (2, False)


def test_what_is_wrong_is_told_before_anything_is_sent(jobs, night):
    wrong = cli(jobs, "score", "--config", night, "--date", "2026-11-23", "--batch-size", "0")
    assert (wrong.returncode, jobs.requests, jobs.packages) == (2, [], {})
    assert "batch_size" in wrong.stderr
    dry = cli(jobs, "score", "--config", night, "--date", "2026-11-23", "--dry-run")
    assert dry.stdout.startswith(f"Would submit {submission().submission_id}")
    assert jobs.requests == []


@pytest.mark.parametrize(
    ("kind", "file", "flags"),
    [
        ("train", "cifar10.yaml", ["--models-uri", "/m", "--runs-uri", "/r", "--train-epochs", "3"]),
        ("nightly", "nightly.yaml", ["--score-batch-size", "8", "--today", "2026-11-25"]),
        ("score", "score.yaml", ["--date", "2026-11-23"]),
        ("evaluate", None, ["--model", "a@1", "--models-uri", "/m", "--data-uri", "s3://b/l", "--output-uri", "/e"]),
    ],
)
def test_flags_over_the_file_are_what_the_job_reads(jobs, kind, file, flags):
    arguments = [kind, *([] if file is None else ["--config", str(JOBS / file)]), *flags]
    done = cli(jobs, *arguments, "--no-wait")
    assert done.returncode == 0, done.stderr
    (package,) = jobs.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        document = yaml.safe_load(archive.read("job.yaml"))
    config = build_config(submit.KINDS[kind], document)
    expected = config_from_flags(submit.KINDS[kind], None if file is None else str(JOBS / file), given(flags))
    assert config == expected


def given(flags):
    """Flags of the command line under the names that click gives them."""
    names = [flag[2:].replace("-", "_") for flag in flags[::2]]
    nested = {"train_epochs": "train__epochs", "score_batch_size": "score__batch_size", "data_uri": "data__uri"}
    return {nested.get(name, name): value for name, value in zip(names, flags[1::2], strict=True) if name != "today"}


def test_ctrl_c_while_following_leaves_the_job_running_and_says_so(jobs, night):
    jobs.plan = ["RUNNING"]
    command = [sys.executable, "-m", "cnn_ray.cli", "submit", "score", "--config", night, "--date", "2026-11-23"]
    process = subprocess.Popen(
        [*command, "--follow", "--address", jobs.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not jobs.jobs or next(iter(jobs.jobs.values()))["states"] != ["RUNNING"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"the job {submission().submission_id} goes on" in stderr
    assert next(iter(jobs.jobs.values()))["states"] == ["RUNNING"]
