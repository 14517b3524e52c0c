"""What the server of the runs' processes imports, once: the worker, and with it torch, transformers and TRL.

Without torchao: where it is installed, PEFT imports it, and it asks the GPU what it can do as it is imported. That
initialises CUDA, which processes forked from the server cannot do again. A run that needs it imports it by itself. And
PyTorch asks the driver's library whether there is a GPU: where flash-attn is installed, transformers wants to know, and
the CUDA runtime's answer would be such an initialisation, too.
"""

import os

from packlib.lab.hidden import hidden

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

with hidden("torchao"):
    import packlib.lab.runs.worker  # noqa: F401
