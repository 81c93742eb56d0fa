"""Parquet in, Parquet out, over Ray Data: on one machine or many, and a restart does only what is missing."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.dataset
from pyarrow import fs

from distill.errors import DistillError

logger = logging.getLogger(__name__)
BATCH = 1024  # rows
CORE = 0.5  # that a worker asks Ray for: were all cores taken, nothing could be read or written
ROW_HASH = "row_hash"  # Ray's name of a row: of its file and its place there


def place_of(source: str) -> tuple[fs.FileSystem, str]:
    """A folder or file here, or at an address such as s3://bucket/folder."""
    try:
        return fs.FileSystem.from_uri(source if "://" in source else Path(source).resolve().as_uri())
    except (pyarrow.ArrowException, OSError) as error:
        raise DistillError(f"{source}: cannot be opened: {_one_line(error)}") from error


def columns_of(source: str) -> list[str]:
    """The columns of a Parquet file, or of a folder of them, here or at an address."""
    files, place = place_of(source)
    try:
        found = pyarrow.dataset.dataset(place, filesystem=files, format="parquet")
    except (pyarrow.ArrowException, OSError) as error:
        raise DistillError(f"{source}: no Parquet to read: {_one_line(error)}") from error
    if not found.schema.names:
        raise DistillError(f"{source}: no Parquet file in it; name a folder of .parquet files")
    return list(found.schema.names)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def map_parquet(
    source: str,
    output: str,
    notes: str,
    worker: type,
    arguments: tuple[Any, ...],
    id_column: str = ROW_HASH,
    on_gpu: bool = False,
    workers: int | None = None,
) -> None:
    """Have workers map the batches of Parquet files, and write what they give as Parquet files.

    An interrupted run goes on with the same call. Ray Data notes which rows have been written, and takes back
    a file that was not written to its end, so each row is written once.

    Args:
        source: a Parquet file, a folder of them, or an address.
        output: a folder, or an address.
        notes: where the rows that are done are noted; it goes when all are.
        worker: a class whose instances map a `pyarrow.Table` to another, which keeps the column `id_column`.
        arguments: of its constructor.
        id_column: names a row; that of Ray when left out.
        on_gpu: a worker takes a GPU for itself, else a core.
        workers: how many; one for each core, or GPU, when left out.

    Raises:
        DistillError: if Ray is not installed, or what a worker raised as one.
    """
    try:
        import ray
        from ray.data.checkpoint import CheckpointConfig
    except ModuleNotFoundError as error:
        raise DistillError("--engine ray: needs Ray: pip install 'distill-onnx[ray]'") from error
    files, place = place_of(output)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are about Ray's own workings
    warnings.filterwarnings("ignore", module="ray")
    ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    kind = "GPU" if on_gpu else "CPU"
    workers = workers or int(ray.cluster_resources().get(kind, 0))
    if not workers:
        raise DistillError("--engine ray: this cluster has no GPU; leave --provider cuda out")
    logger.info("Ray: %d workers on %d machines", workers, len(ray.nodes()))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.checkpoint_config = CheckpointConfig(
        id_column, notes, override_filesystem=files, delete_checkpoint_on_success=False
    )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised, too
    rows = ray.data.read_parquet(source, include_row_hash=id_column == ROW_HASH)
    mapped = rows.map_batches(
        worker,
        fn_constructor_args=arguments,
        batch_format="pyarrow",
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if on_gpu else CORE,
        num_gpus=1 if on_gpu else 0,
    )
    try:
        mapped.write_parquet(place, filesystem=files)
    except ray.exceptions.RayError as error:
        raise _as_ours(error) from error
    finally:
        context.checkpoint_config = None
    files.delete_dir(place_of(notes)[1])


def _as_ours(error: BaseException) -> BaseException:
    """What a worker raised for the user to act on, out of the text that Ray has wrapped around it."""
    found = re.findall(rf"{DistillError.__name__}: (.+)", str(error))
    return DistillError(found[-1].strip()) if found else error
