"""Pickled weights (pytorch_model.bin), read only when the user allows it.

torch's restricted unpickler (`weights_only=True`) builds tensors and nothing else, and maps the file instead of
reading it.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch

from onnxpress.errors import CorruptFileError, UnsafeInputError, UnsupportedModelError
from onnxpress.exporter.sources.torch_arrays import IR_DTYPES, to_numpy
from onnxpress.graph.tensors import WeightTensor


class PickledTensor(WeightTensor):
    """A tensor over a mapped pytorch_model.bin."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        super().__init__(lambda: to_numpy(tensor), IR_DTYPES[tensor.dtype], tuple(tensor.shape), name=name)


def read_pickle(path: Path) -> dict[str, WeightTensor]:
    """The tensors of a pytorch_model.bin, by name.

    Raises:
        UnsafeInputError: the pickle wants to create something else than tensors.
        CorruptFileError: truncated or damaged, or in torch's format from before 1.6, which cannot be mapped.
        UnsupportedModelError: an element type that onnxpress does not know.
    """
    try:
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeInputError(
            f"{path}: the pickle holds more than tensors", hint="convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is damaged, or older than torch 1.6: {str(error).splitlines()[0]}",
            hint="fetch it again, or convert it to safetensors",
        ) from error
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CorruptFileError(f"{path} is not a table of tensors", hint="save the model's state_dict, or safetensors")
    for name, tensor in loaded.items():
        if tensor.dtype not in IR_DTYPES:
            raise UnsupportedModelError(
                f"{path}: tensor {name} has element type {tensor.dtype}, which onnxpress does not read",
                hint="save it as bfloat16, float16 or float32",
            )
    return {str(name): PickledTensor(str(name), tensor.detach()) for name, tensor in loaded.items()}
