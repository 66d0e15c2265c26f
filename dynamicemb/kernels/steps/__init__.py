"""The count of a table's update steps, and Adam's bias corrections ``1 - beta ** t`` that follow from it.

Both engines compute a correction in float64, by squaring, bit by bit of ``t``: with ``d(n) = 1 - beta ** n``,

    d(2n) = d(n) * (2 - d(n))        d(m + n) = d(m) + d(n) * (1 - d(m))

Neither takes a difference of nearly equal numbers, so rounding errors are not magnified as they are when ``beta ** t``
is near 1: with no fused multiply-add, each bit of ``t`` adds at most three of 2**-53 to the relative error, which stays
below 2.2e-14 for every beta from 0 to 1 and every ``t``. The result is then rounded to float32.

This is no operation of its own: the first kernel of an :func:`~dynamicemb.kernels.update.update` does it.
"""
