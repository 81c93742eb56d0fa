"""How much memory a training takes, and how to cut its batches so that it fits."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from distill.errors import DistillError
from distill.models import PRECISIONS

logger = logging.getLogger(__name__)
MARGIN = 0.9  # of what is free; the rest is for the allocator's gaps and the kernels' own space
STATE = {"adamw": 8, "adamw_8bit": 2}  # bytes of optimizer state a trained number
COMFORT = 8  # texts in a micro-batch below which recomputation costs less time than smaller batches


@dataclass(frozen=True)
class Footprint:
    """What training a model takes, in bytes.

    Attributes:
        weights: of all parameters and buffers.
        trained: how many numbers are trained.
        fixed: kept for the backward pass whatever the batch: weights cast by autocast.
        text: kept for the backward pass for each text.
        layer: of `text`, what one layer keeps.
        outside: of `text`, what is kept when every layer is computed again in the backward pass.
    """

    weights: int
    trained: int
    fixed: int
    text: int
    layer: int
    outside: int

    def peak(
        self, micro_batch: int, accumulation: int = 1, recompute: bool = False, optimizer: str = "adamw"
    ) -> int:
        """Bytes in use at the fullest moment of a step.

        That is the end of a forward pass, when all is kept for the backward pass, or the end of the backward
        pass, when all gradients are there. Gradients of earlier micro-batches are there in both.
        """
        gradients = 4 * self.trained
        text = self.outside + self.layer if recompute else self.text
        kept = self.fixed + micro_batch * text
        moment = gradients + kept if accumulation > 1 else max(gradients, kept)
        return self.weights + STATE[optimizer] * self.trained + moment


@dataclass(frozen=True)
class Plan:
    """How a step is cut: `micro_batch` texts at a time, `accumulation` times."""

    micro_batch: int
    accumulation: int
    recompute: bool = False
    optimizer: str = "adamw"
    peak: int = 0


def measure(model: Any, length: int, precision: str) -> Footprint:
    """Measure a footprint by two forward passes, of one and of two texts of `length` tokens.

    Args:
        model: a sequence classifier, on the device where it will be trained.
        length: of the longest text, in tokens.
        precision: "fp32", "bf16" or "fp16" (autocast).
    """
    weights = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    training = model.training
    model.train()
    one, two = (_kept(model, texts, length, precision) for texts in (1, 2))
    text = two - one
    outside, layer = text, 0
    if getattr(model, "supports_gradient_checkpointing", False):
        with _recomputing(model):
            outside = max(0, _kept(model, 2, length, precision) - _kept(model, 1, length, precision))
        layer = max(0, text - outside) // max(1, int(getattr(model.config, "num_hidden_layers", 1)))
    model.train(training)
    return Footprint(weights, trained, max(0, one - text), text, layer, outside)


def _kept(model: Any, texts: int, length: int, precision: str) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside the parameters themselves."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being given again

    device = model.device
    ids = torch.arange(texts * length, device=device).reshape(texts, length) % model.config.vocab_size
    autocast = torch.autocast(device.type, PRECISIONS[precision]) if precision != "fp32" else nullcontext()
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one), autocast:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    del output
    return sum(storage.nbytes() for storage in kept.values())


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def plan(footprint: Footprint, batch_size: int, accumulation: int, recompute: bool, limit: int) -> Plan:
    """The fastest way to take a step of `batch_size` texts, `accumulation` times, within `limit` bytes.

    First whole batches, then smaller ones down to 8 texts; then with each layer computed again in the
    backward pass, then with an 8-bit optimizer where bitsandbytes is installed; then down to single texts.

    Args:
        footprint: of `measure`.
        batch_size: texts a step.
        accumulation: steps of the kind before the optimizer's.
        recompute: recompute in any case.
        limit: bytes that there are.

    Raises:
        DistillError: if a single text does not fit.
    """
    optimizers = ["adamw", *(["adamw_8bit"] if find_spec("bitsandbytes") else [])]
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    for smallest in (COMFORT, 1):
        for optimizer in optimizers:
            for again in (True,) if recompute else (False, True):
                for size in sizes:
                    if size < min(smallest, batch_size):
                        continue
                    times = accumulation * batch_size // size
                    peak = footprint.peak(size, times, again, optimizer)
                    if peak <= limit:
                        return Plan(size, times, again, optimizer, peak)
    least = footprint.peak(1, accumulation * batch_size, True, optimizers[-1]) / 2**30
    raise DistillError(
        f"--model: training it takes {least:.1f} GiB even one text at a time, and {limit / 2**30:.1f} GiB "
        "are free; use --lora or --qlora, a smaller --max-length, or a smaller model"
    )


def smaller(before: Plan, title: str) -> Plan:
    """Half the texts at a time, or fewer, twice as often.

    Raises:
        DistillError: if it was one text at a time.
    """
    if before.micro_batch == 1:
        raise DistillError(
            f"{title}: out of memory with one text at a time; use --gradient-checkpointing, --lora or "
            "--qlora, a smaller --max-length, or a smaller model"
        )
    size = next(size for size in range(before.micro_batch // 2, 0, -1) if before.micro_batch % size == 0)
    return replace(before, micro_batch=size, accumulation=before.accumulation * before.micro_batch // size)


def available(device: str) -> int | None:
    """Bytes of the GPU that a training may use beside what is there already; None on a CPU."""
    if device != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(MARGIN * (free + unused))
