"""A bundle's tokenizer and ONNX session on one provider: texts in, logits out."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from distill.bundle import TOKENIZER, TOKENIZER_SETTINGS, Bundle
from distill.errors import DistillError
from distill.long_texts import HEAD, Reader, pooled
from distill.word_table import Tokens, WordTable

logger = logging.getLogger(__name__)
Text = str | tuple[str, str]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# On a CPU the fused kernel takes four times as long as the Add and the LayerNormalization it replaces.
SLOW_FUSIONS = {"cpu": ["SkipLayerNormFusion"], "cuda": []}
BATCH_TOKENS = 16_384  # padded, in a batch on a GPU
PADDED_TO = 8  # lengths that suit tensor cores
BLOCK = 8192  # texts whose tokens are held at once


class ProviderError(DistillError):
    """A provider that would not really be used."""


def choose_provider(wanted: str, files: dict[str, str]) -> tuple[str, str]:
    """Return "cpu" or "cuda", and why.

    Args:
        wanted: one of them, or "auto": CUDA where this onnxruntime has it.
        files: of the bundle, by provider.

    Raises:
        DistillError: if this onnxruntime lacks the wanted one.
    """
    if wanted not in ("auto", *PROVIDERS):
        raise DistillError(f"provider {wanted!r}: unknown; use auto, cpu or cuda")
    available = onnxruntime.get_available_providers()
    if wanted == "auto":
        if PROVIDERS["cuda"] not in available:
            return "cpu", "this onnxruntime has no CUDA provider"
        return ("cuda", "it is there") if "cuda" in files else ("cpu", "the bundle has no file for CUDA")
    if PROVIDERS[wanted] not in available:
        raise DistillError(f"provider {wanted!r}: this onnxruntime has only {', '.join(available)}; "
                           "install onnxruntime-gpu in place of onnxruntime")  # fmt: skip
    return wanted, "it was asked for"


class Engine:
    """One model of a bundle, open on one provider.

    Attributes:
        file: the ONNX file.
        provider: "cpu" or "cuda".
    """

    def __init__(self, parts: Bundle, provider: str, file: str | None = None) -> None:
        """Open a model.

        Args:
            parts: of the bundle.
            provider: "cpu" or "cuda".
            file: in place of the provider's.

        Raises:
            DistillError: if a part is missing or damaged, or the provider would not really be used.
        """
        files: dict[str, str] = parts.manifest["details"]["files"]
        self.provider = provider
        if file is None and provider not in files:
            raise ProviderError(f"provider {provider!r}: {parts.place} holds no file for it; open the folder "
                                f"that `distill export --provider {provider}` wrote")  # fmt: skip
        self.file: str = file or files[provider]
        self._tokenizer, self._padding = _open_tokenizer(parts)
        self._max_length: int = parts.manifest["max_length"]
        self._words = WordTable.of(self._tokenizer)
        way = parts.manifest.get("long_texts", HEAD)
        self._reader = None if way == HEAD else Reader(_open_tokenizer(parts)[0], self._max_length, way)
        self._session = _open_session(parts, self.file, provider)
        self._inputs = [node.name for node in self._session.get_inputs()]
        # What two inputs are for every single text.
        shape = (1, max(1, self._max_length))
        self._same = {"attention_mask": np.ones(shape, np.int64), "token_type_ids": np.zeros(shape, np.int64)}
        self._output = self._session.get_outputs()[0].name

    def tokens(self, text: Text) -> Tokens:
        """The text's tokens, of its beginning if it is too long."""
        if self._words is not None and isinstance(text, str):
            tokens = self._words.tokens(text)
            if tokens is not None:
                return tokens
        return _plain(self._tokenizer.encode(*((text,) if isinstance(text, str) else text)))

    def _pieces(self, text: Text, tokens: Tokens) -> list[Tokens]:
        """The pieces in which the model reads the text: itself, or more than the beginning of a long one."""
        if self._reader and isinstance(text, str) and tokens.cut:
            return list(map(self.tokens, self._reader.pieces(text)))
        return [tokens]

    def outputs(self, text: Text) -> list[NDArray[Any]]:
        """All outputs of the graph for one text, as a batch of one; the first are the logits.

        Of a text that is read in windows, those for the first.
        """
        return self._run(self._pieces(text, self.tokens(text))[0])

    def _run(self, tokens: Tokens) -> list[NDArray[Any]]:
        # The empty text has no token, where a tokenizer adds none at the ends.
        ids = np.array([tokens.ids or [self._padding]], dtype=np.int64)
        columns = {"input_ids": ids, **{name: same[:, : ids.shape[1]] for name, same in self._same.items()}}
        if tokens.type_ids:
            columns["token_type_ids"] = np.array([tokens.type_ids], dtype=np.int64)
        feeds = {name: columns[name] for name in self._inputs}
        outputs: list[NDArray[Any]] = self._session.run(None, feeds)
        return outputs

    def logits(self, text: Text) -> NDArray[np.float32]:
        """Logits of one text, shape (classes,)."""
        pieces = self._pieces(text, self.tokens(text))
        found = [np.asarray(self._run(piece)[0][0], dtype=np.float32) for piece in pieces]
        return found[0] if len(found) == 1 else pooled(np.stack(found), np.zeros(len(found), dtype=int))[0]

    def batched_logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        """Logits of n > 0 texts, shape (n, classes), in batches of similar length, the longest first.

        Inputs and outputs are bound to the provider's device, so that one copy goes there and one comes back.
        """
        blocks = [texts[start : start + BLOCK] for start in range(0, len(texts), BLOCK)]
        return np.concatenate([self._block_logits(block) for block in blocks])

    def _block_logits(self, texts: Sequence[Text]) -> NDArray[np.float32]:
        # All at once: in threads of the tokenizer's own and without Python's lock. The fast form leaves out
        # offsets, and, with some tokenizers, which text of a pair a token is of.
        single = all(isinstance(text, str) for text in texts)
        encode = self._tokenizer.encode_batch_fast if single else self._tokenizer.encode_batch
        pieces = list(map(self._pieces, texts, map(_plain, encode(list(texts)))))
        owners = [owner for owner, own in enumerate(pieces) for _ in own]
        tokens = [piece for own in pieces for piece in own]
        lengths = np.array([self._rounded(len(piece.ids)) for piece in tokens], dtype=np.int64)
        found: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        for rows in _batches(lengths):
            binding = self._session.io_binding()
            for name, values in self._padded([tokens[row] for row in rows]).items():
                if name in self._inputs:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(values, self.provider, 0)
                    binding.bind_ortvalue_input(name, value)
            binding.bind_output(self._output, self.provider)
            self._session.run_with_iobinding(binding)
            found.append((rows, np.asarray(binding.copy_outputs_to_cpu()[0], dtype=np.float32)))
        logits = np.empty((len(tokens), found[0][1].shape[1]), dtype=np.float32)
        for rows, part in found:
            logits[rows] = part
        return pooled(logits, owners)

    def _rounded(self, length: int) -> int:
        """Tokens that a text takes with its padding, never more than the model has positions for."""
        return min(-(-max(1, length) // PADDED_TO) * PADDED_TO, max(length, self._max_length))

    def _padded(self, pieces: Sequence[Tokens]) -> dict[str, NDArray[np.int64]]:
        longest = max(len(piece.ids) for piece in pieces)
        shape = (len(pieces), self._rounded(longest))
        columns = {
            "input_ids": np.full(shape, self._padding, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
            "token_type_ids": np.zeros(shape, dtype=np.int64),
        }
        for row, piece in enumerate(pieces):
            length = len(piece.ids)
            columns["input_ids"][row, :length] = piece.ids
            columns["attention_mask"][row, : max(1, length)] = 1
            columns["token_type_ids"][row, :length] = piece.type_ids or 0
        return columns


def _batches(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch, the longest first; none holds more than `BATCH_TOKENS`, unless one text does."""
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, BATCH_TOKENS // int(lengths[order[start]]))]
        yield rows
        start += len(rows)


def _plain(encoding: Any) -> Tokens:
    return Tokens(encoding.ids, encoding.type_ids, bool(encoding.overflowing))


def _open_tokenizer(parts: Bundle) -> tuple[Tokenizer, int]:
    """The tokenizer, without padding, and the id of its padding token."""
    content, settings = parts.read(TOKENIZER), parts.read(TOKENIZER_SETTINGS)
    if content is None:
        raise DistillError(f"{parts.place / TOKENIZER}: missing from the bundle; export it again")
    tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_padding()
    tokenizer.enable_truncation(parts.manifest["max_length"])
    padding = json.loads(settings).get("pad_token") if settings else None
    padding = padding["content"] if isinstance(padding, dict) else padding
    return tokenizer, tokenizer.token_to_id(padding or "") or 0


def _open_session(parts: Bundle, file: str, provider: str) -> Any:
    model = parts.model(file)
    details = parts.manifest["details"]
    files = details["files"]
    # A bundle that is being exported, or an older one, has no list of the files that were checked.
    bad = [files["cpu"]] if files.get("cpu") != files.get("fp32") else []
    if provider == "cuda" and (file not in details["on_cuda"] if "on_cuda" in details else file in bad):
        raise ProviderError(
            f"provider 'cuda': {parts.place / file} has operators that CUDA has no kernels for; "
            "leave the file out, or use one that `distill export --provider cuda` wrote"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    name = PROVIDERS[provider]
    if provider == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN that came with PyTorch or from PyPI
    try:
        session = onnxruntime.InferenceSession(
            model, options, providers=[name], disabled_optimizers=SLOW_FUSIONS[provider]
        )
    except Exception as error:  # onnxruntime's own kinds share no base class but Exception
        kind = ProviderError if provider == "cuda" else DistillError
        raise kind(
            f"{parts.place / file}: onnxruntime cannot open it: {str(error).splitlines()[0]}; export it again"
        ) from error
    if session.get_providers()[0] != name:
        raise ProviderError(f"provider {provider!r}: fell back to {session.get_providers()[0]}; "
                           "check that its CUDA and cuDNN libraries are installed")  # fmt: skip
    return session
