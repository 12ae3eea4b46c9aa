"""Damaged files, made from good ones: what hypothesis draws here is a function of nothing but its choices."""

import json
import struct
import zlib

from hypothesis import strategies as st

DIRECTORY = object()
"""Stands for a folder in place of the file."""

# Stand for texts that `json.dumps` would not write.
_RAW = {
    "raw:4301 digits": "9" * 4301,
    "raw:-4301 digits": "-" + "9" * 4301,
    "raw:4301 decimals": "0." + "3" * 4301,
    "raw:1e400": "1e400",
    "raw:1e4301": "1e" + "9" * 4301,
    "raw:NaN": "NaN",
    "raw:Infinity": "Infinity",
    "raw:-Infinity": "-Infinity",
    "raw:lone surrogate": '"\\ud800"',
    "raw:50 lists": "[" * 50 + "]" * 50,
    "raw:900 lists": "[" * 900 + "]" * 900,
    "raw:100000 lists": "[" * 100_000 + "]" * 100_000,
    "raw:100000 dictionaries": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "raw:no JSON": "nul",
}
_ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 1.5, -0.5, 64.0, 1e308, -1e308, 1e-320),
    *(2**20, 2**31, 2**63, 2**64, -(2**63), 10**9, 10**12, 10**30, 10**99, 10**400),
    *("", " ", "x", "1", "1.0", "None", "\0", "a\0b", "\n", "é", "\udcff", "x" * 300, "x" * 70_000),
    *("../../x", "/", ".", "/dev/zero", "C:\\x", "(a:1e9)", "%s%n", "{0}"),
    *([], {}, [[]], [None], ["x"], [0], [-1], [10**12], {"a": 1}, {"": {}}, [{}], [1] * 20_000, ["x"] * 3),
    *_RAW,
]


def _places(value, path=()):
    """Yields the paths of everything inside of a JSON value, itself included, and of some of each list."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from _places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(min(len(value), 6)):
            yield from _places(value[index], (*path, index))


def _changed(value, path, change):
    """A copy of a JSON value in which `change(container, key)` was done at a path."""
    if not path:
        box = [value]
        change(box, 0)
        return box[0] if box else None
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1:
        change(copy, path[0])
    else:
        copy[path[0]] = _changed(copy[path[0]], path[1:], change)
    return copy


@st.composite
def json_values(draw, value):
    """A JSON value with one to three faults in it."""
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        path = draw(st.sampled_from(list(_places(value))))
        value = _changed(value, path, draw(st.sampled_from(_JSON_CHANGES))(draw))
    return value


def _replace(draw):
    odd = draw(st.sampled_from(_ODD))

    def change(container, key):
        container[key] = odd

    return change


def _delete(draw):
    def change(container, key):
        del container[key]

    return change


def _another_type(draw):
    kind = draw(st.integers(0, 5))

    def change(container, key):
        value = container[key]
        text = json.dumps(value)
        container[key] = ([value], {"a": value}, text[:1000], [value, value], float(len(text)), bool(value))[
            kind
        ]

    return change


def _scale(draw):
    factor = draw(st.sampled_from((-1, 0, 2, 3, 1000, 10**6, 10**12, 0.5)))

    def change(container, key):
        if isinstance(container[key], int | float):
            container[key] = container[key] * (factor if abs(container[key]) < 1e100 else 1)
        elif isinstance(container[key], str | list):
            container[key] = container[key] * (factor if factor in (0, 2, 3) else 1)

    return change


def _add(draw):
    odd, name = draw(st.sampled_from(_ODD)), draw(st.sampled_from(("x", "", "\0", "0", "a.b", "x" * 5000)))

    def change(container, key):
        if isinstance(container, dict):
            container[name] = odd
        else:
            container.append(odd)

    return change


def _move(draw):
    def change(container, key):
        value = container[key]
        if isinstance(container, dict):
            others = list(container)
            container[others[0]] = value
        else:
            container.insert(0, value)

    return change


_JSON_CHANGES = (_replace, _replace, _replace, _delete, _another_type, _scale, _add, _move)


def json_bytes(value):
    """The text of a JSON value, with what `json.dumps` would not write in place of what stands for it."""
    text = json.dumps(value, ensure_ascii=True) if value is not None else "null"
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


@st.composite
def bytes_of(draw, content):
    """Some bytes with one to four faults that know no format."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = len(content)
        place = draw(st.integers(0, max(end - 1, 0)))
        length = draw(st.sampled_from((1, 1, 2, 4, 8, 64, 1024, end // 2)))
        kind = draw(st.integers(0, 7))
        if kind <= 2 and end:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == 3:
            del content[place:]
        elif kind == 4:
            del content[place : place + length]
        elif kind == 5:
            content[place:place] = content[place : place + length]
        elif kind == 6:
            content[place : place + length] = (
                draw(st.sampled_from((b"\0", b"\xff", b"9", b"[", b'"'))) * length
            )
        else:
            content[place:place] = draw(st.binary(max_size=16))
    return bytes(content)


@st.composite
def texts(draw, content):
    """A text file with faults in its lines, or in its bytes."""
    if draw(st.booleans()):
        return draw(bytes_of(content))
    lines = content.split(b"\n")
    place = draw(st.integers(0, len(lines) - 1))
    odd = (
        b"",
        b" ",
        b"\0",
        b"\xff\xfe",
        b"x",
        b"a b c",
        b" a",
        b"a ",
        "é è".encode(),
        b"x" * 100_000,
        b"(a:" * 30_000,
        b"[" * 90_000,
        b"9" * 4301,
    )
    kind = draw(st.integers(0, 3))
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(place, draw(st.sampled_from(lines)))
    else:
        lines[place] = draw(st.sampled_from(odd))
    return b"\n".join(lines)


@st.composite
def json_files(draw, content):
    """A JSON file with faults in its values, or in its bytes."""
    if draw(st.integers(0, 4)) == 0:
        return draw(bytes_of(content))
    changed = json_bytes(draw(json_values(json.loads(content))))
    if draw(st.integers(0, 9)) == 0:  # a key twice
        text = json_bytes(draw(json_values(json.loads(content))))
        if changed.startswith(b"{") and text.startswith(b"{") and min(len(text), len(changed)) > 2:
            return changed[:-1] + b"," + text[1:]
    return changed


@st.composite
def json_lines(draw, content):
    """A file of JSON lines with faults in the values of a line, in the order of lines, or in the bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(texts(content))
    lines = content.splitlines()
    place = draw(st.integers(0, len(lines) - 1))
    lines[place] = json_bytes(draw(json_values(json.loads(lines[place]))))
    return b"\n".join(lines) + b"\n"


@st.composite
def safetensors(draw, content):
    """A safetensors file with faults in its header's values, its length, or its bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(bytes_of(content))
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length]
    if draw(st.integers(0, 5)):
        header = json_bytes(draw(json_values(json.loads(header))))
    lengths = (len(header),) * 6 + (0, 1, len(header) - 1, len(header) + 1, 2**31, 2**40, 2**63, 2**64 - 1)
    return struct.pack("<Q", draw(st.sampled_from(lengths))) + header + content[8 + length :]


def _bomb(mib):
    """Zeros, compressed."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(mib)) + packer.flush()


_ODD_CHUNKS = {
    "text": b"tEXtparameters\0" + b"a: b, " * 10_000,
    "long text": b"tEXtparameters\0" + b"a: b, " * 2**20,
    "no keyword": b"tEXt" + b"x" * 200,
    "latin": b"tEXtparameters\0\xff\xfe\x00",
    "compressed": b"zTXtparameters\0\0" + zlib.compress(b"x" * 100),
    "bomb": b"zTXtparameters\0\0" + _bomb(200),
    "large": b"zTXtparameters\0\0" + zlib.compress(b"a: b, " * 2**17, 9),
    "international bomb": b"iTXtparameters\0\1\0\0\0" + _bomb(100),
    "international": b"iTXtparameters\0\0\0\0\0" + 'é: "é\\", x: '.encode() * 3000,
    "profile bomb": b"iCCPx\0\0" + _bomb(100),
    "exif": b"eXIfII*\0\x08\0\0\0\xff\xff\x12\1\3\0\1\0\0\0",
    "animation": b"acTL" + struct.pack(">II", 2**31 - 1, 0),
    "palette": b"PLTE" + bytes(3),
    "transparency": b"tRNS" + bytes(300),
}


@st.composite
def png(draw, content):
    """A PNG file with faults in its chunks, whose checksums are right again, or in its bytes."""
    if draw(st.integers(0, 2)) == 0:
        return draw(bytes_of(content))
    chunks = _chunks(content)
    kind = draw(st.integers(0, 4))
    place = draw(st.integers(0, len(chunks) - 1))
    if kind == 0:  # another size, depth, colour type, compression, filter, interlace
        fields = list(struct.unpack(">IIBBBBB", chunks[0][4:]))
        field = draw(st.integers(0, 6))
        sizes = (0, 1, 15, 17, 1000, 8000, 30_000, 65_535, 2**31 - 1, 2**32 - 1)
        fields[field] = draw(st.sampled_from(sizes if field < 2 else (0, 1, 2, 3, 4, 6, 8, 16, 255)))
        chunks[0] = b"IHDR" + struct.pack(">IIBBBBB", *fields)
    elif kind == 1:
        chunks.insert(max(place, 1), draw(st.sampled_from(list(_ODD_CHUNKS.values()))))
    elif kind == 2:
        chunks[place] = chunks[place][:4] + draw(bytes_of(chunks[place][4:]))
    elif kind == 3:
        del chunks[place]
    else:
        chunks.insert(place, chunks[draw(st.integers(0, len(chunks) - 1))])
    return content[:8] + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def _chunks(content):
    position, chunks = 8, []
    while position < len(content):
        (length,) = struct.unpack(">I", content[position : position + 4])
        chunks.append(content[position + 4 : position + 8 + length])
        position += 12 + length
    return chunks


_BY_SUFFIX = {
    ".json": json_files,
    ".jsonl": json_lines,
    ".safetensors": safetensors,
    ".png": png,
    ".txt": texts,
    ".caption": texts,
    ".md": texts,
}


@st.composite
def damaged(draw, files, others=()):
    """A fault of a set of files: `(name, content)`; the content may be `DIRECTORY`, or None for no file.

    Args:
        files: dictionary from name to content.
        others: contents to put into any file as they are.
    """
    name = draw(st.sampled_from(sorted(files)))
    kind = draw(st.integers(0, 39))
    if kind == 0:
        return name, draw(st.sampled_from((b"", DIRECTORY, None, b"\xff\xfe\x00", b"\xef\xbb\xbf")))
    if kind <= 4 and others:
        return name, draw(st.sampled_from(others))
    suffix = name[name.rfind(".") :]
    return name, draw(_BY_SUFFIX.get(suffix, bytes_of)(files[name]))
