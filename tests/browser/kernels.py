"""JupyterLab's kernels forked from one server (`pages.kernel`): ten notebooks import torch once, not ten times.

People's JupyterLab starts kernels as ever, so that a restart sees what they edited in packlib; nothing else differs.
"""

from multiprocessing import forkserver
from typing import Any

from jupyter_server.services.kernels.kernelmanager import ServerKernelManager

from packlib.lab.pages import kernel
from packlib.lab.runs import forked

forked.context.set_forkserver_preload([kernel.PRELOAD])
forkserver.ensure_running()  # it imports while JupyterLab starts


class ForkedKernelManager(ServerKernelManager):
    """What `--MappingKernelManager.kernel_manager_class` takes."""

    async def start_kernel(self, *arguments: Any, **options: Any) -> Any:
        self.provisioner = kernel.Provisioner(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
        return await super().start_kernel(*arguments, **options)
