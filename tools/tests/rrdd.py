#!/usr/bin/env python3
"""Reads a plugin's file as rrdd does (protocol version 2), written from its description and not from the
writer. Prints the time and the data sources: name, owner, description, type, units, value."""

import json
import struct
import sys
import zlib

data = open(sys.argv[1], "rb").read()
assert data[:11] == b"DATASOURCES", data[:11]
data_sum, metadata_sum, count = struct.unpack_from(">III", data, 11)
values_at = 11 + 12
(time,) = struct.unpack_from(">d", data, values_at)
end = values_at + 8 + 8 * count
assert zlib.crc32(data[values_at:end]) == data_sum, "sum of the values"
(length,) = struct.unpack_from(">I", data, end)
text = data[end + 4 : end + 4 + length]
assert len(text) == length and zlib.crc32(text) == metadata_sum, "sum of the metadata"

# Names may come twice, for different owners.
(top,) = json.loads(text.decode("utf-8"), object_pairs_hook=list)
assert top[0] == "datasources"
sources = top[1]
assert len(sources) == count, (len(sources), count)
seen = set()
result = []
for n, (name, about) in enumerate(sources):
    assert all(isinstance(v, str) for _, v in about), about
    about = dict(about)
    kind = about.pop("value_type")
    (value,) = struct.unpack_from({"int64": ">q", "float": ">d"}[kind], data, values_at + 8 + 8 * n)
    assert value == value and abs(value) != float("inf"), name
    owner = about["owner"].split(" ")
    assert owner == ["host"] or (owner[0] in ("vm", "sr") and len(owner) == 2), owner
    assert about["type"] in ("gauge", "absolute", "derive") and about["default"] in ("true", "false")
    assert float(about["min"]) < float(about["max"])
    assert (about["owner"], name) not in seen, name
    seen.add((about["owner"], name))
    result.append([name, about["owner"], about["description"], about["type"], about["units"], value])
json.dump({"time": time, "sources": result}, sys.stdout)
