"""One Label Studio for all end-to-end tests; its start takes most of a minute."""

from collections.abc import Iterator

import pytest

from tests.e2e.label_studio import LabelStudio, running_label_studio


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabelStudio]:
    with running_label_studio(tmp_path_factory.mktemp("label-studio")) as running:
        yield running
