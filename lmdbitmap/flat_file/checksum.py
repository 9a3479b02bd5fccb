"""CRC-32, as zlib computes it, of zeroes that nobody has to hold."""

from __future__ import annotations

from typing import Final

_POLYNOMIAL: Final = 0xEDB88320


def crc32_with_zeroes(checksum: int, count: int) -> int:
    """CRC-32 of what has `checksum` and `count` zero bytes behind it, in as many steps as `count` has bits.

    A zero byte multiplies the register, a polynomial over GF(2), by x^8; so `count` of them multiply it by
    x^(8 count), which is had by squaring. As in the checksum itself, the top bit stands for x^0.
    """
    register, power = checksum ^ 0xFFFFFFFF, 1 << 31 - 8
    while count:
        if count & 1:
            register = _multiplied(register, power)
        power = _multiplied(power, power)
        count >>= 1
    return register ^ 0xFFFFFFFF


def _multiplied(left: int, right: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    while left:
        if left & 1 << 31:
            product ^= right
        left = left << 1 & 0xFFFFFFFF
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product
