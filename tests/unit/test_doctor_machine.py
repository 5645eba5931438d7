"""Each check of this machine says what is wrong when it is, and nothing when it is not."""

import re
from pathlib import Path

import pytest

from cnn_ray import doctor_machine as machine

ROOT = Path(__file__).parents[2]
PINNED = {name: pins[0] for name, pins in machine.PINS.items()}


def test_pins_are_those_of_constraints_txt():
    text = (ROOT / "constraints.txt").read_text()
    for name, pins in machine.PINS.items():
        assert set(re.findall(rf"^{re.escape(name)}==([\w.]+)", text, re.MULTILINE)) == set(pins), name


def test_versions_as_pinned_are_one_ok():
    (finding,) = machine.version_findings(PINNED)
    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("ray", "2.59.1", "error"),
        ("ray", "2.60.1", "warning"),
        ("keras", "3.14.0", "error"),
        ("pillow", "12.0.0", "warning"),
        ("obstore", None, "error"),
    ],
)
def test_another_version_is_named_with_its_mend(name, version, level):
    (finding,) = machine.version_findings(PINNED | {name: version})
    assert (finding.level, finding.check) == (level, "packages")
    assert name in finding.said
    assert "constraints.txt" in finding.mend


def test_installed_versions_are_read():
    assert machine.installed_versions()["ray"] is not None


@pytest.mark.parametrize(("version", "level"), [((3, 11, 7), "ok"), ((3, 10, 1), "error"), ((3, 14, 0), "error")])
def test_python(version, level):
    assert machine.python_finding(version).level == level


@pytest.mark.parametrize(
    ("flags", "said", "level"),
    [
        ("amx_tile amx_bf16 avx512f", "AMX", "ok"),
        ("avx512f avx512_bf16", "AVX-512 with bf16", "ok"),
        ("avx512f avx2", "AVX-512, f32", "ok"),
        ("avx2", "AVX2", "ok"),
        ("sse4_2", "neither", "warning"),
        ("", "does not tell", "warning"),
    ],
)
def test_cpu(flags, said, level):
    finding = machine.cpu_finding(frozenset(flags.split()))
    assert said in finding.said
    assert finding.level == level


def test_cpu_flags_are_read(tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: X\nflags\t\t: fpu avx2 avx512f\n\nflags\t\t: fpu\n")
    assert machine.cpu_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512f"}
    assert machine.cpu_flags(tmp_path / "nothing") == frozenset()


@pytest.mark.parametrize(
    ("counts", "level", "mend"),
    [
        ((0, None, None), "ok", ""),
        ((0, 0, 0), "ok", ""),
        ((2, 2, 2), "ok", ""),
        ((2, 0, 0), "error", "CUDA_VISIBLE_DEVICES"),
        ((2, 2, 0), "error", "[gpu]"),
    ],
)
def test_gpus_are_counted_alike(counts, level, mend):
    finding = machine.gpu_finding(*counts)
    assert finding.level == level
    assert mend in finding.mend


@pytest.mark.parametrize(
    ("used", "shm", "levels"),
    [(50, 40, ["ok"]), (96, 40, ["error"]), (80, 40, ["warning"]), (50, 1, ["ok", "warning"]), (50, 0, ["ok"])],
)
def test_room_for_spilling_and_shared_memory(used, shm, levels):
    found = machine.disk_findings("/data", used * 10**9, 100 * 10**9, shm * 10**9, 100 * 10**9)
    assert [finding.level for finding in found] == levels


def test_disk_of_this_machine_is_read():
    assert machine.read_disk_findings()[0].check == "spilling"


@pytest.mark.parametrize("name", [machine.NO_PROGRESS_VARIABLE, machine.JOB_START_VARIABLE])
def test_time_outs_that_end_a_waiting_job(name):
    assert [f.level for f in machine.timeout_findings({})] == ["ok"]
    assert [f.level for f in machine.timeout_findings({name: "86400"})] == ["ok"]
    (short,) = machine.timeout_findings({name: "900"})
    assert (short.level, short.mend) == ("warning", f"export {name}=86400")
    assert [f.level for f in machine.timeout_findings({name: "soon"})] == ["error"]
