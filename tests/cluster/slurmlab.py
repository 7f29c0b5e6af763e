"""A real Slurm on the hosts of a NetLab: slurmctld on the host login, a slurmd on each of its nodes.

Of Debian's packages munge, slurmctld, slurmd and slurm-client; nothing in /etc is read or written. A job put back into
the queue waits there for as long as credentials live, here 20 seconds, by default 120: started earlier, by `scontrol
update`, some fail, "Job credential revoked".
"""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from tests.cluster.netlab import NetLab, wait_for

CONF = """\
ClusterName={name}
SlurmctldHost=login({login})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/tmp/munge.sock,cred_expire=20
CredType=cred/munge
StateSaveLocation={root}/state
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/state/slurmd.%n.pid
SlurmdSpoolDir={root}/spool/%n
ProctrackType=proctrack/cgroup
TaskPlugin=task/cgroup
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={memory_per_cpu}
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
GresTypes=gpu
"""


class SlurmLab(NetLab):
    """A Slurm cluster; within `with` its nodes are idle.

    Args:
        root, bind: As of NetLab.
        nodes, cpus, memory: How many, and of each how many cores and MB it says to have.
        gpus: Of each node; Slurm gives them out, they are no GPUs.
    """

    tools = (*NetLab.tools, "munged", "slurmctld", "slurmd", "srun", "sbatch")

    def __init__(self, root, nodes=3, cpus=1, memory=4000, gpus=0, bind=()):
        super().__init__(root, bind, {"SLURM_CONF": f"{root}/slurm.conf"})
        # Slurm names control groups, which are the machine's, by nodes: another lab beside this one has others.
        self.nodes = [f"node{os.getpid()}-{k + 1}" for k in range(nodes)]
        self.address = {name: f"{self.subnet}.{10 + k}" for k, name in enumerate(["login", *self.nodes])}
        self.cpus, self.memory, self.gpus = cpus, memory, gpus

    def up(self):
        super().up()
        for name in ("state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.root / name).mkdir(exist_ok=True)
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._configure()
        self.boot("login")
        self._daemons("login", "slurmctld", "-D", "-i", "-c")
        for node in self.nodes:
            self.boot_node(node)
        self.idle()

    def boot_node(self, node):
        """Switch a node on, at first or again."""
        self.boot(node)
        self._daemons(node, "slurmd", "-D", "-N", node)

    def idle(self, seconds=60):
        """Wait until all nodes are."""

        def all_are():
            told = self.run("login", "sinfo", "-h", "-t", "idle", "-o", "%D", check=False)
            return told.stdout.strip() == str(len(self.nodes))

        wait_for(all_are, seconds, lambda: self.run("login", "sinfo", "-N", check=False).stdout)

    def jobs(self):
        """State by id of the jobs that are waiting or running."""
        told = self.run("login", "squeue", "-h", "-o", "%A %T").stdout
        return dict(line.split() for line in told.splitlines())

    def down(self):
        super().down()
        for node in self.nodes:  # what proctrack/cgroup leaves behind
            for top in Path("/sys/fs/cgroup").glob(f"*/slurm_{node}"):
                for path, _, _ in os.walk(top, topdown=False):
                    with contextlib.suppress(OSError):
                        Path(path).rmdir()

    def _daemons(self, host, *slurm):
        own = self.root / host
        files = {"pid": f"{own}/munged.pid", "seed": f"{own}/munged.seed", "log": f"{own}/munged.log"}
        options = [f"--{kind}-file={path}" for kind, path in files.items()]
        self.run(host, "munged", f"--key-file={self.root}/munge.key", "--socket=/tmp/munge.sock", *options)
        self.spawn(host, *slurm, log=self.root / "log" / f"{host}.{slurm[0]}")

    def _configure(self):
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainRAMSpace=yes\n")
        for k in range(self.gpus):  # Slurm wants a device each
            os.mknod(self.root / f"gpu{k}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        devices = "".join(f"Name=gpu File={self.root}/gpu{k}\n" for k in range(self.gpus))
        (self.root / "gres.conf").write_text(devices)
        conf = CONF.format(
            name=self.root.name,
            login=self.address["login"],
            root=self.root,
            memory_per_cpu=self.memory // self.cpus,
        )
        has = f"CPUs={self.cpus} RealMemory={self.memory}" + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
        for node in self.nodes:
            conf += f"NodeName={node} NodeAddr={self.address[node]} {has} State=UNKNOWN\n"
        conf += "PartitionName=main Nodes=ALL Default=YES OverSubscribe=YES MaxTime=INFINITE State=UP\n"
        (self.root / "slurm.conf").write_text(conf)
