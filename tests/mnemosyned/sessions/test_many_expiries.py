from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio.steps import STEP_ITEMS
from mnemosyned.sessions.encoded import ExpiryField
from mnemosyned.sessions.many_expiries import expiry_fields

YEAR_9999_US = 253_402_300_799_999_999


@given(
    st.lists(st.integers(0, YEAR_9999_US), max_size=20)
    # Those that are encoded together, and have nanoseconds of each size.
    | st.lists(
        st.builds(
            lambda second, us: second * 1_000_000 + us,
            st.integers(2**28, 2**35 - 1),
            st.integers(0, 999_999) | st.integers(0, 3000),
        ),
        min_size=16,
        max_size=STEP_ITEMS,
    )
)
def test_many_expiries_are_encoded_as_each_is(expiries_us: list[int]) -> None:
    assert expiry_fields(expiries_us) == [ExpiryField().encode(us) for us in expiries_us]


@pytest.mark.parametrize("us", [0, 1, 2_097, 2_098, 268_435, 268_436, 999_999])
def test_the_size_of_an_expiry_may_change_at_any_microsecond(us: int) -> None:
    expiries_us = [1_764_000_000_000_000 + us] * STEP_ITEMS

    assert expiry_fields(expiries_us) == [ExpiryField().encode(one) for one in expiries_us]
