"""Files that a reader sees whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", *, overwrite: bool = True) -> Iterator[IO[Any]]:
    """Open a file that appears as `path` when the block ends well, also when two processes write it or one is killed.

    The folder is made if missing. mode: `"w"` (UTF-8) or `"wb"`. Raises `FileExistsError` if the path exists, unless
    `overwrite`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.chmod(partial, 0o644)  # mkstemp's files are their owner's alone
        if overwrite:
            os.replace(partial, path)
        else:
            os.link(partial, path)  # fails where the name is taken, unlike a rename
    finally:
        Path(partial).unlink(missing_ok=True)
