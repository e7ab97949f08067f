"""A network of this machine's own, with links of limited bandwidth, in which processes run as on several machines.

Every rank has a network namespace, connected by a pair of virtual interfaces to a bridge in one more namespace; `tc` limits what each interface sends. Needs
the rights of root and the commands `ip` and `tc` (Debian: `apt install iproute2`). Nothing outside the namespaces is touched, and they are removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence

PREFIX = "approx-bench"
INTERFACE = "link0"


def missing() -> str | None:
    """What is missing on this machine for a network of namespaces, None if nothing is."""
    commands = [c for c in ("ip", "tc") if shutil.which(c) is None]
    if commands:
        return f"the commands {' and '.join(commands)} (Debian: apt install iproute2)"
    return None if os.geteuid() == 0 else "the rights of root"


def address(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


@contextlib.contextmanager
def namespaces(ranks: int, mbit_s: float | None) -> Iterator[list[list[str]]]:
    """For each rank the words before a command that run it in the rank's namespace. Links are limited to `mbit_s`, each way, or not at all."""
    names = [f"{PREFIX}-{os.getpid()}-{i}" for i in (*range(ranks), "bridge")]
    bridge = names[-1]
    made: list[str] = []
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            made.append(name)
        _run("ip", "-n", bridge, "link", "add", "bridge0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "bridge0", "up")
        for rank, name in enumerate(names[:-1]):
            _run("ip", "-n", name, "link", "add", INTERFACE, "type", "veth", "peer", "name", f"port{rank}", "netns", bridge)
            _run("ip", "-n", bridge, "link", "set", f"port{rank}", "master", "bridge0", "up")
            _run("ip", "-n", name, "address", "add", f"{address(rank)}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _run("ip", "-n", name, "link", "set", interface, "up")
            if mbit_s is not None:
                limit = ["tbf", "rate", f"{mbit_s:g}mbit", "burst", f"{max(64, int(mbit_s * 2))}kb", "latency", "400ms"]
                _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *limit)
        yield [["ip", "netns", "exec", name] for name in names[:-1]]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def environment(rank: int, ranks: int) -> dict[str, str]:
    """What a process of a rank needs to find the others."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": address(0),
        "MASTER_PORT": "29400",  # in a namespace of its own every port is free
        "GLOO_SOCKET_IFNAME": INTERFACE,
    }


def run_ranks(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], limit_s: float) -> str:
    """Run one command for each rank; return what rank 0 has printed. Raises RuntimeError if one fails, and ends the others."""
    children = [
        subprocess.Popen(command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, extra in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [child.communicate(timeout=limit_s) for child in children]
    finally:
        for child in children:
            child.kill()
    failed = next((i for i, child in enumerate(children) if child.returncode), None)
    if failed is not None:
        raise RuntimeError(f"rank {failed}: {outputs[failed][1][-2000:]}")
    return outputs[0][0]
