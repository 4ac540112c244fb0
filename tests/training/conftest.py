"""What the tests of training share."""

from trainings import world  # noqa: F401 - a fixture
