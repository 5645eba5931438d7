"""The schedules: systemd's own check of the units, the fields of the Kubernetes API, and install, show, remove."""

from __future__ import annotations

import shutil
import subprocess
import sys
from configparser import RawConfigParser
from pathlib import Path

import pytest
import yaml

from cnn_ray import cli, schedule, schedule_files

JOBS = Path(__file__).parents[2] / "jobs"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["schedule", *[str(a) for a in arguments]])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return ended.value.code, captured.out, captured.err  # type: ignore[return-value]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A nightly configuration in a folder with a difficult name; units and crontabs go to tmp_path."""
    folder = tmp_path / "my nights 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    path = folder / "nightly.yaml"
    path.write_text("score: {model: a@1, input_uri: 'in/{date}', output_uri: out}\n")
    return path


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    """systemctl, crontab and kubectl that keep a log and, of crontab, the table."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "log"
    table = tmp_path / "table"
    scripts = {
        "systemctl": f'echo "systemctl $*" >> {log}',
        "kubectl": f'echo "kubectl $*" >> {log}; [ "$1" = apply ] && cat >> {log}; [ "$1" != get ] || echo "$3 there"',
        "crontab": f'if [ "$1" = -l ]; then cat {table} 2>/dev/null || {{ echo "no crontab for me" >&2; exit 1; }}; '
        f"else cat > {table}; fi",
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return tmp_path


def units(tmp_path: Path, config: Path, *, is_system: bool) -> dict[str, str]:
    made = schedule.schedule_of(str(config), at="02:30", name="cnn-ray-nightly", is_system=is_system, user="root")
    return schedule_files.systemd_units(made)


def parsed(text: str) -> RawConfigParser:
    parser = RawConfigParser(strict=True, comment_prefixes=("#",), delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
@pytest.mark.parametrize("is_system", [False, True])
def test_systemd_finds_nothing_wrong(tmp_path, config, is_system, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "units").mkdir()
    (tmp_path / "run").mkdir()
    paths = []
    for name, text in units(tmp_path, config, is_system=is_system).items():
        paths.append(tmp_path / "units" / name)
        paths[-1].write_text(text)
    scope = [] if is_system else ["--user"]
    command = ["systemd-analyze", "verify", *scope, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in done.stderr.splitlines() if "cnn-ray" in line]
    assert (done.returncode, ours) == (0, []), done.stderr
    calendar = parsed(paths[1].read_text())["Timer"]["OnCalendar"]
    shown = subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, text=True, check=True)
    assert "02:30:00 UTC" in shown.stdout


def test_the_service_is_started_again_after_75_alone_and_is_hardened(tmp_path, config):
    files = units(tmp_path, config, is_system=True)
    unit, timer = parsed(files["cnn-ray-nightly.service"]), parsed(files["cnn-ray-nightly.timer"])
    service = unit["Service"]
    assert (service["Restart"], service["RestartForceExitStatus"], service["Type"]) == ("no", "75", "exec")
    assert int(unit["Unit"]["StartLimitBurst"]) * int(service["RestartSec"]) < int(
        unit["Unit"]["StartLimitIntervalSec"]
    )
    assert int(unit["Unit"]["StartLimitIntervalSec"]) < 24 * 3600
    for key, value in {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "PrivateTmp": "yes",
        "User": "root",
    }.items():
        assert service[key] == value
    folder = str(config.parent)
    assert service["ReadWritePaths"] == f'"{folder}/out"'.replace("%", "%%")
    assert service["ExecStart"] == f'{sys.executable} -m cnn_ray.cli nightly --config "{config}"'.replace("%", "%%")
    assert service["WorkingDirectory"] == folder.replace("%", "%%")
    assert (timer["Timer"]["Persistent"], timer["Timer"]["OnCalendar"]) == ("true", "*-*-* 02:30:00 UTC")
    assert timer["Timer"]["RandomizedDelaySec"] == "10min"


def test_an_output_on_s3_needs_no_writable_path(tmp_path, config):
    config.write_text("score: {model: a@1, input_uri: 's3://bucket/{date}', output_uri: 's3://bucket/out'}\n")
    assert "ReadWritePaths" not in units(tmp_path, config, is_system=False)["cnn-ray-nightly.service"]


def test_the_cron_line_runs_as_cron_runs_it(tmp_path, config, monkeypatch):
    """cron hands the line to sh, `\\%` being `%`: the command gets its arguments and credentials, under the lock."""
    seen = tmp_path / "seen"
    python = tmp_path / "my python"
    python.write_text(
        f'#!/bin/sh\npwd > "{seen}"\nprintf "%s\\n" "$@" >> "{seen}"\nflock -n "$5" true || echo locked >> "{seen}"\n'
        f'echo "$RAY_ADDRESS" >> "{seen}"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    made = schedule.schedule_of(str(config), at="23:05", name="nights")
    lines = schedule_files.cron_block(made).splitlines()
    fields = lines[-2].split(" ", 5)
    assert fields[:5] == ["5", "23,0,1,2,3,4", "*", "*", "*"]
    command = fields[5].replace("\\%", "%")
    assert "%" not in fields[5].replace("\\%", "")
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-c", command], check=True, env=environment)
    said = [str(config.parent), "-m", "cnn_ray.cli", "nightly", "--config", str(config), "locked"]
    assert seen.read_text().splitlines() == [*said, ""]
    (tmp_path / ".config/cnn-ray").mkdir(parents=True)
    (tmp_path / ".config/cnn-ray/nights.env").write_text("RAY_ADDRESS=10.0.0.1:6379\n")
    subprocess.run(["sh", "-c", command], check=True, env=environment)
    assert seen.read_text().splitlines() == [*said, "10.0.0.1:6379"]
    with config.open() as held:
        import fcntl

        fcntl.flock(held, fcntl.LOCK_EX)
        assert subprocess.run(["sh", "-c", command], check=False, env=environment).returncode == 75


def test_nothing_is_changed_by_printing(capsys, tmp_path, config, tools):
    for kind in ("systemd", "cron", "kubernetes", "kuberay"):
        code, out, _ = run(capsys, "install", f"--{kind}", "--config", config)
        assert (code, "cnn-ray-nightly" in out) == (0, True)
    assert not (tmp_path / "log").exists()
    assert not (tmp_path / "table").exists()
    assert not (tmp_path / "config").exists()
    assert not (config.parent / "out").exists()


def test_systemd_install_show_remove(capsys, tmp_path, config, tools):
    folder = tmp_path / "config/systemd/user"
    code, out, _ = run(capsys, "install", "--systemd", "--config", config, "--yes")
    assert (code, "linger" in out) == (0, True)
    assert sorted(p.name for p in folder.iterdir()) == ["cnn-ray-nightly.service", "cnn-ray-nightly.timer"]
    assert (config.parent / "out").is_dir()
    log = (tmp_path / "log").read_text().splitlines()
    assert log == ["systemctl --user daemon-reload", "systemctl --user enable --now cnn-ray-nightly.timer"]
    code, out, _ = run(capsys, "show")
    assert (code, "OnCalendar=*-*-* 02:00:00 UTC" in out, "cron: nothing is installed" in out) == (0, True, True)
    code, out, _ = run(capsys, "remove", "--systemd")
    assert (code, "--yes does it" in out, len(list(folder.iterdir()))) == (0, True, 2)
    code, out, _ = run(capsys, "remove", "--systemd", "--yes")
    assert (code, list(folder.iterdir())) == (0, [])
    assert "systemctl --user disable --now cnn-ray-nightly.timer" in (tmp_path / "log").read_text()
    code, _, err = run(capsys, "remove", "--systemd", "--yes")
    assert (code, "Received: none" in err) == (2, True)


def test_cron_keeps_what_others_wrote(capsys, tmp_path, config, tools):
    table = tmp_path / "table"
    table.write_text("MAILTO=me\n1 1 * * * backup")
    for at in ("02:00", "03:00"):  # again: replaced, not doubled
        code, _, _ = run(capsys, "install", "--cron", "--config", config, "--at", at, "--yes")
        assert code == 0
    text = table.read_text()
    assert text.startswith("MAILTO=me\n1 1 * * * backup\n# cnn-ray-nightly: begin")
    assert text.count("nightly --config") == 1
    assert "\n0 3,4,5,6,7,8 * * *" in text
    code, out, _ = run(capsys, "show", "--cron")
    assert (code, "nightly --config" in out, "backup" in out) == (0, True, False)
    code, _, _ = run(capsys, "remove", "--cron", "--yes")
    assert (code, table.read_text()) == (0, "MAILTO=me\n1 1 * * * backup\n")


def test_a_crontab_whose_block_has_no_end_is_not_touched(capsys, tmp_path, config, tools):
    broken = f"{schedule_files.cron_marks('cnn-ray-nightly')[0]}\n1 1 * * * backup\n"
    (tmp_path / "table").write_text(broken)
    code, _, err = run(capsys, "install", "--cron", "--config", config, "--yes")
    assert (code, "crontab -e" in err) == (2, True)
    assert (tmp_path / "table").read_text() == broken


def test_kubernetes_install_and_remove(capsys, tmp_path, config, tools):
    code, _, _ = run(capsys, "install", "--kubernetes", "--config", config, "--image", "r.example/i:1", "--yes")
    assert code == 0
    log = (tmp_path / "log").read_text()
    assert log.startswith("kubectl apply -f -\n")
    assert "image: r.example/i:1" in log
    code, _, _ = run(capsys, "remove", "--kubernetes", "--yes")
    assert (code, (tmp_path / "log").read_text().splitlines()[-1]) == (
        0,
        "kubectl delete cronjob/cnn-ray-nightly secret/cnn-ray-nightly",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("install", "--config", "nightly.yaml"), "Expected one of --systemd"),
        (("install", "--systemd", "--config", "nightly.yaml", "--at", "25:00"), "UTC time like 02:00"),
        (("install", "--systemd", "--config", "nightly.yaml", "--name", "../x"), "--name"),
        (("install", "--systemd", "--config", "nowhere.yaml"), "No such file"),
        (("remove", "--cron", "--name", "a b", "--yes"), "--name"),
    ],
)
def test_mistakes(capsys, config, tools, arguments, message):
    code, _, err = run(capsys, *arguments)
    assert (code, message in err) == (2, True), err


def test_a_missing_or_failing_tool_is_one_sentence(capsys, tmp_path, config, tools):
    (tmp_path / "bin/kubectl").write_text("#!/bin/sh\necho 'connection refused' >&2\nexit 1\n")
    code, _, err = run(capsys, "install", "--kubernetes", "--config", config, "--yes")
    assert (code, "Received: connection refused." in err) == (2, True)
    (tmp_path / "bin/crontab").unlink()
    if shutil.which("crontab") is None:
        code, _, err = run(capsys, "install", "--cron", "--config", config, "--yes")
        assert (code, "Expected crontab on this machine" in err) == (2, True)


# ---- Kubernetes: the fields of the API, written down here (batch/v1, v1, ray.io/v1 of KubeRay 1.6)

STRING, NUMBER, FLAG, ANY = str, int, bool, object
LABELS = {"*": STRING}
SECURITY = {"runAsNonRoot": FLAG, "runAsUser": NUMBER, "runAsGroup": NUMBER, "fsGroup": NUMBER}
SECURITY |= {"seccompProfile": {"type": ("RuntimeDefault",)}}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": FLAG,
    "readOnlyRootFilesystem": FLAG,
    "capabilities": {"drop": [STRING]},
}
CONTAINER = {
    "name": STRING,
    "image": STRING,
    "command": [STRING],
    "env": [{"name": STRING, "value": STRING}],
    "resources": {"requests": {"cpu": STRING, "memory": STRING}, "limits": {"memory": STRING}},
    "securityContext": CONTAINER_SECURITY,
    "volumeMounts": [{"name": STRING, "mountPath": STRING, "readOnly": FLAG}],
}
VOLUME = {"name": STRING, "secret": {"secretName": STRING}, "emptyDir": {"sizeLimit": STRING, "medium": ("Memory",)}}
POD = {
    "restartPolicy": ("Never", "OnFailure"),
    "automountServiceAccountToken": FLAG,
    "terminationGracePeriodSeconds": NUMBER,
    "securityContext": SECURITY,
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
TEMPLATE = {"metadata": {"labels": LABELS}, "spec": POD}
CODES = {"containerName": STRING, "operator": ("In", "NotIn"), "values": [NUMBER]}
RULE = {"action": ("FailJob", "Ignore", "Count"), "onExitCodes": CODES, "onPodConditions": [{"type": STRING}]}
JOB = {
    "backoffLimit": NUMBER,
    "activeDeadlineSeconds": NUMBER,
    "ttlSecondsAfterFinished": NUMBER,
    "podFailurePolicy": {"rules": [RULE]},
    "template": TEMPLATE,
}
CRON_JOB = {
    "schedule": STRING,
    "timeZone": STRING,
    "concurrencyPolicy": ("Allow", "Forbid", "Replace"),
    "startingDeadlineSeconds": NUMBER,
    "successfulJobsHistoryLimit": NUMBER,
    "failedJobsHistoryLimit": NUMBER,
    "jobTemplate": {"metadata": {"labels": LABELS}, "spec": JOB},
}
GROUP = {"rayStartParams": LABELS, "template": TEMPLATE}
RAY_CLUSTER = {
    "rayVersion": STRING,
    "enableInTreeAutoscaling": FLAG,
    "authOptions": {"mode": ("disabled", "token")},
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [
        {**GROUP, "groupName": STRING, "replicas": NUMBER, "minReplicas": NUMBER, "maxReplicas": NUMBER}
    ],
}
RAY_JOB = {
    "entrypoint": STRING,
    "backoffLimit": NUMBER,
    "activeDeadlineSeconds": NUMBER,
    "shutdownAfterJobFinishes": FLAG,
    "ttlSecondsAfterFinished": NUMBER,
    "rayClusterSpec": RAY_CLUSTER,
}
HEAD = {"apiVersion": STRING, "kind": STRING, "metadata": {"name": STRING, "labels": LABELS}}
KINDS = {
    "Secret": {**HEAD, "stringData": LABELS},
    "CronJob": {**HEAD, "spec": CRON_JOB},
    "RayCronJob": {**HEAD, "spec": {"schedule": STRING, "suspend": FLAG, "jobTemplate": RAY_JOB}},
}


def wrong(value: object, shape: object, at: str = "") -> list[str]:
    """Where the value has a field that the API does not know, or another type."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return [f"{at}: no mapping"]
        return [
            problem
            for key, inner in value.items()
            for problem in (
                wrong(inner, shape.get(key, shape.get("*")), f"{at}.{key}")
                if key in shape or "*" in shape
                else [f"{at}.{key}: unknown"]
            )
        ]
    if isinstance(shape, list):
        if not isinstance(value, list) or not value:
            return [f"{at}: no list"]
        return [problem for k, inner in enumerate(value) for problem in wrong(inner, shape[0], f"{at}[{k}]")]
    if isinstance(shape, tuple):
        return [] if value in shape else [f"{at}: {value!r}"]
    assert isinstance(shape, type)
    exact = type(value) is shape  # True is no number here
    return [] if exact else [f"{at}: {type(value).__name__}"]


@pytest.mark.parametrize(("kind", "name"), [("kubernetes", "cronjob"), ("kuberay", "raycronjob")])
def test_manifests_have_the_fields_of_the_api(capsys, monkeypatch, kind, name):
    monkeypatch.chdir(JOBS.parent)
    code, out, _ = run(capsys, "install", f"--{kind}", "--config", "jobs/nightly.yaml")
    assert code == 0
    documents = list(yaml.safe_load_all(out))
    assert documents == list(yaml.safe_load_all((JOBS / f"kubernetes_{name}.yaml").read_text()))
    for document in documents:
        assert wrong(document, KINDS[document["kind"]]) == []
        assert document["metadata"]["name"] == "cnn-ray-nightly"
    secret, job = documents
    assert yaml.safe_load(secret["stringData"]["nightly.yaml"]) == yaml.safe_load((JOBS / "nightly.yaml").read_text())
    assert job["apiVersion"] == {"CronJob": "batch/v1", "RayCronJob": "ray.io/v1"}[job["kind"]]
    assert job["spec"]["schedule"] == "0 2 * * *"


def test_the_cron_job_is_started_again_after_75_and_not_after_4():
    _, job = yaml.safe_load_all((JOBS / "kubernetes_cronjob.yaml").read_text())
    spec = job["spec"]
    assert (spec["concurrencyPolicy"], spec["timeZone"]) == ("Forbid", "Etc/UTC")
    assert spec["startingDeadlineSeconds"] < 24 * 3600
    inner = spec["jobTemplate"]["spec"]
    fail, count, ignore = inner["podFailurePolicy"]["rules"]
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailJob", [1, 2, 3, 4])
    assert (count["action"], count["onExitCodes"]["values"]) == ("Count", [75])
    assert ignore == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}
    pod = inner["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy needs it
    (container,) = pod["containers"]
    assert container["name"] == fail["onExitCodes"]["containerName"] == count["onExitCodes"]["containerName"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_the_structure_check_can_fail():
    assert wrong({"spec": {"timezone": "UTC"}}, {"spec": CRON_JOB}) == [".spec.timezone: unknown"]
    assert wrong({"backoffLimit": "6"}, JOB) == [".backoffLimit: str"]
    assert wrong({"restartPolicy": "Always"}, POD) == [".restartPolicy: 'Always'"]
