"""A sequence classifier without layers: a mean of embeddings, and a small network that reads it.

It is a deep averaging network (Iyyer et al. 2015, https://aclanthology.org/P15-1162) that has embeddings of
bigrams too, as fastText does (Joulin et al. 2017, https://aclanthology.org/E17-2068): so much it knows of the
order of words. Once this is imported transformers' Auto classes know it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from distill.errors import DistillError

SLOTS = 2**18  # of the hash of two tokens
FACTOR = 2_654_435_761  # Knuth's, for a hash by multiplication


class AveragingConfig(PretrainedConfig):  # type: ignore[misc]
    """How large it is.

    Args:
        vocab_size: number of tokens.
        hidden_size: width of all embeddings.
        bigrams: how many pairs of tokens have one.
        embedding_dropout: share of their features that is left out in training.
        shared: whether some tokens are read as others in bigrams.
    """

    model_type = "averaging"

    def __init__(
        self,
        vocab_size: int = 2,
        hidden_size: int = 8,
        bigrams: int = 0,
        embedding_dropout: float = 0.0,
        shared: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.bigrams = vocab_size, hidden_size, bigrams
        self.embedding_dropout, self.shared = embedding_dropout, shared
        self.num_hidden_layers = 0
        super().__init__(**kwargs)


class AveragingForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    """Formula: y = W2 norm(gelu(W1 mean_i norm(norm(E[x_i]) + B[x_(i-1) x_i]) + b1)) + b2, of tokens x_i.

    B of a pair without an embedding of its own is zero; or that of another pair, if a hash gives both one
    slot, which befalls a share of `bigrams` / `SLOTS` of them, in training already.
    """

    config_class = AveragingConfig

    def __init__(self, config: AveragingConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.token_norm = nn.LayerNorm(width)
        if config.bigrams:
            self.bigrams = nn.Embedding(config.bigrams + 1, width, padding_idx=0)
            self.register_buffer("pairs", torch.zeros(config.bigrams, 2, dtype=torch.int64))
            self.register_buffer("slots", torch.zeros(SLOTS, dtype=torch.int32))
        if config.shared:
            self.register_buffer("stands_for", torch.zeros(config.vocab_size, dtype=torch.int32))
        self.drop = nn.Dropout(config.embedding_dropout)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, width)
        self.dense_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels)
        self.rows: torch.Tensor | None = None
        """Which row of the table a token reads, shape (vocabulary,), while the table holds a part of them."""
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            width = module.in_features
            nn.init.trunc_normal_(module.weight, std=width**-0.5 if module is self.classifier else 0.02)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of single tokens."""
        return self.tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another table in its place."""
        self.tokens = value

    def know_bigrams(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Give these pairs of tokens, as many as `config.bigrams`, a row of nearly zero each."""
        self._fill_slots(torch.tensor(list(pairs)))
        nn.init.normal_(self.bigrams.weight, std=1e-3)  # no two alike, which export would store once
        nn.init.zeros_(self.bigrams.weight[0])

    def _fill_slots(self, pairs: torch.Tensor) -> None:
        self.pairs.copy_(pairs)
        self.slots.zero_()
        # Of pairs in one slot the first, which is the most frequent, has it.
        for row, slot in reversed(list(enumerate(slot_of(*self.pairs.T).tolist(), start=1))):
            self.slots[slot] = row

    def share(self, tokens: torch.Tensor) -> None:
        """From now on take bigrams to be of what `tokens`, shape (vocabulary,), names for every token."""
        tokens = tokens.to(self.device)
        if self.config.shared:
            tokens = self.stands_for[tokens]
        self.config.shared = True
        self.register_buffer("stands_for", tokens.int())
        self._fill_slots(tokens[self.pairs])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Logits, shape (texts, classes), of tokens and their mask, both of shape (texts, tokens).

        Hidden states, where asked for, are what the mean is of, shape (texts, tokens, width).
        """
        rows = input_ids if self.rows is None else self.rows[input_ids]
        read = self.token_norm(self.tokens(rows))
        if self.config.bigrams:
            ids = _look_up(self.stands_for, input_ids) if self.config.shared else input_ids
            none = torch.zeros_like(ids[:, :1], dtype=torch.int32)  # before the first token
            pairs = _look_up(self.slots, slot_of(ids[:, :-1], ids[:, 1:]))
            read = read + self.bigrams(torch.cat([none, pairs], dim=1))
        read = self.norm(self.drop(read))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weight = mask.unsqueeze(-1).to(read.dtype)
        mean = (read * weight).sum(dim=1) / (weight.sum(dim=1) + 1e-9)  # of no tokens at all it is 0
        logits = self.classifier(self.dense_norm(F.gelu(self.dense(mean))))
        loss = None
        if labels is not None:
            several = self.config.problem_type == "multi_label_classification"
            loss = (F.binary_cross_entropy_with_logits if several else F.cross_entropy)(logits, labels)
        states = (read,) if output_hidden_states else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=states)


def _look_up(numbers: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Entries of a vector; as an embedding, which any exporter writes as a Gather that CUDA has."""
    return F.embedding(at, numbers[:, None]).squeeze(-1)


def slot_of(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The slot of pairs of tokens, of their shape."""
    return (first.long() * FACTOR + second) % SLOTS


AutoConfig.register(AveragingConfig.model_type, AveragingConfig)
AutoModelForSequenceClassification.register(AveragingConfig, AveragingForSequenceClassification)


def depth(model: Any) -> int:
    """How many layers a sequence classifier has."""
    return int(getattr(model.config, "num_hidden_layers", 0))


def is_layerless(model: Any) -> bool:
    """Whether it is one of this kind."""
    return bool(model.config.model_type == AveragingConfig.model_type)


def refuse_pairs(layerless: bool, pairs: bool) -> None:
    """Refuse to classify pairs of texts without layers."""
    if layerless and pairs:
        raise DistillError(
            "without layers a model is a mean of tokens, which cannot tell the two texts of a pair apart; "
            "keep at least one layer, of a checkpoint that has some"
        )
