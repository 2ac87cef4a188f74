"""Bad arguments are refused by name, as users call the library: without run-time type checks."""

import bad_calls
import pytest

from bad_input import assert_refused, name_of

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.mark.parametrize("case", bad_calls.cases(), ids=name_of)
def test_a_bad_argument_is_refused_by_name(case, folder):
    assert_refused(case, folder)
