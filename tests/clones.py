"""Clones of this repository for the tests, and commands run in them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def environment():
    """Of a command: ours, less what would change what it does. One thread, as other tests run beside it: threads that
    wait for a core make a step five times as long; so a cluster of its own has a core for each worker, and no more."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "RAY_", "DVC_", "GIT_"))}
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | who | {"PATH": path, "OMP_NUM_THREADS": "1"}


def run(*command, cwd, **variables):
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    return done


def repository(folder):
    """This working tree, committed in a new repository."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("dvc.lock"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "clone"]):
        assert run("git", *command, cwd=folder).returncode == 0
    return folder
