"""Training in several processes, as `torchrun` and `accelerate launch` start them: who does what when."""

import atexit
import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from distill.errors import DistillError

Result = TypeVar("Result")
TOLD = "told by the first process"
PATIENCE = timedelta(hours=24)  # one process may read data, time students or write while the others wait


_joined = False


def launched() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count() -> int:
    """How many processes have met to train together; what they start themselves, as Ray does, has not."""
    return launched() if _joined else 1


def rank() -> int:
    """This one's number; 0 is the one that writes and talks."""
    return int(os.environ.get("RANK", "0"))


def join(device: str) -> None:
    """Meet the others, before anything is decided together; nothing happens where there are none.

    Args:
        device: "auto", "cpu" or "cuda": gloo connects processes on CPUs, NCCL those on GPUs, one GPU each.

    Raises:
        DistillError: if the launcher sets up DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        raise DistillError(
            "accelerate launch: DeepSpeed is not supported; for a teacher that does not fit a GPU take "
            "--use_fsdp --fsdp_version 2"
        )
    if launched() == 1:
        return
    global _joined
    import torch
    from accelerate import PartialState

    _joined = True
    if not torch.distributed.is_initialized():
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        PartialState(cpu=on_cpu, timeout=PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)


def once(function: Callable[[], Result]) -> Result:
    """Have the first process call a function; all get what it gives, or raises, as soon as it is done."""
    if count() == 1:
        return function()
    import torch

    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = _told(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def ahead(function: Callable[[], Result]) -> Result:
    """Have the first process call a function, and then, unless it raised, every other one."""
    found: list[Result] = []
    once(lambda: found.append(function()))
    return found[0] if found else function()


def _told(error: Exception) -> Exception:
    """An error that can be sent to the other processes, and that these need not tell again."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = DistillError(str(error))
    error.add_note(TOLD)
    return error


def is_told(error: BaseException) -> bool:
    """Whether the first process tells this error."""
    return rank() > 0 and TOLD in getattr(error, "__notes__", [])


def gather(part: Result) -> list[Result]:
    """What every process has, in the order of their numbers."""
    if count() == 1:
        return [part]
    import torch

    parts: list[Any] = [None] * count()
    torch.distributed.all_gather_object(parts, part)
    return parts
