"""Words, by which keys are sorted on the CPU.

A word is the top bits of a mixed key and, in as many low bits as the batch needs, the place of the key. So words are
distinct, their order is that of a stable sort, and there is but one array to move. They are distributed over about as
many cells as there are words, which leaves little to an insertion sort. Neighbours with the same top bits are nearly
always the same key; where they are not, the remaining bits of their mixed keys decide.

Places are unsigned. A signed index may count from the end, which Numba tests for, and loops that do are not vectorised:
mixing would take ten times as long.
"""

from __future__ import annotations

import numpy as np

from dynamicemb.kernels.hashing.cpu import mix
from dynamicemb.kernels.numba_support import inline

__all__ = ["HEAD", "MAX_CELL_BITS", "bit_length", "clear", "make_words", "mark_entries", "settle", "sort_words"]

#: Set where a key comes first among its equals.
HEAD = np.uint64(1 << 63)
#: 4096 counters of 4 bytes stay in the first-level cache.
MAX_CELL_BITS = 12
# Insertion that moves more words than this for each that it sorts is given up for a merge sort: keys can be chosen so
# that all of them get into one cell.
_MOVES_PER_WORD = 16
_0, _1, _64 = np.uint64(0), np.uint64(1), np.uint64(64)


@inline
def bit_length(number):
    bits = 0
    while number > 0:
        number >>= 1
        bits += 1
    return bits


@inline
def clear(counters, first, stop):
    for i in range(first, stop):
        counters[i] = 0


@inline
def make_words(first, stop, keys, low_mask, at, words):
    """Words of ``keys[first:stop]``, to ``words`` from ``at`` on."""
    for i in range(np.uint64(stop - first)):
        place = np.uint64(first) + i
        words[np.uint64(at) + i] = (mix(keys[place]) & ~low_mask) | place


@inline
def _insert_words(words, first, stop):
    """Sorts ``words[first:stop]``, unless that takes too long; returns whether they are sorted."""
    moves = np.int64(stop - first) * _MOVES_PER_WORD
    for i in range(first + _1, stop):
        word = words[i]
        if words[i - _1] <= word:
            continue
        hole = np.uint64(i)
        while hole > first and words[hole - _1] > word:
            words[hole] = words[hole - _1]
            hole -= _1
        words[hole] = word
        moves -= np.int64(i - hole)
        if moves < 0:
            return False
    return True


@inline
def _merge_words(words, first, stop, spare):
    """Sorts ``words[first:stop]``, whatever they are; ``spare[first:stop]`` is scratch."""
    width = _1
    while width < stop - first:
        for start in range(first, stop, width + width):
            middle, end = min(start + width, stop), min(start + width + width, stop)
            left, right = np.uint64(start), middle
            for i in range(start, end):
                if right == end or (left < middle and words[left] < words[right]):
                    spare[i] = words[left]
                    left += _1
                else:
                    spare[i] = words[right]
                    right += _1
        for i in range(first, stop):
            words[i] = spare[i]
        width += width


@inline
def _sort_in_place(words, first, stop, spare):
    if not _insert_words(words, first, stop):
        _merge_words(words, first, stop, spare)


@inline
def _distribute(source, first, stop, divide_bits, cells, words):
    """Writes the words to cells of words with the same top bits, in the order of the cells."""
    bits = np.uint64(max(1, min(bit_length(np.int64(stop - first) - 1), MAX_CELL_BITS)))
    left, right = np.uint64(divide_bits), _64 - bits
    clear(cells, _0, _1 << bits)
    for i in range(first, stop):
        cells[(source[i] << left) >> right] += np.uint32(1)
    place = np.uint32(first)
    for cell in range(_1 << bits):
        count = cells[cell]
        cells[cell] = place
        place += count
    for i in range(first, stop):
        cell = (source[i] << left) >> right
        words[cells[cell]] = source[i]
        cells[cell] += np.uint32(1)


@inline
def sort_words(source, first, stop, divide_bits, cells, words):
    """Sorts ``source[first:stop]``, whose top ``divide_bits`` are equal, to ``words[first:stop]``; ``source`` and
    ``cells``, uint32 [2 ** MAX_CELL_BITS], are scratch."""
    _distribute(source, first, stop, divide_bits, cells, words)
    _sort_in_place(words, first, stop, source)


@inline
def mark_entries(first, stop, keys, positions, low_mask, words, marked):
    """Puts the keys in the place of their words, and positions in the batch in ``marked``, with the top bit set where
    a key comes first. Returns the number of keys, and whether words of different keys have equal top bits.

    ``positions`` of ``keys``; none: their places.
    """
    entries, unsettled = _0, False
    word, key = ~words[first], np.int64(0)
    for i in range(first, stop):
        word_before, key_before = word, key
        word = words[i]
        place = word & low_mask
        key = keys[place]
        same_top = (word ^ word_before) <= low_mask
        new = not (same_top and key == key_before)
        position = np.uint64(positions[place]) if positions.size > 0 else place
        words[i], marked[i] = np.uint64(key), position | (HEAD if new else _0)
        entries += np.uint64(new)
        unsettled |= new and same_top
    return entries, unsettled


@inline
def settle(first, stop, low_bits, words, marked):
    """Makes words with positions of what :func:`mark_entries` left, in the order of all bits of their mixed keys."""
    low_mask = (_1 << low_bits) - _1
    while first < stop:
        top, end = mix(words[first]) & ~low_mask, first
        while end < stop and mix(words[end]) & ~low_mask == top:
            words[end] = ((mix(words[end]) & low_mask) << low_bits) | (marked[end] & ~HEAD)
            end += _1
        _sort_in_place(words, first, end, marked)
        for i in range(first, end):
            words[i] = top | (words[i] & low_mask)
        first = end
