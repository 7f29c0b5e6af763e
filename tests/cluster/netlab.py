"""Several Linux hosts on one machine, for programs that span hosts.

A host is a set of namespaces (network, host name, mounts, processes, IPC) with its own address, /tmp and /dev/shm. A
bridge in a namespace of its own joins them: nothing is added to the machine's network, and no packet leaves it.

    with NetLab(Path("/tmp/lab"), bind=[venv, repository]) as lab:
        lab.boot("a")
        lab.run("a", "hostname")
        lab.power_off("a")  # every process there dies at once
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

# PID 1 of a host: sets it up, then reaps orphans for ever. Folders below /tmp that all hosts are to see are mounted
# back below the host's own /tmp.
INIT = r"""
set -eu
mount --make-rprivate /
hostname "$NAME"
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount --bind "$LAB/hosts" /etc/hosts
mkdir -p "$LAB/$NAME/tmp"; chmod 1777 "$LAB/$NAME/tmp"
for path in $BINDS; do
  case "$path" in /tmp/*) mkdir -p "$LAB/$NAME$path"; mount --bind "$path" "$LAB/$NAME$path";; esac
done
mount --rbind "$LAB/$NAME/tmp" /tmp
touch "$LAB/$NAME/ready"
trap 'exit 0' TERM
while :; do sleep 3600 & wait $!; done
"""


class NetLab:
    """Hosts by name; within `with` they run.

    Args:
        root: A folder for the lab, short, seen by all hosts.
        bind: More folders that all hosts see.
        env: Of all that runs there, beside ours.
    """

    tools: tuple[str, ...] = ("ip", "unshare", "nsenter", "setpriv")
    subnet = "10.77.0"

    def __init__(self, root, bind=(), env=None):
        self.root = Path(root)
        self.switch = f"{self.root.name}-sw"
        self.bind = [str(self.root), *map(str, bind)]
        self.env = os.environ | (env or {})
        self.address: dict[str, str] = {}
        self.init: dict[str, int] = {}  # PID 1 of each host, as seen from here
        self.processes: list[subprocess.Popen] = []

    @classmethod
    def missing(cls):
        """Why there can be no such lab here; "" where there can."""
        if sys.platform != "linux":
            return "needs Linux"
        if os.geteuid() != 0:
            return "needs root, for network, mount and process namespaces"
        absent = [tool for tool in cls.tools if not shutil.which(tool)]
        if absent:
            return f"not installed: {', '.join(absent)}"
        probe = subprocess.run(
            ["unshare", "-n", "-m", "-u", "-p", "-i", "-f", "true"], capture_output=True, check=False
        )
        return f"namespaces are refused: {probe.stderr.decode().strip()}" if probe.returncode else ""

    def __enter__(self):
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_):
        self.down()

    def up(self):
        for name in ("log", "shared"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        self._write_hosts()
        command("ip", "netns", "add", self.switch)
        command("ip", "-n", self.switch, "link", "add", "br0", "type", "bridge")
        command("ip", "-n", self.switch, "link", "set", "br0", "up")

    def down(self):
        for host in list(self.init):
            self.power_off(host)
        for process in self.processes:
            process.wait(timeout=20)
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True, check=False)

    def boot(self, host):
        """Make a host's namespaces and plug it in; it dies with the thread that called this."""
        if host not in self.address:
            self.address[host] = f"{self.subnet}.{10 + len(self.address)}"
            self._write_hosts()
        ready = self.root / host / "ready"
        ready.parent.mkdir(exist_ok=True)
        ready.unlink(missing_ok=True)
        env = self.env | {"NAME": host, "LAB": str(self.root), "BINDS": " ".join(self.bind)}
        apart = ["unshare", "-n", "-u", "-m", "-i", "-p", "-f", "--mount-proc", "--kill-child", "bash", "-c", INIT]
        with open(self.root / "log" / f"{host}.boot", "ab") as log:
            outer = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *apart], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.processes.append(outer)
        wait_for(lambda: ready.exists() or outer.poll() is not None, 20, f"{host} does not boot")
        pid = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()[0])
        self.init[host] = pid
        port = self._port(host)
        subprocess.run(["ip", "-n", self.switch, "link", "del", port], capture_output=True, check=False)  # of before
        peer = ["type", "veth", "peer", "name", "eth0", "netns", str(pid)]
        command("ip", "-n", self.switch, "link", "add", port, *peer)
        command("ip", "-n", self.switch, "link", "set", port, "master", "br0", "up")
        address = f"ip addr add {self.address[host]}/24 dev eth0"
        self.run(host, "sh", "-c", f"ip link set lo up; {address}; ip link set eth0 up")

    def enter(self, host):
        """The beginning of a command that runs on a host."""
        return ["nsenter", "-t", str(self.init[host]), "-m", "-u", "-i", "-n", "-p", "--"]

    def run(self, host, *words, check=True, timeout=120, env=None, **options):
        """Run a command on a host to its end; what it prints is captured."""
        if "input" not in options:
            options["stdin"] = subprocess.DEVNULL
        done = subprocess.run(
            [*self.enter(host), *map(str, words)],
            env=self.env | (env or {}),
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )
        assert not check or done.returncode == 0, f"{words} on {host}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def spawn(self, host, *words, log, env=None):
        """Start a command on a host; what it prints goes to a file."""
        with open(log, "ab") as out:
            process = subprocess.Popen(
                [*self.enter(host), *map(str, words)],
                env=self.env | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.processes.append(process)
        return process

    def power_off(self, host):
        """Kill PID 1 of a host; the kernel kills all others there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init.pop(host), signal.SIGKILL)

    def link(self, host, up):
        """Plug a host in, or unplug it."""
        command("ip", "-n", self.switch, "link", "set", self._port(host), "up" if up else "down")

    def _port(self, host):
        return f"p{self.address[host].rpartition('.')[2]}"

    def _write_hosts(self):  # in place: running hosts have this very file mounted
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.address.items())]
        (self.root / "hosts").write_text("\n".join(lines) + "\n")


def command(*words):
    """Run a command of the machine; its error is in the exception."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def wait_for(holds, seconds, what):
    """Wait until something holds, and return its value. To look, by a command perhaps, takes a tenth of the time."""
    deadline = time.monotonic() + seconds
    while True:
        looked = time.monotonic()
        if value := holds():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(what() if callable(what) else what)
        time.sleep(max(0.05, 9 * (time.monotonic() - looked)))
