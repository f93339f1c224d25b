"""Statistics of the results on this page. Numbers are accuracies (%), one for each run, unless stated otherwise."""

import itertools
import math
import statistics

import numpy as np


def mean_and_interval(numbers):
    """The mean and its 95 % interval, by bootstrap over the seeds; None if there are no numbers."""
    if not numbers:
        return None
    low, high = interval(numbers)
    return f"{statistics.mean(numbers):.1f}" + (f" ({low:.1f} to {high:.1f})" if len(numbers) > 1 else "")


def interval(numbers):
    """The 95 % bootstrap interval of the mean: the 2.5th and 97.5th percentiles of resampled means."""
    draws = np.random.default_rng(0).choice(numbers, size=(10_000, len(numbers)))
    return np.percentile(draws.mean(axis=1), [2.5, 97.5])


def permutation_test(a, b):
    """Two-sided p: the probability that the means of two random groups differ at least as much as those of a and b.

    Over all splits of the numbers into groups of these sizes, or over 100,000 random ones if there are more.
    """
    numbers, n = np.array([*a, *b]), len(a)
    if math.comb(len(numbers), n) <= 100_000:
        groups = np.array(list(itertools.combinations(range(len(numbers)), n)))
    else:
        groups = np.random.default_rng(0).random((100_000, len(numbers))).argsort(axis=1)[:, :n]
        groups[0] = range(n)  # the observed split is one of them
    of_group = numbers[groups].sum(axis=1)
    differences = np.abs(of_group / n - (numbers.sum() - of_group) / (len(numbers) - n))
    return float(np.mean(differences >= differences[0] - 1e-9))


def difference(a, b):
    """The mean of a - b, numbers paired by seed, and its standard error."""
    found = np.subtract(a, b)
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return f"{found.mean():+.1f}" + (f" ± {error:.1f}" if len(found) > 1 else "")


def sign_flip_test(a, b):
    """Two-sided p that the mean of a - b, paired, is 0: the part of all 2^n choices of signs at least as far from 0."""
    found = np.subtract(a, b)
    sums = np.abs(np.array(list(itertools.product((1, -1), repeat=len(found)))) @ found)
    return float(np.mean(sums >= sums[0] - 1e-9))


def standard_error(numbers):
    """The standard error of the difference of any two rows' means, for numbers (encodings, seeds).

    Differences are taken seed by seed, because runs with the same seed see the same batches. All rows are assumed to
    have the same variance, which makes the most of few seeds: this is the two-way analysis of variance.
    """
    numbers = np.array(numbers)
    k, n = numbers.shape
    rest = numbers - numbers.mean(axis=1, keepdims=True) - numbers.mean(axis=0) + numbers.mean()
    return math.sqrt(2 * (rest**2).sum() / ((k - 1) * (n - 1)) / n)


def as_text(p):
    """A p-value with three digits."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
