"""Bad files, and what stands where a file should, are refused by name."""

import bad_files
import pytest

from bad_input import assert_refused, name_of

pytestmark = pytest.mark.usefixtures("as_a_user")


@pytest.mark.parametrize("case", bad_files.cases(), ids=name_of)
def test_a_bad_file_is_refused_by_name(case, folder):
    assert_refused(case, folder)
