"""Trains a predictor from the labels of a shared store, where the routers asked for it.

`python -m tandem_router.quality.retraining.job --store-url-file FILE --run ID` runs in the routers'
image as a Job of the cluster: it reads labels, trains, and leaves artifact and result in the store.
What goes wrong is left there too, so that the routers can tell it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tandem_router.predictor import PredictorError, load
from tandem_router.quality.retraining.archive import (
    STATE,
    keep_artifact,
    keep_result,
    read_json,
)
from tandem_router.quality.retraining.training import Train, train_apart, usable, write_rows
from tandem_router.store.postgres import PostgresStore
from tandem_router.store.records import Backend, StoreError


async def train_once(backend: Backend, run: str, data: Path | None, train: Train) -> str:
    """Why there is no new predictor; empty where there is one."""
    state = await read_json(backend, STATE)
    if state is None or state.get("run") != run:
        return f"training {run} is not wanted any more"
    # The labels after `since` are those that the routers compare on.
    changed_at, since = float(state["changed_at"]), float(state["since"])
    labels = [one for one in await backend.labels(changed_at) if usable(one)]
    labels = [one for one in labels if changed_at < one.at <= since]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            rows = write_rows(folder, labels, data if changed_at == 0.0 else None)
            problem = await train([rows], folder / "fresh")
            if not problem:
                version = load(folder / "fresh").version
        except (OSError, PredictorError) as error:
            problem = str(error)
        if problem:
            await keep_result(backend, run, {"problem": problem[:500]})
            return problem
        await keep_artifact(backend, folder / "fresh", version)
        await keep_result(backend, run, {"version": version, "num_labels": len(labels)})
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store-url-file", type=Path, required=True)
    parser.add_argument("--run", required=True, help="the training that the routers asked for")
    parser.add_argument("--training-data", type=Path, help="graded rows beside the labels")
    args = parser.parse_args(argv)

    async def run() -> str:
        backend = PostgresStore(args.store_url_file.read_text().strip(), max_decisions=1)
        try:
            return await train_once(backend, args.run, args.training_data, train_apart)
        finally:
            await backend.close()

    try:
        problem = asyncio.run(run())
    except (OSError, StoreError, ValueError, KeyError) as error:
        problem = str(error)
    if problem:
        sys.stderr.write(f"error: {problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
