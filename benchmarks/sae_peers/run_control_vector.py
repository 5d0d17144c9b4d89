"""llama.cpp's likeliest next tokens, with a control vector or none.

    python run_control_vector.py '{"gguf": FILE, "vector": FILE, "prompts": [[1, 2], ...], ...}'

Standard output gets ``{"version": "...", "found": [[[token, logprob], ...], ...]}``.

xllamacpp's Python side does not offer control vectors, but its library is all of llama.cpp: its
own loader of such files, ``common_control_vector_load``, and ``llama_set_adapter_cvec`` are
called through ctypes, as ``llama-cli --control-vector FILE`` calls them. Of structures that
travel by value only the defaults are used, so a blob that is long enough stands for them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import xllamacpp

_LOAD = (
    "_Z26common_control_vector_load"  # of a reference to a constant vector of ...
    "RKSt6vectorI31common_control_vector_load_infoSaIS0_EE"
)


class Blob(ctypes.Structure):
    """Any structure that is passed or returned in memory."""

    _fields_ = (("bytes", ctypes.c_byte * 1024),)


class LoadInfo(ctypes.Structure):
    """``common_control_vector_load_info``: a float and a ``std::string``.

    Wheels for old Linuxes have the old kind of string, a pointer to its characters.
    """

    _fields_ = (("strength", ctypes.c_float), ("name", ctypes.c_char_p))


class Vector(ctypes.Structure):
    """A ``std::vector``."""

    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("capacity", ctypes.c_void_p),
    )


class Loaded(ctypes.Structure):
    """``common_control_vector_data``."""

    _fields_ = (("n_embd", ctypes.c_int32), ("data", Vector))


class LlamaCpp:
    """One model; every prompt has a context of its own."""

    def __init__(self, gguf: str, threads: int) -> None:
        (library,) = Path(xllamacpp.__file__).parent.glob("*.so")
        self._c = ctypes.CDLL(str(library))
        self._threads = threads
        kinds = {
            "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, Blob]),
            "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, Blob]),
            "llama_model_default_params": (Blob, []),
            "llama_context_default_params": (Blob, []),
            "llama_batch_get_one": (Blob, [ctypes.c_void_p, ctypes.c_int32]),
            "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, Blob]),
            "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
            "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
            "llama_model_n_layer": (ctypes.c_int32, [ctypes.c_void_p]),
            "llama_free": (None, [ctypes.c_void_p]),
            "llama_set_n_threads": (None, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
            "llama_get_logits_ith": (
                ctypes.POINTER(ctypes.c_float),
                [ctypes.c_void_p, ctypes.c_int32],
            ),
            "llama_set_adapter_cvec": (
                ctypes.c_int32,
                [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int32] * 3],
            ),
        }
        for name, (result, arguments) in kinds.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self._c.llama_backend_init()
        params = self._c.llama_model_default_params()
        self._model = self._c.llama_model_load_from_file(gguf.encode(), params)
        if not self._model:
            raise SystemExit(f"{gguf} was not loaded")
        vocabulary = self._c.llama_model_get_vocab(self._model)
        self._n_vocab = self._c.llama_vocab_n_tokens(vocabulary)
        self._n_layers = self._c.llama_model_n_layer(self._model)

    def load(self, file: str) -> Loaded:
        """By llama.cpp's own loader, with scale 1."""
        info = LoadInfo(1.0, file.encode())
        size = ctypes.sizeof(info)
        start = ctypes.addressof(info)
        loaded = Loaded()
        load = self._c[_LOAD]
        load.restype = ctypes.c_void_p
        load(ctypes.byref(loaded), ctypes.byref(Vector(start, start + size, start + size)))
        if loaded.n_embd < 0:
            raise SystemExit(f"{file} is no control vector for llama.cpp")
        return loaded

    def likeliest(
        self, prompt: list[int], n: int, vector: Loaded | None
    ) -> list[tuple[int, float]]:
        context = self._c.llama_init_from_model(self._model, self._c.llama_context_default_params())
        self._c.llama_set_n_threads(context, self._threads, self._threads)
        if vector is not None:
            data = vector.data
            n_floats = (data.end - data.begin) // ctypes.sizeof(ctypes.c_float)
            # Layers 1 to n_layers: what llama.cpp takes when no range is asked for.
            failed = self._c.llama_set_adapter_cvec(
                context, data.begin, n_floats, vector.n_embd, 1, self._n_layers
            )
            if failed:
                raise SystemExit("the control vector does not fit the model")
        tokens = (ctypes.c_int32 * len(prompt))(*prompt)
        batch = self._c.llama_batch_get_one(ctypes.addressof(tokens), len(prompt))
        if self._c.llama_decode(context, batch):
            raise SystemExit("a prompt was not computed")
        pointer = self._c.llama_get_logits_ith(context, -1)
        logits = np.ctypeslib.as_array(pointer, (self._n_vocab,)).astype(np.float64)
        self._c.llama_free(context)
        logits -= logits.max()
        logprobs = logits - np.log(np.exp(logits).sum())
        top = np.argsort(-logprobs)[:n]
        return list(zip(top.tolist(), logprobs[top].tolist(), strict=True))


def main() -> None:
    given = json.loads(sys.argv[1])
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model = LlamaCpp(given["gguf"], given["threads"])
    vector = model.load(given["vector"]) if given["vector"] else None
    found = [model.likeliest(prompt, given["n"], vector) for prompt in given["prompts"]]
    results.write(json.dumps({"version": metadata.version("xllamacpp"), "found": found}))
    results.flush()


if __name__ == "__main__":
    main()
