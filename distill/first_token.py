"""Leave out of a PyTorch classifier what it never reads: in the last layer, every token but the first.

A classifier that pools by the first token reads one row of the last hidden states. That row needs one query
of the last attention, with the keys and values of all tokens, and what follows works on each token by itself.
benchmarks/training.py measures what that saves; export/pooling.py does the same to the ONNX graph.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

logger = logging.getLogger(__name__)
# Encoders whose attention takes its queries from one place and its keys and values from another unchanged.
FAMILIES = ("bert", "camembert", "electra", "ernie", "roberta", "xlm-roberta")
TOLERANCE = 1e-4  # of the largest logit


@contextmanager
def first_token_only(model: Any) -> Iterator[bool]:
    """Within it, the last layer of `model` computes the first token alone; the logits stay the same.

    Tells whether it does: a decoder, an encoder of another family than `FAMILIES`, or one that pools in
    another way (found by comparing logits), is left as it is.
    """
    attention = _last_attention(model)
    if attention is None:
        yield False
        return
    expected = _trial(model)
    hook = attention.register_forward_pre_hook(_query_first, with_kwargs=True)
    of_itself, of_others = type(attention.self), _of_others(attention.self)
    attention.self.__class__ = of_others

    def undo() -> None:
        hook.remove()
        attention.self.__class__ = of_itself

    try:
        same = bool((expected - _trial(model)).abs().max() <= TOLERANCE * expected.abs().max())
        if not same:
            undo()
        logger.debug("The last layer computes %s", "the first token alone" if same else "all tokens")
        yield same
    finally:
        undo()


def _last_attention(model: Any) -> Any:
    """The last layer's attention module, where it can attend to other states than its own."""
    config = model.config
    relative = getattr(config, "position_embedding_type", "absolute") != "absolute"
    if config.model_type not in FAMILIES or config.is_decoder or relative:
        return None
    attention = model.base_model.encoder.layer[-1].attention
    # In a model in half its size the trial would run into two types, outside of autocast.
    return attention if attention.self.query.weight.dtype == torch.float32 else None


def _of_others(attention: Any) -> type:
    """The class of an attention to other states; transformers 5 has one of its own, with the same weights."""
    kind = type(attention)
    name = kind.__name__.replace("SelfAttention", "CrossAttention")
    return getattr(sys.modules[kind.__module__], name, kind)


def _query_first(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give an attention module the first token's state as its own, and all states to attend to."""
    states, *rest = inputs
    named = {**{name: _first_row(value) for name, value in named.items()}, "encoder_hidden_states": states}
    return (states[:, :1], *map(_first_row, rest)), named


def _first_row(value: Any) -> Any:
    """Of a mask of shape (batch, 1, queries, keys), that of the first query."""
    return value[:, :, :1] if isinstance(value, torch.Tensor) and value.dim() == 4 else value


def _trial(model: Any) -> torch.Tensor:
    """Logits of two made-up texts, one of them padded."""
    ids = torch.arange(12, device=model.device).reshape(2, 6) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits.float()  # type: ignore[no-any-return]
    finally:
        model.train(training)
