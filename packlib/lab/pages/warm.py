"""What the server of kernels imports, once: all that notebooks and their arms do."""

import packlib.lab.runs.preload  # noqa: F401  # first: it hides what must not be imported

# isort: split
import ipykernel.kernelapp  # noqa: F401

from packlib.lab.pages import notebook  # noqa: F401
from packlib.lab.studies import (  # noqa: F401
    convergence,
    isolation,
    kernels,
    memory,
    paper,
    parity,
    planning,
    roofline,
    table_1,
    teaching,
    throughput,
    waste,
)
