"""Scores of a sentencepiece model, rounded so that every program adds them up to the same sums.

sentencepiece adds scores in float32, other programs in float64. Where the roundings differ, so may the choice between
segmentations of equal or nearly equal score, such as those of a run of spaces. Sums of multiples of 1/64 are exact in
float32 as far as sentencepiece lets them grow (100,000 in size, then it starts anew), and all agree on every text.
"""

import struct

STEP = 1 / 64


def rounded_scores(serialized: bytes, step: float = STEP) -> bytes:
    """The model with its pieces' scores rounded to multiples of `step`, in place: no other byte changes."""
    edited = bytearray(serialized)

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while edited[at] >= 128:
            value, at, shift = value | (edited[at] & 127) << shift, at + 1, shift + 7
        return value | edited[at] << shift, at + 1

    at = 0
    while at < len(edited) and edited[at] == 0x0A:  # field 1, pieces
        size, at = varint(at + 1)
        end = at + size
        length, at = varint(at + 1)  # its field 1, the piece
        if edited[at + length] == 0x15:  # its field 2, the score, a float
            (score,) = struct.unpack_from("<f", edited, at + length + 1)
            struct.pack_into("<f", edited, at + length + 1, round(score / step) * step)
        at = end
    return bytes(edited)
