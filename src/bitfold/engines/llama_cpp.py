"""llama.cpp in this process: its C interface, in the library that the package xllamacpp brings.

What is read of its structures are their first fields and those of `llama_batch`, which have stood for years; that
they are where they are expected is checked before anything is run (llama.h).
"""

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from bitfold.engines.stepwise import Stepwise
from bitfold.errors import CheckpointError, MissingExtraError

__all__ = ["LlamaCpp"]

# More than any version's parameters take: they are passed by value, and what is behind them is not read.
_ROOM = 512


class _Parameters(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint8 * (_ROOM - 12))]


class _Batch(ctypes.Structure):
    """`llama_batch`: tokens, each with a position, the sequences it is of, and whether its logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_QUIET = _LOG(lambda level, text, data: None)


class LlamaCpp(Stepwise):
    """A GGUF file loaded in llama.cpp, on the CPU; a context manager, which gives its memory back."""

    def __init__(self, file: Path, *, context: int, threads: int | None = None) -> None:
        """context: tokens of the longest window. threads: those PyTorch uses, if None.

        Raises MissingExtraError without the package, CheckpointError for a file that llama.cpp does not load.
        """
        self._library = library = _library()
        self._model = self._context = None
        library.llama_backend_init()
        self._model = library.llama_model_load_from_file(
            str(file).encode(), library.llama_model_default_params()
        )
        if not self._model:
            raise CheckpointError(
                f"llama.cpp does not load {file}: it is damaged, or of another version; export it again."
            )
        parameters = _checked(library.llama_context_default_params())
        parameters.first[:] = [context, context, context]
        self._context = library.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise CheckpointError(
                f"llama.cpp cannot run {file} with a context of {context} tokens: give shorter windows."
            )
        count = threads or torch.get_num_threads()
        library.llama_set_n_threads(self._context, count, count)
        self._words = library.llama_model_get_vocab(self._model)
        self.vocabulary = int(library.llama_vocab_n_tokens(self._words))
        self._length = context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what the model takes."""
        if self._context:
            self._library.llama_free(self._context)
        if self._model:
            self._library.llama_model_free(self._model)
        self._context = self._model = None

    def start(self) -> None:
        """Forget all tokens."""
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        self._position = 0

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [tokens, vocabulary] behind each token, which go on from those before."""
        library, count = self._library, len(tokens)
        batch = library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = self._position + place
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = 0
                batch.logits[place] = 1
            if code := library.llama_decode(self._context, batch):
                raise CheckpointError(
                    f"llama.cpp stopped with code {code} at token {self._position} of at most {self._length}."
                )
        finally:
            library.llama_batch_free(batch)
        self._position += count
        found = library.llama_get_logits(self._context)
        view = np.ctypeslib.as_array(found, shape=(count, self.vocabulary))
        return torch.from_numpy(view.copy())

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text. special: with the tokens that the file's tokenizer puts around it."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(self._words, raw, len(raw), ids, room, special, False)
        return list(ids[:count])


def _library() -> Any:
    """The library, its functions' types declared. Raises MissingExtraError where there is none."""
    package = find_spec("xllamacpp")
    found = sorted(Path(package.origin).parent.glob("*.so")) if package and package.origin else []
    if not found:
        raise MissingExtraError(
            "llama.cpp is not installed, which runs GGUF files: pip install -c constraints.txt '.[gguf]'."
        )
    library = ctypes.CDLL(str(found[0]))
    pointer, integer, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool
    words = ctypes.POINTER(ctypes.c_int32)
    types: dict[str, tuple[Any, list[Any]]] = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [_LOG, pointer]),
        "llama_model_default_params": (_Parameters, []),
        "llama_context_default_params": (_Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Parameters]),
        "llama_init_from_model": (pointer, [pointer, _Parameters]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_set_n_threads": (None, [pointer, integer, integer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (integer, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, flag]),
        "llama_batch_init": (_Batch, [integer, integer, integer]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_tokenize": (
            integer,
            [pointer, ctypes.c_char_p, integer, words, integer, flag, flag],
        ),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_log_set(_QUIET, None)
    return library


def _checked(parameters: _Parameters) -> _Parameters:
    """A context's parameters, if the fields that are to be set have the defaults that are known."""
    if list(parameters.first) != [512, 2048, 512]:
        raise MissingExtraError(
            f"The installed llama.cpp has another interface (its context begins {list(parameters.first)}): install "
            "the version of bitfold's constraints.txt."
        )
    return parameters
