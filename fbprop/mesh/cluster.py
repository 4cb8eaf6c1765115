"""What a cluster did not say about its processes, where JAX finds none by itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Set for every process that srun starts; in a batch script itself those of the step are missing.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
TPU_HOSTS = ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")


def unsaid(environment: Mapping[str, str] = os.environ) -> str:
    """A sentence about the variables that are missing."""
    gone = [name for name in SLURM if name not in environment]
    if gone and "SLURM_JOB_ID" in environment:
        return (
            "Slurm tells a process of a run its place in it, got SLURM_JOB_ID without "
            f"{', '.join(gone)}; expected all of them, which srun sets: start the program with "
            "srun python, not python alone."
        )
    if any(name in environment for name in TPU_HOSTS):
        if not environment.get("TPU_WORKER_ID", "").isdigit():
            return (
                "GKE tells a process its number, got the names of the hosts and TPU_WORKER_ID="
                f"{environment.get('TPU_WORKER_ID')!r} expected a number: ask for TPUs by a Job "
                "or JobSet, which sets it, or set it for every host."
            )
        return (
            "Hosts of TPUs are joined where TPUs are, got the names of the hosts and no TPU or no "
            "libtpu; expected both: pip install 'jax[tpu]'."
        )
    if "KUBERNETES_SERVICE_HOST" in environment:
        return (
            "Kubernetes is asked about a job's processes by the package kubernetes, got none that "
            "is installed; expected it: pip install 'jax[k8s]', or give mesh.start the arguments."
        )
    return (
        "A cluster says which processes there are, got none that JAX knows; expected Slurm, "
        "Open MPI, GKE or Cloud TPUs: elsewhere mesh.start('10.0.0.1:1234', processes=2, "
        "process=0), and process=1 there."
    )
