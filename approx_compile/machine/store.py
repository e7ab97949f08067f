"""Find, load and remember the profiles of devices, and select the one that decisions read.

The profile of a device is chosen in this order: the innermost `use` block, the file named by the environment variable `MACHINE`, the profile loaded before
in this process, the file in the user's cache folder. `calibration.current` measures a profile where none of these exists; this module measures nothing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import platformdirs
import pydantic
import torch

from approx_compile.config import ConfigError
from approx_compile.machine import float32_precision, huge_pages
from approx_compile.machine.profile import FORMAT, Machine
from approx_compile.utils import MACHINE

DEVICES = ("cpu", "cuda")
"""Types of devices that have a profile."""

Notify = Callable[[str], None]
"""A function that tells the user a message."""

_MEMORY_SETTINGS = re.compile(r"THP_MEM_ALLOC_ENABLE|LD_PRELOAD|GLIBC_TUNABLES|MALLOC_\w+|TCMALLOC_\w+")
"""Environment variables that change the cost of new memory: huge pages in torch's allocator on CPUs, another malloc, its settings."""

_MAX_NAME_LENGTH = 200

_in_use: list[Machine] = []
"""The profiles of the `use` blocks that are open, the innermost last."""


class DeviceKey(NamedTuple):
    """Everything that a profile belongs to, except the version of torch: a process has one profile per key."""

    device: str
    name: str
    threads: int
    precision: str


loaded: dict[DeviceKey, Machine] = {}
"""The profiles that this process decides by. An entry changes only by `calibration.calibrate`."""


def device_key(device: str) -> DeviceKey:
    """Return the key of a device ("cpu" or "cuda") with the number of threads and the precision of float32 that are set now."""
    return DeviceKey(device, device_name(device), torch.get_num_threads(), float32_precision.label(device))


@functools.cache
def device_name(device: str) -> str:
    """Return the name of the accelerator ("cuda"), or that of the processor and the settings of its memory ("cpu"): "AMD EPYC, THP_MEM_ALLOC_ENABLE=1"."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    never = ["transparent_hugepage=never"] if huge_pages.setting() == "never" else []
    return ", ".join([name, *never, *(f"{k}={v}" for k, v in sorted(os.environ.items()) if v and _MEMORY_SETTINGS.fullmatch(k))])


def path_of(device: str = "cpu") -> Path:
    """Return the file in which the profile of a device is stored, for the present number of threads, precision of float32 and version of torch."""
    key = device_key(device)
    words = f"{key.device}-{key.name}-{key.threads}-threads-torch-{torch.__version__}{key.precision}"
    plain = re.sub(r"[^\w.+-]+", "_", words)
    if len(plain) > _MAX_NAME_LENGTH:
        plain = plain[:_MAX_NAME_LENGTH] + hashlib.sha256(words.encode()).hexdigest()[:8]
    return platformdirs.user_cache_path("approx_compile") / "machine" / f"{plain}.json"


def load(path: str | os.PathLike[str]) -> Machine:
    """Read a stored profile.

    Args:
        path: The file.

    Returns:
        The profile.

    Raises:
        ConfigError: The file cannot be read or is no valid profile.
    """
    try:
        return Machine.model_validate_json(Path(path).read_text())
    except OSError as e:
        raise ConfigError(f"machine profile {path}: {e.strerror or e}; `approx_compile.machine.calibrate()` makes one") from None
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(f"machine profile {path}: {where}: {first['msg']}; calibrate again or name another file") from None


def load_matching(path: Path, notify: Notify, key: DeviceKey) -> Machine | None:
    """Read a stored profile if it was made for this device and version of torch.

    Args:
        path: The file.
        notify: Is told why a file that exists is not used.
        key: The device, its name and the number of threads that the profile must have.

    Returns:
        The profile, or None if there is no file, or if the file is damaged or made for something else.
    """
    if not path.exists():
        return None
    try:
        profile = load(path)
    except ConfigError as e:
        notify(f"{e} (measured anew)")
        return None
    if (profile.format, profile.torch_version, (profile.device, profile.name, profile.threads)) == (FORMAT, torch.__version__, key[:3]):
        return profile
    notify(f"machine profile {path} was made for another version or machine and is measured anew")
    return None


@contextlib.contextmanager
def use(machine: Machine) -> Iterator[None]:
    """Decide by this profile inside the block, in all threads of the process and for all devices.

    Args:
        machine: The profile.
    """
    _in_use.append(machine)
    try:
        yield
    finally:
        _in_use.remove(machine)


def overriding() -> Machine | None:
    """Return the profile that stands in for that of every device: the one in `use`, else the one in the file named by the environment variable `MACHINE`.

    Returns:
        The profile, or None if neither is set.

    Raises:
        ConfigError: The file named by the variable cannot be read or is no valid profile.
    """
    if _in_use:
        return _in_use[-1]
    if file := MACHINE.value():
        return _from_file(file, Path(file).stat().st_mtime_ns if Path(file).exists() else 0)
    return None


@functools.cache
def _from_file(file: str, modified: int) -> Machine:
    return load(file)


def stored(device: str = "cpu") -> Machine | None:
    """Return the profile to decide by, without measuring one where there is none.

    Args:
        device: The type of a device.

    Returns:
        What `calibration.current` returns, but None where that would measure, and for types of devices that have no profiles.

    Raises:
        ConfigError: The file named by the environment variable `MACHINE` cannot be read or is no valid profile.
    """
    if (profile := overriding()) is not None:
        return profile
    if device not in DEVICES:
        return None
    key = device_key(device)
    if key not in loaded and (profile := load_matching(path_of(device), lambda text: None, key)) is not None:
        loaded[key] = profile
    return loaded.get(key)


def adopt(profile: Machine, device: str) -> None:
    """Decide by a profile that was made elsewhere, such as on another node, until the process ends; one that is named explicitly stays.

    Args:
        profile: The profile.
        device: The type of the device that it stands for.
    """
    if overriding() is None:
        loaded[device_key(device)] = profile
