"""Parquet in, Parquet out, over Ray Data: on one machine or many, and a restart does only what is missing."""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import datasets
import pyarrow
import pyarrow.dataset
from pyarrow import fs

from distill.errors import DistillError
from distill.files import SUFFIXES
from distill.runtime import cores

logger = logging.getLogger(__name__)
BATCH = 1024  # rows
PARTS = 16  # that each worker does of the rows, so that none is idle for long at the end; one file each
SMALLEST_PART, LARGEST_PART = BATCH, 64 * BATCH  # rows
ROW_HASH = "row_hash"  # Ray's name of a row: of its file and its place there
BOOKED = 0.5  # CPUs by a worker, and to read and to write
BESIDE = 3  # CPUs that Ray books beside the workers: to pass over what is done and to cut the rest, one each


def place_of(source: str) -> tuple[fs.FileSystem, str]:
    """A folder or file here, or at an address such as s3://bucket/folder."""
    try:
        return fs.FileSystem.from_uri(source if "://" in source else Path(source).resolve().as_uri())
    except (pyarrow.ArrowException, OSError) as error:
        raise DistillError(f"{source}: cannot be opened: {one_line(error)}") from error


def fetch(source: str) -> Path:
    """Copy the files with texts at an address into the cache of datasets, once; gives their folder.

    Raises:
        DistillError: if there are none, or they cannot be read.
    """
    files, place = place_of(source)
    try:
        given = files.get_file_info(place)
        several = given.type == fs.FileType.Directory
        found = [
            one
            for one in (files.get_file_info(fs.FileSelector(place)) if several else [given])
            if one.type == fs.FileType.File and Path(one.path).suffix.lower() in SUFFIXES
        ]
        if not found:
            raise DistillError(f"{source}: no file with text in it; name {', '.join(SUFFIXES)}")
        identity = [(one.path, one.size, one.mtime_ns) for one in found]
        name = hashlib.sha256(json.dumps([source, identity]).encode()).hexdigest()[:16]
        folder = Path(datasets.config.HF_DATASETS_CACHE, "distill", name)
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = Path(mkdtemp(dir=folder.parent))
            for one in found:
                fs.copy_files(one.path, str(unfinished / one.base_name), files, fs.LocalFileSystem())
            try:
                unfinished.rename(folder)
            except OSError:  # another process was faster
                shutil.rmtree(unfinished)
    except (pyarrow.ArrowException, OSError) as error:
        raise DistillError(f"{source}: cannot be read: {one_line(error)}") from error
    return folder


def open_parquet(source: str) -> Any:
    """A Parquet file, or a folder of them, here or at an address, as a `pyarrow.dataset.Dataset`.

    Raises:
        DistillError: if there is none, or a file is damaged.
    """
    files, place = place_of(source)
    try:
        found = pyarrow.dataset.dataset(place, filesystem=files, format="parquet")
        for fragment in found.get_fragments():
            fragment.ensure_complete_metadata()
    except (pyarrow.ArrowException, OSError) as error:
        raise DistillError(f"{source}: no Parquet to read: {one_line(error)}") from error
    if not found.files:
        raise DistillError(f"{source}: no Parquet file in it; name a folder of .parquet files")
    return found


def one_line(error: BaseException) -> str:
    """What an error says, short."""
    return " ".join(str(error).split())[:200]


@dataclass(frozen=True)
class Workers:
    """Workers of Ray: how many, whether each has a GPU, and whether Ray was started for them."""

    count: int
    on_gpu: bool
    own: bool


def start_ray(on_gpu: bool, workers: int | None) -> Workers:
    """Start Ray, or join the cluster that RAY_ADDRESS names.

    Args:
        on_gpu: a worker takes a GPU for itself, else a core.
        workers: how many; one for each core, or GPU, when left out.

    Raises:
        DistillError: if Ray is not installed, there is no GPU, or the cluster is too small.
    """
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise DistillError("--engine ray: needs Ray: pip install 'distill-onnx[ray]'") from error
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its warnings are about Ray's own workings
    warnings.filterwarnings("ignore", module="ray")
    local, own = not os.environ.get("RAY_ADDRESS"), not ray.is_initialized()
    if own:
        # On one machine Ray gets more to book than there is: with all of it booked the run would stand still.
        where = {"address": "local", "num_cpus": cores() + BESIDE} if local else {}
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            named = "Ray cannot be started" if local else f"no cluster at {os.environ['RAY_ADDRESS']}"
            raise DistillError(f"--engine ray: {named}: {one_line(error)}") from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised, too
    resources = ray.cluster_resources()
    cpus, gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    if on_gpu and not gpus:
        raise DistillError("--engine ray: this cluster has no GPU to work on")
    if cpus <= BESIDE:
        raise DistillError(f"--engine ray: a cluster of {cpus} CPUs, of which a restart can take {BESIDE}; "
                           f"give it at least {BESIDE + 1}")  # fmt: skip
    room = gpus if on_gpu else min(cores() if local else cpus, int((cpus - BESIDE) / BOOKED))
    count = min(workers or room, room)
    logger.info("Ray: %d workers on %d machines", count, len(ray.nodes()))
    return Workers(count, on_gpu, own)


def stop_ray(workers: Workers) -> None:
    """Give back what Ray holds, a third of the memory among it, unless it was there before."""
    if workers.own:
        import ray

        ray.shutdown()


def map_parquet(
    source: str,
    output: str,
    notes: str,
    worker: type,
    arguments: tuple[Any, ...],
    workers: Workers,
    id_column: str = ROW_HASH,
) -> None:
    """Have workers map the batches of Parquet files, and write what they give as Parquet files.

    An interrupted run goes on with the same call. Ray Data notes which rows have been written, and takes back
    a file that was not written to its end, so each row is written once. The notes are left to the caller, who
    removes them when nothing can be interrupted any more.

    Args:
        source: a Parquet file, a folder of them, or an address.
        output: a folder, or an address.
        notes: where the rows that are done are noted.
        worker: a class whose instances map a `pyarrow.Table` to another, which keeps the column `id_column`.
        arguments: of its constructor.
        workers: of `start_ray`.
        id_column: names a row; that of Ray when left out.

    Raises:
        DistillError: what a worker raised as one, or that a file cannot be read or written.
    """
    import ray
    from ray.data.checkpoint import CheckpointConfig

    files, place = place_of(output)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.checkpoint_config = CheckpointConfig(
        id_column, place_of(notes)[1], override_filesystem=files, delete_checkpoint_on_success=False
    )
    try:
        rows = ray.data.read_parquet(source, include_row_hash=id_column == ROW_HASH, num_cpus=BOOKED)
        # Without this, Ray would make one part of small files: work for one worker, written at the very end.
        part = open_parquet(source).count_rows() // (PARTS * workers.count)
        rows = rows.repartition(target_num_rows_per_block=min(max(part, SMALLEST_PART), LARGEST_PART))
        mapped = rows.map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_format="pyarrow",
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=workers.count),
            num_cpus=0 if workers.on_gpu else BOOKED,
            num_gpus=1 if workers.on_gpu else 0,
        )
        mapped.write_parquet(place, filesystem=files, ray_remote_args={"num_cpus": BOOKED})
    except (ray.exceptions.RayError, pyarrow.ArrowException, OSError) as error:
        raise _as_ours(error) from error
    finally:
        context.checkpoint_config = None


def _as_ours(error: BaseException) -> DistillError:
    """What a worker raised for the user to act on, out of the text that Ray has wrapped around it."""
    found = re.findall(rf"{DistillError.__name__}: (.+)", str(error))
    if found:
        return DistillError(found[-1].strip())
    last = [line for line in str(error).splitlines() if line.strip()][-1:] or [type(error).__name__]
    return DistillError(f"--engine ray: {last[0].strip()[:300]}; the same call goes on with what is missing")
