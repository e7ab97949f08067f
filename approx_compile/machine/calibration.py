"""Measure the profile of a device, on request (`calibrate`) or when a decision first needs it (`current`), and store it.

A quick measurement takes under 3 s; the whole one takes under 60 s on a CPU. A lock on the profile's file ensures that one process measures when several
processes start at once.
"""

from __future__ import annotations

import torch
from filelock import FileLock, Timeout

from approx_compile import _torch
from approx_compile.config import ConfigError
from approx_compile.machine import microbenchmarks, store
from approx_compile.machine.profile import FORMAT, Machine, Table
from approx_compile.machine.store import DEVICES, Notify, device_key, load_matching, path_of
from approx_compile.utils import counted

_LOCK_TIMEOUT_S = 180.0


def current(device: str = "cpu", notify: Notify = lambda text: None) -> Machine:
    """Return the profile to decide by.

    It is the one in `use`, the file in the environment variable, what is stored, or else a quick measurement, which is then stored. Within a process the
    profile of a device changes only by `calibrate`.

    Args:
        device: "cpu" or "cuda".
        notify: Is told why something is measured.

    Returns:
        The profile.

    Raises:
        ConfigError: The file named by the environment variable cannot be read or is no valid profile.
    """
    if (profile := store.overriding()) is not None:
        return profile
    key = device_key(device)
    if key not in store.loaded:
        store.loaded[key] = _load_or_measure(device, notify)
    return store.loaded[key]


def calibrate(device: str | None = None, *, quick: bool = False, progress: bool = False) -> Machine:
    """Measure this machine, store the profile and decide by it from now on.

    This takes under 60 s on a CPU, or under 3 s if `quick`. On a GPU this project's own kernels are compiled and tuned too, which takes longer; how long
    has not been measured. The profile holds for the number of threads and the precision of float32 (`torch.set_float32_matmul_precision`,
    `fp32_precision`) that are set now.

    Args:
        device: "cpu" or "cuda", by default "cuda" where there is one.
        quick: Whether to take the short measurement, which decisions trust less.
        progress: Whether to show a bar on the terminal.

    Returns:
        The profile, which prints as a table (rich).

    Raises:
        ConfigError: The device is not there.
        OSError: The profile cannot be stored.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device: got {device!r}; valid are cpu" + (", cuda" if torch.cuda.is_available() else " (this torch sees no GPU)"))
    path = path_of(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        profile = _measure_profile(device, quick, progress, load_matching(path, lambda text: None, device_key(device)))
        profile.save(path)
    store.loaded[device_key(device)] = profile
    return profile


def _load_or_measure(device: str, notify: Notify) -> Machine:
    path, key = path_of(device), device_key(device)
    profile = load_matching(path, notify, key)
    if profile is not None:
        return profile
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):  # one of several processes measures, the others read its file
            profile = load_matching(path, lambda text: None, key)
            if profile is None:
                threads = counted(key.threads, "thread")
                notify(f"measuring {key.name} ({threads}) once, a few seconds; `approx_compile.machine.calibrate()` does it more precisely")
                profile = _measure_profile(device, True, False, None)
                profile.save(path)
    except (OSError, Timeout) as e:
        notify(f"the machine's profile could not be stored and holds for this process only: {e}")
        profile = profile or _measure_profile(device, True, False, None)
    return profile


def _measure_profile(device: str, quick: bool, progress: bool, before: Machine | None) -> Machine:
    key = device_key(device)
    with _torch.disable_torch_modes():
        measured = {m.name: Table(unit=m.unit, axes=m.axes, values=m.values) for m in microbenchmarks.measure(device, quick, progress)}
    same = before.tables if before is not None and before.quick == quick else {}
    tables = {n: t.rounded(same.get(n)) for n, t in measured.items()}
    return Machine(format=FORMAT, device=device, name=key.name, threads=key.threads, torch_version=torch.__version__, quick=quick, tables=tables)
