"""What `trainers.codec` says where it refuses."""

import pytest

from trainers import codec


def fails(words, capsys):
    """The line that these words end in."""
    with pytest.raises(SystemExit) as caught:
        codec.main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip()
