"""The package openvino, an extra of bitfold's."""

from typing import Any

from bitfold.errors import MissingExtraError

__all__ = ["openvino_package"]


def openvino_package() -> Any:
    """openvino, with the parts of it that are used here. Raises MissingExtraError without it."""
    try:
        import openvino
        import openvino.frontend.onnx
        import openvino.op.util
        import openvino.opset15
    except ImportError as error:
        raise MissingExtraError(
            "OpenVINO is not installed, which writes and runs its files: pip install -c constraints.txt '.[openvino]'."
        ) from error
    return openvino
