"""Kernels that are forked from a server, which has imported everything once (`runs.forked`).

By itself each kernel imports torch, transformers and the studies, ten seconds of processor time, and the server of its
arms as much again. In a batch run one server starts every kernel and every arm. What a notebook sees is the same;
JupyterLab, and papermill without `reproduce`, start kernels as ever.
"""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess
from typing import IO, Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

from packlib.lab.runs import forked

PRELOAD = "packlib.lab.pages.warm"  # what the server imports


class ForkedKernelManager(AsyncKernelManager):
    """Starts its kernel from the server."""

    async def start_kernel(self, *, stderr: IO[str], **options: Any) -> None:  # type: ignore[override]
        """stderr: of the process, not of its cells. options: as for `AsyncKernelManager.start_kernel`."""
        self.provisioner = Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        await super().start_kernel(**options, stderr=stderr)


class Provisioner(LocalProvisioner):
    """What starts a kernel for its manager: here, by forking it."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        arguments = cmd[cmd.index("-f") :]
        output = options["stderr"].fileno() if options.get("stderr") else 2
        process = forked.start(_serve, arguments, preload=PRELOAD, output=output, environment=options["env"])
        self.process: Any = _Process(process)
        self.pid = self.pgid = process.pid
        return self.connection_info


class _Process:
    """What `LocalProvisioner` asks of a `subprocess.Popen`, of a process of multiprocessing."""

    stdin = stdout = stderr = None

    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        self.process.kill()

    def terminate(self) -> None:
        self.process.terminate()


def _serve(arguments: list[str]) -> None:
    """What a kernel does, in the process that was forked for it, until it is told to end."""
    from ipykernel.kernelapp import launch_new_instance

    os.setsid()  # Ctrl-C in a terminal is for `reproduce`, which then interrupts its kernel
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where who started the server ignores it
    launch_new_instance(arguments)
