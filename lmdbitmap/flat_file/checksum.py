"""zlib's CRC-32 over runs of zeroes without the zeroes themselves, by the method of zlib's `crc32_combine`."""

from __future__ import annotations

from typing import Final

_POLYNOMIAL: Final = 0xEDB88320


def crc32_with_zeroes(checksum: int, count: int) -> int:
    """Return the CRC-32 of data with CRC-32 `checksum` followed by `count` zero bytes, in O(bits of `count`) steps.

    A zero byte multiplies the register, a polynomial over GF(2), by x^8. So `count` of them multiply it by
    x^(8 count), computed by repeated squaring. As in CRC-32 itself, the top bit stands for x^0.
    """
    register, power = checksum ^ 0xFFFFFFFF, 1 << 31 - 8
    while count:
        if count & 1:
            register = _multiplied(register, power)
        power = _multiplied(power, power)
        count >>= 1
    return register ^ 0xFFFFFFFF


def _multiplied(left: int, right: int) -> int:
    """Return the product of two polynomials modulo CRC-32's polynomial."""
    product = 0
    while left:
        if left & 1 << 31:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
