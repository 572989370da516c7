"""docs/configuration.md is what the code that reads the configuration says."""

import msgspec
import pytest

from launch import configuration
from sglang_ext.config import VARIABLES, ExtConfig, from_environment
from tests.conftest import ROOT


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == configuration.page()


def test_every_field_has_its_variable() -> None:
    fields = [field.name for field in msgspec.structs.fields(ExtConfig)]
    assert [variable.field for variable in VARIABLES] == fields


@pytest.mark.parametrize("variable", VARIABLES, ids=lambda v: v.name)
def test_an_empty_variable_is_not_set(variable) -> None:  # noqa: ANN001
    assert from_environment({variable.name: " "}) == ExtConfig()
