"""Starting programs by torchrun, on the CPU, without a network, and never for longer than a limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRACE = 20
"""Seconds that torchrun gets to end its processes."""


def torchrun(processes: int, script: Path, *arguments: str, limit: int = 120) -> tuple[int, str]:
    """Run a script in several processes.

    Returns
    -------
    (int, str)
        Exit status and all output.

    Raises
    ------
    TimeoutError
        With the output, if it takes longer than ``limit`` seconds; nothing runs on then.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "",  # the script's folder has modules that it imports
        "TQDM_DISABLE": "1",
    }
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    started = subprocess.Popen(
        [*program, "--nproc-per-node", str(processes), str(script), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = started.communicate(timeout=limit)
    except subprocess.TimeoutExpired as error:
        started.send_signal(signal.SIGTERM)  # torchrun ends its processes then
        try:
            output, _ = started.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            started.kill()
            output, _ = started.communicate()
        raise TimeoutError(f"{script.name} took longer than {limit} s:\n{output}") from error
    return started.returncode, output
