"""Numbers as people read them."""

from __future__ import annotations


def sizes(shape: tuple[int | str, ...]) -> str:
    """Sizes of a tensor.

    >>> sizes((16, 3, 3, 3))
    '16×3×3×3'
    """
    return "×".join(map(str, shape))


def percent(share: float) -> str:
    """A share with about three digits; what is small is not called zero.

    >>> percent(0.1234), percent(0.00012), percent(3e-7), percent(0.0)
    ('12.3%', '0.01%', '3e-05%', '0%')
    """
    value = share * 100
    if value == 0:
        return "0%"
    if value < 0.01:
        return f"{value:.0e}%"
    digits = 2 if value < 1 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}%"


def relative(before: int | None, after: int | None) -> str:
    """The change from one count to another.

    >>> relative(200, 100), relative(3, 3), relative(0, 5)
    ('−50.0%', 'same', '+5')
    """
    if before is None or after is None:
        return ""
    if before == after:
        return "same"
    sign = "+" if after > before else "−"
    return sign + (percent(abs(after - before) / before) if before else f"{abs(after - before):,}")


def count_si(count: int | None) -> str:
    """A large count with four digits.

    >>> count_si(40551040), count_si(512), count_si(None)
    ('40.55 M', '512', 'not known')
    """
    if count is None:
        return "not known"
    for factor, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= factor:
            return f"{count / factor:.4g} {letter}"
    return str(count)
