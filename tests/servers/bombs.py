"""Bodies that are small on the wire and large when they are unpacked."""

from __future__ import annotations

import zlib
from typing import Any

BITS = {"gzip": 31, "deflate": 15, "raw deflate": -15}


def zip_bomb(fault: dict[str, Any]) -> tuple[str, bytes]:
    """Encoding and bytes of `megabytes` of zeros, a thousandth of that on the wire, by `packing`.

    One megabyte is packed, and then repeated.
    """
    packing = fault.get("packing", "gzip")
    pack = zlib.compressobj(9, zlib.DEFLATED, BITS.get(packing, 31))
    first = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    block = pack.compress(bytes(2**20)) + pack.flush(zlib.Z_FULL_FLUSH)
    data = first + block * (fault.get("megabytes", 2000) - 1)
    return packing.removeprefix("raw "), data
