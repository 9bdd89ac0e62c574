"""Record data sets: folders of serialised examples, byte for byte as the package codewithgpu (0.2.8) writes them.

    from diffnext.data import records as codewithgpu

is all that a script for that package needs to change. A data set is a folder of METADATA (JSON) and shards of two
files: `00000.data`, the messages back to back, and `00000.index`, a line "<offset> <length>" for each of them. A
message is a protobuf `FeatureMap`; no protobuf package is needed to write or read it.
"""

import json
import math
import mmap
import operator
import re
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from diffnext.data.reader import DatasetReader

__all__ = ["DatasetReader", "RecordDataset", "RecordWriter", "decode", "encode"]

VERSION = 1
METADATA = "METADATA"
MAX_MAPPED_SHARDS = 128  # each holds a file descriptor, of which a process may have no more than about a thousand

BYTES, STRING, FLOAT32, INT64 = "BYTES", "STRING", "FLOAT32", "INT64"
CANONICAL = {"bytes": BYTES, "string": STRING}
CANONICAL |= {name: FLOAT32 for name in ("float", "float32", "float64")}
CANONICAL |= {name: INT64 for name in ("int", "int32", "int64")}
DEFAULTS = {BYTES: b"", STRING: "", FLOAT32: 0.0, INT64: 0}

# Tags: field number << 3 | wire type. `Feature` is a oneof of the last five; a map entry is {1: key, 2: Feature}.
CONTAINER, KEY, VALUE = 0x0A, 0x0A, 0x12
TAG_BYTES, TAG_FLOAT, TAG_INT, TAG_LIST, TAG_MAP = 0x0A, 0x15, 0x18, 0x22, 0x2A
MAX_SHAPE_BYTES = 64
FLOAT32_MAX = float(np.finfo(np.float32).max)
INDEX_TEXT = re.compile(rb"(?:\d{1,18} \d{1,18}\n)*+(?:\d{1,18} \d{1,18})?")

Features = Any  # a descriptor: one of the four names, a list of one descriptor, or {name: descriptor}
Buffer = bytes | memoryview


def canonical(features: Features) -> Features:
    """The descriptor with canonical names; dicts and lists are changed in place, as the original does.

    Raises:
        AttributeError: a type that is none of the format's.
    """
    if isinstance(features, str) and features.lower() in CANONICAL:
        return CANONICAL[features.lower()]
    if isinstance(features, dict):
        for name, kind in features.items():
            features[name] = canonical(kind)
        return features
    if isinstance(features, list) and len(features) == 1:
        features[0] = canonical(features[0])
        return features
    raise AttributeError(
        f"{features!r} is no feature type; there are {', '.join(CANONICAL)}, a list of one of them, a dict of them"
    )


# Encoding -------------------------------------------------------------------------------------------------------------


def encode(example: Mapping[str, Any], features: Features) -> bytes:
    """One example as a message.

    Args:
        example: values by name, in the order in which they are written; declared ones may be absent.
        features: canonical descriptor, a dict.

    Raises:
        KeyError: a name that is not declared.
        TypeError, ValueError: a value that does not fit its type; both name the feature.
    """
    return b"".join(_encode_entries(example, features, ""))


def _encode_entries(example: Mapping[str, Any], features: Features, where: str) -> Iterator[bytes]:
    for name, value in example.items():
        if name not in features:
            raise KeyError(f"{where}{name} is not declared; the features are {', '.join(features)}")
        feature = _encode_feature(value, features[name], f"{where}{name}")
        yield _delimit(CONTAINER, _delimit(KEY, name.encode()) + _delimit(VALUE, feature))


def _encode_feature(value: Any, kind: Features, where: str) -> bytes:
    if isinstance(kind, list) and isinstance(value, (list, tuple)):
        items = [_delimit(CONTAINER, _encode_feature(item, kind[0], f"{where}[]")) for item in value]
        return _delimit(TAG_LIST, b"".join(items)) if items else b""
    if isinstance(kind, dict) and isinstance(value, dict):
        entries = b"".join(_encode_entries(value, kind, f"{where}."))
        return _delimit(TAG_MAP, entries) if entries else b""
    if kind == BYTES and isinstance(value, (bytes, bytearray, memoryview)):
        return _delimit(TAG_BYTES, bytes(value))
    if kind == STRING and isinstance(value, str):
        return _delimit(TAG_BYTES, value.encode())
    if kind == FLOAT32 and hasattr(value, "__float__"):
        return struct.pack("<Bf", TAG_FLOAT, _within_float32(float(value)))
    if kind == INT64 and hasattr(value, "__index__"):
        number = operator.index(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"feature {where}: {number} does not fit 64 bits")
        return bytes([TAG_INT]) + _varint(number & (2**64 - 1))
    hint = "; give a list or tuple, `.tolist()` of an array" if isinstance(kind, list) else ""
    raise TypeError(f"feature {where} is declared as {kind}; {type(value).__name__} {value!r:.80} does not fit{hint}")


def _within_float32(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) > FLOAT32_MAX else value


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _delimit(tag: int, payload: bytes) -> bytes:
    return b"%c%b%b" % (tag, _varint(len(payload)), payload)


# Decoding -------------------------------------------------------------------------------------------------------------


def decode(
    message: Buffer, features: Features, names: Sequence[str] | None = None, *, views: bool = False
) -> dict[str, Any]:
    """The values of a message, in the order of the descriptor; absent ones are their type's empty value.

    Args:
        features: canonical descriptor, a dict.
        names: decode these alone; all of `features` if None. Reading stops when all of them were found.
        views: BYTES are memoryviews of `message` instead of copies.

    Raises:
        ValueError: no message of this format, or of other types than `features` says; names the byte in the message.
    """
    kinds = features if names is None else {name: features[name] for name in names}
    return _decode_entries(message, 0, len(message), kinds, views, stop_early=names is not None)


def _decode_entries(
    data: Buffer, at: int, end: int, kinds: Mapping[str, Features], views: bool, stop_early: bool = False
) -> dict[str, Any]:
    found = {}
    while at < end:
        at, entry_end = _span(data, at, end, CONTAINER)
        start, stop = _span(data, at, entry_end, KEY)
        name = _text(data, start, stop)
        start, stop = _span(data, stop, entry_end, VALUE)
        if stop != entry_end:
            raise ValueError(f"an entry goes on after its value at byte {stop}")
        if name in kinds:
            found[name] = _decode_feature(data, start, stop, kinds[name], views)
            if stop_early and len(found) == len(kinds):
                break
        at = entry_end
    return {name: found[name] if name in found else _default(kind, views) for name, kind in kinds.items()}


def _decode_feature(data: Buffer, at: int, end: int, kind: Features, views: bool) -> Any:
    if at == end:
        return _default(kind, views)
    if kind == INT64:
        return _int64(bytes(data[at:end]))
    if kind == FLOAT32:
        if data[at] != TAG_FLOAT or end - at != 5:
            raise ValueError(f"byte {at} does not begin a FLOAT32")
        return struct.unpack_from("<f", data, at + 1)[0]
    tag = TAG_BYTES if isinstance(kind, str) else TAG_LIST if isinstance(kind, list) else TAG_MAP
    start, stop = _span(data, at, end, tag)
    if stop != end:
        raise ValueError(f"a feature goes on after its value at byte {stop}")
    if kind == BYTES:
        return memoryview(data)[start:stop] if views else bytes(data[start:stop])
    if kind == STRING:
        return _text(data, start, stop)
    if isinstance(kind, dict):
        return _decode_entries(data, start, stop, kind, views)
    if kind[0] == INT64 and stop - start <= MAX_SHAPE_BYTES:
        return list(_short_int64_list(bytes(data[start:stop])))
    items = []
    while start < stop:
        item, start = _span(data, start, stop, CONTAINER)
        items.append(_decode_feature(data, item, start, kind[0], views))
    return items


def _span(data: Buffer, at: int, end: int, tag: int) -> tuple[int, int]:
    """Where the payload of the length-delimited field at `at` begins and ends."""
    try:
        found, length = data[at], data[at + 1]
    except IndexError:
        raise ValueError(f"it ends in the field at byte {at}") from None
    start = at + 2
    if length > 0x7F:
        length, start = _long_length(data, start, end, length & 0x7F)
    if found != tag or length > end - start:
        raise ValueError(
            f"byte {at} should begin a field 0x{tag:02x} of at most {end - start} bytes, and begins 0x{found:02x} of "
            f"{length} bytes"
        )
    return start, start + length


def _long_length(data: Buffer, at: int, end: int, length: int) -> tuple[int, int]:
    """A length whose first seven bits were read, and where it ends."""
    shift = 7
    while at < end and shift < 35:
        byte = data[at]
        at += 1
        if byte < 0x80:
            return length | byte << shift, at
        length |= (byte & 0x7F) << shift
        shift += 7
    raise ValueError(f"a length does not end before byte {at}")


@lru_cache(maxsize=1024)  # a data set repeats a few shapes
def _short_int64_list(payload: bytes) -> tuple[int, ...]:
    values, at = [], 0
    while at < len(payload):
        start, at = _span(payload, at, len(payload), CONTAINER)
        values.append(_int64(payload[start:at]) if start < at else 0)
    return tuple(values)


def _int64(feature: bytes) -> int:
    """Of a tag and a varint in two's complement, ten bytes at most."""
    value = sum((byte & 0x7F) << (7 * i) for i, byte in enumerate(feature[1:]))
    continues = [byte > 0x7F for byte in feature[1:]]
    if feature[0] != TAG_INT or continues != [True] * (len(continues) - 1) + [False] or value >= 2**64:
        raise ValueError(f"{feature[:16].hex()} is not an INT64")
    return value - 2**64 if value >= 2**63 else value


def _text(data: Buffer, start: int, stop: int) -> str:
    try:
        return str(data[start:stop], "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text at byte {start} is not UTF-8 ({error.reason})") from None


def _default(kind: Features, views: bool) -> Any:
    if isinstance(kind, list):
        return []
    if isinstance(kind, dict):
        return {name: _default(inner, views) for name, inner in kind.items()}
    return memoryview(b"") if views and kind == BYTES else DEFAULTS[kind]


# Writing --------------------------------------------------------------------------------------------------------------


class RecordWriter:
    """Writes a new data set into a folder that exists.

    Args:
        path: the folder.
        features: {name: type}, types being "bytes", "string", "float" ("float32", "float64"; float32 is stored), "int"
            ("int32", "int64"; int64 is stored), a list of one type (of any length) or a dict. Names become canonical
            in place.
        max_examples: of a shard.
        zfill_width: digits of a shard's number.

    Raises:
        AttributeError: an unknown type.
    """

    VERSION = VERSION

    def __init__(self, path: str | Path, features: dict, max_examples: int = 2**63 - 1, zfill_width: int = 5):
        self.path, self.features = Path(path), canonical(features)
        self.max_examples, self.zfill_width = max_examples, zfill_width
        self._num_shards = self._num_examples = self._num_in_shard = 0
        self._data: BinaryIO | None = None
        self._index: BinaryIO | None = None
        self._closed = False

    def write(self, example: Mapping[str, Any]) -> None:
        """Appends an example; features may be absent from it.

        Raises:
            KeyError, TypeError, ValueError: it does not fit the features (nothing is written).
            ValueError: the shard's files exist.
            RuntimeError: the writer is closed.
        """
        if self._closed:
            raise RuntimeError(f"Writer has been closed: {self.path} cannot take another example.")
        message = encode(example, self.features)
        if self._data is None or self._num_in_shard >= self.max_examples:
            self._open_shard()
        offset = self._data.tell()
        self._data.write(message)
        self._index.write(b"%d %d\n" % (offset, len(message)))
        self._num_examples, self._num_in_shard = self._num_examples + 1, self._num_in_shard + 1

    def _open_shard(self) -> None:
        self._close_shard()
        name = f"{self._num_shards:0{self.zfill_width}d}"
        paths = [self.path / f"{name}.{suffix}" for suffix in ("data", "index")]
        for path in paths:
            if path.exists():
                raise ValueError(f"File {path} existed. Write into an empty folder, or delete what is there.")
        self._data, self._index = (open(path, "xb") for path in paths)
        self._num_shards, self._num_in_shard = self._num_shards + 1, 0

    def _close_shard(self) -> None:
        for file in (self._data, self._index):
            if file is not None:
                file.close()

    def close(self) -> None:
        """Writes METADATA, without which the data set cannot be read; nothing if there was no example."""
        if self._closed:
            return
        self._close_shard()
        self._closed = True
        if self._num_examples:
            metadata = {"entries": self._num_examples, "features": self.features, "version": VERSION}
            (self.path / METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


# Reading --------------------------------------------------------------------------------------------------------------


class RecordDataset:
    """Examples of a data set, in order or at random; files are mapped to memory when first read from.

    Copies for other processes, forked or pickled, share nothing but the files. A file that is cut off while it is
    mapped ends the process that reads there (SIGBUS); one that was cut off before is a ValueError.

    Raises:
        FileNotFoundError: no such folder, METADATA, or data file of an index.
        ValueError: METADATA or an index is damaged, or they disagree.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.features, self.size = _read_metadata(self.path)
        index_paths = sorted(self.path.glob("*.index"))
        self.shards = [index_path.with_suffix(".data") for index_path in index_paths]
        for shard in self.shards:
            if not shard.is_file():
                raise FileNotFoundError(f"{shard} is missing, though there is its {shard.stem}.index")
        indices = [_read_index(index_path) for index_path in index_paths]
        self.first_of_shard = np.cumsum([0] + [len(index) for index in indices]).tolist()
        if self.first_of_shard[-1] != self.size:
            raise ValueError(
                f"Mismatched number of indices and entries: METADATA of {self.path} says {self.size}, its "
                f"{len(indices)} .index files have {self.first_of_shard[-1]} lines; a file is missing or cut off"
            )
        self.index = np.concatenate([np.empty((0, 2), np.int64), *indices])  # (size, 2): offset, length in bytes
        self._maps: OrderedDict[int, memoryview] = OrderedDict()
        self._cursor = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": OrderedDict()}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An example, all features; the cursor moves behind it. Raises IndexError, or ValueError naming the record."""
        position = self._position(index)
        self._cursor = position + 1
        return self._decoded(position, None, False)

    def fields(self, index: int, names: Sequence[str]) -> dict[str, Any]:
        """Some features of an example, without moving the cursor; BYTES as memoryviews of the mapped file.

        Raises:
            IndexError: no such example.
            ValueError: the record cannot be read; the message names file, record and offset.
        """
        return self._decoded(self._position(index), names, True)

    def prefetch(self, index: int, first_bytes: int | None = None) -> None:
        """Has the system read a record (or its first bytes) from disk, without waiting for it."""
        data, offset, length = self._place(self._position(index))
        stop = min(offset + min(length, first_bytes or length), len(data))
        start = offset - offset % mmap.PAGESIZE
        if start < stop:
            data.obj.madvise(mmap.MADV_WILLNEED, start, stop - start)

    def describe(self, index: int) -> str:
        """Where a record lies, for messages."""
        shard = self.shard_of(index)
        offset, length = self.index[index].tolist()
        return f"{self.shards[shard]}: record {index} (bytes {offset} to {offset + length})"

    def shard_of(self, index: int) -> int:
        """Number of the shard that an example lies in; `shards` has its data file."""
        return bisect_right(self.first_of_shard, index) - 1

    def read(self) -> dict[str, Any]:
        """The example at the cursor, which moves on; StopIteration at the end."""
        if self._cursor >= self.size:
            raise StopIteration
        return self[self._cursor]

    __next__ = read

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def seek(self, index: int) -> None:
        """Moves the cursor."""
        self._cursor = index

    def tell(self) -> int:
        """The cursor."""
        return self._cursor

    def reset(self) -> None:
        """Moves the cursor to the start."""
        self._cursor = 0

    def close(self) -> None:
        """Lets go of the files; reading opens them again."""
        self._maps.clear()

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -self.size <= position < self.size:
            raise IndexError(f"{self.path} has {self.size} records, none with number {position}")
        return position % self.size

    def _place(self, position: int) -> tuple[memoryview, int, int]:
        """The mapped shard, and offset and length of a record in it."""
        shard = self.shard_of(position)
        if shard not in self._maps:
            self._maps[shard] = _map(self.shards[shard])
            if len(self._maps) > MAX_MAPPED_SHARDS:
                self._maps.popitem(last=False)
        offset, length = self.index[position].tolist()
        return self._maps[shard], offset, length

    def _decoded(self, position: int, names: Sequence[str] | None, views: bool) -> dict[str, Any]:
        data, offset, length = self._place(position)
        try:
            if offset + length > len(data):
                raise ValueError(f"the file ends at byte {len(data)}: it is cut off")
            return decode(data[offset : offset + length], self.features, names, views=views)
        except ValueError as error:
            raise ValueError(f"{self.describe(position)}: {error}") from None


def _map(path: Path) -> memoryview:
    with open(path, "rb") as file:
        if path.stat().st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _read_metadata(folder: Path) -> tuple[Features, int]:
    """Canonical features, and the number of examples."""
    path = folder / METADATA
    if not path.is_file():
        where = f"{folder} has no file METADATA" if folder.is_dir() else f"{folder} is not a folder"
        raise FileNotFoundError(
            f"{where}: a record data set is written by RecordWriter, whose close() writes METADATA; "
            "python -m diffnext.build_cache makes one of images or clips"
        )
    try:
        metadata = json.loads(path.read_text("utf-8"))
        entries, features, version = (metadata[key] for key in ("entries", "features", "version"))
        if version != VERSION:
            raise ValueError(f"version {version!r}, not {VERSION}")
        if type(entries) is not int or entries < 0:
            raise ValueError(f"entries {entries!r}")
        if not isinstance(features, dict):
            raise ValueError(f"features {features!r}")
        return canonical(features), entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def _read_index(path: Path) -> np.ndarray:
    """Offset and length of every record of a shard: int64 (n, 2)."""
    text = path.read_bytes()
    if not INDEX_TEXT.fullmatch(text):
        number, line = next(
            (n, line) for n, line in enumerate(text.split(b"\n"), 1) if line and not INDEX_TEXT.fullmatch(line)
        )
        raise ValueError(f"{path} is damaged: line {number} is {line[:60]!r}, not an offset and a length")
    return np.fromstring(text, dtype=np.int64, sep=" ").reshape(-1, 2)
