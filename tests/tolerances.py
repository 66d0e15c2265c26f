"""Every tolerance of the tests, with its reason. Keys, slots, scores, statuses and copied bytes have none: exact."""

from __future__ import annotations

#: Published bound of Acklam's approximation of the normal quantile: 1.15e-9, rounded up.
NORMAL_QUANTILE_RTOL = 1.2e-9

#: One optimizer step in float32 against the same formula in float64: six roundings of 2**-24 each on the way from the
#: gradient to the row; the engines promise 1e-6. Absolute, because rows and steps in the tests are of order one.
OPTIMIZER_STEP_ATOL = 1e-6
#: Same, for optimizer states: a square, a product and a sum.
OPTIMIZER_STATE_RTOL = 1e-6
#: Row-wise Adagrad sums up to 1024 squares one after the other: the roundings grow like sqrt(1024) * 2**-24 = 2e-6.
ROWWISE_STATE_RTOL = 4e-6

#: Rows after 50 steps against torch.optim, relative to rows of order one; the promise of the package.
OPTIMIZER_RUN_RTOL = 1e-5
OPTIMIZER_RUN_ATOL = 1e-6

#: Standard deviations that a chi-square statistic may lie from its mean. The keys are fixed, so the outcome is too; a
#: hash that keeps any structure of the keys lands in the hundreds.
CHI_SQUARE_SIGMAS = 5.0

#: Mean and standard deviation of 10**6 draws: about five standard errors (1e-3 and 7e-4) of a standard normal.
SAMPLE_MOMENT_ATOL = 5e-3

#: Row-wise Adagrad on the Triton engine against the CPU engine, the one rule in which the order of a sum differs (the
#: mean of squares over the columns): what the engines promise. Absolute for rows, which are of order one and lose
#: digits when a step cancels them. All other rules agree to the bit.
ENGINE_ROWWISE_RTOL = 1e-6
ENGINE_ROWWISE_ATOL = 1e-6

#: Rows after 50 steps against torchrec or torch.optim: the promise of the package, relative to a row's greatest value.
#: The gradients of the runs never cancel; what is left is the order in which float32 sums are taken.
TRAINED_ROW_RTOL = 1e-5

#: Rows after 8 steps with rows and gradients sent in float16: a step of row-wise Adagrad is at most sqrt(columns) *
#: learning rate = 0.28 (in the test), and its relative error 2**-10 (of the gradient, and of the row it is taken at).
QUANTISED_ROW_ATOL = 8 * 0.28 * 2**-10

#: Peak memory of a table against its rows and metadata, as the package promises it.
PEAK_MEMORY_FACTOR = 1.2

#: AUC and log loss of the example on a GPU against the CPU: dense layers add up in another order, so the runs drift
#: apart, but by less than the standard error of an AUC over the 2,000 rows held out, which is about 0.015.
TRAINED_MODEL_ATOL = 0.02
