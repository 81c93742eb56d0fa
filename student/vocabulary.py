"""A smaller vocabulary: the corpus' most frequent tokens, and all that is needed to spell the rest.

Most of a small student's file is its embedding table, and a corpus uses a fraction of it. A text whose tokens
are all kept is tokenized as before, so the same rows of the table are read and nothing about it changes:

- WordPiece takes the longest piece that fits; of fewer pieces the same ones are the longest.
- BPE applies merges in order; all merges that lead to a kept token are kept, and a merge that is gone could
  only have led to another one.
- A unigram model takes the most probable segmentation; the same one is it among fewer.

Every piece of one character is kept too, so a word that needs a piece that is gone is spelt in smaller ones,
and one that was not unknown before is not unknown now. Such a text is read less well, so where there is room
for more tokens than the corpus has, those that stand first in the tokenizer's vocabulary are kept too: it is
in order of frequency.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer

from distill.encoding import read_long_texts, way_of
from distill.errors import DistillError
from distill.models import OFFSET_POSITIONS

BATCH = 1000
LONGEST = 1_000_000  # tokens, where a tokenizer sets no limit


def trim_vocabulary(
    model: Any, tokenizer: Any, texts: Iterable[str | tuple[str, str]], size: int | None = None
) -> Any:
    """Trim a classifier's vocabulary to the most frequent tokens of a corpus; the model is changed in place.

    Args:
        model: a sequence classifier.
        tokenizer: its fast tokenizer.
        texts: the corpus, never validation or test text.
        size: how many tokens to keep: the most frequent ones, then those that stand first in the tokenizer's
            vocabulary; all that occur when left out. Special tokens, pieces of one character and what BPE
            merges kept tokens from come on top.

    Returns:
        The trimmed tokenizer.

    Raises:
        DistillError: if the tokenizer is of a kind that cannot be trimmed.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DistillError("--vocabulary: this checkpoint has no fast tokenizer; leave it out")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    counts = _counts(tokenizer, texts)
    ranked = sorted(counts, key=lambda index: (-counts[index], index))
    others = (index for index in _in_order(content) if index not in counts)
    seen = set(ranked if size is None else islice(chain(ranked, others), size))
    kept = sorted(seen | _needed(content, seen) | _special(tokenizer, content, model))
    place = {old: new for new, old in enumerate(kept)}
    _trim_embeddings(model, kept, place)
    return _rebuilt(tokenizer, _trimmed(content, place), place)


def _counts(tokenizer: Any, texts: Iterable[str | tuple[str, str]]) -> Counter[int]:
    # The file of a tokenizer may cut shorter, and pad, as sentence encoders' do; this one is as in training.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.enable_truncation(min(tokenizer.model_max_length, LONGEST))
    texts = iter(texts)
    counts: Counter[int] = Counter()
    while batch := list(islice(texts, BATCH)):
        for encoding in backend.encode_batch(batch):
            counts.update(encoding.ids)
    return counts


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """Pieces and their ids."""
    kind, vocabulary = content["model"].get("type"), content["model"].get("vocab")
    if kind in ("WordPiece", "BPE"):
        return dict(vocabulary)
    if kind == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(vocabulary)}
    raise DistillError(f"--vocabulary: a tokenizer of kind {kind} cannot be trimmed; leave it out")


def _in_order(content: dict[str, Any]) -> list[int]:
    """Ids of the pieces, without those that BERT leaves unused."""
    return sorted(index for piece, index in _vocabulary(content).items() if not piece.startswith("[unused"))


def _merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in content["model"]["merges"]
    ]


def _needed(content: dict[str, Any], seen: set[int]) -> set[int]:
    """Pieces of one character, and those that the merges of kept pieces start from."""
    vocabulary = _vocabulary(content)
    if content["model"]["type"] != "BPE":
        prefix = content["model"].get("continuing_subword_prefix") or ""
        bare = {
            piece: piece.removeprefix(prefix) if prefix and piece != prefix else piece for piece in vocabulary
        }
        # Bytes stand for characters that a unigram model lacks: <0x41>.
        return {
            index
            for piece, index in vocabulary.items()
            if len(bare[piece].removeprefix("▁") or "▁") == 1 or piece.startswith("<0x")
        }
    made: dict[str, list[tuple[str, str]]] = {}
    prefix = content["model"].get("continuing_subword_prefix") or ""
    for left, right in _merges(content):
        made.setdefault(left + right.removeprefix(prefix), []).append((left, right))
    names = {index: piece for piece, index in vocabulary.items()}
    pending = [piece for piece in vocabulary if piece not in made]
    pending += [names[index] for index in seen if index in names]
    needed: set[str] = set()
    while pending:
        piece = pending.pop()
        if piece not in needed:
            needed.add(piece)
            pending += [part for pair in made.get(piece, []) for part in pair]
    return {vocabulary[piece] for piece in needed}


def _special(tokenizer: Any, content: dict[str, Any], model: Any) -> set[int]:
    found = {token["id"] for token in content["added_tokens"]} | set(tokenizer.all_special_ids)
    unknown = content["model"].get("unk_id")
    found |= {unknown} if unknown is not None else set()
    if model.config.model_type in OFFSET_POSITIONS:
        # These number positions from the padding token's id, which must stay what it is.
        padding = model.get_input_embeddings().padding_idx or 0
        found |= set(range(max(padding, model.config.pad_token_id) + 1))
    return found


def _trimmed(content: dict[str, Any], place: dict[int, int]) -> dict[str, Any]:
    """The tokenizer's description with kept pieces alone, under their new ids."""
    model = content["model"]
    vocabulary = _vocabulary(content)
    if model["type"] == "Unigram":
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in place]
        if model.get("unk_id") is not None:
            model["unk_id"] = place[model["unk_id"]]
    else:
        model["vocab"] = {piece: place[index] for piece, index in vocabulary.items() if index in place}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            list(pair)
            for pair in _merges(content)
            if {*pair, pair[0] + pair[1].removeprefix(prefix)} <= model["vocab"].keys()
        ]
    for token in content["added_tokens"]:
        token["id"] = place[token["id"]]
    _move_ids(content.get("post_processor"), place)
    return content


def _move_ids(processor: Any, place: dict[int, int]) -> None:
    """Give the special tokens that a post-processor adds their new ids."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _move_ids(part, place)
    for name in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if name in processor:
            processor[name][1] = place[processor[name][1]]
    if isinstance(processor.get("special_tokens"), dict):  # TemplateProcessing
        for token in processor["special_tokens"].values():
            token["ids"] = [place[index] for index in token["ids"]]


def _rebuilt(tokenizer: Any, content: dict[str, Any], place: dict[int, int]) -> Any:
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        for path in folder.iterdir():  # the vocabulary in other forms
            if path.name not in ("tokenizer_config.json", "special_tokens_map.json"):
                path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        added = settings.get("added_tokens_decoder", {})
        settings["added_tokens_decoder"] = {str(place[int(old)]): token for old, token in added.items()}
        path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        rebuilt = type(tokenizer).from_pretrained(folder, model_max_length=tokenizer.model_max_length)
    return read_long_texts(rebuilt, way_of(tokenizer))


def _trim_embeddings(model: Any, kept: Sequence[int], place: dict[int, int]) -> None:
    old = model.get_input_embeddings()
    padding = old.padding_idx if old.padding_idx is None else place[old.padding_idx]
    new = torch.nn.Embedding(len(kept), old.embedding_dim, padding_idx=padding, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight[torch.tensor(kept)])
    model.set_input_embeddings(new)
    model.config.vocab_size = len(kept)
    for name in ("pad", "bos", "eos", "cls", "sep", "unk", "mask", "decoder_start"):
        index = getattr(model.config, f"{name}_token_id", None)
        if isinstance(index, int) and index in place:
            setattr(model.config, f"{name}_token_id", place[index])
