"""A bundle's parts, each checked before it is used: a folder that `distill export` wrote, or a single file.

The single file is an ordinary ONNX model that carries the other parts in its `metadata_props`. Its last entry
is the SHA-256 of all bytes before it: messages of Protocol Buffers can be concatenated, so that the entry
is simply appended.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from distill.errors import DistillError

MANIFEST = "distill.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_SETTINGS = "tokenizer_config.json"
_METADATA_PROPS = 14  # the field's number in ONNX's ModelProto
_SEAL = "sha256"
_AGAIN = "copy the whole bundle again, or export it again"


@runtime_checkable
class Bundle(Protocol):
    """What `Classifier` needs of a bundle.

    Attributes:
        place: the folder or file.
        manifest: the content of `distill.json`.
    """

    place: Path
    manifest: dict[str, Any]

    def read(self, name: str) -> bytes | None:
        """The bytes of a part; None if it has none of this name."""

    def model(self, name: str) -> bytes | str:
        """An ONNX file as onnxruntime takes it: its bytes, or its path where its weights lie beside it."""


def open_bundle(place: str | os.PathLike[str], sealed: bool = True) -> Bundle:
    """Open a folder or a single file.

    Args:
        place: the folder or file.
        sealed: check the SHA-256 of all that is read; only a folder under construction has none.

    Raises:
        DistillError: naming the file that is missing, truncated, or not what `distill export` wrote.
    """
    place = Path(place)
    if place.is_file():
        return _File(place)
    if not place.is_dir():
        kind = "file" if place.suffix == ".onnx" else "folder"
        raise DistillError(f"{place}: no such {kind}; name one that `distill export` wrote")
    return _Folder(place, sealed)


def second_column(data: Mapping[str, Any]) -> str | None:
    """The column with the second text of pairs, out of a manifest's `data`; None where texts are single."""
    column: str | None = data.get("columns", {}).get("text_pair")
    return column


def seal_manifest(content: Mapping[str, Any]) -> str:
    """Hexadecimal SHA-256 of a manifest's content, whatever its layout; the entry that holds it left out."""
    rest = {key: value for key, value in content.items() if key != _SEAL}
    plain = json.loads(json.dumps(rest))  # keys are strings, as when it is read again
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _parse_manifest(content: bytes, place: Path) -> dict[str, Any]:
    try:
        manifest = dict(json.loads(content))
    except (ValueError, TypeError, RecursionError) as error:
        raise DistillError(f"{place / MANIFEST}: damaged ({error}); {_AGAIN}") from error
    details = manifest.get("details")
    if not isinstance(details, dict) or "files" not in details:
        stage = manifest.get("stage")
        raise DistillError(
            f"{place}: not a bundle (written by {stage}); run `distill export` on it"
            if stage
            else f"{place / MANIFEST}: damaged (it names no files); {_AGAIN}"
        )
    return manifest


class _Folder:
    def __init__(self, place: Path, sealed: bool) -> None:
        self.place, self._sealed = place, sealed
        path = place / MANIFEST
        if not path.is_file():
            above = (place.parent / MANIFEST).is_file()
            folder = f"its folder, {place.parent}" if above else "a folder that `distill export` wrote"
            raise DistillError(f"{path}: no such file; name {folder}")
        self.manifest = _parse_manifest(path.read_bytes(), place)
        if sealed and self.manifest.get(_SEAL) != seal_manifest(self.manifest):
            raise DistillError(f"{path}: changed since it was written; {_AGAIN}")
        self._hashes: dict[str, str] = self.manifest.get("files", {})

    def read(self, name: str) -> bytes | None:
        path = self.place / name
        if path.is_file():
            return self._checked(name, path.read_bytes())
        if name in self._hashes:
            raise DistillError(f"{path}: missing from the bundle; {_AGAIN}")
        return None

    def _checked(self, name: str, content: bytes) -> bytes:
        if self._sealed and self._hashes.get(name) != hashlib.sha256(content).hexdigest():
            raise DistillError(f"{self.place / name}: changed since it was written; {_AGAIN}")
        return content

    def model(self, name: str) -> bytes | str:
        content = self.read(name)
        if content is None:
            there = sorted(file for file in self._hashes if file.endswith(".onnx") and "/" in file)
            raise DistillError(f"{self.place / name}: not a file of this bundle; it has {', '.join(there)}")
        return content if self.read(f"{name}_data") is None else str(self.place / name)


class _File:
    def __init__(self, place: Path) -> None:
        self.place = place
        self._content = place.read_bytes()
        length = len(_entry(_SEAL, "0" * 64))
        body, seal = self._content[:-length], self._content[-length:]
        if seal != _entry(_SEAL, hashlib.sha256(body).hexdigest()):
            raise DistillError(
                f"{place}: not what `distill export --single-file` wrote, or changed since; name that file "
                "or the bundle's folder, copy it again, or export it again"
            )
        self._parts = dict(_metadata(body))
        self.manifest = _parse_manifest(self._parts[MANIFEST], place)

    def read(self, name: str) -> bytes | None:
        return self._parts.get(name)

    def model(self, name: str) -> bytes | str:
        if name not in self.manifest["details"]["files"].values():
            raise DistillError(f"{self.place}: holds no {name}; open the folder that it was exported to")
        return self._content


def write_single_file(target: Path, model: bytes, parts: Mapping[str, str]) -> None:
    """Write an ONNX model with `parts` in its metadata, and the SHA-256 that `open_bundle` checks."""
    body = model + b"".join(_entry(name, content) for name, content in parts.items())
    target.write_bytes(body + _entry(_SEAL, hashlib.sha256(body).hexdigest()))


def _entry(key: str, value: str) -> bytes:
    """One entry of `metadata_props` in the encoding of Protocol Buffers."""
    fields = [_field(1, key.encode()), _field(2, value.encode())]
    return _field(_METADATA_PROPS, b"".join(fields))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that have a length: their numbers and contents."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(content):
        tag = varint()
        if tag & 7 == 2:
            length = varint()
            yield tag >> 3, content[position : position + length]
            position += length
        elif tag & 7 == 0:
            varint()
        else:
            position += {1: 8, 5: 4}[tag & 7]


def _metadata(model: bytes) -> Iterator[tuple[str, bytes]]:
    for number, content in _fields(model):
        if number == _METADATA_PROPS:
            key, value = (part for _, part in _fields(content))
            yield key.decode(), value
