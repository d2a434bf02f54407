"""`python -m tandem_router` as a process of its own, which a test may kill."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any


@asynccontextmanager
async def router_process(
    folder: Path, config: dict[str, Any], **files: Path
) -> AsyncIterator[tuple[str, Any]]:
    """(base URL, process) once it serves. files: options of the command, with `_` for `-`."""
    (folder / "router.json").write_text(json.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--{name.replace('_', '-')}={path}" for name, path in files.items()]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tandem_router", "--config", str(folder / "router.json")),
        *("--port", str(port), "--host", "127.0.0.1", *options),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        said = b""
        async with asyncio.timeout(30):
            while b"running on" not in said:
                line = await process.stderr.readline()
                assert line, f"the router ended before it served: {said.decode()}"
                said += line
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
