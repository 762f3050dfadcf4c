"""Rules that make hostile files of a valid one: its own keys, sizes and bytes, damaged."""

import io
import itertools
import json
import math
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

DEEP = 10_000  # levels
HUGE = (math.inf, 2**70, -1)  # JSON's 1e400 is infinite
OTHERS = (None, True, 7, "x", [], {})  # a value of each type of JSON
MARKER = "executed"  # the file that a hostile pickle would make


class Damage(NamedTuple):
    """`content` takes the place of the file; `field` is the key in it that is wrong."""

    rule: str
    content: bytes | Callable[[Path], object]
    field: str = ""

    def put(self, path: Path) -> None:
        remove(path)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)


Rule = Callable[[bytes], Iterator[Damage]]


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- of any file -----------------------------------------------------------------------------


def places(raw: bytes) -> Iterator[Damage]:
    """What is no regular file."""
    yield Damage("a folder", Path.mkdir)
    yield Damage("a dangling link", lambda path: path.symlink_to("nowhere"))
    yield Damage("a pipe", os.mkfifo)


def no_files(raw: bytes) -> Iterator[Damage]:
    """`places`, but for a folder: where images may lie in folders."""
    return (damage for damage in places(raw) if damage.rule != "a folder")


def cuts(raw: bytes) -> Iterator[Damage]:
    end = len(raw.rstrip())
    for size in sorted({0, 1, end // 2, end - 1}):
        yield Damage(f"cut at {size} of {end}", raw[:size])


def flips(raw: bytes) -> Iterator[Damage]:
    for at in (0, 1, 2, 3, 8):
        flipped = bytearray(raw)
        flipped[at] ^= 0x80
        yield Damage(f"flip at {at}", bytes(flipped))


def strangers(raw: bytes) -> Iterator[Damage]:
    """Another format's bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    formats = {"zip": packed.getvalue(), "text": b"nothing\n", "non-UTF-8": b'"\xff\xfe"\n'}
    formats |= {"png": b"\x89PNG\r\n\x1a\n" + bytes(64), "zeros": bytes(len(raw))}
    formats |= {"a hostile pickle": hostile_pickles()[0]}
    for name, content in formats.items():
        yield Damage(f"bytes of {name}", content)


class Hostile:
    """Pickled, it makes the file `MARKER` where it is unpickled."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects() -> list[Hostile]:
    return [
        Hostile(os.system, f"touch {MARKER}"),
        Hostile(eval, f"open({MARKER!r}, 'w')"),
        Hostile(Path.touch, Path(MARKER)),
    ]


def hostile_pickles() -> list[bytes]:
    return [pickle.dumps(hostile, protocol=2) for hostile in hostile_objects()]


# ---- JSON ------------------------------------------------------------------------------------


def json_shapes(raw: bytes) -> Iterator[Damage]:
    """A whole file of another shape."""
    for value in OTHERS:
        yield Damage(f"shape {value!r}", json.dumps(value).encode())
    yield Damage("shape 1e400", b"1e400")
    yield Damage("shape 2**70", str(2**70).encode())
    yield Damage("deep lists", b"[" * DEEP + b"]" * DEEP)
    yield Damage("deep objects", b'{"a":' * DEEP + b"1" + b"}" * DEEP)


def json_fields(raw: bytes) -> Iterator[Damage]:
    """Each key removed, doubled, and with a value of another type or size; one too many."""
    whole = json.loads(raw)
    for i, path in enumerate(json_paths(whole)):
        value, name = _get(whole, path), ".".join(map(str, path))
        field = next((key for key in reversed(path) if isinstance(key, str)), "")
        changed = {"other": _other(value, i)}
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed["huge"] = HUGE[i % len(HUGE)]
        for rule, new in changed.items():
            yield Damage(f"{rule} {name}: {new!r}"[:60], _dumps(_set(whole, path, new)), field)
        if isinstance(path[-1], str):
            yield Damage(f"removed {name}", _dumps(_set(whole, path)), field)
        if len(path) == 1 and isinstance(whole, dict):
            doubled = raw.rstrip()[:-1] + f", {json.dumps(path[0])}: {{}}}}".encode()
            yield Damage(f"doubled {name}", doubled, field)
    if isinstance(whole, dict):
        yield Damage("extra", _dumps(whole | {"superfluous": 1}), "superfluous")
    deep = '{"a":' * DEEP + "1" + "}" * DEEP
    for path in itertools.islice(json_paths(whole), 1):
        text = _dumps(_set(whole, path, "DEEP")).decode().replace('"DEEP"', deep)
        yield Damage("deep value", text.encode())


def json_paths(value: Any, before: tuple = ()) -> Iterator[tuple]:
    """The places of all keys, and of the first item of every list."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*before, key)
            yield from json_paths(inner, (*before, key))
    elif isinstance(value, list) and value:
        yield (*before, 0)
        yield from json_paths(value[0], (*before, 0))


def _other(value: Any, i: int) -> Any:
    if value is None:  # what may be unset has a type of its own, but none is an object
        return {}
    kind = float if type(value) is int else type(value)
    others = [o for o in OTHERS if (float if type(o) is int else type(o)) is not kind]
    return others[i % len(others)]


def _get(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _set(whole: Any, path: tuple, *new: Any) -> Any:
    """A copy with `new` at the place `path`, or without that place."""
    copied = json.loads(json.dumps(whole))
    inner = _get(copied, path[:-1])
    if new:
        inner[path[-1]] = new[0]
    else:
        del inner[path[-1]]
    return copied


def _dumps(value: Any) -> bytes:
    return json.dumps(value).replace("Infinity", "1e400").encode()


# ---- TOML, line by line ----------------------------------------------------------------------


def toml_lines(raw: bytes) -> Iterator[Damage]:
    lines = raw.decode().splitlines()
    for i, line in enumerate(lines):
        key, sign, value = line.partition(" = ")
        if not sign or line.startswith("#"):
            continue

        def with_line(*new: str, i=i) -> bytes:
            return "\n".join([*lines[:i], *new, *lines[i + 1 :]]).encode()

        yield Damage(f"cut {key}", "\n".join([*lines[:i], f"{key} ="]).encode())
        yield Damage(f"doubled {key}", with_line(line, line))  # tomllib names the line
        number = value.replace(".", "").isdecimal()
        yield Damage(f"other {key}", with_line(f"{key} = " + ("{}", '"x"')[number]), key)
        if number:
            yield Damage(f"huge {key}", with_line(f"{key} = {('inf', 2**70, -1)[i % 3]}"), key)
        yield Damage(f"removed {key}", with_line())
    yield Damage("extra", b"superfluous = 1\n" + raw, "superfluous")
    yield Damage("deep lists", b"superfluous = " + b"[" * DEEP + b"]" * DEEP)
    yield Damage("deep tables", b"superfluous = " + b"{a=" * DEEP + b"1" + b"}" * DEEP)


# ---- safetensors -----------------------------------------------------------------------------


def safetensors_headers(raw: bytes) -> Iterator[Damage]:
    """Lies about the header's length, and its JSON, of which the first tensor, by every rule."""
    (size,) = struct.unpack_from("<Q", raw)
    text, data = raw[8 : 8 + size], raw[8 + size :]
    for length in (0, size - 1, size + 1, 2**40, 2**64 - 1):
        yield Damage(f"length {length}", struct.pack("<Q", length) + raw[8:])
    header = json.loads(text)
    name = next(name for name in header if name != "__metadata__")
    first = json.dumps({name: header.pop(name)}).encode()
    rest = json.dumps(header).encode()
    for damage in itertools.chain(json_shapes(text), json_fields(first)):
        new = damage.content
        if "shape" not in damage.rule and "deep" not in damage.rule and new[-1:] == b"}":
            new = new[:-1] + (b", " if len(new) > 2 else b"") + rest[1:]
        if damage.rule.startswith("extra"):
            continue
        yield Damage(f"header {damage.rule}", struct.pack("<Q", len(new)) + new + data)


# ---- zip files, among them .npz and .pt --------------------------------------------------------

DIRECTORY = b"PK\1\2"
LIES = {  # in the directory: offset, format, what becomes of the number
    "encrypted": (8, "<H", lambda n: n | 1),
    "method": (10, "<H", lambda n: 99),
    "checksum": (16, "<I", lambda n: n ^ 1),
    "packed size": (20, "<I", lambda n: 2**31),
    "size": (24, "<I", lambda n: 2**32 - 2),
    "offset": (42, "<I", lambda n: 2**31),
}


def zip_lies(raw: bytes) -> Iterator[Damage]:
    """What the directory says of the first member that counts."""
    for name, (offset, form, change) in LIES.items():
        lying, at = bytearray(raw), raw.index(DIRECTORY)
        (number,) = struct.unpack_from(form, raw, at + offset)
        struct.pack_into(form, lying, at + offset, change(number))
        yield Damage(f"zip {name}", bytes(lying))


def zip_members(raw: bytes) -> Iterator[Damage]:
    """The first member under other names, and with a zip file in its place."""
    (first, content), *rest = read_zip(raw)
    for name in (f"../../{first}", f"/{first}", f"0\\..\\..\\{first}"):
        yield Damage(f"member {name}", write_zip([(name, content), *rest]))
    yield Damage("nested", write_zip([(first, raw), *rest]))
    yield Damage("empty zip", write_zip([]))
    packed = zlib.compress(bytes(2**24), 9)
    yield Damage("zeros", write_zip([(first, packed), *rest]))


def read_zip(raw: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def write_zip(members: list[tuple[str, bytes]]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return packed.getvalue()


def npz_arrays(raw: bytes) -> Iterator[Damage]:
    """Every array removed, and with another header than its own."""
    members = read_zip(raw)
    for i, (name, content) in enumerate(members):

        def with_array(new: bytes, i=i, name=name) -> bytes:
            return write_zip([*members[:i], (name, new), *members[i + 1 :]])

        yield Damage(f"removed {name}", write_zip(members[:i] + members[i + 1 :]))
        array = np.load(io.BytesIO(content), allow_pickle=False)
        body = content[len(content) - array.nbytes :]
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
        lies = {"shape": (2**40, *array.shape[1:]), "descr": "|O", "fortran_order": "x"}
        lies = [header | {key: lie} for key, lie in lies.items()]
        lies += [header | {"descr": "<f4"}, header | {"shape": (-1,)}]
        lies += [{k: v for k, v in header.items() if k != key} for key in header]
        for lie in lies:
            yield Damage(f"{name} {lie}"[:80], with_array(_npy(repr(lie)) + body))
        for text in ("(" * DEEP, "{", "[]", "__import__('os')"):
            yield Damage(f"{name} header {text[:9]}", with_array(_npy(text) + body))
        objects = io.BytesIO()
        np.save(objects, np.array(hostile_objects(), object), allow_pickle=True)
        yield Damage(f"{name} hostile", with_array(objects.getvalue()))
        for damage in itertools.chain(cuts(content), flips(content)):
            yield Damage(f"{name} {damage.rule}", with_array(damage.content))
        if array.dtype.kind == "f":
            strange = array.copy()
            strange.flat[0] = np.nan
            yield Damage(f"{name} not finite", with_array(_npy(repr(header)) + strange.tobytes()))


def _npy(header: str) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text


def weights(raw: bytes) -> Iterator[Damage]:
    """A torch.save of tensors by name: each removed, each replaced; objects that run code."""
    state = torch.load(io.BytesIO(raw), weights_only=True)

    def saved(content: Any) -> bytes:
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    for i, (name, tensor) in enumerate(state.items()):
        others = ["x", tensor.to("meta"), tensor.long(), tensor[None], tensor.to_sparse(), None]
        yield Damage(f"other {name}", saved(state | {name: others[i % len(others)]}))
        rest = {key: value for key, value in state.items() if key != name}
        yield Damage(f"removed {name}", saved(rest), name)
        if i < len(hostile_objects()):
            yield Damage(f"hostile {name}", saved(state | {name: hostile_objects()[i]}))
    for content in (*OTHERS, state | {"superfluous": tensor}, {"model": state | {7: tensor}}):
        yield Damage(f"shape {str(content)[:9]}", saved(content))
    for i, content in enumerate(hostile_pickles()):
        yield Damage(f"hostile pickle {i}", content)
    deep: list = []
    for _ in range(200):  # more is beyond Python's own pickler
        deep = [deep]
    yield Damage("deep", saved(deep))
    yield Damage("deep pickle", b"\x80\x02" + b"(" * DEEP + b"l" * DEEP + b".")


def parquet_metadata(raw: bytes) -> Iterator[Damage]:
    """What Hugging Face notes of the columns, by the rules of JSON; and columns of other types."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(io.BytesIO(raw))
    stated = table.schema.metadata[b"huggingface"]
    for damage in itertools.chain(
        cuts(stated), flips(stated), json_shapes(stated), json_fields(stated)
    ):
        changed = table.replace_schema_metadata({b"huggingface": damage.content})
        yield Damage(f"metadata {damage.rule}", _parquet(changed))
    for name in table.column_names:
        for values in ([[]] * len(table), ["x"] * len(table), [2**62] * len(table)):
            at = table.column_names.index(name)
            yield Damage(f"{name} is {values[0]!r}", _parquet(table.set_column(at, name, [values])))
        yield Damage(f"removed {name}", _parquet(table.drop_columns([name])))


def _parquet(table) -> bytes:
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


# ---- images and arrays -------------------------------------------------------------------------


def png_headers(raw: bytes) -> Iterator[Damage]:
    """Sizes that lie, with the right checksum: bombs without their pixels."""
    width, height = struct.unpack_from(">2I", raw, 16)
    sizes = [(2**31 - 1, 2**31 - 1), (30_000, 1), (0, height), (width, 2 * height), (10**9, 1)]
    for size in sizes:
        chunk = b"IHDR" + struct.pack(">2I", *size) + raw[24:29]
        lying = raw[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + raw[33:]
        yield Damage(f"size {size}", lying)


def idx_headers(raw: bytes) -> Iterator[Damage]:
    """Each of the sizes in an idx file."""
    for k in range(raw[3]):
        for size in (-1, 0, 1, 2**31 - 1):
            lying = bytearray(raw)
            struct.pack_into(">i", lying, 4 + 4 * k, size)
            yield Damage(f"size {k} is {size}", bytes(lying))


def pickles(raw: bytes) -> Iterator[Damage]:
    """A pickled dictionary: each key removed, each value another or hostile."""
    content = pickle.loads(raw)  # our own
    for key in content:
        rest = {k: v for k, v in content.items() if k != key}
        yield Damage(f"removed {key!r}", pickle.dumps(rest, protocol=2))
        for new in (*OTHERS, *hostile_objects()):
            yield Damage(f"{key!r} {new!r}"[:60], pickle.dumps(content | {key: new}, protocol=2))
    for i, hostile in enumerate(hostile_pickles()):
        yield Damage(f"hostile pickle {i}", hostile)


BYTES = (places, cuts, flips, strangers)
JSON = (*BYTES, json_shapes, json_fields)
TOML = (places, flips, strangers, toml_lines)
SAFETENSORS = (*BYTES, safetensors_headers)
ZIP = (*BYTES, zip_lies, zip_members)
NPZ = (*BYTES, zip_lies, npz_arrays)
WEIGHTS = (*BYTES, zip_lies, weights)
IDX = (*BYTES, idx_headers)
PICKLE = (*BYTES, pickles)
