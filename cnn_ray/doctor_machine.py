"""The doctor's look at this machine: packages, Python, processors, disk, time-outs. Pure functions of what was read,
and next to each the reading."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from cnn_ray.doctor_finding import Finding, error, ok, warning

PINS: Mapping[str, tuple[str, ...]] = {
    "ray": ("2.60.0",),
    "tensorflow": ("2.21.0",),
    "keras": ("3.15.1",),
    "numpy": ("2.4.6", "2.5.5"),
    "pyarrow": ("26.0.1",),
    "openvino": ("2026.4.1",),
    "boto3": ("1.44.5",),
    "obstore": ("0.12.1",),
    "pillow": ("13.0.0",),
    "opencv-python-headless": ("5.0.0.93",),
    "simplejpeg": ("1.9.0",),
    "deflate": ("0.9.0",),
    "pydantic": ("2.14.3",),
}
"""The versions that this release was tested with: those of constraints.txt, held equal by a test."""
TIGHT = ("ray", "tensorflow", "keras")
"""Another minor version of these is an error: Ray refuses to mix versions, and we stand on internals of all three."""
PYTHONS = ((3, 11), (3, 12), (3, 13))

SPILL_FULL = 0.95
"""Ray spills no more objects to a disk that is fuller than this, and tasks then wait for ever."""
OBJECT_STORE_SHARE = 0.3
"""Ray's object store takes this share of memory by default."""
SHM = "/dev/shm"  # noqa: S108 - where Linux has shared memory, and Ray its object store
NO_PROGRESS_VARIABLE = "RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S"
JOB_START_VARIABLE = "RAY_JOB_START_TIMEOUT_SECONDS"
PATIENT_S = 3600.0
"""A cluster that starts from no node at all needs minutes; spot capacity may take an hour."""


def installed_versions() -> dict[str, str | None]:
    """Name -> installed version of each pinned package, None where it is missing."""
    found: dict[str, str | None] = {}
    for name in PINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def version_findings(installed: Mapping[str, str | None], pins: Mapping[str, tuple[str, ...]] = PINS) -> list[Finding]:
    """What differs from the pins, one finding each; one that says so where nothing does."""
    found: list[Finding] = []
    for name, pinned in pins.items():
        version = installed.get(name)
        mend = "pip install -c constraints.txt ."
        if version is None:
            found.append(error("packages", f"{name} is not installed", mend))
        elif name in TIGHT and version.split(".")[:2] not in [pin.split(".")[:2] for pin in pinned]:
            found.append(error("packages", f"{name} {version}, made for {pinned[0]}", mend))
        elif version not in pinned:
            found.append(warning("packages", f"{name} {version}, tested with {' or '.join(pinned)}", mend))
    return found or [ok("packages", f"{len(pins)} main packages as pinned, ray {installed['ray']}")]


def python_finding(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """Whether this Python is one of those that the dependencies are built for."""
    said = ".".join(str(part) for part in version)
    if version[:2] in PYTHONS:
        return ok("python", said)
    return error("python", said, "make the environment with Python 3.11, 3.12 or 3.13, the same on all nodes")


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The processor's feature flags, empty where the system does not tell."""
    try:
        match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return frozenset()
    return frozenset(match[1].split()) if match else frozenset()


def cpu_finding(flags: frozenset[str]) -> Finding:
    """What OpenVINO can make of this processor."""
    if not flags:
        return warning("cpu", "this system does not tell its features", "none needed; speed is not known")
    if {"amx_bf16", "amx_tile"} <= flags:
        return ok("cpu", "AMX: bf16 where the model's own figures allow it")
    if "avx512_bf16" in flags:
        return ok("cpu", "AVX-512 with bf16, where the model's own figures allow it")
    if "avx512f" in flags:
        return ok("cpu", "AVX-512, f32")
    if flags & {"avx2", "asimd"}:
        return ok("cpu", "AVX2 or NEON, f32")
    return warning("cpu", "neither AVX2 nor AVX-512", "score on a newer processor: this one is several times slower")


def gpu_devices() -> int:
    """NVIDIA devices that the driver shows."""
    return len(glob.glob("/dev/nvidia[0-9]*"))  # noqa: PTH207 - a pattern of a device folder


def gpu_finding(devices: int, by_ray: int | None = None, by_tensorflow: int | None = None) -> Finding:
    """Whether the driver, Ray and TensorFlow see the same GPUs; None where one was not asked."""
    if devices == 0 and not by_ray and not by_tensorflow:
        return ok("gpu", "none on this machine")
    said = f"driver {devices}, Ray {by_ray}, TensorFlow {by_tensorflow}"
    if by_ray is not None and by_ray != devices:
        return error("gpu", said, "check CUDA_VISIBLE_DEVICES and the driver (nvidia-smi): Ray counts by NVML")
    if by_tensorflow is not None and by_tensorflow != (devices if by_ray is None else by_ray):
        return error(
            "gpu", said, "pip install -c constraints.txt '.[gpu]': TensorFlow without CUDA uses the CPU silently"
        )
    return ok("gpu", said)


def gpus_by_ray() -> int:
    """GPUs that Ray would count on this node."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    return NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()


def gpus_by_tensorflow() -> int:
    """GPUs that TensorFlow sees."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def disk_findings(folder: str, used_bytes: int, total_bytes: int, shm_bytes: int, memory_bytes: int) -> list[Finding]:
    """Room for what Ray spills to disk, and for its object store in /dev/shm (0: there is none)."""
    free = total_bytes - used_bytes
    wanted = int(OBJECT_STORE_SHARE * memory_bytes)
    said = f"{free / 1e9:.1f} GB free of {total_bytes / 1e9:.0f} GB at {folder}"
    move = "free space there, or `ray start --temp-dir` on a larger disk"
    if used_bytes > SPILL_FULL * total_bytes:
        found = [error("spilling", f"{said}: Ray stops spilling above {SPILL_FULL:.0%}", move)]
    elif free < wanted:
        found = [warning("spilling", f"{said}, an object store of {wanted / 1e9:.1f} GB may not fit", move)]
    else:
        found = [ok("spilling", said)]
    if 0 < shm_bytes < wanted:
        found.append(
            warning(
                "shared memory",
                f"{SHM} has {shm_bytes / 1e9:.1f} GB, Ray wants {wanted / 1e9:.1f} GB and goes to slow disk",
                "docker run --shm-size, or an emptyDir with medium: Memory at /dev/shm",
            )
        )
    return found


def read_disk_findings() -> list[Finding]:
    """The findings for the folder that a Ray of this machine spills to."""
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"  # noqa: S108 - Ray's own default
    usage = shutil.disk_usage(folder)
    shm = shutil.disk_usage(SHM).total if Path(SHM).is_dir() else 0
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return disk_findings(folder, usage.used, usage.total, shm, memory)


def timeout_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Time-outs in the environment that end a job which only waits for nodes. Our own scoring overrides Ray Data's."""
    found: list[Finding] = []
    for name, what in ((NO_PROGRESS_VARIABLE, "Ray Data gives up"), (JOB_START_VARIABLE, "Ray drops a waiting job")):
        value = environment.get(name)
        if value is None:
            continue
        try:
            seconds = float(value)
        except ValueError:
            found.append(error("time-outs", f"{name} is {value!r}, no number", f"unset {name}, or give seconds"))
            continue
        if seconds < PATIENT_S:
            found.append(warning("time-outs", f"{what} after {seconds:g} s ({name})", f"export {name}=86400"))
    return found or [ok("time-outs", "none that ends a waiting night is set here")]
