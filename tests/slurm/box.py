"""A real Slurm with several nodes on one machine: munge, slurmctld, and a slurmd in namespaces of its own per node.

Every node has its own hostname, /etc/hosts and process tree, so that killing one process is the crash of a node.
Needs root, and the packages slurmctld, slurmd, slurm-client and munge. Nothing outside the box's folder is touched.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "srun", "munged", "unshare", "setpriv")
FREEZER = Path("/sys/fs/cgroup/freezer")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

CONF = """
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=box Nodes={names} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=25
PartitionName=urgent Nodes={names} MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing_programs() -> list[str]:
    """What a box needs and this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None] + ([] if os.geteuid() == 0 else ["root"])


class SlurmBox:
    """`with SlurmBox(folder, nodes=2) as box: box.sbatch(...)`. Nodes are PREFIX1, PREFIX2, ...; they claim `gpus` GPUs each."""

    def __init__(self, root: Path, nodes: int = 2, prefix: str = "node", gpus: int = 0) -> None:
        self.root, self.gpus = root.resolve(), gpus
        self.names = [f"{prefix}{number + 1}" for number in range(nodes)]
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        self.env["SLURM_CONF"] = str(self.root / "slurm.conf")
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmBox:
        for folder in (self.root, self.root / "ctld", self.root / "spool"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o755)
        self._write_files()
        self._start(
            "munged",
            "munged --force --foreground --key-file={0}/munge.key --socket={0}/munge.sock "
            "--pid-file={0}/munged.pid --log-file={0}/munged.log --seed-file={0}/munge.seed",
        )
        self._until(lambda: (self.root / "munge.sock").exists())
        self._start("slurmctld", "slurmctld -D")
        for name in self.names:
            self.boot(name)
        self._until(lambda: self.command("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == str(len(self.names)))
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._until(self._removed_cgroups)

    def _removed_cgroups(self) -> bool:
        """A crashed node leaves its cgroups, which can be removed once the kernel has ended what ran in them."""
        try:
            for name in self.names:
                for folder, _folders, _files in os.walk(FREEZER / f"slurm_{name}", topdown=False):
                    os.rmdir(folder)
        except OSError:
            return False
        return True

    def boot(self, name: str) -> None:
        """Starts a node."""
        self._start(name, f"mount --bind {{0}}/hosts /etc/hosts; hostname {name}; slurmd -D -N {name}")

    def crash(self, name: str) -> None:
        """Kills a node with everything that runs on it."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def command(self, *words: object, check: bool = True, **environment: str) -> str:
        """Runs a command of Slurm; gives what it prints."""
        done = subprocess.run(
            [str(word) for word in words], env={**self.env, **environment}, text=True, capture_output=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout + done.stderr

    def sbatch(self, *words: object, **environment: str) -> int:
        """Submits a script; gives its number."""
        return int(self.command("sbatch", "--parsable", *words, **environment).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What scontrol knows of a job."""
        fields = self.command("scontrol", "-o", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, number: int | str, states: tuple[str, ...] = ENDED, seconds: float = 240) -> dict[str, str]:
        """Waits for one of the states; gives the job's fields."""
        self._until(lambda: self.job(number)["JobState"] in states, seconds, number)
        return self.job(number)

    def rerun_now(self, number: int | str) -> None:
        """Does not wait the two minutes that Slurm holds a job back that was queued again."""
        self.wait(number, ("PENDING",))
        self.command("scontrol", "update", f"JobId={number}", "StartTime=now+2")

    def hosts(self, known: bool) -> None:
        """Whether nodes can resolve each other's names; in place, for it is mounted."""
        lines = [f"127.0.1.{number + 1} {name}\n" for number, name in enumerate(self.names)]
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines if known else []))

    def _write_files(self) -> None:
        root = self.root
        port, *ports = _free_ports(len(self.names) + 1)
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.1.{number + 1} Port={ports[number]} CPUs=128 RealMemory=2000000 "
            f"{f'Gres=gpu:{self.gpus}' if self.gpus else ''} State=UNKNOWN"
            for number, name in enumerate(self.names)
        )
        # As real clusters track processes: a signal reaches srun's direct children only.
        proctrack = "cgroup" if os.access(FREEZER / "cgroup.procs", os.W_OK) else "linuxproc"
        host, names = socket.gethostname().split(".")[0], ",".join(self.names)
        text = CONF.format(host=host, port=port, root=root, nodes=nodes, names=names, proctrack=proctrack)
        (root / "slurm.conf").write_text(text)
        for number in range(self.gpus):  # character devices, as Slurm insists on
            path = root / f"nvidia{number}"
            if not path.exists():
                os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        if self.gpus:
            (root / "gres.conf").write_text(f"NodeName={names} Name=gpu File={root}/nvidia[0-{self.gpus - 1}]\n")
        (root / "cgroup.conf").write_text("CgroupMountpoint=/sys/fs/cgroup\n")
        self.hosts(known=True)
        (root / "munge.key").touch(0o600)
        (root / "munge.key").write_bytes(os.urandom(128))

    def _start(self, name: str, script: str) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        with (self.root / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                [*command, "--mount-proc", "--", "bash", "-c", script.format(self.root) + " & wait"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.env,
                cwd="/",
                start_new_session=True,
            )

    def _until(self, ready, seconds: float = 30, job: int | str | None = None) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = [*self.root.glob("*.out"), *self.root.glob("*.log")] if job is None else []
                told = "\n".join(f"{path.name}\n{path.read_text()[-2000:]}" for path in logs)
                raise TimeoutError(told or str(self.job(job)))
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
