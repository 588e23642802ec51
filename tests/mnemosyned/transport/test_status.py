from __future__ import annotations

import inspect

from mnemosyned import errors
from mnemosyned.errors import MnemosyneError
from mnemosyned.transport.status import GRPC_STATUS


def test_every_error_has_a_grpc_status_and_nothing_else_does() -> None:
    assert set(MnemosyneError.__subclasses__()) == GRPC_STATUS.keys()


def test_the_tree_is_one_level_deep() -> None:
    classes = [one for _, one in inspect.getmembers(errors, inspect.isclass)]

    assert all(one.__bases__ in {(MnemosyneError,), (Exception,)} for one in classes)


def test_every_error_can_be_rebuilt_from_its_args() -> None:
    for kind in GRPC_STATUS:
        error = kind("text")
        assert str(type(error)(*error.args)) == "text"
